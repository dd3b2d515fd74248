//! RWKV-7b: v7a with attention over the text (DeepEmbed attention) beside v7's attention, so that its state grows with the
//! text.
//!
//! Tensor names and formulas are those of BlinkDL/RWKV-LM, `RWKV-v7/rwkv_v7b_demo.py`. C = width, D = width of queries and keys
//! (256).

use super::Error;
use super::block::Sizes;
use super::deep_embed::DeepEmbed;
use super::embed_attention::{Beside, EmbedAttention, Side};
use super::generation::Generation;
use super::linear::{LayerNorm, Linear, Orientation};
use super::v7::{self, TimeMix, is_v7};
use super::v7a::ChannelMix;
use super::weights::Loader;

pub const GENERATION: Generation = Generation {
    name: "v7b",
    detect: |checkpoint| is_v7(checkpoint, Some("s_emb"), true),
    mixers: |loader, layer, sizes| {
        let time_mix = TimeMix::load(loader, layer, sizes)?;
        let attention = attention(loader, layer, sizes)?;
        Ok((Box::new(Beside { time_mix, attention }), Box::new(ChannelMix::load(loader, layer, sizes)?)))
    },
    ..v7::GENERATION
};

/// `softmax(64 · tanh(q · k / 1024)) · v` with
/// q = ln(shift(x · qq)), k = ln(shift(x · k1 · k2 · k_emb[id])), v = ln(shift(tanh(x · v1 · v2) · v_emb[id])).
fn attention(loader: &Loader, layer: usize, sizes: &Sizes) -> Result<EmbedAttention, Error> {
    let prefix = format!("blocks.{layer}.qkv");
    let qkv = |name: &str| format!("{prefix}.{name}");
    let (size, _) = loader.matrix_shape(&qkv("qq.weight"))?;
    let side = |name: &str, width: usize| -> Result<Side, Error> {
        let qkv = |part: &str| qkv(&part.replace('*', name));
        let (_, rank) = loader.matrix_shape(&qkv("*1"))?;
        Ok(Side {
            down: Linear::load(loader, &qkv("*1"), rank, sizes.width, Orientation::InOut)?,
            up: Linear::load(loader, &qkv("*2"), width, rank, Orientation::InOut)?,
            tanh: name == "v",
            table: DeepEmbed::load_merged(loader, &qkv("*_emb"), width, sizes)?,
            mix: loader.values(&qkv("x_*"), &[width])?,
            norm: LayerNorm::load(loader, &qkv("ln*"), width)?,
        })
    };
    Ok(EmbedAttention {
        query: Linear::load(loader, &qkv("qq.weight"), size, sizes.width, Orientation::OutIn)?,
        query_mix: loader.values(&qkv("x_q"), &[size])?,
        query_norm: LayerNorm::load(loader, &qkv("lnq"), size)?,
        key: side("k", size)?,
        value: side("v", sizes.width)?,
        cap: 64.0,
        vocabulary: sizes.vocabulary,
        prefix,
    })
}
