//! What can go wrong between a client and a use-case, and the one mapping of all of it to the wire.

use std::borrow::Cow;
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::session::{self, Readiness};

/// How long a client should wait for a server that is loading or being replaced.
const RESTART: Duration = Duration::from_secs(5);

/// How long a client should wait for a turn that it asked for before and that still runs.
const RUNNING: Duration = Duration::from_millis(500);

/// Error messages repeat what was wrong with a request; not all of a huge one.
const LONGEST_MESSAGE: usize = 500;

/// Why a request has no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Session(#[from] session::Error),
    /// The request is wrong; `param` is the path of the field to blame.
    #[error("{message}")]
    Invalid { param: Option<String>, code: &'static str, message: String },
    #[error("no state `{0}`: it never existed, has expired or was deleted")]
    UnknownState(String),
    #[error("no session `{0}`")]
    UnknownSession(String),
    #[error("no item `{0}` in this conversation")]
    UnknownItem(String),
    /// An item that a request names at a place of its body.
    #[error("no item `{id}` in this conversation or in a stored response")]
    UnknownReference { at: String, id: String },
    #[error("{0}")]
    Unauthorized(&'static str),
    #[error("there is nothing at {0}; GET /docs shows every route")]
    NoRoute(String),
    #[error("{method} is not possible here; GET /docs shows every route")]
    Method { method: String },
    #[error("the body is larger than {limit} bytes")]
    TooLarge { limit: usize },
    #[error("the body must be JSON with the header `content-type: application/json`, not {0}")]
    ContentType(String),
    #[error("the body must be a state's file with the header `content-type: application/octet-stream`, not {0}")]
    BinaryType(String),
    #[error("the body must be sent as it is, not with the header `content-encoding: {0}`")]
    Encoding(String),
    #[error("the request ran into a defect of the server")]
    Panic,
    #[error("a model of this server has stopped; it must be started again")]
    Stopped,
    /// Another failure, in a request where the field to blame has a name of its own.
    #[error("{error}")]
    Renamed { param: &'static str, error: Box<Error> },
}

impl Error {
    /// A value that is out of range or does not fit the others.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { param: Some(param.into()), code: "invalid_value", message: message.into() }
    }

    /// A parameter that is needed and not there.
    pub fn missing(param: &str) -> Self {
        let message = format!("`{param}` is missing");
        Self::Invalid { param: Some(param.into()), code: "missing_required_parameter", message }
    }

    /// A parameter that is known and not supported, with a value that would matter.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { param: Some(param.into()), code: "unsupported_parameter", message: message.into() }
    }

    /// The same failure of a request in which some fields have names of their own: each with the one it is known by.
    pub fn renamed(self, names: &[(&str, &'static str)]) -> Self {
        let wire = self.wire();
        let own = names.iter().find(|(known, _)| wire.param.as_deref() == Some(known)).map(|(_, own)| *own);
        drop(wire);
        match own {
            Some(param) => Self::Renamed { param, error: Box::new(self) },
            None => self,
        }
    }

    /// The failure itself, whatever it blames.
    fn cause(&self) -> &Self {
        if let Self::Renamed { error, .. } = self { error.cause() } else { self }
    }

    /// A server that takes no turns now.
    pub fn not_ready(readiness: Readiness) -> Option<Self> {
        match readiness {
            Readiness::Ready => None,
            Readiness::Loading => Some(session::Error::Loading.into()),
            Readiness::Draining => Some(session::Error::Draining.into()),
            Readiness::Stopped => Some(Self::Stopped),
        }
    }

    /// What a client sees of the failure, also inside an event stream.
    pub fn body(&self) -> ErrorBody {
        let wire = self.wire();
        ErrorBody {
            error: ErrorDetail {
                message: self.public_message(),
                kind: wire.kind.into(),
                param: wire.param.map(Cow::into_owned),
                code: Some(wire.code.into()),
            },
        }
    }

    /// What the request's log line says of it.
    pub fn failure(&self) -> Failure {
        let wire = self.wire();
        let detail = match self.cause() {
            Self::Session(error) if error.detail().is_some() => error.detail().map(String::from),
            _ => wire.hidden.then(|| self.to_string()),
        };
        Failure { code: wire.code, detail }
    }

    fn public_message(&self) -> String {
        if self.wire().hidden {
            return "the server failed to handle the request; its log tells more under this request id".into();
        }
        let mut message = self.to_string();
        if message.len() > LONGEST_MESSAGE {
            message.truncate(message.floor_char_boundary(LONGEST_MESSAGE));
            message.push('…');
        }
        message
    }

    /// The table.
    fn wire(&self) -> Wire<'_> {
        use session::Error as S;
        match self {
            Self::Invalid { param, code, .. } => Wire::new(400, code).param(param.as_deref()),
            Self::Unauthorized(_) => Wire::new(401, "invalid_api_key"),
            Self::NoRoute(_) => Wire::new(404, "unknown_url"),
            Self::Method { .. } => Wire::new(405, "method_not_allowed"),
            Self::TooLarge { .. } => Wire::new(413, "request_too_large"),
            Self::ContentType(_) | Self::BinaryType(_) => Wire::new(415, "unsupported_media_type"),
            Self::Encoding(_) => Wire::new(415, "unsupported_media_type").param(Some("content-encoding")),
            Self::Panic => Wire::new(500, "internal_error"),
            Self::Stopped => Wire::new(503, "engine_stopped"),
            Self::Renamed { param, error } => error.wire().param(Some(param)),
            Self::UnknownState(_) => Wire::new(404, "state_not_found").param(Some("state_id")),
            Self::UnknownSession(_) => Wire::new(404, "session_not_found").param(Some("session_id")),
            Self::UnknownReference { at, .. } => Wire::new(404, "item_not_found").param(Some(at)),
            Self::UnknownItem(_) => Wire::new(404, "item_not_found").param(Some("item_id")),
            Self::Session(error) => match error {
                S::ModelNotFound(_) => Wire::new(404, "model_not_found").param(Some("model")),
                S::StateNotFound(_) => Wire::new(404, "state_not_found").param(Some("state_id")),
                S::SessionNotFound(_) => Wire::new(404, "session_not_found").param(Some("session_id")),
                S::ResponseNotFound(_) => Wire::new(404, "response_not_found").param(Some("response_id")),
                S::ConversationNotFound(_) => Wire::new(404, "conversation_not_found").param(Some("conversation")),
                S::ItemNotFound(_) => Wire::new(404, "item_not_found").param(Some("item_id")),
                S::Cancelled => Wire::new(409, "response_cancelled").last(),
                S::StateModelMismatch { .. } => Wire::new(409, "state_model_mismatch").param(Some("state_id")).last(),
                S::InitialStateMismatch { .. } => {
                    Wire::new(409, "initial_state_mismatch").param(Some("session_id")).last()
                }
                S::SessionBusy(_) => Wire::new(409, "session_busy").param(Some("session_id")).last(),
                // An SDK that lost the connection and asks again will find the answer.
                S::TurnRunning(_) => Wire::new(409, "session_busy").param(Some("session_id")).after(RUNNING),
                S::SessionExists(_) => Wire::new(409, "session_exists").param(Some("to")).last(),
                S::TurnConflict { .. } => Wire::new(409, "session_conflict").param(Some("session_id")).last(),
                S::QuotaExceeded { .. } => Wire::new(403, "state_quota_exceeded"),
                S::SessionConflict { .. } => Wire::new(412, "session_conflict").param(Some("session_id")),
                S::StateDamaged(..) => Wire::new(500, "state_damaged").param(Some("state_id")).shown().last(),
                S::StateUnusable(_) => Wire::new(400, "invalid_state").param(Some("state_id")),
                S::SessionDamaged(_) => Wire::new(500, "session_damaged").param(Some("session_id")).shown().last(),
                S::ResponseDamaged(..) => Wire::new(500, "response_damaged").param(Some("response_id")).shown().last(),
                S::ConversationDamaged(..) => {
                    Wire::new(500, "conversation_damaged").param(Some("conversation")).shown().last()
                }
                S::Invalid { param, code, .. } => Wire::new(400, code.unwrap_or("invalid_value")).param(Some(param)),
                S::Full { retry_after } => Wire::new(429, "rate_limit_exceeded").after(*retry_after),
                S::Loading => Wire::new(503, "loading").after(RESTART),
                S::Draining => Wire::new(503, "shutting_down").after(RESTART),
                // Until the right server is started.
                S::ResponseWaits { .. } => {
                    Wire::new(409, "state_model_mismatch").param(Some("response_id")).after(RESTART)
                }
                S::KeyDamaged(_) => Wire::new(500, "session_damaged").param(Some("idempotency-key")).shown().last(),
                // A disk takes longer to be mended than an SDK waits.
                S::NotStored { .. } => Wire::new(500, "store_failed").shown().last(),
                S::Store(_) => Wire::new(500, "store_failed"),
                S::Engine(_) => Wire::new(500, "engine_failed"),
            },
        }
    }
}

/// How one failure looks on the wire.
struct Wire<'a> {
    status: StatusCode,
    kind: &'static str,
    code: &'static str,
    param: Option<Cow<'a, str>>,
    /// Whether the message is for the server's log only.
    hidden: bool,
    /// `x-should-retry: false`: SDKs retry 409 and 5xx by themselves, and here that cannot help.
    last: bool,
    retry_after: Option<Duration>,
}

impl<'a> Wire<'a> {
    fn new(status: u16, code: &'static str) -> Self {
        let kind = match status {
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        let status = StatusCode::from_u16(status).expect("the table holds valid statuses");
        let (param, last, retry_after) = (None, false, None);
        Self { status, kind, code, param, hidden: status.as_u16() == 500, last, retry_after }
    }
    fn param(self, param: Option<&'a str>) -> Self {
        Self { param: param.map(Cow::Borrowed), ..self }
    }
    fn last(self) -> Self {
        Self { last: true, ..self }
    }
    fn shown(self) -> Self {
        Self { hidden: false, ..self }
    }
    fn after(self, wait: Duration) -> Self {
        Self { retry_after: Some(wait), ..self }
    }
}

/// What a request's log line says of a failure; a reply carries it in its extensions.
#[derive(Clone, Debug)]
pub struct Failure {
    pub code: &'static str,
    /// What the client does not get to see: paths and the like.
    pub detail: Option<String>,
}

const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let wire = self.wire();
        let mut response = (wire.status, Json(self.body())).into_response();
        response.extensions_mut().insert(self.failure());
        let headers = response.headers_mut();
        if wire.last {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if let Some(wait) = wire.retry_after {
            let millis = wait.as_millis().max(1) as u64;
            headers.insert(header::RETRY_AFTER, millis.div_ceil(1000).into());
            headers.insert(RETRY_AFTER_MS, millis.into());
        }
        if let Self::Session(session::Error::TurnConflict { state: Some(state), .. }) = self.cause() {
            let id = HeaderValue::from_str(state.as_str()).expect("state ids are hexadecimal digits");
            headers.insert(super::openai::STATE_ID, id);
        }
        if wire.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// The body of every error reply.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

/// What went wrong; all four fields are always there.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// For humans.
    pub message: String,
    /// `invalid_request_error`, `rate_limit_error` or `server_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The field of the request to blame, such as `temperature` or `messages[1].content`.
    #[schema(required = true)]
    pub param: Option<String>,
    /// For programs, such as `invalid_value` or `state_not_found`.
    #[schema(required = true)]
    pub code: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{SessionId, StateId};
    use session::Error as S;

    #[test]
    fn every_failure_has_its_status_code_and_param() {
        let state = StateId::new(1, 2);
        let session = SessionId::parse("s").unwrap();
        let mismatch = S::StateModelMismatch { state_model: "a".into(), model: "b".into() };
        let conflict = S::SessionConflict { session: session.clone(), head: state.to_string() };
        let beginning = S::InitialStateMismatch { session: session.clone(), began_from: "elsewhere".into() };
        let lost = S::TurnConflict { session: session.clone(), state: Some(state.clone()) };
        let full = S::NotStored { message: "the disk is full".into(), detail: Some("/secret/path".into()) };
        let waits = S::ResponseWaits { id: "cmpl-1".into(), model: "m".into() };
        let cases: [(Error, u16, &str, Option<&str>); 28] = [
            (full.into(), 500, "store_failed", None),
            (waits.into(), 409, "state_model_mismatch", Some("response_id")),
            (S::KeyDamaged(session.clone()).into(), 500, "session_damaged", Some("idempotency-key")),
            (S::StateUnusable(state.clone()).into(), 400, "invalid_state", Some("state_id")),
            (lost.into(), 409, "session_conflict", Some("session_id")),
            (S::TurnRunning(session.clone()).into(), 409, "session_busy", Some("session_id")),
            (S::SessionExists(session.clone()).into(), 409, "session_exists", Some("to")),
            (S::QuotaExceeded { message: "x".into() }.into(), 403, "state_quota_exceeded", None),
            (S::ModelNotFound("x".into()).into(), 404, "model_not_found", Some("model")),
            (S::StateNotFound(state.clone()).into(), 404, "state_not_found", Some("state_id")),
            (S::SessionNotFound(session.clone()).into(), 404, "session_not_found", Some("session_id")),
            (mismatch.into(), 409, "state_model_mismatch", Some("state_id")),
            (beginning.into(), 409, "initial_state_mismatch", Some("session_id")),
            (S::SessionBusy(session).into(), 409, "session_busy", Some("session_id")),
            (conflict.into(), 412, "session_conflict", Some("session_id")),
            (S::StateDamaged(state, "checksum".into()).into(), 500, "state_damaged", Some("state_id")),
            (S::SessionDamaged("checksum".into()).into(), 500, "session_damaged", Some("session_id")),
            (S::ResponseDamaged("r".into(), "x".into()).into(), 500, "response_damaged", Some("response_id")),
            (S::ConversationDamaged("c".into(), "x".into()).into(), 500, "conversation_damaged", Some("conversation")),
            (S::Loading.into(), 503, "loading", None),
            (S::Draining.into(), 503, "shutting_down", None),
            (S::Store("/secret/path".into()).into(), 500, "store_failed", None),
            (S::Engine("x".into()).into(), 500, "engine_failed", None),
            (Error::Unauthorized("x"), 401, "invalid_api_key", None),
            (Error::invalid("n", "x"), 400, "invalid_value", Some("n")),
            (Error::TooLarge { limit: 1 }, 413, "request_too_large", None),
            (Error::NoRoute("/x".into()), 404, "unknown_url", None),
            (Error::Panic, 500, "internal_error", None),
        ];
        for (error, status, code, param) in cases {
            let body = serde_json::to_value(error.body()).unwrap();
            let detail = body["error"].as_object().unwrap();
            let keys: Vec<_> = detail.keys().map(String::as_str).collect();
            assert_eq!(keys.len(), 4, "{keys:?}");
            assert_eq!(detail["code"], code);
            assert_eq!(detail["param"], serde_json::to_value(param).unwrap(), "{error:?}");
            assert!(detail["message"].is_string() && detail["type"].is_string());
            assert_eq!(error.wire().status, status, "{error:?}");
        }
    }

    #[test]
    fn a_field_is_blamed_by_the_name_it_has_in_the_request() {
        let state = StateId::new(1, 2);
        let unknown = || Error::from(S::StateNotFound(state.clone()));
        let body = |error: Error| serde_json::to_value(error.body()).unwrap()["error"].clone();
        let renamed = body(unknown().renamed(&[("session_id", "conversation"), ("state_id", "at")]));
        assert_eq!((&renamed["param"], &renamed["code"]), (&"at".into(), &"state_not_found".into()));
        assert_eq!(renamed["message"], body(unknown())["message"]);
        assert_eq!(body(unknown().renamed(&[("messages", "input")]))["param"], "state_id");
        let lost = S::TurnConflict { session: SessionId::parse("s").unwrap(), state: Some(state.clone()) };
        let lost = Error::from(lost).renamed(&[("session_id", "conversation")]).into_response();
        assert_eq!((lost.status().as_u16(), &lost.headers()["x-state-id"]), (409, &state.as_str().parse().unwrap()));
    }

    #[test]
    fn internals_stay_in_the_log() {
        let body = serde_json::to_string(&Error::from(S::Store("/secret/path".into())).body()).unwrap();
        assert!(!body.contains("secret"), "{body}");
        let logged = Error::from(S::Store("/secret/path".into())).failure().detail.unwrap();
        assert!(logged.contains("/secret/path"));
        let full = S::NotStored { message: "the disk is full".into(), detail: Some("/secret/path".into()) };
        let full = Error::from(full);
        assert_eq!(full.body().error.message, "the disk is full");
        assert_eq!(full.failure().detail.as_deref(), Some("/secret/path"));
        assert!(Error::invalid("prompt", "a client's own text").failure().detail.is_none());
        let long = Error::invalid("x", "ü".repeat(2000)).body();
        assert!(long.error.message.len() < 2 * LONGEST_MESSAGE);
    }

    #[test]
    fn headers_tell_clients_whether_and_when_to_retry() {
        let full = Error::from(S::Full { retry_after: Duration::from_millis(1500) }).into_response();
        assert_eq!(full.status(), 429);
        assert_eq!(full.headers()["retry-after"], "2");
        assert_eq!(full.headers()["retry-after-ms"], "1500");
        assert!(!full.headers().contains_key("x-should-retry"));
        let busy = Error::from(S::SessionBusy(SessionId::parse("s").unwrap())).into_response();
        assert_eq!(busy.headers()["x-should-retry"], "false");
        let running = Error::from(S::TurnRunning(SessionId::parse("s").unwrap())).into_response();
        assert!(running.headers().contains_key("retry-after-ms") && !running.headers().contains_key("x-should-retry"));
        let state = StateId::new(1, 2);
        let lost = S::TurnConflict { session: SessionId::parse("s").unwrap(), state: Some(state.clone()) };
        assert_eq!(Error::from(lost).into_response().headers()["x-state-id"], state.as_str());
        let draining = Error::not_ready(Readiness::Draining).unwrap().into_response();
        assert_eq!((draining.status().as_u16(), &draining.headers()["retry-after"]), (503, &HeaderValue::from(5)));
        assert_eq!(Error::not_ready(Readiness::Stopped).unwrap().into_response().status(), 503);
        assert!(Error::not_ready(Readiness::Ready).is_none());
    }
}
