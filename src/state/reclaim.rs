//! Forks, and what is left of deleted sessions: whatever a fork needs stays, everything else goes.
//!
//! A fork is a record that goes back to one of another session; nothing is copied but that one turn. So a session's
//! records, and the states they name, may be needed when it is deleted. Before a fork is committed it leaves a mark with
//! the session it comes from ([`Archive::note_fork`]), then looks whether that still lives: whoever deletes writes the
//! tombstone first and looks for marks then. One of the two sees the other.

use std::collections::{BTreeSet, VecDeque};

use super::lineage::Turn;
use super::marks::Fork;
use super::sessions::turn_key;
use super::{Archive, Commit, Entry, Error};
use crate::types::{SessionId, StateId, Tenant};

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    pub states: u64,
    pub records: u64,
}

/// Which session is to begin where.
#[derive(Clone, Copy, Debug)]
pub struct Forking<'a> {
    pub from: &'a SessionId,
    /// Its head when `turn` was looked up.
    pub head: &'a Entry,
    pub turn: &'a Turn,
    pub to: &'a SessionId,
}

/// A record of a deleted session; `None` = it is damaged.
type Buried = (u64, Option<Entry>);

impl Archive {
    /// Begins a session at a turn of another. Takes the same time whatever is behind that turn. `Taken` = there is such a
    /// session already.
    ///
    /// # Errors
    /// [`Error::Gone`] when the other one was deleted meanwhile.
    pub async fn fork(&self, tenant: &Tenant, forking: Forking<'_>, now: u64) -> Result<Commit, Error> {
        let Forking { from, head, turn, to } = forking;
        let on = self.head(tenant, to).await?;
        let Some(state) = turn.entry.record.state.clone().filter(|_| on.live.is_none()) else {
            return Ok(Commit::Taken);
        };
        let mut entry = on.back(turn, now);
        // It is not a turn of this session that a client might ask for again.
        entry.record.idempotency_key = None;
        let place = &turn.place;
        let fork = Fork { record: Some(place.number), state, made: now };
        self.note_fork(tenant, &place.session, (to, entry.turn), &fork).await?;
        let now_there = self.head(tenant, from).await?.live;
        if now_there.is_none_or(|now_there| now_there.first != head.first) {
            self.forget_fork(tenant, &place.session, (to, entry.turn)).await?;
            return Err(Error::Gone { session: from.to_string() });
        }
        self.commit_entry(tenant, to, &entry).await
    }

    /// Deletes a session with what only it kept: [`Archive::bury`], then [`Archive::reclaim`]. Says whether there was
    /// one. A call that failed may be repeated to finish it, though it then finds no session.
    pub async fn delete(&self, tenant: &Tenant, session: &SessionId, now: u64) -> Result<bool, Error> {
        let existed = self.bury(tenant, session, now).await?;
        self.reclaim(tenant, session, now).await?;
        Ok(existed)
    }

    /// Removes what the buried turns of a session left behind and nobody needs: at once the states they name, and, when
    /// their deletion is longer ago than any turn takes, the records. States that no session made are somebody else's
    /// and stay. A tombstone stays as long as it is the session's last record: names may be taken again.
    pub async fn reclaim(&self, tenant: &Tenant, session: &SessionId, now: u64) -> Result<Reclaimed, Error> {
        let mut reclaimed = Reclaimed::default();
        let (mut seen, mut next) = (BTreeSet::new(), VecDeque::from([session.clone()]));
        // A fork that goes may have been the last to need what another deleted session left.
        while let Some(session) = next.pop_front() {
            if seen.insert(session.clone()) {
                next.extend(self.reclaim_one(tenant, &session, now, &mut reclaimed).await?);
            }
        }
        Ok(reclaimed)
    }

    async fn reclaim_one(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        now: u64,
        reclaimed: &mut Reclaimed,
    ) -> Result<Vec<SessionId>, Error> {
        let head = self.head(tenant, session).await?;
        let buried_to = head.live.as_ref().map_or(head.last, |entry| entry.first - 1);
        let buried = self.buried(tenant, session, buried_to).await?;
        if buried.iter().all(|(number, _)| *number == head.last) {
            return Ok(Vec::new());
        }
        let numbers: Vec<u64> = buried.iter().map(|(number, _)| *number).collect();
        let forks = self.forks(tenant, session, now).await?;
        let needed_to = forks.iter().filter_map(|fork| fork.record).max().unwrap_or(0);
        let mut needed: BTreeSet<StateId> = forks.into_iter().map(|fork| fork.state).collect();
        let named = |entry: &Option<Entry>| entry.as_ref().and_then(|entry| entry.record.state.clone());
        needed.extend(buried.iter().filter(|(number, _)| *number <= needed_to).filter_map(|(_, entry)| named(entry)));

        let (mut sources, mut records) = (Vec::new(), Vec::new());
        // Whether what stands below the last tombstone that was seen is old, and the tombstone itself, to go with it.
        let (mut old, mut tombstone) = (false, None);
        for (number, entry) in buried.into_iter().rev() {
            let state = named(&entry);
            if let Some(end) = entry.as_ref().filter(|_| state.is_none()) {
                records.extend(tombstone.take());
                old = end.made.saturating_add(self.grace_s) <= now;
                tombstone = Some(number).filter(|_| old && number != head.last);
                continue;
            }
            if number <= needed_to {
                tombstone = None;
                continue;
            }
            if let Some(state) = state.filter(|state| !needed.contains(state)) {
                reclaimed.states += u64::from(self.remove_made_by(tenant, session, &state).await?);
            }
            if let Some(back) = entry.and_then(|entry| entry.back).filter(|back| back.to.session != *session) {
                self.forget_fork(tenant, &back.to.session, (session, number)).await?;
                sources.push(back.to.session);
            }
            if old {
                records.push(number);
            }
        }
        records.extend(tombstone);
        // A record goes after its state, and the lowest goes first: if this is interrupted, what is left still tells what
        // to remove, and whether its deletion is old.
        records.sort_unstable();
        if let Some(highest) = records.last()
            && numbers.iter().any(|number| number < highest && records.binary_search(number).is_err())
        {
            self.note_gap(tenant, session).await?;
        }
        for number in records {
            self.store.delete(&turn_key(tenant, session, number)).await?;
            reclaimed.records += 1;
        }
        if old {
            self.forget_keys(tenant, session, buried_to).await?;
        }
        Ok(sources)
    }

    async fn buried(&self, tenant: &Tenant, session: &SessionId, to: u64) -> Result<Vec<Buried>, Error> {
        let mut buried = Vec::new();
        for number in self.numbers(tenant, session, 0).await?.into_iter().take_while(|number| *number <= to) {
            match self.entry(tenant, session, number).await {
                Ok(Some(entry)) => buried.push((number, Some(entry))),
                Ok(None) => {}
                Err(Error::Damaged { key, why }) => {
                    tracing::warn!(key, why, "a damaged record of a deleted session is removed");
                    buried.push((number, None));
                }
                Err(e) => return Err(e),
            }
        }
        Ok(buried)
    }

    /// Removes a state if that session made it, or if it is damaged and so of no use to anybody.
    async fn remove_made_by(&self, tenant: &Tenant, session: &SessionId, id: &StateId) -> Result<bool, Error> {
        let ours = match self.peek(tenant, id).await {
            Ok(Some(info)) => info.head.session.as_ref() == Some(session),
            Ok(None) => false,
            Err(Error::Damaged { .. }) => true,
            Err(e) => return Err(e),
        };
        let evicted = self.evicted(tenant, id).await?.is_some_and(|origin| origin.session == *session);
        if evicted {
            self.forget_evicted(tenant, id).await?;
        }
        if self.is_deleted(tenant, id).await? {
            self.forget_deleted(tenant, id).await?;
        }
        Ok(ours && self.remove(tenant, id).await?)
    }
}
