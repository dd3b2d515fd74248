//! A store in a folder of the local file system.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path as Location;
use object_store::{GetOptions, GetResult, ObjectStore, ObjectStoreExt, PutMode};

use super::store::{check, is_name};
use super::{DiskFault, Error, Put, Start, Store};

/// Objects as files, made durable by fsync.
///
/// A put writes a staging file `name#1`, syncs it, links it to its name (which fails if the name is taken) and syncs
/// the folder; only then it returns. `object_store` does this part. `#` is in no key, so a staging file left behind by
/// a killed process is never read or listed. Folders are made and synced here, before the put, see `Folders`.
///
/// Several servers may share one folder, so there is no lock. The file system has to be able to make hard links. On
/// one that ignores letter case, keys that differ only in it are one key.
#[derive(Debug)]
pub struct Local {
    folder: PathBuf,
    /// Set when the folder is there, which a disk that is full at the start may put off.
    opened: OnceLock<Opened>,
}

#[derive(Debug)]
struct Opened {
    files: LocalFileSystem,
    folders: Arc<Folders>,
}

impl Local {
    /// Opens `folder`, making it (readable by its owner only) if it is not there, and writes a file to see that it
    /// can. Reads nothing: opening takes the same time whatever the folder holds.
    ///
    /// A disk that is full or read-only, or a folder that must not be written, is reported in the log and is no error: what is
    /// there can be read, and what cannot be written says so until that is mended.
    ///
    /// # Errors
    /// [`Error::Open`] if the folder cannot be made or written for another reason, such as a file in its place, or if it is
    /// not there and may not be made.
    pub async fn open(folder: impl Into<PathBuf>) -> Result<Self, Error> {
        let store = Self { folder: folder.into(), opened: OnceLock::new() };
        let probe = async {
            store.put_if_absent("probe", Bytes::from_static(b"can this folder be written?\n")).await?;
            store.delete("probe").await
        };
        let shown = store.folder.display().to_string();
        match probe.await {
            Ok(_) => {}
            // A folder that never was is no disk that has failed.
            Err(Error::Store { cause, fault: Some(fault), .. }) if store.is_opened() || fault != DiskFault::Denied => {
                tracing::warn!(
                    folder = shown,
                    cause,
                    "NO STATES WILL BE KEPT until this is mended, which needs no restart: {fault}. Answers and reading what is \
                     there still work"
                );
            }
            Err(Error::Store { cause, .. }) => return Err(Error::Open { folder: shown, cause }),
            Err(other) => return Err(Error::Open { folder: shown, cause: other.to_string() }),
        }
        Ok(store)
    }

    fn is_opened(&self) -> bool {
        self.opened.get().is_some()
    }

    /// The folder, which is made if it is not there.
    async fn opened(&self) -> io::Result<&Opened> {
        if let Some(opened) = self.opened.get() {
            return Ok(opened);
        }
        let wanted = self.folder.clone();
        let made = off_runtime(move || {
            let root = make_root(&wanted)?;
            let files = LocalFileSystem::new_with_prefix(&root).map_err(io::Error::other)?.with_fsync(true);
            Ok(Opened { files, folders: Arc::new(Folders { root, settled: Mutex::default() }) })
        });
        let made = made.await?;
        Ok(self.opened.get_or_init(|| made))
    }

    /// The folder, if it is there.
    async fn there(&self, key: &str) -> Result<Option<&Opened>, Error> {
        if !self.is_opened()
            && matches!(std::fs::symlink_metadata(&self.folder), Err(e) if e.kind() == ErrorKind::NotFound)
        {
            check(key)?;
            return Ok(None);
        }
        self.opened().await.map(Some).map_err(failed("open the folder of", key))
    }
}

impl Opened {
    /// Where a key lives, for `object_store` and for the file system. `.` and `..` become `%2E` and `%2E%2E`.
    fn locate(&self, key: &str) -> Result<(Location, PathBuf), Error> {
        check(key)?;
        let location = Location::from(key);
        let path = self.files.path_to_filesystem(&location).map_err(failed("locate", key))?;
        Ok((location, path))
    }

    /// Runs `work` on the folders of this store, away from the async runtime.
    async fn with_folders<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Folders) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let folders = self.folders.clone();
        off_runtime(move || work(&folders)).await
    }

    async fn sync(&self, folder: PathBuf) -> io::Result<()> {
        self.with_folders(move |_| sync_folder(&folder)).await
    }

    async fn find(&self, key: &str) -> Result<Option<GetResult>, Error> {
        let (location, _) = self.locate(key)?;
        match self.files.get_opts(&location, GetOptions::default()).await {
            Ok(found) => Ok(Some(found)),
            Err(e) if is_absent(&e) => Ok(None),
            Err(e) => Err(failed("read", key)(e)),
        }
    }
}

impl Store for Local {
    fn put_if_absent<'a>(&'a self, key: &'a str, value: Bytes) -> BoxFuture<'a, Result<Put, Error>> {
        async move {
            check(key)?;
            let at = self.opened().await.map_err(failed("make the folder of", key))?;
            let (location, path) = at.locate(key)?;
            let folder = folder_of(&path);
            if !at.folders.settled().contains(&folder) {
                let folder = folder.clone();
                let settled = at.with_folders(move |folders| folders.settle(&folder, sync_folder));
                settled.await.map_err(failed("make the folder of", key))?;
            }
            match at.files.put_opts(&location, value.into(), PutMode::Create.into()).await {
                Ok(_) => Ok(Put::Created),
                // Whoever made it may not have synced the folder yet; what we call existing must be durable.
                Err(object_store::Error::AlreadyExists { .. }) => {
                    at.sync(folder).await.map_err(failed("sync the folder of", key))?;
                    Ok(Put::Exists)
                }
                Err(e) => Err(failed("write", key)(e)),
            }
        }
        .boxed()
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, Error>> {
        async move {
            let Some(at) = self.there(key).await? else { return Ok(None) };
            let Some(found) = at.find(key).await? else { return Ok(None) };
            Ok(Some(found.bytes().await.map_err(failed("read", key))?))
        }
        .boxed()
    }

    fn get_start<'a>(&'a self, key: &'a str, len: usize) -> BoxFuture<'a, Result<Option<Start>, Error>> {
        async move {
            let Some(at) = self.there(key).await? else { return Ok(None) };
            let Some(mut found) = at.find(key).await? else { return Ok(None) };
            let size = found.meta.size;
            // Asking for a range instead would be an error for an empty file.
            found.range = 0..size.min(len as u64);
            Ok(Some(Start { bytes: found.bytes().await.map_err(failed("read", key))?, size }))
        }
        .boxed()
    }

    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, Error>> {
        async move {
            let Some(at) = self.there(key).await? else { return Ok(false) };
            let (location, path) = at.locate(key)?;
            match at.files.delete(&location).await {
                Ok(()) => {
                    // `object_store` syncs writes only.
                    at.sync(folder_of(&path)).await.map_err(failed("sync the folder of", key))?;
                    Ok(true)
                }
                Err(object_store::Error::NotFound { .. }) => Ok(false),
                Err(e) => Err(failed("delete", key)(e)),
            }
        }
        .boxed()
    }

    /// Reads names only. `object_store` would stat every file, which a page of a large folder does not need.
    fn children<'a>(
        &'a self,
        folder: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<String>, Error>> {
        async move {
            let Some(at) = self.there(folder).await? else { return Ok(Vec::new()) };
            let (_, path) = at.locate(folder)?;
            let after = after.map(str::to_string);
            let names = at.with_folders(move |_| names_in(&path, after.as_deref(), limit));
            names.await.map_err(failed("list", folder))
        }
        .boxed()
    }

    fn tidy<'a>(&'a self, folder: &'a str, before: u64) -> BoxFuture<'a, Result<u64, Error>> {
        async move {
            let Some(at) = self.there(folder).await? else { return Ok(0) };
            let (_, path) = at.locate(folder)?;
            at.with_folders(move |_| remove_staging(&path, before)).await.map_err(failed("tidy", folder))
        }
        .boxed()
    }
}

/// Which folders below the root are known to be on disk, with all the folders above them.
///
/// A folder that exists need not be durable: another put may have made it a moment ago and not synced the folder above
/// it yet, or a process may have been killed between the two. So each process settles every folder it writes to once.
#[derive(Debug)]
struct Folders {
    root: PathBuf,
    settled: Mutex<HashSet<PathBuf>>,
}

impl Folders {
    /// How many folders to remember. Forgetting costs a few needless syncs, so the set is simply emptied.
    const MOST: usize = 1 << 16;

    fn settled(&self) -> MutexGuard<'_, HashSet<PathBuf>> {
        // The set holds only finished facts, whatever panicked while it was locked.
        self.settled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `folder` and the folders above it, from the root down, each followed by a `sync` of the one it is in.
    fn settle(&self, folder: &Path, sync: impl Fn(&Path) -> io::Result<()>) -> io::Result<()> {
        let below: Vec<&Path> = folder.ancestors().take_while(|f| *f != self.root).collect();
        for folder in below.into_iter().rev() {
            if self.settled().contains(folder) {
                continue;
            }
            match std::fs::create_dir(folder) {
                Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
                _ => sync(&folder_of(folder))?,
            }
            let mut settled = self.settled();
            if settled.len() >= Self::MOST {
                settled.clear();
            }
            settled.insert(folder.into());
        }
        Ok(())
    }
}

/// Makes the folder of a store, with those above it, and returns its canonical path.
fn make_root(folder: &Path) -> io::Result<PathBuf> {
    let folder = std::path::absolute(folder)?;
    let missing: Vec<&Path> = folder.ancestors().take_while(|f| !f.exists()).collect();
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(&folder)?;
    for made in missing {
        sync_folder(&folder_of(made))?;
    }
    folder.canonicalize()
}

/// Whether nothing is there, also because a strange file stands where a folder would.
fn is_absent(error: &object_store::Error) -> bool {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    matches!(error, object_store::Error::NotFound { .. })
        || causes.filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|e| e.kind() == ErrorKind::NotADirectory)
}

/// The names in a folder that may be part of a key, so neither staging files nor strangers.
fn names_in(folder: &Path, after: Option<&str>, limit: usize) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(folder) {
        Err(e) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        // `object_store` writes `.` and `..` so, and on Windows the colon.
        let name = name.replace("%2E", ".").replace("%3A", ":");
        if is_name(&name) && after.is_none_or(|after| name.as_str() > after) {
            names.push(name);
        }
    }
    names.sort_unstable();
    names.truncate(limit);
    Ok(names)
}

/// Removes the staging files of puts that were cut off before `before`.
fn remove_staging(folder: &Path, before: u64) -> io::Result<u64> {
    let entries = match std::fs::read_dir(folder) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().contains('#') {
            continue;
        }
        // It may have become an object meanwhile.
        let Ok(modified) = entry.metadata().and_then(|file| file.modified()) else { continue };
        let modified = modified.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if modified <= before && std::fs::remove_file(entry.path()).is_ok() {
            tracing::warn!(file = %entry.path().display(), "removed what a write that was cut off had left");
            removed += 1;
        }
    }
    Ok(removed)
}

fn folder_of(path: &Path) -> PathBuf {
    path.parent().expect("what is below a root has a parent").into()
}

/// Makes the names in a folder durable. Only Unix can and has to.
fn sync_folder(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    std::fs::File::open(folder)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

async fn off_runtime<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn failed<E: std::error::Error + 'static>(doing: &'static str, key: &str) -> impl FnOnce(E) -> Error {
    move |e| Error::Store { doing, key: key.into(), cause: e.to_string(), fault: DiskFault::of(&e) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Settles `folder` and returns what was synced, relative to the root; syncing `broken` fails.
    fn settle(folders: &Folders, folder: &str, broken: Option<&str>) -> (io::Result<()>, Vec<String>) {
        let synced = Mutex::new(Vec::new());
        let result = folders.settle(&folders.root.join(folder), |path| {
            let name = path.strip_prefix(&folders.root).unwrap().display().to_string();
            if broken == Some(&name) {
                return Err(io::Error::other("sync failed"));
            }
            synced.lock().unwrap().push(name);
            Ok(())
        });
        (result, synced.into_inner().unwrap())
    }

    #[test]
    fn every_folder_above_is_synced_once_even_when_it_was_already_there() {
        let root = tempfile::tempdir().unwrap();
        let folders = Folders { root: root.path().into(), settled: Mutex::default() };
        // Made by somebody who may not have synced it.
        std::fs::create_dir(root.path().join("t")).unwrap();

        let (result, synced) = settle(&folders, "t/local/states", None);
        result.unwrap();
        assert_eq!(synced, ["", "t", "t/local"]);
        assert!(root.path().join("t/local/states").is_dir());
        assert_eq!(settle(&folders, "t/local/states", None).1, Vec::<String>::new());
        assert_eq!(settle(&folders, "t/local/sessions", None).1, ["t/local"]);
    }

    #[test]
    fn a_folder_whose_sync_failed_is_synced_again() {
        let root = tempfile::tempdir().unwrap();
        let folders = Folders { root: root.path().into(), settled: Mutex::default() };
        assert!(settle(&folders, "t/local", Some("t")).0.is_err());
        let (result, synced) = settle(&folders, "t/local", None);
        result.unwrap();
        assert_eq!(synced, ["t"]);
    }

    #[test]
    fn the_set_of_known_folders_is_bounded() {
        let root = tempfile::tempdir().unwrap();
        let folders = Folders { root: root.path().into(), settled: Mutex::default() };
        folders.settled().extend((0..Folders::MOST).map(|i| PathBuf::from(i.to_string())));
        settle(&folders, "t", None).0.unwrap();
        assert_eq!(folders.settled().len(), 1);
    }
}
