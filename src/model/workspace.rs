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
    buffers: Vec<Buffer>,
    next: usize,
}

struct Buffer {
    /// As long as the longest that was asked for.
    whole: Tensor,
    /// What was last handed out of it: most steps are of the shape of the one before, and making a view takes candle several
    /// allocations, of which a step would have hundreds.
    view: Tensor,
}

impl Buffer {
    fn new(shape: Shape) -> Result<Self, Error> {
        let whole = Tensor::zeros(shape.elem_count(), DType::F32, &Device::Cpu)?;
        Ok(Self { view: whole.reshape(shape)?, whole })
    }

    fn view(&mut self, shape: Shape) -> Result<Tensor, Error> {
        if *self.view.shape() != shape {
            if self.whole.elem_count() < shape.elem_count() {
                *self = Self::new(shape)?;
            } else {
                self.view = self.whole.narrow(0, 0, shape.elem_count())?.reshape(shape)?;
            }
        }
        Ok(self.view.clone())
    }
}

impl Arena {
    fn take(&mut self, shape: Shape) -> Result<Tensor, Error> {
        if self.next == self.buffers.len() {
            self.buffers.push(Buffer::new(shape.clone())?);
        }
        self.next += 1;
        self.buffers[self.next - 1].view(shape)
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

#[cfg(test)]
mod tests {
    use super::super::linear::{copy, read};
    use super::*;

    #[test]
    fn the_nth_call_gets_the_nth_buffer_in_any_shape() {
        let mut workspace = Workspace::default();
        let mut take = |rows| {
            let taken = [(); 2].map(|()| workspace.scratch((rows, 3)).expect("a buffer"));
            workspace.release_scratch();
            assert!(taken.iter().all(|tensor| tensor.dims() == [rows, 3]));
            taken
        };
        let mark = |tensor: &Tensor, value: f32| {
            let values = Tensor::full(value, tensor.shape(), &Device::Cpu).expect("values");
            copy(tensor, &values).expect("as many");
        };
        let marks = |taken: [Tensor; 2]| taken.map(|tensor| read(&tensor, |values| values[0]).expect("values"));
        take(2).iter().zip([1.0, 2.0]).for_each(|(tensor, value)| mark(tensor, value));
        for rows in [2, 1, 1, 2] {
            assert_eq!(marks(take(rows)), [1.0, 2.0]);
        }
        take(5).iter().zip([3.0, 4.0]).for_each(|(tensor, value)| mark(tensor, value));
        for rows in [2, 5] {
            assert_eq!(marks(take(rows)), [3.0, 4.0]);
        }
    }
}
