//! Linear layers and the other operations that generations are built from, as candle custom ops over the CPU kernels.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Result, Storage, Tensor, bail};

use super::Error;
use super::kernels::{self, Activation, Panels, Product, Shape, Weight};
use super::weights::Loader;

/// How a checkpoint stores a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orientation {
    /// `[outputs, inputs]`, as PyTorch's linear layers.
    OutIn,
    /// `[inputs, outputs]`, as RWKV's low-rank factors.
    InOut,
}

const THIN: usize = 8;
const WIDE: usize = 1 << 16;

/// A linear layer: `y [N, outputs] = x [N, inputs] · Wᵀ`, weights in their stored type; few add a bias.
#[derive(Debug)]
pub struct Linear {
    weights: Panels,
    /// `[outputs]`, or empty.
    bias: Vec<f32>,
}

impl Linear {
    /// The tensor `name`, stored as `[outputs, inputs]` or the other way round.
    pub fn load(
        loader: &Loader,
        name: &str,
        outputs: usize,
        inputs: usize,
        stored: Orientation,
    ) -> std::result::Result<Self, Error> {
        Self::load_shape(loader, name, Shape::new(outputs, inputs), stored)
    }

    /// The tensor `name [outputs, inputs]` of a layer most of whose inputs are zero, as behind a ReLU.
    pub fn load_sparse(loader: &Loader, name: &str, outputs: usize, inputs: usize) -> std::result::Result<Self, Error> {
        Self::load_shape(loader, name, Shape::sparse(outputs, inputs), Orientation::OutIn)
    }

    fn load_shape(loader: &Loader, name: &str, shape: Shape, stored: Orientation) -> std::result::Result<Self, Error> {
        let (rows, cols) = match stored {
            Orientation::OutIn => (shape.outputs, shape.inputs),
            Orientation::InOut => (shape.inputs, shape.outputs),
        };
        // Panels are padded; no model has a layer so thin that it matters, but a file could be made of such.
        if shape.outputs < THIN && shape.inputs > WIDE {
            let (found, expected) = (vec![rows, cols], format!("a layer of at least {THIN} outputs"));
            return Err(Error::Shape { name: name.into(), found, expected });
        }
        loader.table(name, (rows, cols), |weight| {
            // Blocks along the wrong axis are taken apart.
            if stored == Orientation::InOut && weight.kind().block() > 1 {
                loader.served_as(weight.bytes().len(), 4 * weight.len());
            }
            Self::pack(weight, shape, stored)
        })
    }

    /// The tensors `{name}.weight [outputs, inputs]` and `{name}.bias [outputs]`.
    pub fn load_biased(loader: &Loader, name: &str, outputs: usize, inputs: usize) -> std::result::Result<Self, Error> {
        let linear = Self::load(loader, &format!("{name}.weight"), outputs, inputs, Orientation::OutIn)?;
        Ok(linear.with_bias(loader.values(&format!("{name}.bias"), &[outputs])?))
    }

    fn pack(weight: Weight, shape: Shape, stored: Orientation) -> Self {
        let weights = match stored {
            Orientation::OutIn => Panels::pack_rows(&weight, shape),
            Orientation::InOut => Panels::pack(&weight.unblocked(), shape, |o, i| i * shape.outputs + o),
        };
        Self { weights, bias: Vec::new() }
    }

    /// A layer that is part of a tensor of single values: `at(output, input)` is the index of a weight.
    pub fn pack_part(
        weight: &Weight,
        outputs: usize,
        inputs: usize,
        at: impl Fn(usize, usize) -> usize + Sync,
    ) -> Self {
        Self { weights: Panels::pack(weight, Shape::new(outputs, inputs), at), bias: Vec::new() }
    }

    /// The same layer with `bias [outputs]` added.
    pub fn with_bias(self, bias: Vec<f32>) -> Self {
        Self { bias, ..self }
    }

    /// Writes `x · Wᵀ`, plus the bias if there is one, into `out`.
    pub fn forward(&self, x: &Tensor, out: &Tensor) -> Result<()> {
        out.inplace_op2(x, self)
    }

    /// The same into `out [N, outputs]`.
    pub fn forward_to(&self, x: &Tensor, out: &mut [f32]) -> Result<()> {
        if x.dims().last() != Some(&self.weights.inputs()) {
            bail!("linear of {} inputs: {:?}", self.weights.inputs(), x.dims());
        }
        read(x, |x| self.rows(x, out))
    }

    fn rows(&self, x: &[f32], out: &mut [f32]) {
        kernels::matmul(&self.weights, x, out);
        if !self.bias.is_empty() {
            out.chunks_exact_mut(self.outputs()).for_each(|row| kernels::add(row, &self.bias));
        }
    }

    /// Writes `f(x · Wᵀ)` into `out`.
    pub fn forward_then(&self, x: &Tensor, out: &Tensor, f: Activation) -> Result<()> {
        out.inplace_op2(x, &Then(self, f))
    }

    /// `out = f(x · Wᵀ)`, to be computed together with others; of a layer without a bias.
    pub fn product<'a>(&'a self, x: &'a [f32], out: &'a mut [f32], f: Option<Activation>) -> Product<'a> {
        assert!(self.bias.is_empty(), "a bias is not added here");
        Product::new(&self.weights, x, out, f)
    }

    pub fn outputs(&self) -> usize {
        self.weights.outputs()
    }
}

impl InplaceOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> Result<()> {
        let (x, out) = (floats(x, x_l)?, floats_mut(out, out_l)?);
        let (inputs, outputs) = (self.weights.inputs(), self.weights.outputs());
        if x_l.dims().last() != Some(&inputs) || out_l.dims().last() != Some(&outputs) {
            bail!("linear of {inputs} → {outputs}: {:?} → {:?}", x_l.dims(), out_l.dims());
        }
        self.rows(x, out);
        Ok(())
    }
}

/// A linear layer and what is applied to its outputs.
struct Then<'a>(&'a Linear, Activation);

impl InplaceOp2 for Then<'_> {
    fn name(&self) -> &'static str {
        "linear, then a function"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> Result<()> {
        let product = self.0.product(floats(x, x_l)?, floats_mut(out, out_l)?, Some(self.1));
        kernels::multiply_all([product].iter());
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

struct Multiply;

impl InplaceOp2 for Multiply {
    fn name(&self) -> &'static str {
        "multiply"
    }
    fn cpu_fwd(&self, x: &mut CpuStorage, x_l: &Layout, y: &CpuStorage, y_l: &Layout) -> Result<()> {
        kernels::multiply(floats_mut(x, x_l)?, floats(y, y_l)?);
        Ok(())
    }
}

/// `x *= y`, element by element.
pub fn multiply(x: &Tensor, y: &Tensor) -> Result<()> {
    x.inplace_op2(y, &Multiply)
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

struct ScaleRows<'a>(&'a [f32]);

impl InplaceOp1 for ScaleRows<'_> {
    fn name(&self) -> &'static str {
        "scale rows"
    }
    fn cpu_fwd(&self, x: &mut CpuStorage, x_l: &Layout) -> Result<()> {
        let x = floats_mut(x, x_l)?;
        let width = x.len() / self.0.len();
        for (row, factor) in x.chunks_exact_mut(width).zip(self.0) {
            row.iter_mut().for_each(|x| *x *= factor);
        }
        Ok(())
    }
}

/// `x [N, C] *= factors [N]`, row by row, of at least one.
pub fn scale_rows(x: &Tensor, factors: &[f32]) -> Result<()> {
    x.inplace_op1(&ScaleRows(factors))
}

/// Shows `f` the values of a contiguous tensor.
pub fn read<R>(x: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(f(floats(storage, layout)?)),
        _ => bail!("a kernel needs a tensor in memory"),
    }
}

/// Views of the `P` planes of a `[P, T, C]` tensor.
pub fn planes<const P: usize>(tensor: &Tensor) -> std::result::Result<[Tensor; P], Error> {
    let mut views = Vec::with_capacity(P);
    for plane in 0..P {
        views.push(tensor.get(plane)?);
    }
    views.try_into().map_err(|_| Error::Step(format!("{P} planes are not {:?}", tensor.shape())))
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
