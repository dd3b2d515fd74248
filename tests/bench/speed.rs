//! How fast it is: kernels on a real model's shapes, the engine and the states on the embedded model. See `NOTES.md`.

mod synthetic;
mod transcripts;

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rayon::prelude::*;
use rewake::config;
use rewake::engine::{Event, Handle, Job, ModelBackend, Pause, Replay};
use rewake::model::{Checkpoint, LoadOptions, Model, Team, load};
use rewake::scheduler::Limits;
use rewake::state::{Archive, InMemory, Local, Store};
use rewake::text::{self, Tokenizer, Trim};
use rewake::types::{Memory, Row, Sampling, SeqId, SlotId, Snapshot, SnapshotHead, StateId, Tenant, Want};
use tokio::runtime::Runtime;

const WEIGHTS: &[u8] = include_bytes!("../../assets/demo/model.safetensors");
const TOKENIZER: &[u8] = include_bytes!("../../assets/demo/tokenizer.json");

/// Tokens of each stream in a decode measurement.
const TOKENS: u64 = 64;
/// Tokens of new text in a turn.
const NEW: usize = 10;

fn demo() -> Model {
    model(&Checkpoint::in_memory("the embedded model", WEIGHTS).expect("the embedded checkpoint"))
}

fn model(checkpoint: &Checkpoint) -> Model {
    load(checkpoint, &LoadOptions::default()).expect("a model")
}

/// Any ids; what they say does not matter.
fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 1 + i * 7919 % 2000).collect()
}

/// An engine as the server starts it.
fn engine(model: Model, text: Arc<dyn Tokenizer>) -> Handle {
    let config::Engine { seats, queue, budget, busy_budget, threads, .. } = config::Engine::default();
    let team = Team::new(threads).expect("threads");
    let backend = ModelBackend::new(model, seats, Arc::new(team)).expect("a pool");
    Handle::start("bench", backend, text, Limits { seats, queue, budget, busy_budget }).expect("a thread")
}

/// A request that ends by its token limit and nothing else.
fn job(ids: Vec<u32>, max_tokens: u64) -> Job {
    Job {
        tenant: Tenant::local(),
        memory: None,
        ids,
        goes_on: false,
        choices: 1,
        first_choice: 0,
        sampling: Sampling { temperature: 0.7, top_p: 0.9, ..Sampling::default() },
        stop: Vec::new(),
        stop_tokens: Vec::new(),
        trim: Trim::default(),
        max_tokens,
        keep: false,
        pause: Pause::default(),
        replay: Replay::default(),
        checkpoints: None,
    }
}

/// Runs jobs side by side until all are done; gives what was kept of the last one.
fn run(engine: &Handle, jobs: Vec<Job>) -> Option<Memory> {
    let permits = engine.reserve(jobs.len()).expect("room");
    let running: Vec<_> = jobs.into_iter().zip(permits).map(|(job, permit)| engine.submit(job, permit)).collect();
    let mut last = None;
    for mut events in running {
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Text { text, .. } => drop(black_box(text)),
                Event::Done { kept, .. } => last = kept.map(|kept| kept.memory),
                Event::Failed(why) => panic!("{why}"),
            }
        }
    }
    last
}

/// What the machine can do: bytes read in a second by all threads, the bound of decoding.
fn probe(c: &mut Criterion) {
    let memory = vec![1u64; 64 << 20];
    let mut group = c.benchmark_group("machine");
    group.throughput(Throughput::BytesDecimal(8 * memory.len() as u64));
    group.bench_function("read 512 MiB", |b| {
        b.iter(|| {
            memory.par_chunks(1 << 16).map(|part| part.iter().fold(0u64, |s, v| s.wrapping_add(*v))).sum::<u64>()
        });
    });
}

/// One step of a model of 0.1B parameters, in f16: nearly all of it is the linear layers.
///
/// At 1 row the bound is reading the weights (bytes/s), at 512 rows arithmetic (an "element" is a floating point
/// operation).
fn kernels(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut model = synthetic(folder.path());
    let mut pool = model.pool(1).expect("a pool");
    let team = Team::new(0).expect("threads");
    let (layers, head) = synthetic::SMALL.weights();
    let mut group = c.benchmark_group("step of v7 0.1B f16");
    group.sample_size(10);
    for rows in [1, 512] {
        let ids = ids(rows);
        let row = Row { seq: SeqId(0), from: SlotId(0), into: SlotId(0), at: 0, tokens: 0..rows, want: Want::Last };
        group.throughput(match rows {
            1 => Throughput::BytesDecimal(2 * (layers + head) as u64),
            _ => Throughput::Elements(2 * (rows * layers + head) as u64),
        });
        group.bench_function(BenchmarkId::new("rows", rows), |b| {
            pool.reset(SlotId(0));
            let mut logits = Vec::new();
            team.install(|| {
                b.iter(|| {
                    model.step(&mut pool, &ids, std::slice::from_ref(&row), &mut logits).expect("a step");
                });
            });
        });
    }
}

fn synthetic(folder: &Path) -> Model {
    let path = folder.join("model.safetensors");
    synthetic::SMALL.write(&path);
    model(&Checkpoint::open(&path).expect("a checkpoint"))
}

/// Tokens a second through the engine, everything but HTTP included. An "element" is a token.
fn throughput(c: &mut Criterion) {
    let engine = engine(demo(), text::from_json(TOKENIZER).expect("a tokenizer"));
    let mut group = c.benchmark_group("demo");
    group.sample_size(20);
    group.throughput(Throughput::Elements(512));
    group.bench_function("prefill 512", |b| b.iter(|| run(&engine, vec![job(ids(512), 1)])));
    for streams in [1, 16, 64] {
        group.throughput(Throughput::Elements(streams * TOKENS));
        let jobs: Vec<_> = (0..streams).map(|_| job(ids(1), TOKENS)).collect();
        group.bench_function(BenchmarkId::new("decode, streams", streams), |b| b.iter(|| run(&engine, jobs.clone())));
    }
}

/// The stores to compare: a folder, with fsync, and memory.
fn stores(runtime: &Runtime, folder: &Path) -> [(&'static str, Arc<dyn Store>); 2] {
    let local = runtime.block_on(Local::open(folder)).expect("a folder for states");
    [("folder", Arc::new(local)), ("memory", Arc::new(InMemory::default()))]
}

fn snapshot(number: u128, memory: Memory) -> Arc<Snapshot> {
    let head = SnapshotHead {
        id: StateId::new(1_700_000_000_000, number),
        parent: None,
        owner: Tenant::local(),
        model: "bench".into(),
        fingerprint: "none".into(),
        arithmetic: "none".into(),
        session: None,
        record: None,
        turn: 1,
        created: 1_700_000_000,
        expires_at: None,
        metadata: Default::default(),
    };
    Arc::new(Snapshot { head, memory })
}

/// What it costs to keep a state, and to have it back.
fn states(c: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let engine = engine(demo(), text::from_json(TOKENIZER).expect("a tokenizer"));
    let memory = run(&engine, vec![Job { keep: true, ..job(ids(100), 1) }]).expect("kept");
    let mut group = c.benchmark_group("demo state");
    group.sample_size(20);
    for (name, store) in stores(&runtime, folder.path()) {
        let archive = Archive::new(store);
        let mut number = 0;
        group.bench_function(BenchmarkId::new("save in", name), |b| {
            b.iter_custom(|times| {
                let mut spent = Duration::ZERO;
                for _ in 0..times {
                    number += 1;
                    let snapshot = snapshot(number, memory.clone());
                    let began = Instant::now();
                    runtime.block_on(archive.keep(snapshot.clone())).expect("kept");
                    spent += began.elapsed();
                    // Otherwise a store in memory would grow without end.
                    runtime.block_on(archive.remove(&snapshot.head.owner, &snapshot.head.id)).expect("removed");
                }
                spent
            });
        });
        let kept = snapshot(0, memory.clone());
        runtime.block_on(archive.keep(kept.clone())).expect("kept");
        group.bench_function(BenchmarkId::new("load from", name), |b| {
            b.iter(|| runtime.block_on(archive.load(&kept.head.owner, &kept.head.id, 0)).expect("loaded"));
        });
    }
}

/// From a turn's arrival to its first token, when the history comes from a state and when it is read again.
fn turns(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, model, text) in [
        ("demo", demo(), text::from_json(TOKENIZER).expect("a tokenizer")),
        ("v7 0.1B f16", synthetic(folder.path()), text::world()),
    ] {
        first_tokens(c, name, engine(model, text));
    }
}

fn first_tokens(c: &mut Criterion, name: &str, engine: Handle) {
    let runtime = Runtime::new().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let mut group = c.benchmark_group(format!("first token, {name}"));
    group.sample_size(10);
    for history in [100, 1000] {
        let memory = run(&engine, vec![Job { keep: true, ..job(ids(history), 1) }]).expect("kept");
        for (place, store) in stores(&runtime, &folder.path().join(history.to_string())) {
            let archive = Archive::new(store);
            let kept = snapshot(0, memory.clone());
            runtime.block_on(archive.keep(kept.clone())).expect("kept");
            group.bench_function(BenchmarkId::new(format!("resumed from {place}"), history), |b| {
                b.iter(|| {
                    let loaded = runtime.block_on(archive.load(&kept.head.owner, &kept.head.id, 0)).expect("loaded");
                    let memory = loaded.expect("it was kept").memory;
                    let ids = memory.pending.ends.iter().copied().chain(ids(NEW)).collect();
                    run(&engine, vec![Job { memory: Some(Arc::new(memory)), ..job(ids, 1) }])
                });
            });
        }
        group.bench_function(BenchmarkId::new("read again", history), |b| {
            b.iter(|| run(&engine, vec![job(ids(history + NEW), 1)]));
        });
    }
}

criterion_group!(benches, probe, kernels, throughput, states, turns, transcripts::transcripts);
criterion_main!(benches);
