//! Random weights and activations for tests.

use half::{bf16, f16};

use super::{Kind, Weight, blocks};

/// A small fixed sequence of values in -1..1, different for each seed.
pub fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Random weights of a kind; what blocks hold is random bytes with scales that are sane.
pub fn weights(kind: Kind, shape: [usize; 2], seed: u32) -> Weight<'static> {
    let n = shape[0] * shape[1];
    let v = values(n, seed);
    let bytes: Vec<u8> = match kind {
        Kind::F32 => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Kind::F16 => v.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Kind::BF16 => v.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        kind => {
            let random = values(kind.bytes(n).expect("whole blocks"), seed ^ 9);
            let mut bytes: Vec<u8> = random.iter().map(|v| (v * 127.0) as i8 as u8).collect();
            blocks::set_scales(kind, &mut bytes, f16::from_f32(0.01));
            bytes
        }
    };
    Weight::new(kind, &shape, bytes).expect("as many bytes as the shape has")
}
