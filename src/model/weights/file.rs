//! The bytes of a checkpoint file and where the tensors are in them.

use std::borrow::Cow;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use super::Error;
use crate::model::kernels::{Backing, Kind};
use crate::types::readable;

/// Where a file keeps one tensor, under the file's own name for it. Readers have checked that the bytes are inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub name: String,
    pub kind: Kind,
    pub shape: Vec<usize>,
    /// In values, where they do not follow each other row by row.
    pub strides: Option<Vec<usize>>,
    pub bytes: Range<usize>,
}

/// An error about a file, in which something out of it may stand.
pub fn wrong(path: &Path, why: &str) -> Error {
    Error::Format { path: path.display().to_string(), why: readable(why) }
}

/// All of a plain file of at most `most` bytes, such as a configuration.
///
/// # Errors
/// [`Error::Unreadable`]; [`Error::Format`] for what is larger, or no plain file: a pipe would wait for somebody to write
/// to it, and a device never end.
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>, Error> {
    let unreadable = |e: std::io::Error| Error::Unreadable { path: path.display().to_string(), why: e.to_string() };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(wrong(path, "it is not a regular file"));
    }
    if metadata.len() > most {
        return Err(wrong(path, &format!("{} bytes are too many for such a file", metadata.len())));
    }
    std::fs::read(path).map_err(unreadable)
}

/// A file that is mapped into memory, so that its size costs no memory of its own, or is there already.
pub struct File {
    pub path: PathBuf,
    bytes: Bytes,
}

enum Bytes {
    Mapped(memmap2::Mmap),
    Memory(Cow<'static, [u8]>),
}

impl File {
    /// # Errors
    /// [`Error::Unreadable`]; [`Error::Format`] for what is no regular file, such as a pipe, which would wait for somebody
    /// to write to it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let unreadable = |e: std::io::Error| Error::Unreadable { path: path.display().to_string(), why: e.to_string() };
        if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
            return Err(Error::Format { path: path.display().to_string(), why: "it is not a regular file".into() });
        }
        let file = std::fs::File::open(path).map_err(unreadable)?;
        // SAFETY: the map is read-only and private. A file that another process shortens while it is mapped would fault,
        // as with every memory-mapped loader; checkpoints are not edited while they are loaded.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(unreadable)?;
        Ok(Self { path: path.into(), bytes: Bytes::Mapped(map) })
    }

    /// Bytes that are in memory already, called `name`.
    pub fn in_memory(name: &str, bytes: Cow<'static, [u8]>) -> Self {
        Self { path: name.into(), bytes: Bytes::Memory(bytes) }
    }

    /// An error about this file.
    pub fn wrong(&self, why: String) -> Error {
        wrong(&self.path, &why)
    }

    /// Lets go of the memory behind a range that was read, which the next reader takes from the file again.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Bytes::Mapped(map) = &self.bytes {
            // SAFETY: the map is read-only and of a file: its pages can be dropped and read again at any time.
            let advised =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
            // Advice that is not taken costs memory, nothing else.
            let _ = advised;
        }
    }
}

impl Backing for File {
    fn release(&self, bytes: &[u8]) {
        let inside = self.as_ptr_range();
        let of = bytes.as_ptr_range();
        if inside.contains(&of.start) && of.end <= inside.end {
            let from = of.start.addr() - inside.start.addr();
            File::release(self, from..from + bytes.len());
        }
    }
}

impl Deref for File {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Memory(bytes) => bytes,
        }
    }
}
