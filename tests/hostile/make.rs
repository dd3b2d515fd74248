//! The containers byte by byte, as nobody's writer would write them.

use std::io::Write;

use zip::write::{SimpleFileOptions, ZipWriter};

/// One value of GGUF's metadata, from the number of its type on.
pub fn gguf_text(text: &str) -> Vec<u8> {
    [&8u32.to_le_bytes()[..], &(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

pub fn gguf_number(number: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), number.to_le_bytes()].concat()
}

/// An array of a type of values whose length is claimed.
pub fn gguf_array(kind: u32, claimed: u64, values: &[u8]) -> Vec<u8> {
    [&9u32.to_le_bytes()[..], &kind.to_le_bytes(), &claimed.to_le_bytes(), values].concat()
}

/// A tensor of GGUF: its name, dimensions in the file's order, ggml's type, and where it begins.
pub type Info<'a> = (&'a str, &'a [u64], u32, u64);

/// A GGUF file with zeros for values.
pub fn gguf(metadata: &[(&str, Vec<u8>)], tensors: &[Info], values: usize) -> Vec<u8> {
    let name = |name: &str| [&(name.len() as u64).to_le_bytes()[..], name.as_bytes()].concat();
    let counts = [tensors.len() as u64, metadata.len() as u64].map(u64::to_le_bytes).concat();
    let mut file = [&b"GGUF"[..], &3u32.to_le_bytes(), &counts].concat();
    for (key, value) in metadata {
        file.extend(name(key));
        file.extend(value);
    }
    for (called, dimensions, kind, offset) in tensors {
        file.extend(name(called));
        file.extend((dimensions.len() as u32).to_le_bytes());
        dimensions.iter().for_each(|n| file.extend(n.to_le_bytes()));
        file.extend(kind.to_le_bytes());
        file.extend(offset.to_le_bytes());
    }
    file.resize(file.len().next_multiple_of(32) + values, 0);
    file
}

/// A zip archive, whose entries are stored or deflated.
pub fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        writer.start_file(*name, stored).expect("a new entry");
        writer.write_all(bytes).expect("room for it");
    }
    writer.finish().expect("an archive").into_inner()
}

/// A checkpoint of PyTorch's that holds what this pickle makes, and one storage of these bytes.
pub fn pth(pickle: &[u8], storage: &[u8]) -> Vec<u8> {
    let pickle = [b"\x80\x02", pickle, b"."].concat();
    zip(&[("m/data.pkl", &pickle), ("m/byteorder", b"little"), ("m/data/0", storage)])
}

pub fn int(n: i64) -> Vec<u8> {
    [&[0x8a, 8][..], &n.to_le_bytes()].concat()
}

pub fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

pub fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(", &items.concat()[..], b"t"].concat()
}

pub fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let entries: Vec<_> = entries.iter().map(|(key, value)| [text(key), value.clone()].concat()).collect();
    [b"}(", &entries.concat()[..], b"u"].concat()
}

/// The call of a function with these arguments.
pub fn call(module: &str, name: &str, args: &[Vec<u8>]) -> Vec<u8> {
    [format!("c{module}\n{name}\n").into_bytes(), tuple(args), b"R".to_vec()].concat()
}

/// A tensor of f32 in the storage `0` of so many values.
pub fn tensor(numel: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let ints = |numbers: &[i64]| tuple(&numbers.iter().map(|&n| int(n)).collect::<Vec<_>>());
    let class = b"ctorch\nFloatStorage\n".to_vec();
    let storage = [tuple(&[text("storage"), class, text("0"), text("cpu"), int(numel)]), b"Q".to_vec()].concat();
    let args = [storage, int(offset), ints(shape), ints(strides), b"\x89".to_vec(), dict(&[])];
    call("torch._utils", "_rebuild_tensor_v2", &args)
}
