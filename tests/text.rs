//! Tokenizers against the reference implementations' results.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rewake::text::{self, Tokenizer, World};
use rewake::types::{Message, Role};
use serde_json::Value;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The rows of an expectation file.
fn rows(path: &Path) -> Vec<Value> {
    let json = std::fs::read(path).expect("a readable file");
    serde_json::from_slice(&json).expect("a list of rows")
}

/// A file that is not ours to copy; tests that need it are skipped where it is not.
fn shared(path: &str) -> Option<PathBuf> {
    let path = here("../shared").join(path);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is not there", path.display());
    None
}

fn ids(row: &Value) -> Vec<u32> {
    row["ids"].as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn bytes(row: &Value) -> Vec<u8> {
    let hex = row["bytes_hex"].as_str().expect("bytes");
    let digit = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).expect("hexadecimal digits");
    (0..hex.len()).step_by(2).map(digit).collect()
}

fn text_of(row: &Value) -> &str {
    row["text"].as_str().expect("text")
}

#[test]
fn world_encodes_as_the_reference() {
    let world = text::world();
    let rows = rows(&here("tests/data/text/world_tokenizer.json"));
    assert_eq!(rows.len(), 400);
    for row in &rows {
        assert_eq!(world.encode(text_of(row)), ids(row), "{row}");
        assert_eq!(world.decode(&ids(row)), text_of(row).as_bytes());
    }
}

#[test]
fn world_encodes_any_bytes() {
    for row in rows(&here("tests/data/text/world_tokenizer_bytes.json")) {
        assert_eq!(World::embedded().encode_bytes(&bytes(&row)), ids(&row), "{row}");
    }
}

#[test]
fn world_decodes_as_the_reference() {
    let world = text::world();
    for row in rows(&here("tests/data/text/world_tokenizer_decode.json")) {
        let decoded = world.decode(&ids(&row));
        assert_eq!(decoded, bytes(&row), "{row}");
        let mut output = text::Output::new(&[], text::Trim::default());
        let pieces: String = ids(&row).iter().map(|&id| output.push(world.token_bytes(id)).text).collect();
        assert_eq!(pieces + &output.finish(), row["lossy"].as_str().expect("text"), "{row}");
    }
}

#[test]
fn world_has_every_id_but_the_last_six() {
    let world = text::world();
    assert_eq!(world.vocab_size(), 65_530);
    assert_eq!(world.end_of_text(), Some(0));
    assert!((1..65_530).all(|id| !world.token_bytes(id).is_empty()));
    assert!([0, 65_530, 65_535].iter().all(|&id| world.token_bytes(id).is_empty()));
    assert_eq!(world.token_bytes(261), b"\n\n");
    assert_eq!(world.token_bytes(24_281), b"User");
}

#[test]
fn a_vocabulary_file_equals_the_embedded_one() {
    let Some(path) = shared("vectors/tokenizers/rwkv_vocab_v20230424.txt") else { return };
    let crlf = std::fs::read(path).expect("a readable file");
    let lf: Vec<u8> = crlf.iter().copied().filter(|&byte| byte != b'\r').collect();
    for file in [crlf, lf] {
        let read = text::from_vocabulary(&file).expect("a sound file");
        assert_eq!(read.vocab_size(), 65_530);
        assert!((0..65_536).all(|id| read.token_bytes(id) == text::world().token_bytes(id)));
    }
}

#[test]
fn the_20b_tokenizer_encodes_as_the_reference() {
    let Some(path) = shared("vectors/tokenizers/20B_tokenizer.json") else { return };
    let tokenizer = text::from_json(&std::fs::read(path).expect("a readable file")).expect("a sound file");
    assert_eq!(tokenizer.end_of_text(), Some(0));
    for row in rows(&here("tests/data/text/20b_tokenizer.json")) {
        assert_eq!(tokenizer.encode_special(text_of(&row)), ids(&row), "{row}");
        let decoded = String::from_utf8_lossy(&tokenizer.decode(&ids(&row))).into_owned();
        assert_eq!(decoded, row["decoded"].as_str().expect("text"), "{row}");
        let plain = tokenizer.encode(text_of(&row));
        assert!(!plain.contains(&0) && !plain.contains(&1));
        if !ids(&row).iter().any(|&id| id <= 1) {
            assert_eq!(plain, ids(&row), "{row}");
        }
    }
}

fn demo() -> Option<Arc<dyn Tokenizer>> {
    let path = shared("model/tokenizer.json")?;
    Some(text::from_json(&std::fs::read(path).expect("a readable file")).expect("a sound file"))
}

#[test]
fn the_demo_models_prompts_have_the_expected_ids() {
    let Some(tokenizer) = demo() else { return };
    let json = std::fs::read(here("../shared/model/expected.json")).expect("it stands beside the tokenizer");
    let expected: Value = serde_json::from_slice(&json).expect("JSON");
    let listed = |name: &str| -> Vec<u32> {
        expected[name].as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    assert_eq!(tokenizer.encode(expected["prompt"].as_str().expect("text")), listed("prompt_ids"));
    assert_eq!(tokenizer.decode(&listed("greedy_ids")), expected["greedy_text"].as_str().expect("text").as_bytes());
    assert_eq!((tokenizer.end_of_text(), tokenizer.vocab_size()), (Some(0), 2048));

    let profile = text::builtin("stories").expect("built in");
    let content = "Tell me a story about a cat and a boat.".to_string();
    let pieces =
        profile.render(&[Message { role: Role::User, content, name: None }], false, true).expect("a sound profile");
    assert_eq!(pieces.concat(), expected["chat_prompt"].as_str().expect("text"));
    let ids: Vec<u32> = pieces.iter().flat_map(|piece| tokenizer.encode(piece)).collect();
    assert_eq!(ids, listed("chat_prompt_ids"));
}

#[test]
fn tokenizers_are_shared_between_threads() {
    let mut tokenizers = vec![text::world(), text::bytes()];
    tokenizers.extend(demo());
    let rows = rows(&here("tests/data/text/world_tokenizer.json"));
    for tokenizer in tokenizers {
        let alone: Vec<_> = rows.iter().map(|row| tokenizer.encode(text_of(row))).collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for (row, ids) in rows.iter().zip(&alone) {
                        assert_eq!(&tokenizer.encode(text_of(row)), ids);
                        assert_eq!(tokenizer.decode(ids), text_of(row).as_bytes());
                    }
                });
            }
        });
    }
}

/// Writes `assets/world/vocab.bin.deflate` from the file that `REWAKE_VOCABULARY` names; see the `NOTICE` beside it.
#[test]
#[ignore = "makes an asset"]
fn remake_the_embedded_vocabulary() {
    let path = std::env::var("REWAKE_VOCABULARY").expect("REWAKE_VOCABULARY names an rwkv_vocab_*.txt");
    let world = text::from_vocabulary(&std::fs::read(path).expect("a readable file")).expect("a sound file");
    let file = std::fs::File::create(here("assets/world/vocab.bin.deflate")).expect("a writable file");
    let mut packed = flate2::write::DeflateEncoder::new(file, flate2::Compression::best());
    for id in 1..world.vocab_size() as u32 {
        let token = world.token_bytes(id);
        let length = u8::try_from(token.len()).expect("tokens are short");
        assert_ne!(length, 0, "ids have no gaps");
        packed.write_all(&[length]).and_then(|()| packed.write_all(token)).expect("a writable file");
    }
    packed.finish().expect("a writable file");
}
