//! The seam between the loop and what computes.

use std::sync::Arc;

use crate::model::{self, Model, Pool, Team};
use crate::types::{Row, SegmentData, SlotId};

/// Whether drafted tokens are read before they are sampled. The output is the same in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speculation {
    Off,
    /// Drafts of so many tokens at most, where steps as measured make them worth while.
    UpTo(usize),
    /// Drafts of so many tokens wherever there is a guess, whatever it costs: for tests and measurements.
    Always(usize),
}

impl Speculation {
    /// Tokens in the longest draft.
    pub fn most(self) -> usize {
        match self {
            Self::Off => 0,
            Self::UpTo(most) | Self::Always(most) => most,
        }
    }
}

/// Something that reads tokens into slots of state and gives logits.
///
/// What a row computes must depend on nothing but the row's slot and tokens. A failed [`step`](Backend::step) may leave
/// the slots its rows write in any state, and no others.
pub trait Backend: Send {
    /// Logits of one position.
    fn vocabulary(&self) -> usize;
    /// How many slots there are.
    fn slots(&self) -> usize;
    /// Runs `rows` over `ids`; `logits` becomes those that they want, `[vocabulary]` each, in order.
    fn step(&mut self, ids: &[u32], rows: &[Row], logits: &mut Vec<f32>) -> Result<(), String>;
    /// Makes a slot a fresh sequence.
    fn reset(&mut self, slot: SlotId);
    /// Puts a snapshot's state into a slot.
    fn restore(&mut self, slot: SlotId, state: &[SegmentData]) -> Result<(), String>;
    /// Copies a slot's state out.
    fn snapshot(&self, slot: SlotId) -> Vec<SegmentData>;
    /// Makes one slot equal to another.
    fn copy(&mut self, from: SlotId, into: SlotId);
    /// Whether a step may read tokens that were not sampled yet.
    fn speculation(&self) -> Speculation {
        Speculation::Off
    }
    /// Runs `task` for every number below `tasks`, on as many threads as there are for it.
    fn share(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

/// A model with its pool, on the compute threads that all models share.
pub struct ModelBackend {
    model: Model,
    pool: Pool,
    team: Arc<Team>,
    speculation: Speculation,
}

impl ModelBackend {
    /// Most slots for states in the middle of spans. A usual step stops at fewer places.
    const SPARE: u64 = 32;
    /// Bytes that they may take.
    const SPARE_BYTES: u64 = 256 << 20;

    /// Room for `seats` sequences of `model`, and for states on their way unless those grow with the text: of such states a
    /// step leaves none but the last.
    pub fn new(model: Model, seats: usize, team: Arc<Team>) -> Result<Self, model::Error> {
        let of = model.description();
        let spare = if of.state_bytes_per_token > 0 { 0 } else { Self::SPARE_BYTES / of.state_bytes.max(1) };
        let pool = model.pool(2 * seats + spare.min(Self::SPARE) as usize)?;
        Ok(Self { model, pool, team, speculation: Speculation::Off })
    }

    /// The same with drafts, unless states grow with the text: a draft runs into a copy of the state.
    pub fn speculating(self, speculation: Speculation) -> Self {
        let grows = self.model.description().state_bytes_per_token > 0;
        Self { speculation: if grows { Speculation::Off } else { speculation }, ..self }
    }
}

impl Backend for ModelBackend {
    fn vocabulary(&self) -> usize {
        self.model.description().vocabulary
    }
    fn slots(&self) -> usize {
        self.pool.slots()
    }
    fn step(&mut self, ids: &[u32], rows: &[Row], logits: &mut Vec<f32>) -> Result<(), String> {
        let Self { model, pool, team, .. } = self;
        team.install(|| model.step(pool, ids, rows, logits)).map_err(|e| e.to_string())
    }
    fn reset(&mut self, slot: SlotId) {
        self.pool.reset(slot);
    }
    fn restore(&mut self, slot: SlotId, state: &[SegmentData]) -> Result<(), String> {
        self.pool.restore(slot, state).map_err(|e| e.to_string())
    }
    fn snapshot(&self, slot: SlotId) -> Vec<SegmentData> {
        self.pool.snapshot(slot)
    }
    fn copy(&mut self, from: SlotId, into: SlotId) {
        self.pool.copy(from, into);
    }
    fn speculation(&self) -> Speculation {
        self.speculation
    }
    fn share(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks > 1 {
            self.team.share(tasks, task);
        } else {
            (0..tasks).for_each(task);
        }
    }
}
