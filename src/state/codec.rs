//! A snapshot as bytes: a safetensors file that describes and checks itself.
//!
//! ```text
//! u64 length of the header, little endian
//! header: JSON {"__metadata__": {"rewake": "<JSON of Meta>"}, "<tensor>": {"dtype", "shape", "data_offsets"}, …}, padded
//! one F32 tensor for each segment, under its name
//! "counts.values" F32 [n], "counts.ids" U32 [n]     decayed occurrence counts
//! "tail"          U32 [n]                           last ids the state has read
//! "checksum"      U8 [32]                           BLAKE3 of every byte of the file before these 32
//! ```
//!
//! safetensors puts wider types first and then goes by name, so the checksum, the only U8, is last. Encoding is
//! deterministic byte for byte. Any safetensors reader can open the file; [`decode`] trusts nothing in it.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;

use safetensors::tensor::{Dtype, Metadata, TensorInfo, View};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::types::{Memory, Pending, SegmentData, Snapshot, SnapshotHead, TAIL, readable};

/// Version of the layout, in every file.
pub const FORMAT: u32 = 1;

/// The key of our JSON in the safetensors metadata.
const META: &str = "rewake";
const TAIL_IDS: &str = "tail";
const COUNT_IDS: &str = "counts.ids";
const COUNT_VALUES: &str = "counts.values";
const CHECKSUM: &str = "checksum";
/// Names no segment may have.
const RESERVED: [&str; 5] = ["__metadata__", TAIL_IDS, COUNT_IDS, COUNT_VALUES, CHECKSUM];
/// Tensors beside the segments.
const OTHERS: usize = 4;
/// Bytes of the checksum.
const HASH: usize = blake3::OUT_LEN;
/// Positions beyond this are not exact in every reader of JSON.
const FAR: u64 = 1 << 53;

/// What is wrong with bytes, or with a value, that should be a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", readable(.0))]
pub struct Damaged(pub String);

/// What the start of a snapshot file tells.
#[derive(Clone, Debug, PartialEq)]
pub struct Info {
    pub head: SnapshotHead,
    /// Positions of the sequence as a client sees it, [`Memory::tokens`].
    pub tokens: u64,
    /// Bytes of the recurrent state, [`Memory::bytes`].
    pub bytes: u64,
}

/// Everything of a snapshot that is not a tensor.
#[derive(Serialize, Deserialize)]
struct Meta<'a> {
    format: u32,
    head: Cow<'a, SnapshotHead>,
    consumed: u64,
    pending: Cow<'a, Pending>,
    /// The model's order, which safetensors does not keep.
    segments: Vec<Cow<'a, str>>,
}

/// The file of a snapshot.
///
/// # Errors
/// The snapshot is not one that [`decode`] would accept: a value is not finite, a shape does not fit its values, a
/// name is used twice.
pub fn encode(snapshot: &Snapshot) -> Result<Vec<u8>, Damaged> {
    check(snapshot)?;
    let Snapshot { head, memory } = snapshot;
    let meta = Meta {
        format: FORMAT,
        head: Cow::Borrowed(head),
        consumed: memory.consumed,
        pending: Cow::Borrowed(&memory.pending),
        segments: memory.segments.iter().map(|s| Cow::Borrowed(s.name.as_str())).collect(),
    };
    let meta = serde_json::to_string(&meta).map_err(|e| Damaged(format!("metadata cannot be written: {e}")))?;

    let (ids, values): (Vec<u32>, Vec<f32>) = memory.counts.iter().copied().unzip();
    let segments = memory.segments.iter().map(|s| (s.name.as_str(), Part::f32(s.shape.clone(), &s.data)));
    let others = [
        (COUNT_VALUES, Part::f32(vec![values.len()], &values)),
        (COUNT_IDS, Part::u32(&ids)),
        (TAIL_IDS, Part::u32(&memory.tail)),
        (CHECKSUM, Part { shape: vec![HASH], values: Values::U8([0; HASH]) }),
    ];
    let metadata = HashMap::from([(META.to_string(), meta)]);
    let mut file = safetensors::serialize(segments.chain(others), Some(metadata))
        .map_err(|e| Damaged(format!("not a safetensors file: {e}")))?;

    let end = file.len() - HASH;
    debug_assert!(file[end..] == [0; HASH], "the checksum is the last tensor");
    let hash = blake3::hash(&file[..end]);
    file[end..].copy_from_slice(hash.as_bytes());
    Ok(file)
}

/// The snapshot in a file.
///
/// # Errors
/// Anything that is not exactly what [`encode`] writes in this format, with the reason. Never panics.
pub fn decode(file: &[u8]) -> Result<Snapshot, Damaged> {
    let size = file.len() as u64;
    let header = Header::parse(file, size)?;
    let (body, stored) = file.split_at(file.len() - HASH);
    if blake3::hash(body) != blake3::Hash::from_slice(stored).expect("32 bytes are split off") {
        return Err(Damaged("the checksum does not match the contents".into()));
    }

    let Header { meta, tensors, data_at } = header;
    let bytes_of = |name: &str, dtype: Dtype| -> Result<(Vec<usize>, &[u8]), Damaged> {
        let info = tensor(&tensors, name, dtype)?;
        // `Header::parse` has seen that the offsets lie within the file.
        Ok((info.shape.clone(), &file[data_at + info.data_offsets.0..data_at + info.data_offsets.1]))
    };
    let list_of = |name: &str, dtype: Dtype| -> Result<&[u8], Damaged> {
        let (shape, bytes) = bytes_of(name, dtype)?;
        if shape.len() == 1 { Ok(bytes) } else { Err(Damaged(format!("`{name}` is not a list"))) }
    };

    let mut segments = Vec::with_capacity(meta.segments.len());
    for name in &meta.segments {
        let (shape, bytes) = bytes_of(name, Dtype::F32)?;
        segments.push(SegmentData { name: name.to_string(), shape, data: words(bytes, f32::from_le_bytes) });
    }
    let ids = words(list_of(COUNT_IDS, Dtype::U32)?, u32::from_le_bytes);
    let values = words(list_of(COUNT_VALUES, Dtype::F32)?, f32::from_le_bytes);
    if ids.len() != values.len() {
        return Err(Damaged(format!("there are {} counts for {} ids", values.len(), ids.len())));
    }
    let memory = Memory {
        segments,
        consumed: meta.consumed,
        pending: meta.pending.into_owned(),
        tail: words(list_of(TAIL_IDS, Dtype::U32)?, u32::from_le_bytes),
        counts: ids.into_iter().zip(values).collect(),
    };
    let snapshot = Snapshot { head: meta.head.into_owned(), memory };
    check(&snapshot)?;
    Ok(snapshot)
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
    let Header { meta, tensors, .. } = Header::parse(start, size)?;
    let mut bytes = 0;
    for name in &meta.segments {
        let (from, to) = tensor(&tensors, name, Dtype::F32)?.data_offsets;
        bytes += (to - from) as u64;
    }
    let tokens = positions(meta.consumed, &meta.pending)?;
    Ok(Info { head: meta.head.into_owned(), tokens, bytes })
}

/// What comes before the tensors, understood and found to fit the file.
struct Header {
    meta: Meta<'static>,
    tensors: Metadata,
    /// Where the tensors begin in the file.
    data_at: usize,
}

impl Header {
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
        if format != FORMAT {
            return Err(Damaged(format!("it has format version {format}; this program knows version {FORMAT}")));
        }
        let meta: Meta<'static> = serde_json::from_str(meta).map_err(unreadable)?;
        check_names(meta.segments.iter().map(|name| &**name))?;
        if tensors.offset_keys().len() != meta.segments.len() + OTHERS {
            return Err(Damaged("it has tensors that its metadata does not name".into()));
        }
        Ok(Self { meta, tensors, data_at })
    }
}

fn tensor<'a>(tensors: &'a Metadata, name: &str, dtype: Dtype) -> Result<&'a TensorInfo, Damaged> {
    let info = tensors.info(name).ok_or_else(|| Damaged(format!("the tensor `{name}` is missing")))?;
    if info.dtype == dtype { Ok(info) } else { Err(Damaged(format!("`{name}` is {} and not {dtype}", info.dtype))) }
}

/// What must hold of every stored snapshot, checked before writing and after reading.
fn check(Snapshot { memory, .. }: &Snapshot) -> Result<(), Damaged> {
    check_names(memory.segments.iter().map(|s| s.name.as_str()))?;
    for SegmentData { name, shape, data } in &memory.segments {
        if shape.iter().try_fold(1usize, |n, side| n.checked_mul(*side)) != Some(data.len()) {
            return Err(Damaged(format!("segment `{name}` has {} values and shape {shape:?}", data.len())));
        }
        if let Some(at) = data.iter().position(|x| !x.is_finite()) {
            return Err(Damaged(format!("segment `{name}` is not finite: value {at} is {}", data[at])));
        }
    }
    if memory.tail.len() > TAIL {
        return Err(Damaged(format!("its tail has {} ids, more than {TAIL}", memory.tail.len())));
    }
    if let Some((id, count)) = memory.counts.iter().find(|(_, count)| !count.is_finite()) {
        return Err(Damaged(format!("the count of token {id} is {count}")));
    }
    if !memory.counts.is_sorted_by(|(a, _), (b, _)| a < b) {
        return Err(Damaged("its counts are not by ascending id".into()));
    }
    positions(memory.consumed, &memory.pending).map(|_| ())
}

fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), Damaged> {
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
fn positions(consumed: u64, pending: &Pending) -> Result<u64, Damaged> {
    let tokens = consumed.checked_add(pending.ends.len() as u64);
    tokens.filter(|n| *n <= FAR).ok_or_else(|| Damaged(format!("it claims to have read {consumed} tokens")))
}

fn words<T>(bytes: &[u8], word: impl Fn([u8; 4]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|four| word(*four)).collect()
}

/// A tensor to be written.
struct Part<'a> {
    shape: Vec<usize>,
    values: Values<'a>,
}

enum Values<'a> {
    F32(&'a [f32]),
    U32(&'a [u32]),
    U8([u8; HASH]),
}

impl<'a> Part<'a> {
    fn f32(shape: Vec<usize>, values: &'a [f32]) -> Self {
        Self { shape, values: Values::F32(values) }
    }
    fn u32(values: &'a [u32]) -> Self {
        Self { shape: vec![values.len()], values: Values::U32(values) }
    }
}

impl View for Part<'_> {
    fn dtype(&self) -> Dtype {
        match self.values {
            Values::F32(_) => Dtype::F32,
            Values::U32(_) => Dtype::U32,
            Values::U8(_) => Dtype::U8,
        }
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        match &self.values {
            Values::F32(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Values::U32(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Values::U8(bytes) => Cow::Borrowed(bytes),
        }
    }
    fn data_len(&self) -> usize {
        match &self.values {
            Values::F32(values) => 4 * values.len(),
            Values::U32(values) => 4 * values.len(),
            Values::U8(bytes) => bytes.len(),
        }
    }
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
