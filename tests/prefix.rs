//! With the prefix cache or without, on a toy backend: the same requests give the same answers, states and records.

#[path = "prefix/disk.rs"]
mod disk;
#[path = "support/toy.rs"]
#[allow(dead_code, reason = "no test here makes it fail")]
mod toy;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::join_all;
use proptest::prelude::*;
use rewake::engine::Handle;
use rewake::scheduler::Limits;
use rewake::session::{
    Delivery, Event, InitialStates, Input, Model, ModelCard, Page, PrefixLimits, Prompt, Running, Sessions, Start,
    StateReceipt, Turn, TurnLimits,
};
use rewake::state::{Archive, InMemory, Store};
use rewake::text;
use rewake::types::{Finish, Memory, Message, Role, Sampling, Segment, SegmentData, SessionId, StateId, Tenant};
use toy::Toy;

const LIMITS: Limits = Limits { seats: 4, queue: 50, budget: 64, busy_budget: 8 };

/// Slots for states in the middle of a step.
const SPARE: usize = 32;

/// One server, its store, and how many tokens its backend has read in how many steps.
struct Side {
    sessions: Sessions,
    archive: Archive,
    read: Arc<AtomicUsize>,
    steps: Arc<AtomicUsize>,
}

fn side(prefix: &PrefixLimits) -> Side {
    side_of(prefix, LIMITS, None)
}

fn side_of(prefix: &PrefixLimits, limits: Limits, disk: Option<Arc<dyn Store>>) -> Side {
    let toy = Toy::new(2 * limits.seats + SPARE);
    let (read, steps) = (toy.tokens.clone(), toy.steps.clone());
    let (text, profile) = (text::bytes(), text::builtin("world").expect("a built-in profile"));
    let own = vec![SegmentData { name: "toy".into(), shape: vec![1], data: vec![1.0] }];
    let model = Model {
        card: ModelCard {
            id: "toy".into(),
            aliases: Vec::new(),
            created: 0,
            generation: "toy".into(),
            layers: 1,
            width: 1,
            vocabulary: 260,
            parameters: 1,
            weight_bytes: 4,
            state_bytes: 4,
            state_bytes_per_token: 0,
            context: None,
            fingerprint: "f".repeat(64),
            tokenizer: "bytes".into(),
            template: profile.name.clone(),
            stop: profile.stop.clone(),
            stop_tokens: vec![256],
            sampling: Sampling::default(),
            initial_states: Vec::new(),
        },
        layout: vec![Segment::Fixed { name: "toy".into(), shape: vec![1], init: 1.0 }],
        engine: Handle::start("toy", toy, text.clone(), limits).expect("a thread"),
        text,
        profile: text::Profile { stop_tokens: vec![256], ..profile },
        initial: InitialStates::new(&own),
        seats: limits.seats,
    };
    let archive = Archive::new(Arc::new(InMemory::default()));
    let sessions = Sessions::new(archive.clone(), TurnLimits::default(), None).with_prefix_cache(prefix, disk);
    sessions.open(vec![model]);
    Side { sessions, archive, read, steps }
}

/// What a request is about.
#[derive(Clone, Debug)]
struct Ask {
    /// Texts that begin alike: so much of one of two long ones, then something.
    texts: Vec<(bool, usize, String)>,
    chat: bool,
    choices: usize,
    store: bool,
    seed: u64,
    greedy: bool,
    penalties: bool,
    stop: Vec<String>,
    max_tokens: u64,
}

#[derive(Clone, Debug)]
enum Op {
    /// At the same time.
    Fresh(Vec<Ask>),
    /// From one of the states stored so far.
    State(prop::sample::Index, Ask),
    Session(bool, Ask),
    /// The snapshot of this session's head is lost.
    Lose(bool),
}

fn long(which: bool) -> String {
    let mut bits = if which { 7u32 } else { 1 };
    let next = |_| {
        bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        char::from(b'a' + (bits >> 29) as u8)
    };
    (0..600).map(next).collect()
}

impl Ask {
    fn input(&self) -> Input {
        let text = |(which, len, rest): &(bool, usize, String)| format!("{}{rest}", &long(*which)[..*len]);
        if !self.chat {
            return Input::Prompts(self.texts.iter().map(|t| Prompt::Text(text(t))).collect());
        }
        let role = |n: usize| if n.is_multiple_of(2) { Role::User } else { Role::Assistant };
        let message = |(n, t): (usize, &_)| Message { role: role(n), content: text(t), name: None };
        Input::Chat(self.texts.iter().enumerate().map(message).collect())
    }

    fn turn(&self, start: Start) -> Turn {
        let one = matches!(start, Start::Session { .. });
        let mut input = self.input();
        if let (true, Input::Prompts(prompts)) = (one, &mut input) {
            prompts.truncate(1);
        }
        let mut sampling =
            Sampling { temperature: if self.greedy { 0.0 } else { 1.0 }, seed: self.seed, ..Sampling::default() };
        if self.penalties {
            (sampling.presence_penalty, sampling.penalty_decay, sampling.repetition_penalty) = (0.3, 0.9, 1.2);
        }
        Turn {
            tenant: Tenant::local(),
            response_id: "r".into(),
            model: None,
            store: self.store || one,
            start,
            anew: None,
            input,
            choices: if one { 1 } else { self.choices },
            sampling,
            stop: self.stop.clone(),
            max_tokens: Some(self.max_tokens),
            ttl_s: None,
            initial_state: None,
            idempotency_key: None,
            metadata: Default::default(),
            delivery: Delivery::default(),
        }
    }
}

/// A choice: its text, how it ended, and its stored state.
type Told = (String, Option<(Finish, u64)>, Option<StateReceipt>);

#[derive(Debug, Default)]
struct Answer {
    prompt_tokens: u64,
    cached: u64,
    choices: Vec<Told>,
}

async fn collect(mut running: Running) -> Answer {
    let mut answer = Answer { prompt_tokens: running.facts.prompt_tokens, ..Answer::default() };
    answer.choices.resize_with(running.facts.choices, Default::default);
    while let Some(event) = running.next().await {
        match event {
            Event::Text { choice, text } => answer.choices[choice].0.push_str(&text),
            Event::Done { choice, finish, completion_tokens, stored } => {
                answer.choices[choice].1 = Some((finish, completion_tokens));
                answer.choices[choice].2 = stored.map(|stored| stored.expect("it is stored"));
            }
            Event::Failed(why) => panic!("{why}"),
        }
    }
    answer.cached = running.facts.cached_tokens.get();
    answer
}

impl Side {
    async fn run(&self, turn: Turn) -> Result<Answer, String> {
        match self.sessions.start(turn).await {
            Ok(running) => Ok(collect(running).await),
            Err(why) => Err(why.to_string()),
        }
    }

    async fn memory(&self, id: &StateId) -> Memory {
        let snapshot = self.archive.load(&Tenant::local(), id, 0).await.expect("a store");
        snapshot.expect("it is there").memory
    }
}

/// The cached and the plain server, and the states that each stored, in pairs.
struct World {
    sides: [Side; 2],
    states: Vec<[StateId; 2]>,
    heads: [Option<usize>; 2],
}

impl World {
    fn new(bytes: u64) -> Self {
        let sides = [
            // In little room, most of what is known is on disk, where there is little room too.
            side_of(
                &PrefixLimits { enabled: true, bytes, disk_bytes: 20 * bytes, ..PrefixLimits::default() },
                LIMITS,
                Some(Arc::new(InMemory::default())),
            ),
            side(&PrefixLimits { enabled: false, ..PrefixLimits::default() }),
        ];
        Self { sides, states: Vec::new(), heads: [None, None] }
    }

    async fn apply(&mut self, op: Op) {
        match op {
            Op::Fresh(asks) => {
                let turn = |ask: &Ask| ask.turn(Start::Fresh);
                let [with, without] =
                    [0, 1].map(|side| join_all(asks.iter().map(|ask| self.sides[side].run(turn(ask)))));
                for (with, without) in with.await.into_iter().zip(without.await) {
                    self.compare(with, without).await;
                }
            }
            Op::State(index, ask) if !self.states.is_empty() => {
                let state = index.get(&self.states).clone();
                let [with, without] =
                    [0, 1].map(|side| self.sides[side].run(ask.turn(Start::State(state[side].clone()))));
                self.compare(with.await, without.await).await;
            }
            Op::Session(which, ask) => {
                let id = session(which);
                let start = || Start::Session { id: id.clone(), if_match: None, begins: false };
                let [with, without] = [0, 1].map(|side| self.sides[side].run(ask.turn(start())));
                if self.compare(with.await, without.await).await {
                    self.heads[usize::from(which)] = Some(self.states.len() - 1);
                }
                self.compare_logs(&id).await;
            }
            Op::Lose(which) => {
                let Some(head) = self.heads[usize::from(which)].take() else { return };
                let state = self.states.remove(head);
                self.heads[usize::from(!which)] =
                    self.heads[usize::from(!which)].map(|other| other - usize::from(other > head));
                for (side, id) in self.sides.iter().zip(&state) {
                    side.sessions.delete_state(&Tenant::local(), id).await.expect("it is there");
                }
            }
            Op::State(..) => {}
        }
    }

    /// Holds two answers to be the same; notes the states that were stored. False when both were refused.
    async fn compare(&mut self, with: Result<Answer, String>, without: Result<Answer, String>) -> bool {
        let (with, without) = match (with, without) {
            (Ok(with), Ok(without)) => (with, without),
            (with, without) => {
                // Ids in messages differ.
                assert_eq!(with.err().map(|e| e.len()), without.err().map(|e| e.len()));
                return false;
            }
        };
        assert_eq!(with.prompt_tokens, without.prompt_tokens);
        assert!(with.cached >= without.cached && with.cached <= with.prompt_tokens);
        assert_eq!(with.choices.len(), without.choices.len());
        for (a, b) in with.choices.into_iter().zip(without.choices) {
            assert_eq!((a.0, a.1), (b.0, b.1));
            let (Some(a), Some(b)) = (a.2, b.2) else { continue };
            assert_eq!((a.turn, a.tokens, a.bytes), (b.turn, b.tokens, b.bytes));
            assert_eq!(self.sides[0].memory(&a.id).await, self.sides[1].memory(&b.id).await);
            self.states.push([a.id, b.id]);
        }
        true
    }

    async fn compare_logs(&self, id: &SessionId) {
        let mut logs = Vec::new();
        for side in &self.sides {
            let turns = side.sessions.turns(&Tenant::local(), id, Page { limit: 1000, after: None }).await;
            let turns = turns.map(|turns| turns.data).unwrap_or_default().into_iter();
            let said = |turned| {
                let rewake::session::Turned::Whole(t) = turned else { panic!("a turn is lost") };
                (
                    t.turn,
                    t.messages,
                    t.text,
                    t.token_ids,
                    t.takes_back,
                    t.usage.prompt_tokens,
                    t.usage.completion_tokens,
                )
            };
            logs.push(turns.map(said).collect::<Vec<_>>());
        }
        assert_eq!(logs[0], logs[1]);
    }
}

fn session(which: bool) -> SessionId {
    SessionId::parse(if which { "one" } else { "other" }).expect("a good name")
}

fn ask() -> impl Strategy<Value = Ask> {
    let text = (any::<bool>(), prop_oneof![Just(0usize), 0usize..600, Just(300)], "[ab]{0,40}");
    let stop = proptest::collection::vec(prop_oneof!["\n\n", "ab\n", " U", "aé"], 0..2);
    let what = (proptest::collection::vec(text, 1..4), any::<bool>(), 1usize..6, any::<bool>());
    let how = (0u64..3, any::<bool>(), any::<bool>(), stop, 1u64..30);
    (what, how).prop_map(|((texts, chat, choices, store), (seed, greedy, penalties, stop, max_tokens))| Ask {
        texts: if chat && texts.len() == 2 { texts[..1].to_vec() } else { texts },
        chat,
        choices,
        store,
        seed,
        greedy,
        penalties,
        stop,
        max_tokens,
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => proptest::collection::vec(ask(), 1..4).prop_map(Op::Fresh),
        2 => (any::<prop::sample::Index>(), ask()).prop_map(|(index, ask)| Op::State(index, ask)),
        3 => (any::<bool>(), ask()).prop_map(|(which, ask)| Op::Session(which, ask)),
        1 => any::<bool>().prop_map(Op::Lose),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn nothing_but_the_time_tells_whether_it_was_read_before(
        bytes in prop_oneof![Just(1u64 << 24), 1_000u64..200_000], ops in proptest::collection::vec(op(), 1..14),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().expect("a runtime");
        runtime.block_on(async {
            let mut world = World::new(bytes);
            for op in ops {
                world.apply(op).await;
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_many_share_is_read_once() {
    let side = side(&PrefixLimits::default());
    let ask = |n: usize| Ask {
        texts: vec![(true, 600, format!("{n:020}"))],
        chat: false,
        choices: 1,
        store: false,
        seed: n as u64,
        greedy: false,
        penalties: false,
        stop: Vec::new(),
        max_tokens: 1,
    };
    let answers = join_all((0..20).map(|n| side.run(ask(n).turn(Start::Fresh)))).await;
    let answers: Vec<Answer> = answers.into_iter().map(|answer| answer.expect("room for all")).collect();
    let expected: u64 = answers.iter().map(|answer| answer.prompt_tokens - answer.cached).sum();
    assert_eq!(side.read.load(Ordering::SeqCst) as u64, expected);
    assert!(expected < 600 + 20 * 60, "{expected} tokens were read");
}

/// The first `len` letters of one of two texts, then something.
fn prompt(which: bool, len: usize, rest: String) -> Turn {
    let mut letters = long(which);
    while letters.len() < len {
        letters.push_str(&long(!which));
    }
    let ask = Ask {
        texts: Vec::new(),
        chat: false,
        choices: 1,
        store: false,
        seed: 1,
        greedy: true,
        penalties: false,
        stop: Vec::new(),
        max_tokens: 1,
    };
    let text = format!("{}{rest}", &letters[..len]);
    Turn { input: Input::Prompts(vec![Prompt::Text(text)]), ..ask.turn(Start::Fresh) }
}

#[tokio::test]
async fn what_is_kept_of_a_new_prompt_costs_no_steps() {
    let usual = Limits { budget: 512, busy_budget: 64, ..LIMITS };
    let steps = async |enabled: bool| {
        let side = side_of(&PrefixLimits { enabled, ..PrefixLimits::default() }, usual, None);
        side.run(prompt(true, 1400, String::new())).await.expect("an answer");
        side.steps.load(Ordering::SeqCst)
    };
    assert_eq!((steps(false).await, steps(true).await), (3, 3));
}

#[tokio::test]
async fn two_prompts_that_share_half_of_their_tokens_share_it_whoever_comes_first() {
    let usual = Limits { budget: 512, busy_budget: 64, ..LIMITS };
    for first in [0, 1] {
        let side = side_of(&PrefixLimits::default(), usual, None);
        let turn = |n: usize| prompt(true, 700, ["x", "y"][n].repeat(700));
        side.run(turn(first)).await.expect("an answer");
        let second = side.run(turn(1 - first)).await.expect("an answer");
        assert!((650..=700).contains(&second.cached), "{} of 700 tokens", second.cached);
    }
}
