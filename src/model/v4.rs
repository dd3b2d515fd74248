//! RWKV-4 "Dove", and v4neo, whose files and inference are the same.
//!
//! Tensor names and formulas are those of `RWKV_RNN` in BlinkDL/RWKV-LM, `RWKV-v4/src/model_run.py`. C = width, A = attention width,
//! which only the `rwkv` package (BlinkDL/ChatRWKV, `n_att`) allows to differ, T = tokens of the step.

use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};

use super::Error;
use super::block::{Carry, Mixer, Sizes, Step, time_mixes, token_shift};
use super::channel_mix::ChannelMix;
use super::copy_head;
use super::generation::{BASE, Generation};
use super::kernels::{self, Wkv4Params, Wkv4States};
use super::linear::{Linear, Orientation, floats, floats_mut, planes};
use super::weights::{Checkpoint, Loader};
use crate::types::{Row, Segment};

pub const GENERATION: Generation = Generation {
    name: "v4",
    detect,
    mixers: |loader, layer, sizes| {
        // Some files begin with a second channel mix in place of attention.
        let first: Box<dyn Mixer> = if layer == 0 && loader.has("blocks.0.ffnPre.key.weight") {
            channel_mix(loader, "blocks.0.ffnPre", sizes)?
        } else {
            Box::new(TimeMix::load(loader, layer, sizes)?)
        };
        Ok((first, channel_mix(loader, &format!("blocks.{layer}.ffn"), sizes)?))
    },
    head: copy_head::optional,
    ..BASE
};

/// v3 has the same names with decays of `[C, 1]`, v5 has them with a `ln_x` besides.
fn detect(checkpoint: &Checkpoint) -> bool {
    let attention = |layer: usize| {
        let att = |name: &str| checkpoint.shape(&format!("blocks.{layer}.att.{name}"));
        matches!(att("time_decay"), Some([_])) && att("time_mix_k").is_some() && att("ln_x.weight").is_none()
    };
    attention(0) || (checkpoint.shape("blocks.0.ffnPre.key.weight").is_some() && attention(1))
}

/// The channel mix of v4 and v5.
pub fn channel_mix(loader: &Loader, prefix: &str, sizes: &Sizes) -> Result<Box<dyn Mixer>, Error> {
    let mixes = time_mixes(loader, prefix, &["time_mix_k", "time_mix_r"], sizes.width)?;
    Ok(Box::new(ChannelMix::load(loader, prefix, format!("{prefix}.shift"), sizes.width, mixes)?))
}

/// Attention's place in a block: a weighted mean of all values so far, channel by channel.
struct TimeMix {
    layer: usize,
    width: usize,
    /// `[3, C]`: time_mix_r, time_mix_k, time_mix_v.
    mixes: Vec<f32>,
    receptance: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// `[A]`: -exp(time_decay).
    decay: Vec<f32>,
    /// `[A]`.
    time_first: Vec<f32>,
}

impl TimeMix {
    fn load(loader: &Loader, layer: usize, sizes: &Sizes) -> Result<Self, Error> {
        let c = sizes.width;
        let prefix = format!("blocks.{layer}.att");
        let att = |name: &str| format!("{prefix}.{name}");
        let (a, _) = loader.matrix_shape(&att("key.weight"))?;
        let linear = |name: &str| Linear::load(loader, &att(name), a, c, Orientation::OutIn);
        Ok(Self {
            layer,
            width: c,
            mixes: time_mixes(loader, &prefix, &["time_mix_r", "time_mix_k", "time_mix_v"], c)?,
            receptance: linear("receptance.weight")?,
            key: linear("key.weight")?,
            value: linear("value.weight")?,
            output: Linear::load(loader, &att("output.weight"), c, a, Orientation::OutIn)?,
            decay: loader.values(&att("time_decay"), &[a])?.into_iter().map(|w| -w.exp()).collect(),
            time_first: loader.values(&att("time_first"), &[a])?,
        })
    }
}

impl Mixer for TimeMix {
    fn segments(&self) -> Vec<Segment> {
        // No exponent so far: smaller than any that a token can have.
        let (c, a) = (self.width, self.decay.len());
        let parts = [("shift", c, 0.0), ("aa", a, 0.0), ("bb", a, 0.0), ("pp", a, -1e30)];
        let name = |part: &str| format!("blocks.{}.att.{part}", self.layer);
        parts.map(|(part, width, init)| Segment::Fixed { name: name(part), shape: vec![width], init }).into()
    }

    fn forward(&self, x: &Tensor, step: &mut Step, _: &mut Carry) -> Result<Tensor, Error> {
        let (tokens, width) = (step.tokens(), self.decay.len());
        // 1. xr, xk, xv = x · mix + x_prev · (1 - mix)
        let mixed = token_shift(x, &self.mixes, 0, step)?;
        let [xr, xk, xv] = planes(&mixed)?;
        // 2. the linear layers, each into its plane
        let inputs = step.work.scratch((3, tokens, width))?;
        let [r, k, v] = planes(&inputs)?;
        self.receptance.forward(&xr, &r)?;
        self.key.forward(&xk, &k)?;
        self.value.forward(&xv, &v)?;
        // 3. the recurrence
        let states = Wkv4States { aa: step.segment(1), bb: step.segment(2), pp: step.segment(3) };
        let y = step.work.scratch((tokens, width))?;
        for rows in step.waves {
            y.inplace_op2(&inputs, &Wkv { mix: self, rows, states: &states })?;
        }
        // 4. the output layer
        let out = step.work.scratch(x.shape())?;
        self.output.forward(&y, &out)?;
        Ok(out)
    }
}

/// The recurrence over all rows: `inputs [3, T, A]` (r, k, v) → `[T, A]`.
struct Wkv<'a> {
    mix: &'a TimeMix,
    rows: &'a [Row],
    states: &'a Wkv4States,
}

impl InplaceOp2 for Wkv<'_> {
    fn name(&self) -> &'static str {
        "wkv4"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> candle_core::Result<()> {
        let params = Wkv4Params { decay: &self.mix.decay, first: &self.mix.time_first };
        kernels::wkv4(&params, floats(x, x_l)?, self.rows, self.states, floats_mut(out, out_l)?);
        Ok(())
    }
}
