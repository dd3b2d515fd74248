//! Few rows of x, most of whose values are zero, times weights that stand in strips of outputs: only the weights of inputs
//! that are not zero are read.
//!
//! A product with zero adds nothing, so the sums are those of [`super::tile`], bit for bit, but for the sign of a sum that is
//! zero.

use super::matmul::PANEL;
#[cfg(target_arch = "x86_64")]
use super::simd::{Narrow, Vector, Wide};
#[cfg(target_arch = "x86_64")]
use super::tile::{AHEAD, fetch};
use super::weight::Stored;

/// The most outputs that stand side by side: what one input's weights of them take is read as fast as whole pages.
pub const STRIP: usize = 4 * PANEL;

/// The most outputs whose sums the registers of this processor hold.
pub fn strip() -> usize {
    #[cfg(target_arch = "x86_64")]
    if super::wide() {
        return STRIP;
    }
    2 * PANEL
}

/// Finds the inputs of x `[rows, inputs]` that are not zero in every row; all of them, unless they are few: memory gives the whole
/// of what stands in order as soon as every third part of it.
pub fn find_active(x: &[f32], inputs: usize, active: &mut Vec<u32>) {
    let (first, others) = x.split_at(inputs);
    active.resize(inputs, 0);
    let mut found = 0;
    for (input, x) in first.iter().enumerate() {
        let mut any = *x != 0.0;
        for row in others.chunks_exact(inputs) {
            any |= row[input] != 0.0;
        }
        // Without a branch, which nothing could foretell.
        active[found] = input as u32;
        found += usize::from(any);
    }
    if 3 * found < inputs {
        active.truncate(found);
    } else {
        active.iter_mut().zip(0..).for_each(|(active, input)| *active = input);
    }
}

/// Adds to the sums of some rows of `x`, `stride` apart and no more than [`super::tile::few`], what the `active` inputs make
/// with `weights [inputs, width]`: to `sums [rows, STRIP]`, whose first `width` are used.
pub fn few_rows<T: Stored>(
    (weights, width): (&[T], usize),
    (x, stride): (&[f32], usize),
    active: &[u32],
    sums: &mut [[f32; STRIP]],
) {
    assert!(width.is_multiple_of(PANEL) && width <= STRIP, "a strip is {width} wide");
    assert!(active.iter().all(|&input| input as usize <= stride && (input as usize + 1) * width <= weights.len()));
    assert!(x.len() >= sums.len() * stride);
    #[cfg(target_arch = "x86_64")]
    {
        let strip = Strip { weights, width, x, stride, active };
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        fn wide<T: Stored, const R: usize, const G: usize>(strip: &Strip<T>, sums: &mut [[f32; STRIP]]) {
            // SAFETY: the features are there, and the assertions above hold.
            unsafe { strip.add::<Wide, R, G>(sums) }
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn narrow<T: Stored, const R: usize, const G: usize>(strip: &Strip<T>, sums: &mut [[f32; STRIP]]) {
            // SAFETY: as above.
            unsafe { strip.add::<Narrow, R, G>(sums) }
        }
        // SAFETY: `few` and `wide` have looked for the features.
        unsafe {
            match (sums.len(), super::wide()) {
                (0, _) => {}
                (1, true) => wide::<T, 1, 8>(&strip, sums),
                (2, true) => wide::<T, 2, 8>(&strip, sums),
                (3, true) => wide::<T, 3, 4>(&strip, sums),
                (4, true) => wide::<T, 4, 4>(&strip, sums),
                (1, false) => narrow::<T, 1, 8>(&strip, sums),
                (2, false) => narrow::<T, 2, 4>(&strip, sums),
                (3, false) => narrow::<T, 3, 4>(&strip, sums),
                (rows, _) => unreachable!("{rows} rows are not few"),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
struct Strip<'a, T> {
    /// `[inputs, width]`.
    weights: &'a [T],
    width: usize,
    /// `[rows, stride]`.
    x: &'a [f32],
    stride: usize,
    active: &'a [u32],
}

#[cfg(target_arch = "x86_64")]
impl<T: Stored> Strip<'_, T> {
    /// Adds for R rows, G vectors of outputs at a time.
    ///
    /// # Safety
    /// As [`Vector`]; every active input has its weights and a value in each row.
    #[inline(always)]
    unsafe fn add<V: Vector, const R: usize, const G: usize>(&self, sums: &mut [[f32; STRIP]]) {
        let mut first = 0;
        while first < self.width {
            // SAFETY: the caller's promise; a vector or G of them from `first` on are inside the strip.
            unsafe {
                if first + G * V::LANES <= self.width {
                    self.vectors::<V, R, G>(sums, first);
                    first += G * V::LANES;
                } else {
                    self.vectors::<V, R, 1>(sums, first);
                    first += V::LANES;
                }
            }
        }
    }

    /// # Safety
    /// As [`Strip::add`]; the strip has G vectors from the output `first` on.
    #[inline(always)]
    unsafe fn vectors<V: Vector, const R: usize, const G: usize>(&self, sums: &mut [[f32; STRIP]], first: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut acc = [[V::splat(0.0); G]; R];
            for (acc, sums) in acc.iter_mut().zip(&*sums) {
                for (v, acc) in acc.iter_mut().enumerate() {
                    *acc = V::load(sums.as_ptr().add(first + v * V::LANES));
                }
            }
            let weights = self.weights.as_ptr().add(first);
            // How many inputs on what is asked of memory is used.
            let ahead = (AHEAD / (G * V::LANES * T::BYTES)).max(1);
            for (n, &input) in self.active.iter().enumerate() {
                let later = self.active[(n + ahead).min(self.active.len() - 1)];
                let later = weights.add(later as usize * self.width).cast::<u8>();
                for line in (0..G * V::LANES * T::BYTES).step_by(64) {
                    fetch(later.wrapping_add(line));
                }
                let w = weights.add(input as usize * self.width);
                let mut x = [V::splat(0.0); R];
                for (r, x) in x.iter_mut().enumerate() {
                    *x = V::splat(*self.x.as_ptr().add(r * self.stride + input as usize));
                }
                for v in 0..G {
                    let weight = T::load::<V>(w.add(v * V::LANES));
                    for (acc, x) in acc.iter_mut().zip(x) {
                        acc[v] = x.fma(weight, acc[v]);
                    }
                }
            }
            for (acc, sums) in acc.iter().zip(sums) {
                for (v, acc) in acc.iter().enumerate() {
                    acc.store(sums.as_mut_ptr().add(first + v * V::LANES));
                }
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::super::random::values;
    use super::super::{fused, wide};
    use super::*;

    /// What R rows make, in registers of one width.
    fn sums<V: Vector, const R: usize, const G: usize>(strip: &Strip<f16>) -> Vec<[f32; STRIP]> {
        let mut sums = vec![[0f32; STRIP]; R];
        // SAFETY: the callers have looked for the features; the strip is as wide as its weights.
        unsafe { strip.add::<V, R, G>(&mut sums) };
        sums
    }

    proptest! {
        #[test]
        fn every_width_of_registers_adds_the_same(panels in 1usize..=4, inputs in 9usize..90, seed: u32) {
            let width = panels * PANEL;
            let weights: Vec<f16> = values(inputs * width, seed).into_iter().map(f16::from_f32).collect();
            let mut x = values(3 * inputs, seed ^ 1);
            (0..x.len()).filter(|n| (n % inputs) % 4 != 1).for_each(|n| x[n] = 0.0);
            let mut active = Vec::new();
            find_active(&x, inputs, &mut active);
            prop_assert_eq!(&active, &(0..inputs as u32).filter(|n| n % 4 == 1).collect::<Vec<_>>());
            let strip = Strip { weights: &weights, width, x: &x, stride: inputs, active: &active };
            let mut all = Vec::new();
            if fused() {
                all.extend([sums::<Narrow, 1, 8>(&strip), sums::<Narrow, 3, 4>(&strip)]);
            }
            if wide() {
                all.extend([sums::<Wide, 1, 8>(&strip), sums::<Wide, 3, 4>(&strip)]);
            }
            for (row, sums) in all.iter().flat_map(|sums| sums.iter().enumerate()) {
                for (output, got) in sums[..width].iter().enumerate() {
                    let add = |sum: f32, i: usize| x[row * inputs + i].mul_add(weights[i * width + output].to_f32(), sum);
                    prop_assert_eq!(*got, (0..inputs).fold(0f32, add), "row {} output {}", row, output);
                }
            }
        }
    }
}
