//! LoRA adapters, merged while tensors are read: `W += (lora_B @ lora_A) · (alpha / rank)` in f32.
//!
//! Names are `<linear>.lora_A` `[r, in]` and `<linear>.lora_B` `[out, r]`; any other tensor of the file replaces the base
//! tensor of its name (RWKV-PEFT's convention). Hugging Face's PEFT has other names for the same ([`super::names::peft`]).

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde::Deserialize;

use super::{Checkpoint, File, TensorInfo, file};
use crate::model::Error;
use crate::model::kernels::Weight;
use crate::types::readable;

/// What PEFT writes beside an adapter.
const CONFIG: &str = "adapter_config.json";

/// No configuration is larger.
const LARGEST: u64 = 1 << 20;

/// The part of an `adapter_config.json` that says how the adapter is scaled.
#[derive(Deserialize)]
struct AdapterConfig {
    r: Option<usize>,
    lora_alpha: Option<f32>,
    /// Scales by `alpha / √r`.
    use_rslora: Option<bool>,
    /// Alphas of single layers.
    alpha_pattern: Option<serde_json::Map<String, serde_json::Value>>,
    /// Ranks of single layers.
    rank_pattern: Option<serde_json::Map<String, serde_json::Value>>,
    /// Scales the rows of the sum.
    use_dora: Option<bool>,
}

/// The alpha in the `adapter_config.json` beside an adapter file; `None` without one.
fn alpha_beside(path: &Path, tensors: &Checkpoint) -> Result<Option<f32>, Error> {
    let path = if path.is_dir() { path.join(CONFIG) } else { path.with_file_name(CONFIG) };
    let shown = path.display().to_string();
    let wrong = |why: String| Err(Error::LoraConfig { path: shown.clone(), why: readable(&why) });
    match std::fs::metadata(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        // Opening a pipe would wait for somebody to write to it.
        Ok(metadata) if !metadata.is_file() => return wrong("it is not a regular file".into()),
        Ok(_) | Err(_) => {}
    }
    let bytes = file::read(&path, LARGEST)?;
    let config: AdapterConfig = match serde_json::from_slice(&bytes) {
        Ok(config) => config,
        Err(e) => return wrong(e.to_string()),
    };
    if config.use_rslora == Some(true) {
        return wrong(
            "it scales by alpha / √r (`use_rslora`), and here alpha / r is computed: give its alpha times √r".into(),
        );
    }
    if config.alpha_pattern.is_some_and(|layers| !layers.is_empty()) {
        return wrong("it has an alpha for each layer (`alpha_pattern`), and one for all is supported".into());
    }
    if config.use_dora == Some(true) {
        return wrong("it normalises what is merged (`use_dora`), which is not computed here".into());
    }
    // With a rank for each layer, `r` is that of the others; what is scaled goes by the tensors' own.
    let one_rank = config.rank_pattern.is_none_or(|layers| layers.is_empty());
    let ranks = tensors.tensors().iter().filter(|(name, _)| one_rank && name.ends_with(".lora_A"));
    for (name, info) in ranks {
        let (Some(r), Some(&rank)) = (config.r, info.shape.first()) else { continue };
        if r != rank {
            return wrong(format!("its `r` is {r}, but `{name}` has rank {rank}: it belongs to another adapter"));
        }
    }
    match config.lora_alpha {
        Some(alpha) if alpha.is_finite() => Ok(Some(alpha)),
        _ => wrong("it names no finite `lora_alpha`".into()),
    }
}

/// An adapter and the scale its author trained it with.
pub struct Lora {
    tensors: Checkpoint,
    alpha: f32,
}

impl Lora {
    /// Opens an adapter: a file, or a folder with one as PEFT writes it. `alpha` is in no such file: it is given, or stands
    /// in an `adapter_config.json` beside the file.
    ///
    /// # Errors
    /// [`Error::Lora`] for what is none; [`Error::LoraAlpha`] when alpha is nowhere, [`Error::LoraConfig`] when what stands
    /// beside the file does not fit it.
    pub fn open(path: &Path, alpha: Option<f32>) -> Result<Self, Error> {
        let tensors = Checkpoint::open(path)?;
        // A whole model would replace every tensor of the base.
        if !tensors.tensors().keys().any(|name| name.ends_with(".lora_A")) {
            return Err(Error::Lora(format!("{} holds no lora_A and lora_B", path.display())));
        }
        let alpha = match alpha {
            Some(alpha) if alpha.is_finite() => alpha,
            Some(alpha) => return Err(Error::Lora(format!("an alpha of {alpha} is no scale"))),
            None => alpha_beside(path, &tensors)?.ok_or(Error::LoraAlpha)?,
        };
        Ok(Self { tensors, alpha })
    }

    pub(super) fn files(&self) -> &[File] {
        &self.tensors.files
    }

    /// Every tensor of the adapter must have its place in the base, with fitting shapes.
    pub(super) fn check(&self, base: &BTreeMap<String, TensorInfo>) -> Result<(), Error> {
        for (name, info) in self.tensors.tensors() {
            let linear = name.strip_suffix(".lora_A").or_else(|| name.strip_suffix(".lora_B"));
            let target = linear.map_or(name.clone(), |l| format!("{l}.weight"));
            let Some(base) = base.get(&target) else {
                return Err(Error::Lora(format!("`{name}` has no `{target}` to be merged into")));
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
