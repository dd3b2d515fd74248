//! Loops that do nothing but reach a limit of the machine.

use super::kernel;

/// Independent accumulators: as many as fit the registers of AVX2, which hides the latency of a fused multiply-add.
const LANES: usize = 96;
const ROUNDS: usize = 1 << 15;

/// Floating point operations of one call of [`burn`].
pub const BURN_OPERATIONS: usize = 2 * LANES * ROUNDS;

/// Multiplies and adds in registers, the widest there are.
pub fn burn(out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if super::wide() {
        // SAFETY: the processor has the features.
        return unsafe { burn_wide(out) };
    }
    burn_narrow(out);
}

/// As many operations with twice the lanes.
///
/// # Safety
/// AVX-512F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn burn_wide(out: &mut [f32]) {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_reduce_add_ps, _mm512_set1_ps, _mm512_setzero_ps};
    let mut sums = [_mm512_setzero_ps(); 2 * LANES / 16];
    let factor = _mm512_set1_ps(std::hint::black_box(0.999_f32));
    for _ in 0..ROUNDS / 2 {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, factor);
        }
    }
    out[0] = sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum();
}

kernel! {
    fn burn_narrow(out: &mut [f32]) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_widths_do_the_same_work() {
        // Every lane goes to factor / (1 - factor) = 999, so their sum tells how many there were.
        let mut narrow = [0f32];
        burn_narrow(&mut narrow);
        assert!((narrow[0] / LANES as f32 - 999.0).abs() < 1.0, "{narrow:?}");
        #[cfg(target_arch = "x86_64")]
        if crate::model::kernels::wide() {
            let mut wide = [0f32];
            burn(&mut wide);
            assert!((wide[0] / narrow[0] - 2.0).abs() < 1e-3, "{wide:?} {narrow:?}");
        }
    }

    #[test]
    fn the_sum_of_what_is_read_depends_on_all_of_it() {
        assert_eq!(read_sum(&[1.0; 6400]), 6400.0);
    }
}
