//! Blocks of quantised values, as ggml lays them out and reads them back (`dequantize_row_*` in `ggml-quants.c`).
//!
//! A block holds small integers and the f16 scales they share. The significant bits of a scale and of the integers it
//! is multiplied by are never more than the 24 of an f32, so every product is exact and at most the one addition of a
//! minimum rounds: values are the same on every machine, with fused multiplication or without.

use half::{bf16, f16};

use super::kind::Kind;

/// One kind of block: `BYTES` bytes that stand for `ELEMENTS` values.
///
/// Bodies are inlined, so that a caller compiled for a larger instruction set gets it here as well.
pub trait Block<const BYTES: usize, const ELEMENTS: usize> {
    fn unpack(block: &[u8; BYTES], out: &mut [f32; ELEMENTS]);
}

/// f32.
pub struct F32;
/// f16.
pub struct F16;
/// bf16.
pub struct BF16;
/// `d · q`, q of 8 bits with sign: d, 32 q.
pub struct Q8_0;
/// `d · (q - 8)`, q of 4 bits: d, 32 q.
pub struct Q4_0;
/// `d · q + m`, q of 4 bits: d, m, 32 q.
pub struct Q4_1;
/// `d · (q - 16)`, q of 5 bits: d, 32 highest bits, 32 times 4 bits.
pub struct Q5_0;
/// `d · q + m`, q of 5 bits: d, m, 32 highest bits, 32 times 4 bits.
pub struct Q5_1;
/// `d · scale · q - dmin · min`, q of 4 bits, scale and min for each 32 of them: d, dmin, 8 scales and mins, 256 q.
pub struct Q4K;
/// `d · scale · q - dmin · min`, q of 5 bits: as [`Q4K`], with 256 highest bits before the 256 times 4 bits.
pub struct Q5K;
/// `d · scale · (q - 32)`, q of 6 bits, scale for each 16 of them: 256 times 4 bits, 256 times 2 bits, 16 scales, d.
pub struct Q6K;

impl Block<4, 1> for F32 {
    #[inline(always)]
    fn unpack(block: &[u8; 4], out: &mut [f32; 1]) {
        *out = [f32::from_le_bytes(*block)];
    }
}

impl Block<2, 1> for F16 {
    #[inline(always)]
    fn unpack(block: &[u8; 2], out: &mut [f32; 1]) {
        *out = [from_f16(*block)];
    }
}

impl Block<2, 1> for BF16 {
    #[inline(always)]
    fn unpack(block: &[u8; 2], out: &mut [f32; 1]) {
        *out = [f32::from_bits(u32::from(u16::from_le_bytes(*block)) << 16)];
    }
}

impl Block<34, 32> for Q8_0 {
    #[inline(always)]
    fn unpack(block: &[u8; 34], out: &mut [f32; 32]) {
        let (d, q) = (scale_at(block, 0), part::<32>(block, 2));
        for i in 0..32 {
            out[i] = d * f32::from(q[i].cast_signed());
        }
    }
}

impl Block<18, 32> for Q4_0 {
    #[inline(always)]
    fn unpack(block: &[u8; 18], out: &mut [f32; 32]) {
        let (d, q) = (scale_at(block, 0), part::<16>(block, 2));
        let (first, second) = halves(out);
        for i in 0..16 {
            first[i] = d * (f32::from(q[i] & 15) - 8.0);
            second[i] = d * (f32::from(q[i] >> 4) - 8.0);
        }
    }
}

impl Block<20, 32> for Q4_1 {
    #[inline(always)]
    fn unpack(block: &[u8; 20], out: &mut [f32; 32]) {
        let (d, m, q) = (scale_at(block, 0), scale_at(block, 2), part::<16>(block, 4));
        let (first, second) = halves(out);
        for i in 0..16 {
            first[i] = d * f32::from(q[i] & 15) + m;
            second[i] = d * f32::from(q[i] >> 4) + m;
        }
    }
}

impl Block<22, 32> for Q5_0 {
    #[inline(always)]
    fn unpack(block: &[u8; 22], out: &mut [f32; 32]) {
        let (d, high, q) = (scale_at(block, 0), spread(part(block, 2)), part::<16>(block, 6));
        let (first, second) = halves(out);
        for i in 0..16 {
            first[i] = d * (f32::from((q[i] & 15) | high[i]) - 16.0);
            second[i] = d * (f32::from((q[i] >> 4) | high[i + 16]) - 16.0);
        }
    }
}

impl Block<24, 32> for Q5_1 {
    #[inline(always)]
    fn unpack(block: &[u8; 24], out: &mut [f32; 32]) {
        let (d, m) = (scale_at(block, 0), scale_at(block, 2));
        let (high, q) = (spread(part(block, 4)), part::<16>(block, 8));
        let (first, second) = halves(out);
        for i in 0..16 {
            first[i] = d * f32::from((q[i] & 15) | high[i]) + m;
            second[i] = d * f32::from((q[i] >> 4) | high[i + 16]) + m;
        }
    }
}

impl Block<144, 256> for Q4K {
    #[inline(always)]
    fn unpack(block: &[u8; 144], out: &mut [f32; 256]) {
        let runs = scales_and_mins(part(block, 0));
        let (q, out) = (part::<128>(block, 16).as_chunks::<32>().0, out.as_chunks_mut::<64>().0);
        for ((q, out), [first, second]) in q.iter().zip(out).zip(runs) {
            for i in 0..32 {
                out[i] = first.0 * f32::from(q[i] & 15) - first.1;
                out[i + 32] = second.0 * f32::from(q[i] >> 4) - second.1;
            }
        }
    }
}

impl Block<176, 256> for Q5K {
    #[inline(always)]
    fn unpack(block: &[u8; 176], out: &mut [f32; 256]) {
        let runs = scales_and_mins(part(block, 0));
        let bits = part::<32>(block, 16);
        let (q, out) = (part::<128>(block, 48).as_chunks::<32>().0, out.as_chunks_mut::<64>().0);
        for (pair, ((q, out), [first, second])) in q.iter().zip(out).zip(runs).enumerate() {
            for i in 0..32 {
                let high = bits[i] >> (2 * pair);
                out[i] = first.0 * f32::from((q[i] & 15) | (high & 1) << 4) - first.1;
                out[i + 32] = second.0 * f32::from((q[i] >> 4) | (high & 2) << 3) - second.1;
            }
        }
    }
}

impl Block<210, 256> for Q6K {
    #[inline(always)]
    fn unpack(block: &[u8; 210], out: &mut [f32; 256]) {
        let d = scale_at(block, 208);
        let scales = part::<16>(block, 192).map(|scale| d * f32::from(scale.cast_signed()));
        let (low, high) = (part::<128>(block, 0).as_chunks::<64>().0, part::<64>(block, 128).as_chunks::<32>().0);
        let (out, scales) = (out.as_chunks_mut::<128>().0, scales.as_chunks::<8>().0);
        // Of 128 values, the first 64 have the lower four bits of their bytes, the others the upper four; the two more
        // bits of values 32 apart are in the same byte.
        for (((low, high), out), scales) in low.iter().zip(high).zip(out).zip(scales) {
            for side in 0..2 {
                for i in 16 * side..16 * side + 16 {
                    let value = |run: usize, q: u8| scales[2 * run + side] * (f32::from(q) - 32.0);
                    out[i] = value(0, (low[i] & 15) | (high[i] & 3) << 4);
                    out[i + 32] = value(1, (low[i + 32] & 15) | (high[i] >> 2 & 3) << 4);
                    out[i + 64] = value(2, (low[i] >> 4) | (high[i] >> 4 & 3) << 4);
                    out[i + 96] = value(3, (low[i + 32] >> 4) | (high[i] >> 6) << 4);
                }
            }
        }
    }
}

/// `N` bytes of a block.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..at + N].try_into().expect("a block has all its parts")
}

/// A scale of a block.
#[inline(always)]
fn scale_at(block: &[u8], at: usize) -> f32 {
    from_f16(*part(block, at))
}

#[inline(always)]
fn halves(out: &mut [f32; 32]) -> (&mut [f32; 16], &mut [f32; 16]) {
    let [first, second] = out.as_chunks_mut::<16>().0 else { unreachable!("twice 16 is 32") };
    (first, second)
}

/// One bit for each of 32 values, as the fifth bit of a byte each.
#[inline(always)]
fn spread(bits: &[u8; 4]) -> [u8; 32] {
    std::array::from_fn(|i| ((bits[i / 8] >> (i % 8)) & 1) << 4)
}

/// `d · scale` and `dmin · min` of the eight runs of 32 values, from the head of a block: four pairs of runs.
///
/// Scales and mins have six bits. Of the twelve bytes they are packed in, the first four hold scales 0 to 3, the next
/// four mins 0 to 3; the last four hold the lower four bits of scales and mins 4 to 7, whose upper two bits fill up the
/// first eight bytes.
#[inline(always)]
fn scales_and_mins(head: &[u8; 16]) -> [[(f32, f32); 2]; 4] {
    let (d, dmin, packed) = (scale_at(head, 0), scale_at(head, 2), part::<12>(head, 4));
    let run = |i: usize| {
        let (scale, min) = if i < 4 {
            (packed[i] & 63, packed[i + 4] & 63)
        } else {
            ((packed[i + 4] & 15) | packed[i - 4] >> 6 << 4, (packed[i + 4] >> 4) | packed[i] >> 6 << 4)
        };
        (d * f32::from(scale), dmin * f32::from(min))
    };
    [[run(0), run(1)], [run(2), run(3)], [run(4), run(5)], [run(6), run(7)]]
}

/// The value of an f16, exactly.
///
/// `f16::to_f32` asks the processor for its features at every call; this is a few instructions without a branch. Scales
/// of quantised blocks are often subnormal, and no subnormal f32 comes up on the way, which would be slow.
#[inline(always)]
pub fn from_f16(bytes: [u8; 2]) -> f32 {
    let bits = u32::from(u16::from_le_bytes(bytes));
    let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7fff);
    // The exponent's bias grows from 15 to 127; that of infinity and NaN, all ones, grows by as much again.
    let rebias = if magnitude < 0x7c00 { 112 << 23 } else { 224 << 23 };
    let normal = (magnitude << 13) + rebias;
    // A subnormal is its mantissa times 2⁻²⁴.
    let subnormal = (magnitude as f32 * (1.0 / 16_777_216.0)).to_bits();
    f32::from_bits(sign | if magnitude < 0x400 { subnormal } else { normal })
}

/// Whole blocks of one kind, one after the other.
#[inline(always)]
pub fn unpack_all<B, const BYTES: usize, const ELEMENTS: usize>(blocks: &[u8], out: &mut [f32])
where
    B: Block<BYTES, ELEMENTS>,
{
    let (blocks, rest) = blocks.as_chunks::<BYTES>();
    let (out, more) = out.as_chunks_mut::<ELEMENTS>();
    assert!(
        rest.is_empty() && more.is_empty() && blocks.len() == out.len(),
        "whole blocks, and a place for each value"
    );
    for (block, out) in blocks.iter().zip(out) {
        B::unpack(block, out);
    }
}

/// The values of whole blocks: `blocks` holds `n` of them, `out` `n × kind.block()` values.
#[inline(always)]
pub fn unpack(kind: Kind, blocks: &[u8], out: &mut [f32]) {
    match kind {
        Kind::F32 => unpack_all::<F32, 4, 1>(blocks, out),
        Kind::F16 => unpack_all::<F16, 2, 1>(blocks, out),
        Kind::BF16 => unpack_all::<BF16, 2, 1>(blocks, out),
        Kind::Q8_0 => unpack_all::<Q8_0, 34, 32>(blocks, out),
        Kind::Q4_0 => unpack_all::<Q4_0, 18, 32>(blocks, out),
        Kind::Q4_1 => unpack_all::<Q4_1, 20, 32>(blocks, out),
        Kind::Q5_0 => unpack_all::<Q5_0, 22, 32>(blocks, out),
        Kind::Q5_1 => unpack_all::<Q5_1, 24, 32>(blocks, out),
        Kind::Q4K => unpack_all::<Q4K, 144, 256>(blocks, out),
        Kind::Q5K => unpack_all::<Q5K, 176, 256>(blocks, out),
        Kind::Q6K => unpack_all::<Q6K, 210, 256>(blocks, out),
    }
}

/// Where a block has its f16 scales.
const fn scales(kind: Kind) -> &'static [usize] {
    match kind {
        Kind::F32 | Kind::BF16 => &[],
        Kind::F16 | Kind::Q8_0 | Kind::Q4_0 | Kind::Q5_0 => &[0],
        Kind::Q4_1 | Kind::Q5_1 | Kind::Q4K | Kind::Q5K => &[0, 2],
        Kind::Q6K => &[208],
    }
}

/// Multiplies all values by a power of two and says whether that was exact.
///
/// It is not where a scale (a value, in kinds that are not quantised) leaves the range of its type; that one is then
/// rounded to the nearest there is. The integers of a block stay as they are.
pub fn scale(kind: Kind, blocks: &mut [u8], factor: f32) -> bool {
    assert!(factor.is_normal() && factor.to_bits() << 9 == 0, "{factor} is not a power of two");
    let factor = f64::from(factor);
    let mut exact = true;
    // Products are exact in f64, so that comparing them with what is stored shows any rounding.
    let mut check = |product: f64, stored: f64| exact &= product == stored || product.is_nan();
    for block in blocks.chunks_exact_mut(kind.block_bytes()) {
        for &at in scales(kind) {
            let product = f16::from_le_bytes(*part(block, at)).to_f64() * factor;
            let stored = f16::from_f64(product);
            check(product, stored.to_f64());
            block[at..at + 2].copy_from_slice(&stored.to_le_bytes());
        }
        match kind {
            Kind::F32 => {
                let product = f64::from(f32::from_le_bytes(*part(block, 0))) * factor;
                check(product, f64::from(product as f32));
                block.copy_from_slice(&(product as f32).to_le_bytes());
            }
            Kind::BF16 => {
                let product = bf16::from_le_bytes(*part(block, 0)).to_f64() * factor;
                let stored = bf16::from_f64(product);
                check(product, stored.to_f64());
                block.copy_from_slice(&stored.to_le_bytes());
            }
            _ => {}
        }
    }
    exact
}

/// Gives every block these scales, so that random bytes are sane values.
#[cfg(test)]
pub fn set_scales(kind: Kind, blocks: &mut [u8], scale: f16) {
    for block in blocks.chunks_exact_mut(kind.block_bytes()) {
        scales(kind).iter().for_each(|&at| block[at..at + 2].copy_from_slice(&scale.to_le_bytes()));
    }
}

/// The index of the first value of the first block with a scale (in kinds that are not quantised: the first value) that
/// is infinite or not a number.
///
/// No other block has such a value: the largest scale times the largest integers is far from the end of f32.
pub fn first_not_finite(kind: Kind, blocks: &[u8]) -> Option<usize> {
    let finite = |block: &[u8]| match kind {
        Kind::F32 => f32::from_le_bytes(*part(block, 0)).is_finite(),
        Kind::BF16 => bf16::from_le_bytes(*part(block, 0)).is_finite(),
        _ => scales(kind).iter().all(|&at| f16::from_le_bytes(*part(block, at)).is_finite()),
    };
    let at = blocks.chunks_exact(kind.block_bytes()).position(|block| !finite(block))?;
    Some(at * kind.block())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Value `i` of a block, in f64, from the format's definition: one value at a time.
    fn value(kind: Kind, block: &[u8], i: usize) -> f64 {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f64();
        let bit = |at: usize, n: usize| u32::from(block[at + n / 8]) >> (n % 8) & 1;
        // Four bits each: a first half of values in the lower halves of bytes, a second in the upper.
        let nibble = |at: usize, n: usize, run: usize| u32::from(block[at + n % run]) >> (4 * (n / run)) & 15;
        let with_sign = |at: usize| f64::from(block[at] as i8);
        match kind {
            Kind::F32 => f64::from(f32::from_le_bytes(block.try_into().unwrap())),
            Kind::F16 => half(0),
            Kind::BF16 => bf16::from_le_bytes(block.try_into().unwrap()).to_f64(),
            Kind::Q8_0 => half(0) * with_sign(2 + i),
            Kind::Q4_0 => half(0) * (f64::from(nibble(2, i, 16)) - 8.0),
            Kind::Q4_1 => half(0) * f64::from(nibble(4, i, 16)) + half(2),
            Kind::Q5_0 => half(0) * (f64::from(nibble(6, i, 16) + 16 * bit(2, i)) - 16.0),
            Kind::Q5_1 => half(0) * f64::from(nibble(8, i, 16) + 16 * bit(4, i)) + half(2),
            Kind::Q4K | Kind::Q5K => {
                let (run, within) = (i / 32, i % 32);
                let packed = |at: usize| u32::from(block[4 + at]);
                let (scale, min) = if run < 4 {
                    (packed(run) & 63, packed(run + 4) & 63)
                } else {
                    (packed(run + 4) & 15 | packed(run - 4) >> 6 << 4, packed(run + 4) >> 4 | packed(run) >> 6 << 4)
                };
                let q = if kind == Kind::Q4K {
                    nibble(16 + run / 2 * 32, within + run % 2 * 32, 32)
                } else {
                    nibble(48 + run / 2 * 32, within + run % 2 * 32, 32) + 16 * bit(16 + within, run)
                };
                half(0) * f64::from(scale * q) - half(2) * f64::from(min)
            }
            Kind::Q6K => {
                let (part, within) = (i / 128, i % 128);
                let low = nibble(64 * part, within, 64);
                let high = u32::from(block[128 + 32 * part + within % 32]) >> (within / 32 * 2) & 3;
                half(208) * with_sign(192 + i / 16) * (f64::from(low + 16 * high) - 32.0)
            }
        }
    }

    fn unpacked(kind: Kind, blocks: &[u8]) -> Vec<f32> {
        let mut out = vec![f32::NAN; blocks.len() / kind.block_bytes() * kind.block()];
        unpack(kind, blocks, &mut out);
        out
    }

    /// Any bytes, with scales that are finite.
    fn blocks() -> impl Strategy<Value = (Kind, Vec<u8>)> {
        (prop::sample::select(&Kind::ALL), 1..4usize, any::<u64>()).prop_map(|(kind, count, seed)| {
            let mut state = seed;
            let mut bytes: Vec<u8> = (0..count * kind.block_bytes())
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 56) as u8
                })
                .collect();
            // Without the exponent's highest bit no number of any type is infinite.
            for block in bytes.chunks_exact_mut(kind.block_bytes()) {
                scales(kind).iter().for_each(|at| block[at + 1] &= 0xbf);
                if matches!(kind, Kind::F32 | Kind::BF16) {
                    block[kind.block_bytes() - 1] &= 0xbf;
                }
            }
            (kind, bytes)
        })
    }

    #[test]
    fn every_f16_has_its_value() {
        for bits in 0..=u16::MAX {
            let (ours, expected) = (from_f16(bits.to_le_bytes()), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == expected.to_bits() || ours.is_nan() && expected.is_nan(), "{bits:#06x}: {ours}");
        }
    }

    #[test]
    fn a_block_of_q8_0() {
        let mut block = vec![0x00, 0x38]; // 0.5
        block.extend((0..32).map(|i| (4 * i as i8 - 64) as u8));
        let expected: Vec<f32> = (0..32).map(|i| 2.0 * i as f32 - 32.0).collect();
        assert_eq!(unpacked(Kind::Q8_0, &block), expected);
    }

    #[test]
    fn a_block_of_q5_1() {
        // d = 2, m = -1; the third value and the last have the fifth bit.
        let mut block = vec![0x00, 0x40, 0x00, 0xbc, 0b100, 0, 0, 0x80];
        block.extend([0x21; 16]);
        let mut expected = [[1.0f32; 16], [3.0; 16]].concat();
        (expected[2], expected[31]) = (33.0, 35.0);
        assert_eq!(unpacked(Kind::Q5_1, &block), expected);
    }

    #[test]
    fn a_block_of_q4_k() {
        // d = 1, dmin = 0.25; the first run's scale is 3 and its min 5, the last run's scale 0x21 and its min 0x12.
        let mut block = vec![0x00, 0x3c, 0x00, 0x34, 3, 0, 0, 0x80, 5, 0, 0, 0x40, 0, 0, 0, 0x21];
        block.extend([0; 128]);
        (block[16], block[16 + 127]) = (0x07, 0xf0);
        let values = unpacked(Kind::Q4K, &block);
        assert_eq!(values[0], 3.0 * 7.0 - 1.25);
        assert!(values[1..32].iter().all(|&v| v == -1.25));
        assert!(values[32..224].iter().all(|&v| v == 0.0));
        assert!(values[224..255].iter().all(|&v| v == -4.5));
        assert_eq!(values[255], 33.0 * 15.0 - 4.5);
    }

    #[test]
    fn a_block_of_q6_k() {
        // d = 0.5, every scale 1 but the last, which is -2; every value 32, which stands for 0, but the last, 63.
        let mut block = [vec![0; 128], vec![0xaa; 64], vec![1; 15], vec![0xfe, 0x00, 0x38]].concat();
        (block[127], block[191]) = (0xf0, 0xea);
        let mut expected = vec![0.0; 256];
        expected[255] = -31.0;
        assert_eq!(unpacked(Kind::Q6K, &block), expected);
    }

    #[test]
    #[should_panic(expected = "whole blocks")]
    fn a_part_of_a_block_is_refused() {
        unpack(Kind::Q4_0, &[0; 17], &mut []);
    }

    #[test]
    fn scaling_that_rounds_says_so() {
        let mut block = [0u8; 34];
        block[..2].copy_from_slice(&f16::from_f32(40_000.0).to_le_bytes());
        assert!(!scale(Kind::Q8_0, &mut block, 2.0));
        let mut smallest_but_one = f16::from_bits(3).to_le_bytes();
        assert!(!scale(Kind::F16, &mut smallest_but_one, 0.5));
        assert_eq!(f16::from_le_bytes(smallest_but_one), f16::from_bits(2));
        let mut large = 3e38f32.to_le_bytes();
        assert!(!scale(Kind::F32, &mut large, 2.0));
        let mut large = bf16::MAX.to_le_bytes();
        assert!(!scale(Kind::BF16, &mut large, 2.0));
    }

    #[test]
    #[should_panic(expected = "power of two")]
    fn only_powers_of_two_scale() {
        scale(Kind::F32, &mut [0; 4], 3.0);
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_found() {
        for kind in Kind::ALL {
            let bytes = kind.block_bytes();
            let mut blocks = vec![0u8; 3 * bytes];
            assert_eq!(first_not_finite(kind, &blocks), None, "{kind:?}");
            // The last scale is the second of those that have two.
            let at = scales(kind).last().map_or(bytes - 2, |&at| at);
            blocks[2 * bytes + at..][..2].copy_from_slice(&[0xc0, 0x7f]);
            assert_eq!(first_not_finite(kind, &blocks), Some(2 * kind.block()), "{kind:?}");
            blocks[bytes + at..][..2].copy_from_slice(&[0x80, 0xff]);
            assert_eq!(first_not_finite(kind, &blocks), Some(kind.block()), "{kind:?}");
        }
    }

    proptest! {
        #[test]
        fn values_are_those_of_the_definition((kind, blocks) in blocks()) {
            for (i, found) in unpacked(kind, &blocks).into_iter().enumerate() {
                let block = &blocks[i / kind.block() * kind.block_bytes()..][..kind.block_bytes()];
                // The definition in f64 is exact; the one rounding of f32 is the conversion's.
                prop_assert_eq!(found, value(kind, block, i % kind.block()) as f32, "{:?} {}", kind, i);
                prop_assert!(found.is_finite());
            }
            prop_assert_eq!(first_not_finite(kind, &blocks), None);
        }

        #[test]
        fn scaling_a_block_scales_its_values((kind, mut blocks) in blocks(), power in -3..4i32) {
            let (factor, before) = (2f32.powi(power), unpacked(kind, &blocks));
            let exact = scale(kind, &mut blocks, factor);
            let same = unpacked(kind, &blocks).iter().zip(&before).all(|(after, before)| *after == before * factor);
            prop_assert!(same || !exact);
        }

        #[test]
        fn scaling_there_and_back_changes_nothing((kind, mut blocks) in blocks(), power in -3..4i32) {
            let before = blocks.clone();
            if scale(kind, &mut blocks, 2f32.powi(power)) {
                prop_assert!(scale(kind, &mut blocks, 2f32.powi(-power)));
                prop_assert_eq!(blocks, before);
            }
        }
    }
}
