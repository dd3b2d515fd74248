//! `rewake eval --states`: what storing states less exactly costs.

use anyhow::ensure;
use serde_json::{Value, json};

use super::checkpoint::{progress, show};
use crate::model::{Model, Pool};
use crate::state::{self, Precision, Storage};
use crate::types::{Memory, Row, SegmentData, SeqId, SlotId, Snapshot, SnapshotHead, StateId, Tenant, Want};

/// Tokens between two states. Every position after one is judged, so one is at most that far from where its state was stored.
const STRETCH: usize = 16;

/// What is compared, each in the slot of its number + 1; the exact state is in slot 0.
const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::F16, Precision::Int8];

/// What became of what followed states of one precision.
#[derive(Clone, Debug, Default)]
struct Loss {
    /// Of all states that were stored: plain and compressed.
    bytes: u64,
    compressed: u64,
    /// Sum and greatest of KL(exact ‖ restored), in nats.
    divergence: f64,
    worst: f64,
    agreed: usize,
}

/// Reads `ids` and stores the state after every 16th; each then goes on with the text, beside the exact one. Columns: bytes of a
/// stored state plain and compressed, how far the next tokens' distributions are apart and how often the likeliest is the same.
pub(super) fn compare(model: &mut Model, ids: &[u32]) -> anyhow::Result<Value> {
    let vocabulary = model.description().vocabulary;
    let mut pool = model.pool(1 + PRECISIONS.len())?;
    (0..=PRECISIONS.len()).for_each(|slot| pool.reset(SlotId(slot as u32)));
    let most = model.description().context.unwrap_or(usize::MAX).min(ids.len());
    let (first, rest) = ids[..most].split_at(STRETCH.min(most));
    ensure!(!rest.is_empty(), "the text has {most} tokens, and states are stored after {STRETCH}");
    let mut losses = vec![Loss::default(); PRECISIONS.len()];
    let (mut states, mut positions) = (0, 0);
    read(model, &mut pool, (first, 0), 1)?;
    let bar = progress("reading", "tokens");
    for (n, stretch) in rest.chunks(STRETCH).enumerate() {
        let at = first.len() + n * STRETCH;
        let segments = pool.snapshot(SlotId(0));
        for (slot, (precision, loss)) in (1..).zip(PRECISIONS.into_iter().zip(&mut losses)) {
            pool.restore(SlotId(slot), &stored(&segments, at as u64, precision, loss)?)?;
        }
        let logits = read(model, &mut pool, (stretch, at), 1 + PRECISIONS.len())?;
        let mut rows = logits.chunks_exact(stretch.len() * vocabulary);
        let exact = rows.next().unwrap_or_default();
        for (loss, restored) in losses.iter_mut().zip(rows) {
            for (exact, restored) in exact.chunks_exact(vocabulary).zip(restored.chunks_exact(vocabulary)) {
                loss.add(exact, restored);
            }
        }
        (states, positions) = (states + 1, positions + stretch.len());
        show(&bar, at + stretch.len(), most);
    }
    bar.finish_and_clear();
    let line = |(precision, loss): (Precision, Loss)| {
        json!({
            "precision": precision,
            "bytes": loss.bytes / states,
            "bytes_compressed": loss.compressed / states,
            "kl_divergence": loss.divergence / positions as f64,
            "kl_divergence_worst": loss.worst,
            "top1_agreement": loss.agreed as f64 / positions as f64,
        })
    };
    let lines: Vec<_> = PRECISIONS.into_iter().zip(losses).map(line).collect();
    Ok(json!({ "states": states, "positions": positions, "stored": lines }))
}

/// Reads the same ids in the first `slots` slots, in one step; gives the logits of all positions, slot by slot.
fn read(model: &mut Model, pool: &mut Pool, (ids, at): (&[u32], usize), slots: usize) -> anyhow::Result<Vec<f32>> {
    let row = |n: usize| {
        let (slot, tokens) = (SlotId(n as u32), n * ids.len()..(n + 1) * ids.len());
        Row { seq: SeqId(n as u64), from: slot, into: slot, at: at as u64, tokens, want: Want::All }
    };
    let rows: Vec<Row> = (0..slots).map(row).collect();
    let mut logits = Vec::new();
    model.step(pool, &ids.repeat(slots), &rows, &mut logits)?;
    Ok(logits)
}

/// The state as it is after having been stored.
fn stored(
    segments: &[SegmentData],
    at: u64,
    precision: Precision,
    loss: &mut Loss,
) -> anyhow::Result<Vec<SegmentData>> {
    let head = SnapshotHead {
        id: StateId::new(0, 0),
        parent: None,
        owner: Tenant::local(),
        model: String::new(),
        fingerprint: String::new(),
        arithmetic: crate::engine::arithmetic().into(),
        session: None,
        record: None,
        turn: 1,
        created: 0,
        expires_at: None,
        metadata: Default::default(),
    };
    let memory = Memory { segments: segments.to_vec(), consumed: at, ..Memory::default() };
    let snapshot = Snapshot { head, memory };
    loss.compressed += state::encode_as(&snapshot, Storage { precision, compress: true })?.len() as u64;
    let file = state::encode_as(&snapshot, Storage { precision, compress: false })?;
    loss.bytes += file.len() as u64;
    Ok(state::decode(&file)?.memory.segments)
}

impl Loss {
    fn add(&mut self, exact: &[f32], restored: &[f32]) {
        let (p, q) = (log_probabilities(exact), log_probabilities(restored));
        let divergence: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
        // Rounding may make the smallest ones negative.
        self.divergence += divergence.max(0.0);
        self.worst = self.worst.max(divergence);
        self.agreed += usize::from(likeliest(exact) == likeliest(restored));
    }
}

fn log_probabilities(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - most).exp()).sum();
    logits.iter().map(|&l| f64::from(l - most) - sum.ln()).collect()
}

/// The first of the largest.
fn likeliest(logits: &[f32]) -> usize {
    logits.iter().enumerate().fold(0, |best, (n, l)| if *l > logits[best] { n } else { best })
}
