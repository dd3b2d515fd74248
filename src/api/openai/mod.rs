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

pub use generation::Rules;
pub use parameters::IGNORED_PARAMS;
pub use reply::STATE_ID;
