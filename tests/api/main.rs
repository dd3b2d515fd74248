//! The HTTP contract: the document, what the router does before a turn begins, and how turns look on the wire.

mod document;
mod router;
#[path = "../support/server.rs"]
mod support;
mod turns;
