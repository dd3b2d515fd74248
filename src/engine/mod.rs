//! L2: one thread, one loop for each model: plan → step → sample → commit.
//!
//! A [`Job`] goes in with everything it needs, its state included; [`Event`]s come out, the state to be kept included. The
//! loop does no I/O. Dropping the receiver of a job's events cancels it within one step; a [`Pause`] parks it within one.

mod backend;
mod coin;
mod draft;
mod draw;
mod ending;
mod live;
mod middle;
mod pace;
mod park;
mod replay;
mod response;
mod run;
mod worth;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::scheduler::Limits;
use crate::text::{Tokenizer, Trim};
use crate::types::{Finish, Memory, Sampling, SegmentData, Tenant};

pub use crate::model::arithmetic;
pub use backend::{Backend, ModelBackend, Speculation};
pub use park::Pause;
pub use replay::Replay;

/// Some choices of one prompt.
#[derive(Clone, Debug)]
pub struct Job {
    pub tenant: Tenant,
    /// Where it begins; `None` = a fresh sequence.
    pub memory: Option<Arc<Memory>>,
    /// What to read first. Begins with what is pending in `memory`. Empty only where there is a `memory` and nothing is to be
    /// said.
    pub ids: Vec<u32>,
    /// Whether `ids` are `memory.pending.goes_on` and nothing else: the same response goes on.
    pub goes_on: bool,
    /// How many choices; 1 for a response that goes on.
    pub choices: usize,
    /// Index of the first choice among those of its prompt.
    pub first_choice: usize,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    pub stop_tokens: Vec<u32>,
    pub trim: Trim,
    /// 0: the ids are only read, and the state is kept; then `goes_on` is false.
    pub max_tokens: u64,
    /// Whether [`Event::Done`] brings the state.
    pub keep: bool,
    /// Parks it while it is set.
    pub pause: Pause,
    /// What an earlier process had sent of it; empty for a job of several choices.
    pub replay: Replay,
    /// Which states on the way are wanted.
    pub checkpoints: Option<Checkpoints>,
}

/// States on a job's way that are wanted.
#[derive(Clone)]
pub struct Checkpoints {
    /// After so many of the job's ids each, ascending and not 0.
    pub at: Vec<usize>,
    /// Whether the state at the end of each choice is wanted too.
    pub answers: bool,
    /// Hears of them, on the engine's thread and before whoever listens to the job hears of what follows, so that a request
    /// made in reply finds them. It must be quick. Dropped when the job leaves the engine.
    pub to: Arc<dyn Fn(Checkpoint) + Send + Sync>,
}

/// A state that has read exactly these ids, and nothing that a client did not receive.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// How many of the job's.
    pub read: usize,
    /// Then these of an answer.
    pub answer: Vec<u32>,
    pub segments: Vec<SegmentData>,
}

impl std::fmt::Debug for Checkpoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { at, answers, to: _ } = self;
        f.debug_struct("Checkpoints").field("at", at).field("answers", answers).finish_non_exhaustive()
    }
}

impl Job {
    /// Absolute position of the first of `ids`.
    fn at(&self) -> u64 {
        self.memory.as_ref().map_or(0, |m| m.consumed)
    }

    /// Whether a state that has read nothing more than the client received must be at hand.
    fn keeps(&self) -> bool {
        self.keep || self.checkpoints.as_ref().is_some_and(|wanted| wanted.answers)
    }
}

/// What a job reports.
#[derive(Clone, Debug)]
pub enum Event {
    /// Text to append to a choice (counted within the job); never empty. `ids` are the tokens sampled since the last text.
    Text { choice: usize, text: String, ids: Vec<u32> },
    /// A choice is complete.
    Done { choice: usize, finish: Finish, sampled: u64, kept: Option<Box<Kept>> },
    /// The job failed; nothing follows.
    Failed(Failure),
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// No token can be chosen: the state that the job began from, or the weights, have numbers that nothing can be made of.
    #[error("{}", crate::sample::Error::NoToken)]
    NotFinite,
    #[error("{0}")]
    Other(String),
}

/// What is kept of a response.
#[derive(Clone, Debug)]
pub struct Kept {
    pub memory: Memory,
    /// The sequence's ids from the job's beginning on, as far as the client received the response: those read first, then
    /// the answer's.
    pub ids: Vec<u32>,
}

/// The queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the queue is full")]
pub struct Full {
    /// An estimate of when a place will be free.
    pub retry_after: Duration,
}

/// A place in the engine, held until its job ends.
#[derive(Debug)]
pub struct Permit(#[allow(dead_code, reason = "its drop is what counts")] OwnedSemaphorePermit);

/// What the engine's thread is sent.
enum Letter {
    Job(Box<Submission>),
    /// Something outside has changed: a pause, or a receiver that was dropped.
    Look,
}

struct Submission {
    job: Job,
    events: mpsc::UnboundedSender<Event>,
    permit: Permit,
}

/// Gauges that the loop keeps up to date.
#[derive(Debug, Default)]
struct Gauges {
    /// Milliseconds that a job took on average, lately.
    job_millis: AtomicU64,
}

/// The way to one engine. The engine's thread ends when the handle is dropped.
pub struct Handle {
    inbox: Option<std::sync::mpsc::Sender<Letter>>,
    places: Arc<Semaphore>,
    capacity: usize,
    gauges: Arc<Gauges>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// Starts the engine thread of one model. `backend` has two slots for each seat of `limits`; in what it has beyond that,
    /// steps leave states of the middle of their spans, so that they do not have to end where one is wanted.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn start(
        name: &str,
        backend: impl Backend + 'static,
        text: Arc<dyn Tokenizer>,
        limits: Limits,
    ) -> std::io::Result<Self> {
        assert!(backend.slots() >= 2 * limits.seats, "two slots for each seat");
        let (inbox, arrivals) = std::sync::mpsc::channel();
        let gauges = Arc::<Gauges>::default();
        let engine = run::Engine::new(name, Box::new(backend), text, limits, gauges.clone());
        let thread = std::thread::Builder::new().name(format!("engine {name}")).spawn(move || engine.run(&arrivals))?;
        // A job needs at least one seat, so no more than `queue` of these can be waiting when all seats are taken; jobs
        // of many choices wait in the same places.
        let capacity = limits.queue + limits.seats;
        Ok(Self {
            inbox: Some(inbox),
            places: Arc::new(Semaphore::new(capacity)),
            capacity,
            gauges,
            thread: Some(thread),
        })
    }

    /// Takes places for `jobs` jobs, all or none.
    pub fn reserve(&self, jobs: usize) -> Result<Vec<Permit>, Full> {
        let take = || self.places.clone().try_acquire_owned().map(Permit);
        (0..jobs).map(|_| take()).collect::<Result<_, _>>().map_err(|_| self.full())
    }

    /// Waits for a place. Whoever waits goes before those who only ask.
    pub fn place(&self) -> impl Future<Output = Permit> + Send + use<> {
        let places = self.places.clone();
        async move { Permit(places.acquire_owned().await.expect("it is never closed")) }
    }

    /// What is said when there is no place.
    pub fn full(&self) -> Full {
        Full { retry_after: self.retry_after() }
    }

    /// How many jobs can be in the engine at once: more are never accepted in one request.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Hands a job over.
    pub fn submit(&self, job: Job, permit: Permit) -> mpsc::UnboundedReceiver<Event> {
        let (events, receiver) = mpsc::unbounded_channel();
        let inbox = self.inbox.as_ref().expect("the inbox lives as long as the handle");
        let letter = Letter::Job(Box::new(Submission { job, events, permit }));
        if let Err(std::sync::mpsc::SendError(Letter::Job(lost))) = inbox.send(letter) {
            // The thread has ended; whoever listens hears it.
            let _ = lost.events.send(Event::Failed(Failure::Other("the engine has stopped".into())));
        }
        receiver
    }

    /// Makes an engine that sleeps look at what has changed: pauses, and receivers that were dropped.
    pub fn look(&self) {
        if let Some(inbox) = &self.inbox {
            // An engine that has ended has nothing to look at.
            let _ = inbox.send(Letter::Look);
        }
    }

    /// Whether its thread has ended, as only a defect makes it do while there is a handle: nothing will be answered here.
    pub fn has_stopped(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// About as long as one job takes: one place is then likely free.
    fn retry_after(&self) -> Duration {
        Duration::from_millis(self.gauges.job_millis.load(Ordering::Relaxed).clamp(250, 30_000))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        drop(self.inbox.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the engine was reported when it happened.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Row, SlotId};

    /// Has a defect where no step is under way that could fail instead.
    struct Defective;

    impl Backend for Defective {
        fn vocabulary(&self) -> usize {
            1
        }
        fn slots(&self) -> usize {
            8
        }
        fn step(&mut self, _: &[u32], _: &[Row], _: &mut Vec<f32>) -> Result<(), String> {
            Ok(())
        }
        fn reset(&mut self, _: SlotId) {
            panic!("the defect of a test");
        }
        fn restore(&mut self, _: SlotId, _: &[SegmentData]) -> Result<(), String> {
            Ok(())
        }
        fn snapshot(&self, _: SlotId) -> Vec<SegmentData> {
            Vec::new()
        }
        fn copy(&mut self, _: SlotId, _: SlotId) {}
    }

    #[test]
    fn an_engine_that_has_stopped_says_so() {
        let limits = Limits { seats: 1, queue: 1, budget: 8, busy_budget: 8 };
        let engine = Handle::start("defective", Defective, crate::text::bytes(), limits).expect("a thread");
        assert!(!engine.has_stopped());
        let job = Job {
            tenant: Tenant::local(),
            memory: None,
            ids: vec![0],
            goes_on: false,
            choices: 1,
            first_choice: 0,
            sampling: Sampling::default(),
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            trim: Trim::default(),
            max_tokens: 1,
            keep: false,
            pause: Pause::default(),
            replay: Replay::default(),
            checkpoints: None,
        };
        let permit = engine.reserve(1).expect("room for one").pop().expect("one was asked for");
        assert!(engine.submit(job.clone(), permit).blocking_recv().is_none(), "its events end");
        while !engine.has_stopped() {
            std::thread::yield_now();
        }
        let permit = engine.reserve(1).expect("its place is free").pop().expect("one was asked for");
        assert!(matches!(engine.submit(job, permit).blocking_recv(), Some(Event::Failed(_))));
    }
}
