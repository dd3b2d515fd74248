//! v1 to v3 where their golden vectors do not reach: the end of a context, a copy head that looks back less far than the text
//! is long, logs that several rows fork, files with parts more or less.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use rewake::model::{Checkpoint, Error, LoadOptions, Model, load};
use rewake::types::{Row, SegmentData, SeqId, SlotId, Want};

use super::vectors::{Case, case};
use super::{bits, flat, models, read, steps};

/// The case's model after a `change` of its file.
fn altered(case: &Case, change: impl FnOnce(&mut HashMap<String, Tensor>)) -> Result<Model, Error> {
    let mut tensors =
        candle_core::safetensors::load(case.folder.join("model.safetensors"), &Device::Cpu).expect("tensors");
    change(&mut tensors);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    candle_core::safetensors::save(&tensors, &path).expect("a file");
    load(&Checkpoint::open(&path)?, &LoadOptions::default())
}

fn ones(shape: &[usize]) -> Tensor {
    Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu).expect("a tensor")
}

/// The logits after each token, and the state at the end.
pub fn run(model: &mut Model, tokens: &[u32], chunk: usize) -> (Vec<Vec<f32>>, Vec<SegmentData>) {
    let mut pool = model.pool(1).expect("a pool");
    pool.reset(SlotId(0));
    let mut logits = Vec::new();
    for (n, tokens) in tokens.chunks(chunk).enumerate() {
        logits.extend(read(model, &mut pool, tokens, n * chunk, 0, 0));
    }
    (logits, pool.snapshot(SlotId(0)))
}

#[test]
fn a_sequence_of_v1_ends_with_its_context() {
    let case = case("v1_fp32");
    let (_, mut model) = models(&case).remove(0);
    assert_eq!(model.description().context, Some(128));
    let text: Vec<u32> = case.tokens.iter().cycle().take(128).copied().collect();
    let mut pool = model.pool(1).expect("a pool");
    pool.reset(SlotId(0));
    read(&mut model, &mut pool, &text[..127], 0, 0, 0);
    let before = flat(&pool.snapshot(SlotId(0)));
    let row = |at, tokens| Row { seq: SeqId(0), from: SlotId(0), into: SlotId(0), at, tokens, want: Want::Last };
    let refused = model.step(&mut pool, &text[..2], &[row(127, 0..2)], &mut Vec::new());
    assert!(matches!(refused, Err(Error::Context { position: 129, most: 128 })), "{refused:?}");
    assert!(matches!(model.step(&mut pool, &[1], &[row(u64::MAX, 0..1)], &mut Vec::new()), Err(Error::Context { .. })));
    assert_eq!(flat(&pool.snapshot(SlotId(0))), before);
    read(&mut model, &mut pool, &text[127..], 127, 0, 0);
    // A position that is not where the state ends would read another text.
    pool.reset(SlotId(0));
    assert!(matches!(model.step(&mut pool, &[1], &[row(1, 0..1)], &mut Vec::new()), Err(Error::State(..))));
}

#[test]
fn several_rows_fork_one_log() {
    for name in ["v1_fp32", "v3_fp32", "v7b_bf16", "v8_rc00_hybrid_bf16"] {
        let case = case(name);
        let (_, mut model) = models(&case).remove(0);
        let mut pool = model.pool(4).expect("a pool");
        (0..4).for_each(|slot| pool.reset(SlotId(slot)));
        read(&mut model, &mut pool, &case.tokens[..9], 0, 0, 0);
        let parent = flat(&pool.snapshot(SlotId(0)));
        let row = |into: u32, tokens| Row {
            seq: SeqId(into.into()),
            from: SlotId(0),
            into: SlotId(into),
            at: 9,
            tokens,
            want: Want::All,
        };
        // What is left in slot 2 by another sequence is gone.
        read(&mut model, &mut pool, &case.tokens[..4], 0, 2, 2);
        let together = steps(&mut model, &mut pool, &case.tokens[20..27], &[row(1, 0..4), row(2, 4..7)]);
        assert_eq!(flat(&pool.snapshot(SlotId(0))), parent);
        for (into, tokens) in [(1, 0..4), (2, 4..7)] {
            let alone = read(&mut model, &mut pool, &case.tokens[20 + tokens.start..20 + tokens.end], 9, 0, 3);
            assert!(bits(&alone) == bits(&together[tokens]), "{name} slot {into}");
            assert_eq!(flat(&pool.snapshot(SlotId(into))), flat(&pool.snapshot(SlotId(3))), "{name} slot {into}");
        }
    }
}

#[test]
fn a_copy_head_looks_back_over_its_window_only() {
    const WINDOW: usize = 16;
    for name in ["v2_fp32", "v3_fp32"] {
        let case = case(name);
        // With query and key alike, the keys of the state are the queries as well, and the scores follow from them.
        let alike = |tensors: &mut HashMap<String, Tensor>| {
            tensors.insert("head_q.weight".into(), tensors["head_k.weight"].clone());
        };
        let mut whole = altered(&case, alike).expect("a model");
        let mut short = altered(&case, |tensors| {
            alike(tensors);
            tensors.insert("copy_mask".into(), ones(&[WINDOW, WINDOW]));
        })
        .expect("a model");
        assert_eq!(short.description().context, None, "{name}: only the copy head has a limit");

        let tokens = &case.tokens;
        let (mut want, state) = run(&mut whole, tokens, tokens.len());
        let keys: Vec<&[f32]> = state.last().expect("the copy head's").data.chunks(257).collect();
        assert_eq!(keys.len(), tokens.len(), "{name}");
        for (t, logits) in want.iter_mut().enumerate() {
            for u in 0..(t + 1).saturating_sub(WINDOW) {
                let score = |i: usize| keys[t][i] * keys[u][i];
                logits[tokens[u] as usize] -= (0..256).map(score).sum::<f32>() / 256.0;
            }
        }
        let (got, state) = run(&mut short, tokens, tokens.len());
        let worst = got.iter().flatten().zip(want.iter().flatten()).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
        assert!(worst < 1e-4, "{name}: {worst}");
        let (log, kept) = (state.last().expect("the copy head's"), &keys[tokens.len() - WINDOW..]);
        assert_eq!((log.shape.as_slice(), log.data.as_slice()), ([WINDOW, 257].as_slice(), kept.concat().as_slice()));

        for chunk in [1, 7, WINDOW, 31] {
            let other = run(&mut short, tokens, chunk);
            assert!(bits(&other.0) == bits(&got), "{name} in chunks of {chunk}");
            assert_eq!(flat(&other.1), flat(&state), "{name} in chunks of {chunk}");
        }
    }
}

#[test]
fn a_log_with_a_token_that_does_not_exist_is_refused() {
    let case = case("v2_fp32");
    let (_, mut model) = models(&case).remove(0);
    let mut pool = model.pool(1).expect("a pool");
    pool.reset(SlotId(0));
    read(&mut model, &mut pool, &case.tokens[..3], 0, 0, 0);
    let good = pool.snapshot(SlotId(0));
    let row = Row { seq: SeqId(0), from: SlotId(0), into: SlotId(0), at: 3, tokens: 0..1, want: Want::Last };
    for id in [300.0, -1.0, f32::NAN] {
        let mut bad = good.clone();
        *bad.last_mut().expect("the copy head's").data.last_mut().expect("an id") = id;
        pool.restore(SlotId(0), &bad).expect("the shape is right");
        let refused = model.step(&mut pool, &[1], std::slice::from_ref(&row), &mut Vec::new());
        assert!(matches!(refused, Err(Error::State(..))), "{id}: {refused:?}");
    }
}

#[test]
fn v3_without_a_copy_head_is_v3_with_one_that_says_nothing() {
    let case = case("v3_fp32");
    let silent = |tensors: &mut HashMap<String, Tensor>| {
        let zeros = tensors["head_q.weight"].zeros_like().expect("zeros");
        tensors.insert("head_q.weight".into(), zeros);
    };
    let without = |tensors: &mut HashMap<String, Tensor>| {
        ["head_q.weight", "head_k.weight", "copy_mask"].iter().for_each(|name| drop(tensors.remove(*name)));
    };
    let (want, state) = run(&mut altered(&case, silent).expect("a model"), &case.tokens, 100);
    let (got, short_state) = run(&mut altered(&case, without).expect("a model"), &case.tokens, 100);
    assert!(got == want);
    assert!(short_state == state[..state.len() - 1]);
}

#[test]
fn parts_that_are_unknown_or_missing_are_named() {
    let refusal = |case: &Case, change: &dyn Fn(&mut HashMap<String, Tensor>)| match altered(case, change) {
        Ok(model) => panic!("{} was loaded", model.description().generation),
        Err(e) => e.to_string(),
    };
    let v1 = case("v1_fp32");
    let other = "blocks.1.attn.head_mix.weight";
    let message = refusal(&v1, &|tensors| drop(tensors.insert(other.into(), ones(&[4, 4, 1, 1]))));
    assert!(message.contains("no part of a v1 model") && message.contains(other), "{message}");
    let tiny = "blocks.1.attn.tiny_att.qkv.weight";
    let message = refusal(&v1, &|tensors| drop(tensors.insert(tiny.into(), ones(&[48, 64]))));
    assert!(message.contains("`blocks.1.attn.tiny_att.qkv.bias` is missing"), "{message}");
    let message = refusal(&v1, &|tensors| drop(tensors.insert(tiny.into(), ones(&[47, 64]))));
    assert!(message.contains(&format!("`{tiny}` has shape [47, 64]")), "{message}");
    for name in ["time_out", "head_q.bias", "blocks.2.attn.time_gamma", "copy_mask"] {
        let message = refusal(&v1, &|tensors| drop(tensors.remove(name)));
        assert!(message.contains(&format!("`{name}` is missing")), "{message}");
    }
    let message = refusal(&v1, &|tensors| drop(tensors.insert("copy_mask".into(), ones(&[64, 64]))));
    assert!(message.contains("has shape"), "{message}");
    let message = refusal(&case("v2_fp32"), &|tensors| drop(tensors.insert("copy_mask".into(), ones(&[64, 32]))));
    assert!(message.contains("`copy_mask` has shape"), "{message}");
}
