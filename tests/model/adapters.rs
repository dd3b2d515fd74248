//! What is added to a checkpoint: a LoRA whose alpha stands beside it, and initial states of single sequences.

use std::path::PathBuf;

use rewake::app;
use rewake::config;
use rewake::model::{Checkpoint, Error, LoadOptions, Lora, load};
use rewake::types::SlotId;
use serde_json::{Value, json};

use super::vectors::case;
use super::{bits, flat, read};

/// The case's adapter (rank 8) in a folder with this `adapter_config.json`.
fn beside(config: Option<&str>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let lora = folder.path().join("lora.safetensors");
    std::fs::copy(case("v7_lora_bf16").folder.join("lora.safetensors"), &lora).expect("a copy");
    if let Some(config) = config {
        std::fs::write(folder.path().join("adapter_config.json"), config).expect("a file");
    }
    (folder, lora)
}

fn fingerprint(lora: Lora) -> String {
    let base = Checkpoint::open(&case("v7_lora_bf16").folder.join("model.safetensors")).expect("a checkpoint");
    let merged = base.with_lora(lora).expect("a fitting LoRA");
    load(&merged, &LoadOptions::default()).expect("a model").description().fingerprint.clone()
}

#[test]
fn the_alpha_is_read_beside_the_adapter_and_a_given_one_wins() {
    let config = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": false, "alpha_pattern": {}});
    let (_folder, lora) = beside(Some(&config.to_string()));
    let open = |alpha| fingerprint(Lora::open(&lora, alpha).expect("an adapter"));
    let (_alone, alone) = beside(None);
    let given = |alpha| fingerprint(Lora::open(&alone, Some(alpha)).expect("an adapter"));
    assert_eq!(open(None), given(16.0));
    assert_eq!(open(Some(4.0)), given(4.0));
    assert_ne!(open(Some(4.0)), open(None));
    // Given, nothing needs to be read, whatever it says.
    for other in ["{", r#"{"r": 7, "lora_alpha": 1}"#] {
        let (_folder, lora) = beside(Some(other));
        assert_eq!(fingerprint(Lora::open(&lora, Some(16.0)).expect("an adapter")), given(16.0));
    }
}

#[test]
fn an_alpha_is_never_guessed() {
    let refused = |config: Option<&str>, alpha: Option<f32>| {
        let (_folder, lora) = beside(config);
        Lora::open(&lora, alpha).map(|_| ()).expect_err("there is no alpha to be had")
    };
    let error = refused(None, None);
    assert!(matches!(error, Error::LoraAlpha), "{error}");
    assert!(error.to_string().contains("--lora-alpha"), "it says what to do: {error}");
    for config in ["{}", r#"{"r": 8}"#, r#"{"r": 8, "lora_alpha": null}"#, r#"{"lora_alpha": 1e300}"#] {
        let error = refused(Some(config), None);
        assert!(matches!(error, Error::LoraConfig { .. }), "{config}: {error}");
        assert!(error.to_string().contains("--lora-alpha"), "it says what to do: {error}");
    }
    let error = refused(Some(r#"{"lora_alpha": 16}"#), Some(f32::NAN)).to_string();
    assert!(error.contains("an alpha of NaN"), "a given one wins: {error}");
    for (config, names) in [
        (json!({"r": 16, "lora_alpha": 16}), "`r` is 16"),
        (json!({"r": 8, "lora_alpha": 16, "use_rslora": true}), "use_rslora"),
        (json!({"r": 8, "lora_alpha": 16, "alpha_pattern": {"blocks.0": 8}}), "alpha_pattern"),
        (json!({"r": 8, "lora_alpha": 16, "use_dora": true}), "use_dora"),
        (json!({"r": -1, "lora_alpha": 16}), "invalid value"),
        (json!({"r": 8, "lora_alpha": "16"}), "invalid type"),
        (json!([]), "invalid"),
        (Value::Null, "invalid type"),
    ] {
        let error = refused(Some(&config.to_string()), None);
        let message = error.to_string();
        assert!(matches!(error, Error::LoraConfig { .. }), "{config}: {message}");
        assert!(message.contains(names) && message.contains("adapter_config.json"), "{config}: {message}");
    }
}

/// The case's adapter as PEFT would have written it, in a folder with its configuration.
fn peft(config: &Value, prefix: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let lora = case("v7_lora_bf16").folder.join("lora.safetensors");
    let tensors = candle_core::safetensors::load(lora, &candle_core::Device::Cpu).expect("tensors");
    let renamed = tensors.into_iter().map(|(name, tensor)| {
        let factor = [".lora_A", ".lora_B"].iter().any(|factor| name.ends_with(factor));
        (format!("{prefix}{name}{}", if factor { ".weight" } else { "" }), tensor)
    });
    let renamed: std::collections::HashMap<_, _> = renamed.collect();
    candle_core::safetensors::save(&renamed, folder.path().join("adapter_model.safetensors")).expect("a file");
    std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).expect("a file");
    folder
}

#[test]
fn an_adapter_of_peft_is_the_same_from_its_file_and_from_its_folder() {
    let config = json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_dora": false, "rank_pattern": {}});
    let folder = peft(&config, "base_model.model.");
    let (_alone, alone) = beside(None);
    let expected = fingerprint(Lora::open(&alone, Some(16.0)).expect("an adapter"));
    for path in [folder.path().to_owned(), folder.path().join("adapter_model.safetensors")] {
        assert_eq!(fingerprint(Lora::open(&path, None).expect("an adapter")), expected, "{}", path.display());
        let model = config::Model { lora: Some(path), ..config::Model::default() };
        app::check(&config::Config { model: vec![model], ..config::Config::default() }).expect("serve takes it too");
    }
    // Ranks of single layers are what the tensors have.
    let config = json!({"r": 4, "lora_alpha": 16, "rank_pattern": {"key": 8}});
    let folder = peft(&config, "base_model.model.");
    assert_eq!(fingerprint(Lora::open(folder.path(), None).expect("an adapter")), expected);
}

#[test]
fn another_model_is_no_adapter() {
    let model = case("v7_lora_bf16").folder.join("model.safetensors");
    let error = Lora::open(&model, Some(16.0)).map(|_| ()).expect_err("it would replace everything");
    assert!(matches!(error, Error::Lora(_)) && error.to_string().contains("lora_A"), "{error}");
}

#[test]
fn a_missing_alpha_is_found_before_anything_is_started() {
    let check = |config: Option<&str>, lora_alpha| {
        let (_folder, lora) = beside(config);
        let model = config::Model { lora: Some(lora), lora_alpha, ..config::Model::default() };
        app::check(&config::Config { model: vec![model], ..config::Config::default() })
    };
    check(None, Some(16.0)).expect("it is given");
    check(Some(r#"{"lora_alpha": 16}"#), None).expect("it stands beside the file");
    let error = check(None, None).expect_err("it is nowhere");
    assert!(error.to_string().contains("alpha"), "{error}");
}

#[test]
fn an_initial_state_that_is_restored_is_the_one_a_model_is_loaded_with() {
    let case = case("v7_state_bf16");
    let open = |name: &str| Checkpoint::open(&case.folder.join(name)).expect("a checkpoint");
    let (base, file) = (open("model.safetensors"), open("state.safetensors"));
    let options = LoadOptions { initial_state: Some(&file), ..LoadOptions::default() };
    let mut plain = load(&base, &LoadOptions::default()).expect("a model");
    let mut tuned = load(&base, &options).expect("a model");

    let state = plain.initial_state(&file).expect("it fits");
    assert_eq!(flat(&state), flat(&tuned.fresh().expect("memory")));
    assert_ne!(flat(&state), flat(&plain.fresh().expect("memory")));
    assert_eq!(flat(&tuned.initial_state(&file).expect("it fits")), flat(&state), "the model's own does not matter");

    let (mut left, mut right) = (plain.pool(2).expect("a pool"), tuned.pool(1).expect("a pool"));
    left.restore(SlotId(1), &state).expect("a whole state");
    right.reset(SlotId(0));
    let a = read(&mut plain, &mut left, &case.tokens, 0, 1, 1);
    let b = read(&mut tuned, &mut right, &case.tokens, 0, 0, 0);
    assert!(bits(&a) == bits(&b));
    assert_eq!(flat(&left.snapshot(SlotId(1))), flat(&right.snapshot(SlotId(0))));
    let worst = a.iter().flatten().zip(case.logits.iter().flatten()).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
    assert!(worst <= 1e-4 * case.rms(), "and what the original code says: {worst}");

    // A model is no state-tuned file: that is said, rather than that its tensors are none of the model's.
    let error = plain.initial_state(&base).expect_err("it has no state");
    assert!(matches!(&error, Error::Missing { name, .. } if name == "blocks.0.att.time_state"), "{error}");
}
