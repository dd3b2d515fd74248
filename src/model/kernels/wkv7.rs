//! The RWKV-7 time mix of one head and one token, from the linear layers' outputs to what goes into the output layer.
//!
//! One pass with the state in cache: decay, gates, key normalisation, state update, read-out, group norm, bonus, gate.
//! Follows `RWKV_x070_TMix_one` of the `rwkv` package (BlinkDL/ChatRWKV, `rwkv_pip_package/src/rwkv/model.py`).

use super::norm::head_norm;
use super::{dot, exp, kernel, sigmoid};

/// The largest head this kernel has room for.
pub const MAX_HEAD: usize = 256;

/// The activations of one token and head, `[N]` each.
pub struct HeadInputs<'a> {
    pub r: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    /// Low-rank part of the decay.
    pub w: &'a [f32],
    /// Low-rank part of the in-context learning rate.
    pub a: &'a [f32],
    /// Output gate.
    pub g: &'a [f32],
    /// Low-rank part of the value residual gate and the first layer's value; `None` in the first layer.
    pub first_value: Option<(&'a [f32], &'a [f32])>,
}

/// The parameters of one head, `[N]` each.
pub struct HeadParams<'a> {
    pub w0: &'a [f32],
    pub a0: &'a [f32],
    /// Empty in the first layer.
    pub v0: &'a [f32],
    pub k_k: &'a [f32],
    pub k_a: &'a [f32],
    pub r_k: &'a [f32],
    pub ln_x_weight: &'a [f32],
    pub ln_x_bias: &'a [f32],
    pub eps: f32,
}

kernel! {
    /// One step of one head: updates `state [N, N]` (row = value channel, column = key channel) and writes `out [N]`.
    pub fn wkv7_head(x: &HeadInputs, p: &HeadParams, state: &mut [f32], out: &mut [f32]) {
        let n = out.len();
        assert!(n <= MAX_HEAD && state.len() == n * n);
        let (mut decay, mut key, mut value) = ([0f32; MAX_HEAD], [0f32; MAX_HEAD], [0f32; MAX_HEAD]);
        let (mut remove, mut replace) = ([0f32; MAX_HEAD], [0f32; MAX_HEAD]);
        let (decay, key, value) = (&mut decay[..n], &mut key[..n], &mut value[..n]);
        let (remove, replace) = (&mut remove[..n], &mut replace[..n]);
        let (r, k, v, w, a, g) = (&x.r[..n], &x.k[..n], &x.v[..n], &x.w[..n], &x.a[..n], &x.g[..n]);
        let (w0, a0, k_k, k_a, r_k) = (&p.w0[..n], &p.a0[..n], &p.k_k[..n], &p.k_a[..n], &p.r_k[..n]);

        // 1. kk = k · k_k / ‖k · k_k‖, with the norm kept from zero
        for j in 0..n {
            remove[j] = k[j] * k_k[j];
        }
        let norm = dot::<A>(remove, remove).sqrt().max(1e-12);
        // 2. decay = exp(-e^-½ · σ(w0 + w)); a = σ(a0 + a); k = k · (1 + (a - 1) · k_a)
        for j in 0..n {
            decay[j] = exp::<A>(-0.606_530_66 * sigmoid::<A>(w0[j] + w[j]));
            let rate = sigmoid::<A>(a0[j] + a[j]);
            let kk = remove[j] / norm;
            remove[j] = -kk;
            replace[j] = kk * rate;
            key[j] = k[j] * A::fma(rate - 1.0, k_a[j], 1.0);
        }
        // 3. v = v + (v_first - v) · σ(v0 + v)
        value.copy_from_slice(v);
        if let Some((gate, first)) = x.first_value {
            let (gate, first, v0) = (&gate[..n], &first[..n], &p.v0[..n]);
            for j in 0..n {
                value[j] = A::fma(first[j] - v[j], sigmoid::<A>(v0[j] + gate[j]), v[j]);
            }
        }
        // 4. S = S · decay + (S · -kk) ⊗ (kk · a) + v ⊗ k;  y = S · r
        for i in 0..n {
            let row = &mut state[i * n..][..n];
            let removed = dot::<A>(row, remove);
            let v = value[i];
            for j in 0..n {
                row[j] = A::fma(row[j], decay[j], A::fma(removed, replace[j], v * key[j]));
            }
            out[i] = dot::<A>(row, r);
        }
        // 5. group norm over the head, the bonus (r · k · r_k) v, the gate
        head_norm::<A>(out, &p.ln_x_weight[..n], &p.ln_x_bias[..n], p.eps);
        for j in 0..n {
            remove[j] = r[j] * key[j];
        }
        let bonus = dot::<A>(remove, r_k);
        for j in 0..n {
            out[j] = A::fma(bonus, value[j], out[j]) * g[j];
        }
    }
}
