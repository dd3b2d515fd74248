//! OpenAI's Responses: what is kept of one is its state, and the next goes on from there.

pub mod conversations;
mod item;
mod object;
mod request;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

pub use item::Item;
pub use object::{Ask, ResponseObject, Teller};
use request::{Checked, ResponseRequest};

use super::error::{Conflicts, Refusals, Unavailable};
use super::extract::{JsonBody, Name, Query};
use super::list::{Deleted, List, page};
use super::openai::form::Form;
use super::openai::generation::{Head, Part};
use super::openai::parameters::{IGNORED_PARAMS, ignored_header};
use super::record::Record;
use super::{App, Caller, Error, streams};
use crate::session::{self, Event, Input, Listing, SoFar, StoredItem};
use crate::types::{Message, Role, Tenant};

/// A chain of responses is followed no further.
const LONGEST_CHAIN: usize = 10_000;

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
    let id = format!("resp_{:032x}", head.id);
    let Checked { mut generation, mut ask, ignored } = request.check(&id, &card, ignored)?;
    let place = place(&app, &head.caller.tenant, &mut ask).await?;
    (generation.state_id, generation.session_id) = (place.state_id, place.session_id);
    generation.store_state = generation.session_id.is_none().then_some(ask.store);
    let (background, max_tokens, keep) = (ask.background, ask.max_output_tokens, ask.store);
    let form = Form::Response(Box::new(ask.clone())).text();
    let part = Part { input: Input::Chat(place.messages), max_tokens, prefix: "resp_", ignored, form, keep };
    let head = Head { if_match: place.if_match.map(|state| format!("\"{state}\"")), ..head };
    let order = generation.order(part, head, app.rules(&card)).map_err(own_name)?;
    let running = app.sessions.start(order.turn).await.map_err(|error| own_name(error.into()))?;
    record.begins(&running.facts);
    let mut teller = Teller::new(running.facts.clone(), ask);
    let mut response = if order.stream.is_some() {
        teller.stream(running, record, None)
    } else {
        if !background {
            gather(&mut teller, running, &record).await?;
        }
        record.ends();
        Json(teller.object()).into_response()
    };
    if let Some(list) = ignored_header(&order.ignored) {
        response.headers_mut().insert(IGNORED_PARAMS, list);
    }
    Ok(response)
}

/// Waits for the end.
async fn gather(teller: &mut Teller, mut running: session::Running, record: &Record) -> Result<(), Error> {
    while let Some(event) = running.next().await {
        match &event {
            Event::Text { choice, .. } => record.text(*choice),
            Event::Done { completion_tokens, .. } => record.completed(*completion_tokens),
            Event::Failed(_) => {}
        }
        teller.take(event);
    }
    match teller.failure() {
        Some(error) => Err(error.clone()),
        None if teller.ended() => Ok(()),
        None => Err(super::openai::reply::broken_off()),
    }
}

/// An error that blames a field of chats blames the one that has its part here.
fn own_name(error: Error) -> Error {
    let own = |param: &str| match param {
        "messages" => Some("input"),
        "max_tokens" => Some("max_output_tokens"),
        "if-match" | "session_id" => Some("conversation"),
        _ => None,
    };
    match error {
        Error::Invalid { param: Some(param), code, message } => {
            Error::Invalid { param: Some(own(&param).map_or(param, String::from)), code, message }
        }
        Error::Session(session::Error::Invalid { param, code, message }) => {
            Error::Session(session::Error::Invalid { param: own(param).unwrap_or(param), code, message })
        }
        other => other,
    }
}

/// Where a response begins, and what it has to read.
#[derive(Default)]
struct Place {
    state_id: Option<String>,
    session_id: Option<String>,
    /// The conversation's head when its messages were put together.
    if_match: Option<String>,
    messages: Vec<Message>,
}

/// Finds where a response begins; its effective instructions are known then.
async fn place(app: &App, tenant: &Tenant, ask: &mut Ask) -> Result<Place, Error> {
    if let Some(previous) = ask.previous.clone() {
        return after(app, tenant, ask, &previous).await;
    }
    if let Some(id) = ask.conversation.clone() {
        return in_conversation(app, tenant, ask, &id).await;
    }
    let messages = with_instructions(ask.effective.as_deref(), item::messages(&ask.items));
    Ok(Place { messages, ..Place::default() })
}

fn with_instructions(instructions: Option<&str>, mut messages: Vec<Message>) -> Vec<Message> {
    if let Some(content) = instructions.map(String::from) {
        messages.insert(0, Message { role: Role::System, content, name: None });
    }
    messages
}

/// A stored response: what it was asked for, its answer, and the state it is kept as.
struct Stored {
    ask: Ask,
    answer: String,
    state: Option<String>,
    ended: bool,
}

async fn stored(app: &App, tenant: &Tenant, id: &str) -> Result<Stored, Error> {
    let unknown = || session::Error::ResponseNotFound(id.into());
    let SoFar { facts, events, ended, .. } = app.sessions.so_far(tenant, id).await?;
    let Some(Form::Response(ask)) = Form::read(&facts.form) else { return Err(unknown().into()) };
    if !ask.store {
        return Err(unknown().into());
    }
    let (mut answer, mut state) = (String::new(), None);
    for event in events {
        match event {
            Event::Text { text, .. } => answer.push_str(&text),
            Event::Done { stored: Some(Ok(receipt)), .. } => state = Some(receipt.id.to_string()),
            Event::Done { .. } | Event::Failed(_) => {}
        }
    }
    Ok(Stored { ask: *ask, answer, state, ended })
}

/// Goes on from a stored response: from its state, or, with other instructions or when that is gone, from its messages.
async fn after(app: &App, tenant: &Tenant, ask: &mut Ask, previous: &str) -> Result<Place, Error> {
    let before = stored(app, tenant, previous).await?;
    let refuse = |why: &str| Err(Error::invalid("previous_response_id", format!("response `{previous}` {why}")));
    if !before.ended {
        return refuse("is still in progress");
    }
    let same = ask.effective.is_none() || ask.effective == before.ask.effective;
    let messages = item::messages(&ask.items);
    if same {
        ask.effective.clone_from(&before.ask.effective);
        if let Some(state) = &before.state
            && is_there(app, tenant, state).await?
        {
            return Ok(Place { state_id: Some(state.clone()), messages, ..Place::default() });
        }
    }
    if before.ask.conversation.is_some() {
        return refuse("belongs to a conversation: go on with that, or from its state, with the same instructions");
    }
    let mut all = transcript(app, tenant, before).await?;
    all.extend(messages);
    if all.last().is_some_and(|message| message.role == Role::Assistant) {
        return refuse("has no state that could just go on; give some `input`");
    }
    Ok(Place { messages: with_instructions(ask.effective.as_deref(), all), ..Place::default() })
}

async fn is_there(app: &App, tenant: &Tenant, state: &str) -> Result<bool, Error> {
    let Ok(id) = crate::types::StateId::parse(state) else { return Ok(false) };
    match app.sessions.state(tenant, &id).await {
        Ok(_) => Ok(true),
        Err(session::Error::StateNotFound(_) | session::Error::StateDamaged(..)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The messages of a chain of responses, the first one's first.
async fn transcript(app: &App, tenant: &Tenant, last: Stored) -> Result<Vec<Message>, Error> {
    let mut turns = Vec::new();
    let mut next = Some(last);
    while let Some(Stored { ask, answer, .. }) = next {
        let previous = ask.previous.clone();
        turns.push((item::messages(&ask.items), answer));
        if ask.conversation.is_some() || turns.len() > LONGEST_CHAIN {
            return Err(Error::invalid("previous_response_id", "its chain cannot be read again"));
        }
        next = match previous {
            Some(id) => Some(stored(app, tenant, &id).await?),
            None => None,
        };
    }
    let answer = |content| Message { role: Role::Assistant, content, name: None };
    let turn = |(mut messages, said): (Vec<Message>, String)| {
        if !said.is_empty() {
            messages.push(answer(said));
        }
        messages
    };
    Ok(turns.into_iter().rev().flat_map(turn).collect())
}

/// Goes on with a conversation.
async fn in_conversation(app: &App, tenant: &Tenant, ask: &mut Ask, id: &str) -> Result<Place, Error> {
    let mut conversation = app.sessions.conversation(tenant, id).await?;
    if ask.effective.is_some() && ask.effective != conversation.instructions {
        conversation = app.sessions.begin_anew(tenant, id, ask.effective.clone()).await?;
    }
    ask.effective.clone_from(&conversation.instructions);
    let items: Vec<StoredItem> = conversation.unread().iter().chain(&ask.items).cloned().collect();
    let mut messages = item::messages(&items);
    if messages.last().is_some_and(|message| message.role == Role::Assistant) {
        return Err(Error::unsupported(
            "input",
            "the conversation ends with the assistant's message: give some `input`",
        ));
    }
    if messages.is_empty() && conversation.head.is_none() {
        return Err(Error::invalid("input", "`input` may be empty only when something goes on"));
    }
    if conversation.head.is_none() {
        messages = with_instructions(conversation.instructions.as_deref(), messages);
    }
    let if_match = conversation.head.map(String::from);
    Ok(Place { session_id: Some(conversation.session.into()), if_match, messages, state_id: None })
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
    /// Accepted and without effect: an answer of text has nothing more to show.
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
    let ResponseQuery { stream, starting_after, include_obfuscation: _, include: _ } = query;
    if stream.unwrap_or(false) {
        let Stored { .. } = stored(&app, &caller.tenant, &id).await?;
        let running = app.sessions.listen(&caller.tenant, &id).await?;
        return streams::resume(running, record, starting_after)
            .ok_or_else(|| session::Error::ResponseNotFound(id).into());
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

/// Delete a response with its state. Responses that were made from it stay.
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
    shown(&app, &caller.tenant, &id).await?;
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
    /// Accepted and without effect: messages have nothing more to show.
    #[serde(rename = "include[]", alias = "include")]
    include: Option<String>,
}

/// One page of items, which are given oldest first.
fn items(items: Vec<StoredItem>, query: ItemsQuery) -> Result<List<Item>, Error> {
    let ItemsQuery { limit, after, order, include: _ } = query;
    let page = page(limit, after)?;
    let mut items: Vec<Item> = items.into_iter().map(Item::from).collect();
    match order.as_deref() {
        None | Some("desc") => items.reverse(),
        Some("asc") => {}
        Some(_) => return Err(Error::invalid("order", "`order` must be `asc` or `desc`")),
    }
    if let Some(after) = page.after {
        let at = items.iter().position(|item| item.id == after).ok_or(Error::UnknownItem(after))?;
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
