//! Sessions in the archive: numbered records, of which the highest is the head.
//!
//! Putting record n + 1 is the commit of a turn, a fork or a rewind. Of two that saw the same head only one can do it, on
//! whatever machines they run. A record without a state, a tombstone, ends the session at once for everybody; a session
//! of the same name that begins later goes on counting above it.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};

use super::archive::{AT_ONCE, damaged};
use super::gallop::{Gallop, Last};
use super::lineage::{Turn, skip_damaged};
use super::{Archive, Back, Damaged, Entry, Error, Listed, Put, record};
use crate::types::{SessionId, StateId, Tenant, TurnRecord};

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

    /// How many turns the session has.
    pub fn depth(&self) -> u64 {
        self.live.as_ref().map_or(0, |entry| entry.depth)
    }

    /// The state that the next turn begins from.
    pub fn state(&self) -> Option<&StateId> {
        self.live.as_ref().and_then(|entry| entry.record.state.as_ref())
    }

    /// The entry that adds a turn to the session, or begins it.
    pub fn turn(&self, record: TurnRecord) -> Entry {
        let turn = self.next();
        match &self.live {
            Some(head) => Entry {
                turn,
                depth: head.depth + 1,
                back: None,
                made: record.created,
                metadata: head.metadata.clone(),
                record,
                ..*head
            },
            None => Entry {
                turn,
                first: turn,
                began: record.created,
                depth: 1,
                run: turn,
                back: None,
                made: record.created,
                metadata: BTreeMap::new(),
                record,
            },
        }
    }

    /// The entry that goes back to `turn`, of this session or, to begin it, of another.
    pub fn back(&self, turn: &Turn, now: u64) -> Entry {
        let number = self.next();
        let (first, began) = self.live.as_ref().map_or((number, now), |head| (head.first, head.began));
        let metadata = self.live.as_ref().unwrap_or(&turn.entry).metadata.clone();
        let back = Some(Back { to: turn.place.clone(), before: turn.before.clone() });
        let (depth, record) = (turn.entry.depth, turn.entry.record.clone());
        Entry { turn: number, first, began, depth, run: number, back, made: now, metadata, record }
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
    /// Where a session stands now. Takes the same time however many turns it has, once this process has seen it; before, as
    /// many questions as the logarithm of their number.
    ///
    /// # Errors
    /// [`Error::Damaged`] if its highest record cannot be read.
    pub async fn head(&self, tenant: &Tenant, session: &SessionId) -> Result<Head, Error> {
        let Some((last, entry)) = self.highest(tenant, session).await? else {
            return Ok(Head { last: 0, live: None });
        };
        Ok(Head { last, live: Some(entry?).filter(|e| e.record.state.is_some()) })
    }

    /// The highest record in use, damaged or not, and its number.
    async fn highest(
        &self,
        tenant: &Tenant,
        session: &SessionId,
    ) -> Result<Option<(u64, Result<Entry, Error>)>, Error> {
        let mut vanished = None;
        loop {
            let Some(last) = self.last(tenant, session).await? else { return Ok(None) };
            match self.entry(tenant, session, last).await {
                Ok(Some(entry)) => {
                    self.hints.note(tenant, session, last);
                    return Ok(Some((last, Ok(entry))));
                }
                // A deletion may come, and sweep this record, between the two calls. Then there is a higher one.
                Ok(None) if vanished != Some(last) => {
                    vanished = Some(last);
                    self.hints.forget(tenant, session);
                }
                Ok(None) => {
                    let why = Damaged("it is listed but cannot be read".into());
                    return Ok(Some((last, Err(damaged(&turn_key(tenant, session, last), why)))));
                }
                Err(why @ Error::Damaged { .. }) => return Ok(Some((last, Err(why)))),
                Err(e) => return Err(e),
            }
        }
    }

    /// The highest number in use: from a few single ones, or else from a listing.
    async fn last(&self, tenant: &Tenant, session: &SessionId) -> Result<Option<u64>, Error> {
        let hint = self.hints.get(tenant, session);
        if let Some(last) = self.last_in_run(tenant, session, hint).await? {
            return Ok(Some(last));
        }
        Ok(self.numbers(tenant, session, hint.unwrap_or(0)).await?.pop().or(hint))
    }

    /// The same where all numbers from the first on, or from the hinted one, are in use up to it; otherwise `None`.
    async fn last_in_run(&self, tenant: &Tenant, session: &SessionId, hint: Option<u64>) -> Result<Option<u64>, Error> {
        let next = hint.unwrap_or(0) + 1;
        let mut last = match self.in_use(tenant, session, &[next]).await?[..] {
            // As good as always nobody else has added to it. Of a name that is new a listing tells as much as many questions.
            [false] => Some(hint.map_or(Last::Unclear, Last::Is)),
            _ => None,
        };
        let mut search = Gallop::above(next);
        while last.is_none() {
            let asked = search.asks();
            last = search.hear(&asked, &self.in_use(tenant, session, &asked).await?);
        }
        match last {
            // In this order: a gap is noted before there is one.
            Some(Last::Is(last)) if last > 0 && !self.has_gap(tenant, session).await? => Ok(Some(last)),
            _ => Ok(None),
        }
    }

    /// Whether each of these numbers has a record.
    async fn in_use(&self, tenant: &Tenant, session: &SessionId, numbers: &[u64]) -> Result<Vec<bool>, Error> {
        let keys: Vec<String> = numbers.iter().map(|number| turn_key(tenant, session, *number)).collect();
        let starts = stream::iter(keys).map(|key| async move { self.store.get_start(&key, 0).await });
        starts.buffered(AT_ONCE).map_ok(|start| start.is_some()).try_collect().await
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
        self.commit_entry(tenant, session, &on.turn(record.clone())).await
    }

    /// Commits an entry that a [`Head`] made.
    ///
    /// # Errors
    /// As [`Archive::commit`].
    pub async fn commit_entry(&self, tenant: &Tenant, session: &SessionId, entry: &Entry) -> Result<Commit, Error> {
        if entry.record.state.is_none() {
            let why = "a turn has a state; a record without one is a deletion".into();
            return Err(Error::Unfit { key: turn_key(tenant, session, entry.turn), why });
        }
        match self.put(tenant, session, entry).await? {
            Put::Created => Ok(Commit::Committed),
            Put::Exists => Ok(Commit::Taken),
        }
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

    /// Ends a session: from when this returns, durably, it is not found, and a turn that is still running cannot be
    /// committed to it. Says whether there was one. Works on damaged sessions.
    pub async fn bury(&self, tenant: &Tenant, session: &SessionId, now: u64) -> Result<bool, Error> {
        loop {
            let Some((last, entry)) = self.highest(tenant, session).await? else { return Ok(false) };
            if entry.is_ok_and(|entry| entry.record.state.is_none()) {
                return Ok(false);
            }
            let tombstone = Head { last, live: None }.turn(TurnRecord { created: now, ..TurnRecord::default() });
            if self.put(tenant, session, &tombstone).await? == Put::Created {
                return Ok(true);
            }
            // A turn was committed meanwhile: delete that as well.
        }
    }

    /// The records of a session since it began, those that were taken back too, but for damaged ones.
    pub async fn records(&self, tenant: &Tenant, session: &SessionId) -> Result<Vec<Entry>, Error> {
        let Some(head) = self.readable_head(tenant, session).await?.live else { return Ok(Vec::new()) };
        let numbers = self.numbers(tenant, session, head.first - 1).await?;
        let entries =
            numbers.into_iter().map(|number| async move { skip_damaged(self.entry(tenant, session, number).await) });
        stream::iter(entries).buffered(AT_ONCE).try_filter_map(async |entry| Ok(entry)).try_collect().await
    }

    /// The numbers of a session's records after `after`, ascending.
    pub(super) async fn numbers(&self, tenant: &Tenant, session: &SessionId, after: u64) -> Result<Vec<u64>, Error> {
        let after = format!("{after:0DIGITS$}");
        let names = self.store.children(&session_folder(tenant, session), Some(&after), usize::MAX).await?;
        let number = |name: &String| -> Option<u64> {
            let is_number = name.len() == DIGITS && name.bytes().all(|b| b.is_ascii_digit());
            is_number.then(|| name.parse().expect("twelve digits fit"))
        };
        Ok(names.iter().filter_map(number).collect())
    }

    pub(super) async fn entry(&self, tenant: &Tenant, session: &SessionId, turn: u64) -> Result<Option<Entry>, Error> {
        let key = turn_key(tenant, session, turn);
        let Some(bytes) = self.store.get(&key).await? else { return Ok(None) };
        record::decode(&key, &bytes, turn).map(Some).map_err(|e| damaged(&key, e))
    }

    async fn put(&self, tenant: &Tenant, session: &SessionId, entry: &Entry) -> Result<Put, Error> {
        let key = turn_key(tenant, session, entry.turn);
        if entry.turn >= 10u64.pow(DIGITS as u32) {
            return Err(Error::Unfit { key, why: format!("a turn number has at most {DIGITS} digits") });
        }
        let put = self.store.put_if_absent(&key, Bytes::from(record::encode(&key, entry))).await?;
        self.hints.note(tenant, session, entry.turn);
        Ok(put)
    }
}

pub(super) fn session_folder(tenant: &Tenant, session: &SessionId) -> String {
    format!("t/{tenant}/sessions/{session}")
}

pub(super) fn turn_key(tenant: &Tenant, session: &SessionId, turn: u64) -> String {
    format!("{}/{turn:0DIGITS$}", session_folder(tenant, session))
}
