//! Sessions in the archive: numbered turn records, of which the highest is the head.
//!
//! Putting record n + 1 is the commit of a turn. Of two turns that saw the same head only one can do it, on whatever
//! machines they run. A record without a state, a tombstone, ends the session at once for everybody; a session of
//! the same name that begins later goes on counting above it.

use std::collections::{BTreeSet, HashSet};

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};

use super::archive::{AT_ONCE, damaged};
use super::{Archive, Damaged, Entry, Error, Listed, Put, record};
use crate::types::{SessionId, StateId, Tenant, TurnRecord, TurnUsage};

/// Record numbers are written with this many digits, so that names sort as numbers do.
const DIGITS: usize = 12;

/// Where a session stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// The highest number in use; 0 if there is no record at all.
    pub last: u64,
    /// The record of that number, unless the session never began or is deleted.
    pub live: Option<Entry>,
}

impl Head {
    /// The number the next record gets.
    pub fn next(&self) -> u64 {
        self.last + 1
    }
}

/// What became of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// The turn is part of the session, durably, with the number that was next.
    Committed,
    /// Another turn, or a deletion, came first.
    Taken,
}

impl Archive {
    /// Where a session stands now.
    ///
    /// # Errors
    /// [`Error::Damaged`] if its highest record cannot be read.
    pub async fn head(&self, tenant: &Tenant, session: &SessionId) -> Result<Head, Error> {
        let mut vanished = None;
        loop {
            let Some(last) = self.numbers(tenant, session, 0).await?.pop() else {
                return Ok(Head { last: 0, live: None });
            };
            match self.entry(tenant, session, last).await? {
                Some(entry) => return Ok(Head { last, live: Some(entry).filter(|e| e.record.state.is_some()) }),
                // A deletion may come, and sweep this record, between the two calls. Then there is a higher one.
                None if vanished != Some(last) => vanished = Some(last),
                None => {
                    let why = Damaged("it is listed but cannot be read".into());
                    return Err(damaged(&turn_key(tenant, session, last), why));
                }
            }
        }
    }

    /// Commits a turn on top of the head it began from. The state it names must already be durable.
    ///
    /// # Errors
    /// [`Error::Unfit`] for a record without a state. After [`Error::Store`] the turn may or may not be committed:
    /// [`Archive::head`] tells.
    pub async fn commit(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        on: &Head,
        record: &TurnRecord,
    ) -> Result<Commit, Error> {
        let turn = on.next();
        let (first, began) = on.live.as_ref().map_or((turn, record.created), |e| (e.first, e.began));
        let entry = Entry { turn, first, began, record: record.clone() };
        if record.state.is_none() {
            let why = "a turn has a state; a record without one is a deletion".into();
            return Err(Error::Unfit { key: turn_key(tenant, session, turn), why });
        }
        match self.put(tenant, session, &entry).await? {
            Put::Created => Ok(Commit::Committed),
            Put::Exists => Ok(Commit::Taken),
        }
    }

    /// The turns of a session after turn `after` (0 = from its first), or `None` if there is no such session.
    ///
    /// # Errors
    /// [`Error::Damaged`] if one of them cannot be read.
    pub async fn turns(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        after: u64,
        limit: usize,
    ) -> Result<Option<Listed<Entry>>, Error> {
        let Some(head) = self.head(tenant, session).await?.live else { return Ok(None) };
        let after = after.max(head.first - 1);
        let turns = self.numbers(tenant, session, after).await?.into_iter().take(limit.saturating_add(1));
        let entries = stream::iter(turns).map(|turn| self.entry(tenant, session, turn)).buffered(AT_ONCE);
        let entries: Vec<Option<Entry>> = entries.try_collect().await?;
        Ok(Some(Listed::cut(entries.into_iter().flatten().collect(), limit)))
    }

    /// The sessions of a tenant after `after`, by name, each with its head. A damaged one is left out and reported in
    /// the log.
    pub async fn sessions(
        &self,
        tenant: &Tenant,
        after: Option<&SessionId>,
        limit: usize,
    ) -> Result<Listed<(SessionId, Entry)>, Error> {
        let folder = format!("t/{tenant}/sessions");
        let mut after = after.map(SessionId::to_string);
        let mut found = Vec::new();
        while found.len() <= limit {
            let names = self.store.children(&folder, after.as_deref(), limit.saturating_add(1)).await?;
            let Some(last) = names.last() else { break };
            after = Some(last.clone());
            let ids = names.into_iter().filter_map(|name| SessionId::parse(name).ok());
            let heads = stream::iter(ids).map(|id| async move {
                match self.head(tenant, &id).await {
                    Ok(head) => Ok(head.live.map(|entry| (id, entry))),
                    Err(Error::Damaged { key, why }) => {
                        tracing::warn!(key, why, "the head of a session is damaged");
                        Ok(None)
                    }
                    Err(e) => Err(e),
                }
            });
            let heads: Vec<Option<_>> = heads.buffered(AT_ONCE).try_collect().await?;
            found.extend(heads.into_iter().flatten());
        }
        Ok(Listed::cut(found, limit))
    }

    /// Deletes a session and what only it kept: [`Archive::bury`], then [`Archive::sweep`]. Says whether there was
    /// one. A call that failed may be repeated to finish the sweeping, though it then finds no session.
    pub async fn delete(&self, tenant: &Tenant, session: &SessionId, now: u64) -> Result<bool, Error> {
        let existed = self.bury(tenant, session, now).await?;
        self.sweep(tenant, session).await?;
        Ok(existed)
    }

    /// Ends a session: from when this returns, durably, it is not found, and a turn that is still running cannot be
    /// committed to it. Says whether there was one. Works on damaged sessions.
    pub async fn bury(&self, tenant: &Tenant, session: &SessionId, now: u64) -> Result<bool, Error> {
        loop {
            let Some(last) = self.numbers(tenant, session, 0).await?.pop() else { return Ok(false) };
            match self.entry(tenant, session, last).await {
                Ok(Some(entry)) if entry.record.state.is_none() => return Ok(false),
                Ok(_) | Err(Error::Damaged { .. }) => {}
                Err(e) => return Err(e),
            }
            let turn = last + 1;
            let tombstone = Entry { turn, first: turn, began: now, record: tombstone(now) };
            if self.put(tenant, session, &tombstone).await? == Put::Created {
                return Ok(true);
            }
            // A turn was committed meanwhile: delete that as well.
        }
    }

    /// Removes what the buried turns of a session left behind: the states they name, unless a turn of a living
    /// session (a fork) names them too, and their records. Tombstones stay: a turn that was running when its session
    /// was deleted must find its number taken. States that no session made are somebody else's and stay.
    ///
    /// Reads all records of the tenant's living sessions, if there is any state to remove.
    pub async fn sweep(&self, tenant: &Tenant, session: &SessionId) -> Result<(), Error> {
        let head = self.head(tenant, session).await?;
        let buried_to = head.live.map_or(head.last, |entry| entry.first - 1);
        let mut records = Vec::new();
        for turn in self.numbers(tenant, session, 0).await?.into_iter().take_while(|turn| *turn <= buried_to) {
            match self.entry(tenant, session, turn).await {
                Ok(Some(entry)) => records.extend(entry.record.state.map(|state| (turn, Some(state)))),
                Ok(None) => {}
                Err(Error::Damaged { key, why }) => {
                    tracing::warn!(key, why, "a damaged record of a deleted session is removed");
                    records.push((turn, None));
                }
                Err(e) => return Err(e),
            }
        }
        let named: BTreeSet<StateId> = records.iter().filter_map(|(_, state)| state.clone()).collect();
        let shared = if named.is_empty() { HashSet::new() } else { self.in_use(tenant).await? };
        // A record goes after its state: if this is interrupted, what is left still tells what to remove.
        for (turn, state) in records {
            if let Some(state) = state.filter(|state| !shared.contains(state)) {
                self.remove_turn_state(tenant, &state).await?;
            }
            self.store.delete(&turn_key(tenant, session, turn)).await?;
        }
        Ok(())
    }

    /// Removes a state if a session made it, or if it is damaged and so of no use to anybody.
    async fn remove_turn_state(&self, tenant: &Tenant, id: &StateId) -> Result<(), Error> {
        let made_by_session = match self.peek(tenant, id).await {
            Ok(info) => info.is_some_and(|info| info.head.session.is_some()),
            Err(Error::Damaged { .. }) => true,
            Err(e) => return Err(e),
        };
        if made_by_session {
            self.remove(tenant, id).await?;
        }
        Ok(())
    }

    /// The states that turns of living sessions name.
    async fn in_use(&self, tenant: &Tenant) -> Result<HashSet<StateId>, Error> {
        let mut states = HashSet::new();
        for (session, head) in self.sessions(tenant, None, usize::MAX).await?.data {
            for turn in self.numbers(tenant, &session, head.first - 1).await? {
                match self.entry(tenant, &session, turn).await {
                    Ok(entry) => states.extend(entry.and_then(|e| e.record.state)),
                    Err(Error::Damaged { key, why }) => tracing::warn!(key, why, "a turn record is damaged"),
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(states)
    }

    /// The numbers of a session's records after `after`, ascending.
    async fn numbers(&self, tenant: &Tenant, session: &SessionId, after: u64) -> Result<Vec<u64>, Error> {
        let after = format!("{after:0DIGITS$}");
        let names = self.store.children(&session_folder(tenant, session), Some(&after), usize::MAX).await?;
        let number = |name: &String| -> Option<u64> {
            let is_number = name.len() == DIGITS && name.bytes().all(|b| b.is_ascii_digit());
            is_number.then(|| name.parse().expect("twelve digits fit"))
        };
        Ok(names.iter().filter_map(number).collect())
    }

    async fn entry(&self, tenant: &Tenant, session: &SessionId, turn: u64) -> Result<Option<Entry>, Error> {
        let key = turn_key(tenant, session, turn);
        let Some(bytes) = self.store.get(&key).await? else { return Ok(None) };
        record::decode(&bytes, turn).map(Some).map_err(|e| damaged(&key, e))
    }

    async fn put(&self, tenant: &Tenant, session: &SessionId, entry: &Entry) -> Result<Put, Error> {
        let key = turn_key(tenant, session, entry.turn);
        if entry.turn >= 10u64.pow(DIGITS as u32) {
            return Err(Error::Unfit { key, why: format!("a turn number has at most {DIGITS} digits") });
        }
        self.store.put_if_absent(&key, Bytes::from(record::encode(entry))).await
    }
}

fn session_folder(tenant: &Tenant, session: &SessionId) -> String {
    format!("t/{tenant}/sessions/{session}")
}

fn turn_key(tenant: &Tenant, session: &SessionId, turn: u64) -> String {
    format!("{}/{turn:0DIGITS$}", session_folder(tenant, session))
}

fn tombstone(now: u64) -> TurnRecord {
    TurnRecord {
        state: None,
        parent: None,
        model: String::new(),
        fingerprint: String::new(),
        beginning: None,
        messages: Vec::new(),
        text: None,
        answer: String::new(),
        finish: None,
        takes_back: 0,
        ids: Vec::new(),
        answer_ids: 0,
        response_id: String::new(),
        seed: 0,
        usage: TurnUsage::default(),
        idempotency_key: None,
        tokens: 0,
        bytes: 0,
        created: now,
        expires_at: None,
    }
}
