//! The attention of v1: a weighted mean of the whole text, with curves over distance and position.
//!
//! Follows `RWKV_TimeMix.forward` of BlinkDL/RWKV-LM, `RWKV-v1/src/model.py`.

use super::{Shared, exp, kernel, parallel, sigmoid};
use crate::types::Row;

/// The curves of a layer over T positions, `[H, T]` each.
pub struct Curves<'a> {
    /// By distance, the nearest last.
    pub time_w: &'a [f32],
    /// By the position that is looked at.
    pub alpha: &'a [f32],
    /// By the position that looks.
    pub beta: &'a [f32],
    /// T.
    pub context: usize,
}

/// Makes weights of keys, in place in `inputs [3, N, A]`: r, k, v become σ(r), the sum of all weights so far, and the
/// weight times v. The sums go on from the states `sums [slots, A]`.
///
/// `rows` keep the contract of a step: no slot that one of them writes is another's.
pub fn weigh1(inputs: &mut [f32], rows: &[Row], width: usize, sums: Shared) {
    let plane = inputs.len() / 3;
    let shared = Shared::new(inputs);
    parallel(rows.len(), 32 * plane, |row| {
        let row = &rows[row];
        // SAFETY: no two rows write one slot and no row reads a slot that another writes (the caller's promise); `from` is
        // read only here, when it is another slot.
        let sum = unsafe { sums.part(row.into.0 as usize * width, width) };
        if row.from != row.into {
            // SAFETY: as above; a slot that is only read may be read by several rows.
            sum.copy_from_slice(unsafe { sums.part(row.from.0 as usize * width, width) });
        }
        for token in row.tokens.clone() {
            // SAFETY: one task for each row, rows do not share tokens, and the three planes lie apart.
            let [r, k, v] = [0, 1, 2].map(|input| unsafe { shared.part(input * plane + token * width, width) });
            weigh_token(r, k, v, sum);
        }
    });
}

kernel! {
    fn weigh_token(r: &mut [f32], k: &mut [f32], v: &mut [f32], sum: &mut [f32]) {
        for (((r, k), v), sum) in r.iter_mut().zip(k).zip(v).zip(sum) {
            let weight = exp::<A>(k.clamp(-60.0, 30.0));
            *r = sigmoid::<A>(*r);
            *v *= weight;
            *sum += weight;
            *k = *sum;
        }
    }
}

/// `out [N, A]` = σ(r) / sum of weights · Σ of the weighted values of the text so far by the `curves`.
///
/// `inputs [3, N, A]` are what [`weigh1`] left; `logs` are one buffer for each slot with the weighted values of its whole
/// text, `[positions, A]`, the step's own tokens included.
pub fn wkv1(curves: &Curves, inputs: &[f32], rows: &[Row], logs: &[Vec<f32>], out: &mut [f32]) {
    let (plane, heads) = (out.len(), curves.time_w.len() / curves.context);
    let tokens: Vec<_> = rows.iter().flat_map(|row| row.tokens.clone().map(move |token| (row, token))).collect();
    let width = plane / tokens.len();
    let n = width / heads;
    let work = tokens.iter().map(|(row, _)| logs[row.into.0 as usize].len()).sum();
    let shared = Shared::new(out);
    parallel(tokens.len() * heads, work, |task| {
        let ((row, token), h) = (tokens[task / heads], task % heads);
        let position = row.at as usize + token - row.tokens.start;
        let head = h * curves.context..(h + 1) * curves.context;
        let text = &logs[row.into.0 as usize][..(position + 1) * width];
        let at = token * width + h * n;
        // SAFETY: one task for each token and head.
        let out = unsafe { shared.part(at, n) };
        let beta = curves.beta[head.clone()][position];
        attend(&curves.time_w[head.clone()], &curves.alpha[head], beta, text, width, h * n, out);
        for (j, out) in out.iter_mut().enumerate() {
            *out = inputs[at + j] * *out / inputs[plane + at + j];
        }
    });
}

kernel! {
    /// `out` = Σ over positions u, the first first, of `time_w · alpha[u] · beta` times the channels from `first` of `text[u]`.
    fn attend(time_w: &[f32], alpha: &[f32], beta: f32, text: &[f32], width: usize, first: usize, out: &mut [f32]) {
        let n = out.len();
        let by_distance = &time_w[time_w.len() - text.len() / width..];
        out.fill(0.0);
        for ((entry, w), alpha) in text.chunks_exact(width).zip(by_distance).zip(alpha) {
            let share = w * alpha * beta;
            for (out, value) in out.iter_mut().zip(&entry[first..][..n]) {
                *out = A::fma(share, *value, *out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{SeqId, SlotId, Want};

    #[test]
    fn equals_the_definition_in_f64_however_large_the_keys() {
        let (heads, n, context) = (3, 5, 11);
        let width = heads * n;
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 25.0;
        let curve = |seed: usize| -> Vec<f32> { (0..heads * context).map(|i| value(i * 3 + seed)).collect() };
        let (time_w, alpha, beta) = (curve(1), curve(2), curve(3));
        let curves = Curves { time_w: &time_w, alpha: &alpha, beta: &beta, context };
        // Channel by channel, keys far below, between and above the bounds.
        let key = |t: usize, c: usize| value(t * 7 + c) + (c as f32 - 8.0) * 11.0;
        let (mut log, mut sums) = (vec![Vec::new()], vec![0.0; width]);
        // A step of four tokens, then one of seven.
        for (at, count) in [(0, 4), (4, 7)] {
            let of = |f: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
                (at..at + count).flat_map(|t| (0..width).map(move |c| (t, c))).map(|(t, c)| f(t, c)).collect()
            };
            let mut inputs = [of(&|t, c| value(t * 5 + c)), of(&key), of(&|t, c| value(t * 11 + c))].concat();
            let slot = SlotId(0);
            let row =
                Row { seq: SeqId(0), from: slot, into: slot, at: at as u64, tokens: 0..count, want: Want::Nothing };
            weigh1(&mut inputs, std::slice::from_ref(&row), width, Shared::new(&mut sums));
            log[0].extend_from_slice(&inputs[2 * count * width..]);
            let mut out = vec![f32::NAN; count * width];
            wkv1(&curves, &inputs, &[row], &log, &mut out);
            for (i, got) in out.into_iter().enumerate() {
                let (t, c) = (at + i / width, i % width);
                let (mut sum, mut weights) = (0.0, 0.0);
                for u in 0..=t {
                    let at = |curve: &[f32], position: usize| f64::from(curve[c / n * context + position]);
                    let weight = f64::from(key(u, c)).clamp(-60.0, 30.0).exp();
                    let share = at(&time_w, context - 1 - (t - u)) * at(&alpha, u) * at(&beta, t);
                    sum += share * weight * f64::from(value(u * 11 + c));
                    weights += weight;
                }
                let want = sum / weights / (1.0 + f64::from(-value(t * 5 + c)).exp());
                assert!((f64::from(got) - want).abs() < 1e-5, "token {t}, channel {c}: {got}, not {want}");
            }
        }
    }
}
