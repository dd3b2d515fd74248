//! The archive: what states and sessions are called in a store, and what their bytes mean.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};

use super::hints::Hints;
use super::search::Known;
use super::{Damaged, Error, Info, Put, Storage, Store, codec, header};
use crate::types::{SessionId, Snapshot, StateId, Tenant};

/// States and sessions of all tenants in one store. Cheap to clone. The tenant is part of every key, so one tenant's
/// calls never touch another's objects.
#[derive(Clone)]
pub struct Archive {
    pub(super) store: Arc<dyn Store>,
    storage: Storage,
    pub(super) hints: Arc<Hints>,
    pub(super) known: Arc<Known>,
    /// Seconds: longer than any turn runs.
    pub(super) grace_s: u64,
}

/// Which states to list.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wanted {
    /// Only those made by this session.
    pub session: Option<SessionId>,
    /// Only those after this one.
    pub after: Option<StateId>,
    /// At most this many.
    pub limit: usize,
}

/// How much is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    pub states: u64,
    pub bytes: u64,
}

/// One page, in ascending order, and whether more follows.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed<T> {
    pub data: Vec<T>,
    pub has_more: bool,
}

impl<T> Listed<T> {
    /// A page of `limit` out of items of which one more was asked for.
    pub(super) fn cut(mut data: Vec<T>, limit: usize) -> Self {
        let has_more = data.len() > limit;
        data.truncate(limit);
        Self { data, has_more }
    }
}

/// How much of a snapshot to read at first for its metadata: enough for a model of a hundred layers.
const START: usize = 1 << 16;

/// Six hours.
const GRACE_S: u64 = 6 * 3600;

/// How many states of all sessions are looked at in one go for those of one.
const SIFTED: usize = 256;

/// How many objects a listing reads at once.
pub(super) const AT_ONCE: usize = 16;

impl Archive {
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store, storage: Storage::default(), hints: Arc::default(), known: Arc::default(), grace_s: GRACE_S }
    }

    /// The same, but that states are written so from now on.
    pub fn storing(self, storage: Storage) -> Self {
        Self { storage, ..self }
    }

    /// How many seconds after a deletion its records go, and after how many a state that no record names is taken for
    /// one that never will be: longer than any turn runs.
    pub fn with_grace(self, grace_s: u64) -> Self {
        Self { grace_s, ..self }
    }

    /// Stores a snapshot under its own id and owner and returns the bytes of its recurrent state. It is durable when
    /// this returns. Keeping the very same snapshot again is no error, so a failed call may be repeated.
    ///
    /// # Errors
    /// [`Error::Unfit`] if a value is not finite or a shape is wrong, [`Error::Taken`] if the id is in use.
    pub async fn keep(&self, snapshot: Arc<Snapshot>) -> Result<u64, Error> {
        let key = state_key(&snapshot.head.owner, &snapshot.head.id);
        let (bytes, storage) = (snapshot.memory.bytes(), self.storage);
        let file = off_runtime("encode", &key, move || codec::encode_as(&snapshot, storage)).await?;
        let file = Bytes::from(file.map_err(|Damaged(why)| Error::Unfit { key: key.clone(), why })?);
        match self.store.put_if_absent(&key, file.clone()).await? {
            Put::Created => Ok(bytes),
            Put::Exists if self.store.get(&key).await?.is_some_and(|there| there == file) => Ok(bytes),
            Put::Exists => Err(Error::Taken { key }),
        }
    }

    /// The snapshot of that name, unless there is none or it has expired.
    ///
    /// # Errors
    /// [`Error::Damaged`] if it is not, to the bit, what was kept.
    pub async fn load(&self, tenant: &Tenant, id: &StateId, now: u64) -> Result<Option<Snapshot>, Error> {
        let key = state_key(tenant, id);
        let Some(file) = self.store.get(&key).await? else { return Ok(None) };
        let snapshot = off_runtime("decode", &key, move || codec::decode(&file)).await?;
        let snapshot = snapshot.map_err(|e| damaged(&key, e))?;
        if snapshot.head.id != *id || snapshot.head.owner != *tenant {
            return Err(misplaced(&key));
        }
        Ok(Some(snapshot).filter(|s| !s.head.expired(now)))
    }

    /// The file of a state for whoever wants to take it elsewhere: in the exact format, however it is stored here.
    pub async fn content(&self, tenant: &Tenant, id: &StateId, now: u64) -> Result<Option<Bytes>, Error> {
        let Some(snapshot) = self.load(tenant, id, now).await? else { return Ok(None) };
        let key = state_key(tenant, id);
        let file = off_runtime("encode", &key, move || codec::encode(&snapshot)).await?;
        file.map(|file| Some(Bytes::from(file))).map_err(|e| damaged(&key, e))
    }

    /// What is known of a state without reading its tensors, unless there is none or it has expired.
    pub async fn info(&self, tenant: &Tenant, id: &StateId, now: u64) -> Result<Option<Info>, Error> {
        Ok(self.peek(tenant, id).await?.filter(|info| !info.head.expired(now)))
    }

    /// Removes a state and says whether there was one.
    pub async fn remove(&self, tenant: &Tenant, id: &StateId) -> Result<bool, Error> {
        self.store.delete(&state_key(tenant, id)).await
    }

    /// How many states a tenant has and how large their files are together. Looks at each of them.
    pub async fn stored(&self, tenant: &Tenant) -> Result<Stored, Error> {
        let folder = format!("t/{tenant}/states");
        let names = self.store.children(&folder, None, usize::MAX).await?;
        let keys = names.into_iter().map(|name| format!("{folder}/{name}"));
        let sizes = stream::iter(keys).map(|key| async move { self.store.get_start(&key, 0).await });
        let sizes = sizes.buffer_unordered(AT_ONCE).try_filter_map(async |start| Ok(start.map(|start| start.size)));
        let add = |sum: Stored, size| async move { Ok(Stored { states: sum.states + 1, bytes: sum.bytes + size }) };
        sizes.try_fold(Stored::default(), add).await
    }

    /// The states of a tenant by the time they were made. Expired ones are left out and removed; damaged ones are
    /// left out and reported in the log.
    pub async fn list(&self, tenant: &Tenant, wanted: &Wanted, now: u64) -> Result<Listed<Info>, Error> {
        let folder = format!("t/{tenant}/states");
        let mut after = wanted.after.as_ref().map(StateId::to_string);
        // Every look for names goes through the whole folder, and of another session's states none is wanted.
        let batch = wanted.limit.saturating_add(1).max(if wanted.session.is_some() { SIFTED } else { 0 });
        let mut found = Vec::new();
        while found.len() <= wanted.limit {
            let names = self.store.children(&folder, after.as_deref(), batch).await?;
            let Some(last) = names.last() else { break };
            after = Some(last.clone());
            let ids = names.into_iter().filter_map(|name| StateId::parse(name).ok());
            let infos = stream::iter(ids.map(|id| self.list_one(tenant, id, now))).buffered(AT_ONCE);
            let infos: Vec<Option<Info>> = infos.try_collect().await?;
            let ours = |info: &Info| wanted.session.is_none() || info.head.session == wanted.session;
            found.extend(infos.into_iter().flatten().filter(ours));
        }
        Ok(Listed::cut(found, wanted.limit))
    }

    async fn list_one(&self, tenant: &Tenant, id: StateId, now: u64) -> Result<Option<Info>, Error> {
        match self.peek(tenant, &id).await {
            Ok(Some(info)) if info.head.expired(now) => {
                if let Err(error) = self.remove(tenant, &id).await {
                    tracing::warn!(%error, "an expired state could not be removed");
                }
                Ok(None)
            }
            Err(Error::Damaged { key, why }) => {
                tracing::warn!(key, why, "a stored state is damaged");
                Ok(None)
            }
            other => other,
        }
    }

    /// What is known of a state, expired or not.
    pub(super) async fn peek(&self, tenant: &Tenant, id: &StateId) -> Result<Option<Info>, Error> {
        let key = state_key(tenant, id);
        let Some(mut start) = self.store.get_start(&key, START).await? else { return Ok(None) };
        let len = header::head_len(&start.bytes, start.size).map_err(|e| damaged(&key, e))?;
        if len > start.bytes.len() {
            match self.store.get_start(&key, len).await? {
                Some(longer) => start = longer,
                None => return Ok(None),
            }
        }
        let start_of_data = len.min(start.bytes.len());
        let info = header::decode_head(&start.bytes[..start_of_data], start.size).map_err(|e| damaged(&key, e))?;
        if info.head.id != *id || info.head.owner != *tenant {
            return Err(misplaced(&key));
        }
        Ok(Some(info))
    }
}

pub(super) fn state_key(tenant: &Tenant, id: &StateId) -> String {
    format!("t/{tenant}/states/{id}")
}

/// Whether a key is that of a snapshot: what it holds is under no other key and never was.
pub fn is_state(key: &str) -> bool {
    key.split('/').nth(2) == Some("states")
}

pub(super) fn damaged(key: &str, Damaged(why): Damaged) -> Error {
    Error::Damaged { key: key.into(), why }
}

fn misplaced(key: &str) -> Error {
    damaged(key, Damaged("it is the snapshot of another id or tenant".into()))
}

/// Runs the long work on a snapshot's bytes away from the async runtime.
async fn off_runtime<T: Send + 'static>(
    doing: &'static str,
    key: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let stopped =
        |e: tokio::task::JoinError| Error::Store { doing, key: key.into(), cause: e.to_string(), fault: None };
    tokio::task::spawn_blocking(work).await.map_err(stopped)
}
