//! The OpenAI routes: one endpoint a file, what they share beside it.

pub mod chat;
pub mod chunks;
pub mod completions;
#[cfg(test)]
pub mod fixture;
pub mod form;
pub mod generation;
pub mod head;
pub mod message;
pub mod parameters;
pub mod prompts;
pub mod reply;
pub mod sampling;
#[cfg(test)]
mod stream_tests;

pub use generation::{Generation, Rules, metadata, ttl};
pub use head::{Head, if_match};
pub use message::ChatMessage;
pub use parameters::{IGNORED_PARAMS, Ignored, neutral, refuse_unknown, sort_out};
pub use prompts::Prompts;
pub use reply::STATE_ID;
