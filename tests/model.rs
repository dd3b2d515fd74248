//! The four laws of every generation, on golden vectors of the original code.

#[path = "model/adapters.rs"]
mod adapters;
#[path = "model/early.rs"]
mod early;
#[path = "model/formats.rs"]
mod formats;
#[path = "model/growing.rs"]
mod growing;
#[path = "model/laws.rs"]
mod laws;
#[path = "model/matrix.rs"]
mod matrix;
#[path = "model/naive.rs"]
mod naive;
#[path = "model/optional.rs"]
mod optional;
#[path = "model/quantise.rs"]
mod quantise;
#[path = "model/types.rs"]
mod types;
#[path = "support/vectors.rs"]
mod vectors;

use std::collections::BTreeSet;

use rewake::model::{Checkpoint, LoadOptions, Lora, Model, Pool, load};
use rewake::types::{Row, SegmentData, SeqId, SlotId, Want};
use vectors::{Case, case, cases};

/// Generations that are served, by the `version` of their cases.
const SERVED: &[&str] =
    &["v1", "v2", "v3", "v4", "v5.0", "v5.1", "v5.2", "v6", "v7", "v7a", "v7b", "v8_rc00", "v8_rc00_hybrid"];

/// Runs tokens through one slot, in one step, and gives the logits after each; `at` tokens were read before.
fn read(model: &mut Model, pool: &mut Pool, tokens: &[u32], at: usize, from: u32, into: u32) -> Vec<Vec<f32>> {
    let (from, into) = (SlotId(from), SlotId(into));
    let row = Row { seq: SeqId(0), from, into, at: at as u64, tokens: 0..tokens.len(), want: Want::All };
    steps(model, pool, tokens, &[row])
}

fn steps(model: &mut Model, pool: &mut Pool, ids: &[u32], rows: &[Row]) -> Vec<Vec<f32>> {
    let mut logits = Vec::new();
    model.step(pool, ids, rows, &mut logits).expect("a step");
    logits.chunks(model.description().vocabulary).map(<[f32]>::to_vec).collect()
}

fn models(case: &Case) -> Vec<(String, Model)> {
    let at = |name: &str| case.folder.join(name);
    let mut models = Vec::new();
    for file in ["model.safetensors", "model.pth", "model_with_state.pth", "model_whole_module.pth"] {
        if !at(file).exists() {
            continue;
        }
        let mut checkpoint = Checkpoint::open(&at(file)).expect("a checkpoint");
        if let Some(alpha) = case.json["lora"]["alpha"].as_f64() {
            let lora = Lora::open(&at("lora.safetensors"), Some(alpha as f32)).expect("a LoRA file");
            checkpoint = checkpoint.with_lora(lora).expect("a fitting LoRA");
        }
        let beside = (at("state.safetensors").exists() && file != "model_with_state.pth")
            .then(|| Checkpoint::open(&at("state.safetensors")).expect("a state file"));
        let options = LoadOptions { initial_state: beside.as_ref(), ..LoadOptions::default() };
        models.push((file.to_owned(), load(&checkpoint, &options).expect("a model")));
    }
    assert!(!models.is_empty(), "{} has a model", case.name());
    models
}

fn flat(state: &[SegmentData]) -> Vec<u32> {
    state.iter().flat_map(|s| s.data.iter().map(|v| v.to_bits())).collect()
}

fn bits(logits: &[Vec<f32>]) -> Vec<u32> {
    logits.iter().flatten().map(|v| v.to_bits()).collect()
}

#[test]
fn parity_with_the_original_code() {
    for case in cases(SERVED) {
        for (file, mut model) in models(&case) {
            let name = format!("{}/{file}", case.name());
            let d = model.description().clone();
            assert_eq!(d.generation, case.json["version"], "{name}");
            assert_eq!(d.layers as u64, case.json["n_layer"], "{name}");
            assert_eq!(d.width as u64, case.json["n_embd"], "{name}");
            assert_eq!(d.vocabulary as u64, case.json["vocab_size"], "{name}");

            let mut pool = model.pool(1).expect("a pool");
            pool.reset(SlotId(0));
            let got = read(&mut model, &mut pool, &case.tokens, 0, 0, 0);
            assert_eq!(got.len(), case.logits.len());
            let worst =
                got.iter().flatten().zip(case.logits.iter().flatten()).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
            println!("{name}: largest error {:.2e} of the RMS", worst / case.rms());
            assert!(worst <= 1e-4 * case.rms(), "{name}: {worst} of {}", case.rms());

            let state = pool.snapshot(SlotId(0));
            if d.generation == "v1" {
                assert!(case.states.is_empty(), "{name}: the original code of v1 has no state");
                continue;
            }
            assert_eq!(state.len(), case.states.len(), "{name}");
            for (n, got) in state.iter().enumerate() {
                let want = case.state(n, &got.name);
                assert_eq!(got.data.len(), want.len(), "{name} {}", got.name);
                let worst = got.data.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
                assert!(worst <= 5e-3, "{name} {}: {worst}", got.name);
            }
        }
    }
}

#[test]
fn chunk_law_any_split_of_a_prompt_gives_the_same_bits() {
    for case in cases(SERVED) {
        let (_, mut model) = models(&case).remove(0);
        let whole = laws::read_in(&mut model, &case.tokens, &[]);
        assert!(whole == laws::read_in(&mut model, &case.tokens, &case.chunks), "{} in its chunks", case.name());
        laws::chunks(&mut model, &case.tokens, &[1, 2, 7, 31, 64], &case.name());
    }
}

#[test]
fn batch_law_a_sequence_does_not_feel_its_neighbours() {
    for case in cases(SERVED) {
        laws::batches(&mut models(&case).remove(0).1, &case.tokens, &case.name());
    }
}

#[test]
fn snapshot_law_restoring_a_snapshot_is_the_identity() {
    for case in cases(SERVED) {
        laws::snapshots(&mut models(&case).remove(0).1, &case.tokens, &case.name());
    }
}

#[test]
fn a_foreign_snapshot_is_refused_and_changes_nothing() {
    let case = case("v7_bf16");
    let (_, model) = models(&case).remove(0);
    let mut pool = model.pool(1).expect("a pool");
    pool.reset(SlotId(0));
    let good = pool.snapshot(SlotId(0));
    let mut renamed = good.clone();
    renamed[1].name = "blocks.9.att.wkv".into();
    let mut short = good.clone();
    short[1].data.pop();
    for bad in [Vec::new(), good[1..].to_vec(), renamed, short] {
        assert!(pool.restore(SlotId(0), &bad).is_err());
        assert_eq!(flat(&pool.snapshot(SlotId(0))), flat(&good));
    }
}

#[test]
fn a_step_that_breaks_its_contract_is_refused() {
    let case = case("v7_bf16");
    let (_, mut model) = models(&case).remove(0);
    let mut pool = model.pool(3).expect("a pool");
    let row = |from, into, tokens| Row {
        seq: SeqId(0),
        from: SlotId(from),
        into: SlotId(into),
        at: 0,
        tokens,
        want: Want::Last,
    };
    let cases: [(&[u32], Vec<Row>); 8] = [
        (&[9999], vec![row(0, 0, 0..1)]),
        (&[1], vec![]),
        (&[1], vec![row(0, 7, 0..1)]),
        (&[1], vec![row(7, 0, 0..1)]),
        (&[1, 2], vec![row(0, 0, 0..1), row(1, 0, 1..2)]),
        (&[1, 2], vec![row(0, 0, 0..1), row(0, 1, 1..2)]),
        (&[1, 2], vec![row(0, 0, 1..2)]),
        (&[1, 2], vec![row(0, 0, 0..0), row(1, 1, 0..2)]),
    ];
    for (ids, rows) in cases {
        assert!(model.step(&mut pool, ids, &rows, &mut Vec::new()).is_err(), "{ids:?} {rows:?}");
    }
}

#[test]
fn the_same_weights_have_the_same_fingerprint_in_any_container() {
    for case in [case("v3_ffnpre_fp32"), case("v7_bf16")] {
        let prints: BTreeSet<_> = models(&case).iter().map(|(_, m)| m.description().fingerprint.clone()).collect();
        assert_eq!(prints.len(), 1, "{}", case.name());
    }
    let of = |name: &str| models(&case(name))[0].1.description().fingerprint.clone();
    assert_ne!(of("v7_bf16"), of("v7_lora_bf16"));
}
