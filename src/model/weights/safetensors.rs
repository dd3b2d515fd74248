//! `.safetensors`, alone or in shards.

use safetensors::{Dtype, SafeTensors};

use super::Kind;
use super::file::Place;

/// The tensors of a safetensors file, with what its header says beside.
pub fn read(file: &[u8]) -> Result<Vec<Place>, String> {
    // `deserialize` checks that offsets are inside the file, do not overlap and agree with shapes and types.
    let parsed = SafeTensors::deserialize(file).map_err(|e| e.to_string())?;
    let start = file.as_ptr() as usize;
    let place = |(name, view): (&str, safetensors::tensor::TensorView)| {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::F32,
            Dtype::F16 => Kind::F16,
            Dtype::BF16 => Kind::BF16,
            other => return Err(format!("tensor `{name}` has type {other:?}; f32, f16 and bf16 are supported")),
        };
        if kind.tensor_bytes(view.shape()) != Some(view.data().len()) {
            return Err(format!("tensor `{name}` is too large"));
        }
        let from = view.data().as_ptr() as usize - start;
        let bytes = from..from + view.data().len();
        Ok(Place { name: name.into(), kind, shape: view.shape().to_vec(), strides: None, bytes })
    };
    parsed.iter().map(place).collect()
}
