//! Where a turn begins: a stored state, the head of a session, or nothing.

use std::sync::Arc;

use super::{Error, Model, Sessions, Start, Turn, Turnstile};
use crate::state::{self, Head};
use crate::telemetry::clock;
use crate::types::{Memory, SessionId, StateId, Tenant};

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
    /// The session that made it.
    pub session: Option<SessionId>,
    /// How many of its tokens had to be read again because it was gone.
    pub read_again: u64,
    pub memory: Arc<Memory>,
}

impl Parent {
    /// How many tokens are not computed again.
    pub fn cached(&self) -> u64 {
        self.memory.consumed.saturating_sub(self.read_again)
    }
}

impl Origin {
    /// Whether the session is where the turn expects it.
    pub fn check(&self, start: &Start) -> Result<(), Error> {
        match start {
            Start::Session { id, if_match: Some(expected), .. } => self.check_head(id, Some(expected)),
            Start::Session { id, begins: true, .. } => self.check_head(id, None),
            _ => Ok(()),
        }
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
                let parent = match self.parent(&turn.tenant, id, model).await {
                    Ok(Some(parent)) => parent,
                    Ok(None) => {
                        let restored = self.restore(&turn.tenant, id, model).await?;
                        restored.ok_or_else(|| Error::StateNotFound(id.clone()))?
                    }
                    Err(damaged @ Error::StateDamaged(..)) => {
                        self.restore(&turn.tenant, id, model).await?.ok_or(damaged)?
                    }
                    Err(e) => return Err(e),
                };
                Ok(Origin { parent: Some(parent), session: None })
            }
            Start::Session { id, .. } => {
                let turnstile = self.busy.enter(&turn.tenant, id, turn.idempotency_key.as_deref())?;
                self.check_current(turn, id).await?;
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
        let head = snapshot.head;
        let memory = Arc::new(snapshot.memory);
        Ok(Some(Parent { id: id.clone(), turn: head.turn, session: head.session, read_again: 0, memory }))
    }
}
