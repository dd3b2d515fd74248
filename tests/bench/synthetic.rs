//! Checkpoints with the shapes of real models and random values: speed does not depend on what the weights say.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

/// Sizes of an RWKV-7 checkpoint.
pub struct Shape {
    pub layers: usize,
    pub width: usize,
    pub vocabulary: usize,
    /// Ranks of w, a, v and g.
    pub ranks: [usize; 4],
}

/// RWKV-7 "World" 0.1B.
pub const SMALL: Shape = Shape { layers: 12, width: 768, vocabulary: 65_536, ranks: [64, 64, 32, 128] };

impl Shape {
    /// Names and sizes of all tensors.
    fn tensors(&self) -> BTreeMap<String, Vec<usize>> {
        let c = self.width;
        let mut all = BTreeMap::new();
        let mut add = |name: String, shape: &[usize]| all.insert(name, shape.to_vec());
        let norm = |name: &str| ["weight", "bias"].map(|part| format!("{name}.{part}"));
        add("emb.weight".into(), &[self.vocabulary, c]);
        add("head.weight".into(), &[self.vocabulary, c]);
        for name in norm("ln_out").into_iter().chain(norm("blocks.0.ln0")) {
            add(name, &[c]);
        }
        for layer in 0..self.layers {
            let at = |name: &str| format!("blocks.{layer}.{name}");
            for name in ["ln1", "ln2", "att.ln_x"].iter().flat_map(|name| norm(&at(name))) {
                add(name, &[c]);
            }
            for name in ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"] {
                add(at(&format!("att.{name}")), &[c]);
            }
            for (name, rank) in ["w", "a", "v", "g"].into_iter().zip(self.ranks) {
                if layer > 0 || name != "v" {
                    add(at(&format!("att.{name}1")), &[c, rank]);
                    add(at(&format!("att.{name}2")), &[rank, c]);
                }
            }
            if layer > 0 {
                add(at("att.v0"), &[c]);
            }
            add(at("att.r_k"), &[c / 64, 64]);
            for name in ["receptance", "key", "value", "output"] {
                add(at(&format!("att.{name}.weight")), &[c, c]);
            }
            add(at("ffn.x_k"), &[c]);
            add(at("ffn.key.weight"), &[4 * c, c]);
            add(at("ffn.value.weight"), &[c, 4 * c]);
        }
        all
    }

    /// Weights of all linear layers but the head, and of the head: what a token is multiplied with.
    pub fn weights(&self) -> (usize, usize) {
        let matrices = self.tensors().into_iter().filter(|(name, shape)| {
            shape.len() == 2 && !name.ends_with("r_k") && !["emb.weight", "head.weight"].contains(&name.as_str())
        });
        (matrices.map(|(_, shape)| shape[0] * shape[1]).sum(), self.vocabulary * self.width)
    }

    /// Writes such a checkpoint, in f16.
    pub fn write(&self, path: &Path) {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let mut values = |name: &str, shape: &[usize]| -> Vec<u8> {
            let (center, spread) = match shape {
                [_] if name.ends_with("weight") => (1.0, 0.0),
                [_] => (0.0, 0.5),
                _ => (0.0, 1.0 / (self.width as f32).sqrt()),
            };
            let count = shape.iter().product();
            (0..count).flat_map(|_| f16::from_f32(center + spread * random()).to_le_bytes()).collect()
        };
        let tensors = self.tensors();
        let data: BTreeMap<_, _> = tensors.iter().map(|(name, shape)| (name, values(name, shape))).collect();
        let views = tensors.iter().map(|(name, shape)| {
            (name, TensorView::new(Dtype::F16, shape.clone(), &data[name]).expect("as many bytes as the shape says"))
        });
        serialize_to_file(views, None, path).expect("the checkpoint is written");
    }
}
