//! The `.st` files of Ai00 and web-rwkv: safetensors in nearly the original names, some matrices the other way round.
//!
//! The facts are those of `convert_safetensors.py` of Ai00-X/ai00_server and of cryscan/web-rwkv-converter. Both write v7
//! under the original names; only the former turns its low-rank matrices, which their shapes tell.

use super::Op;
use crate::model::weights::file::Place;

/// What the converter did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    V5,
    V6,
    V7,
    Lora,
    State,
}

impl Kind {
    /// The kind of file, if it is one of these. `named` says that it is called as one: a state's shapes tell nothing.
    pub fn of(places: &[&Place], named: bool) -> Option<Self> {
        let find = |name: &str| places.iter().find(|place| place.name == name);
        let turned = |name: &str| {
            let (first, width) = (find(name)?.shape.as_slice(), *find("emb.weight")?.shape.last()?);
            Some(matches!(*first, [rank, inputs] if inputs == width && rank != width))
        };
        match () {
            () if find("blocks.0.att.time_mix_w1").is_some() => Some(Self::V6),
            () if find("blocks.0.att.gate.weight").and(find("blocks.0.att.time_first")).is_some() => Some(Self::V5),
            () if turned("blocks.0.att.w1") == Some(true) => Some(Self::V7),
            () if places.iter().any(|place| place.name.ends_with(".lora.0")) => Some(Self::Lora),
            () if named && places.iter().all(|place| place.name.ends_with(".time_state")) => Some(Self::State),
            () => None,
        }
    }

    /// The original tensor of one of the file's.
    pub fn read(self, place: &Place) -> Result<Vec<(String, Vec<Op>)>, String> {
        let (prefix, last) = place.name.rsplit_once('.').unwrap_or(("", &place.name));
        let turned = match self {
            Self::V5 => false,
            Self::V6 => matches!(last, "time_mix_w1" | "time_mix_w2" | "time_decay_w1" | "time_decay_w2"),
            Self::V7 => matches!(last, "w1" | "w2" | "a1" | "a2" | "v1" | "v2" | "g1" | "g2"),
            Self::Lora => last == "0" && prefix.ends_with(".lora"),
            Self::State => true,
        };
        let name = match self {
            Self::V5 if last == "time_first" => format!("{prefix}.time_faaaa"),
            Self::V6 if last == "time_first" => format!("{prefix}.time_faaaa"),
            Self::V6 => place.name.replace(".time_mix_", ".time_maa_"),
            Self::Lora => place.name.replace(".lora.0", ".lora_A").replace(".lora.1", ".lora_B"),
            Self::V5 | Self::V7 | Self::State => place.name.clone(),
        };
        Ok(vec![(name, if turned { vec![Op::Transposed] } else { Vec::new() })])
    }
}
