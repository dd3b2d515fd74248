//! Which record made a state whose file is gone without a trace: not evicted, not deleted by a client, but lost.
//!
//! Nothing is stored of a turn but its snapshot and its record, and the id of a state does not tell which session is its own.
//! So the tenant's sessions are looked through, once: what their records made is then known in memory, and the next look reads
//! the records that came since. When a state was made its id does tell, so there is one more look only for an id that is not much
//! older than the last one, and looks of one tenant take a tenth of the time at most, however many unknown ids are asked for.
//! What a record is known by here is only where to look: it is read before it is believed.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures::stream::{self, StreamExt, TryStreamExt};

use super::archive::AT_ONCE;
use super::lineage::skip_damaged;
use super::{Archive, Error, Origin};
use crate::telemetry::clock;
use crate::types::{SessionId, StateId, Tenant};

/// How many sessions are looked at.
const MOST: usize = 10_000;

/// How many records of a tenant are known: sixteen bytes each.
const MOST_RECORDS: usize = 1 << 19;

/// Of how many tenants.
const MOST_TENANTS: usize = 8;

/// How many names of sessions are listed in one go: every listing goes through the whole folder.
const PAGE: usize = 2048;

/// Milliseconds from when a state gets its id to when its record can be seen, at most; clocks of servers that share a store
/// may differ by some of them.
const LATE_MS: u64 = 600_000;

/// A look may follow another after so many times as long as that took.
const REST: u32 = 9;

/// What is known of the tenants' records.
#[derive(Default)]
pub(super) struct Known(Mutex<HashMap<Tenant, Arc<tokio::sync::Mutex<Records>>>>);

impl Known {
    /// Those of one tenant. Bounded: when there are too many, all are forgotten, which costs a look each.
    fn of(&self, tenant: &Tenant) -> Arc<tokio::sync::Mutex<Records>> {
        let mut all = self.lock();
        if all.len() >= MOST_TENANTS && !all.contains_key(tenant) {
            all.clear();
        }
        all.entry(tenant.clone()).or_default().clone()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Tenant, Arc<tokio::sync::Mutex<Records>>>> {
        // Every change is one call on the map.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The records of a tenant, as far as they were looked at.
#[derive(Default)]
struct Records {
    /// Of each session, by their numbers: a part of the id of the state that each made.
    sessions: BTreeMap<SessionId, Vec<(u64, u64)>>,
    /// When the last look began.
    looked: Option<Look>,
}

#[derive(Clone, Copy)]
struct Look {
    /// On everybody's clock, in milliseconds.
    at: u64,
    began: Instant,
    ended: Instant,
}

impl Records {
    /// Records that may have made a state.
    fn find(&self, id: &StateId) -> Vec<(SessionId, u64)> {
        let wanted = part(id);
        let mut found = Vec::new();
        for (session, records) in &self.sessions {
            let ours = records.iter().filter(|(_, made)| *made == wanted);
            found.extend(ours.map(|(number, _)| (session.clone(), *number)));
        }
        found
    }

    /// Whether the last look would have shown the record of a state, were there one; it was asked for at `asked`.
    fn tell(&self, id: &StateId, asked: Instant) -> bool {
        self.looked.is_some_and(|look| look.began >= asked || id.millis().saturating_add(LATE_MS) < look.at)
    }
}

/// Half of the random digits of an id.
fn part(id: &StateId) -> u64 {
    u64::from_str_radix(&id.as_str()[15..31], 16).expect("sixteen hexadecimal digits")
}

impl Archive {
    /// The record of a session that names a state, unless a client deleted either.
    pub async fn search(&self, tenant: &Tenant, id: &StateId, now: u64) -> Result<Option<Origin>, Error> {
        // What nobody can have made yet is not looked for.
        if id.millis() > now.saturating_mul(1000).saturating_add(LATE_MS) || self.is_deleted(tenant, id).await? {
            return Ok(None);
        }
        let (known, asked) = (self.known.of(tenant), clock::now());
        let mut records = known.lock().await;
        loop {
            for (session, number) in records.find(id) {
                if let Some(origin) = self.made_by(tenant, session, number, id, now).await? {
                    return Ok(Some(origin));
                }
            }
            if records.tell(id, asked) {
                return Ok(None);
            }
            if let Some(look) = records.looked {
                let rest = (look.ended - look.began) * REST;
                tokio::time::sleep_until((look.ended + rest).into()).await;
            }
            self.look(tenant, &mut records).await?;
        }
    }

    /// Reads the records that came since the last look.
    async fn look(&self, tenant: &Tenant, records: &mut Records) -> Result<(), Error> {
        let (at, began) = (clock::unix_millis(), clock::now());
        let folder = format!("t/{tenant}/sessions");
        let mut room = MOST_RECORDS.saturating_sub(records.sessions.values().map(Vec::len).sum());
        let (mut after, mut seen) = (None, 0);
        loop {
            let names = self.store.children(&folder, after.as_deref(), PAGE.min(MOST - seen)).await?;
            let Some(last) = names.last() else { break };
            (after, seen) = (Some(last.clone()), seen + names.len());
            let sessions = names.into_iter().filter_map(|name| SessionId::parse(name).ok()).map(|session| {
                let last =
                    records.sessions.get(&session).and_then(|known| known.last()).map_or(0, |(number, _)| *number);
                (session, last)
            });
            let sessions: Vec<_> = sessions.collect();
            let looks = sessions.into_iter().map(|(session, last)| async move {
                let numbers = self.numbers(tenant, &session, last).await?;
                Ok::<_, Error>((session, numbers))
            });
            let new: Vec<(SessionId, Vec<u64>)> = stream::iter(looks).buffer_unordered(AT_ONCE).try_collect().await?;
            let new = new
                .into_iter()
                .flat_map(|(session, numbers)| numbers.into_iter().map(move |number| (session.clone(), number)));
            let looks = new.take(room).map(|(session, number)| async move {
                let made = self.made(tenant, &session, number).await?;
                Ok::<_, Error>((session, number, made))
            });
            let mut looks = stream::iter(looks).buffered(AT_ONCE);
            while let Some((session, number, made)) = looks.try_next().await? {
                // One that made nothing is known too, so as not to be read again.
                records.sessions.entry(session).or_default().push((number, made.map_or(0, |id| part(&id))));
                room -= 1;
            }
            if seen >= MOST || room == 0 {
                tracing::warn!(%tenant, sessions = seen, "lost states are looked for in no more sessions than these");
                break;
            }
        }
        records.looked = Some(Look { at, began, ended: clock::now() });
        Ok(())
    }

    /// The state that a record made. A copy's original is in its own place.
    async fn made(&self, tenant: &Tenant, session: &SessionId, number: u64) -> Result<Option<StateId>, Error> {
        let entry = skip_damaged(self.entry(tenant, session, number).await)?.filter(|entry| entry.back.is_none());
        Ok(entry.and_then(|entry| entry.record.state))
    }

    /// This record of a session, if it made the state, and if the session lives or a fork needs the record.
    async fn made_by(
        &self,
        tenant: &Tenant,
        session: SessionId,
        number: u64,
        id: &StateId,
        now: u64,
    ) -> Result<Option<Origin>, Error> {
        let entry = skip_damaged(self.entry(tenant, &session, number).await)?.filter(|entry| entry.back.is_none());
        let Some(entry) = entry.filter(|entry| entry.record.state.as_ref() == Some(id)) else { return Ok(None) };
        let head = self.readable_head(tenant, &session).await?.live;
        let lives = head.is_some_and(|head| head.first <= number)
            || self.forks(tenant, &session, now).await?.iter().any(|fork| fork.record >= Some(number));
        Ok(lives.then_some(Origin { session, record: number, turn: entry.depth }))
    }
}
