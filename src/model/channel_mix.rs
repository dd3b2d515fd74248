//! The feed-forward half of v2 to v6: `σ(xr · R) · (relu(xk · K)² · V)`, also in attention's place as `ffnPre`.
//!
//! Tensor names and formula are those of `RWKV_ChannelMix` in BlinkDL/RWKV-LM, `RWKV-v3/src/model_run.py` and
//! `RWKV-v4/src/model.py`.

use candle_core::Tensor;

use super::Error;
use super::block::{Carry, Mixer, Step, token_shift};
use super::kernels::Activation;
use super::linear::{self, Linear, Orientation};
use super::weights::Loader;
use crate::types::Segment;

/// A channel mix with receptance.
pub struct ChannelMix {
    /// Name of its one segment, the token shift.
    shift: String,
    width: usize,
    /// `[2, C]`: of the key and of the receptance.
    mixes: Vec<f32>,
    key: Linear,
    receptance: Linear,
    value: Linear,
}

impl ChannelMix {
    /// Reads the linear layers `{prefix}.key.weight` and so on; `mixes [2, C]` are of key and receptance, as
    /// [`token_shift`] takes them.
    pub fn load(loader: &Loader, prefix: &str, shift: String, width: usize, mixes: Vec<f32>) -> Result<Self, Error> {
        let tensor = |name: &str| format!("{prefix}.{name}");
        let (inner, _) = loader.matrix_shape(&tensor("key.weight"))?;
        Ok(Self {
            shift,
            width,
            mixes,
            key: Linear::load(loader, &tensor("key.weight"), inner, width, Orientation::OutIn)?,
            receptance: Linear::load(loader, &tensor("receptance.weight"), width, width, Orientation::OutIn)?,
            value: Linear::load_sparse(loader, &tensor("value.weight"), width, inner)?,
        })
    }
}

impl Mixer for ChannelMix {
    fn segments(&self) -> Vec<Segment> {
        vec![Segment::Fixed { name: self.shift.clone(), shape: vec![self.width], init: 0.0 }]
    }

    fn forward(&self, x: &Tensor, step: &mut Step, _: &mut Carry) -> Result<Tensor, Error> {
        let (tokens, width) = x.dims2()?;
        let mixed = token_shift(x, &self.mixes, 0, step)?;
        let inner = step.work.scratch((tokens, self.key.outputs()))?;
        self.key.forward(&mixed.get(0)?, &inner)?;
        inner.inplace_op1(&Activation::ReluSquared)?;
        let out = step.work.scratch((tokens, width))?;
        self.value.forward(&inner, &out)?;
        let gate = step.work.scratch((tokens, width))?;
        self.receptance.forward(&mixed.get(1)?, &gate)?;
        gate.inplace_op1(&Activation::Sigmoid)?;
        linear::multiply(&out, &gate)?;
        Ok(out)
    }
}
