//! Journals: what grows entry by entry under one name, and single documents beside them.
//!
//! An entry is [sealed](super::sealed) as a turn's record is, so that of two journals none shows the other's. Entry n + 1 is put, if it is absent, on top of
//! entry n: of two processes that write the same journal one is told, and stops.

use bytes::Bytes;
use futures::stream::{self, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::archive::{AT_ONCE, damaged};
use super::sealed::{open, seal};
use super::{Archive, Damaged, Error, Put};
use crate::types::Tenant;

/// Entry numbers are written with this many digits, so that names sort as numbers do.
const DIGITS: usize = 12;

/// Where the names of unfinished streams are: an object for each, of no other use than to be listed when a server starts.
const RUNNING: &str = "running";

/// A journal as far as it can be read.
#[derive(Debug)]
pub struct Salvaged<T> {
    /// From the first on, those that follow one another.
    pub entries: Vec<T>,
    /// Why the next one is not among them, if it is there, or others are behind it.
    pub damage: Option<Damaged>,
    /// What can be read behind that one.
    pub behind: Vec<T>,
}

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
    ///
    /// # Errors
    /// [`Error::Damaged`] if one cannot be read, or is missing before others.
    pub async fn entries<T: DeserializeOwned>(&self, journal: &Journal) -> Result<Vec<T>, Error> {
        let Salvaged { entries, damage, .. } = self.salvage(journal).await?;
        match damage {
            Some(why) => Err(damaged(&journal.entry(entries.len() as u64), why)),
            None => Ok(entries),
        }
    }

    /// What can be read of a journal.
    pub async fn salvage<T: DeserializeOwned>(&self, journal: &Journal) -> Result<Salvaged<T>, Error> {
        let names = self.store.children(&journal.0, None, usize::MAX).await?;
        let numbers: Vec<u64> = names.iter().filter_map(|name| number(name)).collect();
        let mut salvaged = Salvaged { entries: Vec::new(), damage: None, behind: Vec::new() };
        let Some(&last) = numbers.last() else { return Ok(salvaged) };
        // By number and not by name: while somebody writes, a listing may leave out one before the last.
        let mut read = stream::iter(0..=last).map(|n| self.read_entry(journal, n)).buffered(AT_ONCE);
        let mut missing = false;
        while let Some(entry) = read.next().await {
            match entry {
                Ok(Some(entry)) => salvaged.entries.push(entry),
                Ok(None) => missing = true,
                Err(Error::Damaged { why, .. }) => salvaged.damage = Some(Damaged(why)),
                Err(error) => return Err(error),
            }
            if missing || salvaged.damage.is_some() {
                break;
            }
        }
        drop(read);
        if !missing && salvaged.damage.is_none() {
            return Ok(salvaged);
        }
        for n in numbers.into_iter().filter(|n| *n > salvaged.entries.len() as u64) {
            match self.read_entry(journal, n).await {
                Ok(Some(entry)) => salvaged.behind.push(entry),
                Ok(None) => continue,
                Err(Error::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
            if missing {
                salvaged.damage = Some(Damaged(format!("entry {} is missing", salvaged.entries.len())));
            }
        }
        Ok(salvaged)
    }

    /// One entry.
    ///
    /// # Errors
    /// [`Error::Damaged`] if it cannot be read.
    pub async fn read_entry<T: DeserializeOwned>(&self, journal: &Journal, n: u64) -> Result<Option<T>, Error> {
        let key = journal.entry(n);
        let Some(bytes) = self.store.get(&key).await? else { return Ok(None) };
        open(&key, &bytes).map(Some).map_err(|why| damaged(&key, why))
    }

    /// Ends the journal of a stream before entry `from`, which is damaged: it is set aside, and what is behind it is removed,
    /// the last first.
    pub async fn cut_stream(&self, tenant: &Tenant, response: &str, from: u64) -> Result<(), Error> {
        let journal = Journal::stream(tenant, response);
        for name in self.store.children(&journal.0, None, usize::MAX).await?.into_iter().rev() {
            let Some(n) = number(&name).filter(|n| *n >= from) else { continue };
            let key = journal.entry(n);
            if n == from
                && let Some(bytes) = self.store.get(&key).await?
            {
                self.store.put_if_absent(&format!("t/{tenant}/aside/{response}-{n}"), bytes).await?;
            }
            self.store.delete(&key).await?;
        }
        Ok(())
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

/// The number of the entry of that name.
fn number(name: &str) -> Option<u64> {
    name.parse().ok().filter(|n| format!("{n:0DIGITS$}") == name)
}

fn answer_key(tenant: &Tenant, response: &str) -> String {
    format!("t/{tenant}/responses/{response}")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::state::{InMemory, Store};

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
    async fn what_is_before_a_damaged_entry_is_kept_and_the_rest_gives_way() {
        let (tenant, id) = (Tenant::local(), "resp_1");
        for (at, gone) in [(5, false), (2, false), (2, true), (0, true), (0, false)] {
            let store = Arc::new(InMemory::default());
            let (archive, journal) = (Archive::new(store.clone()), Journal::stream(&tenant, id));
            for n in 0..6 {
                archive.append(&journal, n, &n).await.expect("it is put");
            }
            let bytes = store.get(&journal.entry(at)).await.expect("a store").expect("it is there");
            store.delete(&journal.entry(at)).await.expect("a store");
            if !gone {
                store.put_if_absent(&journal.entry(at), bytes.slice(..9)).await.expect("a store");
            }
            let Salvaged { entries, damage, behind } = archive.salvage::<u64>(&journal).await.expect("a store");
            assert_eq!((entries, behind), ((0..at).collect(), (at + 1..6).collect()));
            assert!(damage.is_some() && archive.entries::<u64>(&journal).await.is_err(), "{at} {gone}");
            archive.cut_stream(&tenant, id, at).await.expect("a store");
            assert_eq!(archive.entries::<u64>(&journal).await, Ok((0..at).collect()));
            assert_eq!(archive.append(&journal, at, &at).await, Ok(Put::Created));
            let aside = store.get(&format!("t/local/aside/{id}-{at}")).await.expect("a store");
            assert_eq!(aside, (!gone).then(|| bytes.slice(..9)));
        }
        // One that is gone at the end was never there.
        let store = Arc::new(InMemory::default());
        let (archive, journal) = (Archive::new(store.clone()), Journal::stream(&tenant, id));
        archive.append(&journal, 0, &0).await.expect("it is put");
        assert!(archive.salvage::<u64>(&journal).await.expect("a store").damage.is_none());
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
