//! Snapshots, with a checksum that is right, because no change of a file would be seen otherwise. How to run it stands in
//! `../readers.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../readers.rs"]
mod readers;

fuzz_target!(|file: &[u8]| {
    let _ = readers::snapshot(file);
    if let Some((body, _)) = file.split_last_chunk::<32>() {
        let _ = readers::snapshot(&[body, blake3::hash(body).as_bytes()].concat());
    }
});
