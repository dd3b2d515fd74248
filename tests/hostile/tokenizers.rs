//! Tokenizers and vocabularies that lie.

use rewake::text;
use serde_json::{Value, json};

use super::{readers, within};

/// A tokenizer of all printable ASCII characters.
fn sound() -> Value {
    let vocab: serde_json::Map<_, _> =
        (33u8..127).zip(0u32..).map(|(byte, id)| (char::from(byte).to_string(), json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [], "pre_tokenizer": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": "!", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}

fn with(path: &str, value: Value) -> Vec<u8> {
    let mut file = sound();
    *file.pointer_mut(path).expect("a part of the file") = value;
    file.to_string().into_bytes()
}

/// Reads a tokenizer and encodes with it, within the memory that belongs to its size.
fn tokenizer(what: &str, file: &[u8]) -> Result<(), String> {
    within(what, file.len(), 200, || readers::tokenizer(file))
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn sequence(kind: &str, parts: Vec<Value>) -> Value {
    json!({"type": "Sequence", kind: parts})
}

#[test]
fn the_patterns_that_models_have_are_read() {
    tokenizer("no pattern", sound().to_string().as_bytes()).expect("a sound file");
    for pattern in [
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[!\x22#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"(?:^|\s)\(\?|\\[(]",
    ] {
        tokenizer(pattern, &with("/pre_tokenizer", split(pattern))).expect(pattern);
    }
    tokenizer(
        "llama's",
        &with(
            "/normalizer",
            sequence(
                "normalizers",
                vec![
                    json!({"type": "Prepend", "prepend": "▁"}),
                    json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}),
                ],
            ),
        ),
    )
    .expect("a sound file");
}

#[test]
fn patterns_that_could_take_for_ever_are_refused() {
    for pattern in [
        r"(a+)+$(?=b)",
        r"(a+)+(?!\S)b",
        r"(?=(a+)+\z)b",
        r"(a*)*\1b",
        r"(?<x>a+)+\k<x>b",
        r"(?>a+)+b",
        r"((a+)+)++b",
        r"(?<!a)(a|a)+b",
        r"(\s+(?!\S)|(a+)+)+b",
        r"a\Kb",
        r"(?=ab\K)a",
        r"\G(a)",
        r"((\w{100}){100}){100}",
        r"\w{1000000000}",
        r"\w{1001}|a",
        r"(((((((((\w{9}){9}){9}){9}){9}){9}){9}){9}){9})",
        r"(?(a)b|c)",
        &"(".repeat(100_000),
        &"(?:a".repeat(300),
        &r"\w".repeat(10_000),
        "(",
        "[",
        "{",
        "\\",
        "",
    ] {
        let what: String = pattern.chars().take(40).collect();
        for place in ["/pre_tokenizer", "/normalizer"] {
            let part = match place {
                "/normalizer" => json!({"type": "Replace", "pattern": {"Regex": pattern}, "content": "b"}),
                _ => sequence("pretokenizers", vec![split(r"\p{N}"), split(pattern)]),
            };
            // Those that are fine are soon done with.
            let read = tokenizer(&what, &with(place, part));
            assert!(read.is_err() || ["{", ""].contains(&pattern), "{what}");
        }
    }
    let many = (0..1000).map(|_| split(r"\p{L}\p{N}\w\s")).collect();
    tokenizer("very many patterns", &with("/pre_tokenizer", sequence("pretokenizers", many))).expect_err("too many");
}

#[test]
fn text_does_not_grow_without_bound() {
    let replace = |from: Value, to: &str| json!({"type": "Replace", "pattern": from, "content": to});
    let doubling = (0..40).map(|_| replace(json!({"String": "a"}), "aa")).collect();
    let at_places = vec![replace(json!({"Regex": ""}), &"b".repeat(1000)); 8];
    let long = vec![replace(json!({"String": " "}), &"b".repeat(100_000)); 2];
    let prepended = vec![json!({"type": "Prepend", "prepend": "b".repeat(100_000)}); 100];
    for (what, parts) in [("doubling", doubling), ("at places", at_places), ("long", long), ("prepended", prepended)] {
        let nested = sequence("normalizers", vec![sequence("normalizers", parts)]);
        tokenizer(what, &with("/normalizer", nested)).expect_err(what);
    }
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false});
    let bytes = (0..40).map(|_| byte_level.clone()).collect();
    tokenizer("bytes of bytes", &with("/pre_tokenizer", sequence("pretokenizers", bytes))).expect_err("too many");
}

#[test]
fn a_tokenizer_that_lies_is_refused() {
    let token = |id: u64, content: &str| {
        json!([{"id": id, "content": content, "special": true, "single_word": false, "lstrip": true, "rstrip": true,
                "normalized": true}])
    };
    let deep = format!(r#"{{"decoder":{}"#, r#"{"type":"Sequence","decoders":["#.repeat(50_000));
    let list = |count: usize| "[".repeat(count) + &"]".repeat(count);
    for (what, file) in [
        ("nothing", vec![]),
        ("a brace", b"{".to_vec()),
        ("no object", b"[]".to_vec()),
        ("deep JSON", list(100_000).into_bytes()),
        ("JSON at the limit", list(127).into_bytes()),
        ("deep decoders", deep.into_bytes()),
        ("an id of 2³² - 1", with("/model/vocab/a", json!(u32::MAX))),
        ("an id of 2⁶⁴ - 1", with("/model/vocab/a", json!(u64::MAX))),
        ("an id of 10³⁰⁰", with("/model/vocab/a", json!(1e300))),
        ("a negative id", with("/model/vocab/a", json!(-1))),
        ("an added token far away", with("/added_tokens", token(4_000_000_000, "<x>"))),
        ("an added token in 2⁶⁴", with("/added_tokens", token(u64::MAX, "<x>"))),
        ("an empty added token", with("/added_tokens", token(94, ""))),
        ("a merge of what is not there", with("/model/merges", json!(["q q"]))),
        ("half a merge", with("/model/merges", json!(["q"]))),
        ("merges of nothing", with("/model/merges", json!([["", ""]]))),
        ("a merge of three", with("/model/merges", json!([["a", "b", "c"]]))),
        ("merges that are none", with("/model/merges", json!({"a": 1}))),
        ("a long type", with("/decoder/type", json!("\n".repeat(100_000)))),
        ("a charsmap", with("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}))),
        ("half a charsmap", with("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "/////w=="}))),
        ("a part of no kind", with("/pre_tokenizer", json!({"type": "Nothing"}))),
        ("a part that is a number", with("/pre_tokenizer", json!(3))),
        ("a word piece", with("/model/type", json!("WordPiece"))),
    ] {
        tokenizer(what, &file).expect_err(what);
    }
}

#[test]
fn merges_may_go_in_circles() {
    // Each is in the vocabulary, and each makes what another takes apart.
    let mut file = sound();
    for (token, id) in [("ab", 94), ("ba", 95), ("aba", 96), ("abab", 97)] {
        file["model"]["vocab"][token] = json!(id);
    }
    file["model"]["merges"] = json!([["a", "b"], ["b", "a"], ["ab", "a"], ["a", "ba"], ["aba", "b"], ["ab", "ab"]]);
    let read = text::from_json(file.to_string().as_bytes()).expect("a sound file");
    let text = "ab".repeat(2000);
    assert_eq!(read.decode(&read.encode(&text)), text.as_bytes());
}

#[test]
fn a_text_that_is_one_word_is_encoded_soon() {
    let read = text::from_json(sound().to_string().as_bytes()).expect("a sound file");
    assert_eq!(read.encode(&"a".repeat(200_000)).len(), 200_000);
}

/// All single bytes as ids 1 to 256, then `more`.
fn lines(more: &str) -> Vec<u8> {
    let bytes: String = (0..256).map(|b| format!("{} b'\\x{b:02x}' 1\n", b + 1)).collect();
    (bytes + more).into_bytes()
}

#[test]
fn a_vocabulary_that_lies_is_refused() {
    for (what, file) in [
        ("nothing", vec![]),
        ("one byte", vec![b'1']),
        ("no text", vec![0xff; 100]),
        ("very many line ends", vec![b'\n'; 100_000]),
        ("2³¹ tokens", lines("2147483647 'ab' 2")),
        ("2⁶⁴ tokens", lines("18446744073709551616 'ab' 2")),
        ("a token longer than it is", lines("257 'ab' 4294967295")),
        ("a token of 100 kB", lines(&format!("257 '{}' 100000", "a".repeat(100_000)))),
        ("a line of 100 kB", lines(&" ".repeat(100_000))),
        ("a line that rings", lines("\u{7}\0\u{1b}[2J 'a' 1")),
        ("half an escape", lines("257 '\\' 1")),
        ("a surrogate", lines("257 '\\ud800' 3")),
        ("an id twice", lines("1 'ab' 2")),
        ("a token twice", lines("257 'a' 1")),
    ] {
        within(what, file.len(), 300, || readers::vocabulary(&file)).expect_err(what);
    }
}

#[test]
fn a_vocabulary_of_long_tokens_costs_what_its_file_does() {
    let mut state = 1u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        char::from(b'a' + (state >> 24) as u8 % 26)
    };
    let tokens: String =
        (257..557).map(|id| format!("{id} '{}' 1024\n", (0..1024).map(|_| random()).collect::<String>())).collect();
    let file = lines(&tokens);
    within("long tokens", file.len(), 300, || readers::vocabulary(&file)).expect("a sound file");
}
