//! L3: use-cases. Resume a state, tokenise only what is new, submit it, stream, keep the child, commit the turn.

mod branch;
mod conversations;
mod initial;
mod keep;
mod origin;
mod plan;
mod portable;
mod prefix;
mod prompt;
mod queries;
mod quota;
mod rebuild;
mod retain;
mod run;
mod streams;
mod sweep;
mod turn;

use std::collections::{BTreeMap, btree_map::Entry};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::engine;
pub use crate::state::At;
use crate::state::{self, Archive, Store};
use crate::text::{Profile, Tokenizer};
use crate::types::{Message, Sampling, Segment, SessionId, StateId, Tenant, TurnUsage};
use prefix::PrefixCache;
use streams::Hub;

pub use branch::Branching;
pub use conversations::{Anew, Conversation, StoredItem};
pub use initial::InitialStates;
pub use portable::check_metadata;
pub use prefix::PrefixLimits;
pub use quota::{Quota, Quotas};
pub use retain::{Policy, SweepPace};
pub use streams::{Facts, SoFar, StreamLimits};
pub use sweep::Swept;
pub use turn::{Cached, Delivery, Error, Event, Input, Prompt, Running, Start, StateError, StateReceipt, Turn};

/// What is known of a served model.
#[derive(Clone, Debug)]
pub struct ModelCard {
    /// Served name.
    pub id: String,
    pub aliases: Vec<String>,
    /// Unix seconds when it was loaded.
    pub created: u64,
    /// `v7`, …
    pub generation: String,
    pub layers: usize,
    pub width: usize,
    /// Rows of the head: every valid token id is below it.
    pub vocabulary: usize,
    pub parameters: u64,
    /// Memory that the weights take.
    pub weight_bytes: u64,
    /// Bytes of the recurrent state of one sequence.
    pub state_bytes: u64,
    /// Bytes by which it grows with every token, as far as it does.
    pub state_bytes_per_token: u64,
    /// Tokens a sequence can have, where the model has such a limit.
    pub context: Option<usize>,
    pub fingerprint: String,
    pub tokenizer: String,
    pub template: String,
    pub stop: Vec<String>,
    pub stop_tokens: Vec<u32>,
    /// The profile's sampling defaults.
    pub sampling: Sampling,
    /// Names of the initial states that requests can begin from.
    pub initial_states: Vec<String>,
}

/// A page of a listing, oldest first.
#[derive(Clone, Debug)]
pub struct Page {
    pub limit: usize,
    /// Only what comes after this id.
    pub after: Option<String>,
}

/// One page and whether more follows.
#[derive(Clone, Debug)]
pub struct Listing<T> {
    pub data: Vec<T>,
    pub has_more: bool,
}

/// Metadata of a stored state.
#[derive(Clone, Debug)]
pub struct StateInfo {
    pub id: StateId,
    pub model: String,
    pub parent: Option<StateId>,
    pub session_id: Option<SessionId>,
    pub turn: u64,
    pub tokens: u64,
    pub bytes: u64,
    pub created: u64,
    pub expires_at: Option<u64>,
    pub metadata: BTreeMap<String, String>,
}

/// Metadata of a session.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    pub id: SessionId,
    pub model: String,
    pub head: StateId,
    pub turn: u64,
    pub tokens: u64,
    pub bytes: u64,
    pub created: u64,
    pub updated: u64,
    pub metadata: BTreeMap<String, String>,
}

/// A turn of a session, as far as its record tells.
#[derive(Clone, Debug)]
pub enum Turned {
    Whole(Box<TurnInfo>),
    /// The record of the turn of that number is damaged or lost.
    Lost(u64),
}

/// What a lost turn's number stands behind where an id is asked for.
const LOST: &str = "turn-";

impl Turned {
    /// What stands for the id of a lost turn, whose state is not known.
    pub fn lost_id(number: u64) -> String {
        format!("{LOST}{number}")
    }
}

/// One committed turn of a session.
#[derive(Clone, Debug)]
pub struct TurnInfo {
    pub state: StateId,
    pub parent: Option<StateId>,
    pub turn: u64,
    pub response_id: String,
    /// Chat: what was sent and, last, the answer. Empty for a completion.
    pub messages: Vec<Message>,
    /// Completion: the prompt and the answer.
    pub text: Option<String>,
    /// The ids this turn added to the sequence.
    pub token_ids: Vec<u32>,
    pub takes_back: usize,
    pub usage: TurnUsage,
    pub created: u64,
}

/// Whether the server takes new work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    Loading,
    Ready,
    /// A model's engine has stopped, which a restart mends and nothing else.
    Stopped,
    Draining,
}

/// What a turn may ask of the models.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TurnLimits {
    /// New tokens of a chat answer that does not say how many it wants.
    pub default_max_tokens: u64,
    /// New tokens that can be asked for.
    pub max_tokens: u64,
    /// Tokens of what is new in a prompt.
    pub prompt_tokens: usize,
}

impl Default for TurnLimits {
    fn default() -> Self {
        Self { default_max_tokens: 2048, max_tokens: 1_000_000, prompt_tokens: 1_000_000 }
    }
}

/// A loaded model, ready for turns.
pub struct Model {
    pub card: ModelCard,
    pub engine: engine::Handle,
    pub text: Arc<dyn Tokenizer>,
    pub profile: Profile,
    pub initial: InitialStates,
    /// What its state is made of.
    pub layout: Vec<Segment>,
    /// Choices that can run at once.
    pub seats: usize,
}

/// How long a server that stops writes what its prefix cache has in memory.
const HANDING_OVER: Duration = Duration::from_secs(10);

/// The use-cases, for every model and tenant of this server.
pub struct Sessions {
    /// The first is the default. Set once they are loaded.
    models: OnceLock<Vec<Arc<Model>>>,
    /// Cancelled, as that can be waited for, when they are.
    opened: CancellationToken,
    archive: Archive,
    limits: TurnLimits,
    /// Seconds that a state is kept when the request does not say; `None` = until it is deleted.
    default_ttl_s: Option<u64>,
    policy: Arc<Policy>,
    draining: AtomicBool,
    /// Turns under way.
    turns: TaskTracker,
    /// Ends them when their time is up.
    stop: CancellationToken,
    busy: Busy,
    long_texts: plan::LongTexts,
    hub: Arc<Hub>,
    /// What was read before; `None` = nothing is kept.
    prefix: Option<Arc<PrefixCache>>,
}

impl Sessions {
    /// Use-cases over stored states, before any model is loaded.
    pub fn new(archive: Archive, limits: TurnLimits, default_ttl_s: Option<u64>) -> Self {
        Self {
            models: OnceLock::new(),
            opened: CancellationToken::new(),
            archive,
            limits,
            default_ttl_s,
            policy: Arc::default(),
            draining: AtomicBool::new(false),
            turns: TaskTracker::new(),
            stop: CancellationToken::new(),
            busy: Busy::default(),
            long_texts: plan::LongTexts::default(),
            hub: Arc::new(Hub::new(StreamLimits::default(), false)),
            prefix: None,
        }
    }

    /// How many states are kept, and of whom how many.
    pub fn with_policy(self, policy: Policy) -> Self {
        Self { policy: Arc::new(policy), ..self }
    }

    /// With other limits of streams; `shared` says that other servers have the same store.
    pub fn with_streams(self, limits: StreamLimits, shared: bool) -> Self {
        Self { hub: Arc::new(Hub::new(limits, shared)), ..self }
    }

    /// Keeps what turns have read, so that no turn reads it again; what has no room in memory in `disk`, if it is given, where a
    /// later process finds it. With one, within an async runtime.
    pub fn with_prefix_cache(self, limits: &PrefixLimits, disk: Option<Arc<dyn Store>>) -> Self {
        Self { prefix: PrefixCache::new(limits, disk).map(Arc::new), ..self }
    }

    /// Waits until the prefix cache has seen what is on disk and written what it has to.
    pub async fn prefix_settled(&self) {
        if let Some(prefix) = &self.prefix {
            prefix.settled().await;
        }
    }

    /// Begins to serve these models; the first is the default. Only the first call counts.
    pub fn open(&self, models: Vec<Model>) {
        // A second call would change the meaning of running turns; there is none.
        let _ = self.models.set(models.into_iter().map(Arc::new).collect());
        self.opened.cancel();
    }

    /// Waits until there are models to serve.
    pub async fn ready(&self) {
        self.opened.cancelled().await;
    }

    pub fn readiness(&self) -> Readiness {
        match (self.draining.load(Ordering::Acquire), self.models.get()) {
            (true, _) => Readiness::Draining,
            (false, None) => Readiness::Loading,
            (false, Some(models)) if models.iter().any(|model| model.engine.has_stopped()) => Readiness::Stopped,
            (false, Some(_)) => Readiness::Ready,
        }
    }

    /// Refuses new turns from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.hub.drain();
        self.turns.close();
    }

    /// Waits for the running turns to end, and ends them when `deadline` is over; then hands the prefix cache to the next process,
    /// where it has a disk, within seconds. After [`drain`](Self::drain).
    pub async fn finish(&self, deadline: Duration) {
        if tokio::time::timeout(deadline, self.turns.wait()).await.is_err() {
            tracing::warn!(turns = self.turns.len(), "ending turns that did not finish in time");
            self.stop.cancel();
            self.turns.wait().await;
        }
        if let Some(prefix) = &self.prefix {
            // What is not written by then is read again.
            let _ = tokio::time::timeout(HANDING_OVER, prefix.hand_over()).await;
        }
    }

    /// Every served model, the default first.
    pub fn models(&self) -> Vec<ModelCard> {
        self.models.get().into_iter().flatten().map(|m| m.card.clone()).collect()
    }

    /// The model of this name or alias, or the default one.
    pub fn model(&self, name: Option<&str>) -> Result<ModelCard, Error> {
        self.find(name).map(|m| m.card.clone())
    }

    /// The model with these weights, if it is served: rather the one of that name.
    fn with_weights(&self, fingerprint: &str, name: &str) -> Result<Option<&Arc<Model>>, Error> {
        let same = |model: &&Arc<Model>| model.card.fingerprint == fingerprint;
        let mut models = self.served()?.iter().filter(same);
        Ok(models.clone().find(|model| model.card.id == name).or_else(|| models.next()))
    }

    fn served(&self) -> Result<&[Arc<Model>], Error> {
        if self.draining.load(Ordering::Acquire) {
            return Err(Error::Draining);
        }
        self.models.get().map(Vec::as_slice).ok_or(Error::Loading)
    }

    fn find(&self, name: Option<&str>) -> Result<&Arc<Model>, Error> {
        let models = self.served()?;
        let named = |name: &str| models.iter().find(|m| m.card.id == name || m.card.aliases.iter().any(|a| a == name));
        match name {
            Some(name) => named(name).ok_or_else(|| Error::ModelNotFound(name.into())),
            None => models.first().ok_or_else(|| Error::ModelNotFound("default".into())),
        }
    }
}

/// Which sessions run a turn in this process, and the `Idempotency-Key` of that turn.
#[derive(Clone, Default)]
struct Busy(Arc<Mutex<Runs>>);

type Runs = BTreeMap<(Tenant, SessionId), Option<String>>;

/// The right to run a turn of a session, given back when dropped.
struct Turnstile {
    busy: Busy,
    key: (Tenant, SessionId),
}

impl Busy {
    fn enter(&self, tenant: &Tenant, session: &SessionId, turn: Option<&str>) -> Result<Turnstile, Error> {
        let key = (tenant.clone(), session.clone());
        match self.lock().entry(key.clone()) {
            Entry::Vacant(free) => free.insert(turn.map(String::from)),
            Entry::Occupied(running) if turn.is_some() && running.get().as_deref() == turn => {
                return Err(Error::TurnRunning(session.clone()));
            }
            Entry::Occupied(_) => return Err(Error::SessionBusy(session.clone())),
        };
        Ok(Turnstile { busy: self.clone(), key })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Runs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turnstile {
    fn drop(&mut self) {
        self.busy.lock().remove(&self.key);
    }
}

impl From<engine::Full> for Error {
    fn from(engine::Full { retry_after }: engine::Full) -> Self {
        Self::Full { retry_after }
    }
}

impl From<state::Error> for Error {
    fn from(error: state::Error) -> Self {
        match error {
            state::Error::Damaged { key, why } => {
                tracing::error!(key, why, "a stored object is damaged");
                Error::SessionDamaged(why)
            }
            state::Error::Store { fault: Some(fault), .. } => {
                let message = format!("{fault}. Nothing was changed");
                Error::NotStored { message, detail: Some(error.to_string()) }
            }
            other => Error::Store(other.to_string()),
        }
    }
}

impl Error {
    /// What the log should say beside it, and clients should not see.
    pub fn detail(&self) -> Option<&str> {
        if let Self::NotStored { detail, .. } = self { detail.as_deref() } else { None }
    }

    /// Damage of a response's records, not of a session's.
    fn of_response(self, id: &str) -> Self {
        if let Self::SessionDamaged(why) = self { Self::ResponseDamaged(id.into(), why) } else { self }
    }

    /// Damage of a conversation's journal or of its turns.
    fn of_conversation(self, id: &str) -> Self {
        if let Self::SessionDamaged(why) = self { Self::ConversationDamaged(id.into(), why) } else { self }
    }
}
