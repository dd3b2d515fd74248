//! Weights in the type they are stored in.

use candle_core::{CpuStorage, Storage, Tensor};
use half::{bf16, f16};

use crate::model::Error;

/// The values of one weight tensor, row-major, in its stored type.
#[derive(Clone, Debug)]
pub enum Weight {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

/// A storage type of weights.
pub trait Stored: Copy + Send + Sync + 'static {
    fn to_f32(self) -> f32;
    fn zero() -> Self;

    /// Eight values as f32.
    ///
    /// # Safety
    /// Eight values must be readable at `p`, and the processor must have AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(p: *const Self) -> std::arch::x86_64::__m256;
}

impl Stored for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    fn zero() -> Self {
        0.0
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(p: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(p) }
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn zero() -> Self {
        f16::ZERO
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(p: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps};
        // SAFETY: the caller's promise; f16 is two plain bytes.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn zero() -> Self {
        bf16::ZERO
    }
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn load8(p: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_slli_epi32};
        // SAFETY: the caller's promise; a bf16 is the upper half of an f32.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
    }
}

impl Weight {
    /// Copies a CPU tensor's values, whatever its layout.
    pub fn from_tensor(tensor: &Tensor) -> Result<Self, Error> {
        let tensor = tensor.contiguous()?;
        let (storage, layout) = tensor.storage_and_layout();
        let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(v)) => Ok(Self::F32(v[range].to_vec())),
            Storage::Cpu(CpuStorage::F16(v)) => Ok(Self::F16(v[range].to_vec())),
            Storage::Cpu(CpuStorage::BF16(v)) => Ok(Self::BF16(v[range].to_vec())),
            _ => Err(Error::Type { name: String::new(), found: format!("{:?}", tensor.dtype()) }),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::BF16(v) => v.len(),
        }
    }

    pub fn get(&self, at: usize) -> f32 {
        match self {
            Self::F32(v) => v[at],
            Self::F16(v) => v[at].to_f32(),
            Self::BF16(v) => v[at].to_f32(),
        }
    }

    pub fn to_f32(&self) -> Vec<f32> {
        (0..self.len()).map(|i| self.get(i)).collect()
    }

    pub fn check_finite(&self, name: &str) -> Result<(), Error> {
        match (0..self.len()).find(|&i| !self.get(i).is_finite()) {
            Some(at) => Err(Error::NotFinite { name: name.into(), at, value: self.get(at) }),
            None => Ok(()),
        }
    }

    /// Feeds the values' little-endian bytes to `hash`.
    pub fn hash(&self, hash: &mut blake3::Hasher) {
        match self {
            Self::F32(v) => v.chunks(512).for_each(|c| {
                hash.update(&bytes(c, |x| x.to_le_bytes()));
            }),
            Self::F16(v) => v.chunks(512).for_each(|c| {
                hash.update(&bytes(c, |x| x.to_le_bytes()));
            }),
            Self::BF16(v) => v.chunks(512).for_each(|c| {
                hash.update(&bytes(c, |x| x.to_le_bytes()));
            }),
        }
    }

    /// Row `row` of a matrix with `out.len()` columns, as f32.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let width = out.len();
        match self {
            Self::F32(v) => out.copy_from_slice(&v[row * width..][..width]),
            Self::F16(v) => out.iter_mut().zip(&v[row * width..][..width]).for_each(|(o, x)| *o = x.to_f32()),
            Self::BF16(v) => out.iter_mut().zip(&v[row * width..][..width]).for_each(|(o, x)| *o = x.to_f32()),
        }
    }
}

fn bytes<T: Copy, const N: usize>(values: &[T], le: fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&v| le(v)).collect()
}
