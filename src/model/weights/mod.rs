//! Checkpoints: named tensors in the original trainer's names, wherever they come from.
//!
//! A reader of a container format ([`pth`], [`safetensors`], …) is a pure function from the bytes of a file to
//! [`Place`]s; [`names`] makes the original trainer's tensors of them. Files are mapped into memory, and a tensor is
//! copied only where it is packed for the machine.

mod container;
mod file;
mod folder;
mod ggml;
pub(super) mod gguf;
mod loader;
mod lora;
pub(super) mod names;
mod pickle;
mod pth;
mod safetensors;
mod state_dict;
mod unknown;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use super::Error;
use super::kernels::{Kind, Weight};
use crate::types::readable;
use file::{File, Place};
use gguf::Gguf;
pub use loader::Loader;
pub use lora::Lora;
use names::{Origin, Said};

/// Type and shape of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub kind: Kind,
    pub shape: Vec<usize>,
}

/// What the embedding table is called: by all, and by v1.
const EMBEDDINGS: [&str; 2] = ["emb.weight", "tok_emb.weight"];

/// The tensors of one checkpoint, in the original trainer's names, read one at a time.
pub struct Checkpoint {
    files: Vec<File>,
    origins: BTreeMap<String, Origin>,
    tensors: BTreeMap<String, TensorInfo>,
    format: &'static str,
    /// What a GGUF file says beside its tensors.
    gguf: Option<Gguf>,
    lora: Option<Box<Lora>>,
}

impl Checkpoint {
    /// Opens a checkpoint: a file whose format is told by its content, an index of shards, or a folder as Hugging Face
    /// lays it out.
    ///
    /// # Errors
    /// [`Error::Unreadable`] or [`Error::Format`], with the path and the reason.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::of(folder::files(path)?.iter().map(|path| File::open(path)).collect::<Result<_, _>>()?)
    }

    /// A file whose bytes are in memory, such as one that is part of the binary; `name` goes into errors.
    pub fn in_memory(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self, Error> {
        Self::of(vec![File::in_memory(name, bytes.into())])
    }

    fn of(files: Vec<File>) -> Result<Self, Error> {
        let mut places = Vec::new();
        let (mut format, mut gguf) = ("", None);
        for (n, file) in files.iter().enumerate() {
            let read = Container::read(file).map_err(|why| file.wrong(why))?;
            (format, gguf) = (read.format, read.gguf);
            places.extend(read.places.into_iter().map(|place| (n, place)));
        }
        let wrong = |why| files[0].wrong(why);
        let all: Vec<_> = places.iter().map(|(_, place)| place).collect();
        let said = match &gguf {
            Some(gguf) => Said::Gguf(gguf),
            None if format == ggml::FORMAT => Said::RwkvCpp,
            None if files[0].path.extension().is_some_and(|e| e == "st" || e == "state") => Said::WebRwkv,
            None => Said::Nothing,
        };
        let reading = names::reading(&all, said).map_err(wrong)?;
        let origins = names::read(places, &*reading).map_err(wrong)?;
        if origins.is_empty() {
            return Err(wrong("it holds no tensors".into()));
        }
        let tensors = origins.iter().map(|(name, origin)| (name.clone(), origin.info.clone())).collect();
        Ok(Self { files, origins, tensors, format, gguf, lora: None })
    }

    /// Rows of the embedding table, whatever its generation calls it: every token id is below it.
    pub fn vocabulary_size(&self) -> Option<usize> {
        let &[rows, _] = EMBEDDINGS.iter().find_map(|name| self.shape(name))? else {
            return None;
        };
        Some(rows)
    }

    /// Values and bytes of the embedding table, of which a token needs one row.
    pub fn embedding(&self) -> Option<(u64, u64)> {
        let info = EMBEDDINGS.iter().find_map(|name| self.tensors.get(*name))?;
        Some((info.shape.iter().product::<usize>() as u64, info.kind.tensor_bytes(&info.shape)? as u64))
    }

    /// The files it is in, and those of its LoRA adapter.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let adapter = self.lora.iter().flat_map(|lora| lora.files());
        self.files.iter().chain(adapter).map(|file| file.path.as_path())
    }

    /// The container it came in.
    pub fn format(&self) -> &'static str {
        self.format
    }

    /// The vocabulary in the file, if there is one: for each id the inside of a Python bytes literal, empty where it has
    /// no text.
    ///
    /// # Errors
    /// [`Error::Vocabulary`] for a vocabulary of another kind than RWKV's.
    pub fn vocabulary(&self) -> Result<Option<Vec<Vec<u8>>>, Error> {
        let Some(gguf) = &self.gguf else { return Ok(None) };
        match gguf.str("tokenizer.ggml.model") {
            Some("rwkv") => gguf::vocabulary(gguf).map(Some).map_err(Error::Vocabulary),
            None | Some("none") => Ok(None),
            Some(other) => {
                let other = readable(other);
                Err(Error::Vocabulary(format!("it is of the kind `{other}`; give a tokenizer that fits")))
            }
        }
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

    /// One tensor, LoRA merged. Its values need not be finite.
    pub(super) fn read(&self, name: &str) -> Result<Weight<'_>, Error> {
        let origin = self.origins.get(name).ok_or_else(|| Error::Unknown(format!("no tensor `{name}`")))?;
        let file = &self.files[origin.file];
        let lies = || file.wrong(format!("tensor `{}` is not what its description says", origin.place.name));
        let weight = stored(file, &origin.place).and_then(|stored| origin.apply(stored)).ok_or_else(lies)?;
        match &self.lora {
            Some(lora) => lora.merge(name, weight),
            None => Ok(weight),
        }
    }

    /// Lets go of the memory behind a tensor that was read.
    pub(super) fn release(&self, name: &str) {
        if let Some(origin) = self.origins.get(name) {
            self.files[origin.file].release(origin.place.bytes.clone());
        }
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.tensors.values().filter_map(|t| t.kind.tensor_bytes(&t.shape)).fold(0, usize::saturating_add)
    }

    pub fn parameters(&self) -> u64 {
        self.tensors.values().map(|t| t.shape.iter().product::<usize>() as u64).sum()
    }
}

/// What a container format says of a file.
struct Container {
    format: &'static str,
    places: Vec<Place>,
    gguf: Option<Gguf>,
}

impl Container {
    fn read(file: &File) -> Result<Self, String> {
        let (format, places) = match &**file {
            _ if gguf::is_gguf(file) => {
                let mut gguf = gguf::read(file)?;
                let places = std::mem::take(&mut gguf.tensors);
                return Ok(Self { format: "gguf", places, gguf: Some(gguf) });
            }
            _ if ggml::is_ggml(file) => (ggml::FORMAT, ggml::read(file)?.tensors),
            _ if pth::is_pth(file) => ("pth", pth::read(file)?),
            _ => match unknown::explain(&file.path, file) {
                Some(why) => return Err(why),
                None => ("safetensors", safetensors::read(file)?),
            },
        };
        Ok(Self { format, places, gguf: None })
    }
}

/// The values at a place, row by row.
fn stored<'a>(file: &'a File, place: &Place) -> Option<Weight<'a>> {
    let bytes = file.get(place.bytes.clone())?;
    let Some(strides) = &place.strides else {
        return Some(Weight::new(place.kind, &place.shape, bytes)?.backed_by(file));
    };
    let size = place.kind.block_bytes();
    let mut values = Vec::with_capacity(place.kind.tensor_bytes(&place.shape)?);
    let mut at = vec![0usize; place.shape.len()];
    for _ in 0..place.shape.iter().product() {
        let element: usize = at.iter().zip(strides).map(|(at, stride)| at * stride).sum();
        values.extend_from_slice(bytes.get(element * size..(element + 1) * size)?);
        // The next index, the last axis fastest.
        for axis in (0..at.len()).rev() {
            at[axis] += 1;
            if at[axis] < place.shape[axis] {
                break;
            }
            at[axis] = 0;
        }
    }
    Weight::new(place.kind, &place.shape, Cow::Owned(values))
}
