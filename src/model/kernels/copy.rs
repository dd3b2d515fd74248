//! The scores of the copy head of v1 to v3.

use super::{Shared, dot, kernel, parallel};

/// `logits [M, V]` += for each entry of its text, oldest first, query · key / D at the entry's token.
///
/// `queries` are `[M, D]`; each of the M `texts` holds entries of D + 1 values, a key and a token id below V.
pub fn copy(queries: &[f32], texts: &[&[f32]], logits: &mut [f32]) {
    if texts.is_empty() {
        return;
    }
    let (size, vocabulary) = (queries.len() / texts.len(), logits.len() / texts.len());
    let work = texts.iter().map(|text| text.len()).sum();
    let shared = Shared::new(logits);
    parallel(texts.len(), work, |row| {
        // SAFETY: one task for each row of logits.
        let logits = unsafe { shared.part(row * vocabulary, vocabulary) };
        copy_row(&queries[row * size..][..size], texts[row], logits);
    });
}

kernel! {
    fn copy_row(query: &[f32], text: &[f32], logits: &mut [f32]) {
        let size = query.len();
        for entry in text.chunks_exact(size + 1) {
            logits[entry[size] as usize] += dot::<A>(query, &entry[..size]) / size as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_an_f64_reference() {
        let (size, vocabulary) = (13, 5);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 50.0;
        let token = |u: usize| u * u % vocabulary;
        let queries: Vec<f32> = (0..2 * size).map(value).collect();
        let entry = |u: usize| (0..size).map(move |i| value(u * 7 + i * 3)).chain([token(u) as f32]);
        let log: Vec<f32> = (0..9).flat_map(entry).collect();
        // The second row sees four of the nine entries.
        let seen = [0..9, 3..7];
        let texts = seen.clone().map(|u| &log[u.start * (size + 1)..u.end * (size + 1)]);
        let before: Vec<f32> = (0..2 * vocabulary).map(value).collect();
        let mut logits = before.clone();
        copy(&queries, &texts, &mut logits);
        for (row, seen) in seen.into_iter().enumerate() {
            let mut want: Vec<_> = before[row * vocabulary..][..vocabulary].iter().map(|&v| f64::from(v)).collect();
            for u in seen {
                let score = |i| f64::from(queries[row * size + i]) * f64::from(log[u * (size + 1) + i]);
                want[token(u)] += (0..size).map(score).sum::<f64>() / size as f64;
            }
            for (got, want) in logits[row * vocabulary..].iter().zip(want) {
                assert!((f64::from(*got) - want).abs() < 1e-6, "row {row}: {got}, not {want}");
            }
        }
    }
}
