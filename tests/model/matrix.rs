//! v5 and v6 where their golden vectors do not reach: state-tuned files beside a model, files whose shapes contradict
//! themselves.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use rewake::model::{Checkpoint, Error, LoadOptions, load};
use rewake::types::SlotId;

use super::vectors::{Case, case};
use super::{bits, flat, models, read};

fn tensors(case: &Case) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(case.folder.join("model.safetensors"), &Device::Cpu).expect("tensors")
}

/// A checkpoint file of these tensors.
fn file(tensors: &HashMap<String, Tensor>) -> Checkpoint {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    candle_core::safetensors::save(tensors, &path).expect("a file");
    Checkpoint::open(&path).expect("a checkpoint")
}

#[test]
fn a_state_tuned_file_beside_v6_is_the_same_as_one_inside() {
    let case = case("v6_state_bf16");
    let (states, base): (HashMap<_, _>, HashMap<_, _>) =
        tensors(&case).into_iter().partition(|(name, _)| name.ends_with(".time_state"));
    assert_eq!(states.len(), 2);
    let base = file(&base);
    let with = |states: &HashMap<String, Tensor>| {
        let initial_state = Some(&file(states));
        load(&base, &LoadOptions { initial_state, ..LoadOptions::default() })
    };
    let (_, inside) = models(&case).remove(0);
    let runs = [inside, with(&states).expect("a model"), load(&base, &LoadOptions::default()).expect("a model")];
    let [inside, beside, without] = runs.map(|mut model| {
        let mut pool = model.pool(1).expect("a pool");
        pool.reset(SlotId(0));
        let fresh = flat(&pool.snapshot(SlotId(0)));
        (fresh, bits(&read(&mut model, &mut pool, &case.tokens, 0, 0, 0)))
    });
    assert!(inside == beside, "the same state, wherever it is stored");
    assert!(inside != without, "and it matters");

    let first = states.into_iter().filter(|(name, _)| name.starts_with("blocks.0.")).collect();
    let half = with(&first).map(|_| ()).expect_err("layer 1 has no state");
    assert!(matches!(&half, Error::Missing { name, .. } if name == "blocks.1.att.time_state"), "{half}");
}

#[test]
fn v5_has_no_state_tuned_files() {
    let states =
        tensors(&case("v6_state_bf16")).into_iter().filter(|(name, _)| name.ends_with(".time_state")).collect();
    let initial_state = Some(&file(&states));
    let refused = load(&file(&tensors(&case("v5_2_bf16"))), &LoadOptions { initial_state, ..LoadOptions::default() });
    assert!(matches!(refused.map(|_| ()), Err(Error::Unexpected { .. })));
}

#[test]
fn shapes_that_contradict_each_other_are_named() {
    let wrong: [(&str, &str, &[usize]); 9] = [
        ("v5_0_fp16", "time_decay", &[3]),
        ("v5_0_fp16", "time_first", &[4]),
        ("v5_1_bf16", "time_decay", &[0]),
        ("v5_1_bf16", "time_faaaa", &[2, 64]),
        ("v5_2_bf16", "time_decay", &[3, 64]),
        ("v6_bf16", "time_faaaa", &[3, 64]),
        ("v6_bf16", "time_maa_w1", &[128, 161]),
        ("v6_bf16", "time_maa_w1", &[128, 4]),
        ("v6_bf16", "time_maa_w2", &[5, 31, 128]),
    ];
    for (name, tensor, shape) in wrong {
        let mut tensors = tensors(&case(name));
        let tensor = format!("blocks.0.att.{tensor}");
        let other = Tensor::zeros(shape, DType::F32, &Device::Cpu).expect("a tensor");
        assert!(tensors.insert(tensor.clone(), other).is_some(), "{name} has {tensor}");
        let refused = load(&file(&tensors), &LoadOptions::default()).map(|_| ()).expect_err("a contradiction");
        assert!(matches!(&refused, Error::Shape { name, .. } if *name == tensor), "{name} {tensor}: {refused}");
    }
}
