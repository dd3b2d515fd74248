//! Low-rank layers of v6 and later: a narrow linear layer, a function, a linear layer back.

use candle_core::Tensor;

use super::Error;
use super::block::Step;
use super::kernels::{Activation, Product};
use super::linear::{Linear, Orientation};
use super::weights::Loader;

/// `x · W1 → f → · W2`.
pub struct LowRank {
    down: Linear,
    between: Option<Activation>,
    up: Linear,
}

impl LowRank {
    /// Reads `{name}1 [C, r]` and `{name}2 [r, C]`.
    pub fn load(loader: &Loader, name: &str, width: usize, between: Option<Activation>) -> Result<Self, Error> {
        let (_, rank) = loader.matrix_shape(&format!("{name}1"))?;
        Ok(Self {
            down: Linear::load(loader, &format!("{name}1"), rank, width, Orientation::InOut)?,
            between,
            up: Linear::load(loader, &format!("{name}2"), width, rank, Orientation::InOut)?,
        })
    }

    /// Reads `P` of one rank, side by side: `{name}1 [C, P r]` and `{name}2 [P, r, C]`.
    pub fn load_several<const P: usize>(
        loader: &Loader,
        name: &str,
        width: usize,
        between: Option<Activation>,
    ) -> Result<[Self; P], Error> {
        let (_, columns) = loader.matrix_shape(&format!("{name}1"))?;
        let rank = columns / P;
        let down = loader.weight(&format!("{name}1"), &[width, P * rank])?.unblocked();
        let up = loader.weight(&format!("{name}2"), &[P, rank, width])?.unblocked();
        Ok(std::array::from_fn(|p| Self {
            down: Linear::pack_part(&down, rank, width, |o, i| i * columns + p * rank + o),
            between,
            up: Linear::pack_part(&up, width, rank, |o, i| (p * rank + i) * width + o),
        }))
    }

    pub fn rank(&self) -> usize {
        self.down.outputs()
    }

    /// `hidden [T, r] = f(x [T, C] · W1)`, to be computed together with others.
    pub fn down<'a>(&'a self, x: &'a [f32], hidden: &'a mut [f32]) -> Product<'a> {
        self.down.product(x, hidden, self.between)
    }

    /// `out [T, C] = hidden [T, r] · W2`.
    pub fn up<'a>(&'a self, hidden: &'a [f32], out: &'a mut [f32]) -> Product<'a> {
        self.up.product(hidden, out, None)
    }

    /// `x [T, C]` → `out [T, C]`.
    pub fn forward(&self, x: &Tensor, out: &Tensor, step: &mut Step) -> Result<(), Error> {
        let hidden = step.work.scratch((step.tokens(), self.rank()))?;
        match self.between {
            Some(f) => self.down.forward_then(x, &hidden, f)?,
            None => self.down.forward(x, &hidden)?,
        }
        Ok(self.up.forward(&hidden, out)?)
    }
}
