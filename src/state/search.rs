//! Which record made a state whose file is gone without a trace: not evicted, not deleted by a client, but lost.
//!
//! Nothing is stored of a turn but its snapshot and its record, and the id of a state does not tell which session is its own.
//! So the tenant's sessions are looked through, a few at a time and no more than [`MOST`]: in each the records are in the order
//! of time, which the id does tell. This is for ids that are found in no other way, and for nothing else.

use futures::stream::{self, StreamExt, TryStreamExt};

use super::archive::AT_ONCE;
use super::lineage::skip_damaged;
use super::{Archive, Error, Origin};
use crate::types::{SessionId, StateId, Tenant};

/// How many sessions are looked at.
const MOST: usize = 10_000;

/// How many names of sessions are listed in one go: every listing goes through the whole folder.
const PAGE: usize = 2048;

/// Seconds by which the clocks of servers that share a store may differ.
const SKEW_S: u64 = 5;

impl Archive {
    /// The record of a session that names a state, unless a client deleted either.
    pub async fn search(&self, tenant: &Tenant, id: &StateId, now: u64) -> Result<Option<Origin>, Error> {
        if self.is_deleted(tenant, id).await? {
            return Ok(None);
        }
        let folder = format!("t/{tenant}/sessions");
        let (mut after, mut seen) = (None, 0);
        while seen < MOST {
            let names = self.store.children(&folder, after.as_deref(), PAGE.min(MOST - seen)).await?;
            let Some(last) = names.last() else { return Ok(None) };
            (after, seen) = (Some(last.clone()), seen + names.len());
            let sessions = names.into_iter().filter_map(|name| SessionId::parse(name).ok());
            let looks = sessions.map(|session| async move { self.record_of(tenant, session, id, now).await });
            let mut looks = stream::iter(looks).buffer_unordered(AT_ONCE);
            while let Some(found) = looks.try_next().await? {
                if found.is_some() {
                    return Ok(found);
                }
            }
        }
        tracing::warn!(%tenant, state = %id, sessions = seen, "a state was looked for in no more sessions than these");
        Ok(None)
    }

    /// The record of this session that made the state, if the session lives or a fork needs the record.
    async fn record_of(
        &self,
        tenant: &Tenant,
        session: SessionId,
        id: &StateId,
        now: u64,
    ) -> Result<Option<Origin>, Error> {
        let numbers = self.numbers(tenant, &session, 0).await?;
        let made = id.millis() / 1000;
        // The turn began before the state was there, and the next one after that.
        let from = self.made_from(tenant, (&session, &numbers), made.saturating_sub(SKEW_S)).await?;
        let to = self.made_from(tenant, (&session, &numbers), made + SKEW_S + 1).await?;
        for number in &numbers[from.saturating_sub(1).min(to)..to] {
            // A copy's original is in its own place.
            let entry = skip_damaged(self.entry(tenant, &session, *number).await)?.filter(|entry| entry.back.is_none());
            let Some(entry) = entry.filter(|entry| entry.record.state.as_ref() == Some(id)) else { continue };
            let head = self.readable_head(tenant, &session).await?.live;
            let lives = head.is_some_and(|head| head.first <= *number)
                || self.forks(tenant, &session, now).await?.iter().any(|fork| fork.record >= Some(*number));
            return Ok(lives.then_some(Origin { session, record: *number, turn: entry.depth }));
        }
        Ok(None)
    }

    /// The index of the first of these records, which are in the order of time, that was made at `time` or later.
    async fn made_from(
        &self,
        tenant: &Tenant,
        (session, numbers): (&SessionId, &[u64]),
        time: u64,
    ) -> Result<usize, Error> {
        let (mut low, mut high) = (0, numbers.len());
        while low < high {
            let middle = low.midpoint(high);
            match skip_damaged(self.entry(tenant, session, numbers[middle]).await)? {
                Some(entry) if entry.made >= time => high = middle,
                _ => low = middle + 1,
            }
        }
        Ok(low)
    }
}
