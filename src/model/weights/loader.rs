//! Takes a model's tensors out of a checkpoint.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use super::{Checkpoint, Error};
use crate::model::cast::{becomes, cast, quantised_once};
use crate::model::kernels::{Kind, Weight};

/// Takes a model's tensors out of a checkpoint by name and shape, and knows at the end which ones nobody took and what
/// all of them were.
pub struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    generation: &'static str,
    /// What large matrices become as they are taken.
    quantise: Option<Kind>,
    /// What each tensor that was taken holds.
    taken: RefCell<BTreeMap<String, blake3::Hash>>,
    allowed: RefCell<BTreeSet<String>>,
    /// Bytes of what was taken.
    bytes: Cell<usize>,
    /// The same as they are served.
    served: Cell<usize>,
    progress: &'a dyn Fn(usize, usize),
}

impl<'a> Loader<'a> {
    pub fn new(checkpoint: &'a Checkpoint, generation: &'static str, progress: &'a dyn Fn(usize, usize)) -> Self {
        let (taken, allowed, bytes, served) = Default::default();
        Self { checkpoint, generation, quantise: None, taken, allowed, bytes, served, progress }
    }

    /// The same that makes `kind` of every large matrix as it is taken, as a conversion would: what follows, the fingerprint
    /// too, is of the new values.
    ///
    /// # Errors
    /// [`Error::Convert`] when such a matrix is quantised already, in another way: what it has lost would be lost twice. Only f32
    /// holds all that blocks stand for.
    pub fn quantising(self, kind: Option<Kind>) -> Result<Self, Error> {
        if let Some(kind) = kind {
            quantised_once(self.checkpoint, kind, |kind| kind == Kind::F32)?;
        }
        Ok(Self { quantise: kind, ..self })
    }

    pub fn has(&self, name: &str) -> bool {
        self.checkpoint.shape(name).is_some()
    }

    /// The shape of a tensor, for sizes that only the file knows.
    pub fn shape(&self, name: &str, expected: &str) -> Result<&[usize], Error> {
        self.checkpoint.shape(name).ok_or_else(|| self.missing(name, expected.into()))
    }

    /// Both sizes of a matrix, for sizes that only the file knows.
    pub fn matrix_shape(&self, name: &str) -> Result<(usize, usize), Error> {
        match self.shape(name, "a matrix")? {
            &[rows, cols] if rows > 0 && cols > 0 => Ok((rows, cols)),
            other => Err(Error::Shape { name: name.into(), found: other.to_vec(), expected: "a matrix".into() }),
        }
    }

    fn missing(&self, name: &str, expected: String) -> Error {
        Error::Missing { name: name.into(), generation: self.generation, expected }
    }

    /// A tensor of the given shape in its stored type, row-major.
    pub fn weight(&self, name: &str, shape: &[usize]) -> Result<Weight<'a>, Error> {
        let found = self.checkpoint.shape(name).ok_or_else(|| self.missing(name, format!("{shape:?}")))?;
        let wrong = || Error::Shape { name: name.into(), found: found.to_vec(), expected: format!("{shape:?}") };
        if without_leading_ones(found) != without_leading_ones(shape) {
            return Err(wrong());
        }
        let mut weight = self.checkpoint.read(name)?.reshaped(shape).ok_or_else(wrong)?;
        let stored = weight.bytes().len();
        let becomes = self.quantise.and_then(|kind| becomes(name, found, kind));
        let mut taken = self.taken.borrow_mut();
        let first = !taken.contains_key(name);
        if first {
            weight.check_finite(name)?;
        }
        if let Some(kind) = becomes {
            // From here on the file's own values are not needed; where they are the same, they are read again.
            weight = cast(name, weight, kind)?.reshaped(shape).ok_or_else(wrong)?;
            self.checkpoint.release(name);
        }
        if first {
            taken.insert(name.to_owned(), weight.digest());
            self.bytes.set(self.bytes.get() + stored);
            self.served_as(0, weight.bytes().len());
            (self.progress)(self.bytes.get(), self.checkpoint.bytes());
        }
        Ok(weight)
    }

    /// A small tensor of the given shape as f32 values, row-major.
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let first = !self.taken.borrow().contains_key(name);
        let weight = self.weight(name, shape)?;
        let values = weight.to_f32();
        if first {
            self.served_as(weight.bytes().len(), 4 * values.len());
        }
        self.checkpoint.release(name);
        Ok(values)
    }

    /// Shows `f` a matrix `[rows, cols]` in its stored type, whose memory in the file is then given back.
    pub fn table<R>(
        &self,
        name: &str,
        (rows, cols): (usize, usize),
        f: impl FnOnce(Weight<'a>) -> R,
    ) -> Result<R, Error> {
        let made = f(self.weight(name, &[rows, cols])?);
        self.checkpoint.release(name);
        Ok(made)
    }

    /// Lets go of the memory behind a tensor that was taken.
    pub fn release(&self, name: &str) {
        self.checkpoint.release(name);
    }

    /// Says that a tensor of `stored` bytes is served in so many.
    pub fn served_as(&self, stored: usize, served: usize) {
        self.served.set((self.served.get() + served).saturating_sub(stored));
    }

    /// Names a tensor that may be in the file though this model has no use for it.
    pub fn allow(&self, name: &str) {
        self.allowed.borrow_mut().insert(name.to_owned());
    }

    /// Bytes of all tensors that were taken so far, in the types they are served in.
    pub fn bytes(&self) -> u64 {
        self.served.get() as u64
    }

    /// Refuses a file with tensors nobody took: computing without them would be another model. Gives the fingerprint:
    /// BLAKE3 over the names and values of all that were taken, in name order, LoRA merged. It is the same for the same
    /// values in any container and any width, so that sessions outlive a conversion that loses nothing.
    ///
    /// # Errors
    /// [`Error::Unexpected`].
    pub fn finish(self) -> Result<String, Error> {
        let (taken, allowed) = (self.taken.into_inner(), self.allowed.into_inner());
        let unknown = |name: &&String| !taken.contains_key(*name) && !allowed.contains(*name);
        let left: Vec<_> = self.checkpoint.tensors().keys().filter(unknown).take(8).cloned().collect();
        if !left.is_empty() {
            return Err(Error::Unexpected { generation: self.generation, names: left.join(", ") });
        }
        let mut hash = blake3::Hasher::new();
        for (name, digest) in &taken {
            hash.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes()).update(digest.as_bytes());
        }
        Ok(hash.finalize().to_hex().to_string())
    }
}

/// Trainers store vectors as `[1, 1, C]` as well as `[C]`.
fn without_leading_ones(shape: &[usize]) -> &[usize] {
    &shape[shape.iter().take_while(|&&d| d == 1).count()..]
}
