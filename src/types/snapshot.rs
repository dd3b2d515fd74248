//! Everything a sequence is between two turns: what the recurrence holds and what it has still to read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{SessionId, StateId, Tenant};

/// How many of the last token ids a snapshot keeps, for penalties that look back.
pub const TAIL: usize = 4096;

/// An immutable, self-describing copy of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub head: SnapshotHead,
    pub memory: Memory,
}

/// Who a snapshot belongs to and where it comes from. Stored as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotHead {
    pub id: StateId,
    pub parent: Option<StateId>,
    pub owner: Tenant,
    /// Served name of the model at the time.
    pub model: String,
    /// Fingerprint of its weights: only the same weights may go on from here.
    pub fingerprint: String,
    /// Revision of the arithmetic that computed it. Shown, never a reason to refuse.
    pub arithmetic: String,
    pub session: Option<SessionId>,
    /// Number of the session's record that commits it. A snapshot whose record says something else was never announced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<u64>,
    /// Number of this turn in its session or chain, from 1.
    pub turn: u64,
    /// Unix seconds.
    pub created: u64,
    /// Unix seconds; `None` = kept until deleted.
    pub expires_at: Option<u64>,
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

impl SnapshotHead {
    pub fn expired(&self, now: u64) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }
}

/// What a sequence remembers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    /// The recurrent state after `consumed` tokens, in the model's segment order.
    pub segments: Vec<SegmentData>,
    /// How many tokens the recurrent state has read.
    pub consumed: u64,
    pub pending: Pending,
    /// The last ids the recurrent state has read, at most [`TAIL`] of them.
    pub tail: Vec<u32>,
    /// Decayed occurrence counts of the response so far, by ascending id; they go on when the same response does.
    pub counts: Vec<(u32, f32)>,
}

impl Memory {
    /// Positions of the sequence as a client sees it: read or waiting to be read.
    pub fn tokens(&self) -> u64 {
        self.consumed + self.pending.ends.len() as u64
    }

    /// Bytes of the recurrent state.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|s| 4 * s.data.len() as u64).sum()
    }
}

/// Tokens sampled but not yet read by the recurrence.
///
/// A response may be cut (by its token limit) in the middle of a character or of what may become a stop string. What
/// follows then decides which tokens the sequence really has, so both readings are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The ids to read first when new text comes: they end exactly where the text the client received ends.
    pub ends: Vec<u32>,
    /// The ids to read first when the same response simply goes on: exactly as sampled.
    pub goes_on: Vec<u32>,
    /// How many bytes at the end of `goes_on` the client has not received yet.
    pub unseen: u32,
    /// Whether the response has delivered any text: leading white space of a chat answer is not part of its content.
    pub begun: bool,
}

/// One segment's values, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct SegmentData {
    pub name: String,
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}
