//! What a `tokenizer.json` may do to text before its model sees it: bounded work, and text that grows by a bounded factor.
//!
//! The file is a small program. Patterns that backtrack can take time beyond all measure on a short text, a short pattern
//! can compile to very much, and a few replacements in a row can make gigabytes of a word.

use serde_json::Value;

use super::excerpt;

/// Parts before the model, of each kind.
const MOST_PARTS: usize = 32;
/// Sequences inside one another.
const DEEPEST: usize = 4;
/// Bytes that one byte of text may become.
const MOST_GROWTH: usize = 512;
/// Patterns in a file, and bytes of all of them.
const MOST_PATTERNS: usize = 16;
const LONGEST_PATTERNS: usize = 4096;
/// How often all counted repetitions of a file, one inside the other, may repeat something.
const MOST_REPEATS: usize = 1000;
/// White space but for its last character: the one thing that patterns of models look ahead for, as their last choice.
const TAILS: [&str; 2] = [r"\s+(?!\S)|\s+", r"\s+(?!\S)"];

/// Refuses a file whose normalizer or pre-tokenizer is not bounded.
pub(super) fn check(file: &Value) -> Result<(), String> {
    let mut parts = Parts { left: MOST_PARTS, growth: 1, patterns: Patterns::default() };
    parts.add(&file["normalizer"], "normalizers", DEEPEST)?;
    parts.add(&file["pre_tokenizer"], "pretokenizers", DEEPEST)
}

struct Parts {
    left: usize,
    growth: usize,
    patterns: Patterns,
}

impl Parts {
    /// A part, or a sequence of them in its field `inside`.
    fn add(&mut self, part: &Value, inside: &str, depth: usize) -> Result<(), String> {
        if part.is_null() {
            return Ok(());
        }
        if part["type"] == "Sequence" {
            let depth = depth.checked_sub(1).ok_or("sequences are nested too deeply")?;
            let parts = part[inside].as_array().ok_or("a sequence has no parts")?;
            return parts.iter().try_for_each(|part| self.add(part, inside, depth));
        }
        self.left = self.left.checked_sub(1).ok_or_else(|| format!("there are more than {MOST_PARTS} parts"))?;
        if let Some(pattern) = part["pattern"]["Regex"].as_str() {
            self.patterns.add(pattern).map_err(|why| format!("the pattern {} {why}", excerpt(pattern)))?;
        }
        self.growth = growth(part)
            .and_then(|growth| self.growth.checked_mul(growth))
            .filter(|&growth| growth <= MOST_GROWTH)
            .ok_or_else(|| {
                let kind = excerpt(part["type"].as_str().unwrap_or_default());
                format!(
                    "a part of the type {kind} is not supported, or makes text more than {MOST_GROWTH} times as long"
                )
            })?;
        Ok(())
    }
}

/// The most bytes that a part makes of a byte; none for a part that is not known.
fn growth(part: &Value) -> Option<usize> {
    let length = |field: &str| part[field].as_str().map(str::len);
    Some(match part["type"].as_str()? {
        // Both make characters of bytes, and may put one before each word.
        "ByteLevel" => 3,
        "Metaspace" => 8,
        "Prepend" => 1 + length("prepend")?,
        "Replace" => match (part["pattern"]["String"].as_str(), length("content")?) {
            (Some(""), _) => 1,
            (Some(from), to) => to.div_ceil(from.len()).max(1),
            // It may match nothing, everywhere.
            (None, to) => 1 + to,
        },
        // Of Unicode's decompositions the longest makes 33 bytes of 3.
        "NFC" | "NFD" | "NFKC" | "NFKD" => 12,
        "BertNormalizer" | "Bert" => 24,
        "Lowercase" => 2,
        "Strip" | "StripAccents" | "Nmt" => 1,
        "Split" | "Digits" | "Punctuation" | "Whitespace" | "WhitespaceSplit" | "BertPreTokenizer" => 1,
        "Delimiter" | "UnicodeScripts" => 1,
        _ => return None,
    })
}

/// The patterns of a file.
struct Patterns {
    count: usize,
    bytes: usize,
    repeats: usize,
}

impl Default for Patterns {
    fn default() -> Self {
        Self { count: 0, bytes: 0, repeats: 1 }
    }
}

impl Patterns {
    fn add(&mut self, pattern: &str) -> Result<(), String> {
        self.count += 1;
        self.bytes += pattern.len();
        if self.count > MOST_PATTERNS || self.bytes > LONGEST_PATTERNS {
            return Err(format!("is one of more than {MOST_PATTERNS}, or of more than {LONGEST_PATTERNS} bytes"));
        }
        self.repeats = repeats(without_tail(pattern))?
            .checked_mul(self.repeats)
            .filter(|&repeats| repeats <= MOST_REPEATS)
            .ok_or_else(|| format!("repeats something more than {MOST_REPEATS} times"))?;
        Ok(())
    }
}

/// A pattern without the choice of [`TAILS`] at its end.
fn without_tail(pattern: &str) -> &str {
    let rest = TAILS.iter().find_map(|tail| pattern.strip_suffix(tail)).unwrap_or(pattern);
    let Some(before) = rest.strip_suffix('|') else { return if rest.is_empty() { rest } else { pattern } };
    let escaped = before.bytes().rev().take_while(|&byte| byte == b'\\').count() % 2 == 1;
    if escaped { pattern } else { rest }
}

/// How often the counted repetitions of a pattern repeat something, if they were all inside one another.
///
/// # Errors
/// For everything that is matched by trying one way after the other: looking around, back references, and groups and
/// repetitions that keep what they have. Without these, matching takes time in proportion to the text.
fn repeats(pattern: &str) -> Result<usize, String> {
    let mut rest = pattern;
    let (mut repeats, mut quantified) = (1usize, false);
    while let Some(c) = rest.chars().next() {
        let after = &rest[c.len_utf8()..];
        let quantifies = matches!(c, '*' | '+' | '?' | '{');
        if c == '+' && quantified {
            return Err("has a repetition that never gives back".into());
        }
        rest = match c {
            '\\' => after_escape(after)?,
            '[' => after_class(after)?,
            '(' => after_opening(after)?,
            '{' => {
                let (count, after) = counted(after);
                repeats = repeats.checked_mul(count).ok_or("repeats something too often")?;
                after
            }
            _ => after,
        };
        quantified = quantifies;
    }
    Ok(repeats)
}

/// What follows an escape, which stands without its backslash.
fn after_escape(escape: &str) -> Result<&str, String> {
    let Some(code) = escape.chars().next() else { return Err("ends in a backslash".into()) };
    if matches!(code, '0'..='9' | 'k' | 'g' | 'K' | 'G' | 'R' | 'X' | 'Z') {
        return Err(format!("has an escape \\{code}, which is not supported"));
    }
    let after = &escape[code.len_utf8()..];
    match after.strip_prefix('{') {
        // A class or a character by its name or number.
        Some(name) if matches!(code, 'p' | 'P' | 'x' | 'u' | 'U') => {
            name.split_once('}').map(|(_, after)| after).ok_or_else(|| "has a name without end".into())
        }
        _ => Ok(after),
    }
}

/// What follows a class of characters, which stands without its opening bracket.
fn after_class(class: &str) -> Result<&str, String> {
    let class = class.strip_prefix('^').unwrap_or(class);
    let mut rest = class.strip_prefix(']').unwrap_or(class);
    let mut depth = 1;
    while depth > 0 {
        let c = rest.chars().next().ok_or("has a class without end")?;
        rest = &rest[c.len_utf8()..];
        match c {
            '\\' => rest = after_escape(rest)?,
            '[' => depth += 1,
            ']' => depth -= 1,
            _ => {}
        }
    }
    Ok(rest)
}

/// What follows the opening of a group, which stands without its parenthesis.
fn after_opening(group: &str) -> Result<&str, String> {
    if group.starts_with('*') {
        return Err("has a verb, which is not supported".into());
    }
    let Some(kind) = group.strip_prefix('?') else { return Ok(group) };
    let kind = kind.trim_start_matches(['i', 'm', 's', 'u', 'U', '-']);
    let plain = kind.strip_prefix([':', ')']);
    let named = kind.strip_prefix("P<").or_else(|| kind.strip_prefix('<')).filter(|name| !name.starts_with(['=', '!']));
    plain
        .or(named)
        .ok_or_else(|| r"looks around or has a group that is not supported; only `\s+(?!\S)` at its end is".to_owned())
}

/// How often something is repeated, and what follows; a brace that opens no repetition is a character.
fn counted(repetition: &str) -> (usize, &str) {
    let Some((counts, after)) = repetition.split_once('}') else { return (1, repetition) };
    let (least, most) = counts.split_once(',').unwrap_or((counts, counts));
    let digits = |text: &str| text.trim().bytes().all(|b| b.is_ascii_digit());
    if !digits(least) || !digits(most) {
        return (1, repetition);
    }
    let number = |text: &str| if text.trim().is_empty() { 1 } else { text.trim().parse().unwrap_or(usize::MAX) };
    (number(least).max(number(most)).max(1), after)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pattern_that_tries_many_ways_is_told_from_one_that_does_not() {
        for (pattern, expected) in [
            (r"'s|'t| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", Some(1)),
            (r"(?i:'s|'t)|[^\r\n\p{L}]?\p{L}{2}|\p{N}{1,3}|\s+(?!\S)", Some(6)),
            (r"\s+(?!\S)", Some(1)),
            (r"[*+]|[]+*+]|[^]*+]|\+\++|[[:alpha:]*+]", Some(1)),
            (r"\x{41}{3}|\u{0041}{,4}|a{5,}|{x}|a{6", Some(60)),
            (r"(?P<name>a)|(?<other>b)|(?-i)c", Some(1)),
            (r"a\|\s+(?!\S)", None),
            (r"a\\|\s+(?!\S)", Some(1)),
            (r"a\s+(?!\S)", None),
            (r"(\s+(?!\S)|a)", None),
            (r"(?=a)", None),
            (r"(?<=a)", None),
            (r"(?<!a)", None),
            (r"(?>a)", None),
            (r"(?(a)b)", None),
            (r"(?P=a)", None),
            (r"(?P>a)", None),
            (r"(a)\1", None),
            (r"a++", None),
            (r"a{2}+", None),
            (r"(*FAIL)", None),
            (r"a\", None),
            (r"[a", None),
            (r"\p{L", None),
            (r"a{99999999999999999999}", Some(usize::MAX)),
        ] {
            assert_eq!(repeats(without_tail(pattern)).ok(), expected, "{pattern}");
        }
    }

    #[test]
    fn what_parts_make_of_text_is_multiplied() {
        let replace = |content: &str| json!({"type": "Replace", "pattern": {"String": " "}, "content": content});
        let sequence = |parts: Vec<Value>| json!({"normalizer": {"type": "Sequence", "normalizers": parts}});
        let llama = sequence(vec![json!({"type": "Prepend", "prepend": "▁"}), replace("▁")]);
        assert_eq!(check(&llama), Ok(()));
        assert_eq!(check(&json!({"pre_tokenizer": null})), Ok(()));
        assert_eq!(check(&sequence(vec![replace("12345678"); 3])), Ok(()));
        assert!(check(&sequence(vec![replace("12345678"); 4])).is_err_and(|e| e.contains("512 times")));
        assert!(check(&sequence(vec![replace(""); 32])).is_ok());
        assert!(check(&sequence(vec![replace(""); 33])).is_err());
        let nested = (0..5).fold(replace(""), |part, _| json!({"type": "Sequence", "normalizers": [part]}));
        assert!(check(&json!({"normalizer": nested})).is_err_and(|e| e.contains("too deeply")));
        for part in [json!({"type": "Precompiled"}), json!({}), json!(7), json!({"type": "Prepend"})] {
            assert!(check(&json!({"normalizer": part})).is_err(), "{part}");
        }
    }
}
