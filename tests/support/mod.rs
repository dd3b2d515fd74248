//! What several test files share.
#![allow(dead_code)]

pub mod store;
pub mod toy;
pub mod vectors;
