//! Attention over a whole text with scores that are softly capped.

use super::{Shared, dot, exp, kernel, parallel, tanh};

/// `x = tanh x`.
pub fn tanh_all(x: &mut [f32]) {
    /// Elements that one task takes; a multiple of every vector width.
    const BLOCK: usize = 4096;
    let len = x.len();
    let shared = Shared::new(x);
    parallel(len.div_ceil(BLOCK), len * 8, |block| {
        // SAFETY: one task a block.
        tanh_block(unsafe { shared.part(block * BLOCK, BLOCK.min(len - block * BLOCK)) });
    });
}

kernel! {
    fn tanh_block(x: &mut [f32]) {
        x.iter_mut().for_each(|x| *x = tanh::<A>(*x));
    }
}

/// Successive tokens that look back over their text.
pub struct Queries<'a> {
    /// Position of the first.
    pub at: usize,
    /// `[M, D]`.
    pub values: &'a [f32],
    /// Bound of the scores: `cap · tanh(q · k / (16 cap))`, at most 64.
    pub cap: f32,
}

/// Successive tokens of a text, as they are looked at.
pub struct Stretch<'a> {
    /// Position of the first.
    pub at: usize,
    /// `[n, D]`.
    pub keys: &'a [f32],
    /// `[n, C]`.
    pub values: &'a [f32],
}

/// Adds to `sums [M, 1 + C]`, for each query, Σ e^score and Σ e^score · value over the tokens of `text` up to its own.
///
/// A text is added stretch by stretch, the first first; how it is cut changes no bit. Because of the cap no score
/// overflows, so that none has to be subtracted from the others.
pub fn attend(queries: &Queries, text: &Stretch, sums: &mut [f32], width: usize) {
    let count = sums.len() / (1 + width);
    let size = queries.values.len() / count;
    let entries = text.keys.len() / size;
    let shared = Shared::new(sums);
    parallel(count, count * entries * (size + width), |query| {
        let seen = (queries.at + query + 1).saturating_sub(text.at).min(entries);
        // SAFETY: one task for each query.
        let sums = unsafe { shared.part(query * (1 + width), 1 + width) };
        let looks = &queries.values[query * size..][..size];
        attend_one(looks, &text.keys[..seen * size], &text.values[..seen * width], queries.cap, sums);
    });
}

kernel! {
    fn attend_one(query: &[f32], keys: &[f32], values: &[f32], cap: f32, sums: &mut [f32]) {
        let Some((weights, sums)) = sums.split_first_mut() else { return };
        for (key, value) in keys.chunks_exact(query.len()).zip(values.chunks_exact(sums.len())) {
            let weight = exp::<A>(cap * tanh::<A>(dot::<A>(query, key) / (16.0 * cap)));
            *weights += weight;
            for (sum, value) in sums.iter_mut().zip(value) {
                *sum = A::fma(weight, *value, *sum);
            }
        }
    }
}

/// `out [M, C]` = the means that `sums [M, 1 + C]` of [`attend`] make.
pub fn mean_of(sums: &[f32], out: &mut [f32], width: usize) {
    for (sums, out) in sums.chunks_exact(1 + width).zip(out.chunks_exact_mut(width)) {
        out.iter_mut().zip(&sums[1..]).for_each(|(out, sum)| *out = sum / sums[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_definition_in_f64_however_the_text_is_cut() {
        let (size, width, tokens) = (19, 11, 23);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 3.0;
        let queries: Vec<f32> = (0..tokens * size).map(|i| value(i * 5 + 1)).collect();
        let keys: Vec<f32> = (0..tokens * size).map(|i| value(i * 7 + 2)).collect();
        let values: Vec<f32> = (0..tokens * width).map(|i| value(i * 11 + 3)).collect();
        for cap in [32.0, 64.0] {
            // Queries from `first` on, the text in stretches of `n`.
            let run = |first: usize, n: usize| {
                let queries = Queries { at: first, values: &queries[first * size..], cap };
                let mut sums = vec![0.0; (tokens - first) * (1 + width)];
                for at in (0..tokens).step_by(n) {
                    let end = tokens.min(at + n);
                    let text =
                        Stretch { at, keys: &keys[at * size..end * size], values: &values[at * width..end * width] };
                    attend(&queries, &text, &mut sums, width);
                }
                let mut out = vec![f32::NAN; (tokens - first) * width];
                mean_of(&sums, &mut out, width);
                out
            };
            let whole = run(0, tokens);
            for (t, got) in whole.chunks(width).enumerate() {
                let score = |u: usize| {
                    let dot = (0..size).map(|i| f64::from(queries[t * size + i]) * f64::from(keys[u * size + i]));
                    f64::from(cap) * (dot.sum::<f64>() / (16.0 * f64::from(cap))).tanh()
                };
                let weights: Vec<f64> = (0..=t).map(|u| score(u).exp()).collect();
                for (c, got) in got.iter().enumerate() {
                    let sum: f64 = weights.iter().enumerate().map(|(u, w)| w * f64::from(values[u * width + c])).sum();
                    let want = sum / weights.iter().sum::<f64>();
                    assert!((f64::from(*got) - want).abs() < 2e-4, "token {t}, channel {c}: {got}, not {want}");
                }
            }
            for (first, n) in [(0, 1), (0, 7), (22, 5), (9, 23)] {
                assert_eq!(run(first, n), whole[first * width..], "from {first} in stretches of {n}");
            }
        }
    }
}
