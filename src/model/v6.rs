//! RWKV-6 "Finch" (x060): the recurrence of v5 with mixes and decays of each token's own.
//!
//! Tensor names and formulas are those of BlinkDL/ChatRWKV: `att_one_v6_0` in the `rwkv` package
//! (`rwkv_pip_package/src/rwkv/model.py`), and `RWKV_v6_demo.py`. C = width, H = heads, N = head size, T = tokens of the step, r =
//! a low rank.

use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};

use super::Error;
use super::block::{Carry, Mixer, Sizes, Step, token_shift_added, token_shift_ahead};
use super::channel_mix::ChannelMix;
use super::generation::{BASE, Generation};
use super::kernels::{self, Activation};
use super::linear::{Linear, Orientation, floats_mut, planes};
use super::low_rank::LowRank;
use super::v5::Heads;
use super::weights::Loader;
use crate::types::Segment;

pub const GENERATION: Generation = Generation {
    name: "v6",
    // time_maa_x came with v6, and v7 has it no more.
    detect: |checkpoint| checkpoint.shape("blocks.0.att.time_maa_x").is_some(),
    mixers: |loader, layer, sizes| {
        let ffn = format!("blocks.{layer}.ffn");
        let mixes = time_maa(loader, &ffn, &["k", "r"], sizes.width)?;
        let channel_mix = ChannelMix::load(loader, &ffn, format!("{ffn}.shift"), sizes.width, mixes)?;
        Ok((Box::new(TimeMix::load(loader, layer, sizes)?), Box::new(channel_mix)))
    },
    time_state: Some(|layer| format!("blocks.{layer}.att.wkv")),
    transpose_time_state: true,
    ..BASE
};

/// The mixes `{prefix}.time_maa_{name}`, `[names, C]`.
fn time_maa(loader: &Loader, prefix: &str, names: &[&str], width: usize) -> Result<Vec<f32>, Error> {
    let mut mixes = Vec::with_capacity(names.len() * width);
    for name in names {
        mixes.extend(loader.values(&format!("{prefix}.time_maa_{name}"), &[width])?);
    }
    Ok(mixes)
}

/// Attention's place in a block: the matrix-valued state.
struct TimeMix {
    heads: Heads,
    /// `[C]`: of the input of `maa`.
    time_maa_x: Vec<f32>,
    /// `[5, C]`: time_maa_w, _k, _v, _r, _g.
    mixes: Vec<f32>,
    /// What a token adds to each of these mixes.
    maa: [LowRank; 5],
    receptance: Linear,
    key: Linear,
    value: Linear,
    gate: Linear,
    output: Linear,
    /// `[C]`.
    time_decay: Vec<f32>,
    /// What a token adds to it.
    decay: LowRank,
}

impl TimeMix {
    fn load(loader: &Loader, layer: usize, sizes: &Sizes) -> Result<Self, Error> {
        let c = sizes.width;
        let prefix = format!("blocks.{layer}.att");
        let att = |name: &str| format!("{prefix}.{name}");
        let square = |name: &str| Linear::load(loader, &att(name), c, c, Orientation::OutIn);
        let (heads, head_size) = loader.matrix_shape(&att("time_faaaa"))?;
        if heads.checked_mul(head_size) != Some(c) {
            let expected = format!("[heads, head size] with a product of {c}");
            return Err(Error::Shape { name: att("time_faaaa"), found: vec![heads, head_size], expected });
        }
        let bonus = loader.values(&att("time_faaaa"), &[heads, head_size])?;
        Ok(Self {
            heads: Heads::load(loader, layer, (heads, head_size), bonus)?,
            time_maa_x: time_maa(loader, &prefix, &["x"], c)?,
            mixes: time_maa(loader, &prefix, &["w", "k", "v", "r", "g"], c)?,
            maa: LowRank::load_several(loader, &att("time_maa_w"), c, Some(Activation::Tanh))?,
            receptance: square("receptance.weight")?,
            key: square("key.weight")?,
            value: square("value.weight")?,
            gate: square("gate.weight")?,
            output: square("output.weight")?,
            time_decay: loader.values(&att("time_decay"), &[c])?,
            decay: LowRank::load(loader, &att("time_decay_w"), c, Some(Activation::Tanh))?,
        })
    }
}

impl Mixer for TimeMix {
    fn segments(&self) -> Vec<Segment> {
        self.heads.segments()
    }

    fn forward(&self, x: &Tensor, step: &mut Step, _: &mut Carry) -> Result<Tensor, Error> {
        let (tokens, width) = x.dims2()?;
        // 1. xxx = x + (x_prev - x) · maa_x;  xw, xk, xv, xr, xg = x + (x_prev - x) · (maa + tanh(xxx · W1) · W2)
        let xxx = token_shift_ahead(x, &self.time_maa_x, 0, step)?.get(0)?;
        let mixed = step.work.scratch((5, tokens, width))?;
        let [xw, xk, xv, xr, xg] = planes(&mixed)?;
        for (maa, added) in self.maa.iter().zip([&xw, &xk, &xv, &xr, &xg]) {
            maa.forward(&xxx, added, step)?;
        }
        token_shift_added(x, &self.mixes, &mixed, 0, step)?;
        // 2. the linear layers, each into its plane; w = exp(-exp(time_decay + tanh(xw · W1) · W2))
        let inputs = step.work.scratch((5, tokens, width))?;
        let [r, k, v, g, w] = planes(&inputs)?;
        self.receptance.forward(&xr, &r)?;
        self.key.forward(&xk, &k)?;
        self.value.forward(&xv, &v)?;
        self.gate.forward(&xg, &g)?;
        self.decay.forward(&xw, &w, step)?;
        w.inplace_op1(&Decay(&self.time_decay))?;
        // 3. the recurrence
        let y = self.heads.recur(&inputs, true, None, step)?;
        // 4. the output layer
        let out = step.work.scratch((tokens, width))?;
        self.output.forward(&y, &out)?;
        Ok(out)
    }
}

/// `x = exp(-exp(x + base))`.
struct Decay<'a>(&'a [f32]);

impl InplaceOp1 for Decay<'_> {
    fn name(&self) -> &'static str {
        "decay"
    }
    fn cpu_fwd(&self, x: &mut CpuStorage, x_l: &Layout) -> candle_core::Result<()> {
        kernels::decay(floats_mut(x, x_l)?, self.0);
        Ok(())
    }
}
