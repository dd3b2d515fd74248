//! Checkpoints in the formats of others: made with their tools or as those write, holding the models of the golden cases.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use rewake::model::{Checkpoint, Conversion, Error, Format, Kind, LoadOptions, Lora, Model, load};
use rewake::text;
use rewake::types::SlotId;

use super::vectors::{Case, case};
use super::{models, read};

fn at(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/formats").join(name)
}

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn model(checkpoint: &Checkpoint) -> Model {
    load(checkpoint, &LoadOptions::default()).expect("a model")
}

fn logits(model: &mut Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut pool = model.pool(1).expect("a pool");
    pool.reset(SlotId(0));
    read(model, &mut pool, tokens, 0, 0, 0)
}

/// The largest error of the model's logits, in parts of the RMS of the case's.
fn error(model: &mut Model, case: &Case) -> f32 {
    let got = logits(model, &case.tokens);
    worst(&got, &case.logits) / case.rms()
}

fn worst(got: &[Vec<f32>], want: &[Vec<f32>]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().flatten().zip(want.iter().flatten()).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max)
}

#[test]
fn every_layout_computes_what_the_original_does() {
    for (file, name, format, most) in [
        ("hf_v4", "v4_bf16", "pth", 1e-4),
        ("fla_v7", "v7_bf16", "safetensors", 1e-4),
        ("v6_rescaled.gguf", "v6_bf16", "gguf", 1e-4),
        ("v7.gguf", "v7_bf16", "gguf", 1e-4),
        // These hold f16, which rounds the smallest values of a bf16 model.
        ("v4.bin", "v4_bf16", "rwkv.cpp", 1e-3),
        ("v5.bin", "v5_2_bf16", "rwkv.cpp", 1e-3),
        ("v6.bin", "v6_bf16", "rwkv.cpp", 1e-3),
        ("v7.bin", "v7_bf16", "rwkv.cpp", 1e-3),
        ("v6.st", "v6_bf16", "safetensors", 1e-3),
        ("v7.st", "v7_bf16", "safetensors", 1e-3),
    ] {
        let (case, checkpoint) = (case(name), open(&at(file)));
        assert_eq!(checkpoint.format(), format, "{file}");
        let mut model = model(&checkpoint);
        assert_eq!(model.description().generation, case.json["version"], "{file}");
        let error = error(&mut model, &case);
        println!("{file}: largest error {error:.2e} of the RMS");
        assert!(error <= most, "{file}: {error}");
    }
}

#[test]
fn the_same_values_have_the_same_fingerprint_in_any_layout() {
    for (name, layouts) in [
        ("v4_bf16", &["hf_v4"][..]),
        ("v6_bf16", &["v6_rescaled.gguf"]),
        ("v7_bf16", &["fla_v7", "fla_v7/model.safetensors.index.json", "v7.gguf"]),
    ] {
        let (_, original) = models(&case(name)).remove(0);
        for layout in layouts {
            let other = model(&open(&at(layout)));
            assert_eq!(other.description().fingerprint, original.description().fingerprint, "{layout}");
        }
    }
}

/// The names that the repositories of v5 and v6 at Hugging Face have.
fn as_in_transformers(name: &str) -> String {
    let name = name.replace("blocks.0.ln0", "blocks.0.pre_ln").replace(".att.", ".attention.");
    let name = name.replace(".ffn.", ".feed_forward.");
    let name =
        [("k", "key"), ("v", "value"), ("r", "receptance"), ("g", "gate")].iter().fold(name, |name, (short, long)| {
            name.strip_suffix(&format!(".time_mix_{short}")).map(|n| format!("{n}.time_mix_{long}")).unwrap_or(name)
        });
    match name.as_str() {
        "head.weight" => name,
        "emb.weight" => "rwkv.embeddings.weight".into(),
        _ => format!("rwkv.{name}"),
    }
}

#[test]
fn transformers_names_of_v5_and_v6() {
    for name in ["v5_2_bf16", "v6_bf16"] {
        let case = case(name);
        let tensors =
            candle_core::safetensors::load(case.folder.join("model.safetensors"), &Device::Cpu).expect("tensors");
        let renamed: HashMap<_, _> = tensors.into_iter().map(|(name, t)| (as_in_transformers(&name), t)).collect();
        let folder = tempfile::tempdir().expect("a folder");
        candle_core::safetensors::save(&renamed, folder.path().join("model.safetensors")).expect("a file");
        std::fs::write(folder.path().join("config.json"), r#"{"layer_norm_epsilon": 1e-05, "head_size_divisor": 8}"#)
            .expect("a file");
        let other = model(&open(folder.path()));
        let (_, original) = models(&case).remove(0);
        assert_eq!(other.description().fingerprint, original.description().fingerprint, "{name}");
    }
}

#[test]
fn ai00s_states_and_adapters_are_turned_around() {
    let states = case("v7_state_bf16");
    let base = open(&states.folder.join("model.safetensors"));
    let file = open(&at("v7_state.st"));
    let options = LoadOptions { initial_state: Some(&file), ..LoadOptions::default() };
    let error_of_state = error(&mut load(&base, &options).expect("a model"), &states);
    assert!(error_of_state <= 2e-3, "{error_of_state}");

    let adapted = case("v7_lora_bf16");
    let base = open(&adapted.folder.join("model.safetensors"));
    let lora = Lora::open(&at("v7_lora.st"), Some(16.0)).expect("an adapter");
    let error_of_lora = error(&mut model(&base.with_lora(lora).expect("a fitting adapter")), &adapted);
    assert!(error_of_lora <= 2e-3, "{error_of_lora}");
}

#[test]
fn blocks_of_every_kind_compute_what_llama_cpp_makes_of_their_values() {
    let checkpoint = open(&at("kinds.gguf"));
    let kinds: BTreeMap<Kind, usize> = checkpoint.tensors().values().fold(BTreeMap::new(), |mut kinds, tensor| {
        *kinds.entry(tensor.kind).or_default() += 1;
        kinds
    });
    assert_eq!(kinds.len(), Kind::ALL.len(), "one of each: {kinds:?}");
    let tokens = [38, 37, 229, 143, 169, 173, 205, 8, 139, 42, 115, 267, 157, 20, 156, 37];
    let expected = candle_core::safetensors::load(at("kinds.safetensors"), &Device::Cpu).expect("logits");
    let expected = expected["logits"].to_vec2::<f32>().expect("[T, V]");
    let rms =
        (expected.iter().flatten().map(|v| v * v).sum::<f32>() / (expected.len() * expected[0].len()) as f32).sqrt();
    let f32 = LoadOptions { quantise: Some(Kind::F32), ..LoadOptions::default() };
    let got = logits(&mut load(&checkpoint, &f32).expect("a model"), &tokens);
    assert!(worst(&got, &expected) <= 1e-4 * rms, "{} of {rms}", worst(&got, &expected));
    // As they are, with activations of eight bits, which this random model of few channels feels more than a trained one.
    let mut model = model(&checkpoint);
    let got = logits(&mut model, &tokens);
    assert!(worst(&got, &expected) <= 0.1 * rms, "{} of {rms}", worst(&got, &expected));

    // The chunk law, whatever the kind.
    let mut pool = model.pool(1).expect("a pool");
    pool.reset(SlotId(0));
    let mut pieces = Vec::new();
    for (n, token) in tokens.iter().enumerate() {
        pieces.extend(read(&mut model, &mut pool, &[*token], n, 0, 0));
    }
    assert!(super::bits(&pieces) == super::bits(&got));
}

#[test]
fn a_gguf_brings_its_vocabulary() {
    let literals = open(&at("kinds.gguf")).vocabulary().expect("RWKV's kind").expect("a vocabulary");
    let tokenizer = text::from_literals(&literals).expect("a sound vocabulary");
    assert_eq!(tokenizer.end_of_text(), Some(0));
    assert_eq!(tokenizer.encode("a\n\nb"), [98, 261, 99]);
    let every: Vec<u8> = (0..=255).collect();
    let ids: Vec<u32> = (1..=256).collect();
    assert_eq!(tokenizer.decode(&ids), every);
    assert_eq!(tokenizer.token_bytes(0), b"", "the end of a document is no text");
}

/// Writes `from` as the file `to`.
fn convert(from: &Checkpoint, to: &Path, kind: Option<Kind>) -> Result<(), Error> {
    let conversion = Conversion {
        checkpoint: from,
        format: Format::of(to).expect("a known ending"),
        kind,
        vocabulary: None,
        name: "test".into(),
        progress: &|_, _| {},
    };
    conversion.write(&mut File::create(to)?)
}

#[test]
fn a_conversion_that_loses_nothing_keeps_the_fingerprint() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["v1_fp32", "v2_fp32", "v4_bf16", "v5_0_fp16", "v6_bf16", "v7_bf16", "v7b_bf16"] {
        let (case, original) = (case(name), models(&case(name)).remove(0).1);
        let gguf = ["v6", "v7"].contains(&original.description().generation);
        let mut from = case.folder.join("model.safetensors");
        for ending in ["pth", "gguf", "safetensors", "pth"] {
            if ending == "gguf" && !gguf {
                continue;
            }
            let to = folder.path().join(format!("{}-{name}.{ending}", from.file_stem().expect("a name").display()));
            convert(&open(&from), &to, None).unwrap_or_else(|e| panic!("{name} → {ending}: {e}"));
            let converted = model(&open(&to));
            assert_eq!(converted.description().fingerprint, original.description().fingerprint, "{name} → {ending}");
            from = to;
        }
    }
}

#[test]
fn what_is_written_as_pth_is_what_another_reader_finds() {
    let folder = tempfile::tempdir().expect("a folder");
    let (case, to) = (case("v7_bf16"), folder.path().join("out.pth"));
    convert(&open(&case.folder.join("model.safetensors")), &to, Some(Kind::F16)).expect("a conversion");
    let original =
        candle_core::safetensors::load(case.folder.join("model.safetensors"), &Device::Cpu).expect("tensors");
    let read = candle_core::pickle::read_all(&to).expect("a pickle");
    assert_eq!(read.len(), original.len());
    for (name, tensor) in read {
        let large = name.ends_with(".weight") && tensor.dims().len() == 2;
        assert_eq!(tensor.dtype(), if large { DType::F16 } else { DType::BF16 }, "{name}");
        let expected = original[&name].to_dtype(tensor.dtype()).expect("a cast");
        let values =
            |t: &Tensor| t.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1::<f32>()).expect("values");
        assert_eq!((tensor.dims(), values(&tensor)), (expected.dims(), values(&expected)), "{name}");
    }
}

#[test]
fn quantising_stays_close_and_only_gguf_holds_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let case = case("v7_bf16");
    let from = open(&case.folder.join("model.safetensors"));
    for (kind, most) in [(Kind::F16, 2e-3), (Kind::Q8_0, 0.2), (Kind::Q5_1, 1.5), (Kind::Q4_0, 3.0), (Kind::Q6K, 0.3)] {
        let to = folder.path().join("out.gguf");
        convert(&from, &to, Some(kind)).expect("a conversion");
        let checkpoint = open(&to);
        // Rows of 64 or 128 values are no blocks of 256: something that fits is taken.
        let expected = if kind == Kind::Q6K { Kind::Q8_0 } else { kind };
        assert_eq!(checkpoint.tensors()["head.weight"].kind, expected);
        assert_eq!(checkpoint.tensors()["blocks.0.att.w1"].kind, Kind::F32, "what is small and sensitive stays");
        let error = error(&mut model(&checkpoint), &case);
        println!("{kind}: largest error {error:.2e} of the RMS");
        assert!(error <= most, "{kind}: {error}");
    }
    let refused = convert(&from, &folder.path().join("out.pth"), Some(Kind::Q8_0)).expect_err("no blocks in a pth");
    assert!(refused.to_string().contains("only GGUF holds q8_0"), "{refused}");
    let v5 = open(&super::case("v5_2_bf16").folder.join("model.safetensors"));
    let refused = convert(&v5, &folder.path().join("out.gguf"), None).expect_err("no v5 in llama.cpp");
    assert!(refused.to_string().contains("this is v5.2"), "{refused}");
}
