//! GGUF, versions 2 and 3 in little-endian order: metadata, descriptions of tensors, and their values, aligned.
//!
//! The format is described in `docs/gguf.md` of ggml-org/ggml. Pure functions over bytes: [`read`] for a file that is
//! mapped or in memory, [`header`] for what comes before the values of a file to be written.

mod value;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::Kind;
use super::container::Cursor;
use super::file::Place;
use value::Element;
pub use value::{Array, Value};

const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is written. Version 2 differs from it only in that it is never big-endian.
const VERSION: u32 = 3;
const ALIGNMENT_KEY: &str = "general.alignment";
/// Where nothing else is said, tensors begin at multiples of this many bytes.
const ALIGNMENT: u64 = 32;
/// No writer asks for more, and what is aligned to more cannot be mapped that way.
const MAX_ALIGNMENT: u32 = 1 << 20;
/// ggml's tensors have up to four dimensions.
const MAX_DIMENSIONS: u32 = 4;
/// A key's length, its value's type, and a value of one byte.
const SMALLEST_VALUE: usize = 8 + 4 + 1;
/// A name's length, the number of dimensions, a type, and an offset.
const SMALLEST_TENSOR: usize = 8 + 4 + 4 + 8;

/// The metadata and the tensors of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Gguf {
    pub metadata: BTreeMap<String, Value>,
    /// In the order in which the file describes them.
    pub tensors: Vec<Place>,
}

impl Gguf {
    /// A string that is UTF-8.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            Value::String(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// An integer of any type, if it fits.
    pub fn u32(&self, key: &str) -> Option<u32> {
        match *self.metadata.get(key)? {
            Value::U8(n) => Some(n.into()),
            Value::U16(n) => Some(n.into()),
            Value::U32(n) => Some(n),
            Value::U64(n) => n.try_into().ok(),
            Value::I8(n) => n.try_into().ok(),
            Value::I16(n) => n.try_into().ok(),
            Value::I32(n) => n.try_into().ok(),
            Value::I64(n) => n.try_into().ok(),
            _ => None,
        }
    }

    /// A number with a fraction; one of 64 bits is rounded.
    pub fn f32(&self, key: &str) -> Option<f32> {
        match *self.metadata.get(key)? {
            Value::F32(n) => Some(n),
            Value::F64(n) => Some(n as f32),
            _ => None,
        }
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Option<&[Vec<u8>]> {
        match self.metadata.get(key)? {
            Value::Array(Array::String(strings)) => Some(strings),
            _ => None,
        }
    }
}

/// Whether a file begins like one that [`read`] reads.
pub fn is_gguf(file: &[u8]) -> bool {
    file.starts_with(&MAGIC)
}

/// The tokens of RWKV's own kind of vocabulary by id, as they are written; empty for ids that have no text.
pub fn vocabulary(gguf: &Gguf) -> Result<Vec<Vec<u8>>, String> {
    const NORMAL: i32 = 1;
    let tokens = gguf.strings("tokenizer.ggml.tokens").ok_or("its vocabulary has no tokens")?;
    let types = match gguf.metadata.get("tokenizer.ggml.token_type") {
        Some(Value::Array(Array::I32(types))) if types.len() == tokens.len() => types.as_slice(),
        _ => return Err("its vocabulary does not say the type of each token".into()),
    };
    // Others control, or stand for ids that nothing has.
    let text = |(token, &kind): (&Vec<u8>, &i32)| if kind == NORMAL { token.clone() } else { Vec::new() };
    Ok(tokens.iter().zip(types).map(text).collect())
}

/// Reads all of a file but the values of its tensors.
///
/// # Errors
/// What was found where, if it is not such a file, if it is cut off, if tensors overlap or are of a type that is not
/// [`Kind`], or if a name is there twice. Memory is bounded by a small multiple of the file's size, whatever it says.
pub fn read(file: &[u8]) -> Result<Gguf, String> {
    let mut cursor = Cursor::new(file);
    let magic = cursor.array("the magic number")?;
    if magic != MAGIC {
        return Err(format!("it begins with {magic:02x?}, not with `GGUF`"));
    }
    check_version(cursor.u32("the version")?)?;
    let tensors = cursor.u64("the number of tensors")?;
    let values = cursor.u64("the number of metadata values")?;
    let metadata = read_metadata(&mut cursor, values)?;
    let alignment = alignment(&metadata)?;
    let mut tensors = read_infos(&mut cursor, tensors, alignment)?;
    let start = cursor.position().next_multiple_of(alignment);
    place(&mut tensors, start, file.len())?;
    Ok(Gguf { metadata, tensors })
}

fn check_version(version: u32) -> Result<(), String> {
    match version {
        2 | VERSION => Ok(()),
        1 => Err("GGUF version 1 is not supported; versions 2 and 3 are".into()),
        other if matches!(other.swap_bytes(), 1..=VERSION) => Err("big-endian GGUF files are not supported".into()),
        other => Err(format!("GGUF version {other} is not supported; versions 2 and 3 are")),
    }
}

fn read_metadata(cursor: &mut Cursor, count: u64) -> Result<BTreeMap<String, Value>, String> {
    let mut metadata = BTreeMap::new();
    for _ in 0..cursor.count(count, SMALLEST_VALUE, "metadata values")? {
        let length = cursor.u64("the length of a metadata key")?;
        let key = cursor.text(length, "a metadata key")?;
        let value = Value::read(cursor).map_err(|e| format!("the value of `{key}`: {e}"))?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return Err(format!("the metadata key `{key}` is there twice"));
        }
    }
    Ok(metadata)
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<usize, String> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(ALIGNMENT as usize),
        Some(&Value::U32(n)) if n.is_power_of_two() && n <= MAX_ALIGNMENT => Ok(n as usize),
        // Not shown, since it may be an array of any size.
        Some(_) => Err(format!("`{ALIGNMENT_KEY}` is not a u32 that is a power of two up to {MAX_ALIGNMENT}")),
    }
}

/// The descriptions of all tensors, with places counted from the first of them.
fn read_infos(cursor: &mut Cursor, count: u64, alignment: usize) -> Result<Vec<Place>, String> {
    let mut names = BTreeSet::new();
    let mut tensors = Vec::new();
    for _ in 0..cursor.count(count, SMALLEST_TENSOR, "tensors")? {
        let length = cursor.u64("the length of a tensor's name")?;
        let name = cursor.text(length, "a tensor's name")?;
        if !names.insert(name) {
            return Err(format!("the tensor `{name}` is there twice"));
        }
        tensors.push(read_info(cursor, name, alignment).map_err(|e| format!("the tensor `{name}`: {e}"))?);
    }
    Ok(tensors)
}

fn read_info(cursor: &mut Cursor, name: &str, alignment: usize) -> Result<Place, String> {
    let dimensions = cursor.u32("the number of dimensions")?;
    if dimensions > MAX_DIMENSIONS {
        return Err(format!("it has {dimensions} dimensions, and there can be {MAX_DIMENSIONS}"));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        let n = cursor.u64("a dimension")?;
        shape.push(usize::try_from(n).ok().filter(|&n| n > 0).ok_or_else(|| format!("it has a dimension of {n}"))?);
    }
    shape.reverse();
    let number = cursor.u32("the type")?;
    let kind = Kind::from_ggml(number)
        .ok_or_else(|| format!("it is of ggml's type {number}, which is not supported; {} are", Kind::names()))?;
    let size = kind.tensor_bytes(&shape).ok_or_else(|| {
        format!("a shape of {shape:?} is too large, or its rows are not whole blocks of {}", kind.name())
    })?;
    let offset = cursor.u64("the offset")?;
    let bytes = usize::try_from(offset)
        .ok()
        .filter(|offset| offset.is_multiple_of(alignment))
        .and_then(|from| Some(from..from.checked_add(size)?))
        .ok_or_else(|| format!("its offset {offset} is not a multiple of {alignment}, or is too large"))?;
    Ok(Place { name: name.to_owned(), kind, shape, strides: None, bytes })
}

/// Counts places from the front of the file, in which they all must be, each on its own.
fn place(tensors: &mut [Place], start: usize, end: usize) -> Result<(), String> {
    for tensor in &mut *tensors {
        let Range { start: from, end: to } = tensor.bytes;
        tensor.bytes = start.checked_add(to).filter(|&to| to <= end).map(|to| start + from..to).ok_or_else(|| {
            format!("the tensor `{}` ends {to} bytes after byte {start}, the file at {end}", tensor.name)
        })?;
    }
    let mut order: Vec<&Place> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.bytes.start);
    match order.windows(2).find(|pair| pair[0].bytes.end > pair[1].bytes.start) {
        Some(pair) => Err(format!("the tensors `{}` and `{}` overlap", pair[0].name, pair[1].name)),
        None => Ok(()),
    }
}

/// A tensor to be written: name, kind, and shape with the outermost dimension first.
pub type Description = (String, Kind, Vec<usize>);

/// What a file holds before the values of its tensors, and where those go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// All that comes before the first tensor.
    pub bytes: Vec<u8>,
    /// For each tensor, in the order given, its place in the file; what is between them is zero.
    pub places: Vec<Range<u64>>,
    /// The length of the file, which has zeros after its last tensor up to the alignment.
    pub length: u64,
}

/// The header of a file of version 3 with the default alignment.
///
/// # Errors
/// If a key or name is there twice, an alignment is asked for, or a shape is none that [`read`] would accept.
pub fn header(metadata: &[(String, Value)], tensors: &[Description]) -> Result<Header, String> {
    let mut bytes = MAGIC.to_vec();
    VERSION.write(&mut bytes);
    (tensors.len() as u64).write(&mut bytes);
    (metadata.len() as u64).write(&mut bytes);
    let mut keys = BTreeSet::from([ALIGNMENT_KEY]);
    for (key, value) in metadata {
        if !keys.insert(key) {
            return Err(format!("the metadata key `{key}` is given twice, or one that may not be given"));
        }
        write_name(key, &mut bytes);
        value.write(&mut bytes);
    }
    let (mut names, mut offset) = (BTreeSet::new(), 0u64);
    let mut places = Vec::with_capacity(tensors.len());
    for tensor @ (name, ..) in tensors {
        if !names.insert(name) {
            return Err(format!("the tensor `{name}` is given twice"));
        }
        let size = write_info(tensor, offset, &mut bytes).map_err(|e| format!("the tensor `{name}`: {e}"))?;
        let end =
            offset.checked_add(size).filter(|&end| end < 1 << 62).ok_or("the tensors are too large for a file")?;
        places.push(offset..end);
        offset = end.next_multiple_of(ALIGNMENT);
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
    let start = bytes.len() as u64;
    let places = places.into_iter().map(|place| start + place.start..start + place.end).collect();
    Ok(Header { bytes, places, length: start + offset })
}

/// Describes a tensor and returns its size in bytes.
fn write_info((name, kind, shape): &Description, offset: u64, out: &mut Vec<u8>) -> Result<u64, String> {
    if shape.len() > MAX_DIMENSIONS as usize || shape.contains(&0) {
        return Err(format!("a shape of {shape:?} has a dimension of 0, or more than {MAX_DIMENSIONS} of them"));
    }
    let size = kind.tensor_bytes(shape).ok_or_else(|| {
        format!("a shape of {shape:?} is too large, or its rows are not whole blocks of {}", kind.name())
    })?;
    write_name(name, out);
    (shape.len() as u32).write(out);
    shape.iter().rev().for_each(|&dimension| (dimension as u64).write(out));
    kind.ggml().write(out);
    offset.write(out);
    Ok(size as u64)
}

fn write_name(name: &str, out: &mut Vec<u8>) {
    (name.len() as u64).write(out);
    out.extend(name.as_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn metadata() -> Vec<(String, Value)> {
        vec![
            ("name".into(), Value::String(b"small".to_vec())),
            ("tokens".into(), Value::Array(Array::String(vec![b"\xff\xfe".to_vec(), vec![], b"ab".to_vec()]))),
            ("layers".into(), Value::U64(3)),
            ("epsilon".into(), Value::F64(0.25)),
            ("flags".into(), Value::Array(Array::Bool(vec![true, false]))),
        ]
    }

    fn tensors() -> Vec<Description> {
        vec![
            ("first".into(), Kind::F32, vec![3, 5]),
            ("second".into(), Kind::Q4_0, vec![2, 64]),
            ("third".into(), Kind::BF16, vec![]),
        ]
    }

    fn file(metadata: &[(String, Value)], tensors: &[Description]) -> Vec<u8> {
        let header = header(metadata, tensors).unwrap();
        let mut file = header.bytes;
        file.resize(header.length as usize, 0);
        file
    }

    /// A file with one tensor, as its writer would have it.
    fn one(dimensions: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let mut file = [&MAGIC[..], &3u32.to_le_bytes(), &1u64.to_le_bytes(), &0u64.to_le_bytes()].concat();
        write_name("w", &mut file);
        (dimensions.len() as u32).write(&mut file);
        dimensions.iter().for_each(|n| n.write(&mut file));
        kind.write(&mut file);
        offset.write(&mut file);
        file.resize(256, 0);
        file
    }

    /// A file with one value of metadata, from the number of its type on.
    fn with_value(bytes: &[u8]) -> Vec<u8> {
        let mut file = [&MAGIC[..], &3u32.to_le_bytes(), &0u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
        write_name("general.alignment", &mut file);
        file.extend(bytes);
        file
    }

    fn error(file: &[u8]) -> String {
        read(file).unwrap_err()
    }

    #[test]
    fn what_is_written_is_read() {
        let header = header(&metadata(), &tensors()).unwrap();
        let read = read(&file(&metadata(), &tensors())).unwrap();
        assert_eq!(read.str("name"), Some("small"));
        assert_eq!(read.u32("layers"), Some(3));
        assert_eq!(read.f32("epsilon"), Some(0.25));
        assert_eq!(read.strings("tokens").unwrap(), [&b"\xff\xfe"[..], b"", b"ab"]);
        assert_eq!((read.str("layers"), read.u32("epsilon"), read.f32("name")), (None, None, None));
        assert_eq!((read.strings("flags"), read.str("none")), (None, None));
        assert_eq!(header.places[1].end - header.places[1].start, 72);
        let places: Vec<_> = read.tensors.iter().map(|t| t.bytes.start as u64..t.bytes.end as u64).collect();
        assert_eq!(places, header.places);
    }

    /// The layout by hand: ggml has the innermost dimension first.
    #[test]
    fn a_file_byte_by_byte() {
        let mut expected = b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
        expected.extend(b"\x01\0\0\0\0\0\0\0k\x09\0\0\0\x08\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0hi");
        expected.extend(b"\x01\0\0\0\0\0\0\0w\x02\0\0\0\x05\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x01\0\0\0");
        expected.extend([0; 8]);
        expected.resize(expected.len().next_multiple_of(32), 0);
        let value = Value::Array(Array::String(vec![b"hi".to_vec()]));
        let header = header(&[("k".into(), value)], &[("w".into(), Kind::F16, vec![3, 5])]).unwrap();
        assert_eq!(header.bytes, expected);
        assert_eq!(header.places[0], expected.len() as u64..expected.len() as u64 + 30);
        assert_eq!(header.length, expected.len() as u64 + 32);
    }

    #[test]
    fn versions_and_byte_orders_are_told_apart() {
        let mut file = file(&metadata(), &tensors());
        file[4..8].copy_from_slice(&2u32.to_le_bytes());
        assert!(read(&file).is_ok());
        for (version, word) in [(1u32.to_le_bytes(), "version 1 "), (4u32.to_le_bytes(), "version 4 ")] {
            file[4..8].copy_from_slice(&version);
            assert!(error(&file).contains(word));
        }
        file[4..8].copy_from_slice(&3u32.to_be_bytes());
        assert!(error(&file).contains("big-endian"));
        assert!(error(b"GGML").contains("GGUF"));
    }

    #[test]
    fn alignments_are_kept() {
        let four = 4u32.to_le_bytes();
        let with = |alignment: u32| read(&with_value(&[four, alignment.to_le_bytes()].concat()));
        assert!(with(1).is_ok() && with(64).is_ok());
        for bad in [0, 33, MAX_ALIGNMENT * 2, u32::MAX] {
            assert!(with(bad).unwrap_err().contains("power of two"), "{bad}");
        }
        assert!(error(&with_value(b"\x08\0\0\0\0\0\0\0\0\0\0\0")).contains("power of two"));
        assert!(header(&[(ALIGNMENT_KEY.into(), Value::U32(64))], &[]).is_err());
    }

    #[test]
    fn lying_counts_are_refused() {
        let huge = u64::MAX.to_le_bytes();
        for at in [8, 16] {
            let mut file = file(&metadata(), &tensors());
            file[at..at + 8].copy_from_slice(&huge);
            assert!(error(&file).contains("the file has room for"), "{at}");
        }
        // A string, arrays of each type, and an array in an array, all of them longer than any memory.
        assert!(error(&with_value(&[&8u32.to_le_bytes()[..], &huge].concat())).contains("room for 0"));
        for number in (0..13).filter(|&n| n != value::ARRAY) {
            let array = [&value::ARRAY.to_le_bytes()[..], &u32::to_le_bytes(number), &huge].concat();
            assert!(error(&with_value(&array)).contains("room for 0"), "{number}");
        }
        let nested = [&value::ARRAY.to_le_bytes()[..], &value::ARRAY.to_le_bytes(), &1u64.to_le_bytes()].concat();
        assert!(error(&with_value(&nested)).contains("arrays of arrays"));
        assert!(error(&with_value(&[13, 0, 0, 0, 0])).contains("number 13"));
        assert!(error(&with_value(&[7, 0, 0, 0, 2])).contains("neither true nor false"));
    }

    #[test]
    fn impossible_tensors_are_refused() {
        assert!(read(&one(&[5, 3], 0, 32)).is_ok());
        for (dimensions, kind, offset, word) in [
            (&[1u64; 5][..], 0, 0, "5 dimensions"),
            (&[0, 3], 0, 0, "dimension of 0"),
            (&[u64::MAX], 0, 0, "too large"),
            (&[u64::MAX; 4], 0, 0, "too large"),
            (&[1 << 30, 1 << 30], 0, 0, "ends"),
            (&[16, 2], 2, 0, "whole blocks of q4_0"),
            (&[5, 3], 10, 0, "type 10"),
            (&[5, 3], 0, 8, "multiple of 32"),
            (&[5, 3], 0, u64::MAX - 31, "too large"),
            (&[5, 3], 0, 1 << 62, "ends"),
            (&[5, 3], 0, 256, "ends"),
        ] {
            let error = error(&one(dimensions, kind, offset));
            assert!(error.contains(word) && error.contains("`w`"), "{dimensions:?}: {error}");
        }
    }

    #[test]
    fn tensors_that_overlap_are_refused() {
        let two = [("first".into(), Kind::F32, vec![16]), ("second".into(), Kind::F32, vec![8])];
        let mut file = file(&[], &two);
        let header = header(&[], &two).unwrap().bytes.len();
        let at = file[..header].windows(8).rposition(|bytes| bytes == 64u64.to_le_bytes()).unwrap();
        file[at..at + 8].copy_from_slice(&32u64.to_le_bytes());
        assert!(error(&file).contains("`first` and `second` overlap"));
    }

    #[test]
    fn names_come_once() {
        let again = |file: Vec<u8>, from: &[u8], to: &[u8]| {
            let at = file.windows(from.len()).position(|bytes| bytes == from).unwrap();
            error(&[&file[..at], to, &file[at + to.len()..]].concat())
        };
        let tensor = |name: &str| (name.to_owned(), Kind::F16, vec![1]);
        let small = file(&[], &[tensor("one"), tensor("two")]);
        assert_eq!(again(small, b"two", b"one"), "the tensor `one` is there twice");
        let value = |name: &str| (name.to_owned(), Value::U8(1));
        let small = file(&[value("one"), value("two")], &[]);
        assert_eq!(again(small, b"two", b"one"), "the metadata key `one` is there twice");
        let small = file(&[], &[tensor("one")]);
        assert!(again(small, b"one", b"\xffne").contains("UTF-8"));
        assert!(header(&[], &[tensor("one"), tensor("one")]).is_err());
        assert!(header(&[value("one"), value("one")], &[]).is_err());
    }

    #[test]
    fn what_cannot_be_read_is_not_written() {
        for shape in [vec![33], vec![0, 32], vec![1, 1, 1, 1, 32], vec![usize::MAX - 31, 32]] {
            assert!(header(&[], &[("w".into(), Kind::Q8_0, shape.clone())]).is_err(), "{shape:?}");
        }
        let large = |name: &str| (name.to_owned(), Kind::F16, vec![1 << 61]);
        assert!(header(&[], &[large("a"), large("b")]).is_err());
    }

    #[test]
    fn a_file_cut_off_anywhere_is_refused() {
        let file = file(&metadata(), &tensors());
        // What is cut off at last is padding: the last tensor has two bytes.
        for length in 0..=file.len() {
            assert_eq!(read(&file[..length]).is_ok(), length >= file.len() - 30, "{length}");
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<u8>().prop_map(Value::U8),
            any::<i16>().prop_map(Value::I16),
            any::<u32>().prop_map(Value::U32),
            any::<i64>().prop_map(Value::I64),
            any::<f32>().prop_map(Value::F32),
            any::<bool>().prop_map(Value::Bool),
            any::<Vec<u8>>().prop_map(Value::String),
            any::<Vec<f64>>().prop_map(|v| Value::Array(Array::F64(v))),
            any::<Vec<u16>>().prop_map(|v| Value::Array(Array::U16(v))),
            any::<Vec<bool>>().prop_map(|v| Value::Array(Array::Bool(v))),
            prop::collection::vec(any::<Vec<u8>>(), 0..5).prop_map(|v| Value::Array(Array::String(v))),
        ]
    }

    fn shape() -> impl Strategy<Value = (Kind, Vec<usize>)> {
        (prop::sample::select(&Kind::ALL), prop::collection::vec(1..4usize, 1..5)).prop_map(|(kind, mut shape)| {
            *shape.last_mut().expect("at least one dimension") *= kind.block();
            (kind, shape)
        })
    }

    proptest! {
        #[test]
        fn anything_written_is_read_again(
            metadata in prop::collection::btree_map("[a-zé.]{0,8}", value(), 0..6),
            tensors in prop::collection::btree_map("[a-zé.]{0,8}", shape(), 0..6),
        ) {
            let values: Vec<_> = metadata.clone().into_iter().collect();
            let infos: Vec<_> = tensors.into_iter().map(|(name, (kind, shape))| (name, kind, shape)).collect();
            let places = header(&values, &infos).unwrap().places;
            let read = read(&file(&values, &infos)).unwrap();
            prop_assert_eq!(read.metadata, metadata);
            let found: Vec<Description> =
                read.tensors.iter().map(|t| (t.name.clone(), t.kind, t.shape.clone())).collect();
            prop_assert_eq!(found, infos);
            for (tensor, place) in read.tensors.iter().zip(places) {
                prop_assert_eq!(tensor.bytes.start as u64..tensor.bytes.end as u64, place);
                prop_assert_eq!(Some(tensor.bytes.len()), tensor.kind.tensor_bytes(&tensor.shape));
            }
        }

        #[test]
        fn damage_is_never_more_than_an_error(
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut file = file(&metadata(), &tensors());
            for (at, byte) in flips {
                let at = at.index(file.len());
                file[at] = byte;
            }
            for tensor in read(&file).map_or(vec![], |read| read.tensors) {
                prop_assert_eq!(file.get(tensor.bytes).map(<[u8]>::len), tensor.kind.tensor_bytes(&tensor.shape));
            }
        }
    }
}
