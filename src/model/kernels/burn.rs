//! Loops that do nothing but reach a limit of the machine.

use super::kernel;

/// Independent accumulators: enough to hide the latency of a fused multiply-add on two pipes of 8 or 16 lanes.
const LANES: usize = 160;
const ROUNDS: usize = 1 << 15;

/// Floating point operations of one call of [`burn`].
pub const BURN_OPERATIONS: usize = 2 * LANES * ROUNDS;

kernel! {
    /// Multiplies and adds in registers.
    pub fn burn(out: &mut [f32]) {
        let mut sums = [0f32; LANES];
        let factor = std::hint::black_box(0.999_f32);
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = A::fma(*sum, factor, factor);
            }
        }
        out[0] = sums.iter().sum();
    }
}

kernel! {
    fn sum_into(values: &[f32], out: &mut [f32; 64]) {
        for chunk in values.as_chunks::<64>().0 {
            for (out, value) in out.iter_mut().zip(chunk) {
                *out += value;
            }
        }
    }
}

/// Reads all values but a rest of fewer than 64, as fast as memory gives them.
pub fn read_sum(values: &[f32]) -> f32 {
    let mut sums = [0f32; 64];
    sum_into(values, &mut sums);
    sums.iter().sum()
}
