//! The RWKV-7 time mix of one head, from the linear layers' outputs to what goes into the output layer.
//!
//! One pass with the state in cache: decay, gates, key normalisation, state update, read-out, group norm, bonus, gate.
//! Follows `RWKV_x070_TMix_one` of the `rwkv` package (BlinkDL/ChatRWKV, `rwkv_pip_package/src/rwkv/model.py`).

#[cfg(target_arch = "x86_64")]
use super::LANES;
use super::norm::head_norm;
#[cfg(target_arch = "x86_64")]
use super::simd::{Narrow, Vector, Wide};
#[cfg(target_arch = "x86_64")]
use super::tile::fetch;
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

#[cfg(target_arch = "x86_64")]
impl HeadInputs<'_> {
    /// Asks memory for all of them.
    fn fetch(&self) {
        let (gate, first) = self.first_value.unwrap_or_default();
        for plane in [self.r, self.k, self.v, self.w, self.a, self.g, gate, first] {
            plane.chunks(16).for_each(|line| fetch(line.as_ptr().cast()));
        }
    }
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

/// Tokens from which on it pays to turn a head's state, so that its value channels stand side by side.
const TURNED_FROM: usize = 8;

/// Tokens whose inputs are fetched ahead.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 2;

/// The steps of one head over a span of tokens: updates `state [N, N]` (row = value channel, column = key channel) and lets
/// `token(t)` give each token's inputs and where its output `[N]` goes.
///
/// Over few tokens a row of the state is walked as it lies; over many the state is turned once, and no sum runs across a
/// register. Both add the same numbers in the same order.
pub fn wkv7_head<'a>(
    tokens: usize,
    p: &HeadParams,
    state: &mut [f32],
    token: impl Fn(usize) -> (HeadInputs<'a>, &'a mut [f32]),
) {
    let mut step = Prepared::ZERO;
    let n = p.w0.len();
    assert!(n <= MAX_HEAD && state.len() == n * n);
    #[cfg(target_arch = "x86_64")]
    if tokens >= TURNED_FROM && super::fused() && n.is_multiple_of(16) {
        let mut turned = vec![0f32; n * n];
        turn(state, n, &mut turned);
        for t in 0..tokens {
            // The planes are read in short pieces far apart, which no processor foresees.
            if t + AHEAD < tokens {
                token(t + AHEAD).0.fetch();
            }
            let (x, out) = token(t);
            prepare(&x, p, &mut step);
            turned_step(&step, x.r, &mut turned, out);
            complete(&x, p, &step, out);
        }
        return turn(&turned, n, state);
    }
    for t in 0..tokens {
        let (x, out) = token(t);
        prepare(&x, p, &mut step);
        rows_step(&step, x.r, state, out);
        complete(&x, p, &step, out);
    }
}

/// What a step of a head needs of its token, the first N of each.
struct Prepared {
    decay: [f32; MAX_HEAD],
    /// -kk.
    remove: [f32; MAX_HEAD],
    /// kk · a.
    replace: [f32; MAX_HEAD],
    key: [f32; MAX_HEAD],
    value: [f32; MAX_HEAD],
}

impl Prepared {
    const ZERO: Self = {
        let zero = [0f32; MAX_HEAD];
        Self { decay: zero, remove: zero, replace: zero, key: zero, value: zero }
    };
}

kernel! {
    /// Steps 1 to 3: decay, gates, key normalisation, value residual.
    fn prepare(x: &HeadInputs, p: &HeadParams, out: &mut Prepared) {
        let n = p.w0.len();
        let (decay, key, value) = (&mut out.decay[..n], &mut out.key[..n], &mut out.value[..n]);
        let (remove, replace) = (&mut out.remove[..n], &mut out.replace[..n]);
        let (k, v, w, a) = (&x.k[..n], &x.v[..n], &x.w[..n], &x.a[..n]);
        let (w0, a0, k_k, k_a) = (&p.w0[..n], &p.a0[..n], &p.k_k[..n], &p.k_a[..n]);

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
    }
}

/// Step 4 for a state `[value channel, key channel]`.
fn rows_step(p: &Prepared, r: &[f32], state: &mut [f32], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if super::fused() && out.len().is_multiple_of(LANES) {
        // SAFETY: the processor has the features.
        return unsafe { four_rows_step(p, r, state, out) };
    }
    single_rows_step(p, r, state, out);
}

kernel! {
    fn single_rows_step(p: &Prepared, r: &[f32], state: &mut [f32], out: &mut [f32]) {
        let n = out.len();
        let (remove, replace) = (&p.remove[..n], &p.replace[..n]);
        let (decay, key, value, r) = (&p.decay[..n], &p.key[..n], &p.value[..n], &r[..n]);
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
    }
}

/// [`rows_step`] with N a multiple of eight, four value channels at a time: while one waits for a sum, the others go on.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn four_rows_step(p: &Prepared, r: &[f32], state: &mut [f32], out: &mut [f32]) {
    const ROWS: usize = 4;
    let n = out.len();
    assert!(n <= MAX_HEAD && n.is_multiple_of(LANES) && r.len() >= n && state.len() == n * n);
    // SAFETY: the features are there; every index is below n, a multiple of the lanes and of the rows.
    unsafe {
        let of = |values: &[f32; MAX_HEAD], j: usize| Narrow::load(values.as_ptr().add(j));
        for i in (0..n).step_by(ROWS) {
            let rows = state.as_mut_ptr().add(i * n);
            let mut sums = [Narrow::splat(0.0); ROWS];
            for j in (0..n).step_by(LANES) {
                let remove = of(&p.remove, j);
                for (row, sum) in sums.iter_mut().enumerate() {
                    *sum = Narrow::load(rows.add(row * n + j)).fma(remove, *sum);
                }
            }
            let (mut removed, mut value) = (sums, sums);
            for row in 0..ROWS {
                removed[row] = Narrow::splat(sums[row].tree());
                value[row] = Narrow::splat(p.value[i + row]);
            }
            let mut sums = [Narrow::splat(0.0); ROWS];
            for j in (0..n).step_by(LANES) {
                let (decay, replace, key) = (of(&p.decay, j), of(&p.replace, j), of(&p.key, j));
                let r = Narrow::load(r.as_ptr().add(j));
                for (row, sum) in sums.iter_mut().enumerate() {
                    let at = rows.add(row * n + j);
                    let added = removed[row].fma(replace, value[row].times(key));
                    let new = Narrow::load(at).fma(decay, added);
                    new.store(at);
                    *sum = new.fma(r, *sum);
                }
            }
            for (row, sum) in sums.into_iter().enumerate() {
                out[i + row] = sum.tree();
            }
        }
    }
}

/// The same for a state `[key channel, value channel]` with N a multiple of sixteen.
#[cfg(target_arch = "x86_64")]
fn turned_step(p: &Prepared, r: &[f32], state: &mut [f32], out: &mut [f32]) {
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    fn wide(p: &Prepared, r: &[f32], state: &mut [f32], out: &mut [f32]) {
        // SAFETY: the features are there.
        unsafe { turned_step_in::<Wide, 2>(p, r, state, out) }
    }
    #[target_feature(enable = "avx2,fma,f16c")]
    fn narrow(p: &Prepared, r: &[f32], state: &mut [f32], out: &mut [f32]) {
        // SAFETY: the features are there.
        unsafe { turned_step_in::<Narrow, 1>(p, r, state, out) }
    }
    // SAFETY: the caller has looked for AVX2, and `wide` looks for AVX-512.
    unsafe { if super::wide() { wide(p, r, state, out) } else { narrow(p, r, state, out) } }
}

/// Each value channel is a lane. Its sums over the key channels are those of [`dot`]: eight partial ones, added as a tree.
///
/// # Safety
/// As [`Vector`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn turned_step_in<V: Vector, const G: usize>(p: &Prepared, r: &[f32], state: &mut [f32], out: &mut [f32]) {
    let n = out.len();
    assert!(n <= MAX_HEAD && n.is_multiple_of(16) && r.len() >= n && state.len() == n * n);
    let mut i = 0;
    // SAFETY: the caller has looked for the features; so many value channels from i on are there.
    unsafe {
        while i + G * V::LANES <= n {
            value_channels::<V, G>(p, r, state, out, i);
            i += G * V::LANES;
        }
        while i < n {
            value_channels::<V, 1>(p, r, state, out, i);
            i += V::LANES;
        }
    }
}

/// [`turned_step_in`] for G vectors of value channels from `i` on.
///
/// # Safety
/// As [`Vector`]; there are so many, and every slice is as long as it must be.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn value_channels<V: Vector, const G: usize>(
    p: &Prepared,
    r: &[f32],
    state: &mut [f32],
    out: &mut [f32],
    i: usize,
) {
    let n = out.len();
    // SAFETY: the caller's promise; every index is below n.
    unsafe {
        let tree = |s: [V; LANES]| (s[0].plus(s[4]).plus(s[2].plus(s[6]))).plus(s[1].plus(s[5]).plus(s[3].plus(s[7])));
        let column = state.as_mut_ptr().add(i);
        let mut sums = [[V::splat(0.0); LANES]; G];
        for j in (0..n).step_by(LANES) {
            for l in 0..LANES {
                let remove = V::splat(p.remove[j + l]);
                for (g, sums) in sums.iter_mut().enumerate() {
                    sums[l] = V::load(column.add((j + l) * n + g * V::LANES)).fma(remove, sums[l]);
                }
            }
        }
        let (mut removed, mut value) = ([V::splat(0.0); G], [V::splat(0.0); G]);
        for g in 0..G {
            removed[g] = tree(sums[g]);
            value[g] = V::load(p.value.as_ptr().add(i + g * V::LANES));
        }
        let mut sums = [[V::splat(0.0); LANES]; G];
        for j in (0..n).step_by(LANES) {
            for l in 0..LANES {
                let (replace, key) = (V::splat(p.replace[j + l]), V::splat(p.key[j + l]));
                let (decay, r) = (V::splat(p.decay[j + l]), V::splat(*r.get_unchecked(j + l)));
                for (g, sums) in sums.iter_mut().enumerate() {
                    let at = column.add((j + l) * n + g * V::LANES);
                    let added = removed[g].fma(replace, value[g].times(key));
                    let new = V::load(at).fma(decay, added);
                    new.store(at);
                    sums[l] = new.fma(r, sums[l]);
                }
            }
        }
        for (g, sums) in sums.into_iter().enumerate() {
            tree(sums).store(out.as_mut_ptr().add(i + g * V::LANES));
        }
    }
}

/// `to` = `from [n, n]`, rows and columns exchanged.
#[cfg(target_arch = "x86_64")]
fn turn(from: &[f32], n: usize, to: &mut [f32]) {
    for i in (0..n).step_by(16) {
        for j in 0..n {
            for i in i..n.min(i + 16) {
                to[j * n + i] = from[i * n + j];
            }
        }
    }
}

kernel! {
    /// Step 5: group norm over the head, the bonus (r · k · r_k) v, the gate.
    fn complete(x: &HeadInputs, p: &HeadParams, step: &Prepared, out: &mut [f32]) {
        let n = out.len();
        let (r, g, r_k, key, value) = (&x.r[..n], &x.g[..n], &p.r_k[..n], &step.key[..n], &step.value[..n]);
        head_norm::<A>(out, &p.ln_x_weight[..n], &p.ln_x_bias[..n], p.eps);
        let mut bonus = [0f32; MAX_HEAD];
        for j in 0..n {
            bonus[j] = r[j] * key[j];
        }
        let bonus = dot::<A>(&bonus[..n], r_k);
        for j in 0..n {
            out[j] = A::fma(bonus, value[j], out[j]) * g[j];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turned_state_gives_the_same_bits() {
        for n in [16, 64, 80] {
            let values = |seed: usize| -> Vec<f32> {
                (0..3 * TURNED_FROM * n * n)
                    .map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0)
                    .collect()
            };
            let inputs: Vec<Vec<f32>> = (0..8).map(values).collect();
            let params: Vec<Vec<f32>> = (8..16).map(values).collect();
            let p = HeadParams {
                w0: &params[0][..n],
                a0: &params[1][..n],
                v0: &params[2][..n],
                k_k: &params[3][..n],
                k_a: &params[4][..n],
                r_k: &params[5][..n],
                ln_x_weight: &params[6][..n],
                ln_x_bias: &params[7][..n],
                eps: 64e-5,
            };
            // Spans of these many tokens, one after the other.
            let run = |spans: &[usize]| {
                let mut state = values(99)[..n * n].to_vec();
                let mut out = vec![0f32; spans.iter().sum::<usize>() * n];
                let shared = super::super::Shared::new(&mut out);
                let mut first = 0;
                for &tokens in spans {
                    wkv7_head(tokens, &p, &mut state, |token| {
                        let at = (first + token) * n;
                        let of = |plane: usize| &inputs[plane][at..at + n];
                        let first_value = Some((of(6), of(7)));
                        let (r, w, k, v, a, g) = (of(0), of(1), of(2), of(3), of(4), of(5));
                        // SAFETY: each token has its own part.
                        (HeadInputs { r, w, k, v, a, g, first_value }, unsafe { shared.part(at, n) })
                    });
                    first += tokens;
                }
                (state, out)
            };
            let whole = run(&[2 * TURNED_FROM + 3]);
            assert!(whole.1.iter().all(|y| y.is_finite()));
            assert_eq!(run(&[1; 2 * TURNED_FROM + 3]), whole);
            assert_eq!(run(&[TURNED_FROM + 2, 1, TURNED_FROM]), whole);
        }
    }
}
