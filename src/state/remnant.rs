//! What crashes and time leave in a store, and how to tell it from what somebody needs.

use super::archive::state_key;
use super::{Archive, Error};
use crate::types::{StateId, Tenant};

/// A state that nobody can ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remnant {
    Expired,
    /// The record that should name it does not: its turn was cut off, or lost a race.
    Orphan,
    /// It is not what was written.
    Damaged(String),
}

impl Archive {
    /// Removes a state if it is a [`Remnant`], and says what it was. A damaged one is not removed but set aside, to
    /// `t/{tenant}/aside/{id}`.
    pub async fn remnant(&self, tenant: &Tenant, id: &StateId, now: u64) -> Result<Option<Remnant>, Error> {
        let info = match self.peek(tenant, id).await {
            Ok(Some(info)) => info,
            Ok(None) => return Ok(None),
            // One of a later version is as good as when it was written.
            Err(Error::Damaged { why, .. }) if why.contains("format version") => return Ok(None),
            Err(Error::Damaged { why, .. }) => {
                self.set_aside(tenant, id).await?;
                return Ok(Some(Remnant::Damaged(why)));
            }
            Err(e) => return Err(e),
        };
        let remnant = if info.head.expired(now) {
            Remnant::Expired
        } else if (id.millis() / 1000).saturating_add(self.grace_s) <= now
            && self.is_orphan(tenant, id, &info, now).await?
        {
            Remnant::Orphan
        } else {
            return Ok(None);
        };
        self.remove(tenant, id).await?;
        Ok(Some(remnant))
    }

    async fn is_orphan(&self, tenant: &Tenant, id: &StateId, info: &super::Info, now: u64) -> Result<bool, Error> {
        let Some((session, record)) = info.head.session.as_ref().zip(info.head.record) else { return Ok(false) };
        match self.entry(tenant, session, record).await {
            Ok(Some(entry)) if entry.record.state.as_ref() == Some(id) => return Ok(false),
            Ok(_) => {}
            Err(Error::Damaged { .. }) => return Ok(false),
            Err(e) => return Err(e),
        }
        // The record of a deleted session goes before a state that is another's beginning.
        let needed = self.forks(tenant, session, now).await?;
        Ok(needed.iter().all(|fork| fork.state != *id))
    }

    async fn set_aside(&self, tenant: &Tenant, id: &StateId) -> Result<(), Error> {
        let key = state_key(tenant, id);
        if let Some(bytes) = self.store.get(&key).await? {
            self.store.put_if_absent(&format!("t/{tenant}/aside/{id}"), bytes).await?;
            self.store.delete(&key).await?;
        }
        Ok(())
    }

    /// Removes what writes that were cut off long ago left in a folder, and says how much.
    pub async fn tidy(&self, folder: &str, now: u64) -> Result<u64, Error> {
        self.store.tidy(folder, now.saturating_sub(self.grace_s)).await
    }

    /// Names in a folder of the store, in order: at most `limit` of those after `after`.
    pub async fn names(&self, folder: &str, after: Option<&str>, limit: usize) -> Result<Vec<String>, Error> {
        self.store.children(folder, after, limit).await
    }
}
