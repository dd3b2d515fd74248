//! Activation buffers that live as long as the model, so that a step allocates none.

use candle_core::{DType, Device, Shape, Tensor};

use super::Error;

/// Hands out tensors in call order; the n-th call after a reset gets the n-th buffer again.
///
/// What a buffer holds is left over from its last use: whoever takes one writes all of it.
#[derive(Default)]
pub struct Workspace {
    /// Released after each mixer.
    scratch: Arena,
    /// Released after each step.
    held: Arena,
}

#[derive(Default)]
struct Arena {
    buffers: Vec<Tensor>,
    next: usize,
}

impl Arena {
    fn take(&mut self, shape: Shape) -> Result<Tensor, Error> {
        let len = shape.elem_count();
        if self.next == self.buffers.len() {
            self.buffers.push(Tensor::zeros(len, DType::F32, &Device::Cpu)?);
        } else if self.buffers[self.next].elem_count() < len {
            self.buffers[self.next] = Tensor::zeros(len, DType::F32, &Device::Cpu)?;
        }
        let buffer = &self.buffers[self.next];
        self.next += 1;
        Ok(buffer.narrow(0, 0, len)?.reshape(shape)?)
    }
}

impl Workspace {
    /// A buffer that is free again when the mixer that took it has returned and its result is used.
    pub fn scratch(&mut self, shape: impl Into<Shape>) -> Result<Tensor, Error> {
        self.scratch.take(shape.into())
    }

    /// A buffer that is free again at the next step.
    pub fn held(&mut self, shape: impl Into<Shape>) -> Result<Tensor, Error> {
        self.held.take(shape.into())
    }

    pub(super) fn release_scratch(&mut self) {
        self.scratch.next = 0;
    }

    pub(super) fn release_all(&mut self) {
        self.scratch.next = 0;
        self.held.next = 0;
    }
}
