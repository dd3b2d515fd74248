//! OpenAI's conversations, over sessions.
//!
//! A conversation's turns are those of a session, whose state has read them. What else is done to it is in a journal: items
//! that were added and that no turn has read yet, and every time that it has to be *read anew* (an item was deleted, the
//! instructions changed): then another session takes its place, which all items are still to be read in, and the one that is
//! left is deleted with its states.
//!
//! Wherever a session is named, a conversation's id means the session that has its next turn. Names of that form are the
//! conversations' own: nobody else begins a session of such a name.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::plan::invalid;
use super::{Error, Input, Sessions, Start, Turn};
use crate::state::{Entry, Journal, Put};
use crate::telemetry::clock;
use crate::types::{Finish, Message, Role, SessionId, StateId, Tenant};

/// Names of sessions that are listed in one go.
const PAGE: usize = 1024;

/// One message of a conversation or of a response's input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredItem {
    pub id: String,
    /// `user`, `system`, `developer` or `assistant`.
    pub role: String,
    pub text: String,
    /// An answer that was not cut.
    pub complete: bool,
}

/// An entry of a conversation's journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Change {
    Created {
        at: u64,
        metadata: BTreeMap<String, String>,
        items: Vec<StoredItem>,
    },
    Added(Vec<StoredItem>),
    /// The items that are to be read in another session.
    Anew {
        items: Vec<StoredItem>,
        instructions: Option<String>,
    },
    Metadata(BTreeMap<String, String>),
}

/// What a turn does to its conversation before it begins, when it reads all of it anew: the journal's next entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Anew {
    /// The session that is left, and its head.
    session: SessionId,
    head: Option<StateId>,
    /// How many entries the journal has before.
    changes: u64,
    items: Vec<StoredItem>,
    instructions: Option<String>,
}

/// A conversation as it is now.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    pub created: u64,
    pub metadata: BTreeMap<String, String>,
    /// Oldest first.
    pub items: Vec<StoredItem>,
    /// How many of them the session's state has read.
    read: usize,
    /// What the session's first turn began with, or will.
    pub instructions: Option<String>,
    /// Whose next turn is the conversation's.
    pub session: SessionId,
    /// Its state; `None` = it has no turns yet.
    pub head: Option<StateId>,
    /// Which session it is, from 0.
    number: usize,
    changes: u64,
}

impl Conversation {
    /// What the next turn has to read first.
    pub fn unread(&self) -> &[StoredItem] {
        &self.items[self.read..]
    }

    /// The same as messages, after the instructions where the session has not begun.
    pub fn waiting(&self) -> Vec<Message> {
        let instructions = self.instructions.iter().filter(|_| self.head.is_none()).map(|text| (Role::System, text));
        let unread = self.unread().iter().map(|item| (role(&item.role), &item.text));
        let message = |(role, text): (Role, &String)| Message { role, content: text.clone(), name: None };
        instructions.chain(unread).map(message).collect()
    }

    /// The same as it will be when everything is read anew, after other instructions; and what a turn of it takes along, so
    /// that it becomes so.
    pub fn anew(self, instructions: Option<String>) -> (Self, Anew) {
        let Self { session: left, head, changes, ref items, .. } = self;
        let anew = Anew { session: left, head, changes, items: items.clone(), instructions: instructions.clone() };
        let (id, number) = (conversation_of(&anew.session).unwrap_or_default(), self.number + 1);
        let next = Self {
            session: session(id, number),
            head: None,
            number,
            changes: changes + 1,
            read: 0,
            instructions,
            ..self
        };
        (next, anew)
    }
}

impl Sessions {
    pub async fn create_conversation(
        &self,
        tenant: &Tenant,
        metadata: BTreeMap<String, String>,
        items: Vec<StoredItem>,
    ) -> Result<(String, Conversation), Error> {
        let id = format!("conv_{:032x}", clock::random_u128());
        let created = Change::Created { at: clock::unix_seconds(), metadata, items };
        self.archive.append(&Journal::conversation(tenant, &id), 0, &created).await?;
        let conversation = self.conversation(tenant, &id).await?;
        Ok((id, conversation))
    }

    /// A conversation as it is now.
    pub async fn conversation(&self, tenant: &Tenant, id: &str) -> Result<Conversation, Error> {
        let conversation = self.journalled(tenant, id).await?;
        let mut conversation = conversation.ok_or_else(|| Error::ConversationNotFound(id.into()))?;
        let turns = self.archive.turns(tenant, &conversation.session, 0, usize::MAX).await;
        let turns = turns.map_err(|error| Error::from(error).of_conversation(id))?;
        apply(&mut conversation, turns.map(|turns| turns.data).unwrap_or_default());
        Ok(conversation)
    }

    /// A conversation without its turns, or `None` if there is none of that id.
    async fn journalled(&self, tenant: &Tenant, id: &str) -> Result<Option<Conversation>, Error> {
        if !is_conversation(id) {
            return Ok(None);
        }
        let changes = self.archive.entries(&Journal::conversation(tenant, id)).await;
        Ok(fold(id, changes.map_err(|error| Error::from(error).of_conversation(id))?))
    }

    /// The session that is meant by a name: by a conversation's id, the one that has its next turn.
    ///
    /// # Errors
    /// [`Error::SessionNotFound`] for one that its conversation has left.
    pub(super) async fn current(&self, tenant: &Tenant, name: &SessionId) -> Result<SessionId, Error> {
        let Some(id) = conversation_of(name) else { return Ok(name.clone()) };
        match self.journalled(tenant, id).await? {
            Some(Conversation { session, .. }) if session == *name || name.as_str() == id => Ok(session),
            Some(_) => Err(Error::SessionNotFound(name.clone())),
            None => Ok(name.clone()),
        }
    }

    /// Refuses to do to a conversation's session what would leave the conversation without it.
    pub(super) async fn check_free(&self, tenant: &Tenant, name: &SessionId) -> Result<(), Error> {
        match conversation_of(name) {
            Some(id) if self.journalled(tenant, id).await?.is_some() => {
                let why = format!(
                    "`{name}` is the session of a conversation: delete that, with DELETE /v1/conversations/{id}, or single items of it"
                );
                invalid("session_id", &why)
            }
            _ => Ok(()),
        }
    }

    /// A turn that names a conversation as its session goes on with what that is now: it reads first what waits there.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it cannot, because it brings no messages.
    pub async fn follow(&self, turn: Turn) -> Result<Turn, Error> {
        let Start::Session { id: name, if_match, .. } = &turn.start else { return Ok(turn) };
        let Some(id) = conversation_of(name) else { return Ok(turn) };
        let unknown = || Error::SessionNotFound(name.clone());
        let conversation = match self.conversation(&turn.tenant, id).await {
            Err(Error::ConversationNotFound(_)) => return Err(unknown()),
            conversation => conversation?,
        };
        if conversation.session != *name && name.as_str() != id {
            return Err(unknown());
        }
        let mut waiting = conversation.waiting();
        let Conversation { session: id, head, .. } = conversation;
        if waiting.is_empty() {
            return Ok(Turn { start: Start::Session { id, if_match: if_match.clone(), begins: false }, ..turn });
        }
        let Input::Chat(messages) = &turn.input else {
            let why = format!(
                "conversation `{name}` has items that are still to be read, which a prompt cannot: send `messages`, or use \
                 POST /v1/responses"
            );
            return invalid("session_id", &why);
        };
        waiting.extend(messages.iter().cloned());
        if waiting.last().is_some_and(|message| message.role == Role::Assistant) {
            return invalid(
                "messages",
                "the conversation ends with the assistant's message: there is nothing to answer",
            );
        }
        // What was put together is right for this head only.
        let (if_match, begins) = (if_match.clone().or_else(|| head.clone()), head.is_none());
        Ok(Turn { start: Start::Session { id, if_match, begins }, input: Input::Chat(waiting), ..turn })
    }

    /// Refuses a turn of a session that another one has taken the place of, as when an item was deleted a moment ago: the
    /// conversation would never show it. So it is with one that was to read anew what has changed since.
    pub(super) async fn check_current(&self, turn: &Turn, session: &SessionId) -> Result<(), Error> {
        let Some(id) = conversation_of(session) else { return Ok(()) };
        let now = self.journalled(&turn.tenant, id).await?.ok_or_else(|| Error::ConversationNotFound(id.into()))?;
        let is_current = match &turn.anew {
            None => now.session == *session,
            Some(anew) => now.session == anew.session && now.changes == anew.changes,
        };
        if is_current { Ok(()) } else { Err(Error::TurnConflict { session: session.clone(), state: None }) }
    }

    /// Notes that a turn, all of which was checked, reads its conversation anew. Not while the session that it leaves runs one.
    pub(super) async fn begin_anew(&self, turn: &mut Turn) -> Result<(), Error> {
        let Some(Anew { session, head, changes, items, instructions }) = turn.anew.take() else { return Ok(()) };
        let Some(id) = conversation_of(&session) else { return Ok(()) };
        let tenant = &turn.tenant;
        self.hub.supersede(tenant, &session).await;
        let _turnstile = self.busy.enter(tenant, &session, None)?;
        // A turn that was committed since its items were put together is not among them.
        let stayed = self.archive.head(tenant, &session).await?.state() == head.as_ref();
        let change = Change::Anew { items, instructions };
        if !stayed || self.archive.append(&Journal::conversation(tenant, id), changes, &change).await? == Put::Exists {
            return Err(Error::TurnConflict { session: session.clone(), state: None });
        }
        if let Err(error) = self.remove_session(tenant, &session).await {
            // The sweep comes by again.
            tracing::warn!(%session, %error, "a session that its conversation has left could not be removed");
        }
        Ok(())
    }

    /// Removes a session that its conversation has left, where whoever left it was cut off before that.
    pub(super) async fn remove_left(&self, tenant: &Tenant, session: &SessionId) -> Result<(), Error> {
        let Some(id) = conversation_of(session) else { return Ok(()) };
        let Ok(_turnstile) = self.busy.enter(tenant, session, None) else { return Ok(()) };
        let now = self.journalled(tenant, id).await?;
        if now.is_some_and(|now| number(session).is_some_and(|number| number < now.number)) {
            self.remove_session(tenant, session).await?;
        }
        Ok(())
    }

    /// Adds items that the next turn will read.
    pub async fn add_items(&self, tenant: &Tenant, id: &str, items: Vec<StoredItem>) -> Result<(), Error> {
        self.change(tenant, id, |_| Ok(Change::Added(items.clone()))).await.map(drop)
    }

    /// Replaces the metadata.
    pub async fn set_metadata(
        &self,
        tenant: &Tenant,
        id: &str,
        metadata: BTreeMap<String, String>,
    ) -> Result<Conversation, Error> {
        self.change(tenant, id, |_| Ok(Change::Metadata(metadata.clone()))).await
    }

    /// Removes an item, and with it the session whose states may have read it; what is left is read anew by the next turn.
    pub async fn remove_item(&self, tenant: &Tenant, id: &str, item: &str) -> Result<Conversation, Error> {
        let without = |conversation: &Conversation| {
            let mut items = conversation.items.clone();
            items.retain(|other| other.id != item);
            if items.len() == conversation.items.len() {
                return Err(Error::ItemNotFound(item.into()));
            }
            Ok(Change::Anew { items, instructions: conversation.instructions.clone() })
        };
        self.change(tenant, id, without).await
    }

    /// Ends a conversation and removes its sessions.
    pub async fn delete_conversation(&self, tenant: &Tenant, id: &str) -> Result<(), Error> {
        let now = async || match self.journalled(tenant, id).await {
            Ok(None) => Err(Error::ConversationNotFound(id.into())),
            Ok(Some(conversation)) => Ok(Some(conversation.session)),
            Err(Error::ConversationDamaged(..)) => Ok(None),
            Err(error) => Err(error),
        };
        loop {
            let current = now().await?;
            // No turn of it begins before the journal is gone, and none after that.
            let _turnstile = match &current {
                Some(session) => {
                    self.hub.supersede(tenant, session).await;
                    Some(self.busy.enter(tenant, session, None)?)
                }
                None => None,
            };
            if now().await? != current {
                continue;
            }
            for session in self.sessions_of(tenant, id).await? {
                let _turnstile = match Some(&session) == current.as_ref() {
                    true => None,
                    false => Some(self.busy.enter(tenant, &session, None)?),
                };
                self.remove_session(tenant, &session).await?;
            }
            return Ok(self.archive.erase(&Journal::conversation(tenant, id)).await?);
        }
    }

    /// All sessions that a conversation has or had.
    async fn sessions_of(&self, tenant: &Tenant, id: &str) -> Result<Vec<SessionId>, Error> {
        let (folder, prefix) = (format!("t/{tenant}/sessions"), format!("{id}."));
        let (mut sessions, mut after) = (vec![session(id, 0)], prefix.clone());
        loop {
            let names = self.archive.names(&folder, Some(&after), PAGE).await?;
            let ours = names.iter().take_while(|name| name.starts_with(&prefix)).count();
            sessions.extend(names[..ours].iter().filter_map(|name| SessionId::parse(name.as_str()).ok()));
            match names.into_iter().nth(PAGE - 1) {
                Some(last) if ours == PAGE => after = last,
                _ => return Ok(sessions),
            }
        }
    }

    /// Appends a change that is made from the conversation as it is; not while it runs a turn.
    async fn change(
        &self,
        tenant: &Tenant,
        id: &str,
        make: impl Fn(&Conversation) -> Result<Change, Error>,
    ) -> Result<Conversation, Error> {
        let journal = Journal::conversation(tenant, id);
        loop {
            let session = self.conversation(tenant, id).await?.session;
            self.hub.supersede(tenant, &session).await;
            let _turnstile = self.busy.enter(tenant, &session, None)?;
            let conversation = self.conversation(tenant, id).await?;
            // Another session may have taken its place, in which a turn may run.
            if conversation.session != session {
                continue;
            }
            let change = make(&conversation)?;
            if self.archive.append(&journal, conversation.changes, &change).await? == Put::Created {
                if let Change::Anew { .. } = change {
                    self.remove_session(tenant, &session).await?;
                }
                return self.conversation(tenant, id).await;
            }
        }
    }
}

/// What the journal alone says.
fn fold(id: &str, changes: Vec<Change>) -> Option<Conversation> {
    let count = changes.len() as u64;
    let mut changes = changes.into_iter();
    let Some(Change::Created { at, metadata, items }) = changes.next() else { return None };
    let mut conversation = Conversation {
        created: at,
        metadata,
        items,
        read: 0,
        instructions: None,
        session: session(id, 0),
        head: None,
        number: 0,
        changes: count,
    };
    for change in changes {
        match change {
            Change::Created { .. } => return None,
            Change::Added(items) => conversation.items.extend(items),
            Change::Metadata(metadata) => conversation.metadata = metadata,
            Change::Anew { items, instructions } => {
                conversation.number += 1;
                conversation.session = session(id, conversation.number);
                (conversation.items, conversation.instructions) = (items, instructions);
            }
        }
    }
    Some(conversation)
}

/// Puts what the session's turns have read and said before what is still to be read. A message that a turn has read is the
/// first one that waits, if that is the same, or was new in the turn.
fn apply(conversation: &mut Conversation, turns: Vec<Entry>) {
    let mut waiting: VecDeque<StoredItem> = std::mem::take(&mut conversation.items).into();
    let mut items = Vec::new();
    for (n, Entry { record, .. }) in turns.into_iter().enumerate() {
        let answer_id = format!("msg_{}", record.response_id.trim_start_matches("resp_"));
        let instructions = conversation.instructions.as_deref().filter(|_| n == 0);
        let begins_so = record
            .messages
            .first()
            .is_some_and(|message| message.role == Role::System && Some(message.content.as_str()) == instructions);
        let mut new = 0;
        for message in record.messages.into_iter().skip(usize::from(begins_so)) {
            let same = |item: &&StoredItem| role(&item.role) == message.role && item.text == message.content;
            if waiting.front().filter(same).is_some() {
                items.extend(waiting.pop_front());
                continue;
            }
            let id = format!("{answer_id}{new:03}");
            new += 1;
            items.push(StoredItem { id, role: name(message.role).into(), text: message.content, complete: true });
        }
        let complete = record.finish != Some(Finish::Length);
        // A prompt without messages is what its answer begins with.
        let text = record.text.unwrap_or_default() + &record.answer;
        items.push(StoredItem { id: answer_id, role: "assistant".into(), text, complete });
        conversation.head = record.state;
    }
    conversation.read = items.len();
    items.extend(waiting);
    conversation.items = items;
}

fn is_conversation(id: &str) -> bool {
    id.strip_prefix("conv_").is_some_and(|id| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The conversation whose session this is or was.
pub(super) fn conversation_of(session: &SessionId) -> Option<&str> {
    let name = session.as_str();
    Some(name.split_once('.').map_or(name, |(id, _)| id)).filter(|id| is_conversation(id))
}

/// Which of its conversation's sessions this is.
fn number(session: &SessionId) -> Option<usize> {
    session.as_str().split_once('.').map_or(Some(0), |(_, number)| number.parse().ok())
}

fn session(id: &str, number: usize) -> SessionId {
    let name = if number == 0 { id.to_owned() } else { format!("{id}.{number}") };
    SessionId::parse(name).expect("a conversation's id and a number are a session's name")
}

fn role(name: &str) -> Role {
    match name {
        "assistant" => Role::Assistant,
        "user" => Role::User,
        _ => Role::System,
    }
}

fn name(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User | Role::Tool => "user",
        Role::Assistant => "assistant",
    }
}
