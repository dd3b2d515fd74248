//! Listing, showing and deleting states, sessions and turns.

use super::branch::check_head;
use super::prefix::Forgotten;
use super::{Error, LOST, Listing, Page, SessionInfo, Sessions, StateInfo, TurnInfo, Turned};
use crate::state::{self, At, Entry, Info, Listed, Origin, Wanted};
use crate::telemetry::clock;
use crate::types::{Message, Role, SessionId, StateId, Tenant};

impl Sessions {
    /// The tenant's states, oldest first, of one session or of all.
    pub async fn states(
        &self,
        tenant: &Tenant,
        session: Option<&SessionId>,
        page: Page,
    ) -> Result<Listing<StateInfo>, Error> {
        let after = page.after.map(|id| after(StateId::parse(id))).transpose()?;
        let session = match session {
            Some(name) => Some(self.current(tenant, name).await?),
            None => None,
        };
        let wanted = Wanted { session, after, limit: page.limit };
        Ok(listing(self.archive.list(tenant, &wanted, clock::unix_seconds()).await?, state_info))
    }

    pub async fn state(&self, tenant: &Tenant, id: &StateId) -> Result<StateInfo, Error> {
        match self.archive.info(tenant, id, clock::unix_seconds()).await {
            Ok(Some(info)) => Ok(state_info(info)),
            Ok(None) => self.rebuildable(tenant, id).await,
            Err(state::Error::Damaged { why, .. }) => match self.rebuildable(tenant, id).await {
                Err(Error::StateNotFound(_)) => Err(Error::StateDamaged(id.clone(), why)),
                told => told,
            },
            Err(e) => Err(e.into()),
        }
    }

    /// A state that is not stored, but can be rebuilt.
    async fn rebuildable(&self, tenant: &Tenant, id: &StateId) -> Result<StateInfo, Error> {
        let found = self.record_of(tenant, id).await?;
        let (Origin { session, .. }, turn) = found.ok_or_else(|| Error::StateNotFound(id.clone()))?;
        let (entry, record) = (&turn.entry, &turn.entry.record);
        Ok(StateInfo {
            id: id.clone(),
            model: record.model.clone(),
            parent: record.parent.clone(),
            session_id: Some(session),
            turn: entry.depth,
            tokens: record.tokens,
            bytes: record.bytes,
            created: record.created,
            expires_at: record.expires_at,
            metadata: entry.metadata.clone(),
        })
    }

    pub async fn delete_state(&self, tenant: &Tenant, id: &StateId) -> Result<(), Error> {
        let info = self.archive.info(tenant, id, 0).await;
        let free = matches!(&info, Ok(Some(info)) if info.head.session.is_none());
        let known = !matches!(&info, Ok(None)) || self.record_of(tenant, id).await?.is_some();
        if !known {
            return Err(Error::StateNotFound(id.clone()));
        }
        if !free {
            // Its turn is still there, and would bring it back.
            self.archive.note_deleted(tenant, id).await?;
        }
        self.archive.remove(tenant, id).await?;
        self.archive.forget_evicted(tenant, id).await?;
        if let (Some(prefix), Ok(Some(info))) = (&self.prefix, &info) {
            let mut forgotten = Forgotten::default();
            forgotten.state(&info.head.fingerprint, id);
            prefix.forget(tenant, forgotten);
        }
        self.policy.quotas.count_again(tenant).await;
        if let Ok(Some(info)) = info
            && let Some(parent) = info.head.parent.filter(|_| free)
            && let Err(error) = self.needs_less(tenant, &parent).await
        {
            // The sweep comes by again.
            tracing::warn!(%error, "what a deleted session left could not be looked at");
        }
        Ok(())
    }

    /// A state that was made from `parent` is gone: it may have been the last to need what a deleted session left.
    async fn needs_less(&self, tenant: &Tenant, parent: &StateId) -> Result<(), state::Error> {
        if let Some(origin) = self.archive.origin_of(tenant, parent).await? {
            self.archive.reclaim(tenant, &origin.session, clock::unix_seconds()).await?;
        }
        Ok(())
    }

    /// The tenant's sessions, by name.
    pub async fn sessions(&self, tenant: &Tenant, page: Page) -> Result<Listing<SessionInfo>, Error> {
        let after = page.after.map(|id| after(SessionId::parse(id))).transpose()?;
        let listed = self.archive.sessions(tenant, after.as_ref(), page.limit).await?;
        let has_more = listed.has_more;
        let data = listed.data.into_iter().filter_map(|(id, entry)| session_info(id, entry)).collect();
        Ok(Listing { data, has_more })
    }

    /// A session, or that of a conversation, by its name.
    pub async fn session(&self, tenant: &Tenant, name: &SessionId) -> Result<SessionInfo, Error> {
        let id = self.current(tenant, name).await?;
        let head = self.archive.head(tenant, &id).await?.live;
        head.and_then(|entry| session_info(id, entry)).ok_or_else(|| Error::SessionNotFound(name.clone()))
    }

    /// A session's turns, oldest first; `page.after` is the state id of one of them, or [`Turned::lost_id`] of a lost one.
    pub async fn turns(&self, tenant: &Tenant, name: &SessionId, page: Page) -> Result<Listing<Turned>, Error> {
        let not_found = || Error::SessionNotFound(name.clone());
        let id = &self.current(tenant, name).await?;
        let after = match page.after {
            None => 0,
            Some(last) => match last.strip_prefix(LOST).and_then(|number| number.parse().ok()) {
                Some(number) => number,
                None => {
                    let state = after(StateId::parse(last))?;
                    let head = self.archive.head(tenant, id).await?.live.ok_or_else(not_found)?;
                    let turn = self.archive.turn(tenant, id, &head, &At::State(state.clone())).await?;
                    turn.ok_or(Error::StateNotFound(state))?.entry.depth
                }
            },
        };
        let turns = self.archive.numbered_turns(tenant, id, after, page.limit).await?.ok_or_else(not_found)?;
        let turned = |(number, entry): (u64, Option<Entry>)| {
            entry.and_then(turn_info).map_or(Turned::Lost(number), |turn| Turned::Whole(Box::new(turn)))
        };
        Ok(listing(turns, turned))
    }

    /// Ends a session at once and removes its states, but for those other sessions have. Not while it runs a turn, and not in
    /// a conversation's place.
    pub async fn delete_session(
        &self,
        tenant: &Tenant,
        id: &SessionId,
        if_match: Option<&StateId>,
    ) -> Result<(), Error> {
        self.check_free(tenant, id).await?;
        self.hub.supersede(tenant, id).await;
        let _turnstile = self.busy.enter(tenant, id, None)?;
        if if_match.is_some() {
            check_head(id, &self.archive.readable_head(tenant, id).await?, if_match)?;
        }
        let deleted = self.remove_session(tenant, id).await?;
        if deleted { Ok(()) } else { Err(Error::SessionNotFound(id.clone())) }
    }

    /// The same of a session that runs no turn. Says whether there was one.
    pub(super) async fn remove_session(&self, tenant: &Tenant, id: &SessionId) -> Result<bool, Error> {
        let forgotten = self.read_of(tenant, id).await?;
        let now = clock::unix_seconds();
        let deleted = self.archive.bury(tenant, id, now).await?;
        match self.archive.reclaim(tenant, id, now).await {
            Ok(_) => {}
            // It is deleted; the sweep removes what is left.
            Err(error) if deleted => {
                tracing::warn!(session = %id, %error, "what a deleted session left is still there")
            }
            Err(error) => return Err(error.into()),
        }
        self.policy.quotas.count_again(tenant).await;
        if let Some(prefix) = &self.prefix {
            prefix.forget(tenant, forgotten);
        }
        Ok(deleted)
    }
}

impl Sessions {
    /// What the prefix cache may have of a session's turns, taken back or not. Nothing where there is no such cache.
    async fn read_of(&self, tenant: &Tenant, id: &SessionId) -> Result<Forgotten, Error> {
        let mut forgotten = Forgotten::default();
        if self.prefix.is_some() {
            for entry in self.archive.records(tenant, id).await? {
                forgotten.turn(&entry);
            }
        }
        Ok(forgotten)
    }
}

fn after<T>(id: Result<T, crate::types::IdError>) -> Result<T, Error> {
    id.map_err(|e| Error::Invalid { param: "after", code: None, message: e.to_string() })
}

fn listing<A, B>(listed: Listed<A>, convert: impl Fn(A) -> B) -> Listing<B> {
    Listing { data: listed.data.into_iter().map(convert).collect(), has_more: listed.has_more }
}

fn state_info(Info { head, tokens, bytes }: Info) -> StateInfo {
    StateInfo {
        id: head.id,
        model: head.model,
        parent: head.parent,
        session_id: head.session,
        turn: head.turn,
        tokens,
        bytes,
        created: head.created,
        expires_at: head.expires_at,
        metadata: head.metadata,
    }
}

fn session_info(id: SessionId, entry: Entry) -> Option<SessionInfo> {
    Some(SessionInfo {
        id,
        turn: entry.depth,
        model: entry.record.model,
        head: entry.record.state?,
        tokens: entry.record.tokens,
        bytes: entry.record.bytes,
        created: entry.began,
        updated: entry.made,
        metadata: entry.metadata,
    })
}

fn turn_info(entry: Entry) -> Option<TurnInfo> {
    let record = entry.record;
    let mut messages = record.messages;
    let mut text = record.text;
    match &mut text {
        Some(text) => text.push_str(&record.answer),
        None => messages.push(Message { role: Role::Assistant, content: record.answer, name: None }),
    }
    Some(TurnInfo {
        state: record.state?,
        parent: record.parent,
        turn: entry.depth,
        response_id: record.response_id,
        messages,
        text,
        token_ids: record.ids,
        takes_back: record.takes_back,
        usage: record.usage,
        created: record.created,
    })
}
