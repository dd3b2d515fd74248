//! The OpenAI routes: one endpoint a file, what they share beside it.

pub mod chat;
pub mod completions;
#[cfg(test)]
mod fixture;
mod generation;
mod message;
mod parameters;
pub mod reply;
#[cfg(test)]
mod stream_tests;

pub use generation::{Rules, entity_tag, if_match};
pub use parameters::{IGNORED_PARAMS, refuse_unknown};
pub use reply::STATE_ID;
