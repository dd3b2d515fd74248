//! Panels of quantised weights: integers side by side by outputs, with the scales of each run of inputs before them.
//!
//! Every kind's values are `d · (q - offset) + m`, with q an unsigned or signed small integer, d and m of a run of inputs
//! and an output. Over a run, `Σ x · q` is taken in order; then the run's scales are applied once:
//!
//! ```text
//! sum += d · (Σ x·q - offset · Σ x) + m · Σ x
//! ```
//!
//! That is the one arithmetic of quantised weights, for one row of x as for many: few rows take the integers as they are
//! stored, more rows unpack a run to f32 once for all of them, and both add the same numbers in the same order.

use super::Arith;
use super::blocks::from_f16;
use super::kind::Kind;
use super::matmul::{AHEAD, PANEL};
use super::parallel_chunks;

/// The longest run, in inputs.
pub const RUN: usize = 32;
/// Runs of the largest block.
const RUNS: usize = 16;

/// How a kind's values are made.
#[derive(Clone, Copy, Debug)]
struct Form {
    /// Bits of an integer: 4, 5, 6 or 8.
    bits: usize,
    /// What is taken off each integer.
    offset: f32,
    /// Inputs that share scales.
    run: usize,
    /// Bytes of scales for each output of a block.
    scales: usize,
}

const fn form(kind: Kind) -> Form {
    let (bits, offset, run, scales) = match kind {
        Kind::Q8_0 => (8, 0.0, 32, 2),
        Kind::Q4_0 => (4, 8.0, 32, 2),
        Kind::Q4_1 => (4, 0.0, 32, 4),
        Kind::Q5_0 => (5, 16.0, 32, 2),
        Kind::Q5_1 => (5, 0.0, 32, 4),
        // d, dmin; then a scale and a minimum for each run.
        Kind::Q4K => (4, 0.0, 32, 4 + 16),
        Kind::Q5K => (5, 0.0, 32, 4 + 16),
        // d; then a scale with sign for each run.
        Kind::Q6K => (6, 32.0, 16, 2 + 16),
        Kind::F32 | Kind::F16 | Kind::BF16 => (0, 0.0, 1, 0),
    };
    Form { bits, offset, run, scales }
}

/// A packed matrix of `outputs × inputs` in a quantised kind.
#[derive(Debug)]
pub struct Quants {
    pub kind: Kind,
    pub inputs: usize,
    /// `[⌈outputs / PANEL⌉, inputs / block]` blocks of a panel: scales `[scales, PANEL]`, then the integers' lower 8 or 4
    /// bits, then what they have above 4.
    bytes: Vec<u8>,
}

/// One output's block: its integers and scales.
struct Plain {
    /// Unsigned, but for kinds of 8 bits.
    q: [u8; 256],
    scales: [u8; 20],
}

/// Bits `at..` of 4-bit integers in ggml's order: a first half of `half` values in the lower halves of bytes, a second in
/// the upper.
fn nibble(bytes: &[u8], half: usize, n: usize) -> u8 {
    let byte = bytes[n / (2 * half) * half + n % half];
    if (n / half).is_multiple_of(2) { byte & 15 } else { byte >> 4 }
}

/// Takes a block of ggml's apart.
fn plain(kind: Kind, block: &[u8]) -> Plain {
    let mut plain = Plain { q: [0; 256], scales: [0; 20] };
    let bit = |at: usize, n: usize| block[at + n / 8] >> (n % 8) & 1;
    for (n, q) in plain.q[..kind.block()].iter_mut().enumerate() {
        *q = match kind {
            Kind::Q8_0 => block[2 + n],
            Kind::Q4_0 => nibble(&block[2..], 16, n),
            Kind::Q4_1 => nibble(&block[4..], 16, n),
            Kind::Q5_0 => nibble(&block[6..], 16, n) | bit(2, n) << 4,
            Kind::Q5_1 => nibble(&block[8..], 16, n) | bit(4, n) << 4,
            Kind::Q4K => nibble(&block[16..], 32, n),
            Kind::Q5K => nibble(&block[48..], 32, n) | (block[16 + n % 32] >> (n / 32) & 1) << 4,
            Kind::Q6K => {
                let (half, within) = (n / 128, n % 128);
                let low = nibble(&block[64 * half..64 * half + 64], 64, within);
                low | (block[128 + 32 * half + within % 32] >> (within / 32 * 2) & 3) << 4
            }
            Kind::F32 | Kind::F16 | Kind::BF16 => unreachable!("only quantised kinds are packed here"),
        };
    }
    match kind {
        Kind::Q4K | Kind::Q5K => {
            plain.scales[..4].copy_from_slice(&block[..4]);
            let packed = &block[4..16];
            for run in 0..8 {
                let (scale, min) = if run < 4 {
                    (packed[run] & 63, packed[run + 4] & 63)
                } else {
                    let both = packed[run + 4];
                    (both & 15 | packed[run - 4] >> 6 << 4, both >> 4 | packed[run] >> 6 << 4)
                };
                plain.scales[4 + run] = scale;
                plain.scales[12 + run] = min;
            }
        }
        Kind::Q6K => {
            plain.scales[..2].copy_from_slice(&block[208..]);
            plain.scales[2..18].copy_from_slice(&block[192..208]);
        }
        _ => {
            let scales = form(kind).scales;
            plain.scales[..scales].copy_from_slice(&block[..scales]);
        }
    }
    plain
}

/// Where the 4 lower bits of an integer are among those of a block of a panel: byte and shift. Two inputs share 32 bytes,
/// seen as eight words of 32 bits: word l has the outputs l, l + 8, l + 16, l + 24 of the first input, then of the second, so that
/// a shift and a mask give eight outputs side by side.
const fn place4(input: usize, output: usize) -> (usize, usize) {
    let nibble = input % 2 * 4 + output / 8;
    (input / 2 * 32 + output % 8 * 4 + nibble / 2, nibble % 2 * 4)
}

/// The same for a single bit: eight inputs share 32 bytes.
const fn place1(input: usize, output: usize) -> (usize, usize) {
    let bit = input % 8 * 4 + output / 8;
    (input / 8 * 32 + output % 8 * 4 + bit / 8, bit % 8)
}

/// The same for two bits: four inputs share 32 bytes.
const fn place2(input: usize, output: usize) -> (usize, usize) {
    let pair = input % 4 * 4 + output / 8;
    (input / 4 * 32 + output % 8 * 4 + pair / 4, pair % 4 * 2)
}

impl Quants {
    /// Bytes of a block of a panel.
    fn block_bytes(kind: Kind) -> usize {
        let form = form(kind);
        PANEL * (form.scales + kind.block() * form.bits / 8)
    }

    /// Packs the rows of `source`, blocks of ggml's.
    pub fn pack(kind: Kind, (outputs, inputs): (usize, usize), source: &[u8]) -> Self {
        let (blocks, size) = (inputs / kind.block(), Self::block_bytes(kind));
        let mut bytes = vec![0; outputs.div_ceil(PANEL) * blocks * size];
        parallel_chunks(&mut bytes, (blocks * size).max(1), |panel, bytes| {
            for (n, bytes) in bytes.chunks_exact_mut(size).enumerate() {
                for output in 0..PANEL.min(outputs - panel * PANEL) {
                    let at = (panel * PANEL + output) * blocks + n;
                    let block = &source[at * kind.block_bytes()..][..kind.block_bytes()];
                    Self::put(kind, &plain(kind, block), output, bytes);
                }
            }
        });
        Self { kind, inputs, bytes }
    }

    /// Puts one output's block into its place in a panel's.
    fn put(kind: Kind, plain: &Plain, output: usize, bytes: &mut [u8]) {
        let form = form(kind);
        let (scales, q) = bytes.split_at_mut(form.scales * PANEL);
        match kind {
            // Scales of two bytes are kept together; those of one byte stand side by side.
            Kind::Q4K | Kind::Q5K | Kind::Q6K => {
                let words = if kind == Kind::Q6K { 1 } else { 2 };
                for word in 0..words {
                    let at = (word * PANEL + output) * 2;
                    scales[at..at + 2].copy_from_slice(&plain.scales[2 * word..2 * word + 2]);
                }
                let (bytes, single) = (&plain.scales[2 * words..form.scales], &mut scales[2 * words * PANEL..]);
                bytes.iter().enumerate().for_each(|(run, &byte)| single[run * PANEL + output] = byte);
            }
            _ => {
                for word in 0..form.scales / 2 {
                    let at = (word * PANEL + output) * 2;
                    scales[at..at + 2].copy_from_slice(&plain.scales[2 * word..2 * word + 2]);
                }
            }
        }
        let high = kind.block() / 2 * PANEL;
        for (input, &value) in plain.q[..kind.block()].iter().enumerate() {
            if form.bits == 8 {
                q[input * PANEL + output] = value;
                continue;
            }
            let (at, shift) = place4(input, output);
            q[at] |= (value & 15) << shift;
            if form.bits == 5 {
                let (at, shift) = place1(input, output);
                q[high + at] |= (value >> 4) << shift;
            } else if form.bits == 6 {
                let (at, shift) = place2(input, output);
                q[high + at] |= (value >> 4) << shift;
            }
        }
    }

    /// The blocks of a panel.
    pub fn panel(&self, panel: usize) -> std::slice::ChunksExact<'_, u8> {
        let size = Self::block_bytes(self.kind);
        let blocks = self.inputs / self.kind.block();
        self.bytes[panel * blocks * size..][..blocks * size].chunks_exact(size)
    }

    /// Inputs of a run.
    pub fn run(&self) -> usize {
        form(self.kind).run
    }

    /// What is taken off every integer.
    pub fn offset(&self) -> f32 {
        form(self.kind).offset
    }

    /// Splits a block into its scales and the integers.
    pub fn split<'a>(&self, block: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        block.split_at(form(self.kind).scales * PANEL)
    }
}

/// `d` and `m` of every run of a block, `[runs, PANEL]` each; `m` only where the kind has minima.
pub struct Scales {
    pub d: [[f32; PANEL]; RUNS],
    pub m: [[f32; PANEL]; RUNS],
}

impl Scales {
    pub const ZERO: Self = Self { d: [[0.0; PANEL]; RUNS], m: [[0.0; PANEL]; RUNS] };

    /// Reads the scales of a block of a panel; says whether there are minima.
    #[inline(always)]
    pub fn read(&mut self, kind: Kind, stored: &[u8]) -> bool {
        let words = |word: usize| -> [f32; PANEL] {
            let (words, _) = stored[word * 2 * PANEL..].as_chunks::<2>();
            std::array::from_fn(|output| from_f16(words[output]))
        };
        let bytes = |at: usize| -> &[u8; PANEL] { stored[at..at + PANEL].try_into().expect("a panel has as many") };
        match kind {
            Kind::Q8_0 | Kind::Q4_0 | Kind::Q5_0 => {
                self.d[0] = words(0);
                false
            }
            Kind::Q4_1 | Kind::Q5_1 => {
                self.d[0] = words(0);
                self.m[0] = words(1);
                true
            }
            Kind::Q4K | Kind::Q5K => {
                let (d, dmin) = (words(0), words(1));
                for run in 0..8 {
                    let (scale, min) = (bytes((4 + run) * PANEL), bytes((12 + run) * PANEL));
                    for o in 0..PANEL {
                        self.d[run][o] = d[o] * f32::from(scale[o]);
                        self.m[run][o] = -(dmin[o] * f32::from(min[o]));
                    }
                }
                true
            }
            Kind::Q6K => {
                let d = words(0);
                for run in 0..16 {
                    let scale = bytes((2 + run) * PANEL);
                    for o in 0..PANEL {
                        self.d[run][o] = d[o] * f32::from(scale[o].cast_signed());
                    }
                }
                false
            }
            Kind::F32 | Kind::F16 | Kind::BF16 => false,
        }
    }
}

/// The integers of a run as f32, `[run, PANEL]`, of the integers `q` of its block.
#[inline(always)]
pub fn integers(kind: Kind, q: &[u8], run: usize, out: &mut [f32]) {
    let form = form(kind);
    let first = run * form.run;
    let out = out.as_chunks_mut::<PANEL>().0;
    if form.bits == 8 {
        let q = q[first * PANEL..].as_chunks::<PANEL>().0;
        for (out, q) in out.iter_mut().zip(q) {
            for (out, q) in out.iter_mut().zip(q) {
                *out = f32::from(q.cast_signed());
            }
        }
        return;
    }
    let (low, high) = q.split_at(kind.block() / 2 * PANEL);
    let words = |bytes: &[u8], n: usize| -> [u32; 8] {
        let (bytes, _) = bytes[n * 32..n * 32 + 32].as_chunks::<4>();
        std::array::from_fn(|l| u32::from_le_bytes(bytes[l]))
    };
    for (n, out) in out.iter_mut().enumerate() {
        let input = first + n;
        let low = words(low, input / 2);
        // What an integer has above four bits, so many of them, is that input's of those that share a word.
        let (above, bits, at) = match form.bits {
            5 => (words(high, input / 8), 1, input % 8),
            6 => (words(high, input / 4), 2, input % 4),
            _ => ([0; 8], 0, 0),
        };
        let mask = (1u32 << bits) - 1;
        for group in 0..4 {
            let (shift, above_shift) = (4 * (input % 2 * 4 + group), bits * (at * 4 + group));
            for l in 0..8 {
                let value = low[l] >> shift & 15 | (above[l] >> above_shift & mask) << 4;
                out[group * 8 + l] = value as f32;
            }
        }
    }
}

/// Adds a run's part to `sums`: `products` = Σ x·q, `total` = Σ x.
#[inline(always)]
pub fn combine<A: Arith>(
    products: &[f32; PANEL],
    (offset, total): (f32, f32),
    (d, m): (&[f32; PANEL], Option<&[f32; PANEL]>),
    sums: &mut [f32; PANEL],
) {
    for o in 0..PANEL {
        let product = A::fma(-offset, total, products[o]);
        sums[o] = A::fma(d[o], product, sums[o]);
    }
    if let Some(m) = m {
        for o in 0..PANEL {
            sums[o] = A::fma(m[o], total, sums[o]);
        }
    }
}

/// Whether [`products`] takes integers of this kind as they are stored.
pub fn direct(kind: Kind) -> bool {
    cfg!(target_arch = "x86_64") && matches!(form(kind).bits, 4 | 8) && super::fused()
}

/// `Σ x·q` over a run of `R` rows of `x`, `stride` apart, in order and from 0: as unpacking the integers and multiplying
/// them would, without the detour. Only of kinds that are [`direct`].
#[cfg(target_arch = "x86_64")]
pub fn products<const R: usize>(
    kind: Kind,
    (q, run): (&[u8], usize),
    (x, stride): (&[f32], usize),
    out: &mut [[f32; PANEL]],
) {
    let form = form(kind);
    let bytes = form.run * PANEL * form.bits / 8;
    let q = &q[run * bytes..][..bytes];
    assert!(direct(kind) && out.len() == R && x.len() >= (R - 1) * stride + form.run);
    // SAFETY: `direct` and `wide` have looked for the features; the integers of a run are there, and R rows of as many
    // values.
    unsafe {
        match (form.bits, super::wide()) {
            (8, true) => wide_products8::<R>(q, x, stride, out),
            (8, false) => products8::<R>(q, x, stride, out),
            (_, true) => wide_products4::<R>(q, x, stride, out),
            (_, false) => products4::<R>(q, x, stride, out),
        }
    }
}

/// [`products8`] with registers of 512 bits.
///
/// # Safety
/// AVX-512F; R rows of `x`, `stride` apart, with a value for each PANEL bytes of `q`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn wide_products8<const R: usize>(q: &[u8], x: &[f32], stride: usize, out: &mut [[f32; PANEL]]) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for (input, q) in q.as_chunks::<PANEL>().0.iter().enumerate() {
        _mm_prefetch::<_MM_HINT_T0>(q.as_ptr().wrapping_add(AHEAD).cast());
        for half in 0..2 {
            // SAFETY: sixteen bytes of 32, twice.
            let bytes = unsafe { _mm_loadu_si128(q.as_ptr().add(16 * half).cast()) };
            let weights = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: a value of x for each row and input.
                let x = _mm512_set1_ps(unsafe { *x.get_unchecked(r * stride + input) });
                sums[half] = _mm512_fmadd_ps(x, weights, sums[half]);
            }
        }
    }
    // SAFETY: the same features.
    unsafe { store_wide(&sums, out) };
}

/// [`products4`] with registers of 512 bits: one shift brings the integers of sixteen outputs down, and they choose their
/// values from a table.
///
/// # Safety
/// As [`wide_products8`], with a value for each PANEL halves of a byte; an even number of them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn wide_products4<const R: usize>(q: &[u8], x: &[f32], stride: usize, out: &mut [[f32; PANEL]]) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    let values = _mm512_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0);
    // Words 0 to 7 hold the outputs of a group, and a second time those of the next one.
    let shifts = [0, 8, 16, 24].map(|s| _mm512_inserti64x4::<1>(_mm512_set1_epi32(s), _mm256_set1_epi32(s + 4)));
    for (pair, q) in q.as_chunks::<32>().0.iter().enumerate() {
        _mm_prefetch::<_MM_HINT_T0>(q.as_ptr().wrapping_add(AHEAD).cast());
        // SAFETY: 32 bytes.
        let words = _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(q.as_ptr().cast()) });
        for (n, shift) in shifts.into_iter().enumerate() {
            // The table looks at the lowest four bits only.
            let weights = _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shift), values);
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: a value of x for each row and input.
                let x = _mm512_set1_ps(unsafe { *x.get_unchecked(r * stride + 2 * pair + n / 2) });
                sums[n % 2] = _mm512_fmadd_ps(x, weights, sums[n % 2]);
            }
        }
    }
    // SAFETY: the same features.
    unsafe { store_wide(&sums, out) };
}

/// # Safety
/// AVX-512F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn store_wide<const R: usize>(sums: &[[std::arch::x86_64::__m512; 2]; R], out: &mut [[f32; PANEL]]) {
    for (sums, out) in sums.iter().zip(out) {
        for (half, sum) in sums.iter().enumerate() {
            // SAFETY: sixteen values of 32, twice.
            unsafe { std::arch::x86_64::_mm512_storeu_ps(out.as_mut_ptr().add(16 * half), *sum) };
        }
    }
}

/// # Safety
/// AVX2 and FMA; R rows of `x`, `stride` apart, with a value for each PANEL bytes of `q`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn products8<const R: usize>(q: &[u8], x: &[f32], stride: usize, out: &mut [[f32; PANEL]]) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm256_setzero_ps(); 4]; R];
    for (input, q) in q.as_chunks::<PANEL>().0.iter().enumerate() {
        for group in 0..4 {
            // SAFETY: eight bytes of 32 from 8 group on; a value of x for each row.
            unsafe {
                let words = _mm256_cvtepi8_epi32(_mm_loadl_epi64(q.as_ptr().add(8 * group).cast()));
                let weights = _mm256_cvtepi32_ps(words);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*x.as_ptr().add(r * stride + input));
                    sums[group] = _mm256_fmadd_ps(x, weights, sums[group]);
                }
            }
        }
    }
    for (sums, out) in sums.iter().zip(out) {
        for (group, sum) in sums.iter().enumerate() {
            // SAFETY: eight values of 32 from 8 group on.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * group), *sum) };
        }
    }
}

/// # Safety
/// As [`products8`], with a value for each PANEL halves of a byte; an even number of them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn products4<const R: usize>(q: &[u8], x: &[f32], stride: usize, out: &mut [[f32; PANEL]]) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm256_setzero_ps(); 4]; R];
    let mask = _mm256_set1_epi32(15);
    for (pair, q) in q.as_chunks::<32>().0.iter().enumerate() {
        // SAFETY: 32 bytes.
        let words = unsafe { _mm256_loadu_si256(q.as_ptr().cast()) };
        macro_rules! eight {
            ($input:literal, $group:literal, $shift:literal) => {
                let weights = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<$shift>(words), mask));
                for (r, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: a value of x for each row and input.
                    let x = unsafe { _mm256_broadcast_ss(&*x.as_ptr().add(r * stride + 2 * pair + $input)) };
                    sums[$group] = _mm256_fmadd_ps(x, weights, sums[$group]);
                }
            };
        }
        eight!(0, 0, 0);
        eight!(0, 1, 4);
        eight!(0, 2, 8);
        eight!(0, 3, 12);
        eight!(1, 0, 16);
        eight!(1, 1, 20);
        eight!(1, 2, 24);
        eight!(1, 3, 28);
    }
    for (sums, out) in sums.iter().zip(out) {
        for (group, sum) in sums.iter().enumerate() {
            // SAFETY: eight values of 32 from 8 group on.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * group), *sum) };
        }
    }
}
