//! The same values in another type.

use std::sync::{Mutex, PoisonError};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};

use super::kernels::{Kind, Weight};
use super::{Checkpoint, Error};

/// What a tensor `name` becomes where `wanted` is asked for: itself, unless it is a large matrix. Where rows are not
/// whole blocks something that fits, as in llama.cpp's quantiser.
pub fn becomes(name: &str, shape: &[usize], wanted: Kind) -> Option<Kind> {
    let fits = |kind: &Kind| kind.tensor_bytes(shape).is_some();
    is_large_matrix(name, shape).then(|| [wanted, Kind::Q8_0, Kind::F16].into_iter().find(fits).unwrap_or(Kind::F16))
}

/// Whether a tensor is a linear layer, the embedding or the head: nearly all bytes, and the least sensitive ones.
pub fn is_large_matrix(name: &str, shape: &[usize]) -> bool {
    name.ends_with(".weight") && matches!(shape, [rows, cols] if *rows > 1 && *cols > 1)
}

/// Refuses to make `wanted` of large matrices that are quantised already, in another way: what they have lost would be lost
/// twice. Only what becomes a type that `holds` it may change.
///
/// # Errors
/// [`Error::Convert`] names such a matrix, and what to do.
pub fn quantised_once(checkpoint: &Checkpoint, wanted: Kind, holds: impl Fn(Kind) -> bool) -> Result<(), Error> {
    for (name, info) in checkpoint.tensors() {
        let becomes = becomes(name, &info.shape, wanted);
        if let Some(kind) = becomes.filter(|&kind| info.kind.quantised() && kind != info.kind && !holds(kind)) {
            let own = info.kind;
            return Err(Error::Convert(format!(
                "`{name}` is quantised already, as {own}; quantised once more, as {kind}, it would lose more than {kind} of \
                 the original: begin from the original file, or leave this one as it is"
            )));
        }
    }
    Ok(())
}

/// Values that are cast at a time: whole blocks of every kind.
const CHUNK: usize = 1 << 16;

/// `weight` as `kind`: rounded to the nearest, or quantised as ggml does it.
///
/// # Errors
/// [`Error::Convert`] when a value is too large for the type, or rows are not whole blocks.
pub fn cast<'a>(name: &str, weight: Weight<'a>, kind: Kind) -> Result<Weight<'a>, Error> {
    if weight.kind() == kind {
        return Ok(weight);
    }
    let unfit = || Error::Convert(format!("`{name}` of shape {:?} cannot be {kind}", weight.shape()));
    let mut bytes = vec![0; kind.tensor_bytes(weight.shape()).ok_or_else(unfit)?];
    let failed = Mutex::new(None);
    // In parts, on all processors: so no more than the new values takes memory.
    let of = |kind: Kind| CHUNK / kind.block() * kind.block_bytes();
    weight.pack_into(&mut bytes, (of(kind), of(weight.kind())), |n, bytes| {
        let mut values = vec![0f32; bytes.len() / kind.block_bytes() * kind.block()];
        weight.unpack(n * CHUNK, &mut values);
        if let Err(error) = write(&values, kind, bytes) {
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let cast = Weight::new(kind, weight.shape(), bytes).ok_or_else(unfit)?;
    let too_large = |_| Error::Convert(format!("`{name}` holds values that are too large for {kind}"));
    cast.check_finite(name).map_err(too_large)?;
    Ok(cast)
}

/// Writes `values` as `kind`, whole blocks of it, into `bytes`.
fn write(values: &[f32], kind: Kind, bytes: &mut [u8]) -> Result<(), Error> {
    let dtype = match kind {
        Kind::F32 => {
            each(values, bytes, f32::to_le_bytes);
            return Ok(());
        }
        Kind::F16 => {
            each(values, bytes, |v| f16::from_f32(v).to_le_bytes());
            return Ok(());
        }
        Kind::BF16 => {
            each(values, bytes, |v| bf16::from_f32(v).to_le_bytes());
            return Ok(());
        }
        Kind::Q8_0 => GgmlDType::Q8_0,
        Kind::Q4_0 => GgmlDType::Q4_0,
        Kind::Q4_1 => GgmlDType::Q4_1,
        Kind::Q5_0 => GgmlDType::Q5_0,
        Kind::Q5_1 => GgmlDType::Q5_1,
        Kind::Q4K => GgmlDType::Q4K,
        Kind::Q5K => GgmlDType::Q5K,
        Kind::Q6K => GgmlDType::Q6K,
    };
    let values = Tensor::from_slice(values, values.len(), &Device::Cpu)?;
    bytes.copy_from_slice(&QTensor::quantize(&values, dtype)?.data()?);
    Ok(())
}

fn each<const N: usize>(values: &[f32], bytes: &mut [u8], one: impl Fn(f32) -> [u8; N]) {
    bytes.as_chunks_mut().0.iter_mut().zip(values).for_each(|(bytes, &value)| *bytes = one(value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_close_and_what_does_not_fit_is_said() {
        let values: Vec<f32> = (0..512).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let weight = Weight::from_f32(&[2, 256], &values);
        for (kind, most) in Kind::ALL.into_iter().zip([0.0, 5e-4, 4e-3, 4e-3, 0.13, 0.07, 0.07, 0.04, 0.07, 0.04, 0.04])
        {
            let cast = cast("x", weight.clone(), kind).expect("a cast");
            assert_eq!((cast.kind(), cast.shape()), (kind, weight.shape()));
            let worst = cast.to_f32().iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(worst <= most && (worst > 0.0 || kind == Kind::F32), "{kind}: {worst}");
        }
        let large = Weight::from_f32(&[2], &[1e30, 1.0]);
        let error = cast("x", large, Kind::F16).expect_err("too large").to_string();
        assert!(error.contains("`x` holds values that are too large for f16"), "{error}");
        assert!(cast("x", Weight::from_f32(&[3], &[1.0; 3]), Kind::Q8_0).is_err());
    }

    #[test]
    fn parts_make_the_whole() {
        let values: Vec<f32> = (0..3 * CHUNK / 2).map(|i| ((i * 7919 % 10_007) as f32 - 5000.0) / 300.0).collect();
        for (kind, dtype) in [(Kind::Q4_0, GgmlDType::Q4_0), (Kind::Q6K, GgmlDType::Q6K)] {
            let whole = Tensor::from_slice(&values, values.len(), &Device::Cpu).expect("a tensor");
            let whole = QTensor::quantize(&whole, dtype).expect("blocks");
            let cast = cast("x", Weight::from_f32(&[values.len() / 256, 256], &values), kind).expect("a cast");
            assert!(cast.bytes() == &*whole.data().expect("bytes"), "{kind}");
        }
    }

    #[test]
    fn only_large_matrices_change_and_to_what_fits() {
        for (name, shape, expected) in [
            ("head.weight", &[512, 256][..], Some(Kind::Q4K)),
            ("head.weight", &[512, 64], Some(Kind::Q8_0)),
            ("head.weight", &[512, 20], Some(Kind::F16)),
            ("ln_out.weight", &[256], None),
            ("blocks.0.att.w1", &[256, 64], None),
        ] {
            assert_eq!(becomes(name, shape, Kind::Q4K), expected, "{name} {shape:?}");
        }
    }
}
