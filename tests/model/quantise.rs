//! Quantising while loading: the same as converting first.

use std::collections::BTreeSet;
use std::fs::File;

use rewake::model::{Checkpoint, Conversion, Error, Format, Kind, LoadOptions, Lora, Model, load};
use rewake::types::SlotId;

use super::vectors::{Case, case};
use super::{SERVED, bits, cases, flat, laws, read};

/// The types that the linear layers of a checkpoint get, so asked for.
pub fn kinds(checkpoint: &Checkpoint, kind: Kind) -> BTreeSet<Kind> {
    let large = |name: &String| name.ends_with(".weight") && !name.contains("ln");
    let fit = |shape: &[usize]| {
        [kind, Kind::Q8_0, Kind::F16]
            .into_iter()
            .find(|kind| kind.tensor_bytes(shape).is_some())
            .expect("f16 always does")
    };
    let tensors = checkpoint.tensors().iter();
    tensors.filter(|(name, info)| large(name) && info.shape.len() == 2).map(|(_, info)| fit(&info.shape)).collect()
}

fn open(case: &Case) -> Checkpoint {
    let file =
        ["model.safetensors", "model.pth"].map(|name| case.folder.join(name)).into_iter().find(|file| file.exists());
    let checkpoint = Checkpoint::open(&file.expect("a model")).expect("a checkpoint");
    match case.json["lora"]["alpha"].as_f64() {
        Some(alpha) => {
            let lora = Lora::open(&case.folder.join("lora.safetensors"), Some(alpha as f32)).expect("a LoRA file");
            checkpoint.with_lora(lora).expect("a fitting LoRA")
        }
        None => checkpoint,
    }
}

fn quantised(checkpoint: &Checkpoint, kind: Kind) -> Result<Model, Error> {
    load(checkpoint, &LoadOptions { quantise: Some(kind), ..LoadOptions::default() })
}

/// All bits that the case's tokens give.
fn run(model: &mut Model, case: &Case) -> (Vec<u32>, Vec<u32>) {
    let mut pool = model.pool(1).expect("a pool");
    pool.reset(SlotId(0));
    (bits(&read(model, &mut pool, &case.tokens, 0, 0, 0)), flat(&pool.snapshot(SlotId(0))))
}

#[test]
fn it_is_the_model_that_a_conversion_makes() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["v6_bf16", "v7_bf16", "v7_lora_bf16"] {
        let case = case(name);
        let checkpoint = open(&case);
        for kind in Kind::ALL {
            let to = folder.path().join(format!("{name}-{kind}.gguf"));
            let conversion = Conversion {
                checkpoint: &checkpoint,
                format: Format::Gguf,
                kind: Some(kind),
                vocabulary: None,
                name: "test".into(),
                progress: &|_, _| {},
            };
            conversion.write(&mut File::create(&to).expect("a file")).expect("a conversion");
            let file = Checkpoint::open(&to).expect("a checkpoint");
            let mut converted = load(&file, &LoadOptions::default()).expect("a model");
            let mut loaded = quantised(&checkpoint, kind).expect("a model");
            let (one, other) = (loaded.description(), converted.description());
            assert_eq!(one.fingerprint, other.fingerprint, "{name} as {kind}");
            assert!(run(&mut loaded, &case) == run(&mut converted, &case), "{name} as {kind}");
        }
    }
}

#[test]
fn every_generation_can_be_quantised() {
    for case in cases(SERVED) {
        let checkpoint = open(&case);
        let whole = load(&checkpoint, &LoadOptions::default()).expect("a model");
        for kind in [Kind::Q8_0, Kind::Q4_0] {
            let mut model = quantised(&checkpoint, kind).unwrap_or_else(|e| panic!("{} as {kind}: {e}", case.name()));
            let (from, to) = (whole.description(), model.description());
            assert!(to.weight_bytes < from.weight_bytes, "{}: {} bytes", case.name(), to.weight_bytes);
            assert_ne!(to.fingerprint, from.fingerprint, "{}", case.name());
            laws::chunks(&mut model, &case.tokens[..20], &[1, 7], &case.name());
        }
    }
}

#[test]
fn what_is_quantised_already_is_not_quantised_once_more() {
    let kinds = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/formats/kinds.gguf");
    let refused = quantised(&Checkpoint::open(kinds.as_ref()).expect("a checkpoint"), Kind::Q8_0).map(|_| ());
    let refused = refused.expect_err("it has every type").to_string();
    assert!(refused.contains("is quantised already, as ") && refused.contains(".weight`"), "{refused}");
    // What has the type already stays what it is.
    let (case, folder) = (case("v7_bf16"), tempfile::tempdir().expect("a folder"));
    let to = folder.path().join("q8.gguf");
    let checkpoint = open(&case);
    let conversion = Conversion {
        checkpoint: &checkpoint,
        format: Format::Gguf,
        kind: Some(Kind::Q8_0),
        vocabulary: None,
        name: "test".into(),
        progress: &|_, _| {},
    };
    conversion.write(&mut File::create(&to).expect("a file")).expect("a conversion");
    let file = Checkpoint::open(&to).expect("a checkpoint");
    let [once, twice] = [LoadOptions::default(), LoadOptions { quantise: Some(Kind::Q8_0), ..LoadOptions::default() }]
        .map(|options| load(&file, &options).expect("a model").description().fingerprint.clone());
    assert_eq!(once, twice);
}
