//! `tokenizer.json`. How to run it stands in `../readers.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../readers.rs"]
mod readers;

fuzz_target!(|file: &[u8]| {
    let _ = readers::tokenizer(file);
});
