//! RWKV-2 (RNN): the residual stream is the normalised one, and a half of a block has one mix for all its inputs.
//!
//! Tensor names and formulas are those of `RWKV_RNN` in BlinkDL/RWKV-LM, `RWKV-v2-RNN/src/model_run.py`; v3 has the same halves
//! with other mixes. C = width, N = tokens of the step.

use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};

use super::Error;
use super::block::{Carry, Mixer, Residual, Sizes, Step, time_mixes, token_shift};
use super::channel_mix::ChannelMix;
use super::copy_head::CopyHead;
use super::generation::{BASE, Generation};
use super::kernels::{self, Shared, Wkv2Params};
use super::linear::{Linear, Orientation, floats, floats_mut, planes};
use super::weights::Loader;
use crate::types::{Row, Segment};

pub const GENERATION: Generation = Generation {
    name: "v2",
    // Only v2 has one mix; every block has an `ffn`.
    detect: |checkpoint| checkpoint.shape("blocks.0.ffn.time_mix").is_some(),
    mixers: |loader, layer, sizes| mixers(loader, layer, sizes, ["time_mix"; 3], 1e-16),
    head: CopyHead::load,
    ln0: false,
    residual: Residual::Normed,
    ..BASE
};

/// The two halves of a layer; `mixes` are the names for receptance, key and value, `eps` is added to the divisor.
#[allow(clippy::type_complexity)]
pub fn mixers(
    loader: &Loader,
    layer: usize,
    sizes: &Sizes,
    mixes: [&str; 3],
    eps: f32,
) -> Result<(Box<dyn Mixer>, Box<dyn Mixer>), Error> {
    let channel_mix = |part: &str| -> Result<Box<dyn Mixer>, Error> {
        let prefix = format!("blocks.{layer}.{part}");
        let mixes = time_mixes(loader, &prefix, &[mixes[1], mixes[0]], sizes.width)?;
        Ok(Box::new(ChannelMix::load(loader, &prefix, format!("{prefix}.shift"), sizes.width, mixes)?))
    };
    let first = if layer == 0 && loader.has("blocks.0.ffnPre.key.weight") {
        channel_mix("ffnPre")?
    } else {
        Box::new(TimeMix::load(loader, layer, sizes, mixes, eps)?)
    };
    Ok((first, channel_mix("ffn")?))
}

/// Attention's place in a block: two decaying sums a channel.
struct TimeMix {
    layer: usize,
    width: usize,
    /// `[3, C]`: of receptance, key and value.
    mixes: Vec<f32>,
    receptance: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// `[C]` each: `exp(-exp(time_decay))` and `exp(time_first)`.
    decay: Vec<f32>,
    first: Vec<f32>,
    eps: f32,
}

impl TimeMix {
    fn load(loader: &Loader, layer: usize, sizes: &Sizes, mixes: [&str; 3], eps: f32) -> Result<Self, Error> {
        let c = sizes.width;
        let prefix = format!("blocks.{layer}.att");
        let square = |name: &str| Linear::load(loader, &format!("{prefix}.{name}.weight"), c, c, Orientation::OutIn);
        let vector = |name: &str, f: fn(f32) -> f32| -> Result<Vec<f32>, Error> {
            Ok(loader.values(&format!("{prefix}.{name}"), &[c, 1])?.into_iter().map(f).collect())
        };
        Ok(Self {
            layer,
            width: c,
            mixes: time_mixes(loader, &prefix, &mixes, c)?,
            receptance: square("receptance")?,
            key: square("key")?,
            value: square("value")?,
            output: square("output")?,
            decay: vector("time_decay", |x| (-x.exp()).exp())?,
            first: vector("time_first", f32::exp)?,
            eps,
        })
    }
}

impl Mixer for TimeMix {
    fn segments(&self) -> Vec<Segment> {
        let segment = |name: &str| {
            let name = format!("blocks.{}.att.{name}", self.layer);
            Segment::Fixed { name, shape: vec![self.width], init: 0.0 }
        };
        // The numerator and the denominator, under their original names.
        vec![segment("shift"), segment("aa"), segment("bb")]
    }

    fn forward(&self, x: &Tensor, step: &mut Step, _: &mut Carry) -> Result<Tensor, Error> {
        let (tokens, width) = x.dims2()?;
        let mixed = token_shift(x, &self.mixes, 0, step)?;
        let [xr, xk, xv] = planes(&mixed)?;
        let inputs = step.work.scratch((3, tokens, width))?;
        let [r, k, v] = planes(&inputs)?;
        self.receptance.forward(&xr, &r)?;
        self.key.forward(&xk, &k)?;
        self.value.forward(&xv, &v)?;
        let (numerators, denominators) = (step.segment(1), step.segment(2));
        let y = step.work.scratch((tokens, width))?;
        for rows in step.waves {
            y.inplace_op2(&inputs, &Wkv { mix: self, rows, numerators, denominators })?;
        }
        let out = step.work.scratch((tokens, width))?;
        self.output.forward(&y, &out)?;
        Ok(out)
    }
}

/// The recurrence over all rows: `inputs [3, N, C]` (r, k, v) → `[N, C]`.
struct Wkv<'a> {
    mix: &'a TimeMix,
    rows: &'a [Row],
    numerators: Shared,
    denominators: Shared,
}

impl InplaceOp2 for Wkv<'_> {
    fn name(&self) -> &'static str {
        "wkv2"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> candle_core::Result<()> {
        let params = Wkv2Params { decay: &self.mix.decay, first: &self.mix.first, eps: self.mix.eps };
        let (inputs, out) = (floats(x, x_l)?, floats_mut(out, out_l)?);
        kernels::wkv2(&params, inputs, self.rows, self.numerators, self.denominators, out);
        Ok(())
    }
}
