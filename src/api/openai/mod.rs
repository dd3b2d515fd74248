//! The OpenAI routes: one endpoint a file, what they share beside it.

pub mod chat;
pub mod completions;
#[cfg(test)]
pub mod fixture;
pub mod form;
pub mod generation;
pub mod message;
pub mod parameters;
pub mod reply;
#[cfg(test)]
mod stream_tests;

pub use completions::Prompts;
pub use generation::{Generation, Head, Rules, entity_tag, if_match, ttl};
pub use message::ChatMessage;
pub use parameters::{IGNORED_PARAMS, fields_of, ignored_header, refuse_unknown, sort_out};
pub use reply::STATE_ID;
