//! Tokenizers in the format of Hugging Face's `tokenizers` crate.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;
use tokenizers::Tokenizer as Pipeline;

use super::tokenizer::Table;
use super::{Error, Tokenizer, excerpt, pipeline};

/// Names under which vocabularies know the end of a document.
const ENDS: [&str; 4] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"];

/// A byte-pair encoding read from a `tokenizer.json`.
pub(super) struct Hf {
    /// Takes special tokens in a text for plain text.
    plain: Pipeline,
    /// Takes special tokens in a text for what they are.
    special: Pipeline,
    table: Table,
    end: Option<u32>,
}

impl Hf {
    pub fn read(json: &[u8]) -> Result<Self, Error> {
        Self::load(json).map_err(Error::Json)
    }

    fn load(json: &[u8]) -> Result<Self, String> {
        let mut file: Value = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        let spelling = Spelling::of(&file["decoder"])?;
        if !file["model"].is_object() {
            return Err("the file has no model".into());
        }
        for part in ["truncation", "padding", "post_processor"] {
            file[part] = Value::Null;
        }
        file["model"]["dropout"] = Value::Null;
        pipeline::check(&file)?;
        let vocabulary = vocabulary(&file["model"])?;
        let added = added_tokens(&file["added_tokens"])?;

        // A dense vocabulary spends more than 4 bytes of its file on each token: this bounds memory by the file's size.
        let limit = json.len() / 4;
        let mut tokens: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
        for (token, &id) in &vocabulary {
            if tokens.insert(id, spelling.bytes(token)).is_some() {
                return Err(format!("token id {id} is there twice"));
            }
        }
        // Added tokens come last: what they say of an id holds.
        for token in &added {
            let text = if token.special { "" } else { &token.content };
            tokens.insert(token.id, text.into());
        }
        let size = tokens.last_key_value().map_or(0, |(&id, _)| id as usize + 1);
        if size > limit {
            return Err(format!("token id {} is too large for a file of this size", size - 1));
        }
        let table = Table::new((0..size as u32).map(|id| tokens.remove(&id).unwrap_or_default()));
        drop(vocabulary);

        // Some of the crate's deserialisers panic on malformed parts.
        let special = std::panic::catch_unwind(|| serde_json::from_value::<Pipeline>(file))
            .map_err(|_| "the file is malformed".to_string())?
            .map_err(|error| error.to_string())?;
        let mut plain = special.clone();
        plain.set_encode_special_tokens(true);
        for token in &added {
            if special.token_to_id(&token.content) != Some(token.id) {
                return Err(format!("added token {} cannot have id {}", excerpt(&token.content), token.id));
            }
        }
        let end = ENDS.iter().find_map(|name| added.iter().find(|token| token.special && token.content == *name));
        let end = end.map(|token| token.id);
        let hf = Self { plain, special, table, end };
        for token in added.iter().filter(|token| token.special) {
            if hf.encode(&token.content).contains(&token.id) {
                return Err(format!("plain text {} would become a special token", excerpt(&token.content)));
            }
        }
        Ok(hf)
    }
}

fn ids(pipeline: &Pipeline, text: &str) -> Vec<u32> {
    let encoding = pipeline.encode_fast(text, false);
    encoding.expect("a BPE fails only for want of its unknown token, which was looked for").get_ids().to_vec()
}

impl Tokenizer for Hf {
    fn encode(&self, text: &str) -> Vec<u32> {
        ids(&self.plain, text)
    }
    fn encode_special(&self, text: &str) -> Vec<u32> {
        ids(&self.special, text)
    }
    fn token_bytes(&self, id: u32) -> &[u8] {
        self.table.get(id)
    }
    fn vocab_size(&self) -> usize {
        self.table.len()
    }
    fn end_of_text(&self) -> Option<u32> {
        self.end
    }
    fn name(&self) -> &str {
        "tokenizer.json"
    }
}

/// The tokens of a BPE model by their written form, after checks of what the crate takes on trust.
fn vocabulary(model: &Value) -> Result<HashMap<&str, u32>, String> {
    // Old files do not name their type; only a BPE has merges.
    if !matches!(model["type"].as_str(), Some("BPE") | None) || !model["merges"].is_array() {
        return Err("only BPE models are supported".into());
    }
    for affix in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if !matches!(model[affix].as_str(), None | Some("")) {
            return Err(format!("`{affix}` is not supported"));
        }
    }
    let entries = model["vocab"].as_object().ok_or("the model has no vocabulary")?;
    let mut vocabulary = HashMap::with_capacity(entries.len());
    for (token, id) in entries {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
        vocabulary.insert(token.as_str(), id.ok_or_else(|| format!("token {} has no valid id", excerpt(token)))?);
    }
    if let Some(unknown) = model["unk_token"].as_str().filter(|token| !vocabulary.contains_key(token)) {
        return Err(format!("the unknown token {} is not in the vocabulary", excerpt(unknown)));
    }
    for merge in model["merges"].as_array().into_iter().flatten() {
        let pair = match merge {
            Value::String(pair) => pair.split_once(' '),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            _ => None,
        };
        let (left, right) = pair.ok_or("a merge is not a pair of tokens")?;
        if !vocabulary.contains_key(format!("{left}{right}").as_str()) {
            return Err(format!("the merge of {} and {} is not in the vocabulary", excerpt(left), excerpt(right)));
        }
    }
    Ok(vocabulary)
}

/// A token that is recognised before the model sees the text.
struct Added {
    id: u32,
    content: String,
    special: bool,
}

fn added_tokens(list: &Value) -> Result<Vec<Added>, String> {
    let read = |token: &Value| {
        Some(Added {
            id: u32::try_from(token["id"].as_u64()?).ok()?,
            content: token["content"].as_str()?.to_string(),
            special: token["special"].as_bool()?,
        })
    };
    match list {
        Value::Null => Ok(Vec::new()),
        Value::Array(tokens) => {
            tokens.iter().map(|token| read(token).ok_or_else(|| "a malformed added token".to_string())).collect()
        }
        _ => Err("`added_tokens` is not a list".into()),
    }
}

/// How the vocabulary writes bytes, told from the decoder.
enum Spelling {
    /// One character for each byte, as GPT-2 does.
    ByteLevel(HashMap<char, u8>),
    /// Text in which one character stands for a space, and perhaps `<0xNN>` for a byte.
    Plain { space: Option<char>, byte_fallback: bool },
}

impl Spelling {
    fn of(decoder: &Value) -> Result<Self, String> {
        let parts = match decoder["type"].as_str() {
            Some("Sequence") => decoder["decoders"].as_array().map(Vec::as_slice).unwrap_or_default(),
            Some(_) => std::slice::from_ref(decoder),
            None => return Err("the file has no decoder, so its tokens have no known bytes".into()),
        };
        let (mut byte_level, mut known) = (false, false);
        let (mut space, mut byte_fallback) = (None, false);
        for part in parts {
            let kind = part["type"].as_str().unwrap_or_default();
            match kind {
                "ByteLevel" => byte_level = true,
                "ByteFallback" => byte_fallback = true,
                "Metaspace" => space = Some(one_char(&part["replacement"])?),
                "Replace" if part["content"] == " " => space = Some(one_char(&part["pattern"]["String"])?),
                // These work on a whole text: joining it, and taking away the space that encoding puts before it.
                "Fuse" => continue,
                "Strip" if part["content"] == " " => continue,
                _ => return Err(format!("decoder {} is not supported", excerpt(kind))),
            }
            known = true;
        }
        match (byte_level, byte_fallback || space.is_some()) {
            (true, false) => Ok(Self::ByteLevel(byte_level_alphabet())),
            (false, true) if known => Ok(Self::Plain { space, byte_fallback }),
            _ => Err("the decoder does not say which bytes its tokens have".into()),
        }
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            // As the crate does: a token that is not in the alphabet is written as it is.
            Self::ByteLevel(alphabet) => token
                .chars()
                .map(|character| alphabet.get(&character).copied())
                .collect::<Option<_>>()
                .unwrap_or_else(|| token.as_bytes().to_vec()),
            Self::Plain { byte_fallback: true, .. } if byte_token(token).is_some() => {
                byte_token(token).into_iter().collect()
            }
            Self::Plain { space: Some(space), .. } => token.replace(*space, " ").into_bytes(),
            Self::Plain { space: None, .. } => token.as_bytes().to_vec(),
        }
    }
}

/// The byte of a token like `<0x0A>`.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

fn one_char(value: &Value) -> Result<char, String> {
    let mut chars = value.as_str().unwrap_or_default().chars();
    chars
        .next()
        .filter(|_| chars.next().is_none())
        .ok_or("a decoder replaces something other than one character".into())
}

/// GPT-2's alphabet (openai/gpt-2, `encoder.py`, `bytes_to_unicode`): printable Latin-1 stands for itself, the other
/// bytes, in order, for the characters from U+0100 on.
fn byte_level_alphabet() -> HashMap<char, u8> {
    let mut others = '\u{100}'..;
    (0..=u8::MAX)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => (char::from(byte), byte),
            _ => (others.next().expect("there are more characters than bytes"), byte),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// A byte-level BPE of all bytes, `ab` and an end token.
    fn byte_level() -> Value {
        let mut alphabet: Vec<(char, u8)> = byte_level_alphabet().into_iter().collect();
        alphabet.sort_by_key(|&(_, byte)| byte);
        let mut vocab: serde_json::Map<String, Value> =
            alphabet.iter().map(|(character, byte)| (character.to_string(), json!(byte))).collect();
        vocab.insert("ab".into(), json!(256));
        let token = |id: u32, content: &str, special: bool| {
            json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false})
        };
        json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [token(257, "<|endoftext|>", true), token(258, "<é>", false)],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                      "merges": [["a", "b"]]}
        })
    }

    fn read(file: &Value) -> Result<Hf, Error> {
        Hf::read(file.to_string().as_bytes())
    }

    #[test]
    fn special_tokens_are_plain_text_unless_asked_for() {
        let hf = read(&byte_level()).expect("a sound file");
        let text = "ab<|endoftext|>é";
        assert_eq!(hf.encode_special(text), [256, 257, 195, 169]);
        let plain = hf.encode(text);
        assert!(!plain.contains(&257));
        assert_eq!(hf.decode(&plain), text.as_bytes());
        assert_eq!(hf.decode(&[256, 257, 258, 10, 259, u32::MAX]), "ab<é>\n".as_bytes());
        assert_eq!((hf.end_of_text(), hf.vocab_size()), (Some(257), 259));
        assert_eq!(hf.encode("<é>"), [258]);
    }

    #[test]
    fn nothing_is_added_or_cut() {
        let mut file = byte_level();
        file["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
        file["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
                                 "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
        file["post_processor"] = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [257],
            "tokens": ["<|endoftext|>"]}}});
        file["model"]["dropout"] = json!(1.0);
        let hf = read(&file).expect("a sound file");
        assert_eq!(hf.encode("ab"), [256]);
        assert_eq!(hf.encode_special("abc ab"), [256, 99, 32, 256]);
    }

    #[test]
    fn metaspace_and_byte_fallback() {
        let mut vocab = json!({"<unk>": 0, "▁": 1, "a": 2, "▁a": 3});
        for byte in 0..=255u32 {
            vocab[format!("<0x{byte:02X}>")] = json!(4 + byte);
        }
        let file = |decoder: Value| {
            json!({"version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
                "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true},
                "decoder": decoder,
                "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                          "vocab": vocab, "merges": ["▁ a"]}})
        };
        let llama = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let hf = read(&file(llama)).expect("a sound file");
        assert_eq!(hf.encode("a aé"), [2, 3, 4 + 0xc3, 4 + 0xa9]);
        assert_eq!(hf.decode(&[2, 3, 4 + 0xc3, 4 + 0xa9, 1]), "a aé ".as_bytes());

        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true});
        let hf = read(&file(metaspace)).expect("a sound file");
        assert_eq!(hf.token_bytes(3), b" a");
        assert_eq!(hf.token_bytes(14), b"<0x0A>");

        for decoder in [
            json!(null),
            json!({"type": "WordPiece"}),
            json!({"type": "Fuse"}),
            json!({"type": "Sequence"}),
            json!(7),
            json!({"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "ByteFallback"}]}),
            json!({"type": "Replace", "pattern": {"String": "a"}, "content": "bb"}),
            json!({"type": "Replace", "pattern": {"Regex": "a"}, "content": " "}),
        ] {
            assert!(matches!(read(&file(decoder.clone())), Err(Error::Json(_))), "{decoder}");
        }
    }

    #[test]
    fn a_bad_file_is_explained() {
        type Harm = fn(&mut Value);
        let cases: [(Harm, &str); 12] = [
            (|f| f["model"]["type"] = json!("Unigram"), "only BPE"),
            (|f| f["model"]["merges"] = json!([["a", "a"]]), "the merge of"),
            (|f| f["model"]["merges"] = json!([["zzzz", "zzzzzzzzzzzzzzzzzzzzzzzz"]]), "the merge of"),
            (|f| f["model"]["merges"] = json!([3]), "not a pair"),
            (|f| f["model"]["vocab"]["c"] = json!(-1), "no valid id"),
            (|f| f["model"]["vocab"]["c"] = json!(4_000_000_000u32), "too large"),
            (|f| f["model"]["vocab"]["c"] = json!(u64::MAX), "no valid id"),
            (|f| f["model"]["vocab"]["c"] = json!(97), "twice"),
            (|f| f["model"]["unk_token"] = json!("<unk>"), "unknown token"),
            (|f| f["model"]["continuing_subword_prefix"] = json!("##########"), "not supported"),
            (|f| f["added_tokens"][0]["id"] = json!(300), "cannot have id"),
            (|f| f["pre_tokenizer"] = json!({"type": "Split"}), ""),
        ];
        for (harm, reason) in cases {
            let mut file = byte_level();
            harm(&mut file);
            let error = read(&file).err().expect(reason).to_string();
            assert!(error.contains(reason), "{error}");
        }
        let json = byte_level().to_string();
        for end in (0..json.len()).step_by(97) {
            assert!(Hf::read(&json.as_bytes()[..end]).is_err());
        }
        for junk in ["[]", "7", "{}", "null", "\"x\""] {
            assert!(Hf::read(junk.as_bytes()).is_err(), "{junk}");
        }
        assert!(Hf::read("[".repeat(100_000).as_bytes()).is_err());
    }

    #[test]
    fn a_special_token_that_plain_text_can_reach_is_refused() {
        let mut file = byte_level();
        file["added_tokens"][0]["content"] = json!("ab");
        file["added_tokens"][0]["id"] = json!(256);
        file["added_tokens"][1]["id"] = json!(257);
        let error = read(&file).err().expect("merges make it").to_string();
        assert!(error.contains("special token"), "{error}");
    }

    proptest! {
        #[test]
        fn byte_level_text_survives(text in "(\\PC|[ab <|>\n]|<é>|<\\|endoftext\\|>){0,20}") {
            thread_local!(static HF: Hf = read(&byte_level()).expect("a sound file"));
            HF.with(|hf| {
                let ids = hf.encode(&text);
                prop_assert!(!ids.contains(&257));
                prop_assert_eq!(hf.decode(&ids), text.as_bytes());
                Ok(())
            })?;
        }
    }
}
