//! The loop: whatever else runs, wherever a response is cut, its text is the same.

#[path = "engine/models.rs"]
mod models;
#[path = "support/toy.rs"]
mod toy;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use rewake::engine::{Checkpoint, Checkpoints, Event, Handle, Job, Kept, Pause, Replay, Speculation};
use rewake::scheduler::Limits;
use rewake::text::{self, Trim};
use rewake::types::{Finish, Memory, Sampling, SegmentData, Tenant};
use tokio::sync::mpsc::UnboundedReceiver;
use toy::{Failure, Toy};

const LIMITS: Limits = Limits { seats: 8, queue: 200, budget: 16, busy_budget: 5 };

fn engine(toy: Toy) -> Handle {
    Handle::start("toy", toy, text::bytes(), LIMITS).expect("a thread")
}

fn toy() -> Toy {
    Toy::new(2 * LIMITS.seats)
}

/// A toy with few states, whose text often repeats itself, and which may draft.
fn repetitive(states: u32, drafts: usize) -> Toy {
    let speculation = if drafts == 0 { Speculation::Off } else { Speculation::Always(drafts) };
    Toy { states: states as f32, speculation, ..toy() }
}

fn job(prompt: &str) -> Job {
    Job {
        tenant: Tenant::local(),
        memory: None,
        ids: prompt.bytes().map(u32::from).collect(),
        goes_on: false,
        choices: 1,
        first_choice: 0,
        sampling: Sampling { temperature: 1.0, seed: 7, ..Sampling::default() },
        stop: Vec::new(),
        stop_tokens: vec![256],
        trim: Trim::default(),
        max_tokens: 40,
        keep: false,
        checkpoints: None,
        pause: Pause::default(),
        replay: Replay::default(),
    }
}

#[derive(Debug, PartialEq)]
struct Answer {
    text: String,
    finish: Finish,
    sampled: u64,
}

fn submit(engine: &Handle, job: Job) -> UnboundedReceiver<Event> {
    let permit = engine.reserve(1).expect("room").remove(0);
    engine.submit(job, permit)
}

/// All choices of a job, and what was kept of each.
fn collect(mut events: UnboundedReceiver<Event>, choices: usize) -> Result<Vec<(Answer, Option<Kept>)>, String> {
    let mut texts = vec![String::new(); choices];
    let mut answers: Vec<_> = (0..choices).map(|_| None).collect();
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Text { choice, text, .. } => {
                assert!(!text.is_empty() && answers[choice].is_none());
                texts[choice].push_str(&text);
            }
            Event::Done { choice, finish, sampled, kept } => {
                let text = std::mem::take(&mut texts[choice]);
                answers[choice] = Some((Answer { text, finish, sampled }, kept.map(|k| *k)));
            }
            Event::Failed(why) => return Err(why.to_string()),
        }
    }
    Ok(answers.into_iter().map(|a| a.expect("every choice ends")).collect())
}

fn run(engine: &Handle, job: Job) -> (Answer, Option<Kept>) {
    let choices = job.choices;
    collect(submit(engine, job), choices).expect("an answer").remove(0)
}

/// The same response going on from what was kept of it.
fn on(base: &Job, memory: Memory, max_tokens: u64) -> Job {
    Job {
        ids: memory.pending.goes_on.clone(),
        memory: Some(Arc::new(memory)),
        goes_on: true,
        max_tokens,
        ..base.clone()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_response_cut_anywhere_goes_on_as_if_it_had_not_been(
        prompt in "[ab]{1,40}", seed: u64, temperature in prop_oneof![Just(0.0f32), Just(0.7), Just(1.0)],
        cuts in proptest::collection::vec(1u64..9, 1..8),
        stops in proptest::collection::vec(prop_oneof!["\n\n", "ab\n", " U", "aé", "\u{20ac}"], 0..3),
        start: bool, end: bool, penalties: bool, drafts in 0usize..5, few: bool,
    ) {
        let engine = engine(repetitive(if few { 17 } else { 65_521 }, drafts));
        let mut base = job(&prompt);
        base.sampling = Sampling { temperature, seed, ..base.sampling };
        if penalties {
            base.sampling = Sampling {
                presence_penalty: 0.3, frequency_penalty: 0.2, penalty_decay: 0.9, repetition_penalty: 1.1, ..base.sampling
            };
        }
        base.stop = stops;
        base.trim = Trim { start, end };
        base.max_tokens = cuts.iter().sum();
        base.keep = true;
        let (whole, kept_whole) = run(&engine, base.clone());
        let kept_whole = kept_whole.expect("kept");

        let mut ids: Vec<u32> = base.ids.clone();
        let (mut text, mut sampled, mut memory) = (String::new(), 0, None);
        for (i, &n) in cuts.iter().enumerate() {
            let next = match memory.take() {
                None => Job { max_tokens: n, ..base.clone() },
                Some(memory) => on(&base, memory, n),
            };
            let parent_ends = next.memory.as_ref().map_or(0, |m| m.pending.ends.len());
            let goes_on = next.goes_on;
            let (answer, kept) = run(&engine, next);
            let kept = kept.expect("kept");
            // The log: what the job's ids replace is what was pending.
            if goes_on {
                ids.truncate(ids.len() - parent_ends);
            } else {
                ids.clear();
            }
            ids.extend(&kept.ids);
            prop_assert_eq!(kept.memory.tokens(), ids.len() as u64);
            text.push_str(&answer.text);
            sampled += answer.sampled;
            memory = Some(kept.memory);
            if answer.finish == Finish::Stop {
                prop_assert_eq!(whole.finish, Finish::Stop);
                break;
            }
            if i + 1 == cuts.len() {
                prop_assert_eq!(whole.finish, Finish::Length);
            }
        }
        prop_assert_eq!(&text, &whole.text);
        prop_assert_eq!(sampled, whole.sampled);
        prop_assert_eq!(&ids, &kept_whole.ids);
        let memory = memory.expect("kept");
        prop_assert_eq!(memory.tokens(), kept_whole.memory.tokens());
        // Both go on in the same way, with new text and without.
        for new in ["", "U: x"] {
            let go = |memory: &Memory| {
                let mut next = on(&base, memory.clone(), 9);
                if !new.is_empty() {
                    next.goes_on = false;
                    next.ids = memory.pending.ends.iter().copied().chain(new.bytes().map(u32::from)).collect();
                }
                run(&engine, next).0
            };
            prop_assert_eq!(go(&memory), go(&kept_whole.memory));
        }
    }

    #[test]
    fn a_turn_from_a_kept_state_equals_the_one_shot_request_over_the_same_ids(
        prompt in "[ab]{1,40}", new in "[abU:]{1,30}", seed: u64, max in 1u64..20,
        stops in proptest::collection::vec(prop_oneof!["\n\n", "ab\n", " U", "aé"], 0..3), end: bool,
        drafts in 0usize..5,
    ) {
        let engine = engine(repetitive(17, drafts));
        let mut first = job(&prompt);
        first.sampling.seed = seed;
        first.sampling.repetition_penalty = 1.2;
        first.stop = stops;
        first.trim = Trim { start: false, end };
        first.max_tokens = max;
        first.keep = true;
        let (answer, kept) = run(&engine, first.clone());
        let kept = kept.expect("kept");
        // The kept sequence is the prompt and exactly the text that was received.
        let bytes = text::bytes().decode(&kept.ids);
        prop_assert_eq!(String::from_utf8_lossy(&bytes), format!("{prompt}{}", answer.text));

        let suffix = new.bytes().map(u32::from);
        let turn = Job {
            ids: kept.memory.pending.ends.iter().copied().chain(suffix.clone()).collect(),
            memory: Some(Arc::new(kept.memory)),
            ..first.clone()
        };
        let one_shot = Job { ids: kept.ids.iter().copied().chain(suffix).collect(), ..first };
        let (turn, after_turn) = run(&engine, turn);
        let (one_shot, after_one_shot) = run(&engine, one_shot);
        prop_assert_eq!(turn, one_shot);
        let (a, b) = (after_turn.expect("kept").memory, after_one_shot.expect("kept").memory);
        prop_assert_eq!(a, b);
    }
}

/// Everything a job reports: the text of each choice in the pieces in which it came, how it ended, what was kept.
type Report = Vec<(Vec<String>, Option<(Finish, u64, Option<(Memory, Vec<u32>)>)>)>;

fn report(mut events: UnboundedReceiver<Event>, choices: usize) -> Report {
    let mut report: Report = vec![(Vec::new(), None); choices];
    while let Some(event) = events.blocking_recv() {
        match event {
            Event::Text { choice, text, .. } => report[choice].0.push(text),
            Event::Done { choice, finish, sampled, kept } => {
                report[choice].1 = Some((finish, sampled, kept.map(|kept| (kept.memory, kept.ids))));
            }
            Event::Failed(why) => panic!("{why}"),
        }
    }
    report
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn drafts_change_nothing(
        prompts in proptest::collection::vec("[ab]{1,40}|(ab|b aé\n){1,9}", 1..4), seed: u64, states in 2u32..40,
        temperature in prop_oneof![Just(0.0f32), Just(0.2), Just(0.7), Just(1.0)],
        stops in proptest::collection::vec(prop_oneof!["\n\n", "ab\n", " U", "aé", "ba", "b ", "\u{20ac}"], 0..4),
        start: bool, end: bool, penalties: bool, keep: bool, choices in 1usize..4, max in 1u64..60, drafts in 1usize..9,
        ended: bool, cut in 1u64..9,
    ) {
        let jobs = |from: Option<&Memory>| -> Vec<Job> {
            prompts.iter().enumerate().map(|(n, prompt)| {
                let mut job = job(prompt);
                job.sampling = Sampling { temperature, seed: seed.wrapping_add(n as u64), ..job.sampling };
                if penalties {
                    job.sampling = Sampling {
                        presence_penalty: 0.3, frequency_penalty: 0.2, penalty_decay: 0.9, repetition_penalty: 1.1,
                        top_k: 5, top_p: 0.95, min_p: 0.01, logit_bias: vec![(97, 1.5), (98, -0.5)], ..job.sampling
                    };
                }
                job.stop = stops.clone();
                job.trim = Trim { start, end };
                (job.keep, job.choices, job.max_tokens) = (keep, choices, max);
                match from {
                    Some(memory) => Job { choices: 1, keep: true, ..on(&job, memory.clone(), max) },
                    None => job,
                }
            }).collect()
        };
        let all = |toy: Toy| {
            let toy = Toy { end: ended.then_some(256), ..toy };
            let engine = engine(toy);
            let together = |jobs: Vec<Job>| -> Vec<Report> {
                let running: Vec<_> = jobs.into_iter().map(|job| (job.choices, submit(&engine, job))).collect();
                running.into_iter().map(|(choices, events)| report(events, choices)).collect()
            };
            let first = together(jobs(None));
            // And from a response that was cut anywhere.
            let cut = Job { choices: 1, keep: true, max_tokens: cut, ..jobs(None).remove(0) };
            let (answer, kept) = run(&engine, cut);
            let rest = together(jobs(Some(&kept.expect("kept").memory)));
            (first, answer, rest)
        };
        let (without, with) = (all(repetitive(states, 0)), all(repetitive(states, drafts)));
        prop_assert_eq!(&without.0, &with.0);
        prop_assert_eq!(&without.1, &with.1);
        prop_assert_eq!(&without.2, &with.2);
    }
}

#[test]
fn right_drafts_save_steps() {
    let steps = |toy: Toy| {
        let (steps, engine) = (toy.steps.clone(), engine(Toy { end: None, ..toy }));
        let mut greedy = job("ab");
        greedy.sampling.temperature = 0.0;
        (greedy.max_tokens, greedy.keep) = (200, true);
        let (answer, _) = run(&engine, greedy);
        assert_eq!(answer.sampled, 200);
        steps.load(Ordering::SeqCst)
    };
    assert_eq!(steps(repetitive(17, 0)), 200);
    let with = steps(repetitive(17, 7));
    assert!(with < 60, "{with} steps");
    // What drafts are worth is known only by the clock; whether they are run or not, this ends.
    assert!(steps(Toy { speculation: Speculation::UpTo(7), ..repetitive(17, 0) }) <= 220);
}

/// A job of which states on the way are wanted, and where they will be.
fn watched(job: Job, at: Vec<usize>, answers: bool) -> (Job, Arc<Mutex<Vec<Checkpoint>>>) {
    let seen = Arc::<Mutex<Vec<Checkpoint>>>::default();
    let to = seen.clone();
    let to = Arc::new(move |checkpoint| to.lock().expect("no panic").push(checkpoint));
    (Job { checkpoints: Some(Checkpoints { at, answers, to }), ..job }, seen)
}

/// The state that has read exactly `ids`.
fn state_after(engine: &Handle, ids: Vec<u32>) -> Vec<SegmentData> {
    let at = vec![ids.len()];
    let (job, seen) = watched(Job { ids, max_tokens: 1, ..job("") }, at, false);
    run(engine, job);
    seen.lock().expect("no panic").remove(0).segments
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn states_on_the_way_have_read_what_they_say(
        prompt in "[ab]{1,60}", at in proptest::collection::btree_set(1usize..60, 0..8), seed: u64, choices in 1usize..4,
        stops in proptest::collection::vec(prop_oneof!["\n\n", "ab\n", " U", "aé", "\u{20ac}"], 0..3),
        start: bool, end: bool, keep: bool, max_tokens in 1u64..30, drafts in 0usize..5, spare in 0usize..5,
    ) {
        // In slots to spare, states are left in the middle of a step.
        let slots = [repetitive(37, drafts).memory, vec![f32::NAN; spare]].concat();
        let engine = engine(Toy { memory: slots, ..repetitive(37, drafts) });
        let mut plain = job(&prompt);
        plain.sampling.seed = seed;
        (plain.stop, plain.trim) = (stops, Trim { start, end });
        (plain.choices, plain.keep, plain.max_tokens) = (choices, keep, max_tokens);
        let at: Vec<usize> = at.into_iter().filter(|&at| at <= prompt.len()).collect();
        let (wanted, seen) = watched(plain.clone(), at.clone(), true);
        let answers = |job: Job| -> Vec<_> {
            let all = collect(submit(&engine, job), choices).expect("answers").into_iter();
            all.map(|(answer, kept)| (answer, kept.map(|kept| (kept.ids, kept.memory)))).collect()
        };
        let with = answers(wanted);
        prop_assert_eq!(&with, &answers(plain.clone()));

        let seen = std::mem::take(&mut *seen.lock().expect("no panic"));
        prop_assert_eq!(seen.len(), at.len() + choices);
        let whole = vec![prompt.len(); choices];
        prop_assert_eq!(seen.iter().map(|c| c.read).collect::<Vec<_>>(), [at, whole].concat());
        for Checkpoint { read, answer, segments } in seen {
            let ids = [&plain.ids[..read], &answer].concat();
            prop_assert_eq!(segments, state_after(&engine, ids));
            // Somebody received it; what it ends with may be the beginning of a character.
            let said = String::from_utf8_lossy(&text::bytes().decode(&answer)).trim_start().to_owned();
            let heard = with.iter().any(|(answer, _)| answer.text.trim_start().starts_with(said.trim_end_matches('\u{fffd}')));
            prop_assert!(heard, "{:?} of {:?}", said, with);
        }
    }

    #[test]
    fn a_job_goes_on_from_any_state_on_its_way(prompt in "[ab]{2,60}", at in any::<prop::sample::Index>(), seed: u64) {
        let engine = engine(toy());
        let mut whole = job(&prompt);
        whole.sampling = Sampling { seed, repetition_penalty: 1.3, ..whole.sampling };
        whole.keep = true;
        let at = 1 + at.index(prompt.len() - 1);
        let (ids, tail) = (whole.ids[at..].to_vec(), whole.ids[..at].to_vec());
        let segments = state_after(&engine, tail.clone());
        let memory = Memory { segments, consumed: at as u64, tail, ..Memory::default() };
        let (a, b) = (run(&engine, Job { ids, memory: Some(Arc::new(memory)), ..whole.clone() }), run(&engine, whole));
        prop_assert_eq!((a.0, a.1.expect("kept").memory), (b.0, b.1.expect("kept").memory));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_job_that_is_parked_anywhere_gives_the_same(
        prompts in proptest::collection::vec("[ab]{1,60}", 1..12), seed: u64, choices in 1usize..4, keep: bool,
        stops in proptest::collection::vec(prop_oneof!["\n\n", "ab\n", " U", "aé"], 0..3),
        pauses in proptest::collection::vec((0usize..12, 0usize..30), 0..40),
    ) {
        let engine = engine(toy());
        let jobs: Vec<Job> = prompts.iter().enumerate().map(|(n, prompt)| {
            let mut job = Job { choices, keep, stop: stops.clone(), trim: Trim { start: false, end: true }, ..job(prompt) };
            job.sampling.seed = seed.wrapping_add(n as u64);
            job
        }).collect();
        let alone: Vec<_> = jobs.iter().map(|job| collect(submit(&engine, job.clone()), choices).expect("an answer")).collect();
        let running: Vec<_> = jobs.into_iter().map(|job| {
            let job = Job { pause: Pause::default(), ..job };
            (job.pause.clone(), submit(&engine, job))
        }).collect();
        // Each is parked and let go on at whatever moment the engine is in.
        for (which, spin) in pauses {
            let pause = &running[which % running.len()].0;
            pause.set(!pause.is_set());
            engine.look();
            (0..spin * 50).for_each(|_| std::hint::spin_loop());
        }
        running.iter().for_each(|(pause, _)| { pause.set(false); });
        engine.look();
        let texts = |answers: Vec<(Answer, Option<Kept>)>| -> Vec<_> {
            answers.into_iter().map(|(a, k)| (a, k.map(|k| (k.ids, k.memory)))).collect()
        };
        for ((_, events), alone) in running.into_iter().zip(alone) {
            prop_assert_eq!(texts(collect(events, choices).expect("an answer")), texts(alone));
        }
    }

    #[test]
    fn a_response_begun_elsewhere_goes_on_without_sampling_again(
        prompt in "[ab]{1,40}", seed: u64, max in 1u64..40, cut in 0usize..40, keep: bool, trim: bool,
        stops in proptest::collection::vec(prop_oneof!["\n\n", "ab\n", " U", "aé"], 0..3),
    ) {
        let engine = engine(toy());
        let mut whole = Job { max_tokens: max, keep, stop: stops, trim: Trim { start: trim, end: trim }, ..job(&prompt) };
        whole.sampling.seed = seed;
        let events = every(submit(&engine, whole.clone()));
        let cut = cut % events.len();
        let mut replay = Replay::default();
        for event in &events[..cut] {
            if let Event::Text { ids, .. } = event {
                replay.ids.extend(ids);
                replay.events += 1;
            }
        }
        // Another seed would show in any token that is sampled again. What follows is sampled with the right one.
        let rest = every(submit(&engine, Job { replay: replay.clone(), ..whole.clone() }));
        prop_assert_eq!(format!("{rest:?}"), format!("{:?}", &events[cut..]));
        let mut other = Job { replay, ..whole };
        other.sampling.seed = !seed;
        other.sampling.temperature = 2.0;
        other.max_tokens = other.replay.ids.len().max(1) as u64;
        let sampled = other.replay.ids.clone();
        if let Some(Event::Done { kept: Some(kept), .. }) = every(submit(&engine, other)).last() {
            let answer = &kept.ids[prompt.len()..];
            let all: Vec<u32> = answer.iter().chain(&kept.memory.pending.goes_on).copied().collect();
            prop_assert!(sampled.is_empty() || all.starts_with(&sampled[..answer.len().min(sampled.len())]));
        }
    }
}

#[test]
fn a_parked_job_hands_out_no_more_states_and_is_told_of() {
    let engine = Handle::start("parked", toy(), text::bytes(), LIMITS).expect("a thread");
    let (mut job, seen) = watched(job(&"ab".repeat(100)), vec![50, 100, 150, 200], true);
    let recorder = Arc::downgrade(&job.checkpoints.as_ref().expect("they are wanted").to);
    let metrics = rewake::telemetry::metrics::install().expect("the process's metrics");
    let metric = |name: &str| -> f64 {
        let series = format!("rewake_parked_{name}{{model=\"parked\"}} ");
        let text = metrics.render();
        text.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok()).unwrap_or(0.0)
    };
    // It is held before it begins: whoever waits for its states hears at once that none will come.
    job.pause.set(true);
    let (pause, plain) = (job.pause.clone(), Job { checkpoints: None, pause: Pause::default(), ..job.clone() });
    let kept = std::mem::take(&mut job.checkpoints);
    let events = submit(&engine, Job { checkpoints: kept, ..job });
    let gone = || recorder.upgrade().is_none();
    while !gone() || metric("jobs") != 1.0 {
        std::thread::yield_now();
    }
    let alone = run(&engine, plain).0;
    pause.set(false);
    engine.look();
    let answers = collect(events, 1).expect("an answer");
    assert_eq!(answers[0].0, alone);
    assert!(seen.lock().expect("no panic").is_empty());
    run(&engine, self::job("a"));
    assert_eq!((metric("jobs"), metric("bytes")), (0.0, 0.0));
}

#[test]
fn a_job_that_is_parked_while_it_reads_keeps_the_states_it_had_handed_out() {
    let engine = Handle::start("resting", toy(), text::bytes(), LIMITS).expect("a thread");
    let pause = Pause::default();
    let (holds, seen) = (pause.clone(), Arc::<Mutex<Vec<usize>>>::default());
    let to: Arc<dyn Fn(Checkpoint) + Send + Sync> = Arc::new({
        let seen = seen.clone();
        move |checkpoint: Checkpoint| {
            seen.lock().expect("no panic").push(checkpoint.read);
            // On the engine's own thread, so it is parked before its next step.
            holds.set(true);
        }
    });
    let recorder = Arc::downgrade(&to);
    let plain = job(&"ab".repeat(100));
    let checkpoints = Some(Checkpoints { at: vec![50, 100, 150, 200], answers: true, to });
    let events = submit(&engine, Job { checkpoints, pause: pause.clone(), ..plain.clone() });
    while recorder.upgrade().is_some() {
        std::thread::yield_now();
    }
    pause.set(false);
    engine.look();
    assert_eq!(collect(events, 1).expect("an answer")[0].0, run(&engine, plain).0);
    assert_eq!(*seen.lock().expect("no panic"), [50]);
}

fn every(mut events: UnboundedReceiver<Event>) -> Vec<Event> {
    std::iter::from_fn(|| events.blocking_recv()).collect()
}

#[test]
fn many_at_once_answer_as_each_alone() {
    for toy in [toy(), repetitive(29, 5)] {
        many_at_once(&engine(toy));
    }
}

fn many_at_once(engine: &Handle) {
    let jobs: Vec<Job> = (0..100)
        .map(|i| {
            let mut job = job(&"ab".repeat(1 + i % 37));
            job.sampling.seed = i as u64;
            job.choices = 1 + i % 4;
            job.keep = i % 3 == 0;
            job.stop = vec!["\n\n".into(), "ab".into()];
            job.tenant = Tenant::parse(format!("t{}", i % 3)).expect("a tenant");
            job
        })
        .collect();
    let answers = |events: UnboundedReceiver<Event>, n| -> Vec<_> {
        collect(events, n).expect("answers").into_iter().map(|(a, k)| (a, k.map(|k| (k.ids, k.memory)))).collect()
    };
    let alone: Vec<_> = jobs.iter().map(|job| answers(submit(engine, job.clone()), job.choices)).collect();
    let together: Vec<_> = jobs.iter().map(|job| submit(engine, job.clone())).collect();
    for ((job, events), alone) in jobs.iter().zip(together).zip(alone) {
        assert_eq!(answers(events, job.choices), alone);
    }
    // And each choice as if it had been asked for by itself.
    for job in &jobs {
        let all = answers(submit(engine, job.clone()), job.choices);
        for (j, together) in all.into_iter().enumerate() {
            let single = Job { choices: 1, first_choice: j, ..job.clone() };
            assert_eq!(answers(submit(engine, single), 1).remove(0), together);
        }
    }
}

#[test]
fn a_reader_that_leaves_costs_nothing_more() {
    let toy = Toy { end: None, ..toy() };
    let tokens = toy.tokens.clone();
    let engine = engine(toy);
    let endless = Job { max_tokens: u64::MAX, ..job("ab") };
    let mut left: Vec<_> = (0..30).map(|_| submit(&engine, endless.clone())).collect();
    // Eight run, the others wait; when the first has spoken, all leave.
    assert!(matches!(left[0].blocking_recv(), Some(Event::Text { .. })));
    drop(left);
    let next = Job { max_tokens: 50, ..job("b") };
    run(&engine, next.clone());
    let before = tokens.load(Ordering::SeqCst);
    run(&engine, next.clone());
    // One token read, then 49 steps of one each: nobody else was in any of them.
    assert_eq!(tokens.load(Ordering::SeqCst) - before, 50);
    assert_eq!(engine.reserve(engine.capacity()).expect("every place is free").len(), engine.capacity());
}

#[test]
fn a_job_that_rests_gives_its_place_back() {
    let engine = engine(Toy { end: None, ..toy() });
    let endless = |_| Job { max_tokens: u64::MAX, pause: Pause::default(), ..job("ab") };
    let all: Vec<Job> = (0..engine.capacity()).map(endless).collect();
    let mut running: Vec<_> = all.iter().map(|job| (job.pause.clone(), submit(&engine, job.clone()))).collect();
    assert!(matches!(running[0].1.blocking_recv(), Some(Event::Text { .. })));
    assert!(engine.reserve(1).is_err());
    running.iter().for_each(|(pause, _)| assert!(pause.set(true)));
    engine.look();
    // A job that comes now runs at once, and to its end.
    while engine.reserve(1).is_err() {
        std::thread::yield_now();
    }
    run(&engine, job("b"));
    running.iter().for_each(|(pause, _)| assert!(pause.set(false)));
    engine.look();
    let (_, events) = &mut running[0];
    (0..5000).for_each(|_| assert!(matches!(events.blocking_recv(), Some(Event::Text { .. }))));
}

#[test]
fn a_full_queue_says_so_at_once() {
    let engine = engine(Toy { end: None, ..toy() });
    let permits = engine.reserve(engine.capacity()).expect("an empty engine");
    let full = engine.reserve(1).expect_err("no place");
    assert!(full.retry_after.as_millis() > 0);
    drop(permits);
    assert!(engine.reserve(engine.capacity() + 1).is_err());
    assert!(engine.reserve(1).is_ok());
}

#[test]
fn a_failing_step_fails_its_jobs_and_nothing_else() {
    for failure in [Failure::Error, Failure::Panic] {
        let engine = engine(Toy { fail_at: Some((3, failure)), ..toy() });
        let events = submit(&engine, Job { stop_tokens: Vec::new(), ..job("ab") });
        let why = collect(events, 1).expect_err("the fourth step fails");
        assert!(why.contains("told to fail") || why.contains("panicked"), "{why}");
        let (answer, _) = run(&engine, job("ab"));
        assert_eq!(answer, run(&engine, job("ab")).0);
    }
}

#[test]
fn a_state_that_does_not_fit_fails_its_job_only() {
    let engine = engine(toy());
    let memory = Some(Arc::new(Memory { consumed: 3, ..Memory::default() }));
    let why = collect(submit(&engine, Job { memory, ..job("a") }), 1).expect_err("no segments");
    assert!(why.contains("not a toy's state"), "{why}");
    run(&engine, job("a"));
}

#[test]
fn the_end_token_as_the_last_allowed_one_is_a_stop() {
    let engine = engine(toy());
    // A bias of 100 makes the end token the only possible one.
    let mut ended = job("a");
    ended.sampling.logit_bias = vec![(256, 100.0)];
    ended.max_tokens = 1;
    assert_eq!(run(&engine, ended).0, Answer { text: String::new(), finish: Finish::Stop, sampled: 1 });
}

#[test]
fn a_dropped_handle_ends_what_runs() {
    let engine = engine(Toy { end: None, ..toy() });
    let events = submit(&engine, Job { max_tokens: u64::MAX, ..job("ab") });
    drop(engine);
    assert!(collect(events, 1).expect_err("it cannot have finished").contains("shutting down"));
}
