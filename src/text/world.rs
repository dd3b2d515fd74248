//! The World vocabulary of RWKV-5 and later: greedy longest match on bytes.

use std::io::Read;
use std::sync::{Arc, LazyLock};

use daachorse::{DoubleArrayAhoCorasick, DoubleArrayAhoCorasickBuilder, MatchKind};
use flate2::read::DeflateDecoder;

use super::tokenizer::Table;
use super::{Error, Tokenizer, excerpt, literal};

/// The tokens 1, 2, … of `rwkv_vocab_v20230424`, each after a byte that holds its length, deflated; see `NOTICE` there.
const EMBEDDED: &[u8] = include_bytes!("../../assets/world/vocab.bin.deflate");

/// Longest token a vocabulary file may hold, in bytes. World's longest has 128. A long token would also make encoding
/// slow, since a match reads ahead as far as the longest token may reach.
const LONGEST: usize = 1024;

/// A vocabulary of byte strings of which text takes the longest that fits, from left to right.
///
/// Every single byte is a token, so any bytes can be encoded and decode to themselves. Id 0 ends a document and has no
/// bytes.
pub struct World {
    /// Leftmost-longest matching is greedy longest match, because a match begins at every byte.
    automaton: DoubleArrayAhoCorasick<u32>,
    table: Table,
    name: &'static str,
}

impl World {
    /// The embedded vocabulary; the first call makes it.
    pub fn embedded() -> Arc<World> {
        static WORLD: LazyLock<Arc<World>> = LazyLock::new(|| {
            let packed = unpack();
            let tokens: Vec<&[u8]> = tokens(&packed).collect();
            Arc::new(World::new(&tokens, "world").expect("the embedded vocabulary is sound"))
        });
        WORLD.clone()
    }

    /// Whether the tokens of a vocabulary are the embedded ones, perhaps with ids behind them that have no text. That one is not
    /// made for it.
    pub fn is_embedded(text: &dyn Tokenizer) -> bool {
        let packed = unpack();
        let tokens = tokens(&packed).chain(std::iter::repeat(&[][..]));
        (0..text.vocab_size() as u32).zip(tokens).all(|(id, token)| text.token_bytes(id) == token)
    }

    /// Reads an `rwkv_vocab_*.txt` file; line ends may be LF or CRLF.
    pub(super) fn read(text: &[u8]) -> Result<World, Error> {
        let text = std::str::from_utf8(text).map_err(|_| Error::Vocabulary("the file is not UTF-8".into()))?;
        let mut tokens: Vec<Vec<u8>> = Vec::new();
        for (index, line) in text.split('\n').enumerate() {
            let line = line.strip_suffix('\r').unwrap_or(line);
            if line.is_empty() {
                continue;
            }
            // A line is longer than its id is large in any dense vocabulary, so this bounds memory by the file's size.
            let (id, token) = entry(line, text.len() / 4).map_err(|reason| Error::Line { line: index + 1, reason })?;
            if tokens.len() <= id {
                tokens.resize(id + 1, Vec::new());
            }
            if !tokens[id].is_empty() {
                return Err(Error::Line { line: index + 1, reason: format!("id {id} is there twice") });
            }
            tokens[id] = token;
        }
        World::distinct(&tokens, "vocabulary")
    }

    /// The vocabulary in a GGUF file: the inside of a Python bytes literal for each id, empty for ids without text.
    pub(super) fn from_literals(literals: &[Vec<u8>]) -> Result<World, Error> {
        let read = |(id, literal): (usize, &Vec<u8>)| {
            let wrong = |reason: &str| Error::Vocabulary(format!("token {id}: {reason}"));
            let text = std::str::from_utf8(literal).map_err(|_| wrong("it is not UTF-8"))?;
            let token = literal::unescape(text, true, None).map_err(wrong)?;
            if token.len() > LONGEST {
                return Err(wrong(&format!("it has {} bytes, more than {LONGEST}", token.len())));
            }
            Ok(token)
        };
        let tokens = literals.iter().enumerate().map(read).collect::<Result<Vec<_>, Error>>()?;
        World::distinct(&tokens, "world")
    }

    /// As [`World::new`], where no two ids may be the same token.
    fn distinct(tokens: &[Vec<u8>], name: &'static str) -> Result<World, Error> {
        let mut by_bytes: Vec<usize> = (0..tokens.len()).filter(|&id| !tokens[id].is_empty()).collect();
        by_bytes.sort_by_key(|&id| &tokens[id]);
        if let Some(twins) = by_bytes.windows(2).find(|pair| tokens[pair[0]] == tokens[pair[1]]) {
            return Err(Error::Vocabulary(format!("ids {} and {} are the same token", twins[0], twins[1])));
        }
        World::new(tokens, name)
    }

    /// `tokens` by id; ids without text are empty.
    fn new<T: AsRef<[u8]>>(tokens: &[T], name: &'static str) -> Result<World, Error> {
        let mut single = [false; 256];
        for token in tokens {
            if let &[byte] = token.as_ref() {
                single[usize::from(byte)] = true;
            }
        }
        if let Some(byte) = single.iter().position(|known| !known) {
            return Err(Error::Vocabulary(format!("no token for the single byte 0x{byte:02x}")));
        }
        let patterns = tokens.iter().zip(0u32..).filter(|(token, _)| !token.as_ref().is_empty());
        let automaton = DoubleArrayAhoCorasickBuilder::new()
            .match_kind(MatchKind::LeftmostLongest)
            .build_with_values(patterns)
            .map_err(|error| Error::Vocabulary(error.to_string()))?;
        Ok(World { automaton, table: Table::new(tokens), name })
    }

    /// The ids of any bytes, UTF-8 or not.
    pub fn encode_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.automaton.leftmost_find_iter(bytes).map(|token| token.value()).collect()
    }
}

/// The embedded tokens, from id 1 on, each after a byte that holds its length.
fn unpack() -> Vec<u8> {
    let mut packed = Vec::new();
    DeflateDecoder::new(EMBEDDED).read_to_end(&mut packed).expect("the embedded vocabulary is whole");
    packed
}

/// The tokens by id.
fn tokens(packed: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = packed;
    let next = std::iter::from_fn(move || {
        let (&length, after) = rest.split_first()?;
        let (token, after) = after.split_at(length.into());
        rest = after;
        Some(token)
    });
    std::iter::once(&[][..]).chain(next)
}

/// One line: an id below `limit`, a literal, its length.
fn entry(line: &str, limit: usize) -> Result<(usize, Vec<u8>), String> {
    let shape = "a line is an id, a Python literal and its length in bytes, separated by single spaces";
    let (id, rest) = line.split_once(' ').ok_or(shape)?;
    let (token, length) = rest.rsplit_once(' ').ok_or(shape)?;
    let id: usize = id.parse().map_err(|_| format!("{} is not an id", excerpt(id)))?;
    let length: usize = length.parse().map_err(|_| format!("{} is not a length", excerpt(length)))?;
    let token = literal::parse(token)?;
    if id == 0 {
        return Err("id 0 is the end of a document and has no text".into());
    }
    if id >= limit {
        return Err(format!("id {id} is too large for a file of this size"));
    }
    if token.len() != length {
        return Err(format!("the literal has {} bytes, not {length}", token.len()));
    }
    if !(1..=LONGEST).contains(&length) {
        return Err(format!("a token has 1 to {LONGEST} bytes, not {length}"));
    }
    Ok((id, token))
}

impl Tokenizer for World {
    fn encode(&self, text: &str) -> Vec<u32> {
        self.encode_bytes(text.as_bytes())
    }
    fn token_bytes(&self, id: u32) -> &[u8] {
        self.table.get(id)
    }
    fn vocab_size(&self) -> usize {
        self.table.len()
    }
    fn end_of_text(&self) -> Option<u32> {
        Some(0)
    }
    fn name(&self) -> &str {
        self.name
    }
    fn is_greedy(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All single bytes as ids 1 to 256, then `more`.
    fn file(more: &str) -> String {
        (0..256).map(|b| format!("{} b'\\x{b:02x}' 1\r\n", b + 1)).collect::<String>() + more
    }

    #[test]
    fn the_longest_token_wins() {
        let world = World::read(file("257 'ab' 2\n258 'abcd' 4\n300 ' é' 3").as_bytes()).expect("a sound file");
        assert_eq!(world.encode("abcdabc éa"), [258, 257, 100, 300, 98]);
        assert_eq!(world.encode("abcéx"), [257, 100, 196, 170, 121]);
        assert_eq!(world.token_bytes(300), " é".as_bytes());
        assert_eq!(world.vocab_size(), 301);
        for no_text in [0, 299, 301, u32::MAX] {
            assert_eq!(world.token_bytes(no_text), b"");
        }
    }

    #[test]
    fn a_bad_file_is_explained() {
        let cases = [
            ("257 'ab' 3", "has 2 bytes, not 3"),
            ("256 'ab' 2", "twice"),
            ("257 'a' 1", "ids 98 and 257 are the same"),
            ("0 'ab' 2", "id 0"),
            ("4294967295 'ab' 2", "too large"),
            ("99999999999999999999999 'ab' 2", "not an id"),
            ("257 '' 0", "1 to 1024"),
            ("257 'ab'", "a line is"),
            ("257 ab 2", "no quotes"),
            ("257 'ab' two", "not a length"),
            ("-1 'ab' 2", "not an id"),
        ];
        for (line, reason) in cases {
            let error = World::read(file(line).as_bytes()).err().expect(line).to_string();
            assert!(error.contains(reason), "{line}: {error}");
        }
        let long = format!("257 '{}' 1025", "a".repeat(1025));
        assert!(World::read(file(&long).as_bytes()).is_err());
        assert!(World::read(b"1 'a' 1\n").is_err_and(|e| e.to_string().contains("0x00")));
        assert!(World::read(b"").is_err());
        assert!(World::read(b"\xff").is_err());
    }

    #[test]
    fn world_is_told_by_its_tokens() {
        let world = World::embedded();
        let mut literals: Vec<_> =
            (0..world.vocab_size() as u32).map(|id| crate::text::to_literal(world.token_bytes(id))).collect();
        literals.resize(1 << 16, Vec::new());
        let is_world = |literals: &[Vec<u8>]| crate::text::is_world(&World::from_literals(literals).expect("sound"));
        assert!(crate::text::is_world(&*world) && is_world(&literals));
        literals[65_535] = b"one more that nobody has".to_vec();
        assert!(!is_world(&literals));
        literals.truncate(300);
        assert!(!is_world(&literals));
    }

    /// Greedy longest match, the slow way.
    fn greedy(world: &World, mut bytes: &[u8]) -> Vec<u32> {
        let by_bytes: std::collections::HashMap<&[u8], u32> =
            (1..world.vocab_size() as u32).map(|id| (world.token_bytes(id), id)).collect();
        let mut ids = Vec::new();
        while !bytes.is_empty() {
            let longest = (1..=bytes.len().min(128)).rev().find(|&n| by_bytes.contains_key(&bytes[..n]));
            let longest = longest.expect("every byte is a token");
            ids.push(by_bytes[&bytes[..longest]]);
            bytes = &bytes[longest..];
        }
        ids
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn encoding_is_greedy_and_loses_nothing(
            parts in prop::collection::vec(prop_oneof![
                (1u32..65_530).prop_map(|id| World::embedded().token_bytes(id).to_vec()),
                prop::collection::vec(any::<u8>(), 0..4),
                "[ \n\r\t-]{0,12}".prop_map(String::into_bytes),
            ], 0..24)
        ) {
            let (world, bytes) = (World::embedded(), parts.concat());
            let ids = world.encode_bytes(&bytes);
            prop_assert_eq!(world.decode(&ids), &bytes[..]);
            prop_assert_eq!(ids, greedy(&world, &bytes));
        }
    }
}
