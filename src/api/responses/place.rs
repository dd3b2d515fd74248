//! Where a response begins: nowhere, at another one's state, at a conversation's head, or at their messages read anew.

use super::item;
use super::object::Ask;
use super::request::Checked;
use crate::api::openai::Head;
use crate::api::openai::form::Form;
use crate::api::openai::generation::{Order, Part};
use crate::api::{App, Error};
use crate::session::{self, Event, Input, ModelCard, Running, SoFar, StoredItem};
use crate::types::{Message, Role, SessionId, StateId, Tenant};

/// A chain of responses is followed no further.
const LONGEST_CHAIN: usize = 10_000;

/// A response that runs.
pub struct Begun {
    pub running: Running,
    pub ask: Ask,
    /// It is read as it comes.
    pub stream: bool,
    /// Names of fields that nobody knows.
    pub ignored: Vec<String>,
}

/// Finds where a response begins, and begins it.
pub async fn begin(app: &App, checked: Checked, head: Head, card: &ModelCard) -> Result<Begun, Error> {
    let Checked { mut generation, mut ask, ignored } = checked;
    if head.if_match.is_some() {
        return Err(Error::invalid("if-match", "`If-Match` has no meaning here: a conversation's head is not shown"));
    }
    let Place { state_id, session_id, if_match, messages } = place(app, &head.caller.tenant, &mut ask).await?;
    generation.store_state = session_id.is_none().then_some(ask.store);
    (generation.state_id, generation.session_id) = (state_id.map(String::from), session_id.map(String::from));
    let form = Form::Response(Box::new(ask.clone())).text();
    let (max_tokens, keep) = (ask.max_output_tokens, ask.store);
    let part = Part { input: Input::Chat(messages), max_tokens, prefix: "resp_", ignored, form, keep };
    let Order { turn, stream, ignored } = generation.order(part, Head { if_match, ..head }, app.rules(card))?;
    let running = app.sessions.start(turn).await?;
    Ok(Begun { running, ask, stream: stream.is_some(), ignored })
}

/// Where a response begins, and what it has to read.
#[derive(Default)]
struct Place {
    state_id: Option<StateId>,
    session_id: Option<SessionId>,
    /// The conversation's head when its messages were put together.
    if_match: Option<StateId>,
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
pub struct Stored {
    pub ask: Ask,
    answer: String,
    state: Option<StateId>,
    ended: bool,
}

pub async fn stored(app: &App, tenant: &Tenant, id: &str) -> Result<Stored, Error> {
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
            Event::Done { stored: Some(Ok(receipt)), .. } => state = Some(receipt.id),
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

async fn is_there(app: &App, tenant: &Tenant, state: &StateId) -> Result<bool, Error> {
    match app.sessions.state(tenant, state).await {
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
    let (session_id, if_match) = (Some(conversation.session), conversation.head);
    Ok(Place { session_id, if_match, messages, state_id: None })
}
