//! Weights in the type they are stored in.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use super::kind::Kind;
use super::pages::Plain;
#[cfg(target_arch = "x86_64")]
use super::simd::Vector;
use super::{blocks, parallel_chunks};
use crate::model::Error;
use half::{bf16, f16};

/// The values of one weight tensor, row-major, in their stored type.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight<'a> {
    kind: Kind,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
    /// Of bytes that are borrowed.
    source: Source<'a>,
}

/// What bytes are borrowed from and can be read from again.
pub trait Backing: Sync {
    /// Lets go of the memory behind some of them until then.
    fn release(&self, bytes: &[u8]);
}

#[derive(Clone, Copy, Default)]
struct Source<'a>(Option<&'a dyn Backing>);

impl fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "backed" } else { "not backed" })
    }
}

/// Where values are from makes no difference to them.
impl PartialEq for Source<'_> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// A storage type of single values.
pub trait Stored: Plain + Send + Sync + 'static {
    /// Bytes of a value.
    const BYTES: usize;
    /// The value of so many little-endian bytes.
    fn from_le(bytes: &[u8]) -> Self;
    fn to_f32(self) -> f32;

    /// Some values as f32.
    ///
    /// # Safety
    /// As [`Vector`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn load<V: Vector>(p: *const Self) -> V;
}

impl Stored for f32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn from_le(bytes: &[u8]) -> Self {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const Self) -> V {
        // SAFETY: the caller's promise; all of these are plain bytes.
        unsafe { V::load(p) }
    }
}

impl Stored for f16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn from_le(bytes: &[u8]) -> Self {
        f16::from_le_bytes([bytes[0], bytes[1]])
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        blocks::from_f16(self.to_le_bytes())
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const Self) -> V {
        // SAFETY: the caller's promise; all of these are plain bytes.
        unsafe { V::from_f16(p.cast()) }
    }
}

impl Stored for bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn from_le(bytes: &[u8]) -> Self {
        bf16::from_le_bytes([bytes[0], bytes[1]])
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const Self) -> V {
        // SAFETY: the caller's promise; all of these are plain bytes.
        unsafe { V::from_bf16(p.cast()) }
    }
}

/// Elements that are unpacked at a time: whole blocks of every kind.
const CHUNK: usize = 1024;
/// Elements that are hashed together, as one leaf.
const LEAF: usize = 1 << 20;
/// Bytes that are copied before the memory behind them is given back.
const PART: usize = 4 << 20;

impl<'a> Weight<'a> {
    /// A tensor of `shape` whose values are `bytes`; `None` unless there are exactly as many.
    pub fn new(kind: Kind, shape: &[usize], bytes: impl Into<Cow<'a, [u8]>>) -> Option<Self> {
        let bytes = bytes.into();
        let source = Source::default();
        (kind.tensor_bytes(shape)? == bytes.len()).then(|| Self { kind, shape: shape.to_vec(), bytes, source })
    }

    /// The same, whose bytes are of this file or the like.
    pub fn backed_by(self, source: &'a dyn Backing) -> Self {
        Self { source: Source(Some(source)), ..self }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// A copy of its own, made of one part after the other: on the way it takes hardly more memory than one of both.
    pub fn into_owned(self) -> Weight<'static> {
        let copy = |bytes: &[u8]| {
            let mut own = Vec::with_capacity(bytes.len());
            for part in bytes.chunks(PART) {
                own.extend_from_slice(part);
                self.release(own.len() - part.len()..own.len());
            }
            own
        };
        let bytes = match &self.bytes {
            Cow::Borrowed(bytes) => copy(bytes),
            Cow::Owned(_) => self.bytes.into_owned(),
        };
        Weight { kind: self.kind, shape: self.shape, bytes: Cow::Owned(bytes), source: Source::default() }
    }

    /// Fills `packed`, each task so many of its values, which are made of so many of the tensor's bytes; in parts, as above.
    pub fn pack_into<T: Send>(
        &self,
        packed: &mut [T],
        (values, bytes): (usize, usize),
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let tasks = (PART / bytes.max(1)).max(1);
        for (n, part) in packed.chunks_mut(tasks * values).enumerate() {
            parallel_chunks(part, values, |m, own| task(n * tasks + m, own));
            self.release(n * tasks * bytes..self.bytes.len().min((n + 1) * tasks * bytes));
        }
    }

    /// Lets go of the memory behind bytes that are not needed for now.
    pub fn release(&self, range: Range<usize>) {
        if let (Cow::Borrowed(bytes), Some(source)) = (&self.bytes, self.source.0) {
            source.release(&bytes[range]);
        }
    }

    /// The same values in another shape; `None` if that has another number of them, or cuts a block.
    pub fn reshaped(self, shape: &[usize]) -> Option<Self> {
        Some(Self { source: self.source, ..Self::new(self.kind, shape, self.bytes)? })
    }

    /// The values as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0f32; self.len()];
        self.unpack(0, &mut values);
        values
    }

    /// The same in f32 where values are stored in blocks, which only whole rows can be taken out of.
    pub fn unblocked(self) -> Self {
        if self.kind.block() == 1 { self } else { Weight::from_f32(&self.shape, &self.to_f32()) }
    }

    /// Row `row` of a matrix with `out.len()` columns, as f32.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        self.unpack(row * out.len(), out);
    }

    /// Writes the values from the element `at` on, the first of a block, into `out`.
    pub fn unpack(&self, at: usize, out: &mut [f32]) {
        let of = |elements: usize| elements / self.kind.block() * self.kind.block_bytes();
        let bytes = &self.bytes[of(at)..][..of(out.len())];
        match self.kind {
            Kind::F32 => convert::<f32>(bytes, out),
            Kind::F16 => convert::<f16>(bytes, out),
            Kind::BF16 => convert::<bf16>(bytes, out),
            blocks => blocks::unpack(blocks, bytes, out),
        }
    }

    pub fn check_finite(&self, name: &str) -> Result<(), Error> {
        let Some(at) = blocks::first_not_finite(self.kind, &self.bytes) else { return Ok(()) };
        let mut block = vec![0f32; self.kind.block()];
        self.unpack(at, &mut block);
        let n = block.iter().position(|value| !value.is_finite()).unwrap_or(0);
        Err(Error::NotFinite { name: name.into(), at: at + n, value: block[n] })
    }

    /// BLAKE3 of what the tensor says: of its values as f32, whatever width they are stored in; quantised ones as they
    /// are.
    pub fn digest(&self) -> blake3::Hash {
        let mut leaves = vec![blake3::Hash::from_bytes([0; 32]); self.len().div_ceil(LEAF)];
        parallel_chunks(&mut leaves, 1, |n, leaf| leaf[0] = self.leaf(n));
        let mut hash = blake3::Hasher::new();
        if self.kind.block() > 1 {
            hash.update(self.kind.name().as_bytes());
        }
        for leaf in &leaves {
            hash.update(leaf.as_bytes());
        }
        hash.finalize()
    }

    fn leaf(&self, leaf: usize) -> blake3::Hash {
        let mut hash = blake3::Hasher::new();
        let end = self.len().min((leaf + 1) * LEAF);
        if self.kind.block() > 1 {
            let of = |elements: usize| elements / self.kind.block() * self.kind.block_bytes();
            return hash.update(&self.bytes[of(leaf * LEAF)..of(end)]).finalize();
        }
        let mut values = [0f32; CHUNK];
        let mut bytes = [[0u8; 4]; CHUNK];
        for at in (leaf * LEAF..end).step_by(CHUNK) {
            let n = CHUNK.min(end - at);
            self.unpack(at, &mut values[..n]);
            bytes.iter_mut().zip(&values[..n]).for_each(|(bytes, value)| *bytes = value.to_le_bytes());
            hash.update(bytes[..n].as_flattened());
        }
        hash.finalize()
    }

    /// `[.., R, C]` → `[.., C, R]`.
    ///
    /// # Panics
    /// If it has fewer than two axes.
    pub fn transposed(&self) -> Weight<'static> {
        let (outer, &[rows, cols]) = self.shape.split_last_chunk().expect("a matrix has two axes");
        let whole = self.clone().unblocked();
        let size = whole.kind.block_bytes();
        let mut bytes = Vec::with_capacity(whole.bytes.len());
        for matrix in whole.bytes.chunks_exact((rows * cols * size).max(1)) {
            for col in 0..cols {
                (0..rows).for_each(|row| bytes.extend_from_slice(&matrix[(row * cols + col) * size..][..size]));
            }
        }
        let shape = [outer, &[cols, rows]].concat();
        Weight { kind: whole.kind, shape, bytes: Cow::Owned(bytes), source: Source::default() }
    }

    /// The part `index` of `parts` equal ones along the first axis, without it where it has the length 1 then.
    pub fn part(&self, index: usize, parts: usize) -> Option<Self> {
        let (&first, rest) = self.shape.split_first()?;
        let rows = first.checked_div(parts).filter(|rows| rows * parts == first)?;
        let size = self.bytes.len() / parts;
        let shape = if rows == 1 { rest.to_vec() } else { [&[rows], rest].concat() };
        let range = index.checked_mul(size)?..(index + 1) * size;
        let bytes = match &self.bytes {
            Cow::Borrowed(bytes) => Cow::Borrowed(bytes.get(range)?),
            Cow::Owned(bytes) => Cow::Owned(bytes.get(range)?.to_vec()),
        };
        Some(Self { source: self.source, ..Self::new(self.kind, &shape, bytes)? })
    }
}

impl Weight<'static> {
    /// A tensor of f32 values.
    ///
    /// # Panics
    /// If the shape has another number of values.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::new(Kind::F32, shape, bytes).expect("the shape has as many values")
    }
}

fn convert<T: Stored>(bytes: &[u8], out: &mut [f32]) {
    out.iter_mut().zip(bytes.chunks_exact(T::BYTES)).for_each(|(out, bytes)| *out = T::from_le(bytes).to_f32());
}
