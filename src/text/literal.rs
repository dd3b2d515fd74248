//! Python string and bytes literals, as `repr` writes them.

/// The bytes a Python literal stands for: `'…'` or `"…"` as UTF-8, `b'…'` or `b"…"` as they are.
///
/// Never longer than the literal. Escapes follow Python's reference, section "String and Bytes literals", without
/// `\N{…}`, which `repr` never writes.
pub(super) fn parse(literal: &str) -> Result<Vec<u8>, &'static str> {
    let (is_bytes, quoted) = match literal.strip_prefix('b') {
        Some(rest) => (true, rest),
        None => (false, literal),
    };
    let quote = quoted.chars().next().filter(|c| matches!(c, '\'' | '"')).ok_or("the literal has no quotes")?;
    let inner = quoted[1..].strip_suffix(quote).ok_or("the literal does not end with the quote it begins with")?;
    unescape(inner, is_bytes, Some(quote))
}

/// The bytes of what stands between the quotes of a literal, in which `quote` must not stand by itself.
pub(super) fn unescape(mut rest: &str, is_bytes: bool, quote: Option<char>) -> Result<Vec<u8>, &'static str> {
    let mut bytes = Vec::with_capacity(rest.len());
    while let Some(at) = rest.find(|c| c == '\\' || Some(c) == quote) {
        let (plain, special) = rest.split_at(at);
        push_plain(&mut bytes, plain, is_bytes)?;
        rest = special.strip_prefix('\\').ok_or("an unescaped quote inside the literal")?;
        rest = escape(&mut bytes, rest, is_bytes)?;
    }
    push_plain(&mut bytes, rest, is_bytes)?;
    Ok(bytes)
}

/// The inside of a bytes literal, as `repr` writes it; a quote stands as it is.
pub(super) fn escape_bytes(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        match byte {
            b'\\' => text += r"\\",
            b'\n' => text += r"\n",
            b'\r' => text += r"\r",
            b'\t' => text += r"\t",
            0x20..=0x7e => text.push(byte as char),
            _ => text += &format!("\\x{byte:02x}"),
        }
    }
    text
}

fn push_plain(bytes: &mut Vec<u8>, plain: &str, is_bytes: bool) -> Result<(), &'static str> {
    if is_bytes && !plain.is_ascii() {
        return Err("a bytes literal may only hold ASCII characters");
    }
    bytes.extend_from_slice(plain.as_bytes());
    Ok(())
}

/// Reads what follows a backslash and returns what is left.
fn escape<'a>(bytes: &mut Vec<u8>, text: &'a str, is_bytes: bool) -> Result<&'a str, &'static str> {
    let code = text.chars().next().ok_or("a lone backslash at the end")?;
    let after = &text[code.len_utf8()..];
    let simple = match code {
        '\\' | '\'' | '"' => Some(code as u8),
        'n' => Some(b'\n'),
        'r' => Some(b'\r'),
        't' => Some(b'\t'),
        'a' => Some(0x07),
        'b' => Some(0x08),
        'f' => Some(0x0c),
        'v' => Some(0x0b),
        _ => None,
    };
    if let Some(byte) = simple {
        bytes.push(byte);
        return Ok(after);
    }
    let (value, rest) = match code {
        'x' => digits(after, 2, 16)?,
        'u' if !is_bytes => digits(after, 4, 16)?,
        'U' if !is_bytes => digits(after, 8, 16)?,
        'N' if !is_bytes => return Err("\\N{…} escapes are not supported"),
        '0'..='7' => {
            let count = text.bytes().take(3).take_while(|b| matches!(b, b'0'..=b'7')).count();
            digits(text, count, 8)?
        }
        // Python keeps the backslash of an escape it does not know.
        _ => {
            bytes.push(b'\\');
            return Ok(text);
        }
    };
    if is_bytes {
        bytes.push(u8::try_from(value).map_err(|_| "an octal escape above \\377")?);
    } else {
        let character = char::from_u32(value).ok_or("an escape that is not a Unicode character")?;
        bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
    }
    Ok(rest)
}

/// A number of exactly `count` digits, and what follows it.
fn digits(text: &str, count: usize, radix: u32) -> Result<(u32, &str), &'static str> {
    let number = text.get(..count).filter(|n| n.chars().all(|c| c.is_digit(radix))).ok_or("a broken escape")?;
    let value = u32::from_str_radix(number, radix).map_err(|_| "a broken escape")?;
    Ok((value, &text[count..]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn escapes_are_pythons() {
        let cases: &[(&str, &[u8])] = &[
            (r"''", b""),
            (r"'a b'", b"a b"),
            (r#""it's""#, b"it's"),
            (r#"'\'"'"#, b"'\""),
            (r"'\x80'", "\u{80}".as_bytes()),
            (r"b'\x80\xff'", b"\x80\xff"),
            (r"'\n\r\t\\\a\b\f\v\0'", b"\n\r\t\\\x07\x08\x0c\x0b\0"),
            (r"'\u00e9\U0001f642'", "é🙂".as_bytes()),
            (r"b'\u00e9'", b"\\u00e9"),
            (r"'\101\1018\7'", b"AA8\x07"),
            (r"'\q\é'", "\\q\\é".as_bytes()),
            (r"'\400'", "\u{100}".as_bytes()),
            ("'é'", "é".as_bytes()),
        ];
        for (literal, bytes) in cases {
            assert_eq!(parse(literal).as_deref(), Ok(*bytes), "{literal}");
        }
    }

    #[test]
    fn broken_literals_are_refused() {
        for bad in [
            "",
            "'",
            "b",
            "b'",
            "a",
            "'a\"",
            "'a'b'",
            r"'\'",
            r"'\x8'",
            r"'\xé0'",
            r"'\ud800'",
            r"'\U00110000'",
            r"'\x+1'",
            r"b'\400'",
            "b'é'",
            r"'\N{DASH}'",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn bytes_survive_being_written(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let inside = escape_bytes(&bytes);
            prop_assert_eq!(&unescape(&inside, true, None), &Ok(bytes.clone()));
            let literal = format!("b'{}'", inside.replace('\'', r"\'"));
            prop_assert_eq!(parse(&literal), Ok(bytes));
        }

        #[test]
        fn nothing_panics(text in "[bxuUN0-9'\"\\\\é{}]{0,12}") {
            if let Ok(bytes) = parse(&text) {
                prop_assert!(bytes.len() < text.len());
            }
        }
    }
}
