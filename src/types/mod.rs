//! Plain data that every room may speak of: ids, sampling parameters, steps, snapshots, turns. No I/O, no tensors.

mod ids;
mod readable;
mod sampling;
mod snapshot;
mod step;
mod turn;

pub use ids::{IdError, InitialName, SeqId, SessionId, SlotId, StateId, Tenant};
pub use readable::readable;
pub use sampling::Sampling;
pub use snapshot::{Memory, Pending, SegmentData, Snapshot, SnapshotHead, TAIL};
pub use step::{Row, Segment, Want};
pub use turn::{Beginning, Finish, Message, Resume, Role, TurnRecord, TurnUsage};
