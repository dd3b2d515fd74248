//! One log line and the metrics of each request, written when the last of its reply is gone.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use axum::extract::{FromRequestParts, MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue, Method, request::Parts};
use axum::middleware::Next;
use axum::response::Response;

use super::error::{Error, Failure};
use crate::session::{Cached, Event};
use crate::telemetry::{clock, metrics};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What is known of a request so far. The clone that is dropped last writes the line, so a stream keeps one.
#[derive(Clone, Debug)]
pub struct Record(Arc<Line>);

#[derive(Debug)]
struct Line {
    id: String,
    method: &'static str,
    route: String,
    started: Instant,
    facts: Mutex<Facts>,
}

#[derive(Debug, Default)]
struct Facts {
    status: Option<u16>,
    failure: Option<Failure>,
    turn: Option<TurnFacts>,
}

#[derive(Debug)]
struct TurnFacts {
    model: String,
    prompt_tokens: u64,
    cached_tokens: Cached,
    completion_tokens: u64,
    /// When each choice last had text.
    heard: Vec<Option<Instant>>,
    first: Option<Instant>,
    ended: bool,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Ok,
    /// Answered with a 4xx.
    Refused,
    Failed,
    /// The client went away first.
    Cancelled,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl Facts {
    fn outcome(&self) -> Outcome {
        let ended = self.turn.as_ref().is_none_or(|turn| turn.ended);
        match self.status {
            Some(500..) => Outcome::Failed,
            Some(400..) => Outcome::Refused,
            Some(_) if self.failure.is_some() => Outcome::Failed,
            Some(_) if ended => Outcome::Ok,
            _ => Outcome::Cancelled,
        }
    }
}

impl Record {
    fn new(id: String, method: &Method, route: String) -> Self {
        Self(Arc::new(Line { id, method: known(method), route, started: clock::now(), facts: Mutex::default() }))
    }

    /// A turn was accepted.
    pub fn begins(&self, facts: &crate::session::Facts) {
        self.begins_as(&facts.model, facts.prompt_tokens, facts.cached_tokens.clone(), facts.choices);
    }

    /// Somebody goes on reading a turn that another request has begun, and whose prompt was counted there.
    pub fn goes_on(&self, running: &crate::session::Running) {
        let facts = &running.facts;
        if !running.over {
            self.begins_as(&facts.model, 0, Cached::default(), facts.choices);
        }
    }

    fn begins_as(&self, model: &str, prompt_tokens: u64, cached_tokens: Cached, choices: usize) {
        self.facts().turn = Some(TurnFacts {
            model: model.into(),
            prompt_tokens,
            cached_tokens,
            completion_tokens: 0,
            heard: vec![None; choices],
            first: None,
            ended: false,
        });
    }

    /// Something is on its way to the client.
    pub fn heard(&self, event: &Event) {
        match event {
            Event::Text { choice, .. } => self.text(*choice),
            Event::Done { completion_tokens, .. } => self.completed(*completion_tokens),
            // The turn failed after its reply had begun.
            Event::Failed(error) => self.facts().failure = Some(Error::from(error.clone()).failure()),
        }
    }

    /// A choice has more text.
    fn text(&self, choice: usize) {
        let now = clock::now();
        let mut facts = self.facts();
        let Some(turn) = &mut facts.turn else { return };
        if turn.first.is_none() {
            turn.first = Some(now);
            metrics::time_to_first_token(&turn.model, now - self.0.started);
        }
        if let Some(before) = turn.heard.get_mut(choice).and_then(|heard| heard.replace(now)) {
            metrics::time_between_tokens(&turn.model, now - before);
        }
    }

    /// A choice is complete.
    fn completed(&self, completion_tokens: u64) {
        if let Some(turn) = &mut self.facts().turn {
            turn.completion_tokens += completion_tokens;
        }
    }

    /// The whole turn is complete and on its way to the client.
    pub fn ends(&self) {
        if let Some(turn) = &mut self.facts().turn {
            turn.ended = true;
        }
    }

    fn answered(&self, response: &Response) {
        let mut facts = self.facts();
        facts.status = Some(response.status().as_u16());
        if let Some(failure) = response.extensions().get() {
            facts.failure = Some(Failure::clone(failure));
        }
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        // Plain numbers: a panic elsewhere leaves them usable.
        self.0.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let facts = self.facts.get_mut().unwrap_or_else(PoisonError::into_inner);
        let took = clock::now() - self.started;
        let outcome = facts.outcome().name();
        // 499 is what proxies log for a client that went away before there was a status.
        let status = facts.status.unwrap_or(499);
        metrics::request(self.method, &self.route, status, took);
        let turn = facts.turn.as_ref();
        if let Some(turn) = turn {
            metrics::turn(&turn.model, outcome);
            metrics::tokens(&turn.model, turn.prompt_tokens, turn.cached_tokens.get(), turn.completion_tokens);
        }
        let detail = facts.failure.as_ref().and_then(|failure| failure.detail.as_deref());
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    id = self.id,
                    method = self.method,
                    route = self.route,
                    status,
                    outcome,
                    code = facts.failure.as_ref().map(|f| f.code),
                    error = detail,
                    model = turn.map(|t| t.model.as_str()),
                    prompt_tokens = turn.map(|t| t.prompt_tokens),
                    cached_tokens = turn.map(|t| t.cached_tokens.get()),
                    completion_tokens = turn.map(|t| t.completion_tokens),
                    ttft_ms = turn.and_then(|t| t.first).map(|first| millis(first - self.started)),
                    ms = millis(took),
                    "request"
                )
            };
        }
        match self.route.as_str() {
            _ if detail.is_some() => line!(error),
            // Probes come every few seconds and say nothing new.
            "/health" | "/ready" | "/metrics" => line!(debug),
            _ => line!(info),
        }
    }
}

/// Milliseconds with microseconds behind the point.
fn millis(took: std::time::Duration) -> f64 {
    took.as_micros() as f64 / 1000.0
}

/// Handlers that run turns ask for the request's record.
impl<S: Send + Sync> FromRequestParts<S> for Record {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let made = || Record::new(new_id(), &parts.method, "unmatched".into());
        Ok(parts.extensions.get().cloned().unwrap_or_else(made))
    }
}

/// Gives every request its id and its record, and every response the id.
pub async fn observe(mut request: Request, next: Next) -> Response {
    let id = request.headers().get(REQUEST_ID).and_then(sane).map_or_else(new_id, String::from);
    let header = HeaderValue::from_str(&id).expect("ids are made of visible ASCII");
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let record = Record::new(id, request.method(), route);
    request.extensions_mut().insert(record.clone());
    let mut response = next.run(request).await;
    record.answered(&response);
    response.headers_mut().insert(REQUEST_ID, header);
    response
}

/// A method's name; one that a client made up must not make a new series of metrics.
fn known(method: &Method) -> &'static str {
    const KNOWN: [&str; 7] = ["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"];
    KNOWN.into_iter().find(|known| *known == method.as_str()).unwrap_or("other")
}

fn new_id() -> String {
    format!("req_{:032x}", clock::random_u128())
}

/// An incoming id is honoured when it cannot confuse a log.
fn sane(id: &HeaderValue) -> Option<&str> {
    let id = id.to_str().ok()?;
    let sane = (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.:-".contains(&b));
    sane.then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incoming_ids_are_honoured_when_sane() {
        let sane = |text: &str| sane(&HeaderValue::from_bytes(text.as_bytes()).unwrap()).map(String::from);
        assert_eq!(sane("abc-1.2:3_4").as_deref(), Some("abc-1.2:3_4"));
        for bad in ["", "a b", "a\tb", "x=\"y\"", "ü", &"x".repeat(129)] {
            assert_eq!(sane(bad), None, "{bad:?}");
        }
    }

    fn facts(status: Option<u16>, code: Option<&'static str>, ended: Option<bool>) -> Facts {
        let record = Record::new("id".into(), &Method::POST, "/x".into());
        if let Some(ended) = ended {
            record.begins_as("m", 3, 1.into(), 1);
            record.text(0);
            record.completed(2);
            if ended {
                record.ends();
            }
        }
        let turn = record.facts().turn.take();
        Facts { status, failure: code.map(|code| Failure { code, detail: None }), turn }
    }

    #[test]
    fn a_line_says_how_the_request_ended() {
        for (status, code, ended, outcome) in [
            (Some(200), None, None, Outcome::Ok),
            (Some(200), None, Some(true), Outcome::Ok),
            (Some(200), None, Some(false), Outcome::Cancelled),
            (Some(200), Some("engine_failed"), Some(false), Outcome::Failed),
            (Some(404), Some("model_not_found"), None, Outcome::Refused),
            (Some(500), Some("store_failed"), Some(false), Outcome::Failed),
            (None, None, None, Outcome::Cancelled),
            (None, None, Some(false), Outcome::Cancelled),
        ] {
            assert_eq!(facts(status, code, ended).outcome(), outcome, "{status:?} {code:?} {ended:?}");
        }
    }

    #[test]
    fn a_turn_counts_its_tokens() {
        let turn = facts(Some(200), None, Some(true)).turn.unwrap();
        assert_eq!((turn.prompt_tokens, turn.cached_tokens.get(), turn.completion_tokens), (3, 1, 2));
        assert!(turn.first.is_some() && turn.heard == [turn.first]);
    }
}
