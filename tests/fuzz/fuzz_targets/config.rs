//! Configuration files. How to run it stands in `../readers.rs`.

#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../readers.rs"]
mod readers;

fuzz_target!(|bytes: &[u8]| {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().expect("a file");
    file.write_all(bytes).expect("room for it");
    let _ = readers::config(file.path());
});
