//! The innermost loops of the matrix kernels: some rows of x times some inputs of a panel, in the registers there are.

use super::matmul::PANEL;
#[cfg(target_arch = "x86_64")]
use super::simd::{Narrow, Vector, Wide};
use super::weight::Stored;
use super::{Arith, Plain};

/// Bytes that are fetched from memory ahead of those that are used: processors look ahead no further than a page.
#[cfg(target_arch = "x86_64")]
pub const AHEAD: usize = 4096;
/// Up to how many rows are few: unpacking in registers is then quicker than doing it once for all of them.
pub fn few() -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        if super::wide() {
            return 4;
        }
        if super::fused() {
            return 3;
        }
    }
    0
}

/// Asks memory for what will be read soon.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn fetch(p: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint, which an address outside of everything does not hurt either.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) };
}

/// `sums [rows, PANEL]` = as many rows of `x`, `stride` apart, times `weights [inputs, PANEL]`; no more rows than [`few`].
pub fn few_rows<T: Stored>(weights: &[T], x: (&[f32], usize), sums: &mut [[f32; PANEL]]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        fn wide<T: Stored, const R: usize>(weights: &[T], x: (&[f32], usize), sums: &mut [[f32; PANEL]]) {
            // SAFETY: the features are there.
            unsafe { few_of::<Wide, T, R>(weights, x, sums) }
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn narrow<T: Stored, const R: usize>(weights: &[T], x: (&[f32], usize), sums: &mut [[f32; PANEL]]) {
            // SAFETY: the features are there.
            unsafe { few_of::<Narrow, T, R>(weights, x, sums) }
        }
        // SAFETY: `few` and `wide` have looked for the features.
        unsafe {
            match (sums.len(), super::wide()) {
                (0, _) => {}
                (1, true) => wide::<T, 1>(weights, x, sums),
                (2, true) => wide::<T, 2>(weights, x, sums),
                (3, true) => wide::<T, 3>(weights, x, sums),
                (4, true) => wide::<T, 4>(weights, x, sums),
                (1, false) => narrow::<T, 1>(weights, x, sums),
                (2, false) => narrow::<T, 2>(weights, x, sums),
                (3, false) => narrow::<T, 3>(weights, x, sums),
                (rows, _) => unreachable!("{rows} rows are not few"),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (weights, x, sums);
}

/// [`few_rows`] in registers of one width.
///
/// # Safety
/// As [`Vector`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn few_of<V: Vector, T: Stored, const R: usize>(
    weights: &[T],
    x: (&[f32], usize),
    sums: &mut [[f32; PANEL]],
) {
    // SAFETY: the caller has looked for the features.
    unsafe {
        let ahead = weights.as_ptr().cast::<u8>().wrapping_add(AHEAD);
        match T::BYTES {
            2 => add::<V, T, R, 4, true>(weights, x, (sums, 0), (ahead, 2 * PANEL)),
            _ => add::<V, T, R, 4, true>(weights, x, (sums, 0), (ahead, 4 * PANEL)),
        }
    }
}

/// `out [inputs, PANEL]` = as many values as f32, those of an input `stride` after those of the one before.
pub fn unpack<T: Stored>(values: &[T], stride: usize, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        fn wide<T: Stored>(values: &[T], stride: usize, out: &mut [f32]) {
            // SAFETY: the features are there.
            unsafe { unpack_of::<Wide, T>(values, stride, out) }
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn narrow<T: Stored>(values: &[T], stride: usize, out: &mut [f32]) {
            // SAFETY: the features are there.
            unsafe { unpack_of::<Narrow, T>(values, stride, out) }
        }
        if super::wide() {
            // SAFETY: the processor has these features.
            return unsafe { wide(values, stride, out) };
        }
        if super::fused() {
            // SAFETY: the processor has these features.
            return unsafe { narrow(values, stride, out) };
        }
    }
    for (out, values) in out.as_chunks_mut::<PANEL>().0.iter_mut().zip(values.chunks(stride)) {
        out.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_f32());
    }
}

/// [`unpack`] in registers of one width.
///
/// # Safety
/// As [`Vector`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn unpack_of<V: Vector, T: Stored>(values: &[T], stride: usize, out: &mut [f32]) {
    let out = out.as_chunks_mut::<PANEL>().0;
    assert!(out.is_empty() || values.len() >= (out.len() - 1) * stride + PANEL);
    for (input, out) in out.iter_mut().enumerate() {
        for at in (0..PANEL).step_by(V::LANES) {
            // SAFETY: the caller has looked for the features; so many values from `at` are inside both.
            unsafe { T::load::<V>(values.as_ptr().add(input * stride + at)).store(out.as_mut_ptr().add(at)) };
        }
    }
}

/// Adds to `sums [rows, PANEL]` what as many rows of `x`, `stride` apart, and `weights [inputs, PANEL]` make, and meanwhile asks
/// memory for what is `next`: of each input so many bytes after that of the one before.
pub fn many_rows(weights: &[f32], x: (&[f32], usize), sums: &mut [[f32; PANEL]], next: (&[u8], usize)) {
    #[cfg(target_arch = "x86_64")]
    {
        if super::wide() {
            // SAFETY: the processor has the features.
            return unsafe { many_wide(weights, x, sums, next) };
        }
        if super::fused() {
            // SAFETY: the processor has the features.
            return unsafe { many_narrow(weights, x, sums, next) };
        }
    }
    let _ = next;
    for (row, sums) in sums.iter_mut().enumerate() {
        for (x, weights) in x.0[row * x.1..].iter().zip(weights.as_chunks::<PANEL>().0) {
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum = Plain::fma(*x, *weight, *sum);
            }
        }
    }
}

/// Twelve rows and two vectors at a time fill the 32 registers of AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn many_wide(weights: &[f32], (x, stride): (&[f32], usize), sums: &mut [[f32; PANEL]], next: (&[u8], usize)) {
    let next = (next.0.as_ptr(), next.1);
    for (n, sums) in sums.chunks_mut(12).enumerate() {
        let x = (&x[n * 12 * stride..], stride);
        macro_rules! rows {
            ($($rows:literal)*) => {
                match (sums.len(), n) {
                    // SAFETY: the features are there.
                    $(($rows, 0) => unsafe { add::<Wide, f32, $rows, 2, true>(weights, x, (sums, 0), next) },
                    // SAFETY: as above.
                    ($rows, _) => unsafe { add::<Wide, f32, $rows, 2, false>(weights, x, (sums, 0), next) },)*
                    _ => unreachable!("a chunk has 1 to 12 rows"),
                }
            };
        }
        rows!(1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// Six rows and two vectors at a time fill the 16 registers of AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn many_narrow(weights: &[f32], (x, stride): (&[f32], usize), sums: &mut [[f32; PANEL]], next: (&[u8], usize)) {
    let next = (next.0.as_ptr(), next.1);
    for (n, sums) in sums.chunks_mut(6).enumerate() {
        let x = (&x[n * 6 * stride..], stride);
        for first in [0, PANEL / 2] {
            macro_rules! rows {
                ($($rows:literal)*) => {
                    match (sums.len(), n + first) {
                        // SAFETY: the features are there.
                        $(($rows, 0) => unsafe { add::<Narrow, f32, $rows, 2, true>(weights, x, (sums, 0), next) },
                        // SAFETY: as above.
                        ($rows, _) => unsafe { add::<Narrow, f32, $rows, 2, false>(weights, x, (sums, first), next) },)*
                        _ => unreachable!("a chunk has 1 to 6 rows"),
                    }
                };
            }
            rows!(1 2 3 4 5 6);
        }
    }
}

/// Adds to the `sums` of R rows, from the output `first` on, at most G vectors of what those rows of `x`, `stride` apart, and
/// `weights [inputs, PANEL]` make. Where it is to `FETCH`, memory is asked meanwhile for a line of what is `next`, so many bytes on
/// for each input.
///
/// # Safety
/// As [`Vector`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn add<V: Vector, T: Stored, const R: usize, const G: usize, const FETCH: bool>(
    weights: &[T],
    (x, stride): (&[f32], usize),
    (sums, first): (&mut [[f32; PANEL]], usize),
    next: (*const u8, usize),
) {
    let inputs = weights.len() / PANEL;
    // Known to the compiler, as the registers have to be.
    let vectors = G.min(PANEL / V::LANES);
    assert!(first + vectors * V::LANES <= PANEL && sums.len() == R && x.len() >= (R - 1) * stride + inputs);
    // SAFETY: the caller has looked for the features; the rows of `sums` hold that many vectors, and each row of `x` has a
    // value for every input.
    unsafe {
        let mut acc = [[V::splat(0.0); G]; R];
        for (acc, sums) in acc.iter_mut().zip(&*sums) {
            for (v, acc) in acc.iter_mut().enumerate().take(vectors) {
                *acc = V::load(sums.as_ptr().add(first + v * V::LANES));
            }
        }
        let (mut w, x) = (weights.as_ptr().add(first), x.as_ptr());
        for input in 0..inputs {
            if FETCH {
                fetch(next.0.wrapping_add(input * next.1));
            }
            let mut weight = [V::splat(0.0); G];
            for (v, weight) in weight.iter_mut().enumerate().take(vectors) {
                *weight = T::load(w.add(v * V::LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let x = V::splat(*x.add(r * stride + input));
                for (acc, weight) in acc.iter_mut().zip(weight).take(vectors) {
                    *acc = x.fma(weight, *acc);
                }
            }
            w = w.wrapping_add(PANEL);
        }
        for (acc, sums) in acc.iter().zip(sums) {
            for (v, acc) in acc.iter().enumerate().take(vectors) {
                acc.store(sums.as_mut_ptr().add(first + v * V::LANES));
            }
        }
    }
}
