//! LoRA adapters, merged while tensors are read: `W += (lora_B @ lora_A) · (alpha / rank)` in f32.
//!
//! Names are `<linear>.lora_A` `[r, in]` and `<linear>.lora_B` `[out, r]`; any other tensor of the file replaces the base
//! tensor of its name (RWKV-PEFT's convention).

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::{Checkpoint, TensorInfo};
use crate::model::Error;
use crate::model::kernels::Weight;

/// An adapter and the scale its author trained it with.
pub struct Lora {
    tensors: Checkpoint,
    alpha: f32,
}

impl Lora {
    /// Opens an adapter file. `alpha` is in no such file and must be given.
    pub fn open(path: &Path, alpha: Option<f32>) -> Result<Self, Error> {
        let alpha = alpha.filter(|a| a.is_finite()).ok_or(Error::LoraAlpha)?;
        Ok(Self { tensors: Checkpoint::open(path)?, alpha })
    }

    /// Every tensor of the adapter must have its place in the base, with fitting shapes.
    pub(super) fn check(&self, base: &BTreeMap<String, TensorInfo>) -> Result<(), Error> {
        for (name, info) in self.tensors.tensors() {
            let linear = name.strip_suffix(".lora_A").or_else(|| name.strip_suffix(".lora_B"));
            let target = linear.map_or(name.clone(), |l| format!("{l}.weight"));
            let Some(base) = base.get(&target) else {
                return Err(Error::Unknown(format!("the LoRA tensor `{name}` has no `{target}` to be merged into")));
            };
            let Some(linear) = linear else {
                if info.shape != base.shape {
                    let expected = format!("{:?} as in the base", base.shape);
                    return Err(Error::Shape { name: name.clone(), found: info.shape.clone(), expected });
                }
                continue;
            };
            let (a, b) =
                (self.tensors.shape(&format!("{linear}.lora_A")), self.tensors.shape(&format!("{linear}.lora_B")));
            let fits = matches!((a, b, base.shape.as_slice()),
                (Some([r, i]), Some([o, s]), [out, inp]) if r == s && i == inp && o == out && *r > 0);
            if !fits {
                let expected = format!("lora_A [r, in] and lora_B [out, r] for a base of {:?}", base.shape);
                return Err(Error::Shape { name: name.clone(), found: info.shape.clone(), expected });
            }
        }
        Ok(())
    }

    /// `base` with the adapter's part of it added.
    pub(super) fn merge<'a>(&'a self, name: &str, base: Weight<'a>) -> Result<Weight<'a>, Error> {
        if self.tensors.shape(name).is_some() {
            return self.tensors.read(name);
        }
        let Some(linear) = name.strip_suffix(".weight") else { return Ok(base) };
        let (a, b) = (format!("{linear}.lora_A"), format!("{linear}.lora_B"));
        let Some(&[rank, _]) = self.tensors.shape(&a) else { return Ok(base) };
        let delta = (matrix(&self.tensors.read(&b)?)?.matmul(&matrix(&self.tensors.read(&a)?)?))?;
        let merged = (matrix(&base)? + (delta * f64::from(self.alpha / rank as f32))?)?;
        // The sum stays in f32: rounding it back to 16 bits would not be the merged model.
        Ok(Weight::from_f32(base.shape(), &merged.flatten_all()?.to_vec1()?))
    }
}

fn matrix(weight: &Weight) -> Result<Tensor, Error> {
    Ok(Tensor::from_vec(weight.to_f32(), weight.shape(), &Device::Cpu)?)
}
