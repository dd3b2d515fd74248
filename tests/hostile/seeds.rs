//! Small sound files: the golden models with every size divided by 16, in every container.

use std::path::{Path, PathBuf};

use rewake::model::{Checkpoint, Conversion, Format, Kind};
use safetensors::{Dtype, SafeTensors};

pub const CASES: [&str; 14] = [
    "v1_fp32",
    "v2_fp32",
    "v3_fp32",
    "v3_ffnpre_fp32",
    "v4_bf16",
    "v4_ffnpre_fp32",
    "v5_0_fp16",
    "v5_1_bf16",
    "v5_2_bf16",
    "v6_bf16",
    "v7_bf16",
    "v7a_bf16",
    "v7b_bf16",
    "v8_rc00_hybrid_bf16",
];

/// A tensor as safetensors describes it.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl Tensor {
    pub fn f32(name: &str, shape: &[usize], value: f32) -> Self {
        let data = value.to_le_bytes().repeat(shape.iter().product());
        Self { name: name.into(), dtype: "F32", shape: shape.into(), data }
    }

    fn width(&self) -> usize {
        if self.dtype == "F32" { 4 } else { 2 }
    }

    /// The same values, as many as another shape takes of them.
    pub fn shaped(&self, shape: Vec<usize>) -> Self {
        let bytes = shape.iter().product::<usize>() * self.width();
        let data = self.data.iter().copied().cycle().take(if self.data.is_empty() { 0 } else { bytes }).collect();
        Self { shape, data, ..self.clone() }
    }
}

pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// A golden model with its sizes divided by `by`.
pub fn small(case: &str, by: usize) -> Vec<Tensor> {
    let file = std::fs::read(data(case).join("model.safetensors")).expect("a golden model");
    let size = |&n: &usize| match n {
        // DeepEmbed's square of a low rank of 32.
        1024 => (32 / by).pow(2),
        n if n < 16 => n,
        n => n / by,
    };
    let tensors = SafeTensors::deserialize(&file).expect("a sound file");
    let mut small: Vec<_> = tensors
        .iter()
        .map(|(name, view)| {
            let dtype = match view.dtype() {
                Dtype::F32 => "F32",
                Dtype::F16 => "F16",
                _ => "BF16",
            };
            let whole = Tensor { name: name.into(), dtype, shape: view.shape().to_vec(), data: view.data().to_vec() };
            whole.shaped(view.shape().iter().map(size).collect())
        })
        .collect();
    small.sort_by(|a, b| a.name.cmp(&b.name));
    small
}

/// A safetensors file of a header and what follows it.
pub fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// A safetensors file of these tensors.
pub fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for tensor in tensors {
        let (from, name) = (data.len(), serde_json::json!(tensor.name));
        data.extend(&tensor.data);
        let (dtype, shape, to) = (tensor.dtype, &tensor.shape, data.len());
        entries.push(format!(r#"{name}:{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{from},{to}]}}"#));
    }
    raw(&format!("{{{}}}", entries.join(",")), &data)
}

/// The same model in another container; one with enough tokens gets a vocabulary where there is a place for it.
pub fn converted(tensors: &[Tensor], format: Format, kind: Option<Kind>) -> Vec<u8> {
    let checkpoint = Checkpoint::in_memory("seed", safetensors(tensors)).expect("a sound file");
    let bytes = (0..=255u8).map(|byte| format!("\\x{byte:02x}").into_bytes());
    let vocabulary = (checkpoint.vocabulary_size() > Some(256)).then(|| std::iter::once(vec![]).chain(bytes).collect());
    let conversion =
        Conversion { checkpoint: &checkpoint, format, kind, vocabulary, name: "seed".into(), progress: &|_, _| {} };
    let mut out = std::io::Cursor::new(Vec::new());
    conversion.write(&mut out).expect("a conversion");
    out.into_inner()
}

/// A model file of rwkv.cpp with f32 values, of tensors whose names and layouts are those of v4.
pub fn ggml(tensors: &[Tensor]) -> Vec<u8> {
    let emb = &tensors.iter().find(|t| t.name == "emb.weight").expect("an embedding").shape;
    let layers = tensors.iter().filter(|t| t.name.ends_with(".ln1.weight")).count();
    let mut file = Vec::new();
    let numbers = |numbers: &[usize], file: &mut Vec<u8>| {
        numbers.iter().for_each(|&n| file.extend((n as u32).to_le_bytes()));
    };
    numbers(&[0x6767_6d66, 101, emb[0], emb[1], layers, 0], &mut file);
    for tensor in tensors {
        numbers(&[tensor.shape.len(), tensor.name.len(), 0], &mut file);
        tensor.shape.iter().rev().for_each(|&n| numbers(&[n], &mut file));
        file.extend(tensor.name.as_bytes());
        file.extend((-0.5f32).to_le_bytes().repeat(tensor.shape.iter().product()));
    }
    file
}

/// Sound files of every generation and container.
pub fn checkpoints() -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = CASES.iter().map(|case| (format!("{case}.st"), safetensors(&small(case, 16)))).collect();
    for case in ["v4_bf16", "v7_bf16"] {
        files.push((format!("{case}.pth"), converted(&small(case, 16), Format::Pth, None)));
    }
    for case in ["v6_bf16", "v7_bf16"] {
        files.push((format!("{case}.gguf"), converted(&small(case, 16), Format::Gguf, None)));
    }
    let words = small("v7_bf16", 16).into_iter().map(|t| match t.name.as_str() {
        "emb.weight" | "head.weight" => t.shaped(vec![260, 8]),
        _ => t,
    });
    files.push(("words.gguf".into(), converted(&words.collect::<Vec<_>>(), Format::Gguf, None)));
    files.push(("v4_bf16.bin".into(), ggml(&small("v4_bf16", 16))));
    files
}
