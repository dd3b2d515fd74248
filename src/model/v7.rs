//! RWKV-7 "Goose" (x070).
//!
//! Tensor names and formulas are those of `RWKV_x070` in the `rwkv` package (BlinkDL/ChatRWKV,
//! `rwkv_pip_package/src/rwkv/model.py`) and of BlinkDL/RWKV-LM, `RWKV-v7/rwkv_v7_demo.py`. C = width, H = heads, N = head size, T =
//! tokens of the step, r = a low rank.

use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Tensor};

use super::Error;
use super::block::{Carry, Mixer, Sizes, Step, token_shift};
use super::generation::{BASE, Generation};
use super::kernels::{Activation, HeadInputs, HeadParams, MAX_HEAD, Shared, multiply_all, parallel, wkv7_head};
use super::linear::{self, Linear, Orientation, floats, floats_mut};
use super::low_rank::LowRank;
use super::weights::{Checkpoint, Loader};
use crate::types::{Row, Segment};

pub const GENERATION: Generation = Generation {
    name: "v7",
    detect: |checkpoint| is_v7(checkpoint, None, false),
    mixers: |loader, layer, sizes| {
        Ok((Box::new(TimeMix::load(loader, layer, sizes)?), Box::new(ChannelMix::load(loader, layer, sizes)?)))
    },
    time_state: Some(time_state),
    ..BASE
};

/// Whether a file has v7's attention, of the variants with this DeepEmbed table in their `ffn`, or with none; and with
/// attention over the text beside it or without.
pub fn is_v7(checkpoint: &Checkpoint, table: Option<&str>, attention: bool) -> bool {
    let has = |name: &str| checkpoint.shape(&format!("blocks.0.{name}")).is_some();
    // r_k came with v7 and every later file has it.
    has("att.r_k")
        && ["s_emb", "enn"].iter().all(|name| has(&format!("ffn.{name}.weight")) == (table == Some(name)))
        && has("qkv.qq.weight") == attention
}

/// The segment that a state-tuned `time_state [H, N, N]` of a layer replaces; v7 uses it without transposing.
pub fn time_state(layer: usize) -> String {
    format!("blocks.{layer}.att.wkv")
}

/// Attention's place in a block: the matrix-valued state.
pub struct TimeMix {
    layer: usize,
    heads: usize,
    head_size: usize,
    /// `[6, C]`: x_r, x_w, x_k, x_v, x_a, x_g.
    mixes: Vec<f32>,
    receptance: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    w: LowRank,
    a: LowRank,
    /// Not in the first layer.
    v: Option<LowRank>,
    g: LowRank,
    /// `[C]` each.
    w0: Vec<f32>,
    a0: Vec<f32>,
    v0: Vec<f32>,
    k_k: Vec<f32>,
    k_a: Vec<f32>,
    r_k: Vec<f32>,
    ln_x_weight: Vec<f32>,
    ln_x_bias: Vec<f32>,
}

/// Group norm of the read-out: 1e-5 times the square of the trainer's `head_size_divisor` of 8.
const LN_X_EPS: f32 = 64e-5;

impl TimeMix {
    pub fn load(loader: &Loader, layer: usize, sizes: &Sizes) -> Result<Self, Error> {
        let c = sizes.width;
        let att = |name: &str| format!("blocks.{layer}.att.{name}");
        let vector = |name: &str| loader.values(&att(name), &[c]);
        let square = |name: &str| Linear::load(loader, &att(name), c, c, Orientation::OutIn);
        let (heads, head_size) = loader.matrix_shape(&att("r_k"))?;
        if heads.checked_mul(head_size) != Some(c) || head_size > MAX_HEAD {
            let expected = format!("[heads, head size] with a product of {c} and heads of at most {MAX_HEAD}");
            return Err(Error::Shape { name: att("r_k"), found: vec![heads, head_size], expected });
        }
        let mut mixes = Vec::with_capacity(6 * c);
        for name in ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g"] {
            mixes.extend(vector(name)?);
        }
        // The first layer has no value to mix with; some files hold its unused v0, v1, v2 all the same.
        let (v, v0) = if layer == 0 {
            ["v0", "v1", "v2"].iter().for_each(|name| loader.allow(&att(name)));
            (None, Vec::new())
        } else {
            (Some(LowRank::load(loader, &att("v"), c, None)?), vector("v0")?)
        };
        Ok(Self {
            layer,
            heads,
            head_size,
            mixes,
            receptance: square("receptance.weight")?,
            key: square("key.weight")?,
            value: square("value.weight")?,
            output: square("output.weight")?,
            w: LowRank::load(loader, &att("w"), c, Some(Activation::Tanh))?,
            a: LowRank::load(loader, &att("a"), c, None)?,
            v,
            g: LowRank::load(loader, &att("g"), c, Some(Activation::Sigmoid))?,
            w0: vector("w0")?,
            a0: vector("a0")?,
            v0,
            k_k: vector("k_k")?,
            k_a: vector("k_a")?,
            r_k: loader.values(&att("r_k"), &[heads, head_size])?,
            ln_x_weight: vector("ln_x.weight")?,
            ln_x_bias: vector("ln_x.bias")?,
        })
    }

    fn low_ranks(&self) -> impl Iterator<Item = &LowRank> {
        [&self.w, &self.a, &self.g].into_iter().chain(&self.v)
    }

    /// Head `h`'s part of each parameter.
    fn head(&self, h: usize) -> HeadParams<'_> {
        let range = h * self.head_size..(h + 1) * self.head_size;
        HeadParams {
            w0: &self.w0[range.clone()],
            a0: &self.a0[range.clone()],
            v0: if self.v0.is_empty() { &[] } else { &self.v0[range.clone()] },
            k_k: &self.k_k[range.clone()],
            k_a: &self.k_a[range.clone()],
            r_k: &self.r_k[range.clone()],
            ln_x_weight: &self.ln_x_weight[range.clone()],
            ln_x_bias: &self.ln_x_bias[range],
            eps: LN_X_EPS,
        }
    }
}

impl Mixer for TimeMix {
    fn segments(&self) -> Vec<Segment> {
        let (layer, h, n) = (self.layer, self.heads, self.head_size);
        vec![
            Segment::Fixed { name: format!("blocks.{layer}.att.shift"), shape: vec![h * n], init: 0.0 },
            Segment::Fixed { name: time_state(layer), shape: vec![h, n, n], init: 0.0 },
        ]
    }

    fn forward(&self, x: &Tensor, step: &mut Step, carry: &mut Carry) -> Result<Tensor, Error> {
        let (tokens, width) = x.dims2()?;
        // 1. xr, xw, xk, xv, xa, xg = x + (x_prev - x) · mix
        let mixed = token_shift(x, &self.mixes, 0, step)?;
        // 2. the linear layers: r, w, k, v, a, g and the value gate, each into its plane; behind them what the low ranks pass on
        let ranks: usize = self.low_ranks().map(LowRank::rank).sum();
        let linear = step.work.scratch(tokens * (7 * width + ranks))?;
        linear.inplace_op2(&mixed, &Linears(self))?;
        let inputs = linear.narrow(0, 0, 7 * tokens * width)?.reshape((7, tokens, width))?;
        let v = inputs.get(3)?;
        let first_value = match &carry.first_value {
            Some(first) => first.clone(),
            None => {
                let first = step.work.held((tokens, width))?;
                linear::copy(&first, &v)?;
                carry.first_value.insert(first).clone()
            }
        };
        // 3. the recurrence
        let state = step.segment(1);
        let y = step.work.scratch((tokens, width))?;
        for rows in step.waves {
            y.inplace_op3(&inputs, &first_value, &Wkv { mix: self, rows, state })?;
        }
        // 4. the output layer
        let out = step.work.scratch((tokens, width))?;
        self.output.forward(&y, &out)?;
        Ok(out)
    }
}

/// The linear layers of `mixed [6, T, C]` (of r, w, k, v, a, g) → `[7, T, C]` (the same and the value gate), then `[T, r]` of each low
/// rank: in two passes, as a token waits for each.
struct Linears<'a>(&'a TimeMix);

impl InplaceOp2 for Linears<'_> {
    fn name(&self) -> &'static str {
        "linear layers of v7"
    }
    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        out_l: &Layout,
        mixed: &CpuStorage,
        mixed_l: &Layout,
    ) -> candle_core::Result<()> {
        let (mix, mixed, out) = (self.0, floats(mixed, mixed_l)?, floats_mut(out, out_l)?);
        let plane = mixed.len() / 6;
        let tokens = plane / (mix.heads * mix.head_size);
        let x = |n: usize| &mixed[n * plane..][..plane];
        let (planes, hidden) = out.split_at_mut(7 * plane);
        let mut planes = planes.chunks_exact_mut(plane);
        let [r, w, k, v, a, g, gate] = std::array::from_fn(|_| planes.next().expect("seven planes"));
        let (of_w, rest) = hidden.split_at_mut(tokens * mix.w.rank());
        let (of_a, rest) = rest.split_at_mut(tokens * mix.a.rank());
        let (of_g, of_gate) = rest.split_at_mut(tokens * mix.g.rank());
        let first = [
            mix.receptance.product(x(0), r, None),
            mix.key.product(x(2), k, None),
            mix.value.product(x(3), v, None),
            mix.w.down(x(1), of_w),
            mix.a.down(x(4), of_a),
            mix.g.down(x(5), of_g),
        ];
        multiply_all(first.iter().chain(&mix.v.as_ref().map(|low| low.down(x(3), of_gate))));
        let second = [mix.w.up(of_w, w), mix.a.up(of_a, a), mix.g.up(of_g, g)];
        multiply_all(second.iter().chain(&mix.v.as_ref().map(|low| low.up(of_gate, gate))));
        Ok(())
    }
}

/// The recurrence of all heads over all rows: `inputs [7, T, C]` (r, w, k, v, a, g, value gate) → `[T, C]`.
struct Wkv<'a> {
    mix: &'a TimeMix,
    rows: &'a [Row],
    state: Shared,
}

impl InplaceOp3 for Wkv<'_> {
    fn name(&self) -> &'static str {
        "wkv7"
    }
    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        out_l: &Layout,
        inputs: &CpuStorage,
        inputs_l: &Layout,
        first: &CpuStorage,
        first_l: &Layout,
    ) -> candle_core::Result<()> {
        let (heads, n) = (self.mix.heads, self.mix.head_size);
        let width = heads * n;
        let (inputs, first) = (floats(inputs, inputs_l)?, floats(first, first_l)?);
        let out = floats_mut(out, out_l)?;
        let tokens = out.len() / width;
        let shared = Shared::new(out);
        parallel(self.rows.len() * heads, 4 * tokens * width * n, |task| {
            let (row, h) = (&self.rows[task / heads], task % heads);
            let slot = |slot: u32| (slot as usize * heads + h) * n * n;
            // SAFETY: no two rows write one slot and no row reads a slot that another writes (checked by the step), and
            // each task has its own head; `from` is read only before `state` is made when they are the same.
            let state = unsafe { self.state.part(slot(row.into.0), n * n) };
            if row.from != row.into {
                // SAFETY: as above; a slot that is only read may be read by several rows.
                state.copy_from_slice(unsafe { self.state.part(slot(row.from.0), n * n) });
            }
            let params = self.mix.head(h);
            let first_token = row.tokens.start;
            wkv7_head(row.tokens.len(), &params, state, |token| {
                let at = (first_token + token) * width + h * n;
                let input = |plane: usize| &inputs[plane * tokens * width + at..][..n];
                let first_value = self.mix.v.is_some().then(|| (input(6), &first[at..][..n]));
                let x = HeadInputs {
                    r: input(0),
                    w: input(1),
                    k: input(2),
                    v: input(3),
                    a: input(4),
                    g: input(5),
                    first_value,
                };
                // SAFETY: one task for each (row, head), and rows do not share tokens.
                (x, unsafe { shared.part(at, n) })
            });
        });
        Ok(())
    }
}

/// The feed-forward half: `relu(x · K)² · V`.
pub struct ChannelMix {
    layer: usize,
    width: usize,
    /// `[C]`.
    x_k: Vec<f32>,
    key: Linear,
    pub value: Linear,
}

impl ChannelMix {
    pub fn load(loader: &Loader, layer: usize, sizes: &Sizes) -> Result<Self, Error> {
        let c = sizes.width;
        let ffn = |name: &str| format!("blocks.{layer}.ffn.{name}");
        let (inner, _) = loader.matrix_shape(&ffn("key.weight"))?;
        Ok(Self {
            layer,
            width: c,
            x_k: loader.values(&ffn("x_k"), &[c])?,
            key: Linear::load(loader, &ffn("key.weight"), inner, c, Orientation::OutIn)?,
            value: Linear::load_sparse(loader, &ffn("value.weight"), c, inner)?,
        })
    }

    /// Channels between the two linear layers.
    pub fn inner(&self) -> usize {
        self.key.outputs()
    }

    /// `x [N, C]` → `relu(x · K)² [N, inner]`, what goes into `value`.
    pub fn hidden(&self, x: &Tensor, step: &mut Step) -> Result<Tensor, Error> {
        let shifted = token_shift(x, &self.x_k, 0, step)?.get(0)?;
        let inner = step.work.scratch((step.tokens(), self.inner()))?;
        self.key.forward_then(&shifted, &inner, Activation::ReluSquared)?;
        Ok(inner)
    }
}

impl Mixer for ChannelMix {
    fn segments(&self) -> Vec<Segment> {
        let name = format!("blocks.{}.ffn.shift", self.layer);
        vec![Segment::Fixed { name, shape: vec![self.width], init: 0.0 }]
    }

    fn forward(&self, x: &Tensor, step: &mut Step, _: &mut Carry) -> Result<Tensor, Error> {
        let inner = self.hidden(x, step)?;
        let out = step.work.scratch(x.shape())?;
        self.value.forward(&inner, &out)?;
        Ok(out)
    }
}
