//! RWKV-1: a model that sees its whole text, which can have no more tokens than it was trained on at once.
//!
//! Tensor names and formulas are those of `GPT` with `RWKV_TimeMix` and `RWKV_ChannelMix` in BlinkDL/RWKV-LM,
//! `RWKV-v1/src/model.py`. C = width, A = attention width, H = heads, T = positions (`ctx_len`), N = tokens of the step.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Tensor};

use super::Error;
use super::block::{Carry, Head, Mixer, Sizes, Step, token_shift};
use super::copy_head::{self, CopyHead};
use super::generation::{BASE, Generation};
use super::kernels::{self, Activation, Curves, Shared};
use super::linear::{self, LayerNorm, Linear, Orientation, floats, floats_mut, planes};
use super::tiny_attention::TinyAttention;
use super::weights::Loader;
use crate::types::{Row, Segment};

pub const GENERATION: Generation = Generation {
    name: "v1",
    // The other models of its trainer have no receptance in their attention.
    detect: |checkpoint| {
        ["time_w", "receptance.weight"].iter().all(|n| checkpoint.shape(&format!("blocks.0.attn.{n}")).is_some())
    },
    mixers: |loader, layer, sizes| {
        Ok((Box::new(TimeMix::load(loader, layer, sizes)?), Box::new(ChannelMix::load(loader, layer, sizes)?)))
    },
    head,
    embedding: "tok_emb.weight",
    ln0: false,
    ..BASE
};

fn head(loader: &Loader, sizes: &Sizes) -> Result<Box<dyn Head>, Error> {
    let c = sizes.width;
    let (size, _) = loader.matrix_shape("head_k.weight")?;
    let context = copy_head::context(loader)?;
    Ok(Box::new(CopyHead {
        ln_out: LayerNorm::load(loader, "ln_f", c)?,
        linear: Linear::load(loader, "head.weight", sizes.vocabulary, c, Orientation::OutIn)?,
        query: Linear::load_biased(loader, "head_q", size, c)?,
        key: Linear::load_biased(loader, "head_k", size, c)?,
        window: context,
        time_out: loader.values("time_out", &[1, context, 1])?,
    }))
}

/// The mix of every token shift: the first half of the channels is the token before's, the rest is the token's own.
fn first_half(width: usize) -> Vec<f32> {
    (0..width).map(|c| if c < width / 2 { 1.0 } else { 0.0 }).collect()
}

/// The attention.
struct TimeMix {
    layer: usize,
    context: usize,
    /// `[C]`.
    mix: Vec<f32>,
    receptance: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// `[H, T]` each.
    time_w: Vec<f32>,
    alpha: Vec<f32>,
    beta: Vec<f32>,
    /// `[T]`: scales the result by position.
    gamma: Vec<f32>,
    tiny: Option<TinyAttention>,
}

impl TimeMix {
    fn load(loader: &Loader, layer: usize, sizes: &Sizes) -> Result<Self, Error> {
        let c = sizes.width;
        let attn = |name: &str| format!("blocks.{layer}.attn.{name}");
        let context = copy_head::context(loader)?;
        let (heads, _) = loader.matrix_shape(&attn("time_w"))?;
        let (width, inputs) = loader.matrix_shape(&attn("key.weight"))?;
        if !width.is_multiple_of(heads) {
            let expected = format!("[a multiple of {heads} heads, {c}]");
            return Err(Error::Shape { name: attn("key.weight"), found: vec![width, inputs], expected });
        }
        Ok(Self {
            layer,
            context,
            mix: first_half(c),
            receptance: Linear::load_biased(loader, &attn("receptance"), width, c)?,
            key: Linear::load_biased(loader, &attn("key"), width, c)?,
            value: Linear::load_biased(loader, &attn("value"), width, c)?,
            output: Linear::load_biased(loader, &attn("output"), c, width)?,
            time_w: loader.values(&attn("time_w"), &[heads, context])?,
            alpha: loader.values(&attn("time_alpha"), &[heads, 1, context])?,
            beta: loader.values(&attn("time_beta"), &[heads, context, 1])?,
            gamma: loader.values(&attn("time_gamma"), &[context, 1])?,
            tiny: TinyAttention::load(loader, &format!("blocks.{layer}.attn"), c)?,
        })
    }
}

impl Mixer for TimeMix {
    fn segments(&self) -> Vec<Segment> {
        let name = |name: &str| format!("blocks.{}.attn.{name}", self.layer);
        let width = self.key.outputs();
        let mut segments = vec![
            Segment::Fixed { name: name("shift"), shape: vec![self.mix.len()], init: 0.0 },
            // The sum of all weights, and each token's value times its weight.
            Segment::Fixed { name: name("denominator"), shape: vec![width], init: 0.0 },
            Segment::Log { name: name("values"), width, cap: Some(self.context), ids: None },
        ];
        segments.extend(self.tiny.iter().map(|tiny| tiny.segment(self.context)));
        segments
    }

    fn forward(&self, x: &Tensor, step: &mut Step, _: &mut Carry) -> Result<Tensor, Error> {
        let (tokens, width, rows) = (step.tokens(), self.key.outputs(), step.rows);
        // 1. r, k, v
        let shifted = token_shift(x, &self.mix, 0, step)?.get(0)?;
        let inputs = step.work.scratch((3, tokens, width))?;
        let [r, k, v] = planes(&inputs)?;
        self.receptance.forward(&shifted, &r)?;
        self.key.forward(&shifted, &k)?;
        self.value.forward(&shifted, &v)?;
        // 2. the weights; weighted values are kept
        inputs.inplace_op1(&Weigh { rows, width, sums: step.segment(1) })?;
        linear::read(&v, |values| remember(values, width, step))??;
        // 3. the mean over the text, the output layer
        let y = step.work.scratch((tokens, width))?;
        y.inplace_op2(&inputs, &Attend { mix: self, rows, logs: step.logs(2) })?;
        let out = step.work.scratch((tokens, self.output.outputs()))?;
        self.output.forward(&y, &out)?;
        if let Some(tiny) = &self.tiny {
            linear::add(&out, &tiny.forward(&shifted, step, 3)?)?;
        }
        let positions = rows.iter().flat_map(|row| (row.at..).take(row.tokens.len()));
        linear::scale_rows(&out, &positions.map(|at| self.gamma[at as usize]).collect::<Vec<_>>())?;
        Ok(out)
    }
}

/// Adds the weighted values of the step's tokens to the rows' logs, which hold one entry for each token before.
fn remember(values: &[f32], width: usize, step: &mut Step) -> Result<(), Error> {
    let rows = step.rows;
    let logs = step.logs(2);
    for row in rows {
        let log = &mut logs[row.into.0 as usize];
        let entries = log.len() / width;
        if entries as u64 != row.at {
            let name = "blocks.*.attn.values".into();
            return Err(Error::State(name, format!("{entries} tokens do not go on at position {}", row.at)));
        }
        log.extend_from_slice(&values[row.tokens.start * width..row.tokens.end * width]);
    }
    Ok(())
}

struct Weigh<'a> {
    rows: &'a [Row],
    width: usize,
    sums: Shared,
}

impl InplaceOp1 for Weigh<'_> {
    fn name(&self) -> &'static str {
        "weigh"
    }
    fn cpu_fwd(&self, inputs: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        kernels::weigh1(floats_mut(inputs, layout)?, self.rows, self.width, self.sums);
        Ok(())
    }
}

struct Attend<'a> {
    mix: &'a TimeMix,
    rows: &'a [Row],
    logs: &'a [Vec<f32>],
}

impl InplaceOp2 for Attend<'_> {
    fn name(&self) -> &'static str {
        "wkv1"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> candle_core::Result<()> {
        let TimeMix { time_w, alpha, beta, context, .. } = self.mix;
        let curves = Curves { time_w, alpha, beta, context: *context };
        kernels::wkv1(&curves, floats(x, x_l)?, self.rows, self.logs, floats_mut(out, out_l)?);
        Ok(())
    }
}

/// The feed-forward half: `σ(x · R) · ((mish(x · K) · (x · V)) · W)`.
struct ChannelMix {
    layer: usize,
    /// `[C]`.
    mix: Vec<f32>,
    key: Linear,
    value: Linear,
    weight: Linear,
    receptance: Linear,
}

impl ChannelMix {
    fn load(loader: &Loader, layer: usize, sizes: &Sizes) -> Result<Self, Error> {
        let c = sizes.width;
        let mlp = |name: &str| format!("blocks.{layer}.mlp.{name}");
        let (inner, _) = loader.matrix_shape(&mlp("key.weight"))?;
        Ok(Self {
            layer,
            mix: first_half(c),
            key: Linear::load_biased(loader, &mlp("key"), inner, c)?,
            value: Linear::load_biased(loader, &mlp("value"), inner, c)?,
            weight: Linear::load_biased(loader, &mlp("weight"), c, inner)?,
            receptance: Linear::load_biased(loader, &mlp("receptance"), c, c)?,
        })
    }
}

impl Mixer for ChannelMix {
    fn segments(&self) -> Vec<Segment> {
        let name = format!("blocks.{}.mlp.shift", self.layer);
        vec![Segment::Fixed { name, shape: vec![self.mix.len()], init: 0.0 }]
    }

    fn forward(&self, x: &Tensor, step: &mut Step, _: &mut Carry) -> Result<Tensor, Error> {
        let (tokens, width) = x.dims2()?;
        let shifted = token_shift(x, &self.mix, 0, step)?.get(0)?;
        let inner = step.work.scratch((tokens, self.key.outputs()))?;
        self.key.forward(&shifted, &inner)?;
        inner.inplace_op1(&Activation::Mish)?;
        let value = step.work.scratch((tokens, self.value.outputs()))?;
        self.value.forward(&shifted, &value)?;
        linear::multiply(&inner, &value)?;
        let out = step.work.scratch((tokens, width))?;
        self.weight.forward(&inner, &out)?;
        let gate = step.work.scratch((tokens, width))?;
        self.receptance.forward(&shifted, &gate)?;
        gate.inplace_op1(&Activation::Sigmoid)?;
        linear::multiply(&out, &gate)?;
        Ok(out)
    }
}
