//! A store that forgets everything when the process ends.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt, ready};

use super::store::check;
use super::{Error, Put, Start, Store};

/// Objects in memory: for tests, and for serving without a state folder. Durable as long as the process.
#[derive(Debug, Default)]
pub struct InMemory {
    objects: Mutex<BTreeMap<String, Bytes>>,
}

impl InMemory {
    fn objects(&self) -> MutexGuard<'_, BTreeMap<String, Bytes>> {
        // Every change is one call on the map, so a panic elsewhere cannot leave it half made.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for InMemory {
    fn put_if_absent<'a>(&'a self, key: &'a str, value: Bytes) -> BoxFuture<'a, Result<Put, Error>> {
        let put = || {
            check(key)?;
            let mut objects = self.objects();
            if objects.contains_key(key) {
                return Ok(Put::Exists);
            }
            objects.insert(key.into(), value);
            Ok(Put::Created)
        };
        ready(put()).boxed()
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, Error>> {
        ready(check(key).map(|()| self.objects().get(key).cloned())).boxed()
    }

    fn get_start<'a>(&'a self, key: &'a str, len: usize) -> BoxFuture<'a, Result<Option<Start>, Error>> {
        let start = |whole: &Bytes| Start { bytes: whole.slice(..len.min(whole.len())), size: whole.len() as u64 };
        ready(check(key).map(|()| self.objects().get(key).map(start))).boxed()
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, Error>> {
        ready(check(key).map(|()| self.objects().remove(key).is_some())).boxed()
    }

    fn children<'a>(
        &'a self,
        folder: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<String>, Error>> {
        let list = || {
            check(folder)?;
            let prefix = format!("{folder}/");
            let objects = self.objects();
            let inside = objects.range::<str, _>((Bound::Included(prefix.as_str()), Bound::Unbounded));
            // `a-b/x` sorts before `a/x` though `a` sorts before `a-b`: names are ordered on their own.
            let names: BTreeSet<&str> = inside
                .map_while(|(key, _)| key.strip_prefix(&prefix))
                .map(|rest| rest.split_once('/').map_or(rest, |(name, _)| name))
                .collect();
            let bound = after.map_or(Bound::Unbounded, Bound::Excluded);
            Ok(names.range::<str, _>((bound, Bound::Unbounded)).take(limit).map(|name| name.to_string()).collect())
        };
        ready(list()).boxed()
    }
}
