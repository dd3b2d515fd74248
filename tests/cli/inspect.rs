//! `rewake inspect`.

use std::path::Path;

use rewake::model::{Checkpoint, LoadOptions, Lora, load};
use serde_json::Value;

use super::{Case, carried, data, folder, rewake, run};

/// What `--json --tensors` says of a checkpoint.
fn seen(args: &[&str]) -> Value {
    let printed = rewake(["inspect", "--json", "--tensors"].iter().chain(args)).ok();
    serde_json::from_str(&printed).unwrap_or_else(|e| panic!("{args:?}: {e}\n{printed}"))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// What the library makes of the case's files.
fn fingerprint(case: &Case) -> String {
    let mut checkpoint = Checkpoint::open(&case.folder.join("model.safetensors")).expect("a checkpoint");
    if let Some(alpha) = case.json["lora"]["alpha"].as_f64() {
        let lora = Lora::open(&case.folder.join("lora.safetensors"), Some(alpha as f32)).expect("a LoRA file");
        checkpoint = checkpoint.with_lora(lora).expect("a fitting LoRA");
    }
    load(&checkpoint, &LoadOptions::default()).expect("a model").description().fingerprint.clone()
}

#[test]
fn every_generation_is_described() {
    for case in carried() {
        let name = case.name();
        let (file, lora) = (case.folder.join("model.safetensors"), shown(&case.folder.join("lora.safetensors")));
        let mut args = vec![shown(&file)];
        if let Some(alpha) = case.json["lora"]["alpha"].as_f64() {
            args.extend(["--lora".into(), lora, "--lora-alpha".into(), alpha.to_string()]);
        }
        let about = seen(&args.iter().map(String::as_str).collect::<Vec<_>>());
        for (key, expected) in
            [("generation", "version"), ("layers", "n_layer"), ("width", "n_embd"), ("vocabulary", "vocab_size")]
        {
            assert_eq!(about[key], case.json[expected], "{name}: {key}");
        }
        assert_eq!((&about["format"], &about["fingerprint"]), (&"safetensors".into(), &fingerprint(&case).into()));

        // Types, parameters and tensors, against the file's own header.
        let bytes = std::fs::read(&file).expect("a file");
        let stored = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
        let tensors = about["tensors"].as_array().expect("a list");
        assert_eq!(tensors.len(), stored.len(), "{name}");
        let mut all = 0;
        for tensor in tensors {
            let stored = stored.tensor(tensor["name"].as_str().expect("a name")).expect("a tensor of the file");
            assert_eq!(tensor["shape"], serde_json::json!(stored.shape()), "{name}: {tensor}");
            assert_eq!(tensor["type"], stored.dtype().to_string().to_lowercase(), "{name}: {tensor}");
            all += stored.shape().iter().product::<usize>();
        }
        assert_eq!(about["parameters"], all, "{name}");
        // All of the file but what no layer takes, in the types of the file unless something is merged.
        let (taken, held) = (about["weight_bytes"].as_u64().expect("a number"), bytes.len() as u64);
        let most = match case.json["version"].as_str() {
            // Tables that are merged are kept in f32, vectors always are.
            Some("v7a" | "v7b") => 2 * held,
            _ => held + held / 5,
        };
        assert!(most < 2 * held || taken > held, "{name}: {taken} of {held}");
        assert!(args.len() > 1 || taken <= most && taken > held * 9 / 10 - 10_000, "{name}: {taken} of {held}");
        let kinds = about["types"].as_object().expect("an object");
        assert_eq!(kinds.values().filter_map(Value::as_u64).sum::<u64>(), all as u64, "{name}: {kinds:?}");

        // States of constant size are as large as those of the original code; the others say where they end.
        let floats: usize = case.states.values().map(Vec::len).sum();
        if ["v1", "v2", "v3", "v7b", "v8_rc00_hybrid"].iter().all(|growing| about["generation"] != *growing) {
            assert_eq!((&about["state_bytes"], &about["context"]), (&(4 * floats).into(), &Value::Null), "{name}");
        }
        let grows = ["v1", "v2", "v3", "v7b", "v8_rc00_hybrid"].iter().any(|growing| about["generation"] == *growing);
        assert!(grows || about["state_bytes_per_token"] == 0, "{name}");
        assert!(about["context"].is_null() || about["state_bytes_per_token"].as_u64() > Some(0), "{name}");
        if about["generation"] == "v1" {
            assert_eq!(about["context"], case.json["ctx_len"], "{name}");
        }

        let tokenizer = about["tokenizer"].as_str().expect("a name or why there is none");
        if about["vocabulary"] == 256 {
            assert_eq!((tokenizer, &about["template"]), ("bytes", &"world".into()), "{name}");
        } else {
            assert!(tokenizer.contains("--tokenizer") && about["template"].is_null(), "{name}: {tokenizer}");
        }
    }
}

#[test]
fn every_format_is_described() {
    for (file, generation, format, kinds) in [
        ("hf_v4", "v4", "pth", &["bf16"][..]),
        ("fla_v7", "v7", "safetensors", &["bf16"]),
        ("fla_v7/model.safetensors.index.json", "v7", "safetensors", &["bf16"]),
        ("v4.bin", "v4", "rwkv.cpp", &["f16", "f32"]),
        ("v5.bin", "v5.2", "rwkv.cpp", &["f16", "f32"]),
        ("v6.bin", "v6", "rwkv.cpp", &["f16", "f32"]),
        ("v7.bin", "v7", "rwkv.cpp", &["f16", "f32"]),
        ("v6.st", "v6", "safetensors", &["f16"]),
        ("v7.st", "v7", "safetensors", &["f16"]),
        ("v6_rescaled.gguf", "v6", "gguf", &["bf16", "f32"]),
        ("v7.gguf", "v7", "gguf", &["bf16", "f32"]),
        (
            "kinds.gguf",
            "v7",
            "gguf",
            &["bf16", "f16", "f32", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0"],
        ),
    ] {
        let about = seen(&[&shown(&data("formats").join(file))]);
        assert_eq!((&about["generation"], &about["format"]), (&generation.into(), &format.into()), "{file}");
        let found: Vec<_> = about["types"].as_object().expect("an object").keys().collect();
        assert_eq!(found, kinds, "{file}");
        // Those bring their vocabulary.
        let speaks = format == "gguf" || file == "hf_v4";
        assert_eq!(about["template"].is_string() && about["stop"].is_array(), speaks, "{file}: {about}");
    }
    let gguf = seen(&[&shown(&data("formats/v7.gguf"))]);
    assert_eq!(gguf["fingerprint"], seen(&[&shown(&data("v7_bf16"))])["fingerprint"], "a folder of one checkpoint");
}

#[test]
fn the_embedded_model_as_people_read_it() {
    let text = run!("inspect").ok();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("generation") && lines[0].ends_with(" v7"), "what a model is comes first: {text}");
    for line in [
        "layers       8",
        "width        128",
        "vocabulary   2048",
        "parameters   2379264",
        "types        2379264 f16",
        "state bytes  270336 for each sequence",
        "template     stories",
        "stop         [\"\\n\\n\"]",
        "stop tokens  [0]",
    ] {
        assert!(lines.contains(&line), "`{line}` in\n{text}");
    }
    assert!(!text.contains("blocks.0"), "tensors are listed for who asks");
    let tensors = run!("inspect", "--tensors").ok();
    assert!(tensors.starts_with(&text) && tensors.contains("\n  blocks.0.att.w1 f16 [128, "), "{tensors}");
}

#[test]
fn a_growing_state_tells_its_cost() {
    let about = seen(&[&shown(&data("v1_fp32"))]);
    let text = run!("inspect", data("v1_fp32")).ok();
    let line = format!(
        "state bytes  {} for each sequence, and {} for each token\n",
        about["state_bytes"], about["state_bytes_per_token"]
    );
    assert!(text.contains(&line), "{text}");
}

#[test]
fn what_is_no_model_is_told_by_name() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let cut = |from: &str, to: &str, bytes: usize| {
        let whole = std::fs::read(data(from)).expect("a file");
        std::fs::write(at(to), &whole[..bytes.min(whole.len())]).expect("a file");
    };
    cut("v7_bf16/model.safetensors", "cut.safetensors", 100_000);
    cut("v7_bf16/model.pth", "cut.pth", 100_000);
    cut("formats/v7.gguf", "cut.gguf", 100_000);
    cut("formats/v7.bin", "cut.bin", 100_000);
    cut("v7_bf16/case.json", "text.pth", 1000);
    cut("v7_bf16/case.json", "empty.pth", 0);
    std::fs::create_dir(at("nothing")).expect("a folder");
    let bad = ["cut.safetensors", "cut.pth", "cut.gguf", "cut.bin", "text.pth", "empty.pth", "nothing", "missing.pth"];
    // Sound files that hold something else.
    let other = ["v7_state_bf16/state.safetensors", "v7_lora_bf16/lora.safetensors", "v7_bf16/expected.safetensors"];
    for path in bad.map(at).into_iter().chain(other.map(data)) {
        let error = run!("inspect", path).error();
        assert!(error.contains(&shown(&path)), "{error}");
    }
    for (file, said) in [("v7_state_bf16/state.safetensors", "--state"), ("v7_lora_bf16/lora.safetensors", "--lora")] {
        let error = run!("inspect", data(file)).error();
        assert!(error.contains(said), "which flag takes it: {error}");
    }
    let model = data("v7_lora_bf16/model.safetensors");
    let states = data("v6_state_bf16/model.safetensors");
    for (args, said) in [
        (["--tokenizer", "missing.json"], "missing.json"),
        (["--tokenizer", "world"], "65530 ids and the model only 200"),
        (["--lora", &shown(&data("v7_lora_bf16/lora.safetensors"))], "--lora-alpha"),
        (["--lora", &shown(&states)], "v6_state_bf16/model.safetensors holds no lora_A and lora_B"),
        (["--state", &shown(&data("v7_lora_bf16/lora.safetensors"))], "lora.safetensors"),
        (["--state", &shown(&states)], "v6_state_bf16"),
    ] {
        let error = run!("inspect", model, args[0], args[1]).error();
        assert!(error.contains(said), "{args:?}: {error}");
    }
}
