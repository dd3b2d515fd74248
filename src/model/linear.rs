//! Linear layers and the other operations that generations are built from, as candle custom ops over the CPU kernels.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Result, Tensor, bail};

use super::Error;
use super::kernels::{self, Activation, Panels, Weight};
use super::weights::Loader;

/// How a checkpoint stores a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orientation {
    /// `[outputs, inputs]`, as PyTorch's linear layers.
    OutIn,
    /// `[inputs, outputs]`, as RWKV's low-rank factors.
    InOut,
}

/// A linear layer without bias: `y [N, outputs] = x [N, inputs] · Wᵀ`, weights in their stored type.
#[derive(Debug)]
pub struct Linear(Panels);

impl Linear {
    pub fn pack(weight: &Weight, outputs: usize, inputs: usize, stored: Orientation) -> Self {
        Self(match stored {
            Orientation::OutIn => Panels::pack(weight, outputs, inputs, |o, i| o * inputs + i),
            Orientation::InOut => Panels::pack(weight, outputs, inputs, |o, i| i * outputs + o),
        })
    }

    /// Writes `x · Wᵀ` into `out`.
    pub fn forward(&self, x: &Tensor, out: &Tensor) -> Result<()> {
        out.inplace_op2(x, self)
    }

    pub fn outputs(&self) -> usize {
        self.0.outputs()
    }
}

impl InplaceOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> Result<()> {
        let (x, out) = (floats(x, x_l)?, floats_mut(out, out_l)?);
        if x_l.dims().last() != Some(&self.0.inputs()) || out_l.dims().last() != Some(&self.0.outputs()) {
            bail!("linear of {} → {}: {:?} → {:?}", self.0.inputs(), self.0.outputs(), x_l.dims(), out_l.dims());
        }
        kernels::matmul(&self.0, x, out);
        Ok(())
    }
}

/// Layer normalisation with its parameters, `[C]` each.
#[derive(Debug)]
pub struct LayerNorm {
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
}

impl LayerNorm {
    /// Of every RWKV generation.
    const EPS: f32 = 1e-5;

    /// The tensors `{name}.weight` and `{name}.bias`, `[width]` each.
    pub fn load(loader: &Loader, name: &str, width: usize) -> std::result::Result<Self, Error> {
        Ok(Self {
            weight: loader.values(&format!("{name}.weight"), &[width])?,
            bias: loader.values(&format!("{name}.bias"), &[width])?,
        })
    }

    /// Writes the normalised rows of `x [N, C]` into `out [N, C]`.
    pub fn forward(&self, x: &Tensor, out: &Tensor) -> Result<()> {
        out.inplace_op2(x, self)
    }

    /// The same for rows in place.
    pub fn rows(&self, x: &[f32], out: &mut [f32]) {
        kernels::layer_norm(x, &self.weight, &self.bias, Self::EPS, out);
    }
}

impl InplaceOp2 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer norm"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> Result<()> {
        self.rows(floats(x, x_l)?, floats_mut(out, out_l)?);
        Ok(())
    }
}

struct Add;

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }
    fn cpu_fwd(&self, x: &mut CpuStorage, x_l: &Layout, y: &CpuStorage, y_l: &Layout) -> Result<()> {
        kernels::add(floats_mut(x, x_l)?, floats(y, y_l)?);
        Ok(())
    }
}

/// `x += y`.
pub fn add(x: &Tensor, y: &Tensor) -> Result<()> {
    x.inplace_op2(y, &Add)
}

struct Copy;

impl InplaceOp2 for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }
    fn cpu_fwd(&self, to: &mut CpuStorage, to_l: &Layout, x: &CpuStorage, x_l: &Layout) -> Result<()> {
        floats_mut(to, to_l)?.copy_from_slice(floats(x, x_l)?);
        Ok(())
    }
}

/// `to = x`.
pub fn copy(to: &Tensor, x: &Tensor) -> Result<()> {
    to.inplace_op2(x, &Copy)
}

impl InplaceOp1 for Activation {
    fn name(&self) -> &'static str {
        "activation"
    }
    fn cpu_fwd(&self, x: &mut CpuStorage, x_l: &Layout) -> Result<()> {
        kernels::activate(*self, floats_mut(x, x_l)?);
        Ok(())
    }
}

/// The f32 values of a contiguous tensor.
pub fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(v), Some((from, to))) => Ok(&v[from..to]),
        _ => bail!("a kernel needs contiguous f32, not {layout:?}"),
    }
}

/// As [`floats`], to be written.
pub fn floats_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(v), Some((from, to))) => Ok(&mut v[from..to]),
        _ => bail!("a kernel needs contiguous f32, not {layout:?}"),
    }
}
