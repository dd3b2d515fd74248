//! L1: what outlives the process. Snapshots and turn records, in a folder, in memory, later in a bucket.
//!
//! ```text
//! t/{tenant}/states/{state id}               one immutable snapshot, a safetensors file     (codec)
//! t/{tenant}/sessions/{session id}/{turn}    one turn record, twelve digits, JSON           (record)
//! t/{tenant}/forks|evicted|deleted|keys/…    what neither can say of itself                 (marks)
//! t/{tenant}/gaps/{session id}               nothing: the session's records have gaps       (hints)
//! t/{tenant}/aside/{state id}                a damaged snapshot that is out of the way      (remnant)
//! t/{tenant}/aside/{response id}-{n}         a damaged entry of its journal that is, too    (journal)
//! t/{tenant}/streams/{response id}/{n}       what was sent of a response while it runs      (journal)
//! t/{tenant}/responses/{response id}         a response that is kept, once it has ended     (journal)
//! t/{tenant}/conversations/{id}/{n}          what was done to a conversation beside turns   (journal)
//! running/{tenant}/{response id}             nothing: its name says that it has a stream    (journal)
//! ```
//!
//! [`Store`] keeps bytes under keys, [`Archive`] gives keys and bytes their meaning. Everything is written once, by
//! put-if-absent, and never changed. The layout is the whole truth: there is no index to rebuild and nothing to scan
//! when a server starts, and any number of servers may share one store. No clock in here: `now` is an argument.

mod archive;
mod bucket;
mod codec;
mod fault;
mod fit;
mod gallop;
mod header;
mod hints;
mod journal;
mod lineage;
mod local;
mod marks;
mod memory;
mod precision;
mod reclaim;
mod record;
mod remnant;
mod sealed;
mod search;
mod sessions;
mod squeeze;
mod store;
mod tiered;

pub use archive::{Archive, Listed, Stored, Wanted, is_state};
pub use bucket::{Bucket, BucketUrl};
pub use codec::{decode, encode, encode_as, inspect};
pub use fault::DiskFault;
pub use fit::{fits, most_bytes};
pub use header::{Damaged, FORMATS, Info, decode_head, head_len};
pub use journal::{Journal, Salvaged};
pub use lineage::{At, Turn};
pub use local::Local;
pub use marks::Origin;
pub use memory::InMemory;
pub use precision::{Precision, Storage};
pub use reclaim::{Forking, Reclaimed};
pub use record::{Back, Entry, Place};
pub use remnant::Remnant;
pub use sessions::{Commit, Head};
pub use store::{Put, Start, Store};
pub use tiered::{Bounded, Tiered};

/// Why something could not be kept, found or removed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// What is stored under `key` is not what was written there.
    #[error("{key} is damaged: {why}")]
    Damaged { key: String, why: String },
    /// The store could not do its work. `cause` is the whole story, such as `No space left on device`; `fault` is what of it
    /// is the disk's.
    #[error("could not {doing} {key}: {cause}")]
    Store { doing: &'static str, key: String, cause: String, fault: Option<DiskFault> },
    /// The folder or bucket cannot hold states.
    #[error("cannot keep states in {folder}: {cause}")]
    Open { folder: String, cause: String },
    /// A value that must not be stored, such as a state that is not finite.
    #[error("{key} cannot be stored: {why}")]
    Unfit { key: String, why: String },
    /// Something else is stored under a key that should have been new.
    #[error("{key} already holds something else")]
    Taken { key: String },
    /// The session was deleted while it was forked.
    #[error("session {session} was deleted")]
    Gone { session: String },
    /// Not a key: see [`Store`].
    #[error("{0:?} is not a storage key")]
    Key(String),
}
