//! The unit of work of a model: rows of tokens of many sequences, laid end to end in one step.

use std::ops::Range;

use super::{SeqId, SlotId};

/// One span of one sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub seq: SeqId,
    /// The slot whose state the span starts from.
    pub from: SlotId,
    /// The slot that holds the state after the span; equal to `from` for work in place. A slot written by one row of a step
    /// is never read or written by another row of it, unless that [goes on](Row::goes_on) from it.
    pub into: SlotId,
    /// Absolute position of the span's first token in its sequence.
    pub at: u64,
    /// Which of the step's ids are this span; never empty.
    pub tokens: Range<usize>,
    pub want: Want,
}

impl Row {
    /// Whether this is the next span of the same sequence as the row just `before` it in the step, and begins from the state
    /// that it leaves. So a sequence leaves states on its way, each in a slot of its own; the last may be the one where the
    /// first began.
    pub fn goes_on(&self, before: &Row) -> bool {
        let next = before.at.checked_add(before.tokens.len() as u64);
        self.seq == before.seq && self.from == before.into && next == Some(self.at)
    }
}

/// What a row wants to know of its span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Only the state.
    Nothing,
    /// The logits after the last token.
    Last,
    /// The logits after every token.
    All,
    /// The logits after the span's token of this index, from 0, and after each that follows it.
    From(usize),
}

/// A part of a sequence's state, declared by the mixer that owns it. Pool, codec and snapshots iterate over these and
/// never ask for a model's generation.
#[derive(Clone, Debug, PartialEq)]
pub enum Segment {
    /// Constant size: `shape` f32 values, which start as `init` everywhere.
    Fixed { name: String, shape: Vec<usize>, init: f32 },
    /// Grows with the text: entries of `width` f32 values, none at first. Its shape in a snapshot is `[entries, width]`.
    /// With `cap`, it has one for each token that was read, and a sequence can have no more than that many. `ids` is which
    /// value of an entry, if any, is the token's id.
    Log { name: String, width: usize, cap: Option<usize>, ids: Option<usize> },
}

impl Segment {
    pub fn name(&self) -> &str {
        match self {
            Segment::Fixed { name, .. } | Segment::Log { name, .. } => name,
        }
    }

    /// f32 values that every sequence has, however short.
    pub fn values(&self) -> usize {
        match self {
            Segment::Fixed { shape, .. } => shape.iter().product(),
            Segment::Log { .. } => 0,
        }
    }
}
