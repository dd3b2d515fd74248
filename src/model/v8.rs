//! Early RWKV-8 "Heron": rc00, v7 with a channel mix that is scaled by a vector of each token's own, and its hybrid with
//! attention over the text, whose state grows with the text.
//!
//! Tensor names and formulas are those of BlinkDL/RWKV-LM, `RWKV-v7/rwkv_v8_rc00_demo.py` and `RWKV-v7/rwkv_v8_rc00_hybrid_demo.py`.
//! C = width, D = width of queries and keys (256).

use candle_core::Tensor;

use super::Error;
use super::block::{Carry, Mixer, Sizes, Step};
use super::deep_embed::DeepEmbed;
use super::embed_attention::{Beside, EmbedAttention, Side};
use super::generation::Generation;
use super::linear::{LayerNorm, Linear, Orientation};
use super::v7::{self, TimeMix, is_v7};
use super::weights::Loader;
use crate::types::Segment;

pub const RC00: Generation = Generation {
    name: "v8_rc00",
    detect: |checkpoint| is_v7(checkpoint, Some("enn"), false),
    mixers: |loader, layer, sizes| {
        Ok((Box::new(TimeMix::load(loader, layer, sizes)?), Box::new(ChannelMix::load(loader, layer, sizes)?)))
    },
    ..v7::GENERATION
};

pub const RC00_HYBRID: Generation = Generation {
    name: "v8_rc00_hybrid",
    detect: |checkpoint| is_v7(checkpoint, Some("enn"), true),
    mixers: |loader, layer, sizes| {
        // The original code never applies an ln0, whether the file has one or not.
        ["weight", "bias"].iter().for_each(|part| loader.allow(&format!("blocks.0.ln0.{part}")));
        let time_mix = TimeMix::load(loader, layer, sizes)?;
        let attention = attention(loader, layer, sizes)?;
        Ok((Box::new(Beside { time_mix, attention }), Box::new(ChannelMix::load(loader, layer, sizes)?)))
    },
    ln0: false,
    ..v7::GENERATION
};

/// The feed-forward half: `(relu(x · K)² · V) · enn[id]`.
struct ChannelMix {
    plain: v7::ChannelMix,
    /// `[V, C]`.
    enn: DeepEmbed,
}

impl ChannelMix {
    fn load(loader: &Loader, layer: usize, sizes: &Sizes) -> Result<Self, Error> {
        let enn = DeepEmbed::load(loader, &format!("blocks.{layer}.ffn.enn"), sizes.width, sizes)?;
        Ok(Self { plain: v7::ChannelMix::load(loader, layer, sizes)?, enn })
    }
}

impl Mixer for ChannelMix {
    fn segments(&self) -> Vec<Segment> {
        self.plain.segments()
    }

    fn forward(&self, x: &Tensor, step: &mut Step, carry: &mut Carry) -> Result<Tensor, Error> {
        let out = self.plain.forward(x, step, carry)?;
        self.enn.scale(&out, step.ids)?;
        Ok(out)
    }
}

/// `softmax(32 · tanh(q · k / 512)) · v` with
/// q = ln(x · qq), k = ln(x · kk · kkup · ennk[id]), v = ln(tanh(x · vv · vvup) · emm[id]).
fn attention(loader: &Loader, layer: usize, sizes: &Sizes) -> Result<EmbedAttention, Error> {
    let prefix = format!("blocks.{layer}.qkv");
    let qkv = |name: &str| format!("{prefix}.{name}");
    let (size, _) = loader.matrix_shape(&qkv("qq.weight"))?;
    let side = |name: &str, table: &str, width: usize| -> Result<Side, Error> {
        let qkv = |part: &str| qkv(&part.replace('*', name));
        let (rank, _) = loader.matrix_shape(&qkv("**.weight"))?;
        Ok(Side {
            down: Linear::load(loader, &qkv("**.weight"), rank, sizes.width, Orientation::OutIn)?,
            up: Linear::load(loader, &qkv("**up.weight"), width, rank, Orientation::OutIn)?,
            tanh: name == "v",
            table: DeepEmbed::load(loader, &qkv(table), width, sizes)?,
            mix: vec![0.0; width],
            norm: LayerNorm::load(loader, &qkv("ln*"), width)?,
        })
    };
    Ok(EmbedAttention {
        query: Linear::load(loader, &qkv("qq.weight"), size, sizes.width, Orientation::OutIn)?,
        query_mix: Vec::new(),
        query_norm: LayerNorm::load(loader, &qkv("lnq"), size)?,
        key: side("k", "ennk", size)?,
        value: side("v", "emm", sizes.width)?,
        cap: 32.0,
        vocabulary: sizes.vocabulary,
        prefix,
    })
}
