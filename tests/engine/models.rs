//! Drafts on real models: not a bit of what is said and kept depends on them.

use std::path::Path;
use std::sync::Arc;

use rewake::engine::{Handle, Job, ModelBackend, Speculation};
use rewake::model::{Checkpoint, LoadOptions, Team, load};
use rewake::text;
use rewake::types::{Memory, Sampling};

use super::{LIMITS, Report, job, on, report, run, submit};

fn engine(case: &str, speculation: Speculation) -> Handle {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(case).join("model.safetensors");
    let model = load(&Checkpoint::open(&path).expect("a checkpoint"), &LoadOptions::default()).expect("a model");
    let team = Arc::new(Team::new(2).expect("threads"));
    let backend = ModelBackend::new(model, LIMITS.seats, team).expect("a pool").speculating(speculation);
    Handle::start(case, backend, text::bytes(), LIMITS).expect("a thread")
}

/// Texts with much and with little in them that repeats, sampled with care and without.
fn jobs(from: Option<&Memory>) -> Vec<Job> {
    let prompts = ["la la la la la la", "a\n\nb\n\na\n\nb\n\na", "The quick brown fox", "121212121212"];
    let job = |(n, prompt): (usize, &&str)| {
        let mut job = job(prompt);
        job.sampling = Sampling { temperature: [0.0, 0.05, 0.9, 0.0][n], seed: n as u64, ..Sampling::default() };
        // Random weights that have few letters repeat themselves.
        job.sampling.logit_bias = vec![(97, 100.0), (98, 100.0), (32, 100.0)];
        (job.keep, job.choices, job.max_tokens) = (n != 2, 1 + n % 2, 40);
        job.stop = [vec![], vec!["b a".into()], vec![], vec!["abb b".into(), "aaab".into()]][n].clone();
        match from {
            Some(memory) => Job { choices: 1, keep: true, ..on(&job, memory.clone(), 30) },
            None => job,
        }
    };
    prompts.iter().enumerate().map(job).collect()
}

fn everything(engine: &Handle) -> Vec<Report> {
    let together = |jobs: Vec<Job>| {
        let running: Vec<_> = jobs.into_iter().map(|job| (job.choices, submit(engine, job))).collect();
        running.into_iter().map(|(choices, events)| report(events, choices)).collect::<Vec<_>>()
    };
    let mut all = together(jobs(None));
    let kept = run(engine, Job { max_tokens: 9, choices: 1, ..jobs(None).remove(0) }).1.expect("kept");
    all.extend(together(jobs(Some(&kept.memory))));
    all
}

#[test]
fn drafts_change_no_bit_of_a_model() {
    let metrics = rewake::telemetry::metrics::install().expect("the process's metrics");
    for case in ["v4_bf16", "v5_2_bf16", "v6_bf16", "v7_bf16", "v7a_bf16", "v8_rc00_bf16"] {
        let [without, with] = [Speculation::Off, Speculation::Always(7)].map(|how| everything(&engine(case, how)));
        assert!(without == with, "{case}");
        let right = format!("rewake_drafted_tokens_accepted_total{{model=\"{case}\"}} ");
        let right = metrics.render().lines().find_map(|line| line.strip_prefix(&right)?.parse::<u64>().ok());
        assert!(right.is_some_and(|right| right > 20), "{case}: {right:?} drafted tokens were right");
    }
}

#[test]
fn a_state_that_grows_is_not_copied_for_a_draft() {
    for case in ["v2_fp32", "v7b_bf16"] {
        let [without, with] = [Speculation::Off, Speculation::Always(7)].map(|how| everything(&engine(case, how)));
        assert!(without == with, "{case}");
    }
}
