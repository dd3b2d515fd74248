//! CPU kernels: plain functions over slices, one fixed order of operations for every output element.
//!
//! Each kernel is written once over [`Arith`] and compiled twice: with AVX2, FMA and F16C, chosen at run time where the
//! processor has them, and for the target's baseline. Within one of the two, no result depends on how many rows, rows of
//! which sequences, or how many threads a call is for. The matrix kernels also use the registers of AVX-512, where each sum is
//! the same chain of fused multiply-adds, so that not a bit is different.

mod activations;
mod blocks;
mod burn;
mod copy;
mod deep_embed;
mod dots;
mod elementwise;
mod embed_attention;
mod kind;
mod matmul;
mod norm;
mod pages;
mod quants;
#[cfg(test)]
mod random;
#[cfg(target_arch = "x86_64")]
mod simd;
mod sparse;
mod team;
mod tile;
mod tiny_attention;
mod weight;
mod wkv1;
mod wkv2;
mod wkv4;
mod wkv5;
mod wkv7;

#[cfg(target_arch = "x86_64")]
use std::sync::atomic::{AtomicBool, Ordering};

pub use blocks::scale;
pub use burn::{BURN_OPERATIONS, burn, read_sum};
pub use copy::copy;
pub use deep_embed::{multiply_by_matrices, multiply_by_rows};
pub use elementwise::{Activation, activate, add, multiply, token_shift, token_shift_added};
pub use embed_attention::{Queries, Stretch, attend, mean_of, tanh_all};
pub use kind::Kind;
pub use matmul::{Panels, Product, Shape, matmul, multiply_all};
pub use norm::layer_norm;
pub use pages::{Pages, trim};
pub use team::Team;
pub use tiny_attention::tiny_attend;
pub use weight::{Backing, Weight};
pub use wkv1::{Curves, weigh1, wkv1};
pub use wkv2::{Wkv2Params, wkv2};
pub use wkv4::{Wkv4Params, Wkv4States, wkv4};
pub use wkv5::{Wkv5Inputs, Wkv5Params, decay, wkv5};
pub use wkv7::{HeadInputs, HeadParams, MAX_HEAD, wkv7_head};

/// How `a · b + c` is rounded: once with FMA, twice without.
pub trait Arith: Copy {
    fn fma(a: f32, b: f32, c: f32) -> f32;
}

/// One rounding; fast only inside a function compiled with FMA.
#[derive(Clone, Copy)]
pub struct Fused;
/// Two roundings, on any processor.
#[derive(Clone, Copy)]
pub struct Plain;

impl Arith for Fused {
    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}
impl Arith for Plain {
    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// Whether the fast instruction set is there.
pub fn fused() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether nothing newer than AVX2 is to be used.
#[cfg(target_arch = "x86_64")]
static NARROW: AtomicBool = AtomicBool::new(false);

/// Uses nothing newer than AVX2 from now on, to be measured like a processor without AVX-512. No result changes by it.
pub fn stay_narrow() {
    #[cfg(target_arch = "x86_64")]
    NARROW.store(true, Ordering::Relaxed);
}

/// Whether there are registers of 512 bits, which some kernels use for more of the same at once.
#[cfg(target_arch = "x86_64")]
pub fn wide() -> bool {
    fused() && is_x86_feature_detected!("avx512f") && !NARROW.load(Ordering::Relaxed)
}

/// Whether there are dot products of bytes in registers of 512 bits.
#[cfg(target_arch = "x86_64")]
pub fn dots() -> bool {
    wide() && is_x86_feature_detected!("avx512vnni")
}

/// Compiles one body for both instruction sets; the body may name the arithmetic `A`.
macro_rules! kernel {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) {
            #[inline(always)]
            fn generic<A: $crate::model::kernels::Arith>($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn fused($($arg: $ty),*) {
                    generic::<$crate::model::kernels::Fused>($($arg),*)
                }
                if $crate::model::kernels::fused() {
                    // SAFETY: the processor has these features.
                    return unsafe { fused($($arg),*) };
                }
            }
            generic::<$crate::model::kernels::Plain>($($arg),*)
        }
    };
}
use kernel;

/// Lanes of the fixed order in which sums run: eight partial sums, added as a tree at the end.
const LANES: usize = 8;

#[inline(always)]
fn tree(s: [f32; LANES]) -> f32 {
    ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
}

/// `Σ a·b` in the fixed order.
#[inline(always)]
fn dot<A: Arith>(a: &[f32], b: &[f32]) -> f32 {
    let mut s = [0f32; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            s[l] = A::fma(a[l], b[l], s[l]);
        }
    }
    for (l, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        s[l] = A::fma(*a, *b, s[l]);
    }
    tree(s)
}

/// `Σ x` in the fixed order.
#[inline(always)]
fn sum(x: &[f32]) -> f32 {
    let mut s = [0f32; LANES];
    let (x, rest) = x.as_chunks::<LANES>();
    for x in x {
        for l in 0..LANES {
            s[l] += x[l];
        }
    }
    for (l, x) in rest.iter().enumerate() {
        s[l] += x;
    }
    tree(s)
}

/// `Σ (x - mean)²` in the fixed order.
#[inline(always)]
fn square_deviations<A: Arith>(x: &[f32], mean: f32) -> f32 {
    let mut s = [0f32; LANES];
    let (x, rest) = x.as_chunks::<LANES>();
    for x in x {
        for l in 0..LANES {
            let d = x[l] - mean;
            s[l] = A::fma(d, d, s[l]);
        }
    }
    for (l, x) in rest.iter().enumerate() {
        let d = x - mean;
        s[l] = A::fma(d, d, s[l]);
    }
    tree(s)
}

/// `eˣ` to about 1 ulp, written so that it vectorises: range reduction by ln 2, then a polynomial of degree 6
/// (the coefficients are the Taylor series', good to 1 ulp on ±ln 2 / 2).
#[inline(always)]
fn exp<A: Arith>(x: f32) -> f32 {
    // Outside, the scale below would leave the range of exponents; NaN passes through.
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    // Rounded to even, and the whole number in the lowest bits: a cast of floats that saturates does not vectorise.
    const ROUND: f32 = 12_582_912.0;
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = A::fma(n, -0.693_359_4, x);
    let r = A::fma(n, 2.121_944_4e-4, r);
    let p = A::fma(r, 1.0 / 720.0, 1.0 / 120.0);
    let p = A::fma(p, r, 1.0 / 24.0);
    let p = A::fma(p, r, 1.0 / 6.0);
    let p = A::fma(p, r, 0.5);
    let p = A::fma(p, r, 1.0);
    let p = A::fma(p, r, 1.0);
    // |n| ≤ 128; NaN gives some scale and stays NaN through p.
    let scale = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    p * scale
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
fn sigmoid<A: Arith>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<A>(-x))
}

/// `tanh x` to about 4 ulp, written so that it vectorises: the Taylor series near 0, where `1 - 2 / (e²ˣ + 1)` would lose
/// digits.
#[inline(always)]
fn tanh<A: Arith>(x: f32) -> f32 {
    let s = x * x;
    let near = A::fma(s, 62.0 / 2835.0, -17.0 / 315.0);
    let near = A::fma(near, s, 2.0 / 15.0);
    let near = A::fma(near, s, -1.0 / 3.0);
    let near = A::fma(near * s, x, x);
    let far = 1.0 - 2.0 / (exp::<A>(2.0 * x) + 1.0);
    if x.abs() < 0.25 { near } else { far }
}

/// A pointer that tasks share to write disjoint parts of one buffer.
#[derive(Clone, Copy)]
pub struct Shared<T = f32>(*mut T, usize);

// SAFETY: `part` is the only access, and its callers promise disjointness.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub fn new(buffer: &mut [T]) -> Self {
        Self(buffer.as_mut_ptr(), buffer.len())
    }

    /// The part of `len` elements from `at`.
    ///
    /// # Safety
    /// No other part that overlaps it may be alive, and the buffer must outlive it.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part<'a>(&self, at: usize, len: usize) -> &'a mut [T] {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.1), "a part must lie inside its buffer");
        // SAFETY: inside the buffer by the assertion; disjoint and alive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }
}

/// Runs `task(0..tasks)` by the team whose step this is, or here when the whole is too small (`work` in multiply-adds) to
/// be worth sharing.
pub fn parallel(tasks: usize, work: usize, task: impl Fn(usize) + Sync) {
    const WORTH: usize = 1 << 14;
    if work < WORTH {
        (0..tasks).for_each(task);
    } else {
        team::run(tasks, &task);
    }
}

/// Runs `task` for every `size` values of a buffer, with their number.
pub fn parallel_chunks<T: Send>(buffer: &mut [T], size: usize, task: impl Fn(usize, &mut [T]) + Sync) {
    let (len, shared) = (buffer.len(), Shared::new(buffer));
    // SAFETY: each task has its own part.
    team::run(len.div_ceil(size), &|n| task(n, unsafe { shared.part(n * size, size.min(len - n * size)) }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        for i in -8700..=8800 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();
            for got in [exp::<Plain>(x), exp::<Fused>(x)] {
                assert!((f64::from(got) - exact).abs() <= 3e-7 * exact, "exp({x}) = {got}, not {exact}");
            }
        }
        assert!(exp::<Plain>(f32::NAN).is_nan());
        assert_eq!(exp::<Plain>(0.0), 1.0);
        assert!(exp::<Plain>(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn tanh_is_close_everywhere() {
        for i in -20_000..=20_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).tanh();
            for got in [tanh::<Plain>(x), tanh::<Fused>(x)] {
                assert!((f64::from(got) - exact).abs() <= 5e-7 * exact.abs(), "tanh({x}) = {got}, not {exact}");
            }
        }
        assert!(tanh::<Plain>(f32::NAN).is_nan());
        assert_eq!([tanh::<Plain>(f32::INFINITY), tanh::<Plain>(f32::NEG_INFINITY)], [1.0, -1.0]);
    }
}
