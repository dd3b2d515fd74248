//! Text that tells whether it is what was written there: a line of JSON, and a line with the BLAKE3 of its key and of it in
//! hexadecimal digits. So what was moved to another key, such as into another session, is as damaged as what was changed.

use serde::{Deserialize, Serialize};

use super::Damaged;

/// What is stored of a value under `key`; the value is text and numbers under text keys.
pub(super) fn seal(key: &str, value: &impl Serialize) -> Vec<u8> {
    let json = serde_json::to_string(value).expect("it is text and numbers under text keys");
    format!("{json}\n{}\n", hash(key, json.as_bytes()).to_hex()).into_bytes()
}

/// The value in `bytes`, which are stored under `key`.
pub(super) fn open<'a, T: Deserialize<'a>>(key: &str, bytes: &'a [u8]) -> Result<T, Damaged> {
    let lines = bytes.strip_suffix(b"\n").and_then(|text| {
        let at = text.iter().rposition(|b| *b == b'\n')?;
        Some((&text[..at], &text[at + 1..]))
    });
    let (json, written) = lines.ok_or_else(|| Damaged("it is cut off".into()))?;
    // Compared as text: another spelling of the same digits is not what was written.
    let is = |hash: blake3::Hash| hash.to_hex().as_bytes() == written;
    // Versions before this one did not say where.
    if !is(hash(key, json)) && !is(blake3::hash(json)) {
        return Err(Damaged("the checksum does not match the contents, or they were stored elsewhere".into()));
    }
    serde_json::from_slice(json).map_err(|e| Damaged(format!("it cannot be read: {e}")))
}

fn hash(key: &str, json: &[u8]) -> blake3::Hash {
    // No key has a line break in it.
    blake3::Hasher::new().update(key.as_bytes()).update(b"\n").update(json).finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let whole = seal("t/a/x", &"text");
        assert_eq!(open::<String>("t/a/x", &whole), Ok("text".into()));
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                assert!(open::<String>("t/a/x", &bytes).is_err(), "bit {bit} of byte {at}");
            }
            assert!(open::<String>("t/a/x", &whole[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_was_stored_elsewhere_is_not_believed() {
        for other in ["t/a/y", "t/b/x", ""] {
            assert!(
                open::<String>(other, &seal("t/a/x", &"text")).is_err_and(|Damaged(why)| why.contains("elsewhere"))
            );
        }
    }
}
