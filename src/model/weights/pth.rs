//! PyTorch checkpoints: where in the file each tensor lies. Nothing in a file is executed.
//!
//! Both formats of `torch.save` (`torch/serialization.py`) are read:
//!
//! ```text
//! zip, since 1.6: <prefix>/data.pkl      the object; a storage in it is ("storage", class, key, location, numel)
//!                 <prefix>/data/<key>    a storage's elements, uncompressed
//!                 <prefix>/byteorder     "little"
//! legacy:         pickles of a magic number, 1001, system information, the object and a list of keys; then for each
//!                 key an i64 numel and the storage's elements
//! ```
//!
//! The object may be a state dict, a dict around one, or a whole module.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;

use zip::CompressionMethod;
use zip::read::{ArchiveOffset, Config, ZipArchive};

use super::file::Place;
use super::pickle::{self, Id, Pickle, Value, shown};
use super::{Kind, state_dict};

const ZIP: &[u8] = b"PK\x03\x04";
/// The opcode of the legacy format's magic number, `0x1950a86a20f9469cfc6c`.
const LEGACY: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
/// Bytes before it: the protocol and perhaps a frame.
const LEGACY_AT: usize = 11;
const LEGACY_VERSION: i64 = 1001;
const TAR: Range<usize> = 257..262;

const MOST_DIMENSIONS: usize = 8;
/// Bytes of a storage's key.
const LONGEST_KEY: usize = 64;
/// Bytes of all tensors for a byte of the file: views may share a storage.
const MOST_SHARED: usize = 4;

/// Where the bytes of each storage lie in the file, by key.
type Places = HashMap<String, Range<usize>>;

/// Whether a file begins like something that only [`read`] reads, or explains why not.
pub fn is_pth(file: &[u8]) -> bool {
    file.starts_with(ZIP) || is_legacy(file) || is_tar(file)
}

fn is_legacy(file: &[u8]) -> bool {
    file.first() == Some(&0x80)
        && file[..file.len().min(LEGACY_AT + LEGACY.len())].windows(LEGACY.len()).any(|w| w == LEGACY)
}

fn is_tar(file: &[u8]) -> bool {
    file.get(TAR) == Some(b"ustar")
}

/// Finds the tensors of a checkpoint, in the order of its state dict.
///
/// The elements of every tensor lie in the file, and all shapes together claim at most [`MOST_SHARED`] times its size.
///
/// # Errors
/// What is wrong with the file, to be read after "it is not a checkpoint this server can read: ".
pub fn read(file: &[u8]) -> Result<Vec<Place>, String> {
    let (pickle, places) = if file.starts_with(ZIP) {
        open_zip(file)?
    } else if is_legacy(file) {
        open_legacy(file)?
    } else if is_tar(file) {
        return Err("it is a tar archive as PyTorch wrote before 0.1.10; save it anew with a current PyTorch".into());
    } else {
        return Err("it is neither a zip archive nor a pickle as PyTorch writes them".into());
    };
    let mut found = vec![];
    for (name, fields) in state_dict::tensors(&pickle)? {
        let tensor = format!("tensor `{}`", shown(&name));
        found.extend(place(&pickle, &places, name, fields).map_err(|e| format!("{tensor} {e}"))?);
    }
    if found.is_empty() {
        return Err("it holds no tensors".into());
    }
    // Does not overflow: `elements` has checked the shape.
    let size = |place: &Place| place.shape.iter().product::<usize>() * place.kind.block_bytes();
    let claimed = found.iter().map(size).fold(0, usize::saturating_add);
    if claimed > file.len().saturating_mul(MOST_SHARED) {
        return Err(format!("its tensors claim {claimed} bytes of a file of {}", file.len()));
    }
    Ok(found)
}

fn open_zip(file: &[u8]) -> Result<(Pickle<'_>, Places), String> {
    let broken = |e: zip::result::ZipError| format!("its zip directory is damaged: {e}");
    let config = Config { archive_offset: ArchiveOffset::Known(0) };
    let mut archive = ZipArchive::with_config(config, Cursor::new(file)).map_err(broken)?;
    if archive.has_duplicate_names() || archive.has_overlapping_entries().map_err(broken)? {
        return Err("entries of its zip archive have the same name or overlap".into());
    }
    if archive.file_names_raw().any(|name| name.ends_with(b"/constants.pkl")) {
        return Err("it is a TorchScript program; save the model's state dict instead".into());
    }
    let mut entries = HashMap::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(broken)?;
        let name = entry.name().map_err(broken)?.into_owned();
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(format!("its entry `{}` is compressed or encrypted, as PyTorch never writes", shown(&name)));
        }
        let place = entry
            .data_start()
            .and_then(|start| {
                Some(usize::try_from(start).ok()?..usize::try_from(start.checked_add(entry.size())?).ok()?)
            })
            .filter(|place| place.end <= file.len() && entry.size() == entry.compressed_size())
            .ok_or_else(|| format!("its entry `{}` reaches past its end", shown(&name)))?;
        if entries.insert(name, place).is_some() {
            return Err("entries of its zip archive have the same name".into());
        }
    }
    let mut prefixes = entries.keys().filter_map(|name| name.strip_suffix("/data.pkl")).filter(|p| !p.contains('/'));
    let (Some(prefix), None) = (prefixes.next(), prefixes.next()) else {
        return Err("its zip archive does not hold one `data.pkl` as PyTorch writes it".into());
    };
    if let Some(order) = entries.get(&format!("{prefix}/byteorder"))
        && file[order.clone()] != *b"little"
    {
        return Err("its byte order is not little endian".into());
    }
    let pickle = pickle::read(&file[entries[&format!("{prefix}/data.pkl")].clone()])?;
    let data = format!("{prefix}/data/");
    let places = entries.iter().filter_map(|(name, place)| Some((name.strip_prefix(&data)?.to_owned(), place.clone())));
    Ok((pickle, places.collect()))
}

fn open_legacy(file: &[u8]) -> Result<(Pickle<'_>, Places), String> {
    let mut at = 0;
    let mut next = || {
        let pickle = pickle::read(&file[at..])?;
        at += pickle.length;
        Ok::<_, String>(pickle)
    };
    let (_magic, version, system, object, keys) = (next()?, next()?, next()?, next()?, next()?);
    if *version.get(version.root) != Value::Int(LEGACY_VERSION) {
        return Err(format!("it has a version of the legacy format other than {LEGACY_VERSION}"));
    }
    let Value::Dict(system_entries) = system.get(system.root) else {
        return Err("its system information is no dict".into());
    };
    let is_order = |&&(key, _): &&(Id, Id)| *system.get(key) == Value::Str("little_endian");
    if system_entries.iter().find(is_order).is_none_or(|&(_, value)| *system.get(value) != Value::Bool(true)) {
        return Err("its byte order is not little endian".into());
    }
    let Value::List(keys_in_order) = keys.get(keys.root) else { return Err("its storage keys are no list".into()) };
    let mut widths = HashMap::new();
    for value in object.values() {
        if let Some(storage) = Storage::read(&object, value) {
            widths.insert(storage.key, storage.element.width);
        }
    }
    let mut places = Places::new();
    for &key in keys_in_order {
        let Value::Str(key) = *keys.get(key) else { return Err("one of its storage keys is no string".into()) };
        let place = widths.get(key).and_then(|&width| {
            let (numel, _) = file.get(at..)?.split_first_chunk()?;
            let numel = usize::try_from(i64::from_le_bytes(*numel)).ok()?;
            let start = at + size_of::<i64>();
            Some(start..start.checked_add(numel.checked_mul(width)?).filter(|&end| end <= file.len())?)
        });
        let place = place.ok_or_else(|| format!("storage `{}` is of no tensor or reaches past its end", shown(key)))?;
        at = place.end;
        if places.insert(key.to_owned(), place).is_some() {
            return Err(format!("it has two storages `{}`", shown(key)));
        }
    }
    Ok((object, places))
}

/// What a storage's elements are.
struct Element {
    /// The name of its class in `torch`.
    class: &'static str,
    name: &'static str,
    width: usize,
    kind: Option<Kind>,
}

const ELEMENTS: [Element; 12] = [
    Element { class: "FloatStorage", name: "f32", width: 4, kind: Some(Kind::F32) },
    Element { class: "HalfStorage", name: "f16", width: 2, kind: Some(Kind::F16) },
    Element { class: "BFloat16Storage", name: "bf16", width: 2, kind: Some(Kind::BF16) },
    Element { class: "DoubleStorage", name: "f64", width: 8, kind: None },
    Element { class: "LongStorage", name: "i64", width: 8, kind: None },
    Element { class: "IntStorage", name: "i32", width: 4, kind: None },
    Element { class: "ShortStorage", name: "i16", width: 2, kind: None },
    Element { class: "CharStorage", name: "i8", width: 1, kind: None },
    Element { class: "ByteStorage", name: "u8", width: 1, kind: None },
    Element { class: "BoolStorage", name: "bool", width: 1, kind: None },
    Element { class: "ComplexFloatStorage", name: "complex64", width: 8, kind: None },
    Element { class: "ComplexDoubleStorage", name: "complex128", width: 16, kind: None },
];

/// A storage as a pickle names it.
struct Storage<'a> {
    element: &'static Element,
    key: &'a str,
    /// Elements of the whole storage.
    numel: usize,
    /// The elements of it that tensors may be in: legacy files may name a part.
    part: Range<usize>,
}

impl<'a> Storage<'a> {
    fn read(pickle: &Pickle<'a>, value: &Value<'a>) -> Option<Self> {
        let Value::Persistent(id) = value else { return None };
        let Value::Tuple(fields) = pickle.get(*id) else { return None };
        let &[tag, class, key, _location, numel, ref view @ ..] = fields.as_slice() else { return None };
        let &Value::Global { module: "torch", name } = pickle.get(class) else { return None };
        let &Value::Str(key) = pickle.get(key) else { return None };
        if *pickle.get(tag) != Value::Str("storage") || key.len() > LONGEST_KEY {
            return None;
        }
        let numel = size(pickle, numel)?;
        let part = match view.first().map(|&view| pickle.get(view)) {
            None | Some(Value::None) => 0..numel,
            Some(Value::Tuple(view)) => {
                let &[_, start, length] = view.as_slice() else { return None };
                let start = size(pickle, start)?;
                start..start.checked_add(size(pickle, length)?).filter(|&end| end <= numel)?
            }
            Some(_) => return None,
        };
        Some(Self { element: ELEMENTS.iter().find(|e| e.class == name)?, key, numel, part })
    }
}

fn size(pickle: &Pickle, id: Id) -> Option<usize> {
    if let &Value::Int(n) = pickle.get(id) { usize::try_from(n).ok() } else { None }
}

/// A tuple of sizes, or a `torch.Size` made of one.
fn sizes(pickle: &Pickle, mut id: Id) -> Option<Vec<usize>> {
    if let &Value::Object { class, args, .. } = pickle.get(id)
        && *pickle.get(class) == (Value::Global { module: "torch", name: "Size" })
        && let Value::Tuple(args) = pickle.get(args)
    {
        id = *args.first()?;
    }
    let Value::Tuple(ids) = pickle.get(id) else { return None };
    if ids.len() > MOST_DIMENSIONS {
        return None;
    }
    ids.iter().map(|&id| size(pickle, id)).collect()
}

/// Where a tensor lies; `None` for a single integer: batch normalisation counts in such, and no parameter is one.
fn place(pickle: &Pickle, places: &Places, name: String, fields: &[Id]) -> Result<Option<Place>, String> {
    let parts = match *fields {
        [storage, offset, shape, strides, ..] => Storage::read(pickle, pickle.get(storage))
            .zip(size(pickle, offset))
            .zip(sizes(pickle, shape).zip(sizes(pickle, strides)).filter(|(a, b)| a.len() == b.len())),
        _ => None,
    };
    let ((storage, offset), (shape, strides)) =
        parts.ok_or("is not described as PyTorch does for a dense tensor of a known type")?;
    let Element { name: found, width, kind, .. } = storage.element;
    let Some(kind) = *kind else {
        if shape.is_empty() && found.starts_with(['i', 'u']) {
            return Ok(None);
        }
        return Err(format!("has type {found}; f32, f16 and bf16 are supported"));
    };
    let place = places
        .get(storage.key)
        .ok_or_else(|| format!("needs storage `{}`, which the file lacks", shown(storage.key)))?;
    if place.len() / width < storage.numel {
        return Err(format!("needs a storage of {} elements; its bytes are {}", storage.numel, place.len()));
    }
    let elements = elements(&shape, &strides, offset, storage.part).ok_or_else(|| {
        format!("of shape {shape:?}, strides {strides:?} and offset {offset} reaches past its storage")
    })?;
    // The elements are among `numel`, and `place` has the bytes of so many: nothing here overflows.
    let bytes = place.start + elements.start * width..place.start + elements.end * width;
    Ok(Some(Place { name, kind, strides: (!contiguous(&shape, &strides)).then_some(strides), shape, bytes }))
}

/// Whether elements follow each other row by row; the stride of a dimension of 1 says nothing.
fn contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut step = 1;
    shape.iter().zip(strides).rev().all(|(&d, &stride)| {
        let fits = d == 1 || stride == step;
        step *= d.max(1);
        fits
    })
}

/// The elements of a storage from a tensor's first to its last one, if all of them are in `part` of it and the shape
/// claims no more elements than there are.
fn elements(shape: &[usize], strides: &[usize], offset: usize, part: Range<usize>) -> Option<Range<usize>> {
    let start = part.start.checked_add(offset).filter(|&start| start <= part.end)?;
    // Of an empty tensor too, so that whoever computes with the shape need not fear an overflow.
    shape.iter().try_fold(size_of::<f32>(), |n, &d| n.checked_mul(d.max(1)))?;
    let count = shape.iter().product::<usize>();
    if count == 0 {
        return Some(start..start);
    }
    let reach = shape.iter().zip(strides).try_fold(0usize, |n, (&d, &s)| n.checked_add((d - 1).checked_mul(s)?))?;
    let end = start.checked_add(reach)?.checked_add(1)?;
    (count <= part.len() && end <= part.end).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use zip::write::{SimpleFileOptions, ZipWriter};

    use super::super::pickle::write::*;
    use super::*;

    fn storage(class: &str, key: &str, numel: i64) -> Vec<u8> {
        persistent(tuple(&[text("storage"), global("torch", class), text(key), text("cpu"), int(numel)]))
    }

    fn part(key: &str, numel: i64, start: i64, length: i64) -> Vec<u8> {
        let view = tuple(&[text("view"), int(start), int(length)]);
        let class = global("torch", "FloatStorage");
        persistent(tuple(&[text("storage"), class, text(key), text("cpu"), int(numel), view]))
    }

    fn integers(numbers: &[i64]) -> Vec<u8> {
        tuple(&numbers.iter().map(|&n| int(n)).collect::<Vec<_>>())
    }

    fn tensor(storage: Vec<u8>, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
        let args = [storage, int(offset), integers(shape), integers(strides), b"\x89".to_vec(), dict(&[])];
        call(global("torch._utils", "_rebuild_tensor_v2"), &args)
    }

    /// The storages 0 of four f32, 1 of two bf16 and 2 of one i64.
    const DATA: [(&str, &[u8]); 3] = [("0", b"0000111122223333"), ("1", b"aabb"), ("2", b"integers")];

    fn zipped(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut writer = ZipWriter::new(Cursor::new(vec![]));
        for (name, bytes) in entries {
            writer
                .start_file(*name, SimpleFileOptions::default().compression_method(CompressionMethod::Stored))
                .unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    fn zip_of(object: Vec<u8>) -> Vec<u8> {
        let [a, b, c] = DATA.map(|(_, bytes)| bytes);
        let object = pickle(object);
        let inside = [("m/data.pkl", &object[..]), ("m/byteorder", b"little"), ("m/data/0", a), ("m/data/1", b)];
        zipped(&[&inside[..], &[("m/data/2", c), ("m/version", b"3\n")]].concat())
    }

    fn legacy_of(object: Vec<u8>) -> Vec<u8> {
        legacy(object, b"\x88", &[("0", 4), ("1", 2), ("2", 1)])
    }

    fn legacy(object: Vec<u8>, little: &[u8], numels: &[(&str, i64)]) -> Vec<u8> {
        let system = dict(&[("protocol_version", int(1001)), ("little_endian", little.to_vec())]);
        let keys = list(&numels.iter().map(|(key, _)| text(key)).collect::<Vec<_>>());
        let mut file = [&b"\x80\x02"[..], LEGACY].concat();
        for part in [int(LEGACY_VERSION), system, object, keys] {
            file.extend(pickle(part));
        }
        for (&(_, numel), (_, bytes)) in numels.iter().zip(DATA) {
            file.extend(numel.to_le_bytes());
            file.extend(bytes);
        }
        file
    }

    fn matrix() -> Vec<u8> {
        tensor(storage("FloatStorage", "0", 4), 0, &[2, 2], &[2, 1])
    }

    /// All storages, one of them shared and one only counted in.
    fn sample() -> Vec<u8> {
        dict(&[
            ("whole", matrix()),
            ("turned", tensor(storage("FloatStorage", "0", 4), 1, &[1, 2], &[1, 2])),
            ("short", tensor(storage("BFloat16Storage", "1", 2), 1, &[], &[])),
            ("empty", tensor(storage("BFloat16Storage", "1", 2), 2, &[0, 3], &[3, 1])),
            ("count", tensor(storage("LongStorage", "2", 1), 0, &[], &[])),
        ])
    }

    fn error(file: &[u8]) -> String {
        read(file).unwrap_err()
    }

    /// Name, type, shape, strides and bytes of a tensor.
    type Seen<'a> = (&'a str, Kind, &'a [usize], Option<&'a [usize]>, &'a [u8]);

    #[test]
    fn both_formats_give_the_places_of_tensors() {
        for file in [zip_of(sample()), legacy_of(sample())] {
            assert!(is_pth(&file));
            let found = read(&file).unwrap();
            let seen: Vec<_> = found
                .iter()
                .map(|t| (t.name.as_str(), t.kind, &t.shape[..], t.strides.as_deref(), &file[t.bytes.clone()]))
                .collect();
            let expected: [Seen; 4] = [
                ("whole", Kind::F32, &[2, 2], None, b"0000111122223333"),
                ("turned", Kind::F32, &[1, 2], Some(&[1, 2]), b"111122223333"),
                ("short", Kind::BF16, &[], None, b"bb"),
                ("empty", Kind::BF16, &[0, 3], None, b""),
            ];
            assert_eq!(seen, expected);
        }
    }

    #[test]
    fn a_legacy_storage_may_be_a_part_of_another() {
        let file = legacy(dict(&[("a", tensor(part("0", 4, 1, 2), 1, &[1], &[1]))]), b"\x88", &[("0", 4)]);
        assert_eq!(&file[read(&file).unwrap()[0].bytes.clone()], b"2222");
        let past = legacy(dict(&[("a", tensor(part("0", 4, 1, 2), 1, &[2], &[1]))]), b"\x88", &[("0", 4)]);
        assert!(error(&past).contains("reaches past its storage"));
        for (start, length) in [(3, 2), (-1, 2), (i64::MAX, i64::MAX)] {
            let file = legacy(dict(&[("a", tensor(part("0", 4, start, length), 0, &[1], &[1]))]), b"\x88", &[("0", 4)]);
            assert!(read(&file).is_err(), "{start} {length}");
        }
    }

    #[test]
    fn shapes_must_fit_their_storage() {
        let max = i64::MAX;
        let cases: &[(i64, &[i64], &[i64], bool)] = &[
            (0, &[4], &[1], true),
            (3, &[], &[], true),
            (3, &[1], &[max], true),
            (0, &[2, 2], &[1, 2], true),
            (0, &[2, 2], &[0, 1], true),
            (4, &[0], &[1], true),
            (5, &[0], &[1], false),
            (4, &[], &[], false),
            (1, &[4], &[1], false),
            (0, &[5], &[0], false),
            (0, &[3, 2], &[0, 1], false),
            (0, &[2], &[4], false),
            (0, &[2], &[max], false),
            (max, &[2], &[max], false),
            (max, &[1], &[1], false),
            (0, &[max, max], &[0, 0], false),
            (0, &[max, max, 0], &[0, 0, 0], false),
            (0, &[2, 2], &[1], false),
            (0, &[-1], &[1], false),
            (0, &[4], &[-1], false),
            (-1, &[1], &[1], false),
            (0, &[1; MOST_DIMENSIONS], &[1; MOST_DIMENSIONS], true),
            (0, &[1; MOST_DIMENSIONS + 1], &[1; MOST_DIMENSIONS + 1], false),
        ];
        for &(offset, shape, strides, fits) in cases {
            let tensor = tensor(storage("FloatStorage", "0", 4), offset, shape, strides);
            let read = read(&zip_of(dict(&[("a", tensor)])));
            assert_eq!(read.is_ok(), fits, "{offset} {shape:?} {strides:?}: {read:?}");
            assert!(read.is_ok() || read.unwrap_err().starts_with("tensor `a` "));
        }
    }

    #[test]
    fn storages_must_be_what_they_are_said_to_be() {
        for (class, key, numel, message) in [
            ("FloatStorage", "0", 5, "a storage of 5 elements; its bytes are 16"),
            ("FloatStorage", "0", i64::MAX, "its bytes are 16"),
            ("FloatStorage", "0", -1, "not described"),
            ("FloatStorage", "7", 4, "needs storage `7`, which the file lacks"),
            ("FloatStorage", "../0", 4, "which the file lacks"),
            ("DoubleStorage", "0", 2, "has type f64; f32, f16 and bf16 are supported"),
            ("LongStorage", "2", 1, "has type i64"),
            ("UntypedStorage", "0", 16, "not described"),
        ] {
            let found = error(&zip_of(dict(&[("a.b", tensor(storage(class, key, numel), 0, &[1], &[1]))])));
            assert!(found.starts_with("tensor `a.b` ") && found.contains(message), "{found}");
        }
        let count = tensor(storage("LongStorage", "2", 1), 0, &[], &[]);
        assert_eq!(error(&zip_of(dict(&[("count", count)]))), "it holds no tensors");
    }

    #[test]
    fn sharing_is_bounded() {
        let names: Vec<_> = (0..2000).map(|i| i.to_string()).collect();
        let first = [matrix(), b"q\0".to_vec()].concat();
        let shared = |i| if i == 0 { first.clone() } else { b"h\0".to_vec() };
        let entries: Vec<_> = names.iter().enumerate().map(|(i, name)| (name.as_str(), shared(i))).collect();
        assert_eq!(read(&zip_of(dict(&entries[..100]))).unwrap().len(), 100);
        let big = vec![0; 1 << 16];
        let first = tensor(storage("FloatStorage", "0", 1 << 14), 0, &[1 << 14], &[1]);
        let shared = |i| if i == 0 { [&first[..], b"q\0"].concat() } else { b"h\0".to_vec() };
        let entries: Vec<_> = names.iter().enumerate().map(|(i, name)| (name.as_str(), shared(i))).collect();
        let object = pickle(dict(&entries));
        let file = zipped(&[("m/data.pkl", &object), ("m/data/0", &big)]);
        assert!(error(&file).contains("its tensors claim 131072000 bytes"), "{}", error(&file));
    }

    #[test]
    fn nothing_in_a_file_is_called() {
        for object in [call(global("os", "system"), &[text("false")]), call(global("builtins", "eval"), &[text("1")])] {
            for file in [zip_of(object.clone()), legacy(object.clone(), b"\x88", &[])] {
                assert!(error(&file).starts_with("it holds an object of `"), "{}", error(&file));
            }
        }
    }

    #[test]
    fn other_files_are_told_apart() {
        let mut safetensors = b"\x80\x02\0\0\0\0\0\0{}".to_vec();
        safetensors.resize(1024, b' ');
        let mut tar = vec![0; 1024];
        tar[TAR].copy_from_slice(b"ustar");
        assert!(!is_pth(b"") && !is_pth(b"\x80") && !is_pth(&safetensors));
        assert!(is_pth(&tar));
        assert!(error(&tar).contains("tar archive"));
        assert!(error(b"").contains("neither"));
        assert!(error(ZIP).contains("zip directory is damaged"));
    }

    #[test]
    fn archives_that_pytorch_does_not_write_are_refused() {
        let object = pickle(sample());
        for (entries, message) in [
            (&[("m/data/0", &b"x"[..])][..], "one `data.pkl`"),
            (&[("data.pkl", &object)], "one `data.pkl`"),
            (&[("a/data.pkl", &object), ("b/data.pkl", &object)], "one `data.pkl`"),
            (&[("m/data.pkl", &object), ("m/byteorder", b"big")], "byte order"),
            (&[("m/data.pkl", &object), ("m/constants.pkl", b"")], "TorchScript"),
            (&[("m/data.pkl", b"")], "ends early"),
        ] {
            let found = error(&zipped(entries));
            assert!(found.contains(message), "{found}");
        }
    }

    /// Overwrites bytes of the `index`th record with this signature, `at` bytes from its start.
    fn patch(file: &mut [u8], signature: &[u8], index: usize, at: usize, bytes: &[u8]) {
        let mut records = (0..file.len()).filter(|&i| file[i..].starts_with(signature));
        let start = records.nth(index).expect("as many records") + at;
        file[start..start + bytes.len()].copy_from_slice(bytes);
    }

    #[test]
    fn lying_directories_are_refused() {
        const ENTRY: &[u8] = b"PK\x01\x02";
        let good = zip_of(sample());
        for (index, at, bytes, message) in [
            (2, 10, &8u16.to_le_bytes()[..], "`m/data/0` is compressed"),
            (0, 10, &8u16.to_le_bytes(), "`m/data.pkl` is compressed"),
            (2, 8, &1u16.to_le_bytes(), "encrypted"),
            (2, 24, &17u32.to_le_bytes(), "reaches past its end"),
            (2, 20, &0x7fff_ffffu32.to_le_bytes(), "overlap"),
            (3, 42, &0u32.to_le_bytes(), "overlap"),
            (3, 42, &7u32.to_le_bytes(), "damaged"),
            (3, 46, b"m/data/0", "same name"),
        ] {
            let mut file = good.clone();
            patch(&mut file, ENTRY, index, at, bytes);
            assert!(error(&file).contains(message), "{}", error(&file));
        }
    }

    #[test]
    fn lying_legacy_files_are_refused() {
        let object = || dict(&[("a", matrix())]);
        assert!(read(&legacy(object(), b"\x88", &[("0", 4)])).is_ok());
        assert!(error(&legacy(object(), b"\x89", &[("0", 4)])).contains("byte order"));
        for numel in [5, -1, i64::MAX, i64::MAX / 4 + 1] {
            assert!(error(&legacy(object(), b"\x88", &[("0", numel)])).contains("storage `0`"), "{numel}");
        }
        assert!(error(&legacy(object(), b"\x88", &[("0", 3)])).contains("needs a storage of 4 elements"));
        assert!(error(&legacy(object(), b"\x88", &[])).contains("lacks"));
        assert!(error(&legacy(object(), b"\x88", &[("1", 4)])).contains("storage `1` is of no tensor"));
        assert!(error(&legacy(object(), b"\x88", &[("0", 4), ("0", 1)])).contains("two storages"));
    }

    #[test]
    fn no_truncated_file_is_read() {
        for file in [zip_of(sample()), legacy_of(sample())] {
            for length in 0..file.len() {
                assert!(read(&file[..length]).is_err(), "{length}");
            }
        }
    }

    proptest! {
        #[test]
        fn damaged_files_give_no_place_outside(
            is_zip: bool, flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
        ) {
            let mut file = if is_zip { zip_of(sample()) } else { legacy_of(sample()) };
            for (at, byte) in flips {
                *at.get_mut(&mut file) = byte;
            }
            for tensor in read(&file).unwrap_or_default() {
                prop_assert!(tensor.bytes.start <= tensor.bytes.end && tensor.bytes.end <= file.len());
            }
        }

        /// Every element is inside, and the first and the last one are those at the ends.
        #[test]
        fn elements_are_exactly_those_reached(
            dimensions in prop::collection::vec((0usize..4, 0usize..6), 0..4), offset in 0usize..8, length in 0usize..40
        ) {
            let (shape, strides): (Vec<_>, Vec<_>) = dimensions.into_iter().unzip();
            let mut reached = vec![offset];
            for (&size, &stride) in shape.iter().zip(&strides) {
                reached = reached.iter().flat_map(|&at| (0..size).map(move |i| at + i * stride)).collect();
            }
            let expected = match (reached.iter().min(), reached.iter().max()) {
                (Some(&first), Some(&last)) if last < length && reached.len() <= length => Some(first..last + 1),
                (None, _) if offset <= length => Some(offset..offset),
                _ => None,
            };
            prop_assert_eq!(elements(&shape, &strides, offset, 0..length), expected);
        }
    }
}
