//! What goes into a turn and what comes out of it: the language between the wire and the use-cases.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::conversations::Anew;
use super::streams::{Facts, Source};
use crate::types::{Finish, Message, Sampling, SessionId, StateId, Tenant};

/// A validated request to generate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Turn {
    pub tenant: Tenant,
    /// `cmpl-…` or `chatcmpl-…`.
    pub response_id: String,
    /// `None` = the default model.
    pub model: Option<String>,
    pub start: Start,
    /// What is done to its conversation before it begins, once all of it was checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anew: Option<Anew>,
    pub input: Input,
    /// Choices for each prompt.
    pub choices: usize,
    pub sampling: Sampling,
    /// Stop strings of the request; the model profile's are added for chat.
    pub stop: Vec<String>,
    /// `None` = the configured default of this kind of request; 0 = only read what is new, and store the state.
    pub max_tokens: Option<u64>,
    pub store: bool,
    pub ttl_s: Option<u64>,
    /// Name of the configured initial state that a fresh sequence begins from.
    pub initial_state: Option<String>,
    pub idempotency_key: Option<String>,
    /// What the client says of the stored state, and of its session from now on.
    pub metadata: BTreeMap<String, String>,
    pub delivery: Delivery,
}

/// How a response comes to its client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    /// What the wire needs to write the response again.
    pub form: String,
    /// It is read as it comes, so that a reader who is lost may come back.
    pub stream: bool,
    /// It goes on when nobody listens, and after a restart.
    pub detach: bool,
    /// The whole response is stored until it is deleted.
    pub keep: bool,
}

/// Where a turn begins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Start {
    Fresh,
    State(StateId),
    Session {
        id: SessionId,
        if_match: Option<StateId>,
        /// Only if it has no turn yet.
        #[serde(default)]
        begins: bool,
    },
}

/// What is new in a turn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Input {
    Prompts(Vec<Prompt>),
    /// Empty only when the turn begins from a state or session: the response goes on.
    Chat(Vec<Message>),
}

impl Input {
    /// Bytes of all that is to be tokenised.
    pub(super) fn text_bytes(&self) -> usize {
        match self {
            Self::Prompts(prompts) => prompts.iter().map(Prompt::text_bytes).sum(),
            Self::Chat(messages) => messages.iter().map(|message| message.content.len()).sum(),
        }
    }
}

/// One prompt of a completion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

impl Prompt {
    fn text_bytes(&self) -> usize {
        if let Self::Text(text) = self { text.len() } else { 0 }
    }
}

/// Somebody who listens to a turn. What dropping it means, the turn's [`Delivery`] says.
#[derive(Debug)]
pub struct Running {
    /// The response id in it is the turn's, or that of the turn a repeated `Idempotency-Key` brings back.
    pub facts: Facts,
    /// It had ended before this reader came.
    pub over: bool,
    events: Source,
}

/// A number of tokens that were not computed again. It is complete before the turn's first event: a turn may wait for what
/// another one is reading.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(from = "u64", into = "u64")]
pub struct Cached(Arc<AtomicU64>);

impl Cached {
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    pub(super) fn add(&self, tokens: u64) {
        self.0.fetch_add(tokens, Ordering::AcqRel);
    }
}

impl PartialEq for Cached {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

impl From<Cached> for u64 {
    fn from(tokens: Cached) -> Self {
        tokens.get()
    }
}

impl From<u64> for Cached {
    fn from(tokens: u64) -> Self {
        Self(Arc::new(tokens.into()))
    }
}

impl Running {
    pub(super) fn new(facts: Facts, events: Source) -> Self {
        let over = match &events {
            Source::Stream(reader) => reader.is_over(),
            Source::Told(_) => true,
        };
        Self { facts, over, events }
    }

    /// All events so far, from the first.
    pub fn so_far(&self) -> Vec<Event> {
        match &self.events {
            Source::Stream(reader) => reader.so_far(),
            Source::Told(events) => events.iter().cloned().collect(),
        }
    }

    /// The next event; `None` after the last choice is done or a failure was reported.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.next().await
    }
}

/// What a running turn reports.
#[derive(Clone, Debug)]
pub enum Event {
    /// Text to append to a choice; never empty, never part of a stop string, always whole characters.
    Text { choice: usize, text: String },
    /// A choice is complete and, if it was to be stored, durable.
    Done { choice: usize, finish: Finish, completion_tokens: u64, stored: Option<Result<StateReceipt, StateError>> },
    /// The turn failed after it had begun; nothing follows.
    Failed(Error),
}

/// What a client learns of a state that was stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StateReceipt {
    pub id: StateId,
    pub parent: Option<StateId>,
    pub session_id: Option<SessionId>,
    pub turn: u64,
    /// Total positions of the sequence.
    pub tokens: u64,
    pub bytes: u64,
    pub expires_at: Option<u64>,
}

/// Why a state that was asked for could not be kept, though the answer arrived.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StateError {
    /// For programs: one of those below.
    pub code: Cow<'static, str>,
    pub message: String,
}

impl StateError {
    /// The store failed.
    pub const STORE: Cow<'static, str> = Cow::Borrowed("state_store_failed");
    /// It would have been more than its tenant may have.
    pub const QUOTA: Cow<'static, str> = Cow::Borrowed("state_quota_exceeded");
    /// It has numbers that are not finite.
    pub const UNFIT: Cow<'static, str> = Cow::Borrowed("invalid_state");
}

/// Why a use-case did not run. `api` maps each to the wire.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("the model `{0}` does not exist; GET /v1/models lists what is served")]
    ModelNotFound(String),
    #[error("no state `{0}`: it never existed, has expired or was deleted")]
    StateNotFound(StateId),
    #[error("no session `{0}`")]
    SessionNotFound(SessionId),
    #[error("no response `{0}`: it never existed, was not stored, was deleted, or its stream has ended for good")]
    ResponseNotFound(String),
    #[error("no conversation `{0}`")]
    ConversationNotFound(String),
    #[error("no item `{0}` in this conversation")]
    ItemNotFound(String),
    /// Only ever the last event of a response.
    #[error("the response was cancelled")]
    Cancelled,
    #[error(
        "the state belongs to other weights (model `{state_model}`) than `{model}` serves; resume it with the model that made it"
    )]
    StateModelMismatch { state_model: String, model: String },
    /// A session's snapshot is lost, and what the session began from is not here to read it again.
    #[error(
        "the kept state of session `{session}` is gone, and its text cannot be read again: it began from {began_from}; \
         configure that state again, or begin another session"
    )]
    InitialStateMismatch { session: SessionId, began_from: String },
    #[error("session `{0}` is running another turn; wait for it to end")]
    SessionBusy(SessionId),
    /// The turn that it runs has the same `Idempotency-Key`: its answer can soon be had.
    #[error("session `{0}` is running this very turn; ask again when it has ended")]
    TurnRunning(SessionId),
    #[error("there is a session `{0}` already; delete it first, or take another name")]
    SessionExists(SessionId),
    /// Another server committed a turn on the same head first.
    #[error("another turn of session `{session}` was committed first, or it was deleted; {}", kept(.state))]
    TurnConflict { session: SessionId, state: Option<StateId> },
    #[error("{message}")]
    QuotaExceeded { message: String },
    #[error("the head of session `{session}` is {head}, not what the turn was made conditional on")]
    SessionConflict { session: SessionId, head: String },
    /// The stored object is damaged.
    #[error("state `{0}` is damaged and cannot be used: {1}")]
    StateDamaged(StateId, String),
    /// It is whole, and of this model, but what is computed from it is not finite: nothing that the model made.
    #[error("state `{0}` cannot be gone on from: its numbers are so large that what follows from them is not finite")]
    StateUnusable(StateId),
    /// A stored record is damaged.
    #[error(
        "what is stored of this session is damaged ({0}); its states still work by their ids, and it can be deleted"
    )]
    SessionDamaged(String),
    /// What is stored of a response, or of its stream, is damaged.
    #[error("what is stored of response `{0}` is damaged ({1}); it can be deleted")]
    ResponseDamaged(String, String),
    /// A conversation's journal or its turns are damaged.
    #[error("what is stored of conversation `{0}` is damaged ({1}); it can be deleted")]
    ConversationDamaged(String, String),
    /// A request that passed the wire's validation but does not fit this model or these limits.
    #[error("{message}")]
    Invalid { param: &'static str, code: Option<&'static str>, message: String },
    #[error("the server is at capacity; try again in {} s", .retry_after.as_secs_f32())]
    Full { retry_after: Duration },
    #[error("the model is still being loaded")]
    Loading,
    #[error("the server is shutting down")]
    Draining,
    /// The weights that a response was begun with are not served here. It goes on when they are.
    #[error(
        "response `{id}` waits for the weights that it was begun with, those of model `{model}` then, which are not served \
         here; it goes on when a server with them is started, or can be deleted"
    )]
    ResponseWaits { id: String, model: String },
    /// The mark that tells of a turn by its `Idempotency-Key` is damaged.
    #[error(
        "what is stored of this `Idempotency-Key` is damaged, so whether its turn of session `{0}` was committed is not known: \
         look at the session's turns, and send what is missing with a new key"
    )]
    KeyDamaged(SessionId),
    /// What was to be stored is not, or not to be had, for a reason that clients may know. `detail` is for the log.
    #[error("{message}")]
    NotStored { message: String, detail: Option<String> },
    #[error("the state store failed: {0}")]
    Store(String),
    #[error("the model failed: {0}")]
    Engine(String),
}

fn kept(state: &Option<StateId>) -> String {
    match state {
        Some(state) => format!("this one is kept as state {state}, without a session"),
        None => "this one is not kept".into(),
    }
}
