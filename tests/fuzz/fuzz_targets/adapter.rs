//! Adapters and initial states, beside the small model in `corpus/base.safetensors`. How to run it stands in
//! `../readers.rs`.

#![no_main]

use std::io::Write;
use std::path::Path;

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../readers.rs"]
mod readers;

fuzz_target!(|bytes: &[u8]| {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/base.safetensors");
    for ending in [".safetensors", ".st"] {
        let mut file = tempfile::Builder::new().suffix(ending).tempfile().expect("a file");
        file.write_all(bytes).expect("room for it");
        let _ = readers::beside(&base, file.path());
    }
});
