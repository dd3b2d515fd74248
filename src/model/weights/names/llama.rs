//! GGUF in llama.cpp's names: architectures `rwkv6` and `rwkv7`.
//!
//! The facts are those of `conversion/rwkv.py` and `src/models/rwkv6.cpp`, `rwkv7.cpp` of ggml-org/llama.cpp. The tables
//! serve reading and writing.

use super::Op;
use crate::model::weights::file::Place;
use crate::model::weights::gguf::Gguf;

/// How a tensor of the original trainer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Same,
    /// `[1, 1, C]`, written as `[C]`.
    Vector,
    /// The last two axes change places.
    Transposed,
    /// `[H, N]`, written as `[C]`.
    Heads,
}
use Form::{Heads, Same, Transposed, Vector};

/// An architecture: what its tensors are called here and there, without `blk.N.` and `blocks.N.`.
pub struct Architecture {
    pub name: &'static str,
    pub layer: &'static [(&'static str, &'static str, Form)],
    /// What is written as one tensor `time_mix_lerp_fused`, in this order.
    pub fused: &'static [&'static str],
}

/// What stands outside of layers.
pub const OUTSIDE: [(&str, &str); 6] = [
    ("emb.weight", "token_embd.weight"),
    ("blocks.0.ln0.weight", "token_embd_norm.weight"),
    ("blocks.0.ln0.bias", "token_embd_norm.bias"),
    ("ln_out.weight", "output_norm.weight"),
    ("ln_out.bias", "output_norm.bias"),
    ("head.weight", "output.weight"),
];

pub const FUSED: &str = "time_mix_lerp_fused.weight";

pub const RWKV6: Architecture = Architecture {
    name: "rwkv6",
    layer: &[
        ("ln1.weight", "attn_norm.weight", Same),
        ("ln1.bias", "attn_norm.bias", Same),
        ("ln2.weight", "attn_norm_2.weight", Same),
        ("ln2.bias", "attn_norm_2.bias", Same),
        ("att.time_maa_x", "time_mix_lerp_x.weight", Vector),
        ("att.time_maa_w1", "time_mix_w1.weight", Transposed),
        ("att.time_maa_w2", "time_mix_w2.weight", Transposed),
        ("att.time_decay", "time_mix_decay.weight", Vector),
        ("att.time_decay_w1", "time_mix_decay_w1.weight", Transposed),
        ("att.time_decay_w2", "time_mix_decay_w2.weight", Transposed),
        ("att.time_faaaa", "time_mix_first.weight", Same),
        ("att.receptance.weight", "time_mix_receptance.weight", Same),
        ("att.key.weight", "time_mix_key.weight", Same),
        ("att.value.weight", "time_mix_value.weight", Same),
        ("att.gate.weight", "time_mix_gate.weight", Same),
        ("att.output.weight", "time_mix_output.weight", Same),
        ("att.ln_x.weight", "time_mix_ln.weight", Same),
        ("att.ln_x.bias", "time_mix_ln.bias", Same),
        ("ffn.time_maa_k", "channel_mix_lerp_k.weight", Vector),
        ("ffn.time_maa_r", "channel_mix_lerp_r.weight", Vector),
        ("ffn.key.weight", "channel_mix_key.weight", Same),
        ("ffn.receptance.weight", "channel_mix_receptance.weight", Same),
        ("ffn.value.weight", "channel_mix_value.weight", Same),
    ],
    fused: &["att.time_maa_w", "att.time_maa_k", "att.time_maa_v", "att.time_maa_r", "att.time_maa_g"],
};

pub const RWKV7: Architecture = Architecture {
    name: "rwkv7",
    layer: &[
        ("ln1.weight", "attn_norm.weight", Same),
        ("ln1.bias", "attn_norm.bias", Same),
        ("ln2.weight", "attn_norm_2.weight", Same),
        ("ln2.bias", "attn_norm_2.bias", Same),
        ("att.w0", "time_mix_w0.weight", Vector),
        ("att.w1", "time_mix_w1.weight", Transposed),
        ("att.w2", "time_mix_w2.weight", Transposed),
        ("att.a0", "time_mix_a0.weight", Vector),
        ("att.a1", "time_mix_a1.weight", Transposed),
        ("att.a2", "time_mix_a2.weight", Transposed),
        ("att.v0", "time_mix_v0.weight", Vector),
        ("att.v1", "time_mix_v1.weight", Transposed),
        ("att.v2", "time_mix_v2.weight", Transposed),
        ("att.g1", "time_mix_g1.weight", Transposed),
        ("att.g2", "time_mix_g2.weight", Transposed),
        ("att.k_k", "time_mix_k_k.weight", Vector),
        ("att.k_a", "time_mix_k_a.weight", Vector),
        ("att.r_k", "time_mix_r_k.weight", Heads),
        ("att.receptance.weight", "time_mix_receptance.weight", Same),
        ("att.key.weight", "time_mix_key.weight", Same),
        ("att.value.weight", "time_mix_value.weight", Same),
        ("att.output.weight", "time_mix_output.weight", Same),
        ("att.ln_x.weight", "time_mix_ln.weight", Same),
        ("att.ln_x.bias", "time_mix_ln.bias", Same),
        ("ffn.x_k", "channel_mix_lerp_k.weight", Vector),
        ("ffn.key.weight", "channel_mix_key.weight", Same),
        ("ffn.value.weight", "channel_mix_value.weight", Same),
    ],
    fused: &["att.x_r", "att.x_w", "att.x_k", "att.x_v", "att.x_a", "att.x_g"],
};

/// A file of one of the architectures.
pub struct Dialect {
    pub architecture: &'static Architecture,
    pub head_size: usize,
    /// Where not 0, the layers behind every so many have their outputs halved once more, for the sake of f16.
    pub rescale_every: usize,
}

impl Dialect {
    /// What the file says of itself.
    pub fn of(gguf: &Gguf) -> Result<Self, String> {
        let name = gguf.str("general.architecture").ok_or("it does not say its architecture")?;
        let architecture = match name {
            "rwkv6" => &RWKV6,
            "rwkv7" => &RWKV7,
            other => return Err(format!("its architecture is `{other}`; of GGUF files, rwkv6 and rwkv7 are read")),
        };
        let number = |key: &str| gguf.u32(&format!("{name}.{key}")).map(|n| n as usize);
        let epsilon = gguf.f32(&format!("{name}.attention.layer_norm_epsilon"));
        if epsilon.is_some_and(|epsilon| epsilon != 1e-5) {
            return Err(format!("its layer norms have an epsilon of {epsilon:?}, and only 1e-5 is computed here"));
        }
        if number("token_shift_count").is_some_and(|n| n != 2) {
            return Err("its layers shift other than two inputs".into());
        }
        let head_size = number("wkv.head_size").filter(|&n| n > 0);
        let head_size = head_size.ok_or_else(|| format!("it has no `{name}.wkv.head_size`"))?;
        Ok(Self { architecture, head_size, rescale_every: number("rescale_every_n_layers").unwrap_or(0) })
    }

    /// The original tensors in one of the file's.
    pub fn read(&self, place: &Place) -> Result<Vec<(String, Vec<Op>)>, String> {
        if let Some((original, _)) = OUTSIDE.iter().find(|(_, name)| *name == place.name) {
            return Ok(vec![((*original).into(), Vec::new())]);
        }
        let unknown = || format!("`{}` is no tensor of an {} model", place.name, self.architecture.name);
        let (layer, name) =
            place.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).ok_or_else(unknown)?;
        let layer: usize = layer.parse().map_err(|_| unknown())?;
        if name == FUSED {
            let of = self.architecture.fused.len();
            let parts = self.architecture.fused.iter().enumerate();
            let part = |(index, original): (usize, &&str)| {
                (format!("blocks.{layer}.{original}"), vec![Op::Part { index, of }, Op::Vector])
            };
            return Ok(parts.map(part).collect());
        }
        if let Some(original) = self.unfused(name) {
            return Ok(vec![(format!("blocks.{layer}.{original}"), vec![Op::Vector])]);
        }
        // llama.cpp wants these of the first layer, which has no use for them.
        if layer == 0 && ["time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight"].contains(&name) {
            return Ok(Vec::new());
        }
        let known = self.architecture.layer.iter().find(|(_, known, _)| *known == name);
        let &(original, _, form) = known.ok_or_else(unknown)?;
        let mut ops = match form {
            Same => Vec::new(),
            Vector => vec![Op::Vector],
            Transposed => vec![Op::Transposed],
            Heads => vec![Op::Heads(self.head_size)],
        };
        if self.rescale_every > 0 && ["att.output.weight", "ffn.value.weight"].contains(&original) {
            let halvings = i32::try_from(layer / self.rescale_every).unwrap_or(i32::MAX);
            ops.push(Op::Scaled(2f32.powi(halvings.min(100))));
        }
        Ok(vec![(format!("blocks.{layer}.{original}"), ops)])
    }

    /// The original name of a mix that an older converter wrote by itself.
    fn unfused(&self, name: &str) -> Option<&'static str> {
        let mix = name.strip_prefix("time_mix_lerp_")?.strip_suffix(".weight")?;
        self.architecture.fused.iter().copied().find(|original| original.ends_with(&format!("_{mix}")))
    }
}
