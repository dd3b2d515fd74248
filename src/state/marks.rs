//! Small objects beside states and sessions, which say what neither can say of itself.
//!
//! ```text
//! t/{tenant}/forks/{session}/{other}:{record}   a record of `other` goes back to a record of `session`
//! t/{tenant}/forks/{session}/{state id}         that free-standing state was made from one of the session's
//! t/{tenant}/evicted/{state id}                 the state is no longer stored; the record named here rebuilds it
//! t/{tenant}/deleted/{state id}                 nothing: a client deleted that state, whose turn is still its session's
//! t/{tenant}/keys/{session}/{hash}[-{n}]        the turn of that `Idempotency-Key` is to be the record named here
//! ```
//!
//! A mark is written before what it is about and removed after it: one too many costs a look, one too few would cost a
//! state. None is believed without a look at what it names.

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::archive::damaged;
use super::sealed::{open, seal};
use super::sessions::turn_key;
use super::{Archive, Damaged, Entry, Error, Info, Put};
use crate::types::{SessionId, StateId, Tenant};

/// Which record a state was made by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub session: SessionId,
    /// Number of the record.
    pub record: u64,
    /// Number of the turn.
    pub turn: u64,
}

/// What needs a session's records or states.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fork {
    /// The record that is gone back to; with it, those before it. `None` = only the state is needed.
    pub record: Option<u64>,
    pub state: StateId,
    /// Unix seconds.
    pub made: u64,
}

#[derive(Serialize, Deserialize)]
struct Keyed {
    record: u64,
}

impl Archive {
    /// Notes that `child`, a state without a session, was made from `parent`, a state of a session: who deletes the
    /// session leaves `parent` alone as long as `child` is there.
    pub async fn note_child(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        (parent, child): (&StateId, &StateId),
        now: u64,
    ) -> Result<(), Error> {
        let fork = Fork { record: None, state: parent.clone(), made: now };
        self.mark(&format!("{}/{child}", forks(tenant, session)), &fork).await.map(|_| ())
    }

    pub(super) async fn note_fork(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        by: (&SessionId, u64),
        fork: &Fork,
    ) -> Result<(), Error> {
        self.mark(&fork_key(tenant, session, by), fork).await.map(|_| ())
    }

    pub(super) async fn forget_fork(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        by: (&SessionId, u64),
    ) -> Result<(), Error> {
        self.store.delete(&fork_key(tenant, session, by)).await.map(|_| ())
    }

    /// What needs something of a session. Marks whose fork is gone are removed on the way.
    pub(super) async fn forks(&self, tenant: &Tenant, session: &SessionId, now: u64) -> Result<Vec<Fork>, Error> {
        let folder = forks(tenant, session);
        let mut needed = Vec::new();
        for name in self.store.children(&folder, None, usize::MAX).await? {
            let key = format!("{folder}/{name}");
            let Some(fork) = self.read_mark::<Fork>(&key).await? else { continue };
            if self.is_needed(tenant, &name, &fork, now).await? {
                needed.push(fork);
            } else {
                self.store.delete(&key).await?;
            }
        }
        Ok(needed)
    }

    async fn is_needed(&self, tenant: &Tenant, name: &str, fork: &Fork, now: u64) -> Result<bool, Error> {
        let Some((session, number)) = name.rsplit_once(':') else {
            return Ok(self.store.get_start(&format!("t/{tenant}/states/{name}"), 0).await?.is_some());
        };
        let (Ok(session), Ok(number)) = (SessionId::parse(session), number.parse()) else { return Ok(true) };
        match self.entry(tenant, &session, number).await {
            Ok(Some(Entry { record, .. })) => Ok(record.state.as_ref() == Some(&fork.state)),
            // It may be about to be committed.
            Ok(None) => Ok(fork.made.saturating_add(self.grace_s) > now),
            Err(Error::Damaged { .. }) => Ok(true),
            Err(e) => Err(e),
        }
    }

    /// Removes a state that a session's record can rebuild, leaving word of which; gives the bytes of its recurrent state.
    /// `None` = there is no such state, or no record that could.
    pub async fn evict(&self, tenant: &Tenant, id: &StateId) -> Result<Option<u64>, Error> {
        let info = match self.peek(tenant, id).await {
            Err(Error::Damaged { .. }) => None,
            other => other?,
        };
        let Some(Info { head, bytes, .. }) = info else { return Ok(None) };
        let Some((session, record)) = head.session.zip(head.record) else { return Ok(None) };
        self.mark(&evicted(tenant, id), &Origin { session, record, turn: head.turn }).await?;
        Ok(self.remove(tenant, id).await?.then_some(bytes))
    }

    /// The record that rebuilds an evicted state.
    pub async fn evicted(&self, tenant: &Tenant, id: &StateId) -> Result<Option<Origin>, Error> {
        self.read_mark(&evicted(tenant, id)).await
    }

    /// Makes an evicted state unknown, and says whether it was one.
    pub async fn forget_evicted(&self, tenant: &Tenant, id: &StateId) -> Result<bool, Error> {
        self.store.delete(&evicted(tenant, id)).await
    }

    /// Says, before it is so, that a client deleted a state of a session: it is not to be rebuilt by that id.
    pub async fn note_deleted(&self, tenant: &Tenant, id: &StateId) -> Result<(), Error> {
        self.store.put_if_absent(&deleted(tenant, id), Bytes::new()).await.map(|_| ())
    }

    /// Whether a client deleted a state of a session that is still there.
    pub async fn is_deleted(&self, tenant: &Tenant, id: &StateId) -> Result<bool, Error> {
        Ok(self.store.get_start(&deleted(tenant, id), 0).await?.is_some())
    }

    /// Forgets that a state was deleted whose turn is gone as well.
    pub(super) async fn forget_deleted(&self, tenant: &Tenant, id: &StateId) -> Result<(), Error> {
        self.store.delete(&deleted(tenant, id)).await.map(|_| ())
    }

    /// Which record a state was made by, as far as what is left of it tells.
    pub async fn origin_of(&self, tenant: &Tenant, id: &StateId) -> Result<Option<Origin>, Error> {
        let head = match self.peek(tenant, id).await {
            Ok(Some(info)) => info.head,
            Ok(None) | Err(Error::Damaged { .. }) => return self.evicted(tenant, id).await,
            Err(e) => return Err(e),
        };
        let made_by = head.session.zip(head.record);
        Ok(made_by.map(|(session, record)| Origin { session, record, turn: head.turn }))
    }

    /// The turn that was committed with this `Idempotency-Key`, since the session began with record `first`.
    ///
    /// # Errors
    /// [`Error::Damaged`] if a mark of the key cannot be read: whether its turn was committed is not known.
    pub async fn keyed(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        key: &str,
        first: u64,
    ) -> Result<Option<Entry>, Error> {
        for n in 0.. {
            let mark = key_mark(tenant, session, key, n);
            let Some(bytes) = self.store.get(&mark).await? else { break };
            let Keyed { record } = read_keyed(&mark, &bytes).map_err(|why| damaged(&mark, why))?;
            if record < first {
                continue;
            }
            let entry = self.entry(tenant, session, record).await?;
            if let Some(entry) = entry.filter(|e| e.record.idempotency_key.as_deref() == Some(key)) {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// Notes, before it is committed, which record the turn of an `Idempotency-Key` is to be. A mark of a turn that came
    /// to nothing stays, and the next one takes the place behind it.
    pub async fn note_key(&self, tenant: &Tenant, session: &SessionId, key: &str, record: u64) -> Result<(), Error> {
        for n in 0.. {
            let mark = key_mark(tenant, session, key, n);
            let sealed = seal(&mark, &Keyed { record });
            if self.store.put_if_absent(&mark, sealed.into()).await? == Put::Created {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Removes the keys of a session that nobody can ask about any more.
    pub(super) async fn forget_keys(&self, tenant: &Tenant, session: &SessionId, below: u64) -> Result<(), Error> {
        let folder = format!("t/{tenant}/keys/{session}");
        for name in self.store.children(&folder, None, usize::MAX).await? {
            let key = format!("{folder}/{name}");
            let Some(bytes) = self.store.get(&key).await? else { continue };
            if read_keyed(&key, &bytes).is_ok_and(|keyed| keyed.record >= below) {
                continue;
            }
            self.store.delete(&key).await?;
        }
        Ok(())
    }

    async fn mark(&self, key: &str, value: &impl Serialize) -> Result<Put, Error> {
        let json = serde_json::to_vec(value).expect("a mark is text and numbers under text keys");
        self.store.put_if_absent(key, Bytes::from(json)).await
    }

    /// A mark, unless there is none or nobody can read it.
    async fn read_mark<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, Error> {
        let Some(bytes) = self.store.get(key).await? else { return Ok(None) };
        Ok(serde_json::from_slice(&bytes)
            .inspect_err(|error| tracing::warn!(key, %error, "a mark cannot be read"))
            .ok())
    }
}

/// The mark of a key. It is sealed, as another number in it would be another turn; versions before this one did not.
fn read_keyed(key: &str, bytes: &[u8]) -> Result<Keyed, Damaged> {
    match serde_json::from_slice(bytes) {
        Ok(keyed) => Ok(keyed),
        Err(_) => open(key, bytes),
    }
}

fn forks(tenant: &Tenant, session: &SessionId) -> String {
    format!("t/{tenant}/forks/{session}")
}

fn fork_key(tenant: &Tenant, session: &SessionId, (by, number): (&SessionId, u64)) -> String {
    let record = turn_key(tenant, by, number);
    let number = record.rsplit_once('/').map_or("", |(_, number)| number);
    format!("{}/{by}:{number}", forks(tenant, session))
}

fn evicted(tenant: &Tenant, id: &StateId) -> String {
    format!("t/{tenant}/evicted/{id}")
}

fn deleted(tenant: &Tenant, id: &StateId) -> String {
    format!("t/{tenant}/deleted/{id}")
}

fn key_mark(tenant: &Tenant, session: &SessionId, key: &str, n: u64) -> String {
    // A client's key may be anything.
    let hash = blake3::hash(key.as_bytes()).to_hex();
    let behind = if n == 0 { String::new() } else { format!("-{n}") };
    format!("t/{tenant}/keys/{session}/{hash}{behind}")
}
