//! Names that lead to no plain file, folders that lie, and files that go beside a model.

use std::fs;
use std::path::{Path, PathBuf};

use rewake::model::{Checkpoint, Lora};

use super::seeds::{Tensor, safetensors, small};
use super::{readable, readers, within};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }
    fn put(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).expect("room for it");
        path
    }
}

/// Opens a path as everything that can be opened; none of it is a checkpoint.
fn refused(what: &str, path: &Path) {
    let refuse = || {
        let checkpoint = Checkpoint::open(path).err().map(|e| e.to_string());
        let adapter = Lora::open(path, Some(1.0)).err().map(|e| e.to_string());
        checkpoint.zip(adapter).map_or(Ok(()), |(checkpoint, adapter)| Err(format!("{checkpoint}; {adapter}")))
    };
    within(what, 0, 0, refuse).expect_err(what);
}

#[test]
fn what_is_no_plain_file_is_refused() {
    let folder = Folder::new();
    refused("nothing there", &folder.0.path().join("nothing"));
    refused("an empty folder", folder.0.path());
    refused("an empty file", &folder.put("empty.st", ""));
    refused("one byte", &folder.put("byte.st", "P"));
    refused("a folder as a file", &folder.put("byte.st", "P").join("inside"));
}

#[cfg(unix)]
#[test]
fn pipes_devices_and_links_in_a_circle_are_refused() {
    use std::os::unix::fs::symlink;
    let folder = Folder::new();
    let at = |name: &str| folder.0.path().join(name);
    let pipe = |name: &str| {
        let made = std::process::Command::new("mkfifo").arg(at(name)).status().expect("mkfifo");
        assert!(made.success());
    };
    symlink(at("b.st"), at("a.st")).expect("a link");
    symlink(at("a.st"), at("b.st")).expect("a link");
    refused("a circle", &at("a.st"));
    symlink("/dev/zero", at("zero.st")).expect("a link");
    refused("an endless file", &at("zero.st"));
    pipe("pipe.st");
    refused("a pipe", &at("pipe.st"));
    // As what stands beside a model.
    pipe("model.safetensors.index.json");
    refused("a pipe for an index", folder.0.path());
    fs::remove_file(at("model.safetensors.index.json")).expect("it is there");
    folder.put("model.safetensors", safetensors(&small("v7_bf16", 16)));
    assert!(Checkpoint::open(folder.0.path()).is_ok());
    pipe("config.json");
    refused("a pipe for a configuration", folder.0.path());
    fs::remove_file(at("config.json")).expect("it is there");
    symlink("/dev/zero", at("config.json")).expect("a link");
    refused("an endless configuration", folder.0.path());
    fs::remove_file(at("config.json")).expect("it is there");
    symlink(at("config.json"), at("config.json")).expect("a link");
    refused("a configuration that is itself", folder.0.path());
}

#[test]
fn a_folder_that_lies_is_refused() {
    let folder = Folder::new();
    folder.put("model.safetensors", safetensors(&small("v7_bf16", 16)));
    let long = format!("{:?}", "n".repeat(100_000));
    for config in [
        "".into(),
        "[".repeat(100_000),
        format!(r#"{{"norm_eps": {}}}"#, "9".repeat(100_000)),
        r#"{"norm_eps": 1e999}"#.into(),
        r#"{"head_dim": 18446744073709551616}"#.into(),
        r#"{"head_dim": -64}"#.into(),
        format!(r#"{{"hidden_act": {long}}}"#),
        r#"{"hidden_act": "\u0000\n\u001b[2J"}"#.into(),
    ] {
        folder.put("config.json", &config);
        let what: String = config.chars().take(40).collect();
        let open = || Checkpoint::open(folder.0.path()).map(|_| ()).map_err(|e| e.to_string());
        within(&what, config.len(), 64, open).expect_err(&what);
    }
    folder.put("config.json", "{}");
    let path = |name: &str| format!(r#"{{"weight_map": {{"emb.weight": {name}}}}}"#);
    for index in [
        "".into(),
        "{}".into(),
        "[".repeat(100_000),
        r#"{"weight_map": {}}"#.into(),
        r#"{"weight_map": {"x": 3}}"#.into(),
        path(r#""../model.safetensors""#),
        path(r#""/etc/passwd""#),
        path(r#""..""#),
        path(r#"".""#),
        path(r#""""#),
        path(r#""a\u0000b""#),
        path(r#""\n\u001b[2J""#),
        path(r#""model.safetensors.index.json""#),
        path(&long),
    ] {
        folder.put("model.safetensors.index.json", &index);
        let what: String = index.chars().take(60).collect();
        let open = || Checkpoint::open(folder.0.path()).map(|_| ()).map_err(|e| e.to_string());
        within(&what, index.len(), 64, open).expect_err(&what);
    }
}

#[test]
fn what_goes_beside_a_model_has_to_fit_it() {
    let folder = Folder::new();
    let base = folder.put("base.st", safetensors(&small("v7_bf16", 16)));
    let state = |layer: &str, shape: &[usize]| Tensor::f32(&format!("blocks.{layer}.att.time_state"), shape, 0.5);
    let pair = |linear: &str, a: &[usize], b: &[usize]| {
        vec![Tensor::f32(&format!("{linear}.lora_A"), a, 0.5), Tensor::f32(&format!("{linear}.lora_B"), b, 0.5)]
    };
    let key = "blocks.0.att.key";
    for (what, tensors) in [
        ("a rank of 0", pair(key, &[0, 8], &[8, 0])),
        ("a rank of very much", pair(key, &[0, 1 << 40], &[1 << 40, 0])),
        ("two ranks", pair(key, &[2, 8], &[8, 3])),
        ("turned around", pair(key, &[8, 2], &[2, 8])),
        ("one half", pair(key, &[2, 8], &[8, 2])[..1].to_vec()),
        ("lists", pair(key, &[8], &[8])),
        ("nothing to be merged into", pair("blocks.9.att.key", &[2, 8], &[8, 2])),
        ("a vector's", pair("blocks.0.ln1", &[2, 8], &[8, 2])),
        (
            "not finite",
            pair(key, &[2, 8], &[8, 2]).into_iter().map(|t| Tensor::f32(&t.name, &t.shape, f32::NAN)).collect(),
        ),
        (
            "too large a product",
            pair(key, &[2, 8], &[8, 2]).into_iter().map(|t| Tensor::f32(&t.name, &t.shape, 3e38)).collect(),
        ),
        ("another size", vec![Tensor::f32("emb.weight", &[20, 9], 0.5)]),
        ("one state", vec![state("0", &[2, 4, 4])]),
        ("a state of another size", (0..9).map(|layer| state(&layer.to_string(), &[2, 4, 5])).collect()),
        ("a state that is flat", (0..9).map(|layer| state(&layer.to_string(), &[32])).collect()),
        ("an empty state", (0..9).map(|layer| state(&layer.to_string(), &[0, 0, 0])).collect()),
        ("a state of the layer 10⁹", vec![state("1000000000", &[2, 4, 4])]),
        ("a state of no layer", vec![state("18446744073709551616", &[2, 4, 4])]),
    ] {
        let file = safetensors(&tensors);
        let beside = folder.put("beside.st", &file);
        let error = within(what, file.len() + 100_000, 64, || readers::beside(&base, &beside)).expect_err(what);
        assert!(readable(&error), "{what}: {error:?}");
    }
    for config in ["", "[", r#"{"lora_alpha": 1e999}"#, r#"{"lora_alpha": "x"}"#, r#"{"r": -1}"#, r#"{"r": 7}"#] {
        let adapter = folder.put("adapter.st", safetensors(&pair(key, &[2, 8], &[8, 2])));
        folder.put("adapter_config.json", config);
        let error = Lora::open(&adapter, None).err().expect(config).to_string();
        assert!(readable(&error), "{config}: {error:?}");
    }
}

#[test]
fn a_configuration_that_lies_is_refused() {
    let folder = Folder::new();
    let nested = "a.".repeat(100_000);
    for toml in [
        "\0".into(),
        "[".repeat(100_000),
        format!("a = {}", "[".repeat(100_000)),
        format!("a = {}", "{a=".repeat(100_000)),
        format!("{nested}a = 1"),
        format!("[{nested}a]"),
        "[engine]\nseats = 18446744073709551615".into(),
        "[engine]\nseats = 9223372036854775807".into(),
        "[engine]\nseats = -1".into(),
        "[engine]\nseats = 1e300".into(),
        "[engine]\nbudget = 99999999999999999999999999".into(),
        "[server]\nport = 65536".into(),
        format!("[server]\nhost = {:?}", "n".repeat(100_000)),
        "[[model]]\n".repeat(10_000),
        "[server]\nhost = \"\"\"".into(),
    ] {
        let path = folder.put("rewake.toml", &toml);
        let what: String = toml.chars().take(40).collect();
        within(&what, toml.len(), 400, || readers::config(&path)).expect_err(&what);
    }
}
