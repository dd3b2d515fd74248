//! `GET /v1/streams/{response_id}`: a stream goes on after a dropped connection.

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;

use super::extract::{Name, Query};
use super::openai::chat::{ChatCompletion, ChatPiece};
use super::openai::chunks::Chunks;
use super::openai::completions::TextCompletion;
use super::openai::form::Form;
use super::openai::reply::{Chunk, Opening, events};
use super::record::Record;
use super::refusals::{Refusals, Unavailable};
use super::responses::Teller;
use super::{App, Caller, Error, ErrorBody, sse};
use crate::session::{self, Running};

/// The request header in which browsers say what they have.
const LAST_EVENT_ID: &str = "last-event-id";

/// From where to go on.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct StreamQuery {
    /// Only what comes after the event of this number, for clients that cannot set `Last-Event-ID`.
    starting_after: Option<u64>,
}

/// Go on reading a stream.
///
/// Every event of every stream, but a failure, has the id `{response id}:{number}`. After the connection was lost, this sends what comes
/// after the event that `Last-Event-ID` names, or everything, and then what is still generated: nothing twice, nothing
/// left out. A stream waits for its reader as long as the server's `streams.resume_window_s` says, and as long after its
/// end; with `detach` or `background` it goes on meanwhile, and after a restart of the server.
#[utoipa::path(
    get,
    path = "/v1/streams/{response_id}",
    tag = "generate",
    params(
        ("response_id" = String, Path, description = "Id of a response that was asked for with `stream: true`"),
        ("Last-Event-ID" = Option<String>, Header, description = "Id of the last event that was received"),
        StreamQuery,
    ),
    responses(
        (status = 200, description = "What follows", content_type = "text/event-stream", body = Chunk<ChatPiece>),
        (status = 409, description = "`state_model_mismatch`: it goes on when a server with the weights it was begun with is \
                                      started; see `retry-after`", body = ErrorBody),
        Refusals,
        Unavailable,
    ),
)]
pub async fn show_stream(
    State(app): State<Arc<App>>,
    caller: Caller,
    record: Record,
    Name(id): Name,
    Query(query): Query<StreamQuery>,
    headers: HeaderMap,
) -> Result<Response, Error> {
    let after = after(&id, &headers, query.starting_after)?;
    let running = app.sessions.listen(&caller.tenant, &id).await?;
    resume(&id, running, record, after)
}

/// What a client has of a stream.
#[derive(Clone, Copy)]
pub struct After {
    /// Number of its last event.
    pub number: u64,
    /// What said so.
    pub param: &'static str,
}

/// The last event that the client has.
fn after(id: &str, headers: &HeaderMap, query: Option<u64>) -> Result<Option<After>, Error> {
    let in_query = query.map(|number| After { number, param: "starting_after" });
    let Some(sent) = headers.get(LAST_EVENT_ID) else { return Ok(in_query) };
    let wrong = |why: &str| Error::invalid(LAST_EVENT_ID, format!("`Last-Event-ID` {why}"));
    let sent = sent.to_str().map_err(|_| wrong("must be visible ASCII"))?;
    let (of, number) = sent.rsplit_once(':').ok_or_else(|| wrong("must be an event's id: RESPONSE:NUMBER"))?;
    if of != id {
        return Err(wrong("is of another response than the path"));
    }
    let number = number.parse().map_err(|_| wrong("must end with the event's number"))?;
    if query.is_some_and(|query| query != number) {
        return Err(Error::invalid("starting_after", "`starting_after` and `Last-Event-ID` differ"));
    }
    Ok(Some(After { number, param: LAST_EVENT_ID }))
}

/// Writes a response after an event that the client has, as its endpoint does.
///
/// # Errors
/// When no stream of it was kept, or that event was never sent.
pub fn resume(id: &str, running: Running, record: Record, after: Option<After>) -> Result<Response, Error> {
    let form = Form::read(&running.facts.form).ok_or_else(|| session::Error::ResponseNotFound(id.into()))?;
    let facts = running.facts.clone();
    let opening = || Opening::new(&facts);
    match form {
        Form::Chat { include_usage } => {
            go_on(|| Chunks::<ChatCompletion>::new(opening(), include_usage), running, record, after)
        }
        Form::Completion { include_usage } => {
            go_on(|| Chunks::<TextCompletion>::new(opening(), include_usage), running, record, after)
        }
        Form::Response(ask) => go_on(|| Teller::new(facts.clone(), (*ask).clone()), running, record, after),
    }
}

fn go_on<S: sse::Script>(
    script: impl Fn() -> S,
    running: Running,
    record: Record,
    after: Option<After>,
) -> Result<Response, Error> {
    if let Some(After { number, param }) = after {
        let last = sse::last_frame(script(), running.so_far());
        if last.is_none_or(|last| last < number) {
            let id = &running.facts.response_id;
            let there_is =
                last.map_or("none was sent yet".into(), |last| format!("the last one there is is `{id}:{last}`"));
            return Err(Error::invalid(param, format!("event {number} was never sent: {there_is}")));
        }
    }
    record.goes_on(&running);
    Ok(sse::reply(script(), Box::pin(events(running)), record, after.map(|after| after.number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(header: Option<&'static str>, query: Option<u64>) -> Result<Option<u64>, String> {
        let mut headers = HeaderMap::new();
        if let Some(header) = header {
            headers.insert(LAST_EVENT_ID, header.parse().expect("a header"));
        }
        after("cmpl-1", &headers, query).map(|after| after.map(|after| after.number)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_last_event_is_named_by_header_or_query() {
        assert_eq!(read(None, None), Ok(None));
        assert_eq!(read(None, Some(3)), Ok(Some(3)));
        assert_eq!(read(Some("cmpl-1:7"), None), Ok(Some(7)));
        assert_eq!(read(Some("cmpl-1:7"), Some(7)), Ok(Some(7)));
        for wrong in ["7", "cmpl-2:7", "cmpl-1:", "cmpl-1:-1", "cmpl-1:x"] {
            assert!(read(Some(wrong), None).is_err(), "{wrong}");
        }
        assert!(read(Some("cmpl-1:7"), Some(8)).is_err());
    }
}
