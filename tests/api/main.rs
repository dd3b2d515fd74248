//! The HTTP contract that needs no model: the document, and what the router does before a turn begins.

mod document;
