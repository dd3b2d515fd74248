//! Panels of quantised weights: integers side by side by outputs, with the scales of each run of inputs before them.
//!
//! Every kind's values are `d · q + m`, with q a small integer, d and m of a run of inputs and an output. They are unpacked to
//! f32 where they are used, rounded as ggml rounds them, and then added up as weights of single values are: a quantised
//! matrix computes what the f32 matrix of its values would, to the last bit. Few rows of x unpack in registers, more rows
//! unpack a stretch of a panel once for all of them. Activations are never quantised.

use std::marker::PhantomData;
use std::ops::Range;

use super::blocks::from_f16;
use super::kind::Kind;
use super::matmul::{PANEL, Packed};
use super::parallel_chunks;
#[cfg(target_arch = "x86_64")]
use super::simd::Vector;
#[cfg(target_arch = "x86_64")]
use super::tile::{AHEAD, fetch};

/// How a kind's values are made.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// Bits of an integer: 4, 5, 6 or 8.
    bits: usize,
    /// What is taken off each integer.
    offset: f32,
    /// Inputs that share scales.
    run: usize,
    /// Bytes of scales for each output of a block.
    scales: usize,
}

const fn shape(kind: Kind) -> Shape {
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
    Shape { bits, offset, run, scales }
}

/// A packed matrix of `outputs × inputs` in a quantised kind.
#[derive(Debug)]
pub struct Quants {
    kind: Kind,
    inputs: usize,
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
            let scales = shape(kind).scales;
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
        let shape = shape(kind);
        PANEL * (shape.scales + kind.block() * shape.bits / 8)
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
        let shape = shape(kind);
        let (scales, q) = bytes.split_at_mut(shape.scales * PANEL);
        match kind {
            // Scales of two bytes are kept together; those of one byte stand side by side.
            Kind::Q4K | Kind::Q5K | Kind::Q6K => {
                let words = if kind == Kind::Q6K { 1 } else { 2 };
                for word in 0..words {
                    let at = (word * PANEL + output) * 2;
                    scales[at..at + 2].copy_from_slice(&plain.scales[2 * word..2 * word + 2]);
                }
                let (bytes, single) = (&plain.scales[2 * words..shape.scales], &mut scales[2 * words * PANEL..]);
                bytes.iter().enumerate().for_each(|(run, &byte)| single[run * PANEL + output] = byte);
            }
            _ => {
                for word in 0..shape.scales / 2 {
                    let at = (word * PANEL + output) * 2;
                    scales[at..at + 2].copy_from_slice(&plain.scales[2 * word..2 * word + 2]);
                }
            }
        }
        let high = kind.block() / 2 * PANEL;
        for (input, &value) in plain.q[..kind.block()].iter().enumerate() {
            if shape.bits == 8 {
                q[input * PANEL + output] = value;
                continue;
            }
            let (at, shift) = place4(input, output);
            q[at] |= (value & 15) << shift;
            if shape.bits == 5 {
                let (at, shift) = place1(input, output);
                q[high + at] |= (value >> 4) << shift;
            } else if shape.bits == 6 {
                let (at, shift) = place2(input, output);
                q[high + at] |= (value >> 4) << shift;
            }
        }
    }

    fn blocks(&self) -> usize {
        self.inputs / self.kind.block()
    }

    /// Runs `with` on this as a matrix of its kind.
    pub fn packed<R>(&self, with: impl WithPacked<R>) -> R {
        match self.kind {
            Kind::Q8_0 => with.call(&Of::<Q8_0>(self, PhantomData)),
            Kind::Q4_0 => with.call(&Of::<Q4_0>(self, PhantomData)),
            Kind::Q4_1 => with.call(&Of::<Q4_1>(self, PhantomData)),
            Kind::Q5_0 => with.call(&Of::<Q5_0>(self, PhantomData)),
            Kind::Q5_1 => with.call(&Of::<Q5_1>(self, PhantomData)),
            Kind::Q4K => with.call(&Of::<Q4K>(self, PhantomData)),
            Kind::Q5K => with.call(&Of::<Q5K>(self, PhantomData)),
            Kind::Q6K => with.call(&Of::<Q6K>(self, PhantomData)),
            Kind::F32 | Kind::F16 | Kind::BF16 => unreachable!("only quantised kinds are packed here"),
        }
    }
}

/// What is done with a matrix whatever its kind: a closure that is generic.
pub trait WithPacked<R> {
    fn call(self, packed: &impl Packed) -> R;
}

/// Repeats a body for n = 0 to 7, each time compiled for that n.
#[cfg(target_arch = "x86_64")]
macro_rules! unroll {
    ($n:ident => $body:block) => {
        unroll!(@ $n $body 0 1 2 3 4 5 6 7)
    };
    (@ $n:ident $body:block $($value:literal)*) => {
        $({
            const $n: usize = $value;
            $body
        })*
    };
}

/// A kind whose kernels are compiled for it.
trait Form: Sync {
    const KIND: Kind;
    const FORM: Shape = shape(Self::KIND);
}

macro_rules! forms {
    ($($name:ident)*) => {
        $(struct $name;
        impl Form for $name {
            const KIND: Kind = Kind::$name;
        })*
    };
}
forms!(Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4K Q5K Q6K);

/// Quants of a kind that the compiler knows.
struct Of<'a, F>(&'a Quants, PhantomData<F>);

impl<F: Form> Of<'_, F> {
    const BLOCK: usize = F::KIND.block();
    const RUN: usize = F::FORM.run;
    const SCALES: usize = F::FORM.scales * PANEL;
    /// Bytes of the lower bits of a block.
    const LOW: usize = F::KIND.block() * PANEL * (if F::FORM.bits == 8 { 8 } else { 4 }) / 8;
    const BYTES: usize = PANEL * (F::FORM.scales + F::KIND.block() * F::FORM.bits / 8);

    fn panel(&self, panel: usize) -> &[u8] {
        let size = self.0.blocks() * Self::BYTES;
        &self.0.bytes[panel * size..][..size]
    }

    /// `d` and `m` of a run of a block at the outputs from `output` on.
    ///
    /// # Safety
    /// As [`Vector`]; `block` is a whole one of a panel, with that run and those outputs.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn scales<V: Vector>(block: *const u8, run: usize, output: usize) -> (V, V) {
        // SAFETY: words of two bytes and single bytes for every output of a panel, as `put` has laid them out.
        unsafe {
            let word = |word: usize| V::from_f16(block.add((word * PANEL + output) * 2));
            let byte = |at: usize| block.add(at * PANEL + output);
            let d = word(0);
            match F::KIND {
                Kind::Q4_1 | Kind::Q5_1 => (d, word(1)),
                Kind::Q4K | Kind::Q5K => {
                    let m = word(1).times(V::splat(-1.0)).times(V::from_u8(byte(12 + run)));
                    (d.times(V::from_u8(byte(4 + run))), m)
                }
                Kind::Q6K => {
                    let d = d.times(V::from_i8(byte(2 + run)));
                    (d, d.times(V::splat(-F::FORM.offset)))
                }
                _ => (d, d.times(V::splat(-F::FORM.offset))),
            }
        }
    }

    /// The integers of an input of a block, `eight + n`, at the outputs from `output` on. `eight` is a multiple of eight, and
    /// what depends on `n` only is known to the compiler.
    ///
    /// # Safety
    /// As [`Vector`]; `low` are the integers of a whole block of a panel, with that input and those outputs.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn integers<V: Vector>(low: *const u8, (eight, n): (usize, usize), output: usize) -> V {
        let group = (output / 8) as i32;
        // SAFETY: where `put` has put them, see `place4`, `place1` and `place2`.
        unsafe {
            let high = low.add(Self::LOW);
            let four = || V::words(low.add(eight * 16 + n / 2 * 32), (n % 2 * 16) as i32 + 4 * group, 4, 15);
            match F::FORM.bits {
                8 => V::from_i8(low.add((eight + n) * PANEL + output)),
                4 => V::from_nibbles(low.add(eight * 16 + n / 2 * 32), (n % 2 * 16) as i32 + 4 * group, 4),
                5 => {
                    let above = V::words(high.add(eight * 4), (n * 4) as i32 + group, 1, 1);
                    V::from_words(V::join(four(), above))
                }
                _ => {
                    let above = V::words(high.add(eight * 8 + n / 4 * 32), (n % 4 * 8) as i32 + 2 * group, 2, 3);
                    V::from_words(V::join(four(), above))
                }
            }
        }
    }
}

impl<F: Form> Packed for Of<'_, F> {
    fn stored(&self, panel: usize, inputs: Range<usize>) -> &[u8] {
        // Of a block that is larger than a stretch, its share.
        let at = |input: usize| input * Self::BYTES / Self::BLOCK;
        &self.panel(panel)[at(inputs.start)..at(inputs.end)]
    }

    fn unpack_plain(&self, panel: usize, inputs: Range<usize>, out: &mut [f32]) {
        let blocks = self.panel(panel);
        for (input, out) in inputs.zip(out.as_chunks_mut::<PANEL>().0) {
            let block = &blocks[input / Self::BLOCK * Self::BYTES..][..Self::BYTES];
            let input = input % Self::BLOCK;
            for (output, out) in out.iter_mut().enumerate() {
                let (d, m) = scale(F::KIND, block, input / Self::RUN, output);
                // d · q has no more digits than an f32: here, too, only the sum is rounded.
                *out = d * integer(F::KIND, &block[Self::SCALES..], input, output) + m;
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn unpack<V: Vector>(&self, panel: usize, inputs: Range<usize>, out: &mut [f32]) {
        let blocks = self.panel(panel);
        assert!(inputs.start.is_multiple_of(Self::RUN) && out.len() == inputs.len() * PANEL);
        let mut out = out.as_mut_ptr();
        for first in inputs.step_by(Self::RUN) {
            let block = &blocks[first / Self::BLOCK * Self::BYTES..][..Self::BYTES];
            let first = first % Self::BLOCK;
            for output in (0..PANEL).step_by(V::LANES) {
                // SAFETY: the caller has looked for the features; the block is whole, and `out` has a place for each value.
                unsafe {
                    let (d, m) = Self::scales::<V>(block.as_ptr(), first / Self::RUN, output);
                    for eight in (0..Self::RUN).step_by(8) {
                        unroll!(N => {
                            let q = Self::integers::<V>(block.as_ptr().add(Self::SCALES), (first + eight, N), output);
                            q.fma(d, m).store(out.add((eight + N) * PANEL + output));
                        });
                    }
                }
            }
            out = out.wrapping_add(Self::RUN * PANEL);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn few<V: Vector, const R: usize>(
        &self,
        panel: usize,
        (x, stride): (&[f32], usize),
        sums: &mut [[f32; PANEL]],
    ) {
        assert!(sums.len() == R && x.len() >= (R - 1) * stride + self.0.inputs);
        // SAFETY: the caller has looked for the features; blocks are whole, and each row has a value for every input.
        unsafe {
            let mut acc = [[V::splat(0.0); MOST_VECTORS]; R];
            let vectors = PANEL / V::LANES;
            for (n, block) in self.panel(panel).chunks_exact(Self::BYTES).enumerate() {
                let (block, x) = (block.as_ptr(), x.as_ptr().add(n * Self::BLOCK));
                for run in 0..Self::BLOCK / Self::RUN {
                    let mut scales = [(V::splat(0.0), V::splat(0.0)); MOST_VECTORS];
                    for (v, scales) in scales.iter_mut().enumerate().take(vectors) {
                        *scales = Self::scales::<V>(block, run, v * V::LANES);
                    }
                    for eight in (run * Self::RUN..(run + 1) * Self::RUN).step_by(8) {
                        unroll!(N => {
                            fetch(block.wrapping_add(AHEAD + (eight + N) * Self::LOW / Self::BLOCK));
                            for v in 0..vectors {
                                let q = Self::integers::<V>(block.add(Self::SCALES), (eight, N), v * V::LANES);
                                let weight = q.fma(scales[v].0, scales[v].1);
                                for (r, acc) in acc.iter_mut().enumerate() {
                                    acc[v] = V::splat(*x.add(r * stride + eight + N)).fma(weight, acc[v]);
                                }
                            }
                        });
                    }
                }
            }
            for (acc, sums) in acc.iter().zip(sums) {
                for (v, acc) in acc.iter().enumerate().take(vectors) {
                    acc.store(sums.as_mut_ptr().add(v * V::LANES));
                }
            }
        }
    }
}

/// Vectors of a panel in the narrowest registers.
#[cfg(target_arch = "x86_64")]
const MOST_VECTORS: usize = PANEL / 8;

/// `d` and `m` of a run of a block at an output.
fn scale(kind: Kind, block: &[u8], run: usize, output: usize) -> (f32, f32) {
    let word = |word: usize| {
        let at = (word * PANEL + output) * 2;
        from_f16([block[at], block[at + 1]])
    };
    let byte = |at: usize| block[at * PANEL + output];
    let d = word(0);
    match kind {
        Kind::Q4_1 | Kind::Q5_1 => (d, word(1)),
        Kind::Q4K | Kind::Q5K => (d * f32::from(byte(4 + run)), -(word(1) * f32::from(byte(12 + run)))),
        Kind::Q6K => {
            let d = d * f32::from(byte(2 + run).cast_signed());
            (d, -shape(kind).offset * d)
        }
        _ => (d, -shape(kind).offset * d),
    }
}

/// The integer of an input of a block at an output.
fn integer(kind: Kind, q: &[u8], input: usize, output: usize) -> f32 {
    let bits = shape(kind).bits;
    if bits == 8 {
        return f32::from(q[input * PANEL + output].cast_signed());
    }
    let (low, high) = q.split_at(kind.block() / 2 * PANEL);
    let of = |bytes: &[u8], (at, shift): (usize, usize), mask: u8| bytes[at] >> shift & mask;
    let above = match bits {
        5 => of(high, place1(input, output), 1),
        6 => of(high, place2(input, output), 3),
        _ => 0,
    };
    f32::from(of(low, place4(input, output), 15) | above << 4)
}
