//! Making a response's state durable, and committing the turn.

use std::borrow::Cow;
use std::sync::Arc;

use super::origin::{Parent, Session};
use super::retain::Policy;
use super::{Cached, Error, Input, Model, Prompt, StateError, StateReceipt, Turn};
use crate::engine::{self, Kept};
use crate::state::{self, Archive, Commit};
use crate::telemetry::{clock, metrics};
use crate::types::{
    Beginning, Finish, Memory, Message, Pending, Resume, Snapshot, SnapshotHead, StateId, TurnRecord, TurnUsage,
};

/// Everything about a turn that its stored state and record say.
pub(super) struct Keeper {
    pub archive: Archive,
    pub policy: Arc<Policy>,
    pub model: Arc<Model>,
    pub parent: Option<Parent>,
    /// What a turn without a parent began from.
    pub beginning: Option<Beginning>,
    /// Until its turn has ended.
    pub session: Option<Session>,
    pub created: u64,
    pub expires_at: Option<u64>,
    pub prompt_tokens: u64,
    pub cached_tokens: Cached,
    /// The last token of a text that is only read. It waits in the state, so that what a turn without new text says can be
    /// sampled from it.
    pub waits: Option<u32>,
    pub turn: Turn,
}

/// A response whose state is not what was asked for.
pub(super) enum NotKept {
    /// There is none; the answer arrives all the same.
    Lost(StateError),
    /// Another turn of the session was committed first.
    Conflict(Error),
}

impl Keeper {
    /// Stores the snapshot, then, in a session, commits the turn record; both are durable when this returns.
    pub async fn keep(
        &self,
        kept: Kept,
        answer: String,
        finish: Finish,
        sampled: u64,
    ) -> Result<StateReceipt, NotKept> {
        let began = clock::now();
        let Kept { mut memory, mut ids } = kept;
        if let Some(last) = self.waits {
            memory.pending = Pending { ends: vec![last], ..Pending::default() };
            memory.counts.clear();
            ids.push(last);
        }
        let record = self.record(&memory, ids, answer, finish, sampled);
        let head = self.head();
        let receipt = StateReceipt {
            id: head.id.clone(),
            parent: head.parent.clone(),
            session_id: head.session.clone(),
            turn: head.turn,
            tokens: memory.tokens(),
            bytes: memory.bytes(),
            expires_at: head.expires_at,
        };
        let bytes = receipt.bytes;
        let snapshot = Arc::new(Snapshot { head, memory });
        self.store(&snapshot).await?;
        if let Some(session) = &self.session {
            let record = TurnRecord { state: Some(receipt.id.clone()), ..record };
            match self.commit(session, record).await {
                Ok(Commit::Committed) => {}
                Ok(Commit::Taken) => {
                    let state = self.store_free(&snapshot).await;
                    tracing::warn!(session = %session.id, "another turn was committed first");
                    return Err(NotKept::Conflict(Error::TurnConflict { session: session.id.clone(), state }));
                }
                Err(e) => {
                    let why = match self.store_free(&snapshot).await {
                        Some(state) => {
                            format!("the turn could not be committed; its state is {state}, without a session")
                        }
                        None => "the turn could not be committed".into(),
                    };
                    return Err(NotKept::Lost(failed(StateError::STORE, &why, Some(&e))));
                }
            }
            self.policy.committed(&self.archive, &self.turn.tenant, session);
        }
        metrics::state_stored(bytes, clock::now() - began);
        Ok(receipt)
    }

    /// Stores a snapshot, if the tenant may have another one.
    async fn store(&self, snapshot: &Arc<Snapshot>) -> Result<(), NotKept> {
        let (tenant, bytes) = (&self.turn.tenant, snapshot.memory.bytes());
        match self.policy.quotas.admit(&self.archive, tenant, bytes, true).await {
            Ok(()) => {}
            Err(Error::QuotaExceeded { message }) => {
                return Err(NotKept::Lost(failed(StateError::QUOTA, &message, None)));
            }
            Err(e) => tracing::warn!(%tenant, error = %e, "stored states could not be counted"),
        }
        let stored = async {
            // A state without a session that was made from one of a session's: that one is then somebody else's too.
            if let (None, Some(parent)) = (&snapshot.head.session, &self.parent)
                && let Some(session) = &parent.session
            {
                let line = (&parent.id, &snapshot.head.id);
                self.archive.note_child(tenant, session, line, clock::unix_seconds()).await?;
            }
            self.archive.keep(snapshot.clone()).await
        };
        if let Err(e) = stored.await {
            self.policy.quotas.give_back(tenant, bytes).await;
            if matches!(e, state::Error::Unfit { .. }) {
                let why = "the state is not kept: it has numbers that are not finite";
                return Err(NotKept::Lost(failed(StateError::UNFIT, why, Some(&e))));
            }
            return Err(NotKept::Lost(failed(StateError::STORE, "the state could not be stored", Some(&e))));
        }
        Ok(())
    }

    /// Stores what did not become a turn as a state that belongs to no session, in place of the one that does.
    async fn store_free(&self, snapshot: &Arc<Snapshot>) -> Option<StateId> {
        let id = StateId::new(clock::unix_millis(), clock::random_u128());
        let head = SnapshotHead { id: id.clone(), session: None, record: None, ..snapshot.head.clone() };
        let free = Snapshot { head, memory: snapshot.memory.clone() };
        let stored = self.archive.keep(Arc::new(free)).await;
        if let Err(error) = &stored {
            tracing::error!(%error, "the state of a turn that was not committed could not be stored");
        }
        // The other one was never announced: if it stays, the sweep finds it.
        if let Err(error) = self.archive.remove(&self.turn.tenant, &snapshot.head.id).await {
            tracing::warn!(%error, "the state of a turn that was not committed could not be removed");
        }
        stored.is_ok().then_some(id)
    }

    /// Why the engine failed: the model, or what it was to go on from.
    pub fn blame(&self, why: engine::Failure) -> Error {
        match (why, &self.parent) {
            (engine::Failure::NotFinite, Some(parent)) => Error::StateUnusable(parent.id.clone()),
            (why, _) => Error::Engine(why.to_string()),
        }
    }

    async fn commit(&self, session: &Session, record: TurnRecord) -> Result<Commit, state::Error> {
        let (tenant, mut entry) = (&self.turn.tenant, session.head.turn(record));
        if !self.turn.metadata.is_empty() {
            entry.metadata.clone_from(&self.turn.metadata);
        }
        if let Some(key) = &entry.record.idempotency_key {
            self.archive.note_key(tenant, &session.id, key, entry.turn).await?;
        }
        self.archive.commit_entry(tenant, &session.id, &entry).await
    }

    fn head(&self) -> SnapshotHead {
        let turn = match (&self.session, &self.parent) {
            (Some(session), _) => session.head.depth() + 1,
            (None, Some(parent)) => parent.turn + 1,
            (None, None) => 1,
        };
        SnapshotHead {
            id: StateId::new(clock::unix_millis(), clock::random_u128()),
            parent: self.parent.as_ref().map(|p| p.id.clone()),
            owner: self.turn.tenant.clone(),
            model: self.model.card.id.clone(),
            fingerprint: self.model.card.fingerprint.clone(),
            arithmetic: engine::arithmetic().into(),
            session: self.session.as_ref().map(|s| s.id.clone()),
            record: self.session.as_ref().map(|s| s.head.next()),
            turn,
            // As in the record, which tells of the state when it is evicted.
            created: self.created,
            expires_at: self.expires_at,
            metadata: self.turn.metadata.clone(),
        }
    }

    /// The turn's record, but for its state.
    fn record(&self, memory: &Memory, ids: Vec<u32>, answer: String, finish: Finish, sampled: u64) -> TurnRecord {
        // What the parent had pending is in its own record; a response that went on may have replaced the end of it.
        let pending = self.parent.as_ref().map_or(&[][..], |p| &p.memory.pending.ends);
        let common = pending.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        let consumed = self.parent.as_ref().map_or(0, |p| p.memory.consumed);
        let prompt_ids = (self.prompt_tokens - consumed) as usize;
        let cached_tokens = self.cached_tokens.get();
        let (messages, text) = said(&self.model, &self.turn.input);
        TurnRecord {
            state: None,
            parent: self.parent.as_ref().map(|p| p.id.clone()),
            model: self.model.card.id.clone(),
            fingerprint: self.model.card.fingerprint.clone(),
            beginning: self.beginning.clone(),
            messages,
            text,
            answer,
            finish: Some(finish),
            takes_back: pending.len() - common,
            answer_ids: ids.len().saturating_sub(prompt_ids),
            ids: ids[common..].to_vec(),
            resume: Some(Resume::of(memory)),
            response_id: self.turn.response_id.clone(),
            seed: self.turn.sampling.seed,
            usage: TurnUsage { prompt_tokens: self.prompt_tokens, cached_tokens, completion_tokens: sampled },
            idempotency_key: self.turn.idempotency_key.clone(),
            tokens: memory.tokens(),
            bytes: memory.bytes(),
            created: self.created,
            expires_at: self.expires_at,
        }
    }
}

/// What the client sent, as a turn's record keeps it: chat messages, or the text of a prompt.
pub(super) fn said(model: &Model, input: &Input) -> (Vec<Message>, Option<String>) {
    let prompts = match input {
        Input::Chat(messages) => return (messages.clone(), None),
        Input::Prompts(prompts) => prompts,
    };
    let text = prompts.first().map(|prompt| match prompt {
        Prompt::Text(text) => text.clone(),
        Prompt::Ids(ids) => String::from_utf8_lossy(&model.text.decode(ids)).into_owned(),
    });
    (Vec::new(), text)
}

/// The cause is for the log, as it may name paths, but for what it says of the disk.
pub(super) fn failed(code: Cow<'static, str>, message: &str, cause: Option<&state::Error>) -> StateError {
    tracing::error!(%code, message, cause = cause.map(tracing::field::display), "a state was not kept");
    metrics::state_failed();
    let message = match cause {
        Some(state::Error::Store { fault: Some(fault), .. }) => format!("{message}: {fault}"),
        _ => message.into(),
    };
    StateError { code, message }
}
