//! Vocabulary files, and the same bytes as the tokens of a GGUF file. How to run it stands in `../readers.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../readers.rs"]
mod readers;

fuzz_target!(|file: &[u8]| {
    let _ = readers::vocabulary(file);
    let lines: Vec<_> = file.split(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect();
    let _ = readers::from_literals(&lines);
});
