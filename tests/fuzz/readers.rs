//! Everything this program does with the bytes of a file that somebody hands it. The fuzz targets beside this file and
//! the test `tests/hostile.rs` go through it alike.
//!
//! ```text
//! cargo install cargo-fuzz
//! cargo test --test hostile -- --ignored seeds            # writes a corpus of small sound files for each target
//! RUSTC_BOOTSTRAP=1 cargo fuzz run --fuzz-dir tests/fuzz checkpoint -- -rss_limit_mb=2048 -timeout=10 -max_len=65536
//! ```
//!
//! `RUSTC_BOOTSTRAP=1` is for a stable toolchain; a nightly one does without. `--sanitizer none` builds faster and finds
//! panics, hangs and wasted memory, but not what unsafe code does wrong. The targets are the files of `fuzz_targets`.
//!
//! Each function gives what was wrong with the file. None may panic, hang, or take memory out of proportion to the file.

use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use rewake::config::{Config, Flags};
use rewake::model::{Checkpoint, Conversion, Description, Format, Kind, LoadOptions, Lora, Model, load};
use rewake::state;
use rewake::text::{self, Tokenizer};
use rewake::types::{Row, SeqId, SlotId, Want};

/// A checkpoint of any container: all its tensors, the model they make, and every format it can be written in.
pub fn checkpoint(file: &[u8]) -> Result<(), String> {
    // One of web-rwkv's formats is told by the ending of its name.
    let plain = checkpoint_called("hostile.bin", file);
    checkpoint_called("hostile.st", file).and(plain)
}

fn checkpoint_called(name: &str, file: &[u8]) -> Result<(), String> {
    let checkpoint = Checkpoint::in_memory(name, file.to_vec()).map_err(|e| e.to_string())?;
    checkpoint.parameters();
    checkpoint.vocabulary_size();
    let vocabulary = checkpoint
        .vocabulary()
        .map_err(|e| e.to_string())
        .and_then(|literals| literals.map(|literals| from_literals(&literals).map(|()| literals)).transpose());
    for (format, kind) in [
        (Format::Safetensors, None),
        (Format::Pth, Some(Kind::F16)),
        (Format::Gguf, None),
        (Format::Gguf, Some(Kind::Q8_0)),
    ] {
        let vocabulary = vocabulary.clone().ok().flatten();
        let name = "hostile".into();
        let conversion = Conversion { checkpoint: &checkpoint, format, kind, vocabulary, name, progress: &|_, _| {} };
        // What cannot be converted may be a model all the same.
        let _ = conversion.write(&mut Nowhere::default());
    }
    let mut model = load(&checkpoint, &LoadOptions::default()).map_err(|e| e.to_string())?;
    step(&mut model)?;
    vocabulary.map(|_| ())
}

/// Reads a few tokens, in two steps.
fn step(model: &mut Model) -> Result<(), String> {
    let mut pool = model.pool(1).map_err(|e| e.to_string())?;
    let slot = SlotId(0);
    pool.reset(slot);
    let vocabulary = model.description().vocabulary as u32;
    let mut logits = Vec::new();
    for (at, ids) in [(0, &[0, 1 % vocabulary, vocabulary - 1][..]), (3, &[vocabulary / 2])] {
        let row = Row { seq: SeqId(0), from: slot, into: slot, at, tokens: 0..ids.len(), want: Want::All };
        model.step(&mut pool, ids, &[row], &mut logits).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// A file that goes with the sound model `base`: an adapter to be merged, or an initial state.
pub fn beside(base: &Path, file: &Path) -> Result<(), String> {
    let open = |path| Checkpoint::open(path).map_err(|e| e.to_string());
    let adapted = Lora::open(file, Some(8.0)).and_then(|lora| {
        let checkpoint = Checkpoint::open(base)?.with_lora(lora)?;
        load(&checkpoint, &LoadOptions::default())
    });
    let model = load(&open(base)?, &LoadOptions::default()).map_err(|e| e.to_string())?;
    let state = Checkpoint::open(file).and_then(|file| model.initial_state(&file));
    match (adapted, state) {
        (Ok(mut model), _) => step(&mut model),
        (_, Ok(_)) => Ok(()),
        (Err(adapter), Err(state)) => Err(format!("{adapter}; {state}")),
    }
}

/// Text of several scripts, long enough for a pattern to go astray in it.
const TEXT: &str =
    "The quick brown fox, 12345 times…\r\n\n   Ünïcode 你好 <|endoftext|>\t\0 aaaaaaaaaaaaaaaaaaaaaaaaaaaa!";

/// A `tokenizer.json`.
pub fn tokenizer(file: &[u8]) -> Result<(), String> {
    used(text::from_json(file).map_err(|e| e.to_string())?);
    Ok(())
}

/// An `rwkv_vocab_*.txt`.
pub fn vocabulary(file: &[u8]) -> Result<(), String> {
    used(text::from_vocabulary(file).map_err(|e| e.to_string())?);
    Ok(())
}

/// The vocabulary of a GGUF file.
pub fn from_literals(literals: &[Vec<u8>]) -> Result<(), String> {
    used(text::from_literals(literals).map_err(|e| e.to_string())?);
    Ok(())
}

fn used(tokenizer: Arc<dyn Tokenizer>) {
    for ids in [tokenizer.encode(TEXT), tokenizer.encode_special(TEXT)] {
        tokenizer.decode(&ids);
    }
    for id in [0, 1, u32::MAX, tokenizer.vocab_size() as u32] {
        tokenizer.token_bytes(id);
    }
    tokenizer.end_of_text();
}

/// A snapshot.
pub fn snapshot(file: &[u8]) -> Result<(), String> {
    let size = file.len() as u64;
    let head = state::head_len(file, size)
        .and_then(|length| state::decode_head(file.get(..length).unwrap_or(file), size))
        .map_err(|e| e.to_string());
    let snapshot = state::decode(file).map_err(|e| e.to_string())?;
    head?;
    let again = state::encode(&snapshot).map_err(|e| format!("what was read cannot be written: {e}"))?;
    assert!(state::decode(&again).is_ok_and(|other| other == snapshot), "a snapshot survives writing");
    Ok(())
}

/// A state that is brought to `model`, which goes on from it if it is let in.
pub fn import(model: &mut Model, file: &[u8]) -> Result<(), String> {
    let memory = state::decode(file).map_err(|e| e.to_string())?.memory;
    let Description { vocabulary, context, .. } = *model.description();
    state::fits(&memory, model.segments(), vocabulary).map_err(|e| e.to_string())?;
    let ids = [&memory.pending.ends[..], &[0, vocabulary as u32 - 1]].concat();
    if context.is_some_and(|context| memory.consumed + ids.len() as u64 > context as u64) {
        return Err("the request that goes on is refused: the text is too long".into());
    }
    let mut pool = model.pool(1).map_err(|e| e.to_string())?;
    let slot = SlotId(0);
    pool.restore(slot, &memory.segments).expect("what fits can be restored");
    let (at, tokens, want) = (memory.consumed, 0..ids.len(), Want::All);
    let row = Row { seq: SeqId(0), from: slot, into: slot, at, tokens, want };
    // Other sequences are in the same step, which a state must not make fail.
    model.step(&mut pool, &ids, &[row], &mut Vec::new()).expect("what fits can be gone on with");
    Ok(())
}

/// A configuration file.
pub fn config(path: &Path) -> Result<(), String> {
    let flags = Flags { config: Some(path.into()), ..Flags::default() };
    Config::load(&flags, std::iter::empty()).map(|_| ()).map_err(|e| e.to_string())
}

/// Takes what is written and keeps nothing of it.
#[derive(Default)]
struct Nowhere(u64);

impl Write for Nowhere {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Seek for Nowhere {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.0 = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::Current(by) | SeekFrom::End(by) => self.0.saturating_add_signed(by),
        };
        Ok(self.0)
    }
}
