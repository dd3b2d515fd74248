//! The laws for every type that weights are stored in, and for any number of threads, on models wide enough for all types.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use rewake::model::{Checkpoint, Kind, LoadOptions, Model, Team, load};

use super::vectors::{case, flat};
use super::{laws, quantise};

/// A case's model with rows of 256 values, the block of the widest types, in two layers. Its values are the case's, over and
/// over.
fn wide(name: &str) -> Checkpoint {
    let file = case(name).folder.join("model.safetensors");
    let tensors = candle_core::safetensors::load(file, &Device::Cpu).expect("tensors");
    let widened = |(name, tensor): (String, Tensor)| {
        let shape: Vec<usize> = tensor.dims().iter().map(|&n| widen(n)).collect();
        let matrix = matches!(shape[..], [rows, cols] if rows > 4 && cols > 4);
        let scale = if matrix { 0.7 } else { 1.0 };
        let values = flat(&tensor);
        let values: Vec<f32> = (0..shape.iter().product()).map(|i| scale * values[i % values.len()]).collect();
        (name, Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor"))
    };
    let two_layers = tensors.into_iter().filter(|(name, _)| !name.starts_with("blocks.2."));
    let tensors: HashMap<_, _> = two_layers.map(widened).collect();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    candle_core::safetensors::save(&tensors, &path).expect("a file");
    Checkpoint::open(&path).expect("a checkpoint")
}

/// Twice the width and the heads; of v4, whose width is 96, and of inner layers what makes whole blocks.
fn widen(n: usize) -> usize {
    match n {
        2 => 4,
        96 | 128 => 256,
        256 | 384 | 448 => 512,
        n => n,
    }
}

fn of(checkpoint: &Checkpoint, kind: Kind) -> Model {
    let model = load(checkpoint, &LoadOptions { quantise: Some(kind), ..LoadOptions::default() });
    model.unwrap_or_else(|e| panic!("{kind}: {e}"))
}

/// Any text of so many tokens.
fn text(tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| (i * i * 31 + i * 7) % 320).collect()
}

fn hold(name: &str, tokens: u32, chunks: &[usize]) {
    let checkpoint = wide(name);
    for kind in Kind::ALL {
        let label = format!("{name} as {kind}");
        let mut model = of(&checkpoint, kind);
        assert_eq!(quantise::kinds(&checkpoint, kind), [kind].into(), "{label}: whole blocks everywhere");
        let run = |threads: usize, model: &mut Model, chunks: &[usize]| {
            let team = Team::new(threads).expect("threads");
            team.install(|| laws::chunks(model, &text(tokens), chunks, &label))
        };
        assert!(run(1, &mut model, &[64]) == run(2, &mut model, chunks), "{label}: one thread and two");
        let team = Team::new(2).expect("threads");
        team.install(|| {
            laws::batches(&mut model, &text(40), &label);
            laws::snapshots(&mut model, &text(24), &label);
        });
    }
}

#[test]
fn laws_of_every_type_in_v7() {
    hold("v7_bf16", 520, &[1, 7, 64, 512]);
}

#[test]
fn laws_of_every_type_in_v6() {
    hold("v6_bf16", 70, &[1, 7, 64]);
}

#[test]
fn laws_of_every_type_in_v4() {
    hold("v4_bf16", 70, &[1, 7, 64]);
}
