//! Where a response begins: nowhere, at another one's state, at a conversation's head, or at their messages read anew.

use super::item;
use super::object::{Ask, output_id};
use super::reference::resolve;
use super::request::Checked;
use crate::api::openai::Head;
use crate::api::openai::form::Form;
use crate::api::openai::generation::{Generation, Order, Part};
use crate::api::{App, Error};
use crate::session::{self, Anew, Event, Input, ModelCard, Running, SoFar, Start};
use crate::types::{Finish, Message, Role, SessionId, StateId, Tenant};

/// A chain of responses is followed no further.
const LONGEST_CHAIN: usize = 10_000;

/// How often a turn is put together once more because its conversation has changed meanwhile.
const MOST_TRIES: usize = 8;

/// A response that runs.
pub struct Begun {
    pub running: Running,
    pub ask: Ask,
    /// It is read as it comes.
    pub stream: bool,
    /// Names of fields that nobody knows.
    pub ignored: Vec<String>,
}

/// Finds where a response begins, and begins it. Nothing is written before all of the request is known to be right.
pub async fn begin(app: &App, checked: Checked, head: Head, card: &ModelCard) -> Result<Begun, Error> {
    let Checked { generation, mut ask, items, ignored } = checked;
    ask.items = resolve(app, &head.caller.tenant, ask.conversation.as_deref(), items).await?;
    if ask.items.last().is_some_and(|item| item.role == "assistant") {
        let why = "the last message is the assistant's: beginning the answer for it is not supported yet";
        return Err(Error::unsupported("input", why));
    }
    let (mut lost, mut tries) = (false, 0);
    loop {
        let mut ask = ask.clone();
        let place = place(app, &head.caller.tenant, &mut ask, lost).await?;
        let (from_state, ask_again) = (place.state_id.is_some(), ask.conversation.is_some());
        let Order { turn, stream, ignored } = order(
            app,
            card,
            Parts { generation: generation.clone(), ask: &ask, head: head.clone(), place, ignored: ignored.clone() },
        )?;
        match app.sessions.start(turn).await {
            Ok(running) => return Ok(Begun { running, ask, stream: stream.is_some(), ignored }),
            // Its messages are still there.
            Err(session::Error::StateNotFound(_) | session::Error::StateDamaged(..)) if from_state => lost = true,
            // Another turn of the conversation came first, or an item went, since its messages were put together.
            Err(session::Error::SessionConflict { .. } | session::Error::TurnConflict { .. })
                if ask_again && tries < MOST_TRIES =>
            {
                tries += 1;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// What a turn is put together from.
struct Parts<'a> {
    generation: Generation,
    ask: &'a Ask,
    head: Head,
    place: Place,
    ignored: Vec<String>,
}

fn order(app: &App, card: &ModelCard, parts: Parts) -> Result<Order, Error> {
    let Parts { mut generation, ask, head, place, ignored } = parts;
    let Place { state_id, session_id, if_match, begins, messages, anew } = place;
    generation.store_state = session_id.is_none().then_some(ask.store);
    (generation.state_id, generation.session_id) = (state_id.map(String::from), session_id.map(String::from));
    let form = Form::Response(Box::new(ask.clone())).text();
    let (max_tokens, keep) = (ask.max_output_tokens, ask.store);
    let part = Part { input: Input::Chat(messages), max_tokens, prefix: "resp_", ignored, form, keep };
    let mut order = generation.order(part, Head { if_match, ..head }, app.rules(card))?;
    order.turn.anew = anew;
    if let Start::Session { begins: start, .. } = &mut order.turn.start {
        *start = begins;
    }
    Ok(order)
}

/// Where a response begins, and what it has to read.
#[derive(Default)]
struct Place {
    state_id: Option<StateId>,
    session_id: Option<SessionId>,
    /// The conversation's head when its messages were put together.
    if_match: Option<StateId>,
    /// It had none.
    begins: bool,
    messages: Vec<Message>,
    /// What becomes of the conversation before.
    anew: Option<Anew>,
}

/// Finds where a response begins; its effective instructions are known then. `lost`: the state of the one before it is.
async fn place(app: &App, tenant: &Tenant, ask: &mut Ask, lost: bool) -> Result<Place, Error> {
    if let Some(previous) = ask.previous.clone() {
        return after(app, tenant, ask, (&previous, lost)).await;
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
pub struct Stored {
    pub id: String,
    pub ask: Ask,
    pub answer: String,
    /// The answer was not cut.
    pub complete: bool,
    state: Option<StateId>,
    pub ended: bool,
}

pub async fn stored(app: &App, tenant: &Tenant, id: &str) -> Result<Stored, Error> {
    let unknown = || session::Error::ResponseNotFound(id.into());
    let SoFar { facts, events, ended, .. } = app.sessions.so_far(tenant, id).await?;
    let Some(Form::Response(ask)) = Form::read(&facts.form) else { return Err(unknown().into()) };
    if !ask.store {
        return Err(unknown().into());
    }
    let mut stored = Stored { id: id.into(), ask: *ask, answer: String::new(), complete: false, state: None, ended };
    for event in events {
        match event {
            Event::Text { text, .. } => stored.answer.push_str(&text),
            Event::Done { finish, stored: kept, .. } => {
                stored.complete = finish == Finish::Stop;
                stored.state = kept.and_then(Result::ok).map(|receipt| receipt.id);
            }
            Event::Failed(_) => {}
        }
    }
    Ok(stored)
}

/// Goes on from a stored response: from its state, or, with other instructions or when that is `lost`, from its messages.
async fn after(app: &App, tenant: &Tenant, ask: &mut Ask, (previous, lost): (&str, bool)) -> Result<Place, Error> {
    let before = stored(app, tenant, previous).await?;
    let refuse = |why: &str| Err(Error::invalid("previous_response_id", format!("response `{previous}` {why}")));
    if !before.ended {
        return refuse("is still in progress");
    }
    let same = ask.effective.is_none() || ask.effective == before.ask.effective;
    let messages = item::messages(&ask.items);
    if same {
        ask.effective.clone_from(&before.ask.effective);
        if let Some(state) = before.state.clone().filter(|_| !lost) {
            return Ok(Place { state_id: Some(state), messages, ..Place::default() });
        }
    }
    let cut = |response: &str, gone: &str| {
        let why = format!("response `{gone}`, after which `{response}` was made, is not there any more");
        if same {
            return Error::invalid(
                "previous_response_id",
                format!("{why}, and neither is the state after `{response}`"),
            );
        }
        let hint =
            "instructions can only change while the earlier text is there; leave them out to go on from the state";
        Error::invalid("instructions", format!("{why}: {hint}"))
    };
    let mut all = transcript(app, tenant, before, cut).await?;
    all.extend(messages);
    if all.last().is_some_and(|message| message.role == Role::Assistant) {
        return refuse("has no state that could just go on; give some `input`");
    }
    Ok(Place { messages: with_instructions(ask.effective.as_deref(), all), ..Place::default() })
}

/// The messages of a chain of responses, the first one's first. What was before a response of a conversation is there.
///
/// # Errors
/// What `cut` says of a response and of the one before it, when that is not there any more.
async fn transcript(
    app: &App,
    tenant: &Tenant,
    last: Stored,
    cut: impl Fn(&str, &str) -> Error,
) -> Result<Vec<Message>, Error> {
    let mut turns = Vec::new();
    let mut next = Some(last);
    while let Some(Stored { id, ask, answer, .. }) = next {
        if turns.len() > LONGEST_CHAIN {
            return Err(Error::invalid("previous_response_id", "its chain is too long to be read again"));
        }
        if let Some(conversation) = &ask.conversation {
            turns.push(up_to(app, tenant, conversation, &id).await?);
            break;
        }
        let mut messages = item::messages(&ask.items);
        if !answer.is_empty() {
            messages.push(Message { role: Role::Assistant, content: answer, name: None });
        }
        turns.push(messages);
        next = match ask.previous {
            Some(previous) => match stored(app, tenant, &previous).await {
                Err(Error::Session(session::Error::ResponseNotFound(_))) => return Err(cut(&id, &previous)),
                found => Some(found?),
            },
            None => None,
        };
    }
    Ok(turns.into_iter().rev().flatten().collect())
}

/// The messages of a conversation as it is now, up to the answer of a response.
async fn up_to(app: &App, tenant: &Tenant, conversation: &str, response: &str) -> Result<Vec<Message>, Error> {
    let gone = || {
        let why =
            format!("response `{response}` is not in its conversation any more, where what was said before it is");
        Error::invalid("previous_response_id", why)
    };
    let items = match app.sessions.conversation(tenant, conversation).await {
        Err(session::Error::ConversationNotFound(_)) => return Err(gone()),
        conversation => conversation?.items,
    };
    let answer = output_id(response);
    let end = items.iter().position(|item| item.id == answer).ok_or_else(gone)?;
    Ok(item::messages(&items[..=end]))
}

/// Goes on with a conversation, which other instructions have read anew.
async fn in_conversation(app: &App, tenant: &Tenant, ask: &mut Ask, id: &str) -> Result<Place, Error> {
    let now = app.sessions.conversation(tenant, id).await?;
    let (conversation, anew) = if ask.effective.is_some() && ask.effective != now.instructions {
        let (conversation, anew) = now.anew(ask.effective.clone());
        (conversation, Some(anew))
    } else {
        (now, None)
    };
    ask.effective.clone_from(&conversation.instructions);
    let begins = conversation.head.is_none();
    if ask.items.is_empty() {
        match conversation.unread().last() {
            Some(item) if item.role == "assistant" => {
                return Err(Error::unsupported(
                    "input",
                    "the conversation ends with the assistant's message: give some `input`",
                ));
            }
            None if begins => {
                return Err(Error::invalid("input", "`input` may be empty only when something goes on"));
            }
            _ => {}
        }
    }
    let mut messages = conversation.waiting();
    messages.extend(item::messages(&ask.items));
    let (session_id, if_match) = (Some(conversation.session), conversation.head);
    Ok(Place { session_id, if_match, begins, messages, anew, state_id: None })
}
