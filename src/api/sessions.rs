//! `/v1/sessions`: named conversations and their turns.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::extract::{JsonBody, Name, Query};
use super::list::{Deleted, Identified, List, PageQuery, page};
use super::openai::reply::Usage;
use super::openai::{if_match, refuse_unknown};
use super::refusals::Refusals;
use super::states::state_id;
use super::{App, Caller, Error, ErrorBody};
use crate::session::{At, Branching, Listing, SessionInfo, TurnInfo, Turned};
use crate::types::{Message, Role, SessionId};

/// A named conversation.
#[derive(Debug, Serialize, ToSchema)]
pub struct Session {
    pub id: String,
    /// `session`.
    #[schema(value_type = String)]
    pub object: &'static str,
    pub model: String,
    /// The state that the next turn continues from.
    pub head: String,
    /// How many turns it has.
    pub turn: u64,
    /// Total positions of the sequence.
    pub tokens: u64,
    /// Size of the head's recurrent state.
    pub bytes: u64,
    /// Unix seconds.
    pub created: u64,
    /// Unix seconds.
    pub updated: u64,
    pub metadata: BTreeMap<String, String>,
}

impl From<SessionInfo> for Session {
    fn from(info: SessionInfo) -> Self {
        Self {
            id: info.id.into(),
            object: "session",
            model: info.model,
            head: info.head.into(),
            turn: info.turn,
            tokens: info.tokens,
            bytes: info.bytes,
            created: info.created,
            updated: info.updated,
            metadata: info.metadata,
        }
    }
}

impl Identified for Session {
    fn id(&self) -> &str {
        &self.id
    }
}

/// A committed turn of a session.
#[derive(Debug, Serialize, ToSchema)]
pub struct SessionTurn {
    /// The state after it.
    pub id: String,
    /// `session.turn`.
    #[schema(value_type = String)]
    pub object: &'static str,
    /// From 1.
    pub turn: u64,
    #[schema(required = true)]
    pub parent: Option<String>,
    pub response_id: String,
    /// A chat's new messages and, last, the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<TurnMessage>>,
    /// A completion's prompt and its answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// How many ids the turn added to the sequence.
    pub token_count: usize,
    /// Those ids, with `token_ids=true`. All turns' ids, in order, are the sequence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// How many ids at the end of the sequence the turn took back first, with `token_ids=true`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub takes_back: Option<usize>,
    pub usage: Usage,
    /// Unix seconds.
    pub created: u64,
}

/// One message of a turn.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
pub struct TurnMessage {
    /// `system`, `user`, `assistant` or `tool`.
    #[schema(value_type = String)]
    pub role: Role,
    pub content: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl From<Message> for TurnMessage {
    fn from(Message { role, content, name }: Message) -> Self {
        Self { role, content, name }
    }
}

impl SessionTurn {
    fn new(info: TurnInfo, token_ids: bool) -> Self {
        let usage = Usage::new(info.usage.prompt_tokens, info.usage.cached_tokens, info.usage.completion_tokens);
        let messages: Vec<TurnMessage> = info.messages.into_iter().map(TurnMessage::from).collect();
        Self {
            id: info.state.into(),
            object: "session.turn",
            turn: info.turn,
            parent: info.parent.map(String::from),
            response_id: info.response_id,
            messages: Some(messages).filter(|messages| !messages.is_empty()),
            text: info.text,
            token_count: info.token_ids.len(),
            token_ids: token_ids.then_some(info.token_ids),
            takes_back: token_ids.then_some(info.takes_back),
            usage,
            created: info.created,
        }
    }
}

/// A turn that is there, and whose record is damaged or lost.
#[derive(Debug, Serialize, ToSchema)]
pub struct DamagedTurn {
    /// `turn-` and its number, which `after` takes: its state's id is not known.
    pub id: String,
    /// `session.turn`.
    #[schema(value_type = String)]
    pub object: &'static str,
    /// From 1.
    pub turn: u64,
    /// Always true.
    pub damaged: bool,
}

/// A turn of a session; a damaged one has `damaged` and no words.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum ListedTurn {
    Whole(Box<SessionTurn>),
    Damaged(DamagedTurn),
}

impl ListedTurn {
    fn new(turned: Turned, token_ids: bool) -> Self {
        match turned {
            Turned::Whole(info) => Self::Whole(Box::new(SessionTurn::new(*info, token_ids))),
            Turned::Lost(turn) => {
                let id = Turned::lost_id(turn);
                Self::Damaged(DamagedTurn { id, object: "session.turn", turn, damaged: true })
            }
        }
    }
}

impl Identified for ListedTurn {
    fn id(&self) -> &str {
        match self {
            Self::Whole(turn) => &turn.id,
            Self::Damaged(turn) => &turn.id,
        }
    }
}

/// List sessions, by name.
#[utoipa::path(
    get,
    path = "/v1/sessions",
    tag = "sessions",
    params(PageQuery),
    responses((status = 200, description = "One page", body = List<Session>), Refusals),
)]
pub async fn list_sessions(
    State(app): State<Arc<App>>,
    caller: Caller,
    Query(query): Query<PageQuery>,
) -> Result<Json<List<Session>>, Error> {
    let listing = app.sessions.sessions(&caller.tenant, page(query.limit, query.after)?).await?;
    Ok(Json(List::new(listing)))
}

/// Show a session.
#[utoipa::path(
    get,
    path = "/v1/sessions/{id}",
    tag = "sessions",
    params(("id" = String, Path, description = "Name of a session, or id of a conversation, whose session it then is")),
    responses((status = 200, description = "The session", body = Session), Refusals),
)]
pub async fn show_session(State(app): State<Arc<App>>, caller: Caller, Name(id): Name) -> Result<Json<Session>, Error> {
    Ok(Json(app.sessions.session(&caller.tenant, &session_id(id)?).await?.into()))
}

/// Delete a session with its states, except those that others share. Refused with 409 while it runs a turn, and for the session of
/// a conversation, which is deleted with that.
#[utoipa::path(
    delete,
    path = "/v1/sessions/{id}",
    tag = "sessions",
    params(
        ("id" = String, Path, description = "Name of a session, or id of a conversation, whose session it then is"),
        ("if-match" = Option<String>, Header, description = "`\"<state id>\"`: only if that is its head"),
    ),
    responses(
        (status = 200, description = "It is gone", body = Deleted),
        (status = 409, description = "It is running a turn (`session_busy`)", body = ErrorBody),
        (status = 412, description = "`session_conflict`: the head is not what `If-Match` says", body = ErrorBody),
        Refusals,
    ),
)]
pub async fn delete_session(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
    headers: HeaderMap,
) -> Result<Json<Deleted>, Error> {
    let id = session_id(id)?;
    app.sessions.delete_session(&caller.tenant, &id, if_match(&headers)?.as_ref()).await?;
    Ok(Json(Deleted { id: id.into(), object: "session.deleted", deleted: true }))
}

/// Which turns, and how much of them.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct TurnsQuery {
    /// How many at most, 1 to 100; 20 by default.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<usize>,
    /// Only what comes after this id; `last_id` of the page before.
    after: Option<String>,
    /// Show the token ids of each turn.
    #[serde(default)]
    token_ids: bool,
}

/// List the turns of a session, oldest first. One whose record is damaged or lost stands in its place with `damaged`; the others
/// are still whole, and the session goes on.
#[utoipa::path(
    get,
    path = "/v1/sessions/{id}/turns",
    tag = "sessions",
    params(("id" = String, Path, description = "Name of a session, or id of a conversation, whose session it then is"), TurnsQuery),
    responses((status = 200, description = "One page", body = List<ListedTurn>), Refusals),
)]
pub async fn list_turns(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
    Query(query): Query<TurnsQuery>,
) -> Result<Json<List<ListedTurn>>, Error> {
    let page = page(query.limit, query.after)?;
    let listing = app.sessions.turns(&caller.tenant, &session_id(id)?, page).await;
    let listing = listing.map_err(|error| Error::from(error).renamed(&[("state_id", "after")]))?;
    let data = listing.data.into_iter().map(|turn| ListedTurn::new(turn, query.token_ids)).collect();
    Ok(Json(List::new(Listing { data, has_more: listing.has_more })))
}

/// Where a session is to begin that forks another.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ForkRequest {
    /// Name of the new session; not a conversation's.
    #[schema(required = true)]
    to: Option<String>,
    /// A turn, by its number from 1 or by its state's id; left out, the head.
    at: Option<Point>,
}

/// Where a session is to go back to.
#[derive(Debug, Deserialize, ToSchema)]
pub struct RewindRequest {
    /// A turn, by its number from 1 or by its state's id. That of a turn which was taken back works too.
    #[schema(required = true)]
    at: Option<Point>,
}

/// A turn: its number, or the id of the state after it.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected the number of a turn or the id of a state")]
pub enum Point {
    Turn(u64),
    State(String),
}

impl Point {
    fn at(self) -> Result<At, Error> {
        match self {
            Self::Turn(number) => Ok(At::Number(number)),
            Self::State(id) => state_id(id).map(At::State).map_err(blame_point),
        }
    }
}

/// A state that is not there stands in `at`.
fn blame_point(error: impl Into<Error>) -> Error {
    error.into().renamed(&[("state_id", "at")])
}

/// Begin another session where this one is, or was: at once, whatever its length. Nothing is computed again, and what both
/// have in common is stored once; deleting either leaves the other whole.
#[utoipa::path(
    post,
    path = "/v1/sessions/{id}/fork",
    tag = "sessions",
    params(
        ("id" = String, Path, description = "Name of a session, or id of a conversation, whose session it then is"),
        ("if-match" = Option<String>, Header, description = "`\"<state id>\"`: only if that is its head"),
    ),
    request_body = ForkRequest,
    responses(
        (status = 200, description = "The new session", body = Session),
        (status = 409, description = "There is a session of that name (`session_exists`)", body = ErrorBody),
        (status = 412, description = "`session_conflict`: the head is not what `If-Match` says", body = ErrorBody),
        Refusals,
    ),
)]
pub async fn fork_session(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<Session>, Error> {
    let ForkRequest { to, at } = whole(&body)?;
    let to = to.ok_or_else(|| Error::invalid("to", "`to` must name the new session"))?;
    let to = SessionId::parse(to).map_err(|e| Error::invalid("to", e.to_string()))?;
    let branching = Branching { at: at.map(Point::at).transpose()?, if_match: if_match(&headers)? };
    let forked = app.sessions.fork(&caller.tenant, &session_id(id)?, &to, branching).await;
    Ok(Json(forked.map_err(blame_point)?.into()))
}

/// Move the head of a session to an earlier turn. The turns after it are no longer the session's, but their states stay
/// and can be gone back to by their ids. Refused with 409 while it runs a turn.
#[utoipa::path(
    post,
    path = "/v1/sessions/{id}/rewind",
    tag = "sessions",
    params(
        ("id" = String, Path, description = "Name of a session, or id of a conversation, whose session it then is"),
        ("if-match" = Option<String>, Header, description = "`\"<state id>\"`: only if that is its head"),
    ),
    request_body = RewindRequest,
    responses(
        (status = 200, description = "The session", body = Session),
        (status = 409, description = "It is running a turn (`session_busy`), or another server committed one just now \
                                      (`session_conflict`)", body = ErrorBody),
        (status = 412, description = "`session_conflict`: the head is not what `If-Match` says", body = ErrorBody),
        Refusals,
    ),
)]
pub async fn rewind_session(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<Session>, Error> {
    let RewindRequest { at } = whole(&body)?;
    let at = at.ok_or_else(|| Error::invalid("at", "`at` must be a turn's number or a state's id"))?;
    let branching = Branching { at: Some(at.at()?), if_match: if_match(&headers)? };
    let rewound = app.sessions.rewind(&caller.tenant, &session_id(id)?, branching).await;
    Ok(Json(rewound.map_err(blame_point)?.into()))
}

/// Reads a body of which every field must be understood: one that is not may have said where to go.
fn whole<T: DeserializeOwned>(body: &JsonBody) -> Result<T, Error> {
    let (request, others) = body.split()?;
    refuse_unknown(&others.into_keys().collect::<Vec<_>>())?;
    Ok(request)
}

/// What cannot be a session's name is unknown like any other.
fn session_id(id: String) -> Result<SessionId, Error> {
    SessionId::parse(id.as_str()).map_err(|_| Error::UnknownSession(id))
}
