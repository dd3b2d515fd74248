//! Vectors of 256 and of 512 bits: the matrix kernels are written once over [`Vector`] and, for integers, [`Dot`].
//!
//! Both widths do the same to each lane, with one rounding for each fused multiply-add and none for integers, so a kernel's
//! results do not depend on the width.

use std::arch::x86_64::*;

/// Some f32 values side by side.
///
/// # Safety
/// Every function needs the processor's features: AVX2, FMA and F16C for [`Narrow`], AVX-512F besides for [`Wide`]. Those
/// that take a pointer need `LANES` values behind it.
pub trait Vector: Copy {
    const LANES: usize;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// `self · b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    unsafe fn times(self, b: Self) -> Self;
    unsafe fn plus(self, b: Self) -> Self;
    /// IEEE half floats, of 16 bits each.
    unsafe fn from_f16(p: *const u8) -> Self;
    unsafe fn from_bf16(p: *const u8) -> Self;
    unsafe fn from_u8(p: *const u8) -> Self;
    unsafe fn from_i8(p: *const u8) -> Self;
}

/// Dot products of small integers: each lane multiplies four unsigned bytes (of a weight's four inputs) by four signed ones
/// (of the activations) and adds them up.
///
/// # Safety
/// As [`Vector`]; for [`Wide`] the processor also needs AVX-512 VNNI. Pointers to bytes need four for each lane.
pub trait Dot: Vector {
    /// Four bytes a lane.
    type Bytes: Copy;
    /// Four activations, the same in every lane.
    type Activations: Copy;
    /// Sums under way.
    type Sums: Copy;
    /// Whether activations for weights of eight bits are read as halves.
    const HALVES: bool;

    unsafe fn bytes(p: *const u8) -> Self::Bytes;
    unsafe fn put(bytes: Self::Bytes, p: *mut u8);
    /// The bits of `mask` of each byte shifted right by `right`; left where that is negative.
    unsafe fn bits(bytes: Self::Bytes, right: i32, mask: u8) -> Self::Bytes;
    unsafe fn or(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Four activations, for weights of `width` bits: as bytes or, for those of eight bits, as halves, of which there are none
    /// for others.
    unsafe fn quad(codes: *const [i8; 4], halves: *const [i16; 4], width: usize) -> Self::Activations;
    unsafe fn start(sum: i32) -> Self::Sums;
    /// Adds the `n`th product of a sum of `count`; weights have `width` bits, so many that the compiler knows, as it does
    /// `n` and `count`. Activations are between -127 and 127.
    unsafe fn dot(sums: Self::Sums, weights: Self::Bytes, x: Self::Activations, place: Place) -> Self::Sums;
    /// The sums as f32: exactly, below 2²⁴.
    unsafe fn end(sums: Self::Sums) -> Self;
}

/// Which product of a sum it is, and how wide the weights are.
#[derive(Clone, Copy)]
pub struct Place {
    pub n: usize,
    pub count: usize,
    pub width: usize,
}

/// Sums of integers may be added up in any order, and the compiler, which sees those of a whole run at once, puts off most of
/// them and keeps what they are made of in memory, as there are sixteen registers only. Here each is known when it is written.
#[inline]
#[target_feature(enable = "avx2")]
fn now(mut sums: __m256i) -> __m256i {
    // SAFETY: no instruction at all.
    unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) sums, options(nomem, nostack, preserves_flags)) };
    sums
}

/// Eight values.
#[derive(Clone, Copy)]
pub struct Narrow(__m256);

/// Sixteen values.
#[derive(Clone, Copy)]
pub struct Wide(__m512);

impl Narrow {
    /// The sum of the eight, added as the kernels' [`super::tree`] does.
    ///
    /// # Safety
    /// As [`Vector`].
    #[inline(always)]
    pub unsafe fn tree(self) -> f32 {
        // SAFETY: the caller's promise.
        unsafe {
            let fours = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
            _mm_cvtss_f32(_mm_add_ss(twos, _mm_movehdup_ps(twos)))
        }
    }
}

// The intrinsics below are safe where the features are, which is what the trait's contract asks for; those with pointers
// read `LANES` values.
impl Vector for Narrow {
    const LANES: usize = 8;

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
    unsafe fn plus(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_add_ps(self.0, b.0) })
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
}

impl Vector for Wide {
    const LANES: usize = 16;

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
    unsafe fn plus(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_add_ps(self.0, b.0) })
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
}

impl Dot for Narrow {
    type Bytes = __m256i;
    /// Bytes, or the first and third and the second and fourth halves.
    type Activations = (__m256i, __m256i);
    /// Sums of 32 bits, and sums of 16 bits that have not been added to them yet.
    type Sums = (__m256i, __m256i);
    const HALVES: bool = true;

    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn put(bytes: __m256i, p: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe { _mm256_storeu_si256(p.cast(), bytes) }
    }
    #[inline(always)]
    unsafe fn bits(bytes: __m256i, right: i32, mask: u8) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe {
            let moved = match right {
                0 => bytes,
                1.. => _mm256_srl_epi32(bytes, _mm_cvtsi32_si128(right)),
                _ => _mm256_sll_epi32(bytes, _mm_cvtsi32_si128(-right)),
            };
            _mm256_and_si256(moved, _mm256_set1_epi8(mask.cast_signed()))
        }
    }
    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn quad(codes: *const [i8; 4], halves: *const [i16; 4], width: usize) -> Self::Activations {
        // SAFETY: the trait's contract.
        unsafe {
            let every = |p: *const i32| _mm256_set1_epi32(p.read_unaligned());
            if width == 8 {
                (every(halves.cast()), every(halves.cast::<i32>().add(1)))
            } else {
                (every(codes.cast()), _mm256_setzero_si256())
            }
        }
    }
    #[inline(always)]
    unsafe fn start(sum: i32) -> (__m256i, __m256i) {
        // SAFETY: the trait's contract.
        unsafe { (_mm256_set1_epi32(sum), _mm256_setzero_si256()) }
    }
    #[inline(always)]
    unsafe fn dot((sum, short): Self::Sums, weights: __m256i, x: Self::Activations, place: Place) -> Self::Sums {
        // SAFETY: the trait's contract.
        unsafe {
            if place.width == 8 {
                // Pairs of products of eight bits do not fit 16 bits: every second byte by itself.
                let evens = _mm256_madd_epi16(_mm256_and_si256(weights, _mm256_set1_epi16(255)), x.0);
                let odds = _mm256_madd_epi16(_mm256_srli_epi16::<8>(weights), x.1);
                return (now(_mm256_add_epi32(_mm256_add_epi32(sum, evens), odds)), short);
            }
            // So many pairs of products do.
            let fit = (i16::MAX as usize / (2 * 127 * ((1 << place.width) - 1))).min(place.count);
            let pairs = _mm256_maddubs_epi16(weights, x.0);
            let short = now(if place.n.is_multiple_of(fit) { pairs } else { _mm256_add_epi16(short, pairs) });
            if (place.n + 1).is_multiple_of(fit) {
                (_mm256_add_epi32(sum, _mm256_madd_epi16(short, _mm256_set1_epi16(1))), short)
            } else {
                (sum, short)
            }
        }
    }
    #[inline(always)]
    unsafe fn end((sum, _): Self::Sums) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm256_cvtepi32_ps(sum) })
    }
}

impl Dot for Wide {
    type Bytes = __m512i;
    type Activations = __m512i;
    type Sums = __m512i;
    const HALVES: bool = false;

    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn put(bytes: __m512i, p: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_si512(p.cast(), bytes) }
    }
    #[inline(always)]
    unsafe fn bits(bytes: __m512i, right: i32, mask: u8) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe {
            let moved = match right {
                0 => bytes,
                1.. => _mm512_srl_epi32(bytes, _mm_cvtsi32_si128(right)),
                _ => _mm512_sll_epi32(bytes, _mm_cvtsi32_si128(-right)),
            };
            _mm512_and_si512(moved, _mm512_set1_epi8(mask.cast_signed()))
        }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn quad(codes: *const [i8; 4], _: *const [i16; 4], _: usize) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_epi32(codes.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn start(sum: i32) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_epi32(sum) }
    }
    #[inline(always)]
    unsafe fn dot(sums: __m512i, weights: __m512i, x: __m512i, _: Place) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_dpbusd_epi32(sums, weights, x) }
    }
    #[inline(always)]
    unsafe fn end(sums: __m512i) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_cvtepi32_ps(sums) })
    }
}
