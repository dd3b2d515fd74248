//! What a tokenizer is, and the simplest of them.

use std::sync::Arc;

/// Text to token ids, and ids to bytes.
///
/// A token is a string of bytes, not of characters: one character may span several tokens.
pub trait Tokenizer: Send + Sync {
    /// The ids of plain text: the written form of a special token in it is ordinary text.
    fn encode(&self, text: &str) -> Vec<u32>;

    /// The ids of text in which special tokens may be written out, as in a completion's prompt.
    fn encode_special(&self, text: &str) -> Vec<u32> {
        self.encode(text)
    }

    /// The bytes of one token; empty for ids without text: special, padding, out of the vocabulary.
    fn token_bytes(&self, id: u32) -> &[u8];

    /// One more than the largest id. A model's head may have more rows than that.
    fn vocab_size(&self) -> usize;

    /// The id that ends a document, if the vocabulary has one.
    fn end_of_text(&self) -> Option<u32>;

    /// What kind of vocabulary it is, for people.
    fn name(&self) -> &str;

    /// Whether text takes, from left to right, the longest token that fits, so that the tokens alone say all.
    fn is_greedy(&self) -> bool {
        false
    }

    /// The bytes of many tokens; they need not be UTF-8.
    fn decode(&self, ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect()
    }
}

/// The byte-level vocabulary: 256 tokens, and a token's id is its byte.
pub fn bytes() -> Arc<dyn Tokenizer> {
    Arc::new(Bytes(Table::new((0..=u8::MAX).map(|byte| [byte]))))
}

struct Bytes(Table);

impl Tokenizer for Bytes {
    fn encode(&self, text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }
    fn token_bytes(&self, id: u32) -> &[u8] {
        self.0.get(id)
    }
    fn vocab_size(&self) -> usize {
        self.0.len()
    }
    fn end_of_text(&self) -> Option<u32> {
        None
    }
    fn name(&self) -> &str {
        "bytes"
    }
    fn is_greedy(&self) -> bool {
        true
    }
}

/// The bytes of every token, by id, laid end to end.
pub(super) struct Table {
    bytes: Box<[u8]>,
    /// Where each token ends in `bytes`.
    ends: Box<[usize]>,
}

impl Table {
    /// A table of the tokens `0, 1, …`; ids without text are empty.
    pub fn new<T: AsRef<[u8]>>(tokens: impl IntoIterator<Item = T>) -> Self {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for token in tokens {
            bytes.extend_from_slice(token.as_ref());
            ends.push(bytes.len());
        }
        Self { bytes: bytes.into(), ends: ends.into() }
    }

    pub fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..end]
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_its_own_token() {
        let tokenizer = bytes();
        assert_eq!(tokenizer.encode("aé\0"), [97, 195, 169, 0]);
        assert_eq!(tokenizer.encode_special("<|endoftext|>").len(), 13);
        assert_eq!(tokenizer.decode(&[97, 195, 169, 0, 256, u32::MAX]), "aé\0".as_bytes());
        assert_eq!(tokenizer.vocab_size(), 256);
    }

    #[test]
    fn the_table_knows_where_tokens_end() {
        let table = Table::new(["", "ab", "", "c"]);
        let tokens: Vec<_> = (0..5).map(|id| table.get(id)).collect();
        assert_eq!(tokens, [&b""[..], b"ab", b"", b"c", b""]);
        assert_eq!(table.len(), 4);
    }
}
