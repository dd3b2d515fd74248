//! In how many bits a state's values are stored.

use std::borrow::Cow;

use half::f16;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::Damaged;
use crate::types::SegmentData;

/// How snapshots are written. Any of them is read, whatever is configured: each says of itself what it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Storage {
    pub precision: Precision,
    /// Also by zstd, which changes no value.
    pub compress: bool,
}

/// What becomes of a state's f32 values when it is stored. All but [`F32`](Self::F32) lose something: what goes on from the
/// state is then near what would have come, and no longer the same to the bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", try_from = "String")]
pub enum Precision {
    /// Nothing.
    #[default]
    F32,
    /// Half the bytes: 11 significant bits. A segment with a value beyond f16's range stays in f32.
    F16,
    /// About a quarter: matrix states in 8 bits with a scale for each head, all else, which is small, as with
    /// [`F16`](Self::F16).
    Int8,
}

impl TryFrom<String> for Precision {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Ok(match &*name {
            "f32" => Self::F32,
            "f16" => Self::F16,
            "int8" => Self::Int8,
            _ => return Err(format!("a precision is f32, f16 or int8, not `{name}`")),
        })
    }
}

/// A segment's values as they are stored.
pub(super) struct Packed<'a> {
    /// F32, F16 or I8.
    pub dtype: Dtype,
    /// Little endian, row-major.
    pub bytes: Cow<'a, [u8]>,
    /// For I8 one for each head, nothing else.
    pub scales: Vec<f32>,
}

/// The largest integer that is stored; -128 is not.
const MOST: f32 = 127.0;

/// How many scales an I8 segment of this shape has; `None` = it cannot be one. A head is one entry of the first of three or
/// more sides: vectors have none.
pub(super) fn heads(shape: &[usize]) -> Option<usize> {
    (shape.len() >= 3).then(|| shape[0])
}

/// Values whose shape is that of the segment and which are finite, as `precision` stores them.
pub(super) fn pack(segment: &SegmentData, precision: Precision) -> Packed<'_> {
    let SegmentData { shape, data, .. } = segment;
    let plain = || Packed {
        dtype: Dtype::F32,
        bytes: data.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into(),
        scales: Vec::new(),
    };
    match (precision, heads(shape)) {
        (Precision::F32, _) => plain(),
        (Precision::Int8, Some(heads)) if !data.is_empty() => in_bytes(data, heads),
        _ if data.iter().any(|x| f16::from_f32(*x).is_infinite()) => plain(),
        _ => {
            let bytes: Vec<u8> = data.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
            Packed { dtype: Dtype::F16, bytes: bytes.into(), scales: Vec::new() }
        }
    }
}

fn in_bytes(data: &[f32], heads: usize) -> Packed<'static> {
    let (mut bytes, mut scales) = (Vec::with_capacity(data.len()), Vec::with_capacity(heads));
    for head in data.chunks_exact(data.len() / heads) {
        let scale = head.iter().fold(0f32, |most, x| most.max(x.abs())) / MOST;
        // At the very end of f32's range the product may be rounded beyond it.
        let scale = if (scale * MOST).is_finite() { scale } else { scale.next_down() };
        scales.push(scale);
        // A head of zeros, or of values too small for a scale, is one of zeros.
        let inverse = if scale.is_normal() { 1.0 / scale } else { 0.0 };
        bytes.extend(head.iter().map(|x| (x * inverse).round_ties_even().clamp(-MOST, MOST) as i8 as u8));
    }
    Packed { dtype: Dtype::I8, bytes: bytes.into(), scales }
}

/// Bytes of one value of a type that segments are stored in.
pub(super) fn width(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 => Some(2),
        Dtype::I8 => Some(1),
        _ => None,
    }
}

/// The values of `bytes`, whose number fits `shape`. I8 takes its scales from the front of `scales`.
///
/// # Errors
/// If there are too few scales. What is not finite is not noticed here.
pub(super) fn unpack(dtype: Dtype, shape: &[usize], bytes: &[u8], scales: &mut &[f32]) -> Result<Vec<f32>, Damaged> {
    match dtype {
        Dtype::F32 => Ok(bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect()),
        Dtype::F16 => {
            let halves: Vec<f16> = bytes.as_chunks().0.iter().map(|two| f16::from_le_bytes(*two)).collect();
            Ok(halves.to_f32_vec())
        }
        _ => {
            let heads = heads(shape).unwrap_or(0);
            let Some((own, rest)) = scales.split_at_checked(heads) else {
                return Err(Damaged(format!("there are {} scales where {heads} are needed", scales.len())));
            };
            *scales = rest;
            let size = bytes.len().checked_div(heads).unwrap_or(0);
            let head = |(n, scale): (usize, &f32)| {
                let scale = *scale;
                bytes[n * size..][..size].iter().map(move |byte| f32::from(*byte as i8) * scale)
            };
            Ok(own.iter().enumerate().flat_map(head).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn segment(shape: &[usize], data: Vec<f32>) -> SegmentData {
        SegmentData { name: "s".into(), shape: shape.into(), data }
    }

    fn again(segment: &SegmentData, precision: Precision) -> (Dtype, Vec<f32>) {
        let packed = pack(segment, precision);
        let values = segment.data.len();
        assert_eq!(packed.bytes.len(), values * width(packed.dtype).expect("a type of segments"));
        let mut scales = &packed.scales[..];
        let back = unpack(packed.dtype, &segment.shape, &packed.bytes, &mut scales).expect("its own scales");
        assert_eq!((back.len(), scales.len()), (values, 0));
        (packed.dtype, back)
    }

    #[test]
    fn vectors_stay_half_and_what_half_cannot_hold_stays_whole() {
        assert_eq!(again(&segment(&[2], vec![0.1, 65504.0]), Precision::Int8).0, Dtype::F16);
        // The exponents of RWKV-4 begin so.
        let far = segment(&[2], vec![0.1, -1e30]);
        assert_eq!(again(&far, Precision::F16), (Dtype::F32, far.data));
        let wide = segment(&[1, 1, 2], vec![f32::MAX, 1.0]);
        let (dtype, back) = again(&wide, Precision::Int8);
        assert_eq!((dtype, back[1]), (Dtype::I8, 0.0));
        assert!(back[0].is_finite());
        assert!(again(&segment(&[0, 4, 4], vec![]), Precision::Int8).1.is_empty());
    }

    proptest! {
        #[test]
        fn no_value_is_further_off_than_its_precision_allows(
            data in prop::collection::vec(prop_oneof![Just(0f32), -1e-3f32..1e-3, -5e4f32..5e4], 24),
        ) {
            let matrix = segment(&[2, 3, 4], data);
            let exact: Vec<u32> = again(&matrix, Precision::F32).1.iter().map(|x| x.to_bits()).collect();
            prop_assert_eq!(exact, matrix.data.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
            for (x, y) in matrix.data.iter().zip(again(&matrix, Precision::F16).1) {
                prop_assert!((x - y).abs() <= x.abs() / 2048.0 + 6e-8, "{} is {}", x, y);
            }
            for (head, back) in matrix.data.chunks(12).zip(again(&matrix, Precision::Int8).1.chunks(12)) {
                let step = head.iter().fold(0f32, |most, x| most.max(x.abs())) / MOST;
                for (x, y) in head.iter().zip(back) {
                    prop_assert!((x - y).abs() <= step * 0.5001, "{} is {}, in steps of {}", x, y, step);
                }
            }
        }
    }
}
