//! From the events of a turn to replies and chunks.

use std::sync::Arc;

use axum::Json;
use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use serde::Serialize;
use utoipa::ToSchema;

use super::chunks::Chunks;
use super::generation::Order;
use super::parameters::Ignored;
use crate::api::record::Record;
use crate::api::{App, Error, sse};
use crate::session::{self, Cached, Event, Facts, Running, Start, StateError, StateReceipt};
use crate::types::Finish;

pub const STATE_ID: HeaderName = HeaderName::from_static("x-state-id");

/// How one endpoint writes answers.
pub trait Shape: Send + 'static {
    /// A whole answer.
    type Choice: Serialize + Send;
    /// A part of an answer in a stream.
    type Piece: Serialize + Send;
    /// `object` of a reply.
    const OBJECT: &'static str;
    /// `object` of a chunk.
    const CHUNK: &'static str;
    const SERVICE_TIER: Option<&'static str>;

    fn choice(index: usize, text: String, finish: Finish, kept: Kept) -> Self::Choice;
    /// What comes before a choice's text.
    fn opening(index: usize) -> Option<Self::Piece>;
    fn piece(index: usize, text: String) -> Self::Piece;
    /// What comes after a choice's text.
    fn last(index: usize, finish: Finish, kept: Kept) -> Self::Piece;
}

/// What all replies and chunks of one turn share.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Heading {
    pub id: String,
    /// Unix seconds.
    pub created: u64,
    /// Served name of the model that answers.
    pub model: String,
    /// Changes with the model's weights and with the version of the server: only with the same one does the same seed
    /// promise the same text.
    pub system_fingerprint: String,
}

/// A whole reply.
#[derive(Debug, Serialize, ToSchema)]
pub struct Reply<C> {
    #[serde(flatten)]
    pub heading: Heading,
    #[schema(value_type = String)]
    pub object: &'static str,
    /// In the order of their `index`.
    pub choices: Vec<C>,
    pub usage: Usage,
    /// `default`, for chats.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub service_tier: Option<&'static str>,
    /// The state of the only choice.
    #[serde(flatten)]
    pub kept: Kept,
}

/// One event of a stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct Chunk<P> {
    #[serde(flatten)]
    pub heading: Heading,
    #[schema(value_type = String)]
    pub object: &'static str,
    /// One piece; none in the chunk that carries the usage.
    pub choices: Vec<P>,
    /// Only with `stream_options.include_usage`: null before the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>, required = false)]
    pub usage: Option<Option<Usage>>,
    /// `default`, for chats.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub service_tier: Option<&'static str>,
    /// The state of the only choice, beside its `finish_reason`.
    #[serde(flatten)]
    pub kept: Kept,
}

/// What became of the state; no field is there when none was to be stored.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Kept {
    /// The stored state, or null when it could not be stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<StoredState>, required = false)]
    pub state: Option<Option<StoredState>>,
    /// Why the state could not be stored, though the answer is complete. The session's head has not moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_error: Option<StateProblem>,
}

/// A state that is durable now: a later request may continue from it.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct StoredState {
    pub id: String,
    #[schema(required = true)]
    pub parent: Option<String>,
    #[schema(required = true)]
    pub session_id: Option<String>,
    /// Number of the turn in its session or chain, from 1.
    pub turn: u64,
    /// Total positions of the sequence.
    pub tokens: u64,
    /// Size of the recurrent state.
    pub bytes: u64,
    /// Unix seconds; null = kept until deleted.
    #[schema(required = true)]
    pub expires_at: Option<u64>,
}

/// Why a state was not stored.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct StateProblem {
    /// `state_store_failed`, `state_quota_exceeded`, or `invalid_state`: it has numbers that are not finite.
    pub code: String,
    pub message: String,
}

impl From<StateReceipt> for StoredState {
    fn from(receipt: StateReceipt) -> Self {
        Self {
            id: receipt.id.into(),
            parent: receipt.parent.map(String::from),
            session_id: receipt.session_id.map(String::from),
            turn: receipt.turn,
            tokens: receipt.tokens,
            bytes: receipt.bytes,
            expires_at: receipt.expires_at,
        }
    }
}

impl From<Option<Result<StateReceipt, StateError>>> for Kept {
    fn from(stored: Option<Result<StateReceipt, StateError>>) -> Self {
        match stored {
            None => Self::default(),
            Some(Ok(receipt)) => Self { state: Some(Some(receipt.into())), state_error: None },
            Some(Err(StateError { code, message })) => {
                Self { state: Some(None), state_error: Some(StateProblem { code: code.into_owned(), message }) }
            }
        }
    }
}

/// Why an answer ended.
#[derive(ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(dead_code, reason = "the schema of `Finish`, which knows nothing of schemas")]
pub enum FinishReason {
    /// A stop string or an end token.
    Stop,
    /// The token limit.
    Length,
}

/// Token counts: the context once for each prompt, the answers of all choices.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
    pub prompt_tokens_details: PromptTokens,
    pub completion_tokens_details: CompletionTokens,
}

#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct PromptTokens {
    /// How many were not computed again.
    pub cached_tokens: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct CompletionTokens {
    /// Always 0: thoughts are not told apart yet.
    pub reasoning_tokens: u64,
}

impl Usage {
    pub fn new(prompt_tokens: u64, cached_tokens: u64, completion_tokens: u64) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokens { cached_tokens },
            completion_tokens_details: CompletionTokens { reasoning_tokens: 0 },
        }
    }
}

/// What is known of a turn when its answer begins.
#[derive(Clone, Debug)]
pub struct Opening {
    pub heading: Heading,
    pub prompt_tokens: u64,
    pub cached_tokens: Cached,
    pub choices: usize,
}

impl Opening {
    pub fn new(facts: &Facts) -> Self {
        let heading = Heading {
            id: facts.response_id.clone(),
            created: facts.created,
            model: facts.model.clone(),
            system_fingerprint: system_fingerprint(&facts.fingerprint),
        };
        let &Facts { prompt_tokens, ref cached_tokens, choices, .. } = facts;
        Self { heading, prompt_tokens, cached_tokens: cached_tokens.clone(), choices }
    }
}

/// The build's version and the beginning of the weights' fingerprint.
fn system_fingerprint(weights: &str) -> String {
    format!("fp_{}_{}", env!("CARGO_PKG_VERSION"), weights.get(..12).unwrap_or(weights))
}

/// Runs an order and answers it, at once or as a stream. Dropping the future, or the stream, cancels the turn.
pub async fn respond<S: Shape>(app: &Arc<App>, order: Order, record: Record) -> Result<Response, Error> {
    let names = own_names(&order.turn.start);
    let running = async { app.sessions.start(app.sessions.follow(order.turn).await?).await };
    let running = running.await.map_err(|error| Error::from(error).renamed(names))?;
    record.begins(&running.facts);
    let opening = Opening::new(&running.facts);
    let events = Box::pin(events(running));
    let response = match order.stream {
        Some(options) => {
            let chunks = Chunks::<S>::new(opening, options.include_usage.unwrap_or(false));
            sse::reply(chunks, events, record, None)
        }
        None => {
            let answers = collect(events, opening.choices, &record).await?;
            let response = whole::<S>(opening, answers);
            record.ends();
            response
        }
    };
    Ok((Ignored(order.ignored), response).into_response())
}

/// What a turn that begins in a session calls the state it begins from.
fn own_names(start: &Start) -> &'static [(&'static str, &'static str)] {
    if let Start::Session { .. } = start { &[("state_id", "session_id")] } else { &[] }
}

/// The events of a turn; dropping the stream is to stop listening.
pub fn events(running: Running) -> impl Stream<Item = Event> + Send {
    futures::stream::unfold(running, |mut running| async move { running.next().await.map(|event| (event, running)) })
}

/// What an engine that stops without a word is reported as.
pub fn broken_off() -> session::Error {
    session::Error::Engine("the events ended before the answer was complete".into())
}

/// A choice when everything of it is there.
#[derive(Debug)]
pub(super) struct Answer {
    text: String,
    finish: Finish,
    completion_tokens: u64,
    kept: Kept,
}

/// Waits for every choice of a turn.
pub(super) async fn collect(
    mut events: impl Stream<Item = Event> + Unpin,
    choices: usize,
    record: &Record,
) -> Result<Vec<Answer>, Error> {
    let mut texts = vec![String::new(); choices];
    let mut answers: Vec<Option<Answer>> = Vec::new();
    answers.resize_with(choices, || None);
    while answers.iter().any(Option::is_none) {
        let event = events.next().await.ok_or_else(broken_off)?;
        record.heard(&event);
        match event {
            Event::Text { choice, text } => texts[choice].push_str(&text),
            Event::Done { choice, finish, completion_tokens, stored } => {
                let text = std::mem::take(&mut texts[choice]);
                answers[choice] = Some(Answer { text, finish, completion_tokens, kept: stored.into() });
            }
            Event::Failed(error) => return Err(error.into()),
        }
    }
    Ok(answers.into_iter().flatten().collect())
}

pub(super) fn whole<S: Shape>(opening: Opening, answers: Vec<Answer>) -> Response {
    let completion_tokens = answers.iter().map(|answer| answer.completion_tokens).sum();
    let kept = match answers.as_slice() {
        [only] => only.kept.clone(),
        _ => Kept::default(),
    };
    let state_id = kept.state.as_ref().and_then(|state| state.as_ref()).map(|state| state.id.clone());
    let choices = answers.into_iter().enumerate();
    let reply = Reply {
        heading: opening.heading,
        object: S::OBJECT,
        choices: choices.map(|(index, a)| S::choice(index, a.text, a.finish, a.kept)).collect(),
        usage: Usage::new(opening.prompt_tokens, opening.cached_tokens.get(), completion_tokens),
        service_tier: S::SERVICE_TIER,
        kept,
    };
    let mut response = Json(reply).into_response();
    if let Some(id) = state_id {
        let value = HeaderValue::from_str(&id).expect("state ids are hexadecimal digits");
        response.headers_mut().insert(STATE_ID, value);
    }
    response
}
