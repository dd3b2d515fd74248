//! What this machine can do at most: the limits that speed is compared with.

use std::ops::Deref;

use super::kernels;

/// Memory to be read, like that which holds weights.
pub fn memory(len: usize) -> impl Deref<Target = [f32]> {
    let mut memory = kernels::Pages::zeroed(len);
    memory.fill(1.0);
    memory
}

/// Reads `memory` once by the team of this step, and gives a sum that depends on all of it.
pub fn read(memory: &[f32]) -> f32 {
    const PART: usize = 1 << 16;
    let mut sums = vec![0f32; memory.len().div_ceil(PART)];
    kernels::parallel_chunks(&mut sums, 1, |n, sum| {
        sum[0] = kernels::read_sum(&memory[n * PART..memory.len().min((n + 1) * PART)]);
    });
    sums.iter().sum()
}

/// Floating point operations of one call of [`compute`] for each task.
pub const OPERATIONS: usize = kernels::BURN_OPERATIONS;

/// Multiplies and adds in registers, `tasks` times [`OPERATIONS`], by the team of this step.
pub fn compute(tasks: usize) -> f32 {
    let mut sums = vec![0f32; tasks];
    kernels::parallel_chunks(&mut sums, 1, |_, sum| kernels::burn(sum));
    sums.iter().sum()
}
