//! Panels of quantised weights: integers side by side by outputs, with the scales of each run of inputs before them.
//!
//! Every kind's values are `d · q - d · offset` or `d · q + m`, with q a small integer without sign, d and m of a run of inputs and
//! an output. [`super::dots`] multiplies them.

use std::marker::PhantomData;

use super::Weight;
use super::activations::Rounding;
use super::blocks::from_f16;
use super::kind::Kind;
use super::matmul::PANEL;
use super::pages::Pages;
#[cfg(target_arch = "x86_64")]
use super::simd::{Dot, Vector};

/// Inputs whose integers stand together: eight quads, which are the four inputs whose products a lane adds up at once.
pub const GROUP: usize = 32;
/// Bytes of a quad's integers of eight bits.
pub const QUAD: usize = 4 * PANEL;

/// How a kind's values are made.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bits of an integer: 4, 5, 6 or 8.
    pub bits: usize,
    /// What is taken off each integer.
    pub offset: i32,
    /// Whether something is added to each value.
    pub added: bool,
    /// Inputs that share scales: 16 or 32.
    pub run: usize,
    /// Bytes of scales for each output of a block.
    scales: usize,
}

const fn shape(kind: Kind) -> Shape {
    let (bits, offset, added, run, scales) = match kind {
        Kind::Q8_0 => (8, 128, false, 32, 2),
        Kind::Q4_0 => (4, 8, false, 32, 2),
        Kind::Q4_1 => (4, 0, true, 32, 4),
        Kind::Q5_0 => (5, 16, false, 32, 2),
        Kind::Q5_1 => (5, 0, true, 32, 4),
        // d, dmin; then a scale and a minimum for each run.
        Kind::Q4K => (4, 0, true, 32, 4 + 16),
        Kind::Q5K => (5, 0, true, 32, 4 + 16),
        // d; then a scale with sign for each run.
        Kind::Q6K => (6, 32, false, 16, 2 + 16),
        Kind::F32 | Kind::F16 | Kind::BF16 => (0, 0, false, 1, 0),
    };
    Shape { bits, offset, added, run, scales }
}

/// A packed matrix of `outputs × inputs` in a quantised kind.
#[derive(Debug)]
pub struct Quants {
    kind: Kind,
    inputs: usize,
    /// `[⌈outputs / PANEL⌉, inputs / block]` blocks of a panel: scales `[scales, PANEL]`, then group by group the integers.
    bytes: Pages<u8>,
}

/// One output's block: its integers and scales.
struct Plain {
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
            // From -128 … 127 to 0 … 255.
            Kind::Q8_0 => block[2 + n] ^ 128,
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

/// Puts an integer among those of a group, which are zero where none was put. A quad is `[PANEL, 4]`: the four inputs of an output are
/// one word of a register. Two quads share the bytes of one in their lower and upper four bits; behind all of them, eight
/// quads share those of the fifth bits, four those of two more bits each.
fn put(bits: usize, group: &mut [u8], (input, output): (usize, usize), value: u8) {
    let (quad, at) = (input / 4, output * 4 + input % 4);
    if bits == 8 {
        group[quad * QUAD + at] = value;
        return;
    }
    let (low, high) = group.split_at_mut(4 * QUAD);
    low[quad / 2 * QUAD + at] |= (value & 15) << (quad % 2 * 4);
    match bits {
        5 => high[at] |= (value >> 4) << quad,
        6 => high[quad / 4 * QUAD + at] |= (value >> 4) << (quad % 4 * 2),
        _ => {}
    }
}

/// What [`put`] has put there.
fn get(bits: usize, group: &[u8], (input, output): (usize, usize)) -> u8 {
    let (quad, at) = (input / 4, output * 4 + input % 4);
    if bits == 8 {
        return group[quad * QUAD + at];
    }
    let (low, high) = group.split_at(4 * QUAD);
    let above = match bits {
        5 => high[at] >> quad & 1,
        6 => high[quad / 4 * QUAD + at] >> (quad % 4 * 2) & 3,
        _ => 0,
    };
    low[quad / 2 * QUAD + at] >> (quad % 2 * 4) & 15 | above << 4
}

impl Quants {
    /// Bytes of a block of a panel.
    fn block_bytes(kind: Kind) -> usize {
        let shape = shape(kind);
        PANEL * (shape.scales + kind.block() * shape.bits / 8)
    }

    /// Packs the rows of `source`, blocks of ggml's.
    pub fn pack(source: &Weight, (outputs, inputs): (usize, usize)) -> Self {
        let kind = source.kind();
        let (blocks, size) = (inputs / kind.block(), Self::block_bytes(kind));
        let mut bytes = Pages::zeroed(outputs.div_ceil(PANEL) * blocks * size);
        let panel = ((blocks * size).max(1), PANEL * blocks * kind.block_bytes());
        source.pack_into(&mut bytes, panel, |panel, bytes| {
            for (n, bytes) in bytes.chunks_exact_mut(size).enumerate() {
                for output in 0..PANEL.min(outputs - panel * PANEL) {
                    let at = (panel * PANEL + output) * blocks + n;
                    let block = &source.bytes()[at * kind.block_bytes()..][..kind.block_bytes()];
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
        let size = GROUP * PANEL * shape.bits / 8;
        for (input, &value) in plain.q[..kind.block()].iter().enumerate() {
            put(shape.bits, &mut q[input / GROUP * size..][..size], (input % GROUP, output), value);
        }
    }

    /// How activations are rounded for these.
    pub fn rounding(&self) -> Rounding {
        let shape = shape(self.kind);
        #[cfg(target_arch = "x86_64")]
        let halves = shape.bits == 8 && !super::dots();
        #[cfg(not(target_arch = "x86_64"))]
        let halves = false;
        Rounding { run: shape.run, offset: shape.offset, halves }
    }

    /// Runs `with` on this as quants of a kind that the compiler knows.
    pub fn with_form<R>(&self, with: impl WithForm<R>) -> R {
        match self.kind {
            Kind::Q8_0 => with.call(&Of::<Q8_0>::new(self)),
            Kind::Q4_0 => with.call(&Of::<Q4_0>::new(self)),
            Kind::Q4_1 => with.call(&Of::<Q4_1>::new(self)),
            Kind::Q5_0 => with.call(&Of::<Q5_0>::new(self)),
            Kind::Q5_1 => with.call(&Of::<Q5_1>::new(self)),
            Kind::Q4K => with.call(&Of::<Q4K>::new(self)),
            Kind::Q5K => with.call(&Of::<Q5K>::new(self)),
            Kind::Q6K => with.call(&Of::<Q6K>::new(self)),
            Kind::F32 | Kind::F16 | Kind::BF16 => unreachable!("only quantised kinds are packed here"),
        }
    }
}

/// What is done with quants whatever their kind: a closure that is generic.
pub trait WithForm<R> {
    fn call<F: Form>(self, quants: &Of<F>) -> R;
}

/// A kind whose kernels are compiled for it.
pub trait Form: Sync {
    const KIND: Kind;
    const SHAPE: Shape = shape(Self::KIND);
    /// Groups in a block.
    const GROUPS: usize = Self::KIND.block() / GROUP;
    /// Bytes of a group's integers.
    const GROUP_BYTES: usize = GROUP * PANEL * Self::SHAPE.bits / 8;
    /// Bytes of a block's scales.
    const SCALES: usize = Self::SHAPE.scales * PANEL;
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
pub struct Of<'a, F>(&'a Quants, PhantomData<F>);

impl<'a, F: Form> Of<'a, F> {
    const BYTES: usize = F::SCALES + F::GROUPS * F::GROUP_BYTES;

    fn new(quants: &'a Quants) -> Self {
        Self(quants, PhantomData)
    }

    pub fn inputs(&self) -> usize {
        self.0.inputs
    }

    /// Some blocks of a panel: those of some groups, from one on that begins a block.
    pub fn part(&self, panel: usize, groups: std::ops::Range<usize>) -> Part<'a, F> {
        let first = panel * (self.0.inputs / F::KIND.block());
        let (from, to) = (first + groups.start / F::GROUPS, first + groups.end.div_ceil(F::GROUPS));
        Part(&self.0.bytes[from * Self::BYTES..to * Self::BYTES], PhantomData)
    }
}

/// Blocks of a panel, one after the other; groups are counted from the first.
pub struct Part<'a, F>(&'a [u8], PhantomData<F>);

impl<F: Form> Part<'_, F> {
    pub fn bytes(&self) -> &[u8] {
        self.0
    }

    /// Where a group's block and its integers begin.
    #[inline(always)]
    fn at(group: usize) -> (usize, usize) {
        let block = group / F::GROUPS * Of::<F>::BYTES;
        (block, block + F::SCALES + group % F::GROUPS * F::GROUP_BYTES)
    }

    /// `d` and `m` of a run of a group at an output.
    pub fn plain_scales(&self, (group, run): (usize, usize), output: usize) -> (f32, f32) {
        let block = &self.0[Self::at(group).0..];
        let run = group % F::GROUPS * (GROUP / F::SHAPE.run) + run;
        let word = |word: usize| {
            let at = (word * PANEL + output) * 2;
            from_f16([block[at], block[at + 1]])
        };
        let byte = |at: usize| block[at * PANEL + output];
        let d = word(0);
        match F::KIND {
            Kind::Q4_1 | Kind::Q5_1 => (d, word(1)),
            Kind::Q4K | Kind::Q5K => (d * f32::from(byte(4 + run)), -word(1) * f32::from(byte(12 + run))),
            Kind::Q6K => (d * f32::from(byte(2 + run).cast_signed()), 0.0),
            _ => (d, 0.0),
        }
    }

    /// The integer of an input of a group at an output.
    pub fn plain_integer(&self, group: usize, (input, output): (usize, usize)) -> u8 {
        get(F::SHAPE.bits, &self.0[Self::at(group).1..][..F::GROUP_BYTES], (input, output))
    }

    /// A group's integers as they are stored.
    ///
    /// # Safety
    /// The part has that group.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub unsafe fn stored(&self, group: usize) -> *const u8 {
        // SAFETY: inside the part.
        unsafe { self.0.as_ptr().add(Self::at(group).1) }
    }

    /// `d` and `m` of a run of a group at the outputs from `output` on; m is 0 where none is added.
    ///
    /// # Safety
    /// As [`Vector`]; the part has that group, the group that run, and a panel those outputs.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub unsafe fn scales<V: Vector>(&self, (group, run): (usize, usize), output: usize) -> (V, V) {
        // SAFETY: words of two bytes and single bytes for every output of a panel, as `Quants::put` has laid them out.
        unsafe {
            let block = self.0.as_ptr().add(Self::at(group).0);
            let run = group % F::GROUPS * (GROUP / F::SHAPE.run) + run;
            let word = |word: usize| V::from_f16(block.add((word * PANEL + output) * 2));
            let byte = |at: usize| block.add(at * PANEL + output);
            let d = word(0);
            match F::KIND {
                Kind::Q4_1 | Kind::Q5_1 => (d, word(1)),
                Kind::Q4K | Kind::Q5K => {
                    let m = word(1).times(V::splat(-1.0)).times(V::from_u8(byte(12 + run)));
                    (d.times(V::from_u8(byte(4 + run))), m)
                }
                Kind::Q6K => (d.times(V::from_i8(byte(2 + run))), V::splat(0.0)),
                _ => (d, V::splat(0.0)),
            }
        }
    }

    /// The integers of quad `n` of a group at the outputs from `output` on; `n` is known to the compiler.
    ///
    /// # Safety
    /// As [`Dot`]; the part has that group, and a panel those outputs.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub unsafe fn quad<V: Dot>(&self, group: usize, n: usize, output: usize) -> V::Bytes {
        // SAFETY: where `put` has put them.
        unsafe {
            let bytes = self.stored(group).add(4 * output);
            if F::SHAPE.bits == 8 {
                return V::bytes(bytes.add(n * QUAD));
            }
            let low = V::bits(V::bytes(bytes.add(n / 2 * QUAD)), (n % 2 * 4) as i32, 0x0f);
            let high = bytes.add(4 * QUAD);
            match F::SHAPE.bits {
                5 => V::or(low, V::bits(V::bytes(high), n as i32 - 4, 0x10)),
                6 => V::or(low, V::bits(V::bytes(high.add(n / 4 * QUAD)), (n % 4 * 2) as i32 - 4, 0x30)),
                _ => low,
            }
        }
    }
}
