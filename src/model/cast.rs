//! The same values in another type.

use std::sync::{Mutex, PoisonError};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};

use super::Error;
use super::kernels::{Kind, Weight, parallel_chunks};

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

/// Values that are quantised at a time: whole blocks of every kind.
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
    let values = weight.to_f32();
    let bytes: Vec<u8> = match kind {
        Kind::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Kind::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Kind::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        blocks => quantise(&values, vec![0; blocks.tensor_bytes(weight.shape()).ok_or_else(unfit)?], blocks)?,
    };
    let cast = Weight::new(kind, weight.shape(), bytes).ok_or_else(unfit)?;
    let too_large = |_| Error::Convert(format!("`{name}` holds values that are too large for {kind}"));
    cast.check_finite(name).map_err(too_large)?;
    Ok(cast)
}

/// Fills `blocks` with `values`, whose rows are whole blocks, on all processors.
fn quantise(values: &[f32], mut blocks: Vec<u8>, kind: Kind) -> Result<Vec<u8>, Error> {
    let dtype = match kind {
        Kind::Q8_0 => GgmlDType::Q8_0,
        Kind::Q4_0 => GgmlDType::Q4_0,
        Kind::Q4_1 => GgmlDType::Q4_1,
        Kind::Q5_0 => GgmlDType::Q5_0,
        Kind::Q5_1 => GgmlDType::Q5_1,
        Kind::Q4K => GgmlDType::Q4K,
        Kind::Q5K => GgmlDType::Q5K,
        Kind::Q6K => GgmlDType::Q6K,
        Kind::F32 | Kind::F16 | Kind::BF16 => return Err(Error::Convert(format!("{kind} has no blocks"))),
    };
    let failed = Mutex::new(None);
    parallel_chunks(&mut blocks, CHUNK / kind.block() * kind.block_bytes(), |n, blocks| {
        let values = &values[n * CHUNK..values.len().min((n + 1) * CHUNK)];
        let quantised = Tensor::from_slice(values, values.len(), &Device::Cpu)
            .and_then(|values| QTensor::quantize(&values, dtype))
            .and_then(|quantised| Ok(quantised.data()?.into_owned()));
        match quantised {
            Ok(quantised) => blocks.copy_from_slice(&quantised),
            Err(error) => *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error),
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error.into()),
        None => Ok(blocks),
    }
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
