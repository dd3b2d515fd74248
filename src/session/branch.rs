//! Going back: a session forked at one of its turns, or rewound to it. No token is computed, no state is copied.

use super::conversations::conversation_of;
use super::plan::invalid;
use super::{Error, SessionInfo, Sessions};
use crate::state::{self, At, Commit, Entry, Forking, Head};
use crate::telemetry::clock;
use crate::types::{SessionId, StateId, Tenant};

/// Where a session is to be forked or rewound, and on which condition.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Branching {
    /// `None` = at its head.
    pub at: Option<At>,
    /// The state that has to be the head.
    pub if_match: Option<StateId>,
}

impl Sessions {
    /// Begins the session `to` where `id` is, or was.
    pub async fn fork(
        &self,
        tenant: &Tenant,
        id: &SessionId,
        to: &SessionId,
        branching: Branching,
    ) -> Result<SessionInfo, Error> {
        if conversation_of(to).is_some() {
            return invalid("to", &format!("`{to}` is a name of a conversation's session; take another"));
        }
        let id = &self.current(tenant, id).await?;
        let _turnstile = self.busy.enter(tenant, to, None)?;
        let (_, entry, turn) = self.branch(tenant, id, &branching).await?;
        let forking = Forking { from: id, head: &entry, turn: &turn, to };
        match self.archive.fork(tenant, forking, clock::unix_seconds()).await {
            Ok(Commit::Committed) => self.session(tenant, to).await,
            Ok(Commit::Taken) => Err(Error::SessionExists(to.clone())),
            Err(state::Error::Gone { .. }) => Err(Error::SessionNotFound(id.clone())),
            Err(e) => Err(e.into()),
        }
    }

    /// Moves the head of a session back, or to a turn that was taken back before. Not while it runs a turn.
    pub async fn rewind(&self, tenant: &Tenant, id: &SessionId, branching: Branching) -> Result<SessionInfo, Error> {
        let id = &self.current(tenant, id).await?;
        self.hub.supersede(tenant, id).await;
        let _turnstile = self.busy.enter(tenant, id, None)?;
        let (head, _, turn) = self.branch(tenant, id, &branching).await?;
        let stays = turn.place.session == *id && turn.place.number == head.last;
        if !stays {
            let entry = head.back(&turn, clock::unix_seconds());
            if self.archive.commit_entry(tenant, id, &entry).await? == Commit::Taken {
                return Err(Error::TurnConflict { session: id.clone(), state: None });
            }
        }
        self.session(tenant, id).await
    }

    /// Where a session stands and the turn that is meant. A damaged head can be gone back from.
    async fn branch(
        &self,
        tenant: &Tenant,
        id: &SessionId,
        Branching { at, if_match }: &Branching,
    ) -> Result<(Head, Entry, state::Turn), Error> {
        let head = match at {
            None => self.archive.head(tenant, id).await?,
            Some(_) => self.archive.readable_head(tenant, id).await?,
        };
        let entry = head.live.clone().ok_or_else(|| Error::SessionNotFound(id.clone()))?;
        check_head(id, &head, if_match.as_ref())?;
        let at = at.clone().unwrap_or(At::Number(entry.depth));
        if let At::State(state) = &at
            && self.archive.is_deleted(tenant, state).await?
        {
            return Err(Error::StateNotFound(state.clone()));
        }
        let found = self.archive.turn(tenant, id, &entry, &at).await?;
        let turn = found.ok_or_else(|| match at {
            At::State(state) => Error::StateNotFound(state),
            At::Number(number) => Error::Invalid {
                param: "at",
                code: None,
                message: format!("session `{id}` has turns 1 to {}, and no turn {number}", entry.depth),
            },
        })?;
        Ok((head, entry, turn))
    }
}

/// Refuses what is only meant for another head than a session has.
pub(super) fn check_head(id: &SessionId, head: &Head, expected: Option<&StateId>) -> Result<(), Error> {
    let Some(expected) = expected.filter(|expected| head.live.is_some() && head.state() != Some(expected)) else {
        return Ok(());
    };
    tracing::debug!(session = %id, %expected, "the head is another state");
    let head = head.state().map_or_else(String::new, StateId::to_string);
    Err(Error::SessionConflict { session: id.clone(), head })
}
