//! A model as Hugging Face lays it out: a folder with `config.json` and the weights in one file or in shards.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::{Error, file};

/// Names under which weights are looked for, an index of shards before the file it would describe.
const WEIGHTS: [&str; 4] =
    ["model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin"];
/// Endings of a checkpoint that is the only one in its folder.
const ENDINGS: [&str; 5] = ["safetensors", "st", "pth", "gguf", "bin"];
/// No index or configuration is larger.
const LARGEST: u64 = 1 << 26;

/// The shards of an index.
#[derive(Deserialize)]
struct Index {
    /// Tensor → file.
    weight_map: BTreeMap<String, String>,
}

fn wrong(path: &Path, why: impl ToString) -> Error {
    file::wrong(path, &why.to_string())
}

/// The files a checkpoint consists of, where `path` is one, or an index of shards, or a folder.
///
/// # Errors
/// [`Error::Format`] and [`Error::Unreadable`], which say what is missing.
pub fn files(path: &Path) -> Result<Vec<PathBuf>, Error> {
    if path.is_dir() {
        check_config(&path.join("config.json"))?;
        return files(&weights(path)?);
    }
    if !path.to_string_lossy().ends_with(".index.json") {
        return Ok(vec![path.into()]);
    }
    let Index { weight_map } = serde_json::from_slice(&file::read(path, LARGEST)?).map_err(|e| wrong(path, e))?;
    let shards: BTreeSet<_> = weight_map.into_values().collect();
    if shards.is_empty() {
        return Err(wrong(path, "it names no shards"));
    }
    let shard = |name: String| {
        // A name that leads elsewhere would open files nobody meant.
        let plain = Path::new(&name).file_name().is_some_and(|file| file == name.as_str());
        let file = path.with_file_name(&name);
        match (plain, file.exists()) {
            (false, _) => Err(wrong(path, format!("`{name}` is no name of a file beside it"))),
            (true, false) => Err(wrong(path, format!("the shard `{name}` is not beside it"))),
            (true, true) => Ok(file),
        }
    };
    shards.into_iter().map(shard).collect()
}

/// The one checkpoint in a folder.
fn weights(folder: &Path) -> Result<PathBuf, Error> {
    if let Some(known) = WEIGHTS.iter().map(|name| folder.join(name)).find(|file| file.exists()) {
        return Ok(known);
    }
    let unreadable = |e: std::io::Error| Error::Unreadable { path: folder.display().to_string(), why: e.to_string() };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|ending| ENDINGS.iter().any(|known| ending == *known)) {
            found.push(path);
        }
    }
    found.sort();
    match found.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(wrong(folder, format!("the folder holds no checkpoint ({})", WEIGHTS.join(", ")))),
        [first, ..] => Err(wrong(
            folder,
            format!("the folder holds {} checkpoints; name one, such as {}", found.len(), first.display()),
        )),
    }
}

/// Refuses what the configuration says that would be computed otherwise here. Sizes come from the tensors.
fn check_config(path: &Path) -> Result<(), Error> {
    if fs::metadata(path).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
        return Ok(());
    }
    let config: Value = serde_json::from_slice(&file::read(path, LARGEST)?).map_err(|e| wrong(path, e))?;
    for (key, expected) in [
        ("layer_norm_epsilon", Value::from(1e-5)),
        ("norm_eps", Value::from(1e-5)),
        ("hidden_act", Value::from("sqrelu")),
        ("norm_first", Value::from(true)),
        // The group norm's epsilon is the trainer's, for which these stand.
        ("head_size_divisor", Value::from(8)),
        ("head_dim", Value::from(64)),
        ("attn", Value::Null),
    ] {
        if let Some(found) = config.get(key).filter(|found| !found.is_null() && **found != expected) {
            return Err(wrong(path, format!("`{key}` is {found}, and only {expected} is computed here")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_leads_to_its_shards_and_nowhere_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let index = at("model.safetensors.index.json");
        fs::write(at("a"), "").expect("a shard");
        let files = |shard: &str| {
            fs::write(&index, format!("{{\"weight_map\": {{\"x\": {shard:?}, \"y\": \"a\"}}}}")).expect("an index");
            super::files(folder.path()).map_err(|e| e.to_string())
        };
        assert_eq!(files("a"), Ok(vec![at("a")]));
        for (shard, says) in
            [("b", "`b` is not beside"), ("../a", "no name of a file"), ("/a", "no name"), ("..", "no name")]
        {
            let error = files(shard).expect_err(shard);
            assert!(error.contains(says), "{shard}: {error}");
        }
    }

    #[test]
    fn a_folder_must_not_leave_a_choice_or_change_the_arithmetic() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let error = || files(folder.path()).expect_err("no model").to_string();
        assert!(error().contains("no checkpoint"));
        fs::write(at("a.pth"), "").expect("a file");
        assert_eq!(files(folder.path()).expect("the only one"), [at("a.pth")]);
        fs::write(at("b.pth"), "").expect("a file");
        assert!(error().contains("2 checkpoints; name one"));
        fs::write(at("model.safetensors"), "").expect("a file");
        assert_eq!(files(folder.path()).expect("the usual one"), [at("model.safetensors")]);
        fs::write(at("config.json"), r#"{"norm_eps": 1e-5, "hidden_act": "sqrelu", "attn": null}"#).expect("a file");
        assert!(files(folder.path()).is_ok());
        fs::write(at("config.json"), r#"{"norm_eps": 1e-6}"#).expect("a file");
        assert!(error().contains("`norm_eps` is 1e-6, and only"), "{}", error());
    }
}
