//! What comes before the tensors in a snapshot's file (see [`codec`](super::codec)), read without believing it.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::precision::{self, heads};
use super::squeeze;
use crate::types::{Pending, SnapshotHead, readable};

/// Version of the layout, in every file: that of exact and plain ones, which every version of this program reads, and that
/// of the others.
pub const FORMATS: [u32; 2] = [1, 2];

/// The key of our JSON in the safetensors metadata.
pub(super) const META: &str = "rewake";
pub(super) const TAIL_IDS: &str = "tail";
pub(super) const COUNT_IDS: &str = "counts.ids";
pub(super) const COUNT_VALUES: &str = "counts.values";
pub(super) const CHECKSUM: &str = "checksum";
pub(super) const SCALES: &str = "scales";
pub(super) const BODY: &str = "body.zstd";
/// Names no segment may have.
pub(super) const RESERVED: [&str; 7] = ["__metadata__", TAIL_IDS, COUNT_IDS, COUNT_VALUES, CHECKSUM, SCALES, BODY];
/// Tensors that are always there beside the segments.
pub(super) const OTHERS: usize = 4;
/// Bytes of the checksum.
pub(super) const HASH: usize = blake3::OUT_LEN;
/// Positions beyond this are not exact in every reader of JSON.
pub(super) const FAR: u64 = 1 << 53;

/// What is wrong with bytes, or with a value, that should be a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", readable(.0))]
pub struct Damaged(pub String);

/// What the start of a snapshot file tells.
#[derive(Clone, Debug, PartialEq)]
pub struct Info {
    pub head: SnapshotHead,
    /// Positions of the sequence as a client sees it, [`Memory::tokens`](crate::types::Memory::tokens).
    pub tokens: u64,
    /// Bytes of the recurrent state, [`Memory::bytes`](crate::types::Memory::bytes).
    pub bytes: u64,
}

/// Everything of a snapshot that is not a tensor.
#[derive(Serialize, Deserialize)]
pub(super) struct Meta<'a> {
    pub format: u32,
    pub head: Cow<'a, SnapshotHead>,
    pub consumed: u64,
    pub pending: Cow<'a, Pending>,
    /// The model's order, which safetensors does not keep.
    pub segments: Vec<Cow<'a, str>>,
    /// What of each segment is in the compressed body, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<Vec<Values>>,
}

/// A segment's stored values: what its tensor says of itself when it has one of its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Values {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Values {
    /// How many there are, and their bytes.
    pub fn size(&self) -> Option<(usize, usize)> {
        let values = self.shape.iter().try_fold(1usize, |n, side| n.checked_mul(*side))?;
        Some((values, values.checked_mul(precision::width(self.dtype)?)?))
    }
}

/// How many bytes from its start a file of `size` bytes needs for [`decode_head`], read from its first 8.
pub fn head_len(start: &[u8], size: u64) -> Result<usize, Damaged> {
    let first = start.first_chunk::<8>().ok_or_else(|| Damaged(format!("it is only {size} bytes long")))?;
    let header = u64::from_le_bytes(*first);
    header
        .checked_add(8)
        .filter(|end| *end <= size)
        .and_then(|end| usize::try_from(end).ok())
        .ok_or_else(|| Damaged(format!("its header of {header} bytes does not fit into {size}")))
}

/// What the first [`head_len`] bytes of a file of `size` bytes tell, without the checksum having been seen.
pub fn decode_head(start: &[u8], size: u64) -> Result<Info, Damaged> {
    Header::parse(start, size)?.info()
}

/// What comes before the tensors, understood and found to fit the file.
pub(super) struct Header {
    pub meta: Meta<'static>,
    pub tensors: Metadata,
    /// Of each segment: of a type that it can have, and together no more than the file can hold.
    pub values: Vec<Values>,
    /// Where the tensors begin in the file.
    pub data_at: usize,
}

impl Header {
    /// That of a file whose checksum is right.
    pub fn of_whole(file: &[u8]) -> Result<Self, Damaged> {
        let header = Self::parse(file, file.len() as u64)?;
        let (body, stored) = file.split_at(file.len() - HASH);
        if blake3::hash(body) != blake3::Hash::from_slice(stored).expect("32 bytes are split off") {
            return Err(Damaged("the checksum does not match the contents".into()));
        }
        Ok(header)
    }

    pub fn info(self) -> Result<Info, Damaged> {
        let Self { meta, values, .. } = self;
        let bytes = values.iter().filter_map(Values::size).map(|(values, _)| 4 * values as u64).sum();
        let tokens = positions(meta.consumed, &meta.pending)?;
        Ok(Info { head: meta.head.into_owned(), tokens, bytes })
    }

    fn parse(start: &[u8], size: u64) -> Result<Self, Damaged> {
        let data_at = head_len(start, size)?;
        let json = start.get(8..data_at).ok_or_else(|| Damaged("its header is cut off".into()))?;
        let unreadable = |e: serde_json::Error| Damaged(format!("its header is not that of a safetensors file: {e}"));
        let _: DistinctKeys = serde_json::from_slice(json).map_err(unreadable)?;
        // This also checks that the tensors follow one another without gaps and are as long as their shapes say.
        let tensors: Metadata = serde_json::from_slice(json).map_err(unreadable)?;
        let (data_len, there) = (tensors.data_len(), size - data_at as u64);
        if data_len as u64 != there {
            return Err(Damaged(format!("its tensors are {there} bytes and not {data_len} as its header says")));
        }
        let checksum = tensor(&tensors, CHECKSUM, Dtype::U8)?;
        if checksum.shape != [HASH] || checksum.data_offsets.1 != data_len {
            return Err(Damaged("the checksum is not its last 32 bytes".into()));
        }

        let meta = tensors.metadata().as_ref().and_then(|all| all.get(META));
        let meta = meta.ok_or_else(|| Damaged("it is a safetensors file but not a snapshot".into()))?;
        let unreadable = |e: serde_json::Error| Damaged(format!("its metadata cannot be read: {e}"));
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let Version { format } = serde_json::from_str(meta).map_err(unreadable)?;
        if !FORMATS.contains(&format) {
            let [exact, other] = FORMATS;
            return Err(Damaged(format!("it has format version {format}; this program knows {exact} and {other}")));
        }
        let meta: Meta<'static> = serde_json::from_str(meta).map_err(unreadable)?;
        check_names(meta.segments.iter().map(|name| &**name))?;
        let body = if meta.body.is_some() { 1 } else { meta.segments.len() };
        if tensors.offset_keys().len() != body + OTHERS + usize::from(tensors.info(SCALES).is_some()) {
            return Err(Damaged("it has tensors that its metadata does not name".into()));
        }
        let values = values(&meta, &tensors, size)?;
        Ok(Self { meta, tensors, values, data_at })
    }
}

/// What is said of each segment's values, checked.
fn values(meta: &Meta, tensors: &Metadata, size: u64) -> Result<Vec<Values>, Damaged> {
    let exact = meta.format == FORMATS[0];
    let all = match &meta.body {
        Some(_) if exact => return Err(Damaged("its format has no compressed body".into())),
        Some(body) if body.len() != meta.segments.len() => {
            let (found, named) = (body.len(), meta.segments.len());
            return Err(Damaged(format!("its body has {found} segments and its metadata names {named}")));
        }
        Some(body) => body.clone(),
        None => {
            let values = |name: &Cow<str>| {
                let info = tensors.info(name).ok_or_else(|| Damaged(format!("the tensor `{name}` is missing")))?;
                Ok(Values { dtype: info.dtype, shape: info.shape.clone() })
            };
            meta.segments.iter().map(values).collect::<Result<Vec<_>, Damaged>>()?
        }
    };
    let mut whole = 0u64;
    for (name, values) in meta.segments.iter().zip(&all) {
        let Values { dtype, shape } = values;
        let possible = match dtype {
            Dtype::F32 => true,
            Dtype::F16 => !exact,
            Dtype::I8 => !exact && heads(shape).is_some(),
            _ => false,
        };
        if !possible {
            let expected = if exact { "F32" } else { "F32, F16 or, of heads, I8" };
            return Err(Damaged(format!("`{name}` is {dtype} and not {expected}")));
        }
        let values = values.size().map(|(values, _)| values as u64);
        whole = values
            .and_then(|values| whole.checked_add(values.checked_mul(4)?))
            .filter(|whole| *whole <= squeeze::RATIO * size)
            .ok_or_else(|| Damaged(format!("`{name}` of shape {shape:?} cannot be in a file of {size} bytes")))?;
    }
    Ok(all)
}

pub(super) fn tensor<'a>(tensors: &'a Metadata, name: &str, dtype: Dtype) -> Result<&'a TensorInfo, Damaged> {
    let info = tensors.info(name).ok_or_else(|| Damaged(format!("the tensor `{name}` is missing")))?;
    if info.dtype == dtype { Ok(info) } else { Err(Damaged(format!("`{name}` is {} and not {dtype}", info.dtype))) }
}

pub(super) fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), Damaged> {
    let mut seen = HashSet::new();
    for name in names {
        if RESERVED.contains(&name) {
            return Err(Damaged(format!("`{name}` cannot be the name of a segment")));
        }
        if !seen.insert(name) {
            return Err(Damaged(format!("segment `{name}` is there twice")));
        }
    }
    Ok(())
}

/// [`Memory::tokens`], if that is a believable number.
pub(super) fn positions(consumed: u64, pending: &Pending) -> Result<u64, Damaged> {
    let tokens = consumed.checked_add(pending.ends.len() as u64);
    tokens.filter(|n| *n <= FAR).ok_or_else(|| Damaged(format!("it claims to have read {consumed} tokens")))
}

/// A JSON object no key of which is there twice: of two tensors of one name, safetensors would take the last.
struct DistinctKeys;

impl<'de> Deserialize<'de> for DistinctKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self)
    }
}

impl<'de> Visitor<'de> for DistinctKeys {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut seen = HashSet::new();
        while let Some((key, IgnoredAny)) = map.next_entry::<String, _>()? {
            if seen.contains(&key) {
                return Err(serde::de::Error::custom(format!("`{key}` is there twice")));
            }
            seen.insert(key);
        }
        Ok(self)
    }
}
