//! The recurrence of v5 and v6, head by head, with the group norm and the gate behind it.
//!
//! Follows `att_one_v5_1` and `att_one_v6_0` of the `rwkv` package (BlinkDL/ChatRWKV,
//! `rwkv_pip_package/src/rwkv/model.py`). The generations differ in where the decay comes from and in whether there is a gate.

use super::norm::head_norm;
use super::{Shared, exp, kernel, parallel, sigmoid};
use crate::types::Row;

/// What of the recurrence is the layer's, `[C]` each.
pub struct Wkv5Params<'a> {
    /// Weight of the current token, by key channel.
    pub bonus: &'a [f32],
    pub ln_x_weight: &'a [f32],
    pub ln_x_bias: &'a [f32],
    pub eps: f32,
}

/// The activations, `[T, C]` each.
pub struct Wkv5Inputs<'a> {
    pub r: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    /// Output gate, before its SiLU; not in v5.0.
    pub g: Option<&'a [f32]>,
    /// What is left of the state after a token, by key channel; `[C]` where it is the same for all tokens.
    pub decay: &'a [f32],
}

/// Runs all rows: `x` → `out [T, C]`, with the states `[slots, C / N, N, N]` of heads of size `n` (row = key channel, column
/// = value channel).
///
/// `rows` keep the contract of a step: no slot that one of them writes is another's.
pub fn wkv5(p: &Wkv5Params, n: usize, x: &Wkv5Inputs, rows: &[Row], states: Shared, out: &mut [f32]) {
    let (width, plane) = (p.bonus.len(), out.len());
    let heads = width / n;
    assert!(x.decay.len() == plane || x.decay.len() == width);
    let shared = Shared::new(out);
    parallel(rows.len() * heads, 4 * plane * n, |task| {
        let (row, first) = (&rows[task / heads], task % heads * n);
        let slot = |slot: u32| (slot as usize * width + first) * n;
        // SAFETY: no two rows write one slot and no row reads a slot that another writes (the caller's promise), and each
        // task has its own head; `from` is read only here, when it is another slot.
        let state = unsafe { states.part(slot(row.into.0), n * n) };
        if row.from != row.into {
            // SAFETY: as above; a slot that is only read may be read by several rows.
            state.copy_from_slice(unsafe { states.part(slot(row.from.0), n * n) });
        }
        let head = Wkv5Params {
            bonus: &p.bonus[first..][..n],
            ln_x_weight: &p.ln_x_weight[first..][..n],
            ln_x_bias: &p.ln_x_bias[first..][..n],
            eps: p.eps,
        };
        for token in row.tokens.clone() {
            let at = token * width + first;
            let x = Wkv5Inputs {
                r: &x.r[at..][..n],
                k: &x.k[at..][..n],
                v: &x.v[at..][..n],
                g: x.g.map(|g| &g[at..][..n]),
                decay: &x.decay[at % x.decay.len()..][..n],
            };
            // SAFETY: one task for each (row, head), and rows do not share tokens.
            token_head(&head, &x, state, unsafe { shared.part(at, n) });
        }
    });
}

kernel! {
    /// One token of one head, `[N]` each: updates `state [N, N]` and writes `out`.
    fn token_head(p: &Wkv5Params, x: &Wkv5Inputs, state: &mut [f32], out: &mut [f32]) {
        let n = out.len();
        assert!(state.len() == n * n);
        let (r, k, v, decay) = (&x.r[..n], &x.k[..n], &x.v[..n], &x.decay[..n]);
        // 1. y = r · (S + bonus · k ⊗ v);  S = S · decay + k ⊗ v
        out.fill(0.0);
        for i in 0..n {
            let row = &mut state[i * n..][..n];
            let (r, k, decay, bonus) = (r[i], k[i], decay[i], p.bonus[i]);
            for j in 0..n {
                let kv = k * v[j];
                out[j] = A::fma(r, A::fma(bonus, kv, row[j]), out[j]);
                row[j] = A::fma(row[j], decay, kv);
            }
        }
        // 2. group norm over the head, the gate
        head_norm::<A>(out, &p.ln_x_weight[..n], &p.ln_x_bias[..n], p.eps);
        if let Some(g) = x.g {
            for (out, g) in out.iter_mut().zip(&g[..n]) {
                *out *= g * sigmoid::<A>(*g);
            }
        }
    }
}

/// `x [rows, width] = exp(-exp(x + base))`, the decays of v6; `base [width]`.
pub fn decay(x: &mut [f32], base: &[f32]) {
    let width = base.len();
    let rows = x.len() / width;
    assert!(x.len() == rows * width);
    let shared = Shared::new(x);
    parallel(rows, rows * width * 16, |row| {
        // SAFETY: one task a row.
        decay_row(unsafe { shared.part(row * width, width) }, base);
    });
}

kernel! {
    fn decay_row(x: &mut [f32], base: &[f32]) {
        for (x, base) in x.iter_mut().zip(base) {
            *x = exp::<A>(-exp::<A>(*x + base));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Different numbers in -1..1 for each seed.
    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 59 + 11) % 101) as f32 / 50.0 - 1.0).collect()
    }

    #[test]
    fn a_head_equals_an_f64_reference() {
        for (n, gated) in [(1, true), (5, false), (8, true), (64, true), (100, false)] {
            let (bonus, weight, bias) = (values(n, 1), values(n, 2), values(n, 3));
            let p = Wkv5Params { bonus: &bonus, ln_x_weight: &weight, ln_x_bias: &bias, eps: 64e-5 };
            let mut state = values(n * n, 4);
            let mut exact: Vec<f64> = state.iter().map(|&s| f64::from(s)).collect();
            for t in 5..9 {
                let (r, k, v, g) = (values(n, t), values(n, t + 10), values(n, t + 20), values(n, t + 30));
                let decay: Vec<f32> = values(n, t + 40).iter().map(|d| d.abs()).collect();
                let mut out = vec![f32::NAN; n];
                let x = Wkv5Inputs { r: &r, k: &k, v: &v, decay: &decay, g: gated.then_some(&g) };
                token_head(&p, &x, &mut state, &mut out);

                let mut y = vec![0f64; n];
                for i in 0..n {
                    for j in 0..n {
                        let kv = f64::from(k[i]) * f64::from(v[j]);
                        let s = &mut exact[i * n + j];
                        y[j] += f64::from(r[i]) * (f64::from(bonus[i]) * kv + *s);
                        *s = *s * f64::from(decay[i]) + kv;
                    }
                }
                let mean = y.iter().sum::<f64>() / n as f64;
                let var = y.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / n as f64;
                for j in 0..n {
                    let normed = (y[j] - mean) / (var + 64e-5).sqrt() * f64::from(weight[j]) + f64::from(bias[j]);
                    let gate = f64::from(g[j]);
                    let want = if gated { normed * gate / (1.0 + (-gate).exp()) } else { normed };
                    assert!((f64::from(out[j]) - want).abs() < 1e-4, "{n} wide, token {t}: {} not {want}", out[j]);
                }
                for (got, want) in state.iter().zip(&exact) {
                    assert!((f64::from(*got) - want).abs() < 1e-5, "{n} wide, token {t}");
                }
            }
        }
    }

    #[test]
    fn decays_stay_between_none_and_all_at_any_size() {
        let base = [-200f32, -20.0, -6.0, -1.0, 0.0, 1.0, 3.0, 20.0, 200.0];
        let mut x = [0.25f32; 18];
        decay(&mut x, &base);
        for (got, base) in x.iter().zip(base.iter().cycle()) {
            let want = (-(f64::from(*base) + 0.25).exp()).exp();
            assert!((f64::from(*got) - want).abs() <= 1e-6 && (0.0..=1.0).contains(got), "{base}: {got} not {want}");
        }
    }
}
