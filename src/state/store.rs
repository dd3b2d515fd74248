//! The seam to whatever keeps bytes.

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt, ready};

use super::Error;

/// Immutable objects under `/`-separated keys, in folders that need not be made first.
///
/// The contract, which every implementation is tested against:
///
/// * **Keys** are segments of 1 to 200 characters of `A-Z a-z 0-9 _ . : -`, joined by `/`; anything else is
///   [`Error::Key`]. Every segment is a name, `.` and `..` too: no key reaches outside its folder.
/// * **Atomic**: an object is seen whole or not at all, by readers, by listings and after a crash at any moment.
/// * **Durable**: when `put_if_absent` returns `Ok`, with either answer, the object under the key survives a power
///   cut, and so do the folders it is in. After `delete` returns, the object stays gone.
/// * **Once**: of any number of puts of one key, at once or over time, by any number of processes, exactly one is
///   told [`Put::Created`]. Objects are never changed.
/// * **Errors**: after a failed put the key is absent or holds the whole value; the caller may try again.
/// * No call blocks the async runtime.
pub trait Store: Send + Sync + 'static {
    /// Stores `value` unless the key is taken.
    fn put_if_absent<'a>(&'a self, key: &'a str, value: Bytes) -> BoxFuture<'a, Result<Put, Error>>;

    /// The whole object, or `None` if there is none.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, Error>>;

    /// The first `len` bytes of an object (all of it if it is shorter) and how long it is.
    fn get_start<'a>(&'a self, key: &'a str, len: usize) -> BoxFuture<'a, Result<Option<Start>, Error>>;

    /// Removes an object and says whether there was one.
    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, Error>>;

    /// Names of the objects and folders directly in `folder`, in ascending byte order of the names: at most `limit`
    /// of those greater than `after`. A missing folder is an empty one; a folder may be listed though it is empty.
    fn children<'a>(
        &'a self,
        folder: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<String>, Error>>;

    /// Removes what writes that were cut off before `before` (Unix seconds) left directly in `folder`, and says how many
    /// there were. No reader sees these; a store whose writes leave nothing has nothing to do.
    fn tidy<'a>(&'a self, folder: &'a str, before: u64) -> BoxFuture<'a, Result<u64, Error>> {
        let _ = (folder, before);
        ready(Ok(0)).boxed()
    }
}

/// What a put found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// The key was free and now holds the value.
    Created,
    /// The key was taken and still holds what it held.
    Exists,
}

/// The beginning of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    pub bytes: Bytes,
    /// Bytes of the whole object.
    pub size: u64,
}

/// Checks a key, or a folder, against the rule of [`Store`].
pub(super) fn check(key: &str) -> Result<(), Error> {
    if key.split('/').all(is_name) { Ok(()) } else { Err(Error::Key(key.into())) }
}

/// Whether `segment` may be one segment of a key.
pub(super) fn is_name(segment: &str) -> bool {
    (1..=200).contains(&segment.len()) && segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.:-".contains(&b))
}
