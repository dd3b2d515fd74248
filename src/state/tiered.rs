//! A near store in front of a far one, and one that remembers only so much.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};

use super::{Error, Put, Start, Store};

/// A far store that is the truth, with a near one that saves fetching objects again.
///
/// An object is immutable, so a copy cannot be old; but it may be gone. So the far store is asked for a copy's first byte
/// before the copy is given out: what was deleted anywhere is deleted here. Listings, beginnings and all that is not
/// `cached` are the far store's. What goes wrong with the near one costs time only.
pub struct Tiered<Hot, Cold: ?Sized> {
    hot: Hot,
    cold: Arc<Cold>,
    cached: fn(&str) -> bool,
}

impl<Hot: Store, Cold: Store + ?Sized> Tiered<Hot, Cold> {
    /// Keeps copies of the objects under keys that are `cached`: of those no two ever have the same key, not even one after
    /// the other.
    pub fn new(hot: Hot, cold: Arc<Cold>, cached: fn(&str) -> bool) -> Self {
        Self { hot, cold, cached }
    }

    async fn remember(&self, key: &str, value: Bytes) {
        if let Err(error) = self.hot.put_if_absent(key, value).await {
            tracing::debug!(%error, "a copy of a stored object was not kept");
        }
    }
}

impl<Hot: Store, Cold: Store + ?Sized> Store for Tiered<Hot, Cold> {
    fn put_if_absent<'a>(&'a self, key: &'a str, value: Bytes) -> BoxFuture<'a, Result<Put, Error>> {
        async move {
            let put = self.cold.put_if_absent(key, value.clone()).await?;
            if put == Put::Created && (self.cached)(key) {
                self.remember(key, value).await;
            }
            Ok(put)
        }
        .boxed()
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, Error>> {
        async move {
            if !(self.cached)(key) {
                return self.cold.get(key).await;
            }
            if let Ok(Some(copy)) = self.hot.get(key).await {
                let there = self.cold.get_start(key, 1).await?;
                if there.as_ref().is_some_and(|there| there.size == copy.len() as u64) {
                    return Ok(Some(copy));
                }
                // Nothing is lost with a copy that could not be removed: it is never given out.
                let _ = self.hot.delete(key).await;
                if there.is_none() {
                    return Ok(None);
                }
            }
            let found = self.cold.get(key).await?;
            if let Some(value) = &found {
                self.remember(key, value.clone()).await;
            }
            Ok(found)
        }
        .boxed()
    }

    fn get_start<'a>(&'a self, key: &'a str, len: usize) -> BoxFuture<'a, Result<Option<Start>, Error>> {
        self.cold.get_start(key, len)
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, Error>> {
        async move {
            let existed = self.cold.delete(key).await?;
            if (self.cached)(key) {
                let _ = self.hot.delete(key).await;
            }
            Ok(existed)
        }
        .boxed()
    }

    fn children<'a>(
        &'a self,
        folder: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<String>, Error>> {
        self.cold.children(folder, after, limit)
    }

    fn tidy<'a>(&'a self, folder: &'a str, before: u64) -> BoxFuture<'a, Result<u64, Error>> {
        async move {
            // What the near store is left with costs room only.
            let near = self.hot.tidy(folder, before).await.unwrap_or(0);
            Ok(near + self.cold.tidy(folder, before).await?)
        }
        .boxed()
    }
}

/// A store that holds at most so many bytes: what was not used for longest goes. It knows of what was put through it only, so
/// it is for copies.
pub struct Bounded<S> {
    inner: S,
    most: u64,
    uses: Mutex<Uses>,
}

/// Which objects are there, by their last use.
#[derive(Debug, Default)]
struct Uses {
    now: u64,
    bytes: u64,
    by_key: HashMap<String, (u64, u64)>,
    by_use: BTreeMap<u64, String>,
}

impl Uses {
    /// Notes a use of an object that is there.
    fn touch(&mut self, key: &str) {
        let Some((used, _)) = self.by_key.get_mut(key) else { return };
        self.now += 1;
        let key = self.by_use.remove(used).unwrap_or_else(|| key.into());
        *used = self.now;
        self.by_use.insert(self.now, key);
    }

    fn add(&mut self, key: &str, size: u64) {
        self.remove(key);
        self.now += 1;
        self.bytes += size;
        self.by_key.insert(key.into(), (self.now, size));
        self.by_use.insert(self.now, key.into());
    }

    fn remove(&mut self, key: &str) {
        if let Some((used, size)) = self.by_key.remove(key) {
            self.by_use.remove(&used);
            self.bytes -= size;
        }
    }

    /// Takes out what is too much, the longest unused first.
    fn surplus(&mut self, most: u64) -> Vec<String> {
        let mut gone = Vec::new();
        while self.bytes > most {
            let Some((_, key)) = self.by_use.pop_first() else { break };
            self.bytes -= self.by_key.remove(&key).map_or(0, |(_, size)| size);
            gone.push(key);
        }
        gone
    }
}

impl<S: Store> Bounded<S> {
    pub fn new(inner: S, most: u64) -> Self {
        Self { inner, most, uses: Mutex::default() }
    }

    /// Bytes of the objects that are there.
    pub fn bytes(&self) -> u64 {
        self.uses().bytes
    }

    fn uses(&self) -> MutexGuard<'_, Uses> {
        // Wherever it was left, the worst is that an object is forgotten or kept too long.
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Store> Store for Bounded<S> {
    fn put_if_absent<'a>(&'a self, key: &'a str, value: Bytes) -> BoxFuture<'a, Result<Put, Error>> {
        async move {
            let size = value.len() as u64;
            if size > self.most {
                let why = format!("it is larger than the {} bytes that are kept here", self.most);
                return Err(Error::Unfit { key: key.into(), why });
            }
            let put = self.inner.put_if_absent(key, value).await?;
            let gone = {
                let mut uses = self.uses();
                match put {
                    Put::Created => uses.add(key, size),
                    Put::Exists => uses.touch(key),
                }
                uses.surplus(self.most)
            };
            for key in gone {
                self.inner.delete(&key).await?;
            }
            Ok(put)
        }
        .boxed()
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, Error>> {
        self.uses().touch(key);
        self.inner.get(key)
    }

    fn get_start<'a>(&'a self, key: &'a str, len: usize) -> BoxFuture<'a, Result<Option<Start>, Error>> {
        self.inner.get_start(key, len)
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, Error>> {
        self.uses().remove(key);
        self.inner.delete(key)
    }

    fn children<'a>(
        &'a self,
        folder: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<String>, Error>> {
        self.inner.children(folder, after, limit)
    }

    fn tidy<'a>(&'a self, folder: &'a str, before: u64) -> BoxFuture<'a, Result<u64, Error>> {
        self.inner.tidy(folder, before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::InMemory;

    fn bytes(n: usize) -> Bytes {
        vec![7; n].into()
    }

    #[tokio::test]
    async fn what_was_not_used_for_longest_goes() {
        let store = Bounded::new(InMemory::default(), 10);
        for key in ["a", "b", "c"] {
            store.put_if_absent(key, bytes(3)).await.unwrap();
        }
        store.get("a").await.unwrap().unwrap();
        store.put_if_absent("d", bytes(3)).await.unwrap();
        assert_eq!(store.children("x", None, 9).await.unwrap(), [""; 0]);
        for (key, there) in [("a", true), ("b", false), ("c", true), ("d", true)] {
            assert_eq!(store.get(key).await.unwrap().is_some(), there, "{key}");
        }
        assert!(matches!(store.put_if_absent("e", bytes(11)).await, Err(Error::Unfit { .. })));
        store.put_if_absent("e", bytes(10)).await.unwrap();
        assert_eq!((store.bytes(), store.get("d").await.unwrap()), (10, None));
        store.delete("e").await.unwrap();
        assert_eq!(store.bytes(), 0);
    }

    /// Two servers with a near store each, over one far store.
    type Server = Tiered<Bounded<InMemory>, InMemory>;

    fn servers() -> (Server, Server, Arc<InMemory>) {
        let far = Arc::new(InMemory::default());
        let server = || Tiered::new(Bounded::new(InMemory::default(), 100), far.clone(), |key| key.starts_with("c/"));
        (server(), server(), far)
    }

    #[tokio::test]
    async fn what_another_server_deleted_or_wrote_is_seen_at_once() {
        let (one, other, far) = servers();
        for key in ["c/x", "r/x"] {
            assert_eq!(one.put_if_absent(key, bytes(5)).await.unwrap(), Put::Created);
            assert_eq!(other.put_if_absent(key, bytes(6)).await.unwrap(), Put::Exists);
            assert_eq!(other.get(key).await.unwrap(), Some(bytes(5)));
            assert_eq!((one.hot.bytes() > 0, other.hot.bytes() > 0), (true, true), "it has a copy");
            assert!(other.delete(key).await.unwrap());
            assert_eq!(one.get(key).await.unwrap(), None, "{key}: a copy of what is gone is never given out");
            assert_eq!(one.children(&key[..1], None, 9).await.unwrap(), [""; 0]);
            one.put_if_absent("c/y", bytes(1)).await.unwrap();
            other.get("c/y").await.unwrap();
        }
        assert_eq!(far.get("c/x").await.unwrap(), None);
        other.put_if_absent("r/n", bytes(1)).await.unwrap();
        assert_eq!(one.children("r", None, 9).await.unwrap(), ["n"]);
        // What a put did not put is not kept.
        far.put_if_absent("c/z", bytes(2)).await.unwrap();
        assert_eq!(one.put_if_absent("c/z", bytes(3)).await.unwrap(), Put::Exists);
        assert_eq!(one.get("c/z").await.unwrap(), Some(bytes(2)));
    }
}
