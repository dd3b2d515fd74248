//! `.safetensors`: memory-mapped, so that a file of any size costs no memory of its own.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};

use super::{Checkpoint, Source, TensorInfo};
use crate::model::Error;

enum Bytes {
    Mapped(memmap2::Mmap),
    Embedded(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Embedded(bytes) => bytes,
        }
    }
}

struct File {
    bytes: Bytes,
    places: BTreeMap<String, (TensorInfo, Range<usize>)>,
}

impl Source for File {
    fn read(&self, name: &str) -> Result<Tensor, Error> {
        let Some((info, range)) = self.places.get(name) else {
            return Err(Error::Unknown(format!("no tensor `{name}`")));
        };
        Ok(Tensor::from_raw_buffer(&self.bytes[range.clone()], info.dtype, &info.shape, &Device::Cpu)?)
    }
}

pub(super) fn open(path: &Path) -> Result<Checkpoint, Error> {
    let unreadable = |e: std::io::Error| Error::Unreadable { path: path.display().to_string(), why: e.to_string() };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    // SAFETY: the map is read-only and private. A file that another process shortens while it is mapped would fault, as
    // with every memory-mapped loader; checkpoints are not edited while they are loaded.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(unreadable)?;
    read(Bytes::Mapped(map), &path.display().to_string())
}

pub(super) fn embedded(bytes: &'static [u8]) -> Result<Checkpoint, Error> {
    read(Bytes::Embedded(bytes), "the embedded model")
}

fn read(bytes: Bytes, path: &str) -> Result<Checkpoint, Error> {
    let format = |why: String| Error::Format { path: path.into(), why };
    // `deserialize` checks that offsets are inside the file, do not overlap and agree with shapes and types.
    let parsed = SafeTensors::deserialize(&bytes).map_err(|e| format(e.to_string()))?;
    let mut places = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    let start = bytes.as_ptr() as usize;
    for (name, view) in parsed.iter() {
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(Error::Type { name: name.into(), found: format!("{other:?}") }),
        };
        let info = TensorInfo { dtype, shape: view.shape().to_vec() };
        let from = view.data().as_ptr() as usize - start;
        places.insert(name.to_owned(), (info.clone(), from..from + view.data().len()));
        tensors.insert(name.to_owned(), info);
    }
    drop(parsed);
    Ok(Checkpoint::new(tensors, File { bytes, places }))
}
