//! The same values in another type.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};

use super::{Error, Kind, Weight};

/// `weight` as `kind`: rounded to the nearest, or quantised as ggml does it.
///
/// # Errors
/// [`Error::Convert`] when a value is too large for the type, or rows are not whole blocks.
pub fn cast<'a>(name: &str, weight: Weight<'a>, kind: Kind) -> Result<Weight<'a>, Error> {
    if weight.kind() == kind {
        return Ok(weight);
    }
    let values = weight.to_f32();
    let bytes: Vec<u8> = match kind {
        Kind::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Kind::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Kind::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        blocks => quantise(values, weight.shape(), blocks)?,
    };
    let cast = Weight::new(kind, weight.shape(), bytes);
    let cast =
        cast.ok_or_else(|| Error::Convert(format!("`{name}` of shape {:?} cannot be {kind}", weight.shape())))?;
    let too_large = |_| Error::Convert(format!("`{name}` holds values that are too large for {kind}"));
    cast.check_finite(name).map_err(too_large)?;
    Ok(cast)
}

fn quantise(values: Vec<f32>, shape: &[usize], kind: Kind) -> Result<Vec<u8>, Error> {
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
    let quantised = QTensor::quantize(&Tensor::from_vec(values, shape, &Device::Cpu)?, dtype)?;
    Ok(quantised.data()?.into_owned())
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
}
