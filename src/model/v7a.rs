//! RWKV-7a: v7 with DeepEmbed, a small matrix of each token's own that gates its channel mix.
//!
//! Tensor names and formulas are those of BlinkDL/RWKV-LM, `RWKV-v7/rwkv_v7a_demo.py`. C = width, F = inner width of the channel
//! mix, N = tokens of the step, P × Q = the matrix of a token (32 × 32).

use candle_core::Tensor;

use super::Error;
use super::block::{Carry, Mixer, Sizes, Step};
use super::deep_embed::DeepEmbed;
use super::generation::Generation;
use super::linear::{self, Linear, Orientation};
use super::v7::{self, TimeMix, is_v7};
use super::weights::Loader;
use crate::types::Segment;

pub const GENERATION: Generation = Generation {
    name: "v7a",
    detect: |checkpoint| is_v7(checkpoint, Some("s_emb"), false),
    mixers: |loader, layer, sizes| {
        Ok((Box::new(TimeMix::load(loader, layer, sizes)?), Box::new(ChannelMix::load(loader, layer, sizes)?)))
    },
    ..v7::GENERATION
};

/// The feed-forward half: `(relu(x · K)² · ((x · s1 · s_emb[id]) · s2 + s0)) · V`.
pub struct ChannelMix {
    plain: v7::ChannelMix,
    /// `C → P`.
    s1: Linear,
    /// `[V, P Q]`.
    s_emb: DeepEmbed,
    /// `Q → F`, with `s0` as its bias.
    s2: Linear,
    /// Q.
    columns: usize,
}

impl ChannelMix {
    pub fn load(loader: &Loader, layer: usize, sizes: &Sizes) -> Result<Self, Error> {
        let ffn = |name: &str| format!("blocks.{layer}.ffn.{name}");
        let plain = v7::ChannelMix::load(loader, layer, sizes)?;
        let inner = plain.inner();
        let (_, rows) = loader.matrix_shape(&ffn("s1"))?;
        let (columns, _) = loader.matrix_shape(&ffn("s2"))?;
        let Some(size) = rows.checked_mul(columns) else {
            let found = vec![columns, inner];
            return Err(Error::Shape { name: ffn("s2"), found, expected: format!("[columns of a matrix, {inner}]") });
        };
        let s2 = Linear::load(loader, &ffn("s2"), inner, columns, Orientation::InOut)?;
        Ok(Self {
            s1: Linear::load(loader, &ffn("s1"), rows, sizes.width, Orientation::InOut)?,
            s_emb: DeepEmbed::load_merged(loader, &ffn("s_emb"), size, sizes)?,
            s2: s2.with_bias(loader.values(&ffn("s0"), &[inner])?),
            columns,
            plain,
        })
    }
}

impl Mixer for ChannelMix {
    fn segments(&self) -> Vec<Segment> {
        self.plain.segments()
    }

    fn forward(&self, x: &Tensor, step: &mut Step, _: &mut Carry) -> Result<Tensor, Error> {
        let tokens = step.tokens();
        let inner = self.plain.hidden(x, step)?;
        let narrow = step.work.scratch((tokens, self.s1.outputs()))?;
        self.s1.forward(x, &narrow)?;
        let own = step.work.scratch((tokens, self.columns))?;
        self.s_emb.product(&narrow, step.ids, &own)?;
        let gate = step.work.scratch((tokens, self.plain.inner()))?;
        self.s2.forward(&own, &gate)?;
        linear::multiply(&inner, &gate)?;
        let out = step.work.scratch(x.shape())?;
        self.plain.value.forward(&inner, &out)?;
        Ok(out)
    }
}
