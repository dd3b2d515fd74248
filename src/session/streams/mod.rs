//! Responses that outlive their readers.
//!
//! Every turn's events go into its [`Stream`]; whoever wants the response listens to that, from the beginning. A stream
//! whose last reader has left, or whose readers are too slow, *parks* the response: its seats are free, its states wait in
//! memory, and it goes on, to the same bytes, when somebody listens again, or is cancelled when the window is over. With
//! `detach` it goes on by itself, and its events are in a journal before anybody hears of them, with the tokens behind them: so a
//! process that finds the journal sends them again, takes the tokens for sampled, and goes on from there ([`revive`]). Other
//! streams are kept in memory only: when this process is lost, so are they.

mod log;
mod record;
mod revive;
mod stream;
mod writer;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(super) use revive::Resumed;
pub(super) use stream::{Parts, Reader, Stream, Why};
pub(super) use writer::Writer;

use super::{Cached, Error, Event, Model, Running, Sessions, Start, Turn};
use crate::state::Journal;
use crate::types::{SessionId, Tenant};

/// Bytes of finished streams that wait in memory for a reader who has missed the end.
const FINISHED: usize = 64 << 20;

/// What is said of a response that is better read where it runs.
const ELSEWHERE: &str = "another server goes on with this response; ask again";

/// How long streams wait for readers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamLimits {
    /// Seconds that a stream whose reader was lost waits for it; 0 = the response is cancelled at once.
    pub resume_window_s: u64,
    /// Responses that wait at once for readers who are lost or too slow; the first of more is cancelled.
    pub parked: usize,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self { resume_window_s: 60, parked: 64 }
    }
}

impl StreamLimits {
    fn window(&self) -> Duration {
        Duration::from_secs(self.resume_window_s)
    }
}

/// What is known of a response when its first event comes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    pub response_id: String,
    /// Served name of the model that answers.
    pub model: String,
    /// Of its weights.
    pub fingerprint: String,
    /// Unix seconds.
    pub created: u64,
    pub seed: u64,
    /// Over all prompts.
    pub prompt_tokens: u64,
    /// How many of them were not computed again.
    pub cached_tokens: Cached,
    /// Prompts × choices.
    pub choices: usize,
    /// What the wire needs to write the response again.
    pub form: String,
}

impl Facts {
    /// Refuses what is stored of another response in the place of this one.
    fn check(&self, id: &str) -> Result<(), Error> {
        let misplaced = || Error::ResponseDamaged(id.into(), "another response is in its place".into());
        (self.response_id == id).then_some(()).ok_or_else(misplaced)
    }
}

/// A response as it is now.
#[derive(Clone, Debug)]
pub struct SoFar {
    pub facts: Facts,
    pub events: Vec<Event>,
    /// Nothing follows.
    pub ended: bool,
    /// It goes on without readers.
    pub detached: bool,
}

/// Where the events of a running turn come from.
#[derive(Debug)]
pub(super) enum Source {
    Stream(Reader),
    /// A response that had ended before.
    Told(VecDeque<Event>),
}

impl Source {
    pub async fn next(&mut self) -> Option<Event> {
        match self {
            Self::Stream(reader) => reader.next().await,
            Self::Told(events) => events.pop_front(),
        }
    }
}

/// What all streams have in common.
pub(super) struct Rules {
    limits: StreamLimits,
    /// Other servers have the same store.
    shared: bool,
    /// The server is about to stop: nobody is waited for.
    draining: AtomicBool,
    /// In the order in which they were parked. Locked before a stream's state, never after it.
    parked: Mutex<VecDeque<Weak<Stream>>>,
}

impl Rules {
    /// How long a response waits for its reader.
    fn window(&self) -> Duration {
        if self.draining.load(Ordering::Acquire) { Duration::ZERO } else { self.limits.window() }
    }

    /// One more is parked; when there are too many the first of them is not waited for any longer.
    fn parked(&self, stream: &Arc<Stream>) {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        let others = |other: &Arc<Stream>| !Arc::ptr_eq(other, stream) && other.is_parked();
        parked.retain(|other| other.upgrade().is_some_and(|other| others(&other)));
        parked.push_back(Arc::downgrade(stream));
        while parked.len() > self.limits.parked {
            if let Some(first) = parked.pop_front().and_then(|first| first.upgrade()) {
                first.stop(Why::Cancelled);
            }
        }
    }
}

/// The streams of this process, by their response's id.
pub(super) struct Hub {
    rules: Arc<Rules>,
    streams: Mutex<BTreeMap<String, Arc<Stream>>>,
    /// Those that have ended, oldest first.
    ended: Mutex<VecDeque<Arc<Stream>>>,
    /// One journal is taken up at a time.
    reviving: tokio::sync::Mutex<()>,
}

impl Hub {
    pub fn new(limits: StreamLimits, shared: bool) -> Self {
        let rules = Rules { limits, shared, draining: AtomicBool::new(false), parked: Mutex::default() };
        Self {
            rules: Arc::new(rules),
            streams: Mutex::default(),
            ended: Mutex::default(),
            reviving: tokio::sync::Mutex::default(),
        }
    }

    fn find(&self, tenant: &Tenant, id: &str) -> Option<Arc<Stream>> {
        self.streams().get(id).filter(|stream| stream.tenant == *tenant).cloned()
    }

    /// Refuses another response of this model while too many are under way. Of those that were parked and go on, none has a
    /// place in its engine: without this, parking one after the other would let in any number.
    pub fn admit(&self, model: &Arc<Model>) -> Result<(), Error> {
        let under_way = self.streams().values().filter(|stream| stream.is_of(model) && !stream.ended()).count();
        // Those that have places, as many that are being kept and have given them back, and the parked.
        let most = 2 * model.engine.capacity() + self.rules.limits.parked;
        if under_way < most { Ok(()) } else { Err(model.engine.full().into()) }
    }

    /// A new stream, which others can find from now on.
    pub fn open(&self, parts: NewStream) -> Arc<Stream> {
        let NewStream { turn, facts, model, events } = parts;
        let session = match &turn.start {
            Start::Session { id, .. } => Some(id.clone()),
            _ => None,
        };
        let (tenant, delivery, rules) = (turn.tenant.clone(), turn.delivery.clone(), self.rules.clone());
        let stream = Stream::new(Parts { facts, tenant, session, delivery, model, rules, events });
        self.streams().insert(stream.facts.response_id.clone(), stream.clone());
        stream
    }

    /// A stream has ended; who has missed the end can read it for the window, unless it is in the store.
    fn close(self: &Arc<Self>, stream: &Arc<Stream>, stored: bool) {
        let window = self.rules.window();
        if stored || window.is_zero() || !stream.delivery.stream {
            return self.forget(stream);
        }
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.push_back(stream.clone());
        while ended.iter().map(|stream| stream.bytes()).sum::<usize>() > FINISHED {
            if let Some(first) = ended.pop_front() {
                self.forget(&first);
            }
        }
        drop(ended);
        // What is forgotten before its time must go then.
        let (hub, stream) = (self.clone(), Arc::downgrade(stream));
        tokio::spawn(async move {
            tokio::time::sleep(window).await;
            let Some(stream) = stream.upgrade() else { return };
            hub.ended.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| !Arc::ptr_eq(other, &stream));
            hub.forget(&stream);
        });
    }

    fn forget(&self, stream: &Arc<Stream>) {
        let mut streams = self.streams();
        if streams.get(&stream.facts.response_id).is_some_and(|there| Arc::ptr_eq(there, stream)) {
            streams.remove(&stream.facts.response_id);
        }
    }

    /// A response of this session that nobody listens to any more gives way to another turn of it.
    pub async fn supersede(&self, tenant: &Tenant, session: &SessionId) {
        let of_session = |s: &Arc<Stream>| s.tenant == *tenant && s.session.as_ref() == Some(session);
        let abandoned: Vec<_> =
            self.streams().values().filter(|s| of_session(s) && s.is_abandoned()).cloned().collect();
        for stream in abandoned {
            stream.stop(Why::Cancelled);
            stream.wait().await;
        }
    }

    /// The server is about to stop: what nobody listens to ends now. What has a journal goes on in the next process.
    pub fn drain(&self) {
        self.rules.draining.store(true, Ordering::Release);
        let unheard: Vec<_> = self.streams().values().filter(|s| !s.ended() && !s.is_heard()).cloned().collect();
        unheard.iter().filter(|s| s.delivery.stream || s.is_detached()).for_each(|s| s.stop(Why::Interrupted));
    }

    fn streams(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Stream>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a stream is opened for.
pub(super) struct NewStream<'a> {
    pub turn: &'a Turn,
    pub facts: Facts,
    pub model: Arc<Model>,
    /// What an earlier process sent.
    pub events: Vec<Event>,
}

impl Sessions {
    /// Listens to a response, from its first event: a running one, or one that has ended and is still kept. A parked one
    /// goes on; one that another process has begun is taken up, also from one that is at it, unless its journal is damaged.
    pub async fn listen(&self, tenant: &Tenant, id: &str) -> Result<Running, Error> {
        Ok(match self.locate(tenant, id, true).await? {
            Found::Elsewhere(..) => return Err(Error::Engine(ELSEWHERE.into())),
            Found::Stream(stream) => Running::new(stream.facts.clone(), Source::Stream(stream.listen())),
            Found::Answer(answer) => {
                let events = answer.events.into_iter().map(record::Told::event).collect();
                Running::new(answer.facts, Source::Told(events))
            }
        })
    }

    /// A response as it is now, without listening to it.
    pub async fn so_far(&self, tenant: &Tenant, id: &str) -> Result<SoFar, Error> {
        Ok(match self.locate(tenant, id, false).await? {
            Found::Elsewhere(facts, told) => {
                let events = told.into_iter().map(record::Told::event).collect();
                SoFar { facts, events, ended: false, detached: true }
            }
            Found::Stream(stream) => {
                let (events, ended) = stream.so_far();
                SoFar { facts: stream.facts.clone(), events, ended, detached: stream.is_detached() }
            }
            Found::Answer(answer) => {
                let events = answer.events.into_iter().map(record::Told::event).collect();
                SoFar { facts: answer.facts, events, ended: true, detached: false }
            }
        })
    }

    /// Ends a running response; one that has ended is left as it is.
    pub async fn cancel(&self, tenant: &Tenant, id: &str) -> Result<(), Error> {
        if let Found::Stream(stream) = self.locate(tenant, id, true).await? {
            stream.stop(Why::Cancelled);
            stream.wait().await;
        }
        Ok(())
    }

    /// Deletes a response, after ending it, with the state that it was kept as, if no session has that.
    pub async fn delete_response(&self, tenant: &Tenant, id: &str) -> Result<(), Error> {
        let events = match self.cancel(tenant, id).await {
            Ok(()) => self.so_far(tenant, id).await?.events,
            // Which state it left is not known any more, or it has left none.
            Err(Error::ResponseDamaged(..) | Error::ResponseWaits { .. }) => {
                self.archive.erase(&Journal::stream(tenant, id)).await?;
                self.archive.unmark_running(tenant, id).await?;
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        for event in events {
            if let Event::Done { stored: Some(Ok(receipt)), .. } = event
                && receipt.session_id.is_none()
            {
                match self.delete_state(tenant, &receipt.id).await {
                    Ok(()) | Err(Error::StateNotFound(_)) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if let Some(stream) = self.hub.find(tenant, id) {
            self.hub.forget(&stream);
        }
        self.archive.remove_answer(tenant, id).await?;
        Ok(())
    }

    /// Finds a response; `take` it from another server that is at it.
    async fn locate(&self, tenant: &Tenant, id: &str, take: bool) -> Result<Found, Error> {
        let unknown = || Error::ResponseNotFound(id.into());
        if !(1..=128).contains(&id.len()) || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b)) {
            return Err(unknown());
        }
        if let Some(stream) = self.hub.find(tenant, id) {
            return Ok(Found::Stream(stream));
        }
        if let Some(answer) = self.answer(tenant, id).await? {
            let over = answer.is_over(self.hub.rules.limits.resume_window_s);
            return if over { Err(unknown()) } else { Ok(Found::Answer(Box::new(answer))) };
        }
        self.revive(tenant, id, take).await?.ok_or_else(unknown)
    }

    /// A response that has ended and is stored.
    async fn answer(&self, tenant: &Tenant, id: &str) -> Result<Option<record::Answer>, Error> {
        let answer = self.archive.answer::<record::Answer>(tenant, id).await;
        let answer = answer.map_err(|error| Error::from(error).of_response(id))?;
        answer.map(|answer| answer.facts.check(id).map(|()| answer)).transpose()
    }
}

enum Found {
    Stream(Arc<Stream>),
    Answer(Box<record::Answer>),
    /// Another server is at it; so much was sent there.
    Elsewhere(Facts, Vec<record::Told>),
}
