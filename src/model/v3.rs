//! RWKV-3: v2's halves in a plain pre-norm block, with a mix for each input.
//!
//! Tensor names and formulas are those of `RWKV_RNN` in BlinkDL/RWKV-LM, `RWKV-v3/src/model_run.py`.

use super::copy_head;
use super::generation::{BASE, Generation};
use super::v2::mixers;
use super::weights::Checkpoint;

pub const GENERATION: Generation = Generation {
    name: "v3",
    detect,
    mixers: |loader, layer, sizes| mixers(loader, layer, sizes, ["time_mix_r", "time_mix_k", "time_mix_v"], 1e-8),
    head: copy_head::optional,
    ..BASE
};

/// v4 has the same names (and its trainer can add a copy head), but decays of `[C]`; v3's are `[C, 1]`.
fn detect(checkpoint: &Checkpoint) -> bool {
    let Some(&[_, width]) = checkpoint.shape("emb.weight") else { return false };
    let mut tensors = checkpoint.tensors().iter();
    checkpoint.shape("blocks.0.ffn.time_mix_k").is_some()
        && tensors.any(|(name, tensor)| name.ends_with(".att.time_decay") && tensor.shape == [width, 1])
}
