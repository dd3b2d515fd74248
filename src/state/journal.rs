//! Journals: what grows entry by entry under one name, and single documents beside them.
//!
//! An entry is [sealed](super::sealed) as a turn's record is, so that of two journals none shows the other's. Entry n + 1 is put, if it is absent, on top of
//! entry n: of two processes that write the same journal one is told, and stops.

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::archive::{AT_ONCE, damaged};
use super::sealed::{open, seal};
use super::{Archive, Error, Put};
use crate::types::Tenant;

/// Entry numbers are written with this many digits, so that names sort as numbers do.
const DIGITS: usize = 12;

/// Where the names of unfinished streams are: an object for each, of no other use than to be listed when a server starts.
const RUNNING: &str = "running";

/// The name of one journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Journal(String);

impl Journal {
    /// The events of a response while it is generated.
    pub fn stream(tenant: &Tenant, response: &str) -> Self {
        Self(format!("t/{tenant}/streams/{response}"))
    }

    /// What was said and done in a conversation beside its turns.
    pub fn conversation(tenant: &Tenant, id: &str) -> Self {
        Self(format!("t/{tenant}/conversations/{id}"))
    }

    fn entry(&self, n: u64) -> String {
        format!("{}/{n:0DIGITS$}", self.0)
    }
}

impl Archive {
    /// Puts entry `n`, from 0. It is durable when this returns; [`Put::Exists`] = somebody else's is there.
    pub async fn append(&self, journal: &Journal, n: u64, entry: &impl Serialize) -> Result<Put, Error> {
        let key = journal.entry(n);
        self.store.put_if_absent(&key, seal(&key, entry).into()).await
    }

    /// All entries, in order; none when there is no such journal. An entry that is gone while this reads ends it.
    pub async fn entries<T: DeserializeOwned>(&self, journal: &Journal) -> Result<Vec<T>, Error> {
        let names = self.store.children(&journal.0, None, usize::MAX).await?;
        let read = names.into_iter().map(|name| async move {
            let key = format!("{}/{name}", journal.0);
            let Some(bytes) = self.store.get(&key).await? else { return Ok(None) };
            open(&key, &bytes).map(Some).map_err(|why| damaged(&key, why))
        });
        let entries: Vec<Option<T>> = stream::iter(read).buffered(AT_ONCE).try_collect().await?;
        Ok(entries.into_iter().map_while(|entry| entry).collect())
    }

    /// Removes a journal, its first entry last: what is left of an interrupted call is still known to be one.
    pub async fn erase(&self, journal: &Journal) -> Result<(), Error> {
        for name in self.store.children(&journal.0, None, usize::MAX).await?.into_iter().rev() {
            self.store.delete(&format!("{}/{name}", journal.0)).await?;
        }
        Ok(())
    }

    /// Notes that a response is being generated, so that it is found when this process is lost.
    pub async fn mark_running(&self, tenant: &Tenant, response: &str) -> Result<Put, Error> {
        self.store.put_if_absent(&format!("{RUNNING}/{tenant}/{response}"), Bytes::new()).await
    }

    pub async fn unmark_running(&self, tenant: &Tenant, response: &str) -> Result<(), Error> {
        self.store.delete(&format!("{RUNNING}/{tenant}/{response}")).await.map(drop)
    }

    /// The responses that are marked.
    pub async fn running(&self) -> Result<Vec<(Tenant, String)>, Error> {
        let mut all = Vec::new();
        for name in self.store.children(RUNNING, None, usize::MAX).await? {
            let Ok(tenant) = Tenant::parse(name) else { continue };
            let names = self.store.children(&format!("{RUNNING}/{tenant}"), None, usize::MAX).await?;
            all.extend(names.into_iter().map(|name| (tenant.clone(), name)));
        }
        Ok(all)
    }

    /// Stores a finished response. It is durable when this returns.
    pub async fn put_answer(&self, tenant: &Tenant, response: &str, answer: &impl Serialize) -> Result<Put, Error> {
        let key = answer_key(tenant, response);
        self.store.put_if_absent(&key, seal(&key, answer).into()).await
    }

    /// A finished response.
    pub async fn answer<T: DeserializeOwned>(&self, tenant: &Tenant, response: &str) -> Result<Option<T>, Error> {
        let key = answer_key(tenant, response);
        let Some(bytes) = self.store.get(&key).await? else { return Ok(None) };
        open(&key, &bytes).map(Some).map_err(|why| damaged(&key, why))
    }

    /// Removes a finished response and says whether there was one.
    pub async fn remove_answer(&self, tenant: &Tenant, response: &str) -> Result<bool, Error> {
        self.store.delete(&answer_key(tenant, response)).await
    }
}

fn answer_key(tenant: &Tenant, response: &str) -> String {
    format!("t/{tenant}/responses/{response}")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::state::InMemory;

    #[tokio::test]
    async fn a_journal_is_written_once_and_read_in_order() {
        let archive = Archive::new(Arc::new(InMemory::default()));
        let journal = Journal::stream(&Tenant::local(), "resp_1");
        for n in 0..12 {
            assert_eq!(archive.append(&journal, n, &format!("entry {n}")).await, Ok(Put::Created));
        }
        assert_eq!(archive.append(&journal, 11, &"late").await, Ok(Put::Exists));
        let entries: Vec<String> = archive.entries(&journal).await.expect("they are whole");
        assert_eq!(entries, (0..12).map(|n| format!("entry {n}")).collect::<Vec<_>>());
        archive.erase(&journal).await.expect("it is removed");
        assert_eq!(archive.entries::<String>(&journal).await, Ok(Vec::new()));
    }

    #[tokio::test]
    async fn marks_and_answers_come_and_go() {
        let archive = Archive::new(Arc::new(InMemory::default()));
        let tenant = Tenant::local();
        archive.mark_running(&tenant, "resp_1").await.expect("it is marked");
        assert_eq!(archive.running().await, Ok(vec![(tenant.clone(), "resp_1".into())]));
        archive.unmark_running(&tenant, "resp_1").await.expect("it was marked");
        assert_eq!(archive.running().await, Ok(Vec::new()));
        assert_eq!(archive.put_answer(&tenant, "resp_1", &7).await, Ok(Put::Created));
        assert_eq!(archive.answer::<u32>(&tenant, "resp_1").await, Ok(Some(7)));
        assert!(matches!(archive.answer::<String>(&tenant, "resp_1").await, Err(Error::Damaged { .. })));
        assert_eq!(archive.remove_answer(&tenant, "resp_1").await, Ok(true));
        assert_eq!(archive.answer::<u32>(&tenant, "resp_1").await, Ok(None));
    }
}
