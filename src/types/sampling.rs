//! How the next token is chosen.

use serde::{Deserialize, Serialize};

/// Sampling parameters of one request, already validated; the defaults are OpenAI's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 = greedy; otherwise logits are divided by it. In `0.0..=2.0` on the OpenAI routes.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this. `0.0` keeps the single best.
    pub top_p: f32,
    /// Keep this many best tokens; 0 = all.
    pub top_k: usize,
    /// Drop tokens less likely than this fraction of the best one's probability; 0 = none.
    pub min_p: f32,
    /// Subtracted from the logit of every token the response already has.
    pub presence_penalty: f32,
    /// Subtracted once for each (decayed) occurrence in the response so far.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in the recent tail (prompt included); 1 = none.
    pub repetition_penalty: f32,
    /// What is left of each occurrence count after each token, RWKV's decaying penalty; 1 = OpenAI's plain counts.
    pub penalty_decay: f32,
    /// Added to the logits of single tokens; -100 bans, +100 forces.
    pub logit_bias: Vec<(u32, f32)>,
    /// The seed. Randomness depends only on (seed, choice, absolute position).
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            penalty_decay: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}
