//! Hostile doubles of the store: each wraps a real one and breaks one promise of its contract.
#![allow(dead_code)] // Each test program uses some of them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use rewake::state::{DiskFault, Error, Put, Start, Store};

/// Writes down what is asked of a store, in order.
pub struct Recording<S> {
    inner: S,
    log: Mutex<Vec<Op>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A put was asked for.
    PutBegun(String),
    /// A put returned: from here on its object must survive everything.
    PutDone(String, Put),
    PutFailed(String),
    Read(String),
    Deleted(String),
    Listed(String),
}

impl Op {
    /// The key or folder it is about.
    pub fn key(&self) -> &str {
        match self {
            Self::PutBegun(key) | Self::PutDone(key, _) | Self::PutFailed(key) => key,
            Self::Read(key) | Self::Deleted(key) | Self::Listed(key) => key,
        }
    }
}

impl<S> Recording<S> {
    pub fn new(inner: S) -> Self {
        Self { inner, log: Mutex::default() }
    }
    pub fn log(&self) -> Vec<Op> {
        self.log.lock().unwrap().clone()
    }
    pub fn forget(&self) {
        self.log.lock().unwrap().clear();
    }
    fn note(&self, op: Op) {
        self.log.lock().unwrap().push(op);
    }
}

impl<S: Store> Store for Recording<S> {
    fn put_if_absent<'a>(&'a self, key: &'a str, value: Bytes) -> BoxFuture<'a, Result<Put, Error>> {
        async move {
            self.note(Op::PutBegun(key.into()));
            let result = self.inner.put_if_absent(key, value).await;
            self.note(match &result {
                Ok(put) => Op::PutDone(key.into(), *put),
                Err(_) => Op::PutFailed(key.into()),
            });
            result
        }
        .boxed()
    }
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, Error>> {
        self.note(Op::Read(key.into()));
        self.inner.get(key)
    }
    fn get_start<'a>(&'a self, key: &'a str, len: usize) -> BoxFuture<'a, Result<Option<Start>, Error>> {
        self.note(Op::Read(key.into()));
        self.inner.get_start(key, len)
    }
    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, Error>> {
        self.note(Op::Deleted(key.into()));
        self.inner.delete(key)
    }
    fn children<'a>(
        &'a self,
        folder: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<String>, Error>> {
        self.note(Op::Listed(folder.into()));
        self.inner.children(folder, after, limit)
    }
}

/// Forwards what a double does not change.
macro_rules! forward {
    ($($method:ident),*) => { $(forward!(@ $method);)* };
    (@ get) => {
        fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, Error>> {
            self.inner.get(key)
        }
    };
    (@ get_start) => {
        fn get_start<'a>(&'a self, key: &'a str, len: usize) -> BoxFuture<'a, Result<Option<Start>, Error>> {
            self.inner.get_start(key, len)
        }
    };
    (@ put_if_absent) => {
        fn put_if_absent<'a>(&'a self, key: &'a str, value: Bytes) -> BoxFuture<'a, Result<Put, Error>> {
            self.inner.put_if_absent(key, value)
        }
    };
    (@ delete) => {
        fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, Error>> {
            self.inner.delete(key)
        }
    };
    (@ children) => {
        fn children<'a>(
            &'a self,
            folder: &'a str,
            after: Option<&'a str>,
            limit: usize,
        ) -> BoxFuture<'a, Result<Vec<String>, Error>> {
            self.inner.children(folder, after, limit)
        }
    };
}

/// A disk that fails while [`Failing::fail`] says so. Full, or read-only: puts and deletes fail and change nothing.
pub struct Failing<S> {
    inner: S,
    broken: AtomicBool,
    /// Whether reading fails too, as where a permission was lost.
    unreadable: AtomicBool,
    /// Only keys with this in them.
    only: Mutex<String>,
}

impl<S> Failing<S> {
    pub fn new(inner: S) -> Self {
        let (broken, unreadable) = (AtomicBool::new(true), AtomicBool::new(false));
        Self { inner, broken, unreadable, only: Mutex::default() }
    }
    pub fn fail(&self, broken: bool) {
        self.broken.store(broken, Ordering::SeqCst);
    }
    pub fn unreadable(&self, unreadable: bool) {
        self.unreadable.store(unreadable, Ordering::SeqCst);
    }
    pub fn only(&self, part: &str) {
        *self.only.lock().unwrap() = part.into();
    }
    fn check(&self, doing: &'static str, key: &str) -> Result<(), Error> {
        const ENOSPC: i32 = 28;
        const EACCES: i32 = 13;
        let broken = match doing {
            "read" | "list" => self.unreadable.load(Ordering::SeqCst),
            _ => self.broken.load(Ordering::SeqCst) && key.contains(&*self.only.lock().unwrap()),
        };
        let errno = if self.unreadable.load(Ordering::SeqCst) { EACCES } else { ENOSPC };
        let cause = std::io::Error::from_raw_os_error(errno);
        let fault = DiskFault::of(&cause);
        if broken { Err(Error::Store { doing, key: key.into(), cause: cause.to_string(), fault }) } else { Ok(()) }
    }
}

impl<S: Store> Store for Failing<S> {
    fn put_if_absent<'a>(&'a self, key: &'a str, value: Bytes) -> BoxFuture<'a, Result<Put, Error>> {
        async move {
            self.check("write", key)?;
            self.inner.put_if_absent(key, value).await
        }
        .boxed()
    }
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, Error>> {
        async move {
            self.check("read", key)?;
            self.inner.get(key).await
        }
        .boxed()
    }
    fn get_start<'a>(&'a self, key: &'a str, len: usize) -> BoxFuture<'a, Result<Option<Start>, Error>> {
        async move {
            self.check("read", key)?;
            self.inner.get_start(key, len).await
        }
        .boxed()
    }
    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, Error>> {
        async move {
            self.check("delete", key)?;
            self.inner.delete(key).await
        }
        .boxed()
    }
    fn children<'a>(
        &'a self,
        folder: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<String>, Error>> {
        async move {
            self.check("list", folder)?;
            self.inner.children(folder, after, limit).await
        }
        .boxed()
    }
}

/// A store without atomic writes that dies in the middle of each: half the object stays under its name.
pub struct Torn<S> {
    inner: S,
}

impl<S> Torn<S> {
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S: Store> Store for Torn<S> {
    fn put_if_absent<'a>(&'a self, key: &'a str, value: Bytes) -> BoxFuture<'a, Result<Put, Error>> {
        async move {
            self.inner.put_if_absent(key, value.slice(..value.len() / 2)).await?;
            Err(Error::Store { doing: "write", key: key.into(), cause: "the power went out".into(), fault: None })
        }
        .boxed()
    }
    forward!(get, get_start, delete, children);
}

/// A disk that returns one bit of every object wrong.
pub struct Corrupting<S> {
    inner: S,
    bit: AtomicUsize,
}

impl<S> Corrupting<S> {
    pub fn new(inner: S) -> Self {
        Self { inner, bit: AtomicUsize::new(0) }
    }
    /// Which bit, counted from the start of the object. Shorter objects are returned as they are.
    pub fn flip(&self, bit: usize) {
        self.bit.store(bit, Ordering::SeqCst);
    }
    fn corrupt(&self, bytes: Bytes) -> Bytes {
        let bit = self.bit.load(Ordering::SeqCst);
        let mut bytes = bytes.to_vec();
        if let Some(byte) = bytes.get_mut(bit / 8) {
            *byte ^= 1 << (bit % 8);
        }
        bytes.into()
    }
}

impl<S: Store> Store for Corrupting<S> {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, Error>> {
        async move { Ok(self.inner.get(key).await?.map(|bytes| self.corrupt(bytes))) }.boxed()
    }
    fn get_start<'a>(&'a self, key: &'a str, len: usize) -> BoxFuture<'a, Result<Option<Start>, Error>> {
        async move {
            let start = self.inner.get_start(key, len).await?;
            Ok(start.map(|Start { bytes, size }| Start { bytes: self.corrupt(bytes), size }))
        }
        .boxed()
    }
    forward!(put_if_absent, delete, children);
}
