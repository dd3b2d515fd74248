//! LoRA adapters of Hugging Face's PEFT: `base_model.model.<linear>.lora_A.weight`, the linear layer being called as in the
//! checkpoint that was tuned.

use super::{Op, transformers};
use crate::model::weights::file::Place;

/// What PEFT puts before every name.
const PREFIX: &str = "base_model.model.";

/// Whether tensors are called as in an adapter of PEFT.
pub fn is_peft(places: &[&Place]) -> bool {
    places.iter().any(|place| place.name.starts_with(PREFIX))
}

/// RWKV-PEFT's tensor of one of PEFT's: `<linear>.lora_A`, `<linear>.lora_B`, or one that replaces the base's.
pub fn read(place: &Place) -> Result<Vec<(String, Vec<Op>)>, String> {
    let name = place.name.strip_prefix(PREFIX).unwrap_or(&place.name);
    let factor = [".lora_A", ".lora_B"].into_iter().find_map(|factor| {
        let endings = [format!("{factor}.weight"), format!("{factor}.default.weight")];
        endings.iter().find_map(|ending| name.strip_suffix(ending)).map(|linear| (linear, factor))
    });
    let Some((linear, factor)) = factor else { return original(place, name.into()) };
    let originals = original(place, format!("{linear}.weight"))?;
    match originals.as_slice() {
        [(name, ops)] if ops.is_empty() && name.ends_with(".weight") => {
            Ok(vec![(name.trim_end_matches(".weight").to_owned() + factor, Vec::new())])
        }
        _ => Err(format!("`{}` cannot be merged: `{linear}` is no linear layer of the original's", place.name)),
    }
}

/// The original tensors of the checkpoint's `name`.
fn original(place: &Place, name: String) -> Result<Vec<(String, Vec<Op>)>, String> {
    let read = match name.split('.').next() {
        Some("rwkv") => transformers::read_rwkv,
        Some("model" | "lm_head") => transformers::read_fla,
        _ => return Ok(vec![(name, Vec::new())]),
    };
    read(&Place { name, ..place.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Kind;

    #[test]
    fn linear_layers_are_found_under_every_name() {
        let read = |name: &str| {
            let (kind, shape) = (Kind::F32, vec![8, 128]);
            read(&Place { name: name.into(), kind, shape, strides: None, bytes: 0..4096 })
        };
        for (name, original) in [
            ("base_model.model.blocks.0.att.key.lora_A.weight", "blocks.0.att.key.lora_A"),
            ("base_model.model.blocks.0.att.key.lora_B.default.weight", "blocks.0.att.key.lora_B"),
            ("base_model.model.blocks.0.ln1.weight", "blocks.0.ln1.weight"),
            ("base_model.model.head.lora_A.weight", "head.lora_A"),
            ("base_model.model.lm_head.lora_A.weight", "head.lora_A"),
            ("base_model.model.rwkv.blocks.3.feed_forward.key.lora_B.weight", "blocks.3.ffn.key.lora_B"),
            ("base_model.model.model.layers.2.attn.r_proj.lora_A.weight", "blocks.2.att.receptance.lora_A"),
        ] {
            let read = read(name).expect(name);
            assert!(read.len() == 1 && read[0].0 == original && read[0].1.is_empty(), "{name}: {read:?}");
        }
        // Low-rank factors are stored the other way round.
        for name in ["attn.w_lora.lora.0.lora_A.weight", "attn.x_x.lora_A.weight", "else.lora_A.weight"] {
            assert!(read(&format!("base_model.model.model.layers.2.{name}")).is_err(), "{name}");
        }
    }
}
