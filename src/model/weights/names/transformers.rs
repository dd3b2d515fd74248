//! Hugging Face's layouts: `RwkvForCausalLM` of transformers (v4), the repositories of v5 and v6 that carry their own code
//! in the same manner, and flash-linear-attention's `rwkv7`.

use super::Op;
use crate::model::weights::file::Place;

/// Whether tensors are called as in transformers' RWKV models.
pub fn is_rwkv(places: &[&Place]) -> bool {
    places.iter().any(|place| place.name == "rwkv.embeddings.weight")
}

/// The original tensor of one of transformers' (`models/rwkv/convert_rwkv_checkpoint_to_hf.py`).
pub fn read_rwkv(place: &Place) -> Result<Vec<(String, Vec<Op>)>, String> {
    let name = place.name.strip_prefix("rwkv.").unwrap_or(&place.name);
    let renamed = match name {
        "embeddings.weight" => "emb.weight".into(),
        other => [
            (".pre_ln.", ".ln0."),
            (".attention.", ".att."),
            (".feed_forward.", ".ffn."),
            (".time_mix_key", ".time_mix_k"),
            (".time_mix_value", ".time_mix_v"),
            (".time_mix_receptance", ".time_mix_r"),
            (".time_mix_gate", ".time_mix_g"),
        ]
        .iter()
        .fold(other.to_owned(), |name, (from, to)| name.replace(from, to)),
    };
    Ok(vec![(renamed, Vec::new())])
}

/// Whether tensors are called as in flash-linear-attention.
pub fn is_fla(places: &[&Place]) -> bool {
    places.iter().any(|place| place.name == "model.embeddings.weight")
}

/// The original tensor of one of flash-linear-attention's (`fla/layers/rwkv7.py`, `fla/models/rwkv7`).
pub fn read_fla(place: &Place) -> Result<Vec<(String, Vec<Op>)>, String> {
    let outside = match place.name.as_str() {
        "model.embeddings.weight" => Some("emb.weight"),
        "model.norm.weight" => Some("ln_out.weight"),
        "model.norm.bias" => Some("ln_out.bias"),
        "lm_head.weight" => Some("head.weight"),
        _ => None,
    };
    if let Some(original) = outside {
        return Ok(vec![(original.into(), Vec::new())]);
    }
    let unknown = || format!("`{}` is no tensor of an rwkv7 model", place.name);
    let rest = place.name.strip_prefix("model.layers.").ok_or_else(unknown)?;
    let (layer, name) = rest.split_once('.').ok_or_else(unknown)?;
    let (part, name) = name.split_once('.').ok_or_else(unknown)?;
    let original = |part: &str, name: &str, ops| Ok(vec![(format!("blocks.{layer}.{part}{name}"), ops)]);
    match (part, name) {
        ("pre_norm", norm) => original("ln0.", norm, Vec::new()),
        ("attn_norm", norm) => original("ln1.", norm, Vec::new()),
        ("ffn_norm", norm) => original("ln2.", norm, Vec::new()),
        ("ffn", "x_k") => original("ffn.", "x_k", vec![Op::Vector]),
        ("ffn", other) => original("ffn.", other, Vec::new()),
        ("attn", "r_proj.weight") => original("att.", "receptance.weight", Vec::new()),
        ("attn", "k_proj.weight") => original("att.", "key.weight", Vec::new()),
        ("attn", "v_proj.weight") => original("att.", "value.weight", Vec::new()),
        ("attn", "o_proj.weight") => original("att.", "output.weight", Vec::new()),
        ("attn", "g_norm.weight") => original("att.", "ln_x.weight", Vec::new()),
        ("attn", "g_norm.bias") => original("att.", "ln_x.bias", Vec::new()),
        ("attn", "r_k") => original("att.", "r_k", Vec::new()),
        ("attn", "x_x") => {
            let mixes = ["r", "w", "k", "v", "a", "g"].into_iter().enumerate();
            let part =
                |(index, mix)| (format!("blocks.{layer}.att.x_{mix}"), vec![Op::Part { index, of: 6 }, Op::Vector]);
            Ok(mixes.map(part).collect())
        }
        ("attn", other) => match other.split_once("_lora.lora.") {
            Some((low_rank, "0.weight")) => original("att.", &format!("{low_rank}1"), vec![Op::Transposed]),
            Some((low_rank, "2.weight")) => original("att.", &format!("{low_rank}2"), vec![Op::Transposed]),
            Some((low_rank, "2.bias")) => original("att.", &format!("{low_rank}0"), vec![Op::Vector]),
            Some(_) => Err(unknown()),
            None => original("att.", other, vec![Op::Vector]),
        },
        _ => Err(unknown()),
    }
}
