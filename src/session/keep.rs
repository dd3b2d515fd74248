//! Making a response's state durable, and committing the turn.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::origin::{Parent, Session};
use super::{Cached, Input, Model, Prompt, StateError, StateReceipt, Turn};
use crate::engine::Kept;
use crate::state::{self, Archive, Commit};
use crate::telemetry::{clock, metrics};
use crate::types::{Beginning, Finish, Memory, Message, Snapshot, SnapshotHead, StateId, TurnRecord, TurnUsage};

/// Everything about a turn that its stored state and record say.
pub(super) struct Keeper {
    pub archive: Archive,
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
    pub turn: Turn,
}

impl Keeper {
    /// Stores the snapshot, then, in a session, commits the turn record; both are durable when this returns.
    pub async fn keep(
        &self,
        kept: Kept,
        answer: String,
        finish: Finish,
        sampled: u64,
    ) -> Result<StateReceipt, StateError> {
        let began = clock::now();
        let Kept { memory, ids } = kept;
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
        if let Err(e) = self.archive.keep(Arc::new(Snapshot { head, memory })).await {
            return Err(failed("state_store_failed", "the state could not be stored", Some(&e)));
        }
        if let Some(session) = &self.session {
            let record = TurnRecord { state: Some(receipt.id.clone()), ..record };
            match self.archive.commit(&self.turn.tenant, &session.id, &session.head, &record).await {
                Ok(Commit::Committed) => {}
                Ok(Commit::Taken) => {
                    let why = format!(
                        "another turn of session `{}` was committed first; this one is kept as state {} without a session",
                        session.id, receipt.id
                    );
                    return Err(failed("session_conflict", &why, None));
                }
                Err(e) => {
                    let why = format!("the turn could not be committed, but its state is {}", receipt.id);
                    return Err(failed("state_store_failed", &why, Some(&e)));
                }
            }
        }
        metrics::state_stored(bytes, clock::now() - began);
        Ok(receipt)
    }

    fn head(&self) -> SnapshotHead {
        let turn = match (&self.session, &self.parent) {
            (Some(session), _) => {
                let next = session.head.next();
                next - session.head.live.as_ref().map_or(next, |e| e.first) + 1
            }
            (None, Some(parent)) => parent.turn + 1,
            (None, None) => 1,
        };
        SnapshotHead {
            id: StateId::new(clock::unix_millis(), clock::random_u128()),
            parent: self.parent.as_ref().map(|p| p.id.clone()),
            owner: self.turn.tenant.clone(),
            model: self.model.card.id.clone(),
            fingerprint: self.model.card.fingerprint.clone(),
            arithmetic: crate::engine::ARITHMETIC.into(),
            session: self.session.as_ref().map(|s| s.id.clone()),
            turn,
            created: clock::unix_seconds(),
            expires_at: self.expires_at,
            metadata: BTreeMap::new(),
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

/// The cause is for the log only: it may name paths.
fn failed(code: &'static str, message: &str, cause: Option<&state::Error>) -> StateError {
    tracing::error!(code, message, cause = cause.map(tracing::field::display), "a state was not kept");
    metrics::state_failed();
    StateError { code, message: message.into() }
}
