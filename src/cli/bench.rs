//! `rewake bench`: how fast a model runs here, and how near that is to what the machine can do.

use std::time::Duration;

use anyhow::ensure;
use serde_json::{Value, json};

use super::checkpoint::{Which, print, progress, show};
use crate::model::{Model, Pool, Team, probe, stay_narrow};
use crate::telemetry::clock;
use crate::types::{Row, SeqId, SlotId, Want};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    /// Tokens of the prompt that is read
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65536))]
    prompt: u32,
    /// Tokens that each stream generates
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65536))]
    tokens: u32,
    /// Numbers of streams that generate at once
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "1,16,64")]
    streams: Vec<u32>,
    /// Also a step of one stream that reads a draft of so many tokens: what it brings if all of them are right
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=32))]
    draft: Option<u32>,
    /// Runs of each measurement, of which the median counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Threads that compute [default: one for each processor]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, value_parser = clap::value_parser!(u16).range(0..=1024))]
    threads: u16,
    /// Use nothing newer than AVX2, to measure what a processor without AVX-512 would do
    #[arg(long)]
    avx2: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Tokens read in one step, as the server does.
const STEP: usize = 512;

/// A measurement.
struct Line {
    work: String,
    /// Tokens a second, all streams together: least, median, most.
    speed: [f64; 3],
    /// Share of the read rate and of the peak that the median comes to.
    bandwidth: f64,
    peak: f64,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    if args.avx2 {
        stay_narrow();
    }
    Team::new(args.threads.into())?.install(|| measure(args))
}

fn measure(args: &Args) -> anyhow::Result<()> {
    ensure!(args.streams.iter().all(|n| (1..=4096).contains(n)), "there can be 1 to 4096 streams");
    let opened = args.which.open()?;
    let most = args.streams.iter().copied().max().unwrap_or(1);
    let mut bench = Bench { pool: opened.model.pool(most.max(2) as usize)?, model: opened.model, runs: args.runs };
    let bar = progress("measuring", "runs");
    let all = args.streams.len() + 3 + usize::from(args.draft.is_some());
    let (bandwidth, peak) = machine(args.runs);
    show(&bar, 2, all);
    // What a token takes: every weight but the embedding table, of which one row is looked up.
    let embedding = opened.checkpoint.embedding();
    let bytes = bench.model.description().weight_bytes.saturating_sub(embedding.map_or(0, |(_, bytes)| bytes)) as f64;
    let operations = 2.0 * bench.model.description().parameters.saturating_sub(embedding.map_or(0, |(n, _)| n)) as f64;
    let line = |work, tokens: f64, steps: f64, times: Vec<Duration>| {
        let mut speed = times.iter().map(|time| tokens / time.as_secs_f64()).collect::<Vec<_>>();
        speed.sort_by(f64::total_cmp);
        let median = speed[speed.len() / 2];
        Line {
            work,
            speed: [speed[0], median, speed[speed.len() - 1]],
            bandwidth: median * bytes * steps / tokens / bandwidth,
            peak: median * operations / peak,
        }
    };
    let prompt = args.prompt as usize;
    let steps = prompt.div_ceil(STEP) as f64;
    let times = bench.prefill(prompt)?;
    let mut lines = vec![line(format!("prompt of {prompt}"), prompt as f64, steps, times)];
    // The head is computed after the last token only.
    let head = 2.0 * bench.model.description().vocabulary as f64 * bench.model.description().width as f64;
    lines[0].peak -= lines[0].speed[1] * head * (1.0 - 1.0 / prompt as f64) / peak;
    show(&bar, 3, all);
    for (n, &streams) in args.streams.iter().enumerate() {
        let times = bench.decode(streams as usize, args.tokens as usize)?;
        let work = if streams == 1 { "1 stream".into() } else { format!("{streams} streams") };
        lines.push(line(work, f64::from(streams * args.tokens), f64::from(args.tokens), times));
        show(&bar, n + 4, all);
    }
    if let Some(draft) = args.draft {
        let (read, tokens) = (1 + draft, f64::from((1 + draft) * args.tokens));
        let times = bench.drafted(read as usize, args.tokens as usize)?;
        lines.push(line(format!("1 + draft of {draft}"), tokens, f64::from(args.tokens), times));
        show(&bar, all, all);
    }
    bar.finish_and_clear();
    print(&if args.json { as_json(&lines, bandwidth, peak) } else { as_table(&lines, bandwidth, peak) })
}

/// Bytes and floating point operations a second that the machine comes to.
fn machine(runs: u32) -> (f64, f64) {
    const TASKS: usize = 64;
    let memory = probe::memory(128 << 20);
    let best = |f: &dyn Fn() -> f32| {
        let time = |_| {
            let began = clock::now();
            std::hint::black_box(f());
            clock::now() - began
        };
        (0..runs.max(3)).map(time).min().unwrap_or(Duration::MAX).as_secs_f64()
    };
    let bandwidth = 4.0 * memory.len() as f64 / best(&|| probe::read(&memory));
    (bandwidth, (TASKS * probe::OPERATIONS) as f64 / best(&|| probe::compute(TASKS)))
}

struct Bench {
    model: Model,
    pool: Pool,
    runs: u32,
}

impl Bench {
    /// Reads a prompt, in steps as the server does.
    fn prefill(&mut self, tokens: usize) -> anyhow::Result<Vec<Duration>> {
        let ids = self.ids(tokens);
        let mut times = Vec::new();
        let mut logits = Vec::new();
        // The first run also makes the buffers.
        for _ in 0..=self.runs {
            self.pool.reset(SlotId(0));
            let began = clock::now();
            for (n, chunk) in ids.chunks(STEP).enumerate() {
                let last = (n + 1) * STEP >= tokens;
                let want = if last { Want::Last } else { Want::Nothing };
                let at = (n * STEP) as u64;
                let row = Row { seq: SeqId(0), from: SlotId(0), into: SlotId(0), at, tokens: 0..chunk.len(), want };
                self.model.step(&mut self.pool, chunk, &[row], &mut logits)?;
            }
            times.push(clock::now() - began);
        }
        times.remove(0);
        Ok(times)
    }

    /// Generates with so many streams at once.
    fn decode(&mut self, streams: usize, tokens: usize) -> anyhow::Result<Vec<Duration>> {
        let ids = self.ids(streams);
        let mut times = Vec::new();
        let mut logits = Vec::new();
        for _ in 0..=self.runs {
            (0..streams).for_each(|slot| self.pool.reset(SlotId(slot as u32)));
            let began = clock::now();
            for at in 0..tokens as u64 {
                let row = |n| {
                    let slot = SlotId(n as u32);
                    Row { seq: SeqId(n as u64), from: slot, into: slot, at, tokens: n..n + 1, want: Want::Last }
                };
                let rows: Vec<_> = (0..streams).map(row).collect();
                self.model.step(&mut self.pool, &ids, &rows, &mut logits)?;
            }
            times.push(clock::now() - began);
        }
        times.remove(0);
        Ok(times)
    }

    /// Reads so many tokens in each step from one slot into another, with the logits of all, as the server does a draft.
    fn drafted(&mut self, read: usize, steps: usize) -> anyhow::Result<Vec<Duration>> {
        let ids = self.ids(read);
        let (mut times, mut logits) = (Vec::new(), Vec::new());
        for _ in 0..=self.runs {
            self.pool.reset(SlotId(0));
            let began = clock::now();
            for step in 0..steps {
                let [from, into] = if step % 2 == 0 { [0, 1] } else { [1, 0] }.map(SlotId);
                let at = (step * read) as u64;
                let row = Row { seq: SeqId(0), from, into, at, tokens: 0..read, want: Want::All };
                self.model.step(&mut self.pool, &ids, &[row], &mut logits)?;
            }
            times.push(clock::now() - began);
        }
        times.remove(0);
        Ok(times)
    }

    /// Any ids; what they say does not matter.
    fn ids(&self, count: usize) -> Vec<u32> {
        let vocabulary = self.model.description().vocabulary as u64;
        (0..count as u64).map(|i| (1 + i * 7919 % vocabulary.max(2)) as u32 % vocabulary as u32).collect()
    }
}

fn as_json(lines: &[Line], bandwidth: f64, peak: f64) -> String {
    let line = |line: &Line| {
        json!({
            "work": line.work,
            "tokens_per_second": {"least": line.speed[0], "median": line.speed[1], "most": line.speed[2]},
            "share_of_bandwidth": line.bandwidth,
            "share_of_peak": line.peak,
        })
    };
    let lines: Vec<Value> = lines.iter().map(line).collect();
    let machine = json!({"read_bytes_per_second": bandwidth, "f32_operations_per_second": peak});
    format!("{:#}\n", json!({"machine": machine, "measurements": lines}))
}

fn as_table(lines: &[Line], bandwidth: f64, peak: f64) -> String {
    let mut text = format!(
        "this machine reads {:.1} GB/s and computes {:.0} GFLOP/s in f32\n\n{:<18}{:>10}{:>20}{:>16}{:>10}\n",
        bandwidth / 1e9,
        peak / 1e9,
        "",
        "tokens/s",
        "(least … most)",
        "of bandwidth",
        "of peak"
    );
    for line in lines {
        let [least, median, most] = line.speed;
        text += &format!(
            "{:<18}{median:>10.1}{:>20}{:>15.0}%{:>9.0}%\n",
            line.work,
            format!("({least:.1} … {most:.1})"),
            100.0 * line.bandwidth,
            100.0 * line.peak
        );
    }
    text
}
