//! A turn record as bytes: a line of JSON and a line with its BLAKE3 in hexadecimal digits.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::Damaged;
use crate::types::TurnRecord;

/// Version of the layout, in every record.
const FORMAT: u32 = 1;

/// One record of a session, with its place in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its number, from 1; numbers go on after a deletion.
    pub turn: u64,
    /// The number of the session's first record since it was last deleted.
    pub first: u64,
    /// When that first record was made, in Unix seconds.
    pub began: u64,
    pub record: TurnRecord,
}

/// `first` and `began` are handed on from record to record, so that the head alone tells where its session begins.
#[derive(Serialize, Deserialize)]
struct Stored<'a> {
    format: u32,
    turn: u64,
    first: u64,
    began: u64,
    record: Cow<'a, TurnRecord>,
}

pub(super) fn encode(entry: &Entry) -> Vec<u8> {
    let Entry { turn, first, began, record } = entry;
    let record = Cow::Borrowed(record);
    let stored = Stored { format: FORMAT, turn: *turn, first: *first, began: *began, record };
    let json = serde_json::to_string(&stored).expect("a record is text and numbers under text keys");
    format!("{json}\n{}\n", blake3::hash(json.as_bytes()).to_hex()).into_bytes()
}

/// The record in `bytes`, which were stored as number `turn`.
pub(super) fn decode(bytes: &[u8], turn: u64) -> Result<Entry, Damaged> {
    let lines = bytes.strip_suffix(b"\n").and_then(|text| {
        let at = text.iter().rposition(|b| *b == b'\n')?;
        Some((&text[..at], &text[at + 1..]))
    });
    let (json, hash) = lines.ok_or_else(|| Damaged("it is cut off".into()))?;
    // Compared as text: another spelling of the same digits is not what was written.
    if blake3::hash(json).to_hex().as_bytes() != hash {
        return Err(Damaged("the checksum does not match the contents".into()));
    }
    let stored: Stored = serde_json::from_slice(json).map_err(|e| Damaged(format!("it cannot be read: {e}")))?;
    if stored.format != FORMAT {
        let known = format!("it has format version {}; this program knows version {FORMAT}", stored.format);
        return Err(Damaged(known));
    }
    if stored.turn != turn || !(1..=turn).contains(&stored.first) {
        return Err(Damaged(format!("it is the record of turn {} since {}", stored.turn, stored.first)));
    }
    Ok(Entry { turn, first: stored.first, began: stored.began, record: stored.record.into_owned() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::{Beginning, Message, Role, StateId, TurnUsage};

    fn entry() -> Entry {
        let record = TurnRecord {
            state: Some(StateId::new(7, 9)),
            parent: None,
            model: "demo".into(),
            fingerprint: "f".into(),
            beginning: Some(Beginning { name: Some("poet".into()), fingerprint: "b3".into() }),
            messages: vec![Message { role: Role::User, content: "line\nbreak \u{2028} ü".into(), name: None }],
            text: None,
            answer: "a".into(),
            finish: None,
            takes_back: 0,
            ids: vec![1, 2, u32::MAX],
            answer_ids: 1,
            response_id: "cmpl-1".into(),
            seed: u64::MAX,
            usage: TurnUsage::default(),
            idempotency_key: Some("k".into()),
            tokens: 3,
            bytes: 4,
            created: 5,
            expires_at: None,
        };
        Entry { turn: 4, first: 2, began: 1, record }
    }

    #[test]
    fn records_come_back_and_are_one_line_of_json() {
        let bytes = encode(&entry());
        assert_eq!(decode(&bytes, 4).unwrap(), entry());
        let text = String::from_utf8(bytes).unwrap();
        let json: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(json["record"]["ids"][2], u32::MAX);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let bytes = encode(&entry());
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&flipped, 4).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len], 4).is_err(), "length {len}");
        }
    }

    #[test]
    fn a_record_under_another_number_or_of_another_version_is_refused() {
        let bytes = encode(&entry());
        assert!(decode(&bytes, 5).unwrap_err().0.contains("turn 4"));
        let text = String::from_utf8(bytes).unwrap();
        let json = text.lines().next().unwrap().replace(r#""format":1"#, r#""format":2"#);
        let newer = format!("{json}\n{}\n", blake3::hash(json.as_bytes()).to_hex());
        assert!(decode(newer.as_bytes(), 4).unwrap_err().0.contains("version 2"));
    }

    #[test]
    fn a_record_from_before_initial_states_is_read() {
        let text = String::from_utf8(encode(&entry())).unwrap();
        let json = text.lines().next().unwrap();
        let older = json.replace(r#""beginning":{"name":"poet","fingerprint":"b3"},"#, "");
        assert_ne!(older, json);
        let bytes = format!("{older}\n{}\n", blake3::hash(older.as_bytes()).to_hex());
        assert_eq!(decode(bytes.as_bytes(), 4).unwrap().record.beginning, None);
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode(&bytes, 1).is_err());
        }
    }
}
