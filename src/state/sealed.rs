//! Text that tells whether it is what was written: a line of JSON and a line with its BLAKE3 in hexadecimal digits.

use serde::{Deserialize, Serialize};

use super::Damaged;

/// What is stored of a value, which is text and numbers under text keys.
pub(super) fn seal(value: &impl Serialize) -> Vec<u8> {
    let json = serde_json::to_string(value).expect("it is text and numbers under text keys");
    format!("{json}\n{}\n", blake3::hash(json.as_bytes()).to_hex()).into_bytes()
}

/// The value in `bytes`.
pub(super) fn open<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Damaged> {
    let lines = bytes.strip_suffix(b"\n").and_then(|text| {
        let at = text.iter().rposition(|b| *b == b'\n')?;
        Some((&text[..at], &text[at + 1..]))
    });
    let (json, hash) = lines.ok_or_else(|| Damaged("it is cut off".into()))?;
    // Compared as text: another spelling of the same digits is not what was written.
    if blake3::hash(json).to_hex().as_bytes() != hash {
        return Err(Damaged("the checksum does not match the contents".into()));
    }
    serde_json::from_slice(json).map_err(|e| Damaged(format!("it cannot be read: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let whole = seal(&"text");
        assert_eq!(open::<String>(&whole), Ok("text".into()));
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                assert!(open::<String>(&bytes).is_err(), "bit {bit} of byte {at}");
            }
            assert!(open::<String>(&whole[..at]).is_err(), "cut at {at}");
        }
    }
}
