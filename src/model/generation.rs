//! What a generation declares of itself.

use super::Error;
use super::block::{Head, LinearHead, Mixer, Residual, Sizes};
use super::weights::{Checkpoint, Loader};

/// Makes the two mixers of a layer.
pub type MakeMixers = fn(&Loader, usize, &Sizes) -> Result<(Box<dyn Mixer>, Box<dyn Mixer>), Error>;

/// Makes the head.
pub type MakeHead = fn(&Loader, &Sizes) -> Result<Box<dyn Head>, Error>;

/// A generation: how its files are recognised and how the two mixers of a layer are made. Everything else is shared.
pub struct Generation {
    pub name: &'static str,
    /// By the names of tensors, and by shapes where generations share all names. No file is of two generations.
    pub detect: fn(&Checkpoint) -> bool,
    pub mixers: MakeMixers,
    pub head: MakeHead,
    /// Name of the embedding table.
    pub embedding: &'static str,
    /// Whether there is a norm `blocks.0.ln0` behind it.
    pub ln0: bool,
    pub residual: Residual,
    /// The segment that a state-tuned `blocks.N.att.time_state` of layer N replaces.
    pub time_state: Option<fn(usize) -> String>,
    /// Whether the segment is `[H, K, V]`: the stored tensor is always `[H, V, K]`.
    pub transpose_time_state: bool,
}

/// What generations have in common, to be completed with `..BASE`.
pub const BASE: Generation = Generation {
    name: "",
    detect: |_| false,
    mixers: |_, _, _| Err(Error::Unknown(String::new())),
    head: LinearHead::load,
    embedding: "emb.weight",
    ln0: true,
    residual: Residual::Plain,
    time_state: None,
    transpose_time_state: false,
};
