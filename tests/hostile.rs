//! Files made to harm: whatever a file says, reading it ends in a model or an error that people can read, without a panic
//! and in memory that belongs to the file's size.
//!
//! Most files are made here, so that what is wrong with each can be read; `tests/fuzz` looks for others.

#[path = "hostile/containers.rs"]
mod containers;
#[path = "hostile/make.rs"]
mod make;
#[path = "hostile/memory.rs"]
mod memory;
#[path = "hostile/paths.rs"]
mod paths;
#[path = "fuzz/readers.rs"]
mod readers;
#[path = "hostile/seeds.rs"]
mod seeds;
#[path = "hostile/snapshots.rs"]
mod snapshots;
#[path = "hostile/sweep.rs"]
mod sweep;
#[path = "hostile/tokenizers.rs"]
mod tokenizers;

use std::panic::{AssertUnwindSafe, catch_unwind};

#[global_allocator]
static MEMORY: memory::Counting = memory::Counting;

/// Bytes of memory for a byte of a checkpoint. The dearest are pickles: an opcode of one byte makes a value of 40, in a
/// list that doubles its room, and what it collects. Matrices are padded to 32 outputs, which no file can be made of
/// alone.
const CHECKPOINT: usize = 256;
/// Bytes that any file may cost.
const ANY: usize = 4 << 20;

/// Runs a reader on a file of `length` bytes, within `factor` bytes of memory for each of these; its error must be fit
/// to be shown.
fn within(what: &str, length: usize, factor: usize, read: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let (result, peak) = memory::peak(|| catch_unwind(AssertUnwindSafe(read)));
    let result = result.unwrap_or_else(|_| panic!("{what}: it panics"));
    assert!(peak <= factor * length + ANY, "{what}: {length} bytes took {peak}");
    if let Err(error) = &result {
        assert!(readable(error), "{what}: {} bytes of error: {:?}", error.len(), error.get(..200).unwrap_or(error));
    }
    result
}

/// Whether an error is short, and does nothing to a terminal.
fn readable(error: &str) -> bool {
    error.len() <= 4000 && !error.chars().any(|c| c.is_control() && c != '\n')
}

/// A checkpoint that may be sound.
fn survived(what: &str, file: &[u8]) -> Result<(), String> {
    within(what, file.len(), CHECKPOINT, || readers::checkpoint(file))
}

/// A checkpoint that is not sound.
fn refused(what: &str, file: &[u8]) {
    survived(what, file).expect_err(what);
}
