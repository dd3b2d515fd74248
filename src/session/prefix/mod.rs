//! What was read once is not read again: the longest known beginning of a text is found, and only the rest is read.
//!
//! Frontends send the whole transcript with each turn. States on the way of a prompt, at its end and at the end of its
//! answer are kept, by tenant, weights, beginning and ids; what they were computed for makes no difference. A hit is a
//! [`Memory`] like any other, so it changes no position, no seed and no bit.
//!
//! A text that another job is reading at this moment is not read twice either: who comes second waits for the state where
//! they part. It waits with its place in the engine, which it would have in the queue as well, but without a seat; those it waits
//! for have been submitted and wait for nobody, so there is no circle. When they end without having come that far, it looks
//! again and goes on by itself. It waits for its own tenant only, a few times at most, and never when little is to be saved.

mod disk;
mod flights;
mod forest;
mod forget;
mod ledger;
mod shelf;
mod spacing;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::stream::{self, Stream, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::initial::Fresh;
use super::origin::Parent;
use super::{Cached, Model};
use crate::engine::{self, Checkpoint, Checkpoints, Job, Permit};
use crate::state::Store;
use crate::telemetry::metrics;
use crate::types::{Memory, TAIL, Tenant};
use disk::Disk;
use flights::{Flight, Flights};
pub(super) use forget::Forgotten;
use shelf::{From, Gone, Root, Shelf};
use spacing::{Cost, Stops, Text, stops};

/// How often a job waits for what another one is reading before it reads by itself.
const PATIENCE: usize = 4;

/// Tokens that waiting must save, for another job or for the disk.
const WORTH_WAITING: usize = 64;

/// How much is kept of what was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrefixLimits {
    pub enabled: bool,
    /// Of all states that are kept, over all models and tenants.
    pub bytes: u64,
    /// Of those that had no room there and are kept on disk; 0 = none.
    pub disk_bytes: u64,
    /// Tokens between states that are kept of a long prompt, where they are closest.
    pub spacing: usize,
}

impl Default for PrefixLimits {
    fn default() -> Self {
        Self { enabled: true, bytes: 1 << 30, disk_bytes: 0, spacing: 48 }
    }
}

/// What was read by turns of all models and tenants.
pub(super) struct PrefixCache {
    spacing: usize,
    inside: Mutex<Inside>,
    disk: Option<Arc<Disk>>,
}

struct Inside {
    shelf: Shelf,
    flights: Flights,
}

/// What a turn's jobs need to begin where something was read before.
#[derive(Clone)]
pub(super) struct Reader {
    cache: Arc<PrefixCache>,
    source: Arc<Source>,
    cached: Cached,
}

/// What the texts of a turn continue.
struct Source {
    model: String,
    tenant: Tenant,
    root: Root,
    /// What has been read before the texts begin: so many ids, and the last of them.
    consumed: u64,
    tail: Vec<u32>,
    cost: Cost,
    boundaries: Vec<usize>,
}

impl Source {
    /// The last ids that were read when `ids` of a text were, as a memory holds them.
    fn recent(&self, ids: &[u32]) -> Vec<u32> {
        let mut recent = self.tail.clone();
        recent.extend(&ids[ids.len().saturating_sub(TAIL)..]);
        recent.drain(..recent.len().saturating_sub(TAIL));
        recent
    }
}

/// A state and how many ids of a text it has read.
type Known = (usize, Arc<Memory>);

/// How to begin reading a text.
enum Way {
    /// Somebody is reading it: wait until it has come so far.
    Follow(watch::Receiver<usize>, usize),
    Go(Start),
}

struct Start {
    /// Has read the first `depth` ids.
    memory: Option<Arc<Memory>>,
    depth: usize,
    stops: Vec<usize>,
    flight: Option<u64>,
}

impl PrefixCache {
    /// `None` when nothing is to be kept. What has no room in memory goes to `disk`, if there is one.
    pub fn new(limits: &PrefixLimits, disk: Option<Arc<dyn Store>>) -> Option<Self> {
        if !limits.enabled || limits.bytes == 0 {
            return None;
        }
        let inside = Inside { shelf: Shelf::new(limits.bytes), flights: Flights::default() };
        let disk = disk.filter(|_| limits.disk_bytes > 0).map(|store| Disk::open(store, limits.disk_bytes));
        Some(Self { spacing: limits.spacing, inside: Mutex::new(inside), disk })
    }

    /// Waits until all that was given up so far is on disk, and all that is there is known.
    pub async fn settled(&self) {
        if let Some(disk) = &self.disk {
            disk.settled().await;
        }
    }

    /// Puts what is in memory on disk, for the next process.
    pub async fn hand_over(&self) {
        let Some(disk) = &self.disk else { return };
        let all = self.lock().shelf.clear();
        for gone in all {
            disk.write_now(gone).await;
        }
        disk.settled().await;
    }

    /// Keeps the state of a text, and says so.
    fn keep(&self, source: &Source, ids: &[u32], memory: Arc<Memory>) {
        let mut inside = self.lock();
        let evictions = inside.shelf.evictions;
        let gone = inside.shelf.put(&source.tenant, &source.root, ids, memory);
        let (bytes, entries) = (inside.shelf.bytes(), inside.shelf.entries());
        let evicted = inside.shelf.evictions - evictions;
        drop(inside);
        metrics::prefix_holds(bytes, entries, evicted);
        gone.into_iter().for_each(|gone| self.let_go(gone));
    }

    fn let_go(&self, gone: Gone) {
        if let Some(disk) = &self.disk {
            disk.file(gone);
        }
    }

    /// What is on disk of a text, if that is worth its time. It is in memory then, too, where others find it.
    async fn fetch(&self, source: &Source, ids: &[u32], model: &Model) -> Option<Known> {
        let disk = self.disk.as_ref()?;
        let known = self.lock().shelf.find(&source.tenant, &source.root, ids).depth;
        let (depth, memory) = disk.fetch(source, ids, known + WORTH_WAITING, model).await?;
        self.keep(source, &ids[..depth], memory.clone());
        Some((depth, memory))
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks for what is known of a text, beside what was `fetched`, and says what is to be kept of the rest.
    fn look(&self, source: &Source, ids: &Arc<[u32]>, fetched: Option<&Known>, patient: bool) -> Way {
        let mut inside = self.lock();
        let found = inside.shelf.find(&source.tenant, &source.root, ids);
        let seen = inside.flights.look(&source.tenant, &source.root, ids);
        let fetched = fetched.filter(|(depth, _)| *depth > found.depth);
        let known = fetched.map_or(found.depth, |(depth, _)| *depth);
        if let Some((reached, at)) = seen.ahead.filter(|&(_, at)| patient && at >= known + WORTH_WAITING) {
            return Way::Follow(reached, at);
        }
        let (depth, memory) = match fetched {
            // It was put into memory and had to go at once.
            Some((depth, memory)) => (*depth, Some(memory.clone())),
            None => {
                let memory = inside.shelf.take(&source.tenant, &found);
                (if memory.is_some() { found.depth } else { 0 }, memory)
            }
        };
        // A text that is known to its end parts from itself before the last token, which is read anyhow.
        let parts = found.known.max(seen.known).min(ids.len().saturating_sub(1));
        let forks: Vec<usize> = found.forks.into_iter().chain([parts]).collect();
        let text = Text { from: depth, len: ids.len(), forks: &forks, boundaries: &source.boundaries };
        let Stops { at: stops, spacing } = stops(text, self.spacing, source.cost, inside.shelf.room() / 2);
        let flight = (!stops.is_empty()).then(|| {
            let (tenant, root) = (source.tenant.clone(), source.root.clone());
            inside.flights.begin(Flight::new(tenant, root, ids.clone(), stops.clone()))
        });
        drop(inside);
        metrics::prefix_looked_up(&source.model, depth as u64, spacing);
        Way::Go(Start { memory, depth, stops, flight })
    }
}

impl Reader {
    /// For a turn that begins from `origin`: a parent, or a fresh sequence.
    pub fn new(
        cache: &Arc<PrefixCache>,
        tenant: &Tenant,
        model: &Model,
        origin: (Option<&Parent>, Option<&Fresh>),
        boundaries: &[usize],
        cached: &Cached,
    ) -> Self {
        let memory = origin.0.map(|parent| &*parent.memory);
        let consumed = memory.map_or(0, |memory| memory.consumed);
        let from = match origin {
            (Some(parent), _) if consumed > 0 => From::State(parent.id.clone()),
            // It was not kept, and is read again from its beginning.
            (Some(parent), _) => From::Beginning(model.initial.fingerprint(&parent.memory.segments)),
            (None, Some(fresh)) => From::Beginning(fresh.beginning.fingerprint.clone()),
            (None, None) => From::Beginning(model.initial.fingerprint(&[])),
        };
        let card = &model.card;
        let fixed = card.state_bytes + 4 * TAIL as u64 + card.state_bytes_per_token.saturating_mul(consumed);
        let source = Source {
            model: card.id.clone(),
            tenant: tenant.clone(),
            root: Root { fingerprint: card.fingerprint.clone(), from },
            consumed,
            tail: memory.map_or_else(Vec::new, |memory| memory.tail.clone()),
            cost: Cost { fixed, per_token: card.state_bytes_per_token },
            boundaries: boundaries.to_vec(),
        };
        Self { cache: cache.clone(), source: Arc::new(source), cached: cached.clone() }
    }

    /// Runs a job from the longest beginning of its text that was read before.
    pub fn run(self, model: Arc<Model>, job: Job, permit: Permit) -> impl Stream<Item = engine::Event> + Send {
        let started = async move {
            // A response that goes on is nobody else's text.
            let (job, known) = if job.goes_on { (job, Vec::new()) } else { self.shorten(&model, job).await };
            events(&model, job, permit).map(move |event| whole(event, &known))
        };
        stream::once(started).flatten()
    }

    /// The job without what was read before, and the ids of that.
    async fn shorten(&self, model: &Model, mut job: Job) -> (Job, Vec<u32>) {
        let ids: Arc<[u32]> = job.ids.as_slice().into();
        let fetched = self.cache.fetch(&self.source, &ids, model).await;
        let mut patience = PATIENCE;
        let start = loop {
            match self.cache.look(&self.source, &ids, fetched.as_ref(), patience > 0) {
                Way::Go(start) => break start,
                Way::Follow(mut reached, at) => {
                    patience -= 1;
                    metrics::prefix_waited(&self.source.model);
                    // An error is that who reads it has ended; either way, what there is now decides.
                    let _ = reached.wait_for(|&reached| reached >= at).await;
                }
            }
        };
        let Start { memory, depth, stops, flight } = start;
        if let Some(memory) = memory {
            job.memory = Some(memory);
        }
        // A prompt of several jobs is counted once.
        if job.first_choice == 0 {
            self.cached.add(depth as u64);
        }
        let rest = job.ids.split_off(depth);
        let known = std::mem::replace(&mut job.ids, rest);
        let recorder = Recorder { cache: self.cache.clone(), source: self.source.clone(), ids, depth, flight };
        job.checkpoints = Some(Checkpoints {
            at: stops.iter().map(|stop| stop - depth).collect(),
            // What follows a stored state goes on from its own stored states.
            answers: matches!(self.source.root.from, From::Beginning(_)),
            to: Arc::new(move |checkpoint| recorder.record(checkpoint)),
        });
        (job, known)
    }
}

/// The events of a job that is handed to the engine now.
pub(super) fn events(model: &Model, job: Job, permit: Permit) -> impl Stream<Item = engine::Event> + Send + use<> {
    let mut events = model.engine.submit(job, permit);
    stream::poll_fn(move |cx| events.poll_recv(cx))
}

/// What a job that began behind `known` reports, as if it had begun before.
fn whole(mut event: engine::Event, known: &[u32]) -> engine::Event {
    if let engine::Event::Done { kept: Some(kept), .. } = &mut event {
        kept.ids.splice(0..0, known.iter().copied());
    }
    event
}

/// Puts a job's states where others find them. Dropped when the job leaves the engine.
struct Recorder {
    cache: Arc<PrefixCache>,
    source: Arc<Source>,
    /// The job's text, and how much of it was known.
    ids: Arc<[u32]>,
    depth: usize,
    flight: Option<u64>,
}

impl Recorder {
    fn record(&self, Checkpoint { read, answer, segments }: Checkpoint) {
        let reached = self.depth + read;
        // Of ids that are not the job's nothing can be kept; this is no place to fail.
        let Some(read) = self.ids.get(..reached) else { return };
        let mut ids = read.to_vec();
        ids.extend(answer);
        if ids.len() - self.depth >= spacing::LEAST {
            let (consumed, tail) = (self.source.consumed + ids.len() as u64, self.source.recent(&ids));
            let memory = Arc::new(Memory { segments, consumed, tail, ..Memory::default() });
            self.cache.keep(&self.source, &ids, memory);
        }
        if let Some(flight) = self.flight {
            self.cache.lock().flights.reach(flight, reached);
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(flight) = self.flight {
            self.cache.lock().flights.end(flight);
        }
    }
}
