//! The optional tiny attention of v1: plain softmax attention of one head.

use super::{Shared, dot, exp, kernel, parallel};

/// `out [M, D]` = each query's mean of the values of its text, weighted by the softmax of `query · key / √D`.
///
/// `inputs [M, 3 D]` begin with the queries; each of the M `texts` holds entries of 2 D values, a key and a value.
pub fn tiny_attend(inputs: &[f32], texts: &[&[f32]], out: &mut [f32]) {
    let size = out.len() / texts.len();
    let work = texts.iter().map(|text| text.len()).sum();
    let shared = Shared::new(out);
    parallel(texts.len(), work, |token| {
        // SAFETY: one task for each row.
        let out = unsafe { shared.part(token * size, size) };
        attend_one(&inputs[token * 3 * size..][..size], texts[token], out);
    });
}

kernel! {
    fn attend_one(query: &[f32], text: &[f32], out: &mut [f32]) {
        let size = query.len();
        let scale = 1.0 / (size as f32).sqrt();
        let score = |entry: &[f32]| dot::<A>(query, &entry[..size]) * scale;
        let largest = text.chunks_exact(2 * size).map(score).fold(f32::NEG_INFINITY, f32::max);
        let mut weights = 0.0;
        out.fill(0.0);
        for entry in text.chunks_exact(2 * size) {
            let weight = exp::<A>(score(entry) - largest);
            weights += weight;
            for (out, value) in out.iter_mut().zip(&entry[size..]) {
                *out = A::fma(weight, *value, *out);
            }
        }
        out.iter_mut().for_each(|out| *out /= weights);
    }
}
