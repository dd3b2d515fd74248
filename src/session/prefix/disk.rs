//! What there is no room for in memory goes to disk, and is found there again, by the next process too.
//!
//! ```text
//! t/{tenant}/{root}/{depth}-{saves}-{text}      one state, as an exact snapshot file
//! ```
//!
//! The name says what the state has read: `root` and `text` are hashes of what the text continues and of its ids. So there is no
//! index to keep: when a server has started, names are looked through in the background, and what was not seen yet is not
//! found yet. Files are written one after another by a task of their own; whoever gives something up never waits for it, and when
//! it cannot keep up, states are lost as they would be without a disk. A file is believed only when all of it is what its
//! name says; any other is removed and counted.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use super::forget::{Forgotten, Way};
use super::ledger::{Beginnings, Label, Ledger, Mark};
use super::shelf::{Gone, Was};
use super::{Model, Source};
use crate::engine::arithmetic;
use crate::state::{self, Damaged, Error, Put, Store, fits};
use crate::telemetry::{clock, metrics};
use crate::types::{Memory, Pending, Snapshot, SnapshotHead, StateId, Tenant};

/// Bytes of states that may wait to be written, beside the first.
const WAITING: u64 = 128 << 20;

/// Names that are looked through in one go.
const PAGE: usize = 1024;

/// Seconds after which a file that is half written is taken for one that will never be whole.
const TORN_S: u64 = 3600;

/// The key of a file's text in its metadata, so that a file under another's name is not believed.
const TEXT: &str = "text";

/// States on disk.
pub(super) struct Disk {
    store: Arc<dyn Store>,
    ledger: Mutex<Ledger>,
    /// To the task that writes.
    filing: mpsc::UnboundedSender<Task>,
    /// What that has still to do: bytes to be written, or anything else.
    due: watch::Sender<Due>,
    complaints: clock::Rarely,
}

/// One after the other, so that what is forgotten is not written by what was to be written before.
enum Task {
    Write(Gone),
    Forget(Tenant, Forgotten),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Due {
    survey: bool,
    forgets: u64,
    states: u64,
    bytes: u64,
}

impl Disk {
    /// States in `store`, of at most `room` bytes. Begins to look what is there.
    pub fn open(store: Arc<dyn Store>, room: u64) -> Arc<Self> {
        let (filing, mut arrivals) = mpsc::unbounded_channel();
        let due = watch::Sender::new(Due { survey: true, ..Due::default() });
        let disk = Arc::new(Self {
            store,
            ledger: Mutex::new(Ledger::new(room)),
            filing,
            due,
            complaints: clock::Rarely::default(),
        });
        let weak = Arc::downgrade(&disk);
        tokio::spawn(async move {
            if let Some(disk) = weak.upgrade() {
                if let Err(error) = disk.survey().await {
                    tracing::warn!(%error, "not all states of texts that are on disk were found");
                }
                disk.due.send_modify(|due| due.survey = false);
            }
            // Nothing is written before all is known, so that the bound holds at any time.
            while let Some(task) = arrivals.recv().await {
                let Some(disk) = weak.upgrade() else { return };
                match task {
                    Task::Write(gone) => {
                        let bytes = gone.memory.bytes();
                        disk.write_now(gone).await;
                        disk.due.send_modify(|due| (due.states, due.bytes) = (due.states - 1, due.bytes - bytes));
                    }
                    Task::Forget(tenant, forgotten) => {
                        disk.forget_now(&tenant, &forgotten).await;
                        disk.due.send_modify(|due| due.forgets -= 1);
                    }
                }
            }
        });
        disk
    }

    /// Takes what was given up in memory. Waits for nothing.
    pub fn file(&self, gone: Gone) {
        if gone.was.is_none() {
            return;
        }
        let bytes = gone.memory.bytes();
        let taken = self.due.send_if_modified(|due| {
            let taken = due.states == 0 || due.bytes.saturating_add(bytes) <= WAITING;
            if taken {
                (due.states, due.bytes) = (due.states + 1, due.bytes + bytes);
            }
            taken
        });
        // The task ends with the process.
        if !taken || self.filing.send(Task::Write(gone)).is_err() {
            metrics::prefix_disk_lost();
        }
    }

    /// Removes what was deleted, when all that was taken before is written. Waits for nothing.
    pub fn forget(&self, tenant: Tenant, forgotten: Forgotten) {
        self.due.send_modify(|due| due.forgets += 1);
        if self.filing.send(Task::Forget(tenant, forgotten)).is_err() {
            tracing::warn!("what was deleted could not be removed from the disk's states of texts");
        }
    }

    async fn forget_now(&self, tenant: &Tenant, Forgotten { roots, ways }: &Forgotten) {
        let mut gone = Vec::new();
        {
            let ledger = self.ledger();
            for root in roots {
                gone.extend(ledger.all(tenant, Mark::of_root(root, arithmetic())));
            }
            for Way { root, ids, shared } in ways {
                let root = Mark::of_root(root, arithmetic());
                let mut most = ids.len();
                while let Some((label, saves)) = ledger.find(tenant, root, ids, (*shared, most)) {
                    most = label.depth - 1;
                    gone.push((label, saves));
                }
            }
        }
        for (label, saves) in gone {
            self.ledger().forget(tenant, &label);
            self.delete(&key(tenant, &label, saves)).await;
        }
        self.report(0);
    }

    /// Puts a state on disk. That it cannot be is no error of anybody's request.
    pub async fn write_now(&self, gone: Gone) {
        if let Err(error) = self.write(gone).await {
            metrics::prefix_disk_lost();
            self.complain(&error, "states of texts cannot be put on disk");
        }
    }

    /// Waits until all that was on disk is known and all that was taken is written.
    pub async fn settled(&self) {
        // An error would be that the sender is gone, which is here.
        let _ = self.due.subscribe().wait_for(|due| *due == Due::default()).await;
    }

    /// The state that has read most of a text, if that is at least `least` ids, and how many.
    pub async fn fetch(
        &self,
        source: &Source,
        ids: &[u32],
        least: usize,
        model: &Model,
    ) -> Option<(usize, Arc<Memory>)> {
        let (tenant, root) = (&source.tenant, Mark::of_root(&source.root, arithmetic()));
        // The last token must be read anyhow.
        let range = (least.saturating_sub(1), ids.len().saturating_sub(1));
        let (label, saves) = self.ledger().find(tenant, root, ids, range)?;
        let key = key(tenant, &label, saves);
        let file = match self.store.get(&key).await {
            Ok(file) => file,
            Err(error) => {
                self.complain(&error, "states of texts cannot be read from disk");
                return None;
            }
        };
        let Some(file) = file else {
            // Another server that keeps its states here needed the room.
            self.ledger().forget(tenant, &label);
            return None;
        };
        match read(file, &label, source, ids, model).await {
            Ok(memory) => {
                self.ledger().touch(tenant, &label);
                metrics::prefix_disk_hit(&source.model);
                Some((label.depth, Arc::new(memory)))
            }
            Err(Damaged(why)) => {
                tracing::warn!(key, why, "a state of a text is damaged and is removed");
                metrics::prefix_disk_damaged();
                self.ledger().forget(tenant, &label);
                self.delete(&key).await;
                self.report(0);
                None
            }
        }
    }

    /// Looks through all names.
    async fn survey(&self) -> Result<(), Error> {
        for owner in self.store.children("t", None, usize::MAX).await? {
            let Ok(tenant) = Tenant::parse(&owner) else { continue };
            for folder in self.store.children(&format!("t/{owner}"), None, usize::MAX).await? {
                let Some(root) = Mark::parse(&folder) else { continue };
                let folder = format!("t/{owner}/{folder}");
                self.store.tidy(&folder, clock::unix_seconds().saturating_sub(TORN_S)).await?;
                let mut after = None;
                loop {
                    let names = self.store.children(&folder, after.as_deref(), PAGE).await?;
                    for name in &names {
                        self.adopt(&tenant, root, name, &format!("{folder}/{name}")).await?;
                    }
                    match names.last() {
                        Some(last) if names.len() == PAGE => after = Some(last.clone()),
                        _ => break,
                    }
                }
            }
        }
        Ok(())
    }

    async fn adopt(&self, tenant: &Tenant, root: Mark, name: &str, key: &str) -> Result<(), Error> {
        let Some((depth, saves, text)) = parts(name) else { return Ok(()) };
        let Some(start) = self.store.get_start(key, 0).await? else { return Ok(()) };
        self.note(tenant, &Label { root, depth, text }, (saves, start.size)).await;
        Ok(())
    }

    async fn write(&self, Gone { memory, was }: Gone) -> Result<(), Error> {
        let Some(Was { tenant, root, ids, saves }) = was else { return Ok(()) };
        let text = Beginnings::new(&ids).mark(ids.len());
        let label = Label { root: Mark::of_root(&root, arithmetic()), depth: ids.len(), text };
        if self.ledger().has(&tenant, &label) {
            return Ok(());
        }
        let head = SnapshotHead {
            id: StateId::new(clock::unix_millis(), clock::random_u128()),
            parent: None,
            owner: tenant.clone(),
            model: String::new(),
            fingerprint: root.fingerprint,
            arithmetic: arithmetic().into(),
            session: None,
            record: None,
            turn: 1,
            created: clock::unix_seconds(),
            expires_at: None,
            metadata: [(TEXT.to_owned(), text_of(&label))].into(),
        };
        let key = key(&tenant, &label, saves);
        let encoded = tokio::task::spawn_blocking(move || {
            let memory = Arc::unwrap_or_clone(memory);
            state::encode(&Snapshot { head, memory })
        });
        let unfit = |why: String| Error::Unfit { key: key.clone(), why };
        let file = encoded.await.map_err(|e| unfit(e.to_string()))?.map_err(|Damaged(why)| unfit(why))?;
        let bytes = file.len() as u64;
        if !self.ledger().fits(bytes) {
            return Ok(());
        }
        if self.store.put_if_absent(&key, Bytes::from(file)).await? == Put::Created {
            metrics::prefix_disk_written();
        }
        self.note(&tenant, &label, (saves, bytes)).await;
        Ok(())
    }

    /// Notes a file that is there, and removes those that have to go for it.
    async fn note(&self, tenant: &Tenant, label: &Label, what: (usize, u64)) {
        let gone = self.ledger().add(tenant, label, what);
        for (tenant, label, saves) in &gone {
            self.delete(&key(tenant, label, *saves)).await;
        }
        self.report(gone.len() as u64);
    }

    async fn delete(&self, key: &str) {
        if let Err(error) = self.store.delete(key).await {
            self.complain(&error, "states of texts cannot be removed from disk");
        }
    }

    /// While a disk is full or read-only it is so for every state.
    fn complain(&self, error: &Error, what: &str) {
        if self.complaints.now() {
            tracing::warn!(%error, "{what}; for some minutes this is not said again");
        } else {
            tracing::debug!(%error, "{what}");
        }
    }

    fn report(&self, evicted: u64) {
        let (bytes, files) = {
            let ledger = self.ledger();
            (ledger.bytes(), ledger.files())
        };
        metrics::prefix_disk_holds(bytes, files, evicted);
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The memory in a file, if it is the one that `source`'s text has after so many of `ids`.
async fn read(file: Bytes, label: &Label, source: &Source, ids: &[u32], model: &Model) -> Result<Memory, Damaged> {
    let decoded = tokio::task::spawn_blocking(move || state::decode(&file)).await;
    let Snapshot { head, memory } = decoded.map_err(|e| Damaged(e.to_string()))??;
    let (text, computed_by) = (text_of(label), head.arithmetic.as_str());
    if head.metadata.get(TEXT) != Some(&text) || head.owner != source.tenant {
        return Err(Damaged("it is the state of another text or tenant".into()));
    }
    if head.fingerprint != source.root.fingerprint || computed_by != arithmetic() {
        return Err(Damaged(format!("other weights or another arithmetic ({computed_by}) have computed it")));
    }
    let read = source.consumed + label.depth as u64;
    if memory.consumed != read || memory.tail != source.recent(&ids[..label.depth]) {
        return Err(Damaged(format!("it has read {} tokens, and not the {read} of its text", memory.consumed)));
    }
    if memory.pending != Pending::default() || !memory.counts.is_empty() {
        return Err(Damaged("something waits to be read in it".into()));
    }
    fits(&memory, &model.layout, model.card.vocabulary)?;
    Ok(memory)
}

fn text_of(Label { root, depth, text }: &Label) -> String {
    format!("{root}/{depth}-{text}")
}

fn key(tenant: &Tenant, Label { root, depth, text }: &Label, saves: usize) -> String {
    format!("t/{tenant}/{root}/{depth}-{saves}-{text}")
}

/// Depth, savings and text of a file's name.
fn parts(name: &str) -> Option<(usize, usize, Mark)> {
    let (depth, rest) = name.split_once('-')?;
    let (saves, text) = rest.split_once('-')?;
    Some((depth.parse().ok()?, saves.parse().ok()?, Mark::parse(text)?))
}
