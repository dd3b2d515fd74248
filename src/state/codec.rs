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
use std::collections::HashMap;

use safetensors::tensor::{Dtype, View};

use super::header::{
    BODY, CHECKSUM, COUNT_IDS, COUNT_VALUES, Damaged, FORMATS, HASH, Header, Info, META, Meta, SCALES, TAIL_IDS,
    Values, check_names, positions, tensor,
};
use super::precision::{Packed, Storage, pack, unpack};
use super::squeeze;
use crate::types::{Memory, SegmentData, Snapshot, TAIL};

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
