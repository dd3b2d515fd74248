//! Turns of a conversation.

use serde::{Deserialize, Serialize};

use super::{Memory, Pending, StateId};

/// Who speaks. Chat templates give each its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    User,
    Assistant,
    Tool,
}

/// One chat message, its content parts already joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub role: Role,
    pub content: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Why a response ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// A stop string or an end token.
    Stop,
    /// The token limit.
    Length,
}

/// Token counts of one turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TurnUsage {
    /// The whole context the response was conditioned on.
    pub prompt_tokens: u64,
    /// How many of those were not computed again.
    pub cached_tokens: u64,
    pub completion_tokens: u64,
}

/// The state that a fresh sequence began from, before its first token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beginning {
    /// Configured name of the initial state that the request asked for; `None` = the model's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// BLAKE3 of the state's values: the name may mean another file by the time the sequence is read again.
    pub fingerprint: String,
}

/// What the ids of a sequence do not tell of the state after a turn: with both, a lost snapshot is rebuilt to the same bits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    #[serde(flatten)]
    pub pending: Pending,
    /// Occurrence counts of the response by ascending id. The values are bits of an `f32`: decimal digits may not bring
    /// them back.
    counts: Vec<(u32, u32)>,
}

impl Resume {
    pub fn of(memory: &Memory) -> Self {
        let counts = memory.counts.iter().map(|&(id, count)| (id, count.to_bits())).collect();
        Self { pending: memory.pending.clone(), counts }
    }

    pub fn counts(&self) -> Vec<(u32, f32)> {
        self.counts.iter().map(|&(id, bits)| (id, f32::from_bits(bits))).collect()
    }
}

/// The durable record of one committed turn of a session. The records of a session, in order, are the truth about
/// it; snapshots are their durable cache.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TurnRecord {
    /// `None` marks the session as deleted at this turn.
    pub state: Option<StateId>,
    pub parent: Option<StateId>,
    pub model: String,
    pub fingerprint: String,
    /// What the session began from, in the record of its first turn. `None` there = recorded by a version that did not say:
    /// the model's own initial state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beginning: Option<Beginning>,
    /// What the client sent: chat messages, or raw text.
    pub messages: Vec<Message>,
    pub text: Option<String>,
    /// What was answered.
    pub answer: String,
    pub finish: Option<Finish>,
    /// How many ids at the end of the sequence this turn takes back first: not 0 only when a response that was cut
    /// inside a token goes on.
    #[serde(default)]
    pub takes_back: usize,
    /// The token ids this turn added to the sequence, in order: prompt ids, then the answer's as far as the client
    /// received it. All turns' ids together are the sequence.
    pub ids: Vec<u32>,
    /// How many of `ids` are the answer's.
    pub answer_ids: usize,
    /// `None` = recorded by a version that did not say: the response cannot go on when its snapshot is lost, new text can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Resume>,
    pub response_id: String,
    pub seed: u64,
    pub usage: TurnUsage,
    pub idempotency_key: Option<String>,
    /// Total positions of the sequence after this turn.
    pub tokens: u64,
    /// Bytes of the kept state.
    pub bytes: u64,
    /// Unix seconds.
    pub created: u64,
    pub expires_at: Option<u64>,
}
