//! Checkpoints: named tensors in the original trainer's names, wherever they come from.

mod lora;
mod pth;
mod safetensors;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Tensor};

use super::Error;
use super::kernels::Weight;
pub use lora::Lora;

/// Type and shape of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub dtype: DType,
    pub shape: Vec<usize>,
}

/// Where tensors are read from. Reading copies one tensor into memory, in its stored type.
trait Source: Send {
    fn read(&self, name: &str) -> Result<Tensor, Error>;
}

/// The tensors of one checkpoint file, read one at a time.
pub struct Checkpoint {
    tensors: BTreeMap<String, TensorInfo>,
    source: Box<dyn Source>,
    lora: Option<Box<Lora>>,
}

impl Checkpoint {
    /// Opens a `.safetensors` or `.pth` file, told apart by content.
    ///
    /// # Errors
    /// [`Error::Unreadable`] or [`Error::Format`], with the path and the reason.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let unreadable = |e: std::io::Error| Error::Unreadable { path: path.display().to_string(), why: e.to_string() };
        // Opening a pipe would wait for somebody to write to it.
        if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
            return Err(Error::Format { path: path.display().to_string(), why: "it is not a regular file".into() });
        }
        let mut magic = [0u8; 4];
        let mut file = std::fs::File::open(path).map_err(unreadable)?;
        if std::io::Read::read_exact(&mut file, &mut magic).is_err() {
            return Err(Error::Format {
                path: path.display().to_string(),
                why: "it is shorter than four bytes".into(),
            });
        }
        if magic == *b"PK\x03\x04" { pth::open(path) } else { safetensors::open(path) }
    }

    /// A safetensors file that is part of the binary.
    pub fn embedded(bytes: &'static [u8]) -> Result<Self, Error> {
        safetensors::embedded(bytes)
    }

    fn new(tensors: BTreeMap<String, TensorInfo>, source: impl Source + 'static) -> Self {
        Self { tensors, source: Box::new(source), lora: None }
    }

    /// Merges a LoRA adapter into every tensor that is read from now on.
    pub fn with_lora(mut self, lora: Lora) -> Result<Self, Error> {
        lora.check(&self.tensors)?;
        self.lora = Some(Box::new(lora));
        Ok(self)
    }

    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// One tensor, LoRA merged, checked to be finite.
    pub(super) fn read(&self, name: &str) -> Result<Tensor, Error> {
        let mut tensor = self.source.read(name)?;
        if let Some(lora) = &self.lora {
            tensor = lora.merge(name, tensor)?;
        }
        match tensor.dtype() {
            DType::F32 | DType::F16 | DType::BF16 => {}
            other => return Err(Error::Type { name: name.into(), found: format!("{other:?}") }),
        }
        Ok(tensor)
    }

    /// BLAKE3 over names, shapes, types and bytes in name order, after the LoRA merge: equal for the same weights in any
    /// container, so that sessions outlive a conversion.
    pub fn fingerprint(&self) -> Result<String, Error> {
        let mut hash = blake3::Hasher::new();
        for (name, info) in &self.tensors {
            let tensor = self.read(name)?;
            hash.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
            hash.update(format!("{:?}{:?}", tensor.dtype(), info.shape).as_bytes());
            Weight::from_tensor(&tensor)?.hash(&mut hash);
        }
        Ok(hash.finalize().to_hex().to_string())
    }

    pub fn parameters(&self) -> u64 {
        self.tensors.values().map(|t| t.shape.iter().product::<usize>() as u64).sum()
    }
}

/// Takes a model's tensors out of a checkpoint by name and shape, and knows at the end which ones nobody took.
pub struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    generation: &'static str,
    taken: RefCell<BTreeSet<String>>,
    progress: &'a dyn Fn(usize, usize),
}

impl<'a> Loader<'a> {
    pub fn new(checkpoint: &'a Checkpoint, generation: &'static str, progress: &'a dyn Fn(usize, usize)) -> Self {
        Self { checkpoint, generation, taken: RefCell::default(), progress }
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

    fn take(&self, name: &str, expected: &[usize]) -> Result<Tensor, Error> {
        let found = self.checkpoint.shape(name).ok_or_else(|| self.missing(name, format!("{expected:?}")))?;
        if without_leading_ones(found) != without_leading_ones(expected) {
            let found = found.to_vec();
            return Err(Error::Shape { name: name.into(), found, expected: format!("{expected:?}") });
        }
        let tensor = self.checkpoint.read(name)?.reshape(expected)?;
        let mut taken = self.taken.borrow_mut();
        taken.insert(name.to_owned());
        (self.progress)(taken.len(), self.checkpoint.tensors.len());
        Ok(tensor)
    }

    /// A small tensor of the given shape as f32 values, row-major.
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        Ok(self.weight(name, shape)?.to_f32())
    }

    /// A tensor of the given shape in its stored type, row-major.
    pub fn weight(&self, name: &str, shape: &[usize]) -> Result<Weight, Error> {
        let weight = Weight::from_tensor(&self.take(name, shape)?)?;
        weight.check_finite(name)?;
        Ok(weight)
    }

    /// A matrix `[rows, cols]` in its stored type.
    pub fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Weight, Error> {
        self.weight(name, &[rows, cols])
    }

    /// Names a tensor that may be in the file though this model has no use for it.
    pub fn allow(&self, name: &str) {
        self.taken.borrow_mut().insert(name.to_owned());
    }

    /// Refuses a file with tensors nobody took: computing without them would be another model.
    pub fn finish(self) -> Result<(), Error> {
        let taken = self.taken.into_inner();
        let left: Vec<_> = self.checkpoint.tensors.keys().filter(|n| !taken.contains(*n)).take(8).cloned().collect();
        if left.is_empty() {
            return Ok(());
        }
        Err(Error::Unexpected { generation: self.generation, names: left.join(", ") })
    }
}

/// Trainers store vectors as `[1, 1, C]` as well as `[C]`.
fn without_leading_ones(shape: &[usize]) -> &[usize] {
    &shape[shape.iter().take_while(|&&d| d == 1).count()..]
}
