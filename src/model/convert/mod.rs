//! Writes a checkpoint in another format.
//!
//! A format turns the checkpoint into a list of [`Target`]s and says what stands before, between and behind their bytes;
//! tensors are read, converted and written one at a time.

mod gguf;
mod pth;
mod safetensors;

use std::io::{Seek, Write};

use super::cast::{becomes, cast, is_large_matrix, quantised_once};
use super::weights::names::Op;
use super::{Checkpoint, Error, Kind, TensorInfo, registry};

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// PyTorch's zip format, with BlinkDL's names.
    Pth,
    /// Safetensors, with BlinkDL's names.
    Safetensors,
    /// GGUF, with llama.cpp's names: v6 and v7 only.
    Gguf,
}

impl Format {
    /// The format of a file of this name.
    pub fn of(path: &std::path::Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "pth" | "pt" => Some(Self::Pth),
            // Not `st`: web-rwkv's files of that ending have another layout, and would be read back as such.
            "safetensors" => Some(Self::Safetensors),
            "gguf" => Some(Self::Gguf),
            _ => None,
        }
    }
}

/// What to write of a checkpoint.
pub struct Conversion<'a> {
    pub checkpoint: &'a Checkpoint,
    pub format: Format,
    /// The type of the large matrices; everything else, small and sensitive, keeps its own. `None` = all keep theirs.
    pub kind: Option<Kind>,
    /// For GGUF: each id's token as the inside of a Python bytes literal, empty where it has no text. `None` = the file
    /// gets no vocabulary.
    pub vocabulary: Option<Vec<Vec<u8>>>,
    /// For GGUF: the model's name.
    pub name: String,
    /// Called with (tensors written, tensors in all).
    pub progress: &'a dyn Fn(usize, usize),
}

/// Something that can be written, and found again.
pub trait Out: Write + Seek {}
impl<W: Write + Seek> Out for W {}

/// A tensor of the new file.
struct Target {
    name: String,
    kind: Kind,
    shape: Vec<usize>,
    /// Original tensors, one after the other, each with what is done to it.
    parts: Vec<(String, Vec<Op>)>,
}

impl Target {
    /// An original tensor as it is, in another type.
    fn of(name: &str, kind: Kind, shape: &[usize]) -> Self {
        Self { name: name.into(), kind, shape: shape.into(), parts: vec![(name.into(), Vec::new())] }
    }

    fn bytes(&self) -> Result<usize, Error> {
        let bytes = self.kind.tensor_bytes(&self.shape);
        bytes
            .ok_or_else(|| Error::Convert(format!("`{}` of shape {:?} cannot be {}", self.name, self.shape, self.kind)))
    }
}

impl Conversion<'_> {
    /// Writes the checkpoint to `out`.
    ///
    /// # Errors
    /// [`Error::Convert`] for what the format cannot hold, and for what would be quantised twice; what is wrong with the checkpoint;
    /// [`Error::Write`].
    pub fn write(&self, out: &mut impl Out) -> Result<(), Error> {
        if let Some(kind) = self.kind {
            quantised_once(self.checkpoint, kind, |kind| !kind.quantised())?;
        }
        match self.format {
            Format::Pth => pth::write(self, out),
            Format::Safetensors => safetensors::write(self, out),
            Format::Gguf => gguf::write(self, out),
        }
    }

    /// How many large matrices cannot have the wanted type in a GGUF file, because their rows are no whole blocks of it.
    pub fn unfit(&self) -> usize {
        let Some(kind) = self.kind else { return 0 };
        let unfit = |(name, info): &(&String, &TensorInfo)| {
            is_large_matrix(name, &info.shape) && kind.tensor_bytes(&info.shape).is_none()
        };
        self.checkpoint.tensors().iter().filter(unfit).count()
    }

    /// Every tensor under its original name.
    fn originals(&self) -> Result<Vec<Target>, Error> {
        if let Some(kind) = self.kind.filter(|kind| kind.block() > 1) {
            return Err(Error::Convert(format!("only GGUF holds {kind}; f32, f16 and bf16 go everywhere")));
        }
        let target = |(name, info): (&String, &TensorInfo)| {
            // Blocks of a GGUF file have no place elsewhere; f16 holds them to within a rounding of their scales.
            let own = if info.kind.block() > 1 { Kind::F16 } else { info.kind };
            let kind = self.kind.filter(|_| is_large_matrix(name, &info.shape)).unwrap_or(own);
            Target::of(name, kind, &info.shape)
        };
        Ok(self.checkpoint.tensors().iter().map(target).collect())
    }

    /// The name of the checkpoint's generation.
    fn generation(&self) -> Result<&'static str, Error> {
        registry::generation(self.checkpoint).map(|generation| generation.name)
    }

    /// Shows `put` the bytes of every target, in order.
    fn each(&self, targets: &[Target], mut put: impl FnMut(usize, &[u8]) -> Result<(), Error>) -> Result<(), Error> {
        for (n, target) in targets.iter().enumerate() {
            let mut bytes = Vec::with_capacity(target.bytes()?);
            for (name, ops) in &target.parts {
                let read = self.checkpoint.read(name)?;
                read.check_finite(name)?;
                let made = ops.iter().try_fold(read, |weight, op| op.apply(weight));
                let made = made.ok_or_else(|| Error::Convert(format!("`{name}` does not fit `{}`", target.name)))?;
                bytes.extend_from_slice(cast(name, made, target.kind)?.bytes());
                self.checkpoint.release(name);
            }
            // Its parts may have other sizes than those it was planned by.
            if bytes.len() != target.bytes()? {
                return Err(Error::Convert(format!("what belongs into `{}` is not {:?}", target.name, target.shape)));
            }
            put(n, &bytes)?;
            (self.progress)(n + 1, targets.len());
        }
        Ok(())
    }
}
