//! Files that are of no format there is a reader for.

use std::path::Path;

/// Bytes of a file's beginning that are shown.
const SHOWN: usize = 8;

/// What a file of each kind of name should be, and how such a file begins.
const KINDS: [(&[&str], &str, &str); 4] = [
    (&["gguf"], "GGUF file", "`GGUF`"),
    (&["pth", "pt"], "PyTorch file", r"`PK\x03\x04`, as a zip archive does, or a pickle's `\x80`"),
    (&["safetensors", "st", "state"], "safetensors file", "8 bytes that say how long its header is, and `{`"),
    (&["bin"], "rwkv.cpp or PyTorch file", r"`fmgg` or `PK\x03\x04`"),
];

/// What is wrong with a file that no other reader takes, unless it begins as a safetensors file does. What it should be is
/// only told by its name.
pub fn explain(path: &Path, file: &[u8]) -> Option<String> {
    if file.get(8) == Some(&b'{') {
        return None;
    }
    if file.is_empty() {
        return Some("it is empty".into());
    }
    let begins = file[..file.len().min(SHOWN)].escape_ascii();
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    let kind = KINDS.iter().find(|(names, ..)| extension.as_deref().is_some_and(|own| names.contains(&own)));
    Some(match kind {
        Some((_, kind, expected)) => format!("it is not a {kind}: it begins with `{begins}`, expected {expected}"),
        None => {
            let all: Vec<String> = KINDS.iter().map(|(_, kind, expected)| format!("{expected} ({kind})")).collect();
            format!("it is of no known format: it begins with `{begins}`, expected {}", all.join(", or "))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn junk_is_told_by_what_it_should_be() {
        let says = |name: &str, file: &[u8]| explain(Path::new(name), file).unwrap_or_default();
        for (name, kind, expected) in [
            ("model.gguf", "not a GGUF file", "`GGUF`"),
            ("model.PTH", "not a PyTorch file", "`PK"),
            ("model.st", "not a safetensors file", "`{`"),
            ("pytorch_model.bin", "rwkv.cpp", "`fmgg`"),
            ("model", "no known format", "`GGUF`"),
        ] {
            let said = says(name, b"<html>\n<body>");
            assert!(said.contains(kind) && said.contains(expected) && said.contains(r"`<html>\n<`"), "{said}");
        }
        assert_eq!(says("model.gguf", b""), "it is empty");
        assert!(says("model.gguf", &[0xff; 3]).contains(r"`\xff\xff\xff`"));
        assert_eq!(explain(Path::new("model.gguf"), b"\x09\0\0\0\0\0\0\0{}"), None);
    }
}
