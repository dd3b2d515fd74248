//! The RWKV-4 recurrence: per channel, a weighted mean of all values so far.
//!
//! Follows `RWKV_RNN.SA` of BlinkDL/RWKV-LM, `RWKV-v4/src/model_run.py`: numerator and denominator are kept relative to the
//! largest exponent so far, so that no key is too large.

use super::{Shared, exp, kernel, parallel, sigmoid};
use crate::types::Row;

/// Channels that one task takes; a multiple of every vector width.
const BLOCK: usize = 64;

/// What of the recurrence is the layer's, `[C]` each.
pub struct Wkv4Params<'a> {
    /// What a token's exponent gains with each later token: `-exp(time_decay)`.
    pub decay: &'a [f32],
    /// What the exponent of the current token gains.
    pub first: &'a [f32],
}

/// The states `[slots, C]`.
pub struct Wkv4States {
    /// Numerators `Σ e^(exponent - pp) · v`.
    pub aa: Shared,
    /// Denominators `Σ e^(exponent - pp)`.
    pub bb: Shared,
    /// Largest exponents so far.
    pub pp: Shared,
}

/// Runs all rows: `inputs [3, N, C]` (r, k, v) → `out [N, C] = σ(r) · wkv`.
///
/// `rows` keep the contract of a step: no slot that one of them writes is another's.
pub fn wkv4(p: &Wkv4Params, inputs: &[f32], rows: &[Row], states: &Wkv4States, out: &mut [f32]) {
    let (width, plane) = (p.decay.len(), out.len());
    assert!(p.first.len() == width && inputs.len() == 3 * plane);
    let blocks = width.div_ceil(BLOCK);
    let shared = Shared::new(out);
    parallel(rows.len() * blocks, 64 * plane, |task| {
        let (row, first) = (&rows[task / blocks], task % blocks * BLOCK);
        let n = BLOCK.min(width - first);
        let slot = |slot: u32| slot as usize * width + first;
        let [aa, bb, pp] = [states.aa, states.bb, states.pp].map(|state| {
            // SAFETY: no two rows write one slot and no row reads a slot that another writes (the caller's promise), and
            // each task has its own channels; `from` is read only here, when it is another slot.
            let into = unsafe { state.part(slot(row.into.0), n) };
            if row.from != row.into {
                // SAFETY: as above; a slot that is only read may be read by several rows.
                into.copy_from_slice(unsafe { state.part(slot(row.from.0), n) });
            }
            into
        });
        let mut state = State { aa, bb, pp };
        let channels = Wkv4Params { decay: &p.decay[first..][..n], first: &p.first[first..][..n] };
        for token in row.tokens.clone() {
            let at = token * width + first;
            let [r, k, v] = [0, 1, 2].map(|input| &inputs[input * plane + at..][..n]);
            // SAFETY: one task for each (row, block of channels), and rows do not share tokens.
            token_channels(&channels, r, k, v, &mut state, unsafe { shared.part(at, n) });
        }
    });
}

/// One row's state of some channels.
struct State<'a> {
    aa: &'a mut [f32],
    bb: &'a mut [f32],
    pp: &'a mut [f32],
}

kernel! {
    /// One token: updates `state` and writes `out`.
    fn token_channels(p: &Wkv4Params, r: &[f32], k: &[f32], v: &[f32], state: &mut State, out: &mut [f32]) {
        let n = out.len();
        let (r, k, v, decay, first) = (&r[..n], &k[..n], &v[..n], &p.decay[..n], &p.first[..n]);
        let (aa, bb, pp) = (&mut state.aa[..n], &mut state.bb[..n], &mut state.pp[..n]);
        for j in 0..n {
            // 1. wkv = (aa + e^(first + k) · v) / (bb + e^(first + k))
            let own = first[j] + k[j];
            let largest = pp[j].max(own);
            let (e1, e2) = (exp::<A>(pp[j] - largest), exp::<A>(own - largest));
            let numerator = A::fma(e1, aa[j], e2 * v[j]);
            let denominator = A::fma(e1, bb[j], e2);
            out[j] = sigmoid::<A>(r[j]) * numerator / denominator;
            // 2. the state fades and takes the token in
            let faded = pp[j] + decay[j];
            let largest = faded.max(k[j]);
            let (e1, e2) = (exp::<A>(faded - largest), exp::<A>(k[j] - largest));
            aa[j] = A::fma(e1, aa[j], e2 * v[j]);
            bb[j] = A::fma(e1, bb[j], e2);
            pp[j] = largest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{SeqId, SlotId, Want};
    use proptest::prelude::*;

    /// The definition in f64: the mean of all values, each weighted by e to the power of its exponent.
    fn mean(keys: &[f32], values: &[f32], decay: f32, first: f32) -> f64 {
        let t = keys.len() - 1;
        let exponent = |i: usize| {
            let k = f64::from(keys[i]);
            if i == t { k + f64::from(first) } else { k + f64::from(decay) * (t - 1 - i) as f64 }
        };
        let largest = (0..=t).map(exponent).fold(f64::MIN, f64::max);
        let weight = |i: usize| (exponent(i) - largest).exp();
        let numerator: f64 = (0..=t).map(|i| weight(i) * f64::from(values[i])).sum();
        numerator / (0..=t).map(weight).sum::<f64>()
    }

    proptest! {
        #[test]
        fn equals_the_definition_in_f64_however_large_the_keys(
            tokens in prop::collection::vec((-1f32..1.0, -1f32..1.0), 1..40),
            scale in prop::sample::select(vec![1f32, 30.0, 1_000.0, 30_000.0]),
            decay in -8f32..3.0,
            first in -20f32..20.0,
        ) {
            let decay = -decay.exp();
            let (keys, values): (Vec<_>, Vec<_>) = tokens.iter().map(|(k, v)| (k * scale, *v)).unzip();
            let (mut aa, mut bb, mut pp) = ([0f32], [0f32], [-1e30f32]);
            let states = Wkv4States { aa: Shared::new(&mut aa), bb: Shared::new(&mut bb), pp: Shared::new(&mut pp) };
            let p = Wkv4Params { decay: &[decay], first: &[first] };
            let tokens = keys.len();
            let inputs = [vec![0.0; tokens], keys.clone(), values.clone()].concat();
            let slot = SlotId(0);
            let row = Row { seq: SeqId(0), from: slot, into: slot, at: 0, tokens: 0..tokens, want: Want::All };
            let mut out = vec![f32::NAN; tokens];
            wkv4(&p, &inputs, &[row], &states, &mut out);
            for t in 0..tokens {
                let want = mean(&keys[..=t], &values[..=t], decay, first) * 0.5;
                // An exponent is a sum of up to 40 rounded terms of this size; its error is a relative error of a weight.
                let exponents = scale + 20.0 + 40.0 * -decay;
                let limit = 1e-6 + f64::from(exponents * f32::EPSILON) * 8.0;
                prop_assert!((f64::from(out[t]) - want).abs() <= limit, "token {t}: {} not {want}", out[t]);
            }
        }
    }
}
