//! Where the heads of sessions were last seen, so that a head is found without looking for it among all records.
//!
//! A hint is only where to begin to look: the head is the hinted record if that is there, the next is not, and nothing was
//! ever taken out of the session above a record that stays. The last is what [`Archive::note_gap`] says, before anything is
//! taken out; so of a hint that is old, and whose session was deleted and reclaimed by another server since, nothing wrong follows.
//! Without a hint, and where the next is there, the head is looked for [as numbers are](super::gallop); only the records of a
//! session that has gaps, or whose first records are gone since a session of the same name was deleted, are listed.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::{Archive, Error};
use crate::types::{SessionId, Tenant};

/// The highest record of each session, as far as this process has seen. Bounded: when there are too many, all are forgotten,
/// which costs a search each.
#[derive(Debug, Default)]
pub(super) struct Hints(Mutex<HashMap<(Tenant, SessionId), u64>>);

impl Hints {
    const MOST: usize = 1 << 16;

    pub fn get(&self, tenant: &Tenant, session: &SessionId) -> Option<u64> {
        self.lock().get(&(tenant.clone(), session.clone())).copied()
    }

    pub fn note(&self, tenant: &Tenant, session: &SessionId, number: u64) {
        let mut hints = self.lock();
        if hints.len() >= Self::MOST {
            hints.clear();
        }
        hints.insert((tenant.clone(), session.clone()), number);
    }

    pub fn forget(&self, tenant: &Tenant, session: &SessionId) {
        self.lock().remove(&(tenant.clone(), session.clone()));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(Tenant, SessionId), u64>> {
        // Every change is one call on the map.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Archive {
    /// Says, before it is so, that records will be missing between others of a session: where such a one ends is found by
    /// listing it.
    pub(super) async fn note_gap(&self, tenant: &Tenant, session: &SessionId) -> Result<(), Error> {
        self.store.put_if_absent(&gap_key(tenant, session), Bytes::new()).await.map(|_| ())
    }

    pub(super) async fn has_gap(&self, tenant: &Tenant, session: &SessionId) -> Result<bool, Error> {
        Ok(self.store.get_start(&gap_key(tenant, session), 0).await?.is_some())
    }
}

fn gap_key(tenant: &Tenant, session: &SessionId) -> String {
    format!("t/{tenant}/gaps/{session}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_bounded() {
        let (hints, tenant) = (Hints::default(), Tenant::local());
        let session = |n: usize| SessionId::parse(n.to_string()).expect("a session");
        (0..=Hints::MOST).for_each(|n| hints.note(&tenant, &session(n), 7));
        assert_eq!((hints.get(&tenant, &session(0)), hints.get(&tenant, &session(Hints::MOST))), (None, Some(7)));
        hints.forget(&tenant, &session(Hints::MOST));
        assert!(hints.lock().is_empty());
    }
}
