//! Where a turn begins: a stored state, the head of a session, or nothing.

use std::sync::Arc;

use super::{Error, Model, Sessions, Start, Turn, Turnstile};
use crate::state::{self, Head};
use crate::telemetry::clock;
use crate::types::{Memory, Pending, SessionId, StateId, Tenant};

/// Where a turn begins, read from the archive.
pub(super) struct Origin {
    /// `None` = a fresh sequence.
    pub parent: Option<Parent>,
    pub session: Option<Session>,
}

/// The session a turn belongs to.
pub(super) struct Session {
    pub id: SessionId,
    pub head: Head,
    /// Nobody else runs a turn of it here meanwhile.
    pub _turnstile: Turnstile,
}

/// What a turn began from.
pub(super) struct Parent {
    pub id: StateId,
    /// Its number in its session or chain.
    pub turn: u64,
    pub memory: Arc<Memory>,
}

impl Origin {
    /// Whether the session is where the turn expects it.
    pub fn check(&self, start: &Start) -> Result<(), Error> {
        let Start::Session { id, if_match: Some(expected) } = start else { return Ok(()) };
        self.check_head(id, Some(expected))
    }

    /// Whether a turn that an earlier process had begun from `parent` still begins there.
    pub fn check_parent(&self, parent: Option<&StateId>) -> Result<(), Error> {
        self.session.as_ref().map_or(Ok(()), |session| self.check_head(&session.id, parent))
    }

    fn check_head(&self, id: &SessionId, expected: Option<&StateId>) -> Result<(), Error> {
        let head = self.parent.as_ref().map(|parent| &parent.id);
        if head == expected {
            return Ok(());
        }
        let head = head.map_or_else(|| "not there yet".into(), StateId::to_string);
        Err(Error::SessionConflict { session: id.clone(), head })
    }
}

impl Sessions {
    /// Reads where the turn begins.
    pub(super) async fn origin(&self, turn: &Turn, model: &Model) -> Result<Origin, Error> {
        match &turn.start {
            Start::Fresh => Ok(Origin { parent: None, session: None }),
            Start::State(id) => {
                let parent = self.parent(&turn.tenant, id, model).await?;
                let parent = parent.ok_or_else(|| Error::StateNotFound(id.clone()))?;
                Ok(Origin { parent: Some(parent), session: None })
            }
            Start::Session { id, .. } => {
                let turnstile = self.busy.enter(&turn.tenant, id)?;
                let head = self.archive.head(&turn.tenant, id).await?;
                let state = head.live.as_ref().and_then(|entry| entry.record.state.clone());
                let parent = match &state {
                    None => None,
                    Some(state) => Some(match self.parent(&turn.tenant, state, model).await {
                        Ok(Some(parent)) => parent,
                        // The log is the truth; the snapshot is its cache.
                        Ok(None) | Err(Error::StateDamaged(..)) => self.reread(&turn.tenant, id, &head, model).await?,
                        Err(e) => return Err(e),
                    }),
                };
                Ok(Origin { parent, session: Some(Session { id: id.clone(), head, _turnstile: turnstile }) })
            }
        }
    }

    /// The stored state `id`, if it is there and of this model.
    async fn parent(&self, tenant: &Tenant, id: &StateId, model: &Model) -> Result<Option<Parent>, Error> {
        let now = clock::unix_seconds();
        let loaded = self.archive.load(tenant, id, now).await;
        let snapshot = match loaded {
            Ok(Some(snapshot)) => snapshot,
            Ok(None) => return Ok(None),
            Err(state::Error::Damaged { why, .. }) => {
                tracing::error!(state = %id, why, "a stored state is damaged");
                return Err(Error::StateDamaged(id.clone(), why));
            }
            Err(e) => return Err(e.into()),
        };
        if snapshot.head.fingerprint != model.card.fingerprint {
            let state_model = snapshot.head.model;
            return Err(Error::StateModelMismatch { state_model, model: model.card.id.clone() });
        }
        Ok(Some(Parent { id: id.clone(), turn: snapshot.head.turn, memory: Arc::new(snapshot.memory) }))
    }

    /// A session's sequence from its token log, to be read again because its snapshot is gone.
    async fn reread(&self, tenant: &Tenant, id: &SessionId, head: &Head, model: &Model) -> Result<Parent, Error> {
        let entry = head.live.as_ref().ok_or_else(|| Error::SessionNotFound(id.clone()))?;
        let state = entry.record.state.clone().ok_or_else(|| Error::SessionNotFound(id.clone()))?;
        if entry.record.fingerprint != model.card.fingerprint {
            let state_model = entry.record.model.clone();
            return Err(Error::StateModelMismatch { state_model, model: model.card.id.clone() });
        }
        let turns = self.archive.turns(tenant, id, 0, usize::MAX).await?;
        let turns = turns.ok_or_else(|| Error::SessionNotFound(id.clone()))?.data;
        let mut ids: Vec<u32> = Vec::new();
        for turn in &turns {
            ids.truncate(ids.len().saturating_sub(turn.record.takes_back));
            ids.extend(&turn.record.ids);
        }
        // A session that began from a foreign state has a log that begins in the middle.
        if ids.len() as u64 != entry.record.tokens {
            return Err(Error::StateNotFound(state));
        }
        let beginning = turns.first().and_then(|entry| entry.record.beginning.as_ref());
        let segments = model.initial.again(beginning);
        let segments =
            segments.map_err(|began_from| Error::InitialStateMismatch { session: id.clone(), began_from })?.to_vec();
        tracing::warn!(session = %id, state = %state, tokens = ids.len(), "reading a session again: its snapshot is gone");
        let pending = Pending { ends: ids, ..Default::default() };
        let memory = Arc::new(Memory { segments, pending, ..Memory::default() });
        Ok(Parent { id: state, turn: entry.turn - entry.first + 1, memory })
    }
}
