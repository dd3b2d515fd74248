//! A snapshot as bytes: a safetensors file that describes and checks itself.
//!
//! ```text
//! u64 length of the header, little endian
//! header: JSON {"__metadata__": {"rewake": "<JSON of Meta>"}, "<tensor>": {"dtype", "shape", "data_offsets"}, …}, padded
//! one tensor for each segment, under its name       F32, or F16, or I8 as `Storage` says
//! "counts.values" F32 [n], "counts.ids" U32 [n]     decayed occurrence counts
//! "scales"        F32 [n]                           of the heads of all I8 segments, in the model's order; if there are any
//! "tail"          U32 [n]                           last ids the state has read
//! "body.zstd"     U8 [n]                            in place of the segments' tensors: all their bytes, in the model's order
//! "checksum"      U8 [32]                           BLAKE3 of every byte of the file before these 32
//! ```
//!
//! safetensors puts wider types first and then goes by name, so the checksum is last. Encoding is deterministic byte for
//! byte. Any safetensors reader can open the file; [`decode`] trusts nothing in it.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;

use safetensors::tensor::{Dtype, Metadata, TensorInfo, View};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::precision::{self, Packed, Storage, heads, pack, unpack};
use super::squeeze;
use crate::types::{Memory, Pending, SegmentData, Snapshot, SnapshotHead, TAIL, readable};

/// Version of the layout, in every file: that of exact and plain ones, which every version of this program reads, and that
/// of the others.
pub const FORMATS: [u32; 2] = [1, 2];

/// The key of our JSON in the safetensors metadata.
const META: &str = "rewake";
const TAIL_IDS: &str = "tail";
const COUNT_IDS: &str = "counts.ids";
const COUNT_VALUES: &str = "counts.values";
const CHECKSUM: &str = "checksum";
const SCALES: &str = "scales";
const BODY: &str = "body.zstd";
/// Names no segment may have.
const RESERVED: [&str; 7] = ["__metadata__", TAIL_IDS, COUNT_IDS, COUNT_VALUES, CHECKSUM, SCALES, BODY];
/// Tensors that are always there beside the segments.
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
    /// What of each segment is in the compressed body, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body: Option<Vec<Values>>,
}

/// A segment's stored values: what its tensor says of itself when it has one of its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Values {
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Values {
    /// How many there are, and their bytes.
    fn size(&self) -> Option<(usize, usize)> {
        let values = self.shape.iter().try_fold(1usize, |n, side| n.checked_mul(*side))?;
        Some((values, values.checked_mul(precision::width(self.dtype)?)?))
    }
}

/// The file of a snapshot, exact and plain.
///
/// # Errors
/// The snapshot is not one that [`decode`] would accept: a value is not finite, a shape does not fit its values, a
/// name is used twice.
pub fn encode(snapshot: &Snapshot) -> Result<Vec<u8>, Damaged> {
    encode_as(snapshot, Storage::default())
}

/// The file of a snapshot, stored as `storage` says.
///
/// # Errors
/// The snapshot is not one that [`decode`] would accept: a value is not finite, a shape does not fit its values, a
/// name is used twice.
pub fn encode_as(snapshot: &Snapshot, storage: Storage) -> Result<Vec<u8>, Damaged> {
    check(snapshot)?;
    let Snapshot { head, memory } = snapshot;
    let packed: Vec<Packed> = memory.segments.iter().map(|s| pack(s, storage.precision)).collect();
    let values = |(s, packed): (&SegmentData, &Packed)| Values { dtype: packed.dtype, shape: s.shape.clone() };
    let body = if storage.compress { squeeze::compress(&packed, memory.bytes())? } else { None };
    let meta = Meta {
        format: FORMATS[usize::from(storage != Storage::default())],
        head: Cow::Borrowed(head),
        consumed: memory.consumed,
        pending: Cow::Borrowed(&memory.pending),
        segments: memory.segments.iter().map(|s| Cow::Borrowed(s.name.as_str())).collect(),
        body: body.is_some().then(|| memory.segments.iter().zip(&packed).map(values).collect()),
    };
    let meta = serde_json::to_string(&meta).map_err(|e| Damaged(format!("metadata cannot be written: {e}")))?;

    let (ids, counts): (Vec<u32>, Vec<f32>) = memory.counts.iter().copied().unzip();
    let scales: Vec<f32> = packed.iter().flat_map(|packed| packed.scales.iter().copied()).collect();
    let mut parts = vec![
        (COUNT_VALUES, Part::f32(&counts)),
        (COUNT_IDS, Part::u32(&ids)),
        (TAIL_IDS, Part::u32(&memory.tail)),
        (CHECKSUM, Part::bytes(Dtype::U8, vec![HASH], &[0; HASH])),
    ];
    if !scales.is_empty() {
        parts.push((SCALES, Part::f32(&scales)));
    }
    match &body {
        Some(body) => parts.push((BODY, Part::bytes(Dtype::U8, vec![body.len()], body))),
        None => parts.extend(
            memory
                .segments
                .iter()
                .zip(&packed)
                .map(|(s, packed)| (s.name.as_str(), Part::bytes(packed.dtype, s.shape.clone(), &packed.bytes))),
        ),
    }
    let metadata = HashMap::from([(META.to_string(), meta)]);
    let mut file =
        safetensors::serialize(parts, Some(metadata)).map_err(|e| Damaged(format!("not a safetensors file: {e}")))?;

    let end = file.len() - HASH;
    debug_assert!(file[end..] == [0; HASH], "the checksum is the last tensor");
    let hash = blake3::hash(&file[..end]);
    file[end..].copy_from_slice(hash.as_bytes());
    Ok(file)
}

/// The snapshot in a file.
///
/// # Errors
/// Anything that is not exactly what [`encode_as`] writes, with the reason. Never panics, and takes memory in proportion to
/// the file only.
pub fn decode(file: &[u8]) -> Result<Snapshot, Damaged> {
    let Header { meta, tensors, values, data_at } = Header::of_whole(file)?;
    let bytes_of = |name: &str, dtype: Dtype| -> Result<&[u8], Damaged> {
        let (from, to) = tensor(&tensors, name, dtype)?.data_offsets;
        // `Header::parse` has seen that the offsets lie within the file.
        Ok(&file[data_at + from..data_at + to])
    };
    let list_of = |name: &str, dtype: Dtype| -> Result<&[u8], Damaged> {
        let bytes = bytes_of(name, dtype)?;
        if tensor(&tensors, name, dtype)?.shape.len() == 1 {
            Ok(bytes)
        } else {
            Err(Damaged(format!("`{name}` is not a list")))
        }
    };

    let has_scales = tensors.info(SCALES).is_some();
    let scales = if has_scales { words(list_of(SCALES, Dtype::F32)?, f32::from_le_bytes) } else { Vec::new() };
    let mut scales = &scales[..];
    let mut body =
        meta.body.is_some().then(|| list_of(BODY, Dtype::U8)).transpose()?.map(squeeze::Body::open).transpose()?;
    let mut segments = Vec::with_capacity(meta.segments.len());
    for (name, stored) in meta.segments.iter().zip(values) {
        let bytes = match &mut body {
            Some(body) => body.next(stored.size().map_or(0, |(_, bytes)| bytes))?.into(),
            None => Cow::Borrowed(bytes_of(name, stored.dtype)?),
        };
        let data = unpack(stored.dtype, &stored.shape, &bytes, &mut scales)?;
        segments.push(SegmentData { name: name.to_string(), shape: stored.shape, data });
    }
    if !scales.is_empty() {
        return Err(Damaged(format!("{} scales belong to no segment", scales.len())));
    }
    body.map_or(Ok(()), squeeze::Body::end)?;
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

/// What a whole file tells of itself before any of its tensors is unpacked.
///
/// # Errors
/// As [`decode`], but that the tensors' values are not looked at.
pub fn inspect(file: &[u8]) -> Result<Info, Damaged> {
    Header::of_whole(file)?.info()
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
struct Header {
    meta: Meta<'static>,
    tensors: Metadata,
    /// Of each segment: of a type that it can have, and together no more than the file can hold.
    values: Vec<Values>,
    /// Where the tensors begin in the file.
    data_at: usize,
}

impl Header {
    /// That of a file whose checksum is right.
    fn of_whole(file: &[u8]) -> Result<Self, Damaged> {
        let header = Self::parse(file, file.len() as u64)?;
        let (body, stored) = file.split_at(file.len() - HASH);
        if blake3::hash(body) != blake3::Hash::from_slice(stored).expect("32 bytes are split off") {
            return Err(Damaged("the checksum does not match the contents".into()));
        }
        Ok(header)
    }

    fn info(self) -> Result<Info, Damaged> {
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
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl<'a> Part<'a> {
    fn f32(values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: vec![values.len()], bytes: bytes.into() }
    }
    fn u32(values: &[u32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self { dtype: Dtype::U32, shape: vec![values.len()], bytes: bytes.into() }
    }
    fn bytes(dtype: Dtype, shape: Vec<usize>, bytes: &'a [u8]) -> Self {
        Self { dtype, shape, bytes: Cow::Borrowed(bytes) }
    }
}

impl View for Part<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
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
