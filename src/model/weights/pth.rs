//! `.pth`: PyTorch's zip format, through candle's pickle reader, which builds data and executes nothing.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use candle_core::pickle::PthTensors;

use super::{Checkpoint, Source, TensorInfo};
use crate::model::Error;

struct Pth {
    tensors: PthTensors,
    path: String,
}

impl Source for Pth {
    fn read(&self, name: &str) -> Result<Tensor, Error> {
        match self.tensors.get(name) {
            Ok(Some(tensor)) => Ok(tensor),
            Ok(None) => Err(Error::Unknown(format!("no tensor `{name}`"))),
            Err(e) => {
                Err(Error::Format { path: self.path.clone(), why: format!("tensor `{name}`: {}", first_line(&e)) })
            }
        }
    }
}

pub(super) fn open(path: &Path) -> Result<Checkpoint, Error> {
    let shown = path.display().to_string();
    let format = |why: String| Error::Format { path: shown.clone(), why };
    let length = std::fs::metadata(path).map_err(|e| format(e.to_string()))?.len();
    let tensors = PthTensors::new(path, None).map_err(|e| format(first_line(&e)))?;
    let mut infos = BTreeMap::new();
    let mut bytes = 0u64;
    for (name, info) in tensors.tensor_infos() {
        // Trainers store tensors uncompressed, so what the shapes promise must be in the file: a lying shape would
        // otherwise make the reader allocate whatever it says.
        let size = (info.dtype.size_in_bytes() as u64)
            .checked_mul(info.layout.dims().iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64)).unwrap_or(u64::MAX));
        bytes = bytes.saturating_add(size.unwrap_or(u64::MAX));
        if bytes > length {
            return Err(format(format!("tensor `{name}` is larger than the file has room for")));
        }
        infos.insert(name.clone(), TensorInfo { dtype: info.dtype, shape: info.layout.dims().to_vec() });
    }
    if infos.is_empty() {
        return Err(format("it holds no tensors".into()));
    }
    Ok(Checkpoint::new(infos, Pth { tensors, path: shown.clone() }))
}

/// What went wrong, without the backtrace that candle writes behind it when the environment asks for one.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
