//! The recurrence of v2 and v3: per channel, a sum of weighted values and a sum of their weights, which decay alike.
//!
//! Follows `RWKV_RNN.SA` of BlinkDL/RWKV-LM, `RWKV-v2-RNN/src/model_run.py` and `RWKV-v3/src/model_run.py`.

use super::{Shared, exp, kernel, parallel, sigmoid};
use crate::types::Row;

/// Channels that one task takes.
const BLOCK: usize = 64;
/// Weights are `exp` of keys up to this.
const MOST_KEY: f32 = 60.0;

/// What of the recurrence is the layer's, `[C]` each.
pub struct Wkv2Params<'a> {
    /// What is left of both sums a token later.
    pub decay: &'a [f32],
    /// How much the current token counts.
    pub first: &'a [f32],
    /// Added to the divisor.
    pub eps: f32,
}

/// Runs all rows: `inputs [3, N, C]` (r, k, v) → `out [N, C]`, with the states `[slots, C]` of the two sums.
///
/// `rows` keep the contract of a step: no slot that one of them writes is another's.
pub fn wkv2(p: &Wkv2Params, inputs: &[f32], rows: &[Row], numerators: Shared, denominators: Shared, out: &mut [f32]) {
    let (width, plane) = (p.decay.len(), out.len());
    assert!(p.first.len() == width && inputs.len() == 3 * plane);
    let blocks = width.div_ceil(BLOCK);
    let shared = Shared::new(out);
    parallel(rows.len() * blocks, 32 * plane, |task| {
        let (row, first) = (&rows[task / blocks], task % blocks * BLOCK);
        let n = BLOCK.min(width - first);
        let slot = |slot: u32| slot as usize * width + first;
        let [a, b] = [numerators, denominators].map(|state| {
            // SAFETY: no two rows write one slot and no row reads a slot that another writes (the caller's promise), and
            // each task has its own channels; `from` is read only here, when it is another slot.
            let into = unsafe { state.part(slot(row.into.0), n) };
            if row.from != row.into {
                // SAFETY: as above; a slot that is only read may be read by several rows.
                into.copy_from_slice(unsafe { state.part(slot(row.from.0), n) });
            }
            into
        });
        let channels = Wkv2Params { decay: &p.decay[first..][..n], first: &p.first[first..][..n], eps: p.eps };
        for token in row.tokens.clone() {
            let at = token * width + first;
            let [r, k, v] = [0, 1, 2].map(|input| &inputs[input * plane + at..][..n]);
            // SAFETY: one task for each (row, block of channels), and rows do not share tokens.
            token_channels(&channels, r, k, v, a, b, unsafe { shared.part(at, n) });
        }
    });
}

kernel! {
    /// One token: updates the sums `a` and `b` and writes `out`.
    fn token_channels(p: &Wkv2Params, r: &[f32], k: &[f32], v: &[f32], a: &mut [f32], b: &mut [f32], out: &mut [f32]) {
        let n = out.len();
        let (r, k, v, decay, first) = (&r[..n], &k[..n], &v[..n], &p.decay[..n], &p.first[..n]);
        let (a, b) = (&mut a[..n], &mut b[..n]);
        for j in 0..n {
            let k = exp::<A>(k[j].min(MOST_KEY));
            let kv = k * v[j];
            let divisor = A::fma(first[j], k, b[j]) + p.eps;
            out[j] = sigmoid::<A>(r[j]) * A::fma(first[j], kv, a[j]) / divisor;
            a[j] = A::fma(decay[j], a[j], kv);
            b[j] = A::fma(decay[j], b[j], k);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{SeqId, SlotId, Want};

    #[test]
    fn equals_the_definition_in_f64_however_large_the_keys() {
        let (width, tokens) = (67, 9);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 25.0;
        let mut inputs: Vec<f32> = (0..3 * tokens * width).map(value).collect();
        let plane = tokens * width;
        // Channel by channel, keys far below, around and above the bound.
        inputs[plane..2 * plane].iter_mut().enumerate().for_each(|(i, k)| *k += (i % width) as f32 * 3.0 - 80.0);
        let decay: Vec<f32> = (0..width).map(|j| j as f32 / width as f32).collect();
        let first: Vec<f32> = (0..width).map(|j| 0.1 + j as f32 / 30.0).collect();
        // The sums of slot 1 are read, those of slot 0 written.
        let (mut a, mut b) = (vec![0.0; 2 * width], vec![0.0; 2 * width]);
        (0..width).for_each(|j| (a[width + j], b[width + j]) = (value(j + 5), 0.5 + decay[j]));
        let (mut want_a, mut want_b) = (a[width..].to_vec(), b[width..].to_vec());
        let (from, into) = (SlotId(1), SlotId(0));
        let row = Row { seq: SeqId(0), from, into, at: 0, tokens: 0..tokens, want: Want::Nothing };
        let mut out = vec![f32::NAN; plane];
        let params = Wkv2Params { decay: &decay, first: &first, eps: 1e-8 };
        wkv2(&params, &inputs, &[row], Shared::new(&mut a), Shared::new(&mut b), &mut out);

        for token in 0..tokens {
            for j in 0..width {
                let [r, k, v] = [0, 1, 2].map(|input| f64::from(inputs[input * plane + token * width + j]));
                let (first, decay) = (f64::from(first[j]), f64::from(decay[j]));
                let (a, b) = (f64::from(want_a[j]), f64::from(want_b[j]));
                let k = k.min(60.0).exp();
                let want = (a + first * k * v) / (b + first * k + 1e-8) / (1.0 + (-r).exp());
                (want_a[j], want_b[j]) = ((decay * a + k * v) as f32, (decay * b + k) as f32);
                let got = f64::from(out[token * width + j]);
                assert!((got - want).abs() < 1e-5, "token {token}, channel {j}: {got}, not {want}");
            }
        }
        for j in 0..width {
            // Values of both signs cancel in the numerator, so its error is as large as the denominator makes it.
            let most = 1e-5 * want_b[j].max(1.0);
            let (a, b) = ((a[j] - want_a[j]).abs(), (b[j] - want_b[j]).abs());
            assert!(a <= most && b <= most, "the sums of channel {j} are off by {a} and {b}");
        }
    }
}
