//! Golden vectors: small models with the logits the original code gives for them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

/// One folder of vectors.
pub struct Case {
    pub folder: PathBuf,
    pub json: Value,
    pub tokens: Vec<u32>,
    pub chunks: Vec<usize>,
    /// `[T, V]`.
    pub logits: Vec<Vec<f32>>,
    /// After the last token, by the names of the file without `state.`.
    pub states: BTreeMap<String, Vec<f32>>,
}

/// All cases of these versions: those the repository carries, and the complete set where it stands beside the checkout.
pub fn cases(versions: &[&str]) -> Vec<Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for folder in [root.join("tests/data"), root.join("../shared/vectors")] {
        let Ok(entries) = std::fs::read_dir(&folder) else {
            println!("skipped: {} is not there", folder.display());
            continue;
        };
        let mut paths: Vec<_> = entries.map(|e| e.expect("a folder entry").path()).collect();
        paths.sort();
        let read = paths.iter().filter(|p| p.join("case.json").exists()).map(|p| Case::read(p));
        found.extend(read.filter(|case| versions.iter().any(|v| case.json["version"] == *v)));
    }
    for version in versions {
        let carried = |case: &Case| case.json["version"] == *version && case.folder.starts_with(root.join("tests"));
        assert!(found.iter().any(carried), "the repository carries a case of {version}");
    }
    found
}

/// One case that the repository carries.
pub fn case(name: &str) -> Case {
    Case::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name))
}

impl Case {
    fn read(folder: &Path) -> Self {
        let json: Value = serde_json::from_slice(&std::fs::read(folder.join("case.json")).expect("case.json"))
            .expect("case.json is JSON");
        let ints = |key: &str| -> Vec<u64> {
            json[key].as_array().expect("an array").iter().map(|v| v.as_u64().expect("a number")).collect()
        };
        let tensors = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu)
            .expect("expected.safetensors");
        let logits = tensors["logits"].to_vec2::<f32>().expect("logits [T, V]");
        let state = |(name, tensor): (&String, &Tensor)| Some((name.strip_prefix("state.")?.to_owned(), flat(tensor)));
        let mut states: BTreeMap<_, _> = tensors.iter().filter_map(state).collect();
        let tokens: Vec<_> = ints("tokens").iter().map(|&t| t as u32).collect();
        // The original code has the copy head's tokens at hand; here they are part of its state, behind their keys.
        if let Some(keys) = states.remove("hk") {
            let entries = keys.chunks(keys.len() / tokens.len()).zip(&tokens);
            let copied = entries.flat_map(|(key, &id)| key.iter().copied().chain([id as f32]));
            states.insert("head.copy".into(), copied.collect());
        }
        if ["v7b", "v8_rc00_hybrid"].iter().any(|version| json["version"] == *version) {
            states = by_segment(&states, &tokens, json["n_layer"].as_u64().expect("n_layer") as usize);
        }
        Self {
            folder: folder.to_owned(),
            tokens,
            chunks: ints("chunks").iter().map(|&n| n as usize).collect(),
            logits,
            states,
            json,
        }
    }

    pub fn name(&self) -> String {
        self.folder.file_name().expect("a case has a folder").to_string_lossy().into_owned()
    }

    /// What the model's `n`-th segment should hold after the last token. Most files number the segments; those of the
    /// early generations name them as the original code does, and some were given the segments' names.
    pub fn state(&self, n: usize, segment: &str) -> &[f32] {
        let original = match segment.split('.').collect::<Vec<_>>()[..] {
            ["blocks", layer, part, "shift"] => format!("xx.{part}.{layer}"),
            ["blocks", layer, part, name] => format!("{name}.{part}.{layer}"),
            _ => segment.to_owned(),
        };
        let found = [segment, &n.to_string(), &original].into_iter().find_map(|name| self.states.get(name));
        found.unwrap_or_else(|| panic!("{} has a state {n} or {original}", self.name()))
    }

    /// Root mean square of the expected logits, by which errors are judged.
    pub fn rms(&self) -> f32 {
        let all = self.logits.iter().flatten();
        (all.clone().map(|v| v * v).sum::<f32>() / all.count() as f32).sqrt()
    }
}

/// The states of a generation with attention over the text, by the names of segments. The original code has one list of
/// token ids and, layer by layer, keys and values behind each other; here each layer's entries begin with the ids.
fn by_segment(states: &BTreeMap<String, Vec<f32>>, tokens: &[u32], layers: usize) -> BTreeMap<String, Vec<f32>> {
    let state = |n: usize| states[&n.to_string()].clone();
    let mut named = BTreeMap::new();
    for layer in 0..layers {
        for (n, name) in ["att.shift", "att.wkv", "ffn.shift"].into_iter().enumerate() {
            named.insert(format!("blocks.{layer}.{name}"), state(3 * layer + n));
        }
        let [keys, values] = [1, 2].map(|n| state(3 * layers + n + 2 * layer));
        let entry = |(t, &id): (usize, &u32)| {
            let of = |all: &[f32]| all.chunks(all.len() / tokens.len()).nth(t).expect("one for each token").to_vec();
            [vec![id as f32], of(&keys), of(&values)].concat()
        };
        named.insert(format!("blocks.{layer}.qkv.text"), tokens.iter().enumerate().flat_map(entry).collect());
        // The original code has room for 12 layers' keys and values before the queries.
        if let Some(shift) = states.get(&(3 * layers + 25 + layer).to_string()) {
            named.insert(format!("blocks.{layer}.qkv.shift"), shift.clone());
        }
    }
    named
}

pub fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1()).expect("values")
}
