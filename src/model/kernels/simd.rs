//! Vectors of f32, of 256 and of 512 bits: the matrix kernels are written once over [`Vector`].
//!
//! Both widths do the same to each lane, with one rounding for each fused multiply-add, so a kernel's results do not depend on
//! the width.

use std::arch::x86_64::*;

/// Some f32 values side by side.
///
/// # Safety
/// Every function needs the processor's features: AVX2, FMA and F16C for [`Narrow`], AVX-512F besides for [`Wide`]. Those
/// that take a pointer need `LANES` values behind it, but for [`Vector::words`].
pub trait Vector: Copy {
    const LANES: usize;
    /// As many integers of 32 bits.
    type Words: Copy;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// `self · b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    unsafe fn times(self, b: Self) -> Self;
    /// IEEE half floats, of 16 bits each.
    unsafe fn from_f16(p: *const u8) -> Self;
    unsafe fn from_bf16(p: *const u8) -> Self;
    unsafe fn from_u8(p: *const u8) -> Self;
    unsafe fn from_i8(p: *const u8) -> Self;
    /// Of eight words of 32 bits at `p`: the bits `mask` of each, shifted down by `shift`; then, for the next eight lanes,
    /// of the same words, shifted down by `shift + step`.
    unsafe fn words(p: *const u8, shift: i32, step: i32, mask: i32) -> Self::Words;
    /// The same of four bits, as f32.
    unsafe fn from_nibbles(p: *const u8, shift: i32, step: i32) -> Self;
    /// `low | high << 4`.
    unsafe fn join(low: Self::Words, high: Self::Words) -> Self::Words;
    unsafe fn from_words(words: Self::Words) -> Self;
}

/// Eight values.
#[derive(Clone, Copy)]
pub struct Narrow(__m256);

/// Sixteen values.
#[derive(Clone, Copy)]
pub struct Wide(__m512);

// The intrinsics below are safe where the features are, which is what the trait's contract asks for; those with pointers
// read `LANES` values.
impl Vector for Narrow {
    const LANES: usize = 8;
    type Words = __m256i;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { _mm256_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn times(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn from_f16(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) })
    }
    #[inline(always)]
    unsafe fn from_bf16(p: *const u8) -> Self {
        // A bf16 is the upper half of an f32.
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) })
    }
    #[inline(always)]
    unsafe fn from_u8(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn from_i8(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn words(p: *const u8, shift: i32, _: i32, mask: i32) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe {
            let words = _mm256_srl_epi32(_mm256_loadu_si256(p.cast()), _mm_cvtsi32_si128(shift));
            _mm256_and_si256(words, _mm256_set1_epi32(mask))
        }
    }
    #[inline(always)]
    unsafe fn from_nibbles(p: *const u8, shift: i32, step: i32) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self::from_words(Self::words(p, shift, step, 15)) }
    }
    #[inline(always)]
    unsafe fn join(low: __m256i, high: __m256i) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe { _mm256_or_si256(low, _mm256_slli_epi32::<4>(high)) }
    }
    #[inline(always)]
    unsafe fn from_words(words: __m256i) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_cvtepi32_ps(words) })
    }
}

impl Vector for Wide {
    const LANES: usize = 16;
    type Words = __m512i;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn times(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn from_f16(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn from_bf16(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))))
        })
    }
    #[inline(always)]
    unsafe fn from_u8(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn from_i8(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn words(p: *const u8, shift: i32, step: i32, mask: i32) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe {
            let shifts = _mm512_inserti64x4::<1>(_mm512_set1_epi32(shift), _mm256_set1_epi32(shift + step));
            let words = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast()));
            _mm512_and_si512(_mm512_srlv_epi32(words, shifts), _mm512_set1_epi32(mask))
        }
    }
    #[inline(always)]
    unsafe fn from_nibbles(p: *const u8, shift: i32, step: i32) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let shifts = _mm512_inserti64x4::<1>(_mm512_set1_epi32(shift), _mm256_set1_epi32(shift + step));
            let words = _mm512_srlv_epi32(_mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast())), shifts);
            // Looking a value up takes its four lowest bits and nothing else: one operation instead of two.
            let values = _mm512_cvtepi32_ps(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
            Self(_mm512_permutexvar_ps(words, values))
        }
    }
    #[inline(always)]
    unsafe fn join(low: __m512i, high: __m512i) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_or_si512(low, _mm512_slli_epi32::<4>(high)) }
    }
    #[inline(always)]
    unsafe fn from_words(words: __m512i) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_cvtepi32_ps(words) })
    }
}
