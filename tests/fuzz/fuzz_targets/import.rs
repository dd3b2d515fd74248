//! States that are brought to the small model in `corpus/base.safetensors`, with a checksum that is right. How to run it
//! stands in `../readers.rs`.

#![no_main]

use std::cell::RefCell;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use rewake::model::{Checkpoint, LoadOptions, Model, load};

#[allow(dead_code)]
#[path = "../readers.rs"]
mod readers;

fn base() -> Model {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/base.safetensors");
    let checkpoint = Checkpoint::open(&file).expect("the seeds are there");
    load(&checkpoint, &LoadOptions::default()).expect("a sound model")
}

thread_local! {
    static MODEL: RefCell<Model> = RefCell::new(base());
}

fuzz_target!(|file: &[u8]| {
    if let Some((body, _)) = file.split_last_chunk::<32>() {
        let file = [body, blake3::hash(body).as_bytes()].concat();
        let _ = MODEL.with_borrow_mut(|model| readers::import(model, &file));
    }
});
