//! L1: everything about text. Tokenizers, streamed UTF-8 with stop strings, and chat templates.
//!
//! A [`Tokenizer`] turns text into token ids and ids into bytes; an [`Output`] turns the bytes of a response into text
//! that may be sent at once; a [`Profile`] says how a model wants its conversations written.

mod hf;
mod literal;
mod output;
mod pipeline;
mod profile;
mod stops;
mod tokenizer;
mod world;

use std::sync::Arc;

use crate::types::readable;

pub use output::{Output, Piece, Trim};
pub use profile::{Profile, SamplingDefaults, builtin, builtin_names};
pub use tokenizer::{Tokenizer, bytes};
pub use world::World;

/// Why a tokenizer file or a model profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A vocabulary file of the World kind; the line counts from 1.
    #[error("vocabulary, line {line}: {reason}")]
    Line { line: usize, reason: String },
    #[error("vocabulary: {0}")]
    Vocabulary(String),
    /// A `tokenizer.json`.
    #[error("tokenizer.json: {}", readable(.0))]
    Json(String),
    #[error("profile `{profile}`: {reason}")]
    Profile { profile: String, reason: String },
}

/// The embedded World vocabulary (65,529 tokens), built when it is first asked for.
pub fn world() -> Arc<dyn Tokenizer> {
    World::embedded()
}

/// Reads a `tokenizer.json` of Hugging Face's `tokenizers`: a BPE whose tokens have known bytes.
///
/// Truncation, padding, post-processing and BPE dropout the file may ask for are left out: they would change prompts.
pub fn from_json(json: &[u8]) -> Result<Arc<dyn Tokenizer>, Error> {
    Ok(Arc::new(hf::Hf::read(json)?))
}

/// Reads an `rwkv_vocab_*.txt`: lines of an id, a Python literal and the literal's length in bytes.
pub fn from_vocabulary(text: &[u8]) -> Result<Arc<dyn Tokenizer>, Error> {
    Ok(Arc::new(World::read(text)?))
}

/// The vocabulary that a GGUF file holds: for each id the inside of a Python bytes literal, empty where it has no text.
pub fn from_literals(literals: &[Vec<u8>]) -> Result<Arc<dyn Tokenizer>, Error> {
    let read = World::from_literals(literals)?;
    // In plain bytes id 0 is a byte, and ends nothing.
    let plain = read.vocab_size() == 256 && (0..=u8::MAX).all(|byte| read.token_bytes(byte.into()) == [byte]);
    Ok(if plain { bytes() } else { Arc::new(read) })
}

/// Whether these are World's tokens, perhaps with ids behind them that have no text.
pub fn is_world(text: &dyn Tokenizer) -> bool {
    /// A head has no more ids behind them; others need not unpack World to be told apart.
    const MOST: usize = 1 << 16;
    text.is_greedy() && (65_530..=MOST).contains(&text.vocab_size()) && World::is_embedded(text)
}

/// The inside of a Python bytes literal of these bytes, as [`from_literals`] reads it.
pub fn to_literal(bytes: &[u8]) -> Vec<u8> {
    literal::escape_bytes(bytes).into_bytes()
}

/// The beginning of a word from a file, as it may be shown in an error.
fn excerpt(word: &str) -> String {
    const LONGEST: usize = 40;
    let begin: String = word.chars().take(LONGEST).collect();
    if begin.len() < word.len() { format!("{begin:?}…") } else { format!("{begin:?}") }
}
