//! Low-rank layers of v6 and later: a narrow linear layer, a function, a linear layer back.

use candle_core::Tensor;

use super::Error;
use super::block::Step;
use super::kernels::Activation;
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

    /// `x [T, C]` → `out [T, C]`.
    pub fn forward(&self, x: &Tensor, out: &Tensor, step: &mut Step) -> Result<(), Error> {
        let hidden = step.work.scratch((step.tokens(), self.down.outputs()))?;
        self.down.forward(x, &hidden)?;
        if let Some(f) = self.between {
            hidden.inplace_op1(&f)?;
        }
        Ok(self.up.forward(&hidden, out)?)
    }
}
