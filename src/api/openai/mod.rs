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

pub use generation::Rules;
pub use parameters::IGNORED_PARAMS;
pub use reply::STATE_ID;
