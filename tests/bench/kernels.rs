//! Each kernel beside the two limits of this machine: how fast memory is read, and how fast f32 is multiplied and added. See `NOTES.md`.
//!
//! Both are measured first, by the same threads. Behind each measurement stands what part of either it comes to; quantised weights
//! are multiplied as integers, which processors with dot products do faster than f32, so they may come to more than the peak.

#![allow(
    dead_code,
    unused_imports,
    reason = "the kernels are compiled into this program, and it does not run all of them"
)]

#[path = "../../src/types/mod.rs"]
mod types;

#[path = "../../src/model"]
mod model {
    pub mod kernels;
    pub use rewake::model::Error;
}

use std::hint::black_box;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, criterion_group, criterion_main};
use model::kernels::{
    BURN_OPERATIONS, HeadInputs, HeadParams, Kind, Panels, Shape, Team, Weight, burn, layer_norm, matmul, read_sum,
    token_shift, wkv7_head,
};
use rewake::sample::{Counts, sample};
use rewake::types::Sampling;

/// Of RWKV-7 0.1B.
const WIDTH: usize = 768;
const HIDDEN: usize = 3072;
const HEAD: usize = 64;
const VOCABULARY: usize = 65_536;
/// Bytes that no cache holds.
const MEMORY: usize = 160 << 20;

/// What one pass of a kernel reads and computes at least.
#[derive(Clone, Copy)]
struct Work {
    bytes: usize,
    operations: usize,
}

/// The threads and what they can do at most, in a second.
struct Machine {
    team: Team,
    read: f64,
    peak: f64,
}

impl Machine {
    fn new() -> Self {
        const TASKS: usize = 64;
        let team = Team::new(0).expect("threads");
        let memory = vec![1f32; MEMORY / 4];
        let best = |task: &(dyn Fn(usize) + Sync)| {
            let time = |_| {
                let began = Instant::now();
                team.share(TASKS, task);
                began.elapsed()
            };
            (0..5).map(time).min().unwrap_or(Duration::MAX).as_secs_f64()
        };
        let part = memory.len() / TASKS;
        let read = MEMORY as f64 / best(&|n| _ = black_box(read_sum(&memory[n * part..][..part])));
        let peak = (TASKS * BURN_OPERATIONS) as f64 / best(&|_| burn(black_box(&mut [0f32])));
        println!("this machine reads {:.1} GB/s and computes {:.0} GFLOP/s in f32", read / 1e9, peak / 1e9);
        Self { team, read, peak }
    }

    /// Measures `pass`, and says what part of the limits it comes to.
    fn measure(&self, group: &mut BenchmarkGroup<'_, WallTime>, id: BenchmarkId, work: Work, mut pass: impl FnMut()) {
        let mut times = Vec::new();
        group.bench_function(id, |b| {
            b.iter_custom(|count| {
                let began = Instant::now();
                (0..count).for_each(|_| pass());
                let took = began.elapsed();
                times.push(took.as_secs_f64() / count as f64);
                took
            });
        });
        times.sort_by(f64::total_cmp);
        if let Some(median) = times.get(times.len() / 2) {
            let (bytes, operations) = (work.bytes as f64 / median, work.operations as f64 / median);
            println!(
                "    {:.1} GB/s, {:.0} % of the read rate; {:.0} GFLOP/s, {:.0} % of the f32 peak",
                bytes / 1e9,
                100.0 * bytes / self.read,
                operations / 1e9,
                100.0 * operations / self.peak
            );
        }
    }
}

fn group<'c>(c: &'c mut Criterion, name: &str) -> BenchmarkGroup<'c, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    group
}

/// Numbers between -1 and 1.
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Any bytes, as weights of that kind; small ones, as every byte pair that may be a scale is a small f16.
fn weights(kind: Kind, shape: [usize; 2]) -> Weight<'static> {
    let count = shape[0] * shape[1];
    if kind == Kind::F32 {
        return Weight::from_f32(&shape, &values(count, 1));
    }
    let bytes = count / kind.block() * kind.block_bytes();
    let any = values(bytes / 2, 1).into_iter().flat_map(|v| [(v * 127.0) as i8 as u8, 0x20]).collect::<Vec<_>>();
    Weight::new(kind, &shape, any).expect("whole blocks")
}

/// Products of a matrix and few rows, from memory, and many rows, from the caches.
fn products(c: &mut Criterion) {
    let machine = Machine::new();
    let mut group = group(c, "linear");
    for kind in Kind::ALL {
        let source = weights(kind, [HIDDEN, WIDTH]);
        let bytes = source.bytes().len();
        let packed: Vec<_> =
            (0..MEMORY / bytes + 1).map(|_| Panels::pack_rows(&source, Shape::new(HIDDEN, WIDTH))).collect();
        for rows in [1, 16, 64, 512] {
            let matrices = if rows <= 16 { &packed[..] } else { &packed[..4] };
            let (x, mut out) = (values(rows * WIDTH, 2), vec![0f32; rows * HIDDEN]);
            let operations = 2 * rows * HIDDEN * WIDTH;
            let work = Work { bytes: matrices.len() * bytes, operations: matrices.len() * operations };
            machine.measure(&mut group, BenchmarkId::new(kind.name(), rows), work, || {
                machine.team.install(|| matrices.iter().for_each(|w| matmul(w, &x, &mut out)));
            });
        }
    }
}

/// RWKV-7's recurrence with all that belongs to it, of sequences that each read so many tokens.
fn recurrence(c: &mut Criterion) {
    let machine = Machine::new();
    let mut group = group(c, "wkv7");
    let p: Vec<_> = (0..8).map(|n| values(HEAD, n)).collect();
    let params = HeadParams {
        w0: &p[0],
        a0: &p[1],
        v0: &p[2],
        k_k: &p[3],
        k_a: &p[4],
        r_k: &p[5],
        ln_x_weight: &p[6],
        ln_x_bias: &p[7],
        eps: 64e-5,
    };
    for (sequences, tokens) in [(1, 1), (16, 1), (64, 1), (1, 16), (1, 512)] {
        // As many layers as no cache holds, of which a pass goes through one after the other.
        let heads = sequences * WIDTH / HEAD * 12;
        let state = || Mutex::new((vec![0f32; HEAD * HEAD], vec![0f32; tokens * HEAD]));
        let states: Vec<_> = (0..heads).map(|_| state()).collect();
        let x: Vec<_> = (0..8).map(|n| values(tokens * HEAD, 10 + n)).collect();
        let state_bytes = 2 * 4 * HEAD * HEAD;
        // Of each element of the state: decayed, two products added to it, and two sums it is part of.
        let work = Work { bytes: heads * state_bytes, operations: heads * tokens * 9 * HEAD * HEAD };
        let id = BenchmarkId::new(format!("{sequences} sequences"), tokens);
        machine.measure(&mut group, id, work, || {
            machine.team.share(heads, &|head| {
                let mut own = states[head].lock().expect("no task fails");
                let (state, out) = &mut *own;
                let mut outs = out.chunks_mut(HEAD);
                let outs = Mutex::new(&mut outs);
                wkv7_head(tokens, &params, state, |t| {
                    let part = |n: usize| &x[n][t * HEAD..][..HEAD];
                    let first_value = Some((part(6), part(7)));
                    let (r, k, v) = (part(0), part(1), part(2));
                    let inputs = HeadInputs { r, k, v, w: part(3), a: part(4), g: part(5), first_value };
                    (inputs, outs.lock().expect("one thread").next().expect("one for each token"))
                });
            });
        });
    }
}

/// What reads and writes activations and computes little.
fn elementwise(c: &mut Criterion) {
    let machine = Machine::new();
    let mut group = group(c, "norm and mix");
    let (weight, bias, mixes) = (values(WIDTH, 1), values(WIDTH, 2), values(6 * WIDTH, 3));
    for rows in [1, 16, 512] {
        let x = values(rows * WIDTH, 4);
        let mut out = vec![0f32; 6 * rows * WIDTH];
        let work = Work { bytes: 4 * 2 * rows * WIDTH, operations: 8 * rows * WIDTH };
        machine.measure(&mut group, BenchmarkId::new("layer norm", rows), work, || {
            machine.team.install(|| layer_norm(&x, &weight, &bias, 1e-5, &mut out[..rows * WIDTH]));
        });
        let work = Work { bytes: 4 * 7 * rows * WIDTH, operations: 6 * 3 * rows * WIDTH };
        machine.measure(&mut group, BenchmarkId::new("six mixes", rows), work, || {
            let previous = |row: usize| &x[row.saturating_sub(1) * WIDTH..][..WIDTH];
            machine.team.install(|| token_shift(&x, &mixes, WIDTH, &previous, &mut out));
        });
    }
}

/// The next tokens of 64 sequences.
fn sampling(c: &mut Criterion) {
    const ROWS: usize = 64;
    let machine = Machine::new();
    let mut group = group(c, "sample 64 rows");
    // Sums of such numbers are near to a bell, as logits are.
    let parts: Vec<_> = (0..6).map(|n| values(ROWS * VOCABULARY, n)).collect();
    let logits = (0..ROWS * VOCABULARY).map(|at| 3.0 * parts.iter().map(|part| part[at]).sum::<f32>());
    let rows: Vec<_> = logits.collect::<Vec<_>>().chunks(VOCABULARY).map(|row| Mutex::new(row.to_vec())).collect();
    let plain = Sampling { temperature: 1.0, top_p: 1.0, ..Sampling::default() };
    for (name, params) in [
        ("greedy", Sampling { temperature: 0.0, ..plain.clone() }),
        ("temperature", plain.clone()),
        ("top_p 0.9", Sampling { top_p: 0.9, ..plain.clone() }),
        ("top_p 0.3", Sampling { top_p: 0.3, ..plain.clone() }),
        ("top_k 40, top_p 0.95, min_p 0.05", Sampling { top_k: 40, top_p: 0.95, min_p: 0.05, ..plain }),
    ] {
        let work = Work { bytes: 4 * ROWS * VOCABULARY, operations: ROWS * VOCABULARY };
        machine.measure(&mut group, BenchmarkId::from_parameter(name), work, || {
            machine.team.share(ROWS, &|row| {
                let coin = row as f64 / ROWS as f64;
                let mut logits = rows[row].lock().expect("no task fails");
                black_box(sample(&mut logits, &params, &Counts::new(), &[], coin).expect("a token"));
            });
        });
    }
}

criterion_group!(benches, products, recurrence, elementwise, sampling);
criterion_main!(benches);
