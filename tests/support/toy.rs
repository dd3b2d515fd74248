//! A backend without weights: a small hash of everything read so far decides the logits. It does what the contract
//! says, quickly, and can be told to fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rewake::engine::{Backend, Speculation};
use rewake::types::{Row, SegmentData, SlotId, Want};

/// Bytes that make text with characters of several bytes, white space and stop strings.
const ALPHABET: &[u8] = b"ab \n\xc3\xa9\xe2\x82\xacU:";

pub struct Toy {
    pub memory: Vec<f32>,
    /// Id that ends a document, now and then; 256 is outside the byte vocabulary.
    pub end: Option<u32>,
    pub steps: Arc<AtomicUsize>,
    pub tokens: Arc<AtomicUsize>,
    /// Fails in this step, by an error or by a panic.
    pub fail_at: Option<(usize, Failure)>,
    pub speculation: Speculation,
    /// How many states there are: with few, text soon repeats itself.
    pub states: f32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Failure {
    Error,
    Panic,
}

impl Toy {
    pub fn new(slots: usize) -> Self {
        Self {
            memory: vec![f32::NAN; slots],
            end: Some(256),
            steps: Arc::default(),
            tokens: Arc::default(),
            fail_at: None,
            speculation: Speculation::Off,
            states: 65_521.0,
        }
    }
}

impl Backend for Toy {
    fn vocabulary(&self) -> usize {
        260
    }
    fn slots(&self) -> usize {
        self.memory.len()
    }
    fn speculation(&self) -> Speculation {
        self.speculation
    }
    fn step(&mut self, ids: &[u32], rows: &[Row], logits: &mut Vec<f32>) -> Result<(), String> {
        logits.clear();
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        self.tokens.fetch_add(ids.len(), Ordering::SeqCst);
        match self.fail_at {
            Some((at, Failure::Error)) if at == step => return Err("the toy was told to fail".into()),
            Some((at, Failure::Panic)) if at == step => panic!("the toy was told to panic"),
            _ => {}
        }
        let chain = |at: usize| (1..=at).filter(|&at| !rows[at].goes_on(&rows[at - 1])).count();
        let written: Vec<_> = rows.iter().enumerate().map(|(at, row)| (row.into, chain(at))).collect();
        for (at, row) in rows.iter().enumerate() {
            let twice = written.iter().filter(|&&(slot, _)| slot == row.into).count() > 1;
            let shared = written.iter().any(|&(slot, by)| slot == row.from && by != chain(at));
            assert!(!twice && !shared, "a slot is written by one row and used by another: {rows:?}");
            let mut hash = self.memory[row.from.0 as usize];
            assert!(!hash.is_nan(), "a slot is read that was never written");
            for (n, &id) in ids[row.tokens.clone()].iter().enumerate() {
                hash = (hash * 131.0 + id as f32 * 7.0 + 3.0) % self.states;
                let last = n + 1 == row.tokens.len();
                if match row.want {
                    Want::Nothing => false,
                    Want::Last => last,
                    Want::All => true,
                    Want::From(first) => n >= first,
                } {
                    self.logits(hash, logits);
                }
            }
            self.memory[row.into.0 as usize] = hash;
        }
        Ok(())
    }
    fn reset(&mut self, slot: SlotId) {
        self.memory[slot.0 as usize] = 1.0;
    }
    fn restore(&mut self, slot: SlotId, state: &[SegmentData]) -> Result<(), String> {
        match state {
            [one] if one.name == "toy" => self.memory[slot.0 as usize] = one.data[0],
            _ => return Err("not a toy's state".into()),
        }
        Ok(())
    }
    fn snapshot(&self, slot: SlotId) -> Vec<SegmentData> {
        let data = vec![self.memory[slot.0 as usize]];
        vec![SegmentData { name: "toy".into(), shape: vec![1], data }]
    }
    fn copy(&mut self, from: SlotId, into: SlotId) {
        self.memory[into.0 as usize] = self.memory[from.0 as usize];
    }
}

impl Toy {
    fn logits(&self, hash: f32, out: &mut Vec<f32>) {
        let start = out.len();
        out.resize(start + self.vocabulary(), -20.0);
        let mut bits = hash as u64 + 1;
        for &byte in ALPHABET {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            out[start + byte as usize] = (bits >> 40) as f32 / (1 << 22) as f32;
        }
        if let Some(end) = self.end {
            out[start + end as usize] = 1.2;
        }
    }
}
