//! The model files of rwkv.cpp: a header, then tensors one after the other up to the end of the file.
//!
//! The format is described in `docs/FILE_FORMAT.md` of RWKV/rwkv.cpp and read by its `rwkv_file_format.inc`. Names are
//! those of the original checkpoint, but rwkv.cpp's converter stores some tensors transformed.

use std::collections::BTreeSet;

use super::Kind;
use super::container::Cursor;
use super::file::Place;

const MAGIC: u32 = 0x6767_6d66;
/// The version whose quantised blocks had other layouts than today's; its f32 and f16 are the same.
const OLD_VERSION: u32 = 100;
/// Its quantised blocks are those of ggml since May 2023, which have not changed.
const VERSION: u32 = 101;
const MAX_DIMENSIONS: u32 = 3;

/// The sizes and the tensors of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ggml {
    pub vocabulary: usize,
    pub width: usize,
    pub layers: usize,
    /// In the order of the file.
    pub tensors: Vec<Place>,
}

/// What such a file is called.
pub const FORMAT: &str = "rwkv.cpp";

/// Whether a file begins like one that [`read`] reads.
pub fn is_ggml(file: &[u8]) -> bool {
    file.starts_with(&MAGIC.to_le_bytes())
}

/// Reads all of a file but the values of its tensors.
///
/// # Errors
/// What was found where, if it is not such a file or is cut off, if a tensor is of a type that is not supported or is
/// there twice, or if the sizes in the header are not those of the tensors. Memory is bounded by a small multiple of
/// the file's size, whatever it says.
pub fn read(file: &[u8]) -> Result<Ggml, String> {
    let mut cursor = Cursor::new(file);
    let magic = cursor.u32("the magic number")?;
    if magic != MAGIC {
        return Err(format!("it begins with {magic:#010x}, not with {MAGIC:#x}"));
    }
    let version = cursor.u32("the version")?;
    if !matches!(version, OLD_VERSION | VERSION) {
        return Err(format!("rwkv.cpp's file version {version} is not supported; {OLD_VERSION} and {VERSION} are"));
    }
    let [vocabulary, width, layers] = [(); 3].map(|()| cursor.u32("a size in the header"));
    let (vocabulary, width, layers) = (vocabulary? as usize, width? as usize, layers? as usize);
    read_kind(&mut cursor, version).map_err(|e| format!("the header: {e}"))?;
    let model = Ggml { vocabulary, width, layers, tensors: read_tensors(&mut cursor, version)? };
    check_sizes(&model)?;
    Ok(model)
}

fn read_tensors(cursor: &mut Cursor, version: u32) -> Result<Vec<Place>, String> {
    let mut names = BTreeSet::new();
    let mut tensors = Vec::new();
    while cursor.left() > 0 {
        let tensor = read_tensor(cursor, version)?;
        if !names.insert(tensor.name.clone()) {
            return Err(format!("the tensor `{}` is there twice", tensor.name));
        }
        tensors.push(tensor);
    }
    Ok(tensors)
}

fn read_tensor(cursor: &mut Cursor, version: u32) -> Result<Place, String> {
    let at = cursor.position();
    let dimensions = cursor.u32("the number of a tensor's dimensions")?;
    let length = cursor.u32("the length of a tensor's name")?;
    let kind = read_kind(cursor, version).map_err(|e| format!("the tensor described at byte {at}: {e}"))?;
    if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
        return Err(format!(
            "the tensor described at byte {at} has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}"
        ));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        shape.push(cursor.u32("a dimension of a tensor")? as usize);
    }
    shape.reverse();
    let name = cursor.text(length.into(), "a tensor's name")?;
    let size = kind.tensor_bytes(&shape).filter(|&size| size > 0).ok_or_else(|| {
        let kind = kind.name();
        format!(
            "the tensor `{name}`: a shape of {shape:?} is empty, too large, or its rows are not whole blocks of {kind}"
        )
    })?;
    let start = cursor.position();
    cursor.take(size, &format!("the tensor `{name}`"))?;
    Ok(Place { name: name.to_owned(), kind, shape, strides: None, bytes: start..start + size })
}

/// rwkv.cpp has numbers of its own for ggml's types.
fn read_kind(cursor: &mut Cursor, version: u32) -> Result<Kind, String> {
    let number = cursor.u32("a type")?;
    let kind = match number {
        0 => Kind::F32,
        1 => Kind::F16,
        2 => Kind::Q4_0,
        3 => Kind::Q4_1,
        7 => Kind::Q5_0,
        8 => Kind::Q5_1,
        9 => Kind::Q8_0,
        13 => Kind::Q4K,
        14 => Kind::Q5K,
        15 => Kind::Q6K,
        other => return Err(format!("rwkv.cpp's type {other} is not supported; {} are, except bf16", Kind::names())),
    };
    if kind.quantised() && version == OLD_VERSION {
        let kind = kind.name();
        return Err(format!("{kind} in files of version {OLD_VERSION} had another layout and is not supported"));
    }
    Ok(kind)
}

/// A file that was cut off between two tensors shows it here or by a missing name.
fn check_sizes(model: &Ggml) -> Result<(), String> {
    let Some(embeddings) = model.tensors.iter().find(|tensor| tensor.name == "emb.weight") else {
        return Err("it has no tensor `emb.weight`".into());
    };
    if embeddings.shape != [model.vocabulary, model.width] {
        let (found, vocabulary, width) = (&embeddings.shape, model.vocabulary, model.width);
        return Err(format!("`emb.weight` is {found:?}, and the header says [{vocabulary}, {width}]"));
    }
    let layers = model.tensors.iter().filter(|tensor| is_norm_of_a_layer(&tensor.name)).count();
    if layers != model.layers {
        return Err(format!("it has {layers} layers, and the header says {}", model.layers));
    }
    Ok(())
}

/// Every layer has one `blocks.….ln1.weight`, by which the converter counts them.
fn is_norm_of_a_layer(name: &str) -> bool {
    name.starts_with("blocks.") && name.ends_with(".ln1.weight")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Version, vocabulary, width, layers, type.
    fn header(numbers: [u32; 5]) -> Vec<u8> {
        [&[MAGIC][..], &numbers].concat().into_iter().flat_map(u32::to_le_bytes).collect()
    }

    /// A tensor with that many bytes of values; dimensions are in the file's order, innermost first.
    fn tensor(name: &str, number: u32, dimensions: &[u32], bytes: usize) -> Vec<u8> {
        let mut out = Vec::new();
        for n in [&[dimensions.len() as u32, name.len() as u32, number], dimensions].concat() {
            out.extend(n.to_le_bytes());
        }
        out.extend(name.as_bytes());
        out.resize(out.len() + bytes, 7);
        out
    }

    fn norm() -> Vec<u8> {
        tensor("blocks.0.ln1.weight", 0, &[32], 128)
    }

    fn small() -> Vec<u8> {
        let embeddings = tensor("emb.weight", 1, &[32, 3], 192);
        let key = tensor("blocks.0.att.key.weight", 7, &[32, 2], 44);
        [header([101, 3, 32, 1, 7]), embeddings, norm(), key, tensor("blocks.0.att.time_first", 0, &[1, 2, 4], 32)]
            .concat()
    }

    fn error(file: &[u8]) -> String {
        read(file).unwrap_err()
    }

    #[test]
    fn a_file_is_read() {
        let file = small();
        let model = read(&file).unwrap();
        assert_eq!((model.vocabulary, model.width, model.layers), (3, 32, 1));
        let found: Vec<_> = model.tensors.iter().map(|t| (t.name.as_str(), t.kind, t.shape.as_slice())).collect();
        assert_eq!(
            found,
            [
                ("emb.weight", Kind::F16, &[3, 32][..]),
                ("blocks.0.ln1.weight", Kind::F32, &[32]),
                ("blocks.0.att.key.weight", Kind::Q5_0, &[2, 32]),
                ("blocks.0.att.time_first", Kind::F32, &[4, 2, 1]),
            ]
        );
        for tensor in model.tensors {
            assert_eq!(Some(tensor.bytes.len()), tensor.kind.tensor_bytes(&tensor.shape));
            assert!(file[tensor.bytes].iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn every_type_has_its_number() {
        let numbers = [(0, 128), (1, 64), (2, 18), (3, 20), (7, 22), (8, 24), (9, 34), (13, 144), (14, 176), (15, 210)];
        for (number, bytes) in numbers {
            let row = if number > 9 { 256 } else { 32 };
            let file = [small(), tensor("more", number, &[row], bytes)].concat();
            let last = read(&file).unwrap().tensors.pop().unwrap();
            assert_eq!((last.bytes.len(), last.bytes.end), (bytes, file.len()), "{number}");
        }
        for number in [4, 5, 6, 10, 11, 12, 16, 17, u32::MAX] {
            let file = [small(), tensor("more", number, &[32], 34)].concat();
            assert!(error(&file).contains(&format!("type {number} ")));
        }
    }

    #[test]
    fn old_files_may_hold_f16_only() {
        let plain = [tensor("emb.weight", 1, &[32, 3], 192), norm()].concat();
        assert!(read(&[header([100, 3, 32, 1, 1]), plain.clone()].concat()).is_ok());
        assert!(error(&[header([100, 3, 32, 1, 7]), plain.clone()].concat()).contains("another layout"));
        let quantised = tensor("blocks.0.att.key.weight", 2, &[32], 18);
        assert!(error(&[header([100, 3, 32, 1, 1]), plain.clone(), quantised].concat()).contains("another layout"));
        assert!(error(&[header([102, 3, 32, 1, 1]), plain].concat()).contains("version 102"));
        assert!(error(b"GGUF\x03\0\0\0").contains("0x46554747"));
    }

    #[test]
    fn impossible_tensors_are_refused() {
        for (dimensions, length, word) in [
            (&[][..], 0, "0 dimensions"),
            (&[1, 1, 1, 1], 4, "4 dimensions"),
            (&[0, 3], 0, "empty"),
            (&[u32::MAX; 3], 0, "too large"),
            (&[u32::MAX], 8, "are left"),
        ] {
            let file = [small(), tensor("more", 0, dimensions, length)].concat();
            assert!(error(&file).contains(word), "{dimensions:?}: {}", error(&file));
        }
        assert!(error(&[small(), tensor("more", 9, &[16, 2], 34)].concat()).contains("whole blocks of q8_0"));
        assert!(error(&[small(), norm()].concat()).contains("twice"));
        let mut long_name = tensor("more", 0, &[1], 4);
        long_name[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(error(&[small(), long_name].concat()).contains("room for"));
    }

    #[test]
    fn sizes_are_those_of_the_tensors() {
        let with = |sizes: [u32; 3]| [&header([101, sizes[0], sizes[1], sizes[2], 7]), &small()[24..]].concat();
        assert!(read(&with([3, 32, 1])).is_ok());
        assert!(error(&with([4, 32, 1])).contains("[4, 32]"));
        assert!(error(&with([3, 16, 1])).contains("[3, 16]"));
        assert!(error(&with([3, 32, 2])).contains("1 layers"));
        assert!(error(&header([101, 3, 32, 1, 7])).contains("emb.weight"));
    }

    #[test]
    fn a_file_cut_off_inside_a_tensor_is_refused() {
        let file = small();
        let ends: Vec<_> = read(&file).unwrap().tensors.iter().map(|t| t.bytes.end).collect();
        // Between tensors the file may end, once what the header tells of is there.
        for length in 0..=file.len() {
            assert_eq!(read(&file[..length]).is_ok(), ends[1..].contains(&length), "{length}");
        }
    }

    proptest! {
        #[test]
        fn damage_is_never_more_than_an_error(
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut file = small();
            for (at, byte) in flips {
                let at = at.index(file.len());
                file[at] = byte;
            }
            for tensor in read(&file).map_or(vec![], |model| model.tensors) {
                prop_assert_eq!(file.get(tensor.bytes).map(<[u8]>::len), tensor.kind.tensor_bytes(&tensor.shape));
            }
        }
    }
}
