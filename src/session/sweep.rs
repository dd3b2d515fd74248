//! The background sweep: removes what nobody can ask for any more, a little at a time.
//!
//! A process that is killed leaves a snapshot that no record names, or half a file that no reader sees; states expire;
//! deleted sessions leave records that a running turn might still have needed. None of it is in anybody's way, so nothing
//! waits for it: the sweep begins when the server is ready, looks at a few objects, rests, and goes on.
//!
//! It removes nothing that a fork or a running turn needs: forks leave marks before they are committed, turns have read
//! what they begin from, and what is new has a period of grace that is longer than any turn.

use std::collections::VecDeque;

use super::retain::SweepPace;
use super::{Error, Sessions};
use crate::state::Remnant;
use crate::telemetry::{clock, metrics};
use crate::types::{SessionId, StateId, Tenant};

/// What a sweep found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    pub expired: u64,
    /// States that no record names: their turn was cut off before it was committed.
    pub orphans: u64,
    /// Damaged states and journals, moved out of the way.
    pub set_aside: u64,
    /// Files that interrupted writes left.
    pub torn: u64,
    /// Records and states of deleted sessions.
    pub buried: u64,
}

/// One thing to look at.
enum Task {
    Tenant(Tenant),
    States(Tenant, Option<String>),
    Sessions(Tenant, Option<String>),
    State(Tenant, StateId),
    Session(Tenant, SessionId),
    Streams(Tenant),
    Stream(Tenant, String),
    Folder(String),
}

/// What could not be swept: the next round comes by again, and a disk that is full or read-only fails at every object.
#[derive(Default)]
struct Failures {
    count: u64,
    first: Option<Error>,
}

impl Failures {
    fn note(&mut self, swept: Result<(), Error>) {
        if let Err(error) = swept {
            self.count += 1;
            self.first.get_or_insert(error);
        }
    }

    /// One line for a round.
    fn report(self) {
        if let Some(error) = self.first {
            let detail = error.detail();
            tracing::warn!(objects = self.count, %error, detail, "some of the store could not be swept");
        }
    }
}

/// Names that are listed in one go: listing costs the same for few as for many.
const PAGE: usize = 4096;

impl Sessions {
    /// Sweeps again and again, until the server drains.
    pub async fn sweep_always(&self, pace: SweepPace) {
        while !self.draining() {
            let mut tasks = VecDeque::new();
            let (mut swept, mut failures) = (Swept::default(), Failures::default());
            failures.note(self.tenants(&mut tasks).await);
            while !tasks.is_empty() && !self.draining() {
                for _ in 0..pace.batch {
                    let Some(task) = tasks.pop_front() else { break };
                    failures.note(self.sweep_one(task, &mut tasks, &mut swept).await);
                }
                tokio::time::sleep(pace.rest).await;
            }
            if swept != Swept::default() {
                tracing::info!(?swept, "the store was swept");
            }
            failures.report();
            tokio::time::sleep(pace.pause).await;
        }
    }

    /// Sweeps everything once.
    pub async fn sweep(&self) -> Result<Swept, Error> {
        let (mut tasks, mut swept, mut failures) = (VecDeque::new(), Swept::default(), Failures::default());
        self.tenants(&mut tasks).await?;
        while let Some(task) = tasks.pop_front() {
            failures.note(self.sweep_one(task, &mut tasks, &mut swept).await);
        }
        failures.report();
        Ok(swept)
    }

    async fn tenants(&self, tasks: &mut VecDeque<Task>) -> Result<(), Error> {
        let names = self.archive.names("t", None, usize::MAX).await?;
        tasks.extend(names.into_iter().filter_map(|name| Tenant::parse(name).ok()).map(Task::Tenant));
        Ok(())
    }

    async fn sweep_one(&self, task: Task, tasks: &mut VecDeque<Task>, swept: &mut Swept) -> Result<(), Error> {
        let now = clock::unix_seconds();
        match task {
            Task::Tenant(tenant) => {
                let folders =
                    ["states", "evicted", "deleted"].map(|folder| Task::Folder(format!("t/{tenant}/{folder}")));
                let all =
                    [Task::States(tenant.clone(), None), Task::Sessions(tenant.clone(), None), Task::Streams(tenant)];
                first(tasks, folders.into_iter().chain(all));
            }
            Task::States(tenant, after) => {
                let names = self.archive.names(&format!("t/{tenant}/states"), after.as_deref(), PAGE).await?;
                let more = names.last().cloned().filter(|_| names.len() == PAGE);
                let ids = names.into_iter().filter_map(|name| StateId::parse(name).ok());
                let of = tenant.clone();
                let more = more.map(|last| Task::States(tenant, Some(last)));
                first(tasks, ids.map(|id| Task::State(of.clone(), id)).chain(more));
            }
            Task::Sessions(tenant, after) => {
                let names = self.archive.names(&format!("t/{tenant}/sessions"), after.as_deref(), PAGE).await?;
                let more = names.last().cloned().filter(|_| names.len() == PAGE);
                let ids = names.into_iter().filter_map(|name| SessionId::parse(name).ok());
                let of = tenant.clone();
                let more = more.map(|last| Task::Sessions(tenant, Some(last)));
                first(tasks, ids.map(|id| Task::Session(of.clone(), id)).chain(more));
            }
            Task::Streams(tenant) => {
                let names = self.archive.names(&format!("t/{tenant}/streams"), None, usize::MAX).await?;
                first(tasks, names.into_iter().map(|id| Task::Stream(tenant.clone(), id)));
            }
            Task::Stream(tenant, id) => {
                self.sweep_folder(&format!("t/{tenant}/streams/{id}"), now, swept).await?;
                if let Some(why) = self.sweep_stream(&tenant, &id).await? {
                    tracing::warn!(%tenant, response = id, why, "a damaged journal is set aside");
                    swept.set_aside += 1;
                    metrics::swept("set_aside", 1);
                }
            }
            Task::State(tenant, id) => self.sweep_state(&tenant, &id, now, swept).await?,
            Task::Session(tenant, id) => {
                self.remove_left(&tenant, &id).await?;
                let gone = self.archive.reclaim(&tenant, &id, now).await?;
                let gone = gone.states + gone.records;
                swept.buried += gone;
                if gone > 0 {
                    self.policy.quotas.count_again(&tenant).await;
                    metrics::swept("buried", gone);
                }
                for folder in ["sessions", "forks", "keys"] {
                    self.sweep_folder(&format!("t/{tenant}/{folder}/{id}"), now, swept).await?;
                }
            }
            Task::Folder(folder) => self.sweep_folder(&folder, now, swept).await?,
        }
        Ok(())
    }

    async fn sweep_folder(&self, folder: &str, now: u64, swept: &mut Swept) -> Result<(), Error> {
        let torn = self.archive.tidy(folder, now).await?;
        if torn > 0 {
            swept.torn += torn;
            metrics::swept("torn", torn);
        }
        Ok(())
    }

    async fn sweep_state(&self, tenant: &Tenant, id: &StateId, now: u64, swept: &mut Swept) -> Result<(), Error> {
        let (count, what) = match self.archive.remnant(tenant, id, now).await? {
            None => return Ok(()),
            Some(Remnant::Expired) => (&mut swept.expired, "expired"),
            Some(Remnant::Orphan) => (&mut swept.orphans, "orphan"),
            Some(Remnant::Damaged(why)) => {
                tracing::warn!(%tenant, state = %id, why, "a damaged state is set aside");
                (&mut swept.set_aside, "set_aside")
            }
        };
        *count += 1;
        metrics::swept(what, 1);
        self.policy.quotas.count_again(tenant).await;
        Ok(())
    }

    fn draining(&self) -> bool {
        self.readiness() == super::Readiness::Draining
    }
}

/// Puts what is to be done next before everything else: so no more than a page of each kind is ever waiting.
fn first(tasks: &mut VecDeque<Task>, new: impl Iterator<Item = Task>) {
    let new: Vec<Task> = new.collect();
    new.into_iter().rev().for_each(|task| tasks.push_front(task));
}
