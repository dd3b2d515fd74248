//! L1: RWKV models of every generation behind one step. The only room that names candle.
//!
//! A step takes rows of tokens of many sequences laid end to end, reads and writes their states in a [`Pool`], and gives
//! logits where a row wants them. Everything computes in f32; weights stay in the type they are stored in.
//!
//! On the CPU each output element is computed by one fixed order of operations whatever else is in the step, which is
//! what makes the chunk, batch and snapshot laws hold bit for bit.

mod block;
mod cast;
mod chains;
mod channel_mix;
mod convert;
mod copy_head;
mod deep_embed;
mod embed_attention;
mod generation;
mod kernels;
mod linear;
mod low_rank;
mod pool;
pub mod probe;
mod registry;
mod tiny_attention;
mod v1;
mod v2;
mod v3;
mod v4;
mod v5;
mod v6;
mod v7;
mod v7a;
mod v7b;
mod v8;
mod weights;
mod workspace;

pub use block::{Description, Model};
pub use convert::{Conversion, Format};
pub use kernels::{Kind, Team, stay_narrow, trim};
pub use pool::Pool;
pub use registry::{LoadOptions, load};
pub use weights::{Checkpoint, Lora, TensorInfo};

/// Revision of the arithmetic: raised whenever the same weights and tokens may give other bits than before.
pub const ARITHMETIC: &str = "cpu-3";

/// The same where there are no fused multiply-adds.
const ARITHMETIC_PLAIN: &str = "cpu-3-plain";

/// [`ARITHMETIC`] on this machine's processor: without fused multiply-adds the kernels round twice where others round once.
pub fn arithmetic() -> &'static str {
    if kernels::fused() { ARITHMETIC } else { ARITHMETIC_PLAIN }
}

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {path}: {why}")]
    Unreadable { path: String, why: String },
    #[error("{path} is not a checkpoint this server can read: {why}")]
    Format { path: String, why: String },
    #[error("not an RWKV checkpoint that is known here: {0}")]
    Unknown(String),
    #[error("tensor `{name}` is missing: a {generation} model needs it with shape {expected}")]
    Missing { name: String, generation: &'static str, expected: String },
    #[error("tensor `{name}` has shape {found:?}, expected {expected}")]
    Shape { name: String, found: Vec<usize>, expected: String },
    #[error("tensor `{name}` has type {found}; f32, f16 and bf16 are supported")]
    Type { name: String, found: String },
    #[error("tensor `{name}` holds {value} at element {at}; weights must be finite")]
    NotFinite { name: String, at: usize, value: f32 },
    #[error("tensors that are no part of a {generation} model: {names}")]
    Unexpected { generation: &'static str, names: String },
    #[error(
        "a LoRA file holds no alpha, and it is never guessed: give the one it was trained with (`--lora-alpha`, or \
         `lora_alpha` in the configuration), or put the adapter's adapter_config.json beside the file"
    )]
    LoraAlpha,
    #[error(
        "{path} does not tell the LoRA's alpha: {why}; correct it, or give the alpha (`--lora-alpha`, `lora_alpha`)"
    )]
    LoraConfig { path: String, why: String },
    #[error("no LoRA adapter for this model: {0}")]
    Lora(String),
    #[error("the vocabulary in the file cannot be used: {0}")]
    Vocabulary(String),
    #[error("token id {id} is outside the vocabulary of {vocabulary}")]
    TokenRange { id: u32, vocabulary: usize },
    #[error("state segment `{0}` does not fit this model: {1}")]
    State(String, String),
    #[error("a sequence would have {position} tokens, and this model's have at most {most}")]
    Context { position: u64, most: usize },
    #[error("a step breaks its contract: {0}")]
    Step(String),
    #[error("cannot be converted: {0}")]
    Convert(String),
    #[error("cannot write: {0}")]
    Write(#[from] std::io::Error),
    #[error("not enough memory for {slots} states of {bytes} bytes")]
    Memory { slots: usize, bytes: u64 },
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
