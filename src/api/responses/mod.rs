//! OpenAI's Responses: what is kept of one is its state, and the next goes on from there.

pub mod conversations;
mod item;
mod object;
mod place;
mod reference;
mod request;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

pub use item::Item;
pub use object::{Ask, ResponseObject, Teller};
use place::{Begun, Stored, stored};
use request::{ResponseRequest, check_included};

use super::extract::{JsonBody, Name, Query};
use super::list::{Deleted, List, page};
use super::openai::form::Form;
use super::openai::reply::{broken_off, events};
use super::openai::{Head, Ignored};
use super::record::Record;
use super::refusals::{Conflicts, Refusals, Unavailable};
use super::sse::{self, Script};
use super::streams::{self, After};
use super::{App, Caller, Error, ErrorBody};
use crate::session::{self, Listing, SoFar, StoredItem};
use crate::types::Tenant;

/// Generate a response.
///
/// With `stream: true` the reply is a stream of events with names and `sequence_number`, from `response.created` over
/// `response.output_text.delta` to `response.completed`, `response.incomplete` or `response.failed`. A stored response is a state: a response
/// with `previous_response_id` goes on from there and reads nothing again, any number of them from one.
#[utoipa::path(
    post,
    path = "/v1/responses",
    tag = "responses",
    request_body = ResponseRequest,
    responses(
        (status = 200, description = "The response", content(
            (ResponseObject = "application/json"),
            (String = "text/event-stream"),
        ), headers(("x-ignored-params" = String, description = "Fields of the request that nobody knows"))),
        Refusals,
        Conflicts,
        Unavailable,
    ),
)]
pub async fn create_response(
    State(app): State<Arc<App>>,
    head: Head,
    record: Record,
    body: JsonBody,
) -> Result<Response, Error> {
    let (request, ignored) = ResponseRequest::read(&body)?;
    let card = app.card(request.generation.model.as_deref())?;
    let checked = request.check(&format!("resp_{:032x}", head.id), &card, ignored)?;
    let names = own_names(&checked.ask);
    let Begun { running, ask, stream, ignored } =
        place::begin(&app, checked, head, &card).await.map_err(|error| error.renamed(&names))?;
    record.begins(&running.facts);
    let background = ask.background;
    let mut teller = Teller::new(running.facts.clone(), ask);
    let response = if stream {
        sse::reply(teller, Box::pin(events(running)), record, None)
    } else {
        if !background {
            gather(&mut teller, running, &record).await?;
        }
        record.ends();
        Json(teller.object()).into_response()
    };
    Ok((Ignored(ignored), response).into_response())
}

/// What is called here as it is not elsewhere.
fn own_names(ask: &Ask) -> [(&'static str, &'static str); 5] {
    let state = if ask.conversation.is_some() { "conversation" } else { "previous_response_id" };
    [
        ("messages", "input"),
        ("max_tokens", "max_output_tokens"),
        ("session_id", "conversation"),
        ("response_id", "previous_response_id"),
        ("state_id", state),
    ]
}

/// Waits for the end.
async fn gather(teller: &mut Teller, mut running: session::Running, record: &Record) -> Result<(), Error> {
    while let Some(event) = running.next().await {
        record.heard(&event);
        teller.take(event);
    }
    match teller.failure() {
        Some(error) => Err(error.clone()),
        None if teller.ended() => Ok(()),
        None => Err(broken_off().into()),
    }
}

/// How to read a response.
#[derive(Debug, Default, PartialEq, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ResponseQuery {
    /// Answer with the response's events, from the first one.
    stream: Option<bool>,
    /// Only the events after the one of this number.
    starting_after: Option<u64>,
    /// Accepted and without effect: nothing is obfuscated.
    include_obfuscation: Option<bool>,
    /// What else to show; nothing of it exists here.
    #[serde(rename = "include[]", alias = "include")]
    include: Option<String>,
}

/// Show a response, or go on reading its stream.
#[utoipa::path(
    get,
    path = "/v1/responses/{response_id}",
    tag = "responses",
    params(("response_id" = String, Path, description = "Id of a response that is stored or runs"), ResponseQuery),
    responses(
        (status = 200, description = "As it is now", content(
            (ResponseObject = "application/json"),
            (String = "text/event-stream"),
        )),
        (status = 409, description = "`state_model_mismatch`: it goes on when a server with the weights it was begun with is \
                                      started; see `retry-after`", body = ErrorBody),
        Refusals,
        Unavailable,
    ),
)]
pub async fn show_response(
    State(app): State<Arc<App>>,
    caller: Caller,
    record: Record,
    Name(id): Name,
    Query(query): Query<ResponseQuery>,
) -> Result<Response, Error> {
    let ResponseQuery { stream, starting_after, include_obfuscation: _, include } = query;
    check_included(include)?;
    if stream.unwrap_or(false) {
        stored(&app, &caller.tenant, &id).await?;
        let running = app.sessions.listen(&caller.tenant, &id).await?;
        let after = starting_after.map(|number| After { number, param: "starting_after" });
        return streams::resume(&id, running, record, after);
    }
    if starting_after.is_some() {
        return Err(Error::invalid("starting_after", "`starting_after` is only possible with `stream=true`"));
    }
    Ok(Json(shown(&app, &caller.tenant, &id).await?).into_response())
}

/// A stored response as it is now.
async fn shown(app: &App, tenant: &Tenant, id: &str) -> Result<ResponseObject, Error> {
    let SoFar { facts, events, .. } = app.sessions.so_far(tenant, id).await?;
    let ask = match Form::read(&facts.form) {
        Some(Form::Response(ask)) if ask.store => *ask,
        _ => return Err(session::Error::ResponseNotFound(id.into()).into()),
    };
    let mut teller = Teller::new(facts, ask);
    events.into_iter().for_each(|event| teller.take(event));
    Ok(teller.object())
}

/// Delete a response with its state. Responses that were made from it stay. So is the stream of a chat or completion deleted
/// that cannot go on: `response_damaged` or `state_model_mismatch`.
#[utoipa::path(
    delete,
    path = "/v1/responses/{response_id}",
    tag = "responses",
    params(("response_id" = String, Path, description = "Id of a stored response")),
    responses((status = 200, description = "It is gone", body = Deleted), Refusals),
)]
pub async fn delete_response(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
) -> Result<Json<Deleted>, Error> {
    match shown(&app, &caller.tenant, &id).await {
        // What cannot be shown any more, or not here, can still be deleted.
        Ok(_) | Err(Error::Session(session::Error::ResponseDamaged(..) | session::Error::ResponseWaits { .. })) => {}
        Err(error) => return Err(error),
    }
    app.sessions.delete_response(&caller.tenant, &id).await?;
    Ok(Json(Deleted { id, object: "response.deleted", deleted: true }))
}

/// Cancel a response that runs in the background. One that has ended is shown as it is.
#[utoipa::path(
    post,
    path = "/v1/responses/{response_id}/cancel",
    tag = "responses",
    params(("response_id" = String, Path, description = "Id of a response that was asked for with `background: true`")),
    responses((status = 200, description = "As it is now", body = ResponseObject), Refusals),
)]
pub async fn cancel_response(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
) -> Result<Json<ResponseObject>, Error> {
    if !shown(&app, &caller.tenant, &id).await?.background {
        let why = "only a response with `background: true` can be cancelled; hang up to end another one";
        return Err(Error::invalid("response_id", why));
    }
    app.sessions.cancel(&caller.tenant, &id).await?;
    Ok(Json(shown(&app, &caller.tenant, &id).await?))
}

/// Which items, and in which order.
#[derive(Debug, Default, PartialEq, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ItemsQuery {
    /// How many at most, 1 to 100; 20 by default.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<usize>,
    /// Only what comes after this id in that order.
    after: Option<String>,
    /// `asc` or `desc`; `desc` by default, the newest first.
    order: Option<String>,
    /// What else to show; nothing of it exists here.
    #[serde(rename = "include[]", alias = "include")]
    include: Option<String>,
}

/// What else to show of items.
#[derive(Debug, Default, PartialEq, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct IncludeQuery {
    /// What else to show; nothing of it exists here.
    #[serde(rename = "include[]", alias = "include")]
    include: Option<String>,
}

/// One page of items, which are given oldest first.
fn items(items: Vec<StoredItem>, query: ItemsQuery) -> Result<List<Item>, Error> {
    let ItemsQuery { limit, after, order, include } = query;
    check_included(include)?;
    let page = page(limit, after)?;
    let mut items: Vec<Item> = items.into_iter().map(Item::from).collect();
    match order.as_deref() {
        None | Some("desc") => items.reverse(),
        Some("asc") => {}
        Some(_) => return Err(Error::invalid("order", "`order` must be `asc` or `desc`")),
    }
    if let Some(after) = page.after {
        let at = items.iter().position(|item| item.id == after).ok_or(Error::UnknownItem(after));
        let at = at.map_err(|error| error.renamed(&[("item_id", "after")]))?;
        items.drain(..=at);
    }
    let has_more = items.len() > page.limit;
    items.truncate(page.limit);
    Ok(List::new(Listing { data: items, has_more }))
}

/// List what was new in the input of a response.
#[utoipa::path(
    get,
    path = "/v1/responses/{response_id}/input_items",
    tag = "responses",
    params(("response_id" = String, Path, description = "Id of a stored response"), ItemsQuery),
    responses((status = 200, description = "One page", body = List<Item>), Refusals),
)]
pub async fn list_input_items(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
    Query(query): Query<ItemsQuery>,
) -> Result<Json<List<Item>>, Error> {
    let Stored { ask, .. } = stored(&app, &caller.tenant, &id).await?;
    Ok(Json(items(ask.items, query)?))
}
