//! A turn record as bytes, [sealed](super::sealed).

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Damaged;
use super::sealed::{open, seal};
use crate::types::{SessionId, TurnRecord};

/// Version of the layout, in every record.
const FORMAT: u32 = 1;

/// One record of a session, with its place in it.
///
/// The turns of a session are its records one after another, but for where it was forked or rewound: such a record is a
/// copy of the turn gone back to, and the turns before it are those before the original. Records from one such place to
/// the next are a *run*.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its number, from 1; numbers go on after a deletion.
    pub turn: u64,
    /// The number of the session's first record since it was last deleted.
    pub first: u64,
    /// When that first record was made, in Unix seconds.
    pub began: u64,
    /// How many turns the session has up to this one.
    pub depth: u64,
    /// The number of the record that its run begins with.
    pub run: u64,
    /// What a record that begins a run goes back to; `None` = it is a turn like others.
    pub back: Option<Back>,
    /// When this record was made, in Unix seconds.
    pub made: u64,
    /// What the client wants to be known of the session.
    pub metadata: BTreeMap<String, String>,
    pub record: TurnRecord,
}

/// Where the original of a copied record is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Back {
    pub to: Place,
    /// The turn before it; `None` = it is the first.
    pub before: Option<Place>,
}

/// A record, and the number that its run begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub session: SessionId,
    pub number: u64,
    pub run: u64,
}

/// What is needed of a session is handed on from record to record, so that the head alone tells it. Where a field is
/// missing, the session was never forked or rewound.
#[derive(Serialize, Deserialize)]
struct Stored<'a> {
    format: u32,
    turn: u64,
    first: u64,
    began: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    depth: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    run: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    back: Option<Cow<'a, Back>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    made: Option<u64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    metadata: Cow<'a, BTreeMap<String, String>>,
    record: Cow<'a, TurnRecord>,
}

/// What is stored of a record under `key`.
pub(super) fn encode(key: &str, entry: &Entry) -> Vec<u8> {
    let stored = Stored {
        format: FORMAT,
        turn: entry.turn,
        first: entry.first,
        began: entry.began,
        depth: Some(entry.depth),
        run: Some(entry.run),
        back: entry.back.as_ref().map(Cow::Borrowed),
        made: Some(entry.made),
        metadata: Cow::Borrowed(&entry.metadata),
        record: Cow::Borrowed(&entry.record),
    };
    seal(key, &stored)
}

/// The record in `bytes`, which were stored under `key` as number `turn`.
pub(super) fn decode(key: &str, bytes: &[u8], turn: u64) -> Result<Entry, Damaged> {
    let stored: Stored = open(key, bytes)?;
    if stored.format != FORMAT {
        let known = format!("it has format version {}; this program knows version {FORMAT}", stored.format);
        return Err(Damaged(known));
    }
    if stored.turn != turn || !(1..=turn).contains(&stored.first) {
        return Err(Damaged(format!("it is the record of turn {} since {}", stored.turn, stored.first)));
    }
    let record = stored.record.into_owned();
    let entry = Entry {
        turn,
        first: stored.first,
        began: stored.began,
        depth: stored.depth.unwrap_or(turn - stored.first + 1),
        run: stored.run.unwrap_or(stored.first),
        back: stored.back.map(Cow::into_owned),
        made: stored.made.unwrap_or(record.created),
        metadata: stored.metadata.into_owned(),
        record,
    };
    let in_run = turn.checked_sub(entry.run).is_some_and(|n| n < entry.depth) && entry.run >= entry.first;
    if !in_run && entry.record.state.is_some() {
        return Err(Damaged(format!("it is turn {} of a run that begins with record {}", entry.depth, entry.run)));
    }
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::{Beginning, Memory, Message, Pending, Resume, Role, StateId, TurnUsage};

    const KEY: &str = "t/a/sessions/s/000000000004";

    /// Counts that no short decimal number is.
    fn memory() -> Memory {
        let pending = Pending { ends: vec![2], goes_on: vec![2, 3], unseen: 1, begun: true };
        Memory { pending, counts: vec![(2, 1.0 / 3.0), (3, f32::from_bits(0x3f80_0001))], ..Memory::default() }
    }

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
            resume: Some(Resume::of(&memory())),
            response_id: "cmpl-1".into(),
            seed: u64::MAX,
            usage: TurnUsage::default(),
            idempotency_key: Some("k".into()),
            tokens: 3,
            bytes: 4,
            created: 5,
            expires_at: None,
        };
        let place = |number| Place { session: SessionId::parse("s").unwrap(), number, run: 1 };
        Entry {
            turn: 4,
            first: 2,
            began: 1,
            depth: 7,
            run: 4,
            back: Some(Back { to: place(7), before: Some(place(6)) }),
            made: 6,
            metadata: BTreeMap::from([("topic".into(), "ü".into())]),
            record,
        }
    }

    #[test]
    fn records_come_back_and_are_one_line_of_json() {
        let bytes = encode(KEY, &entry());
        assert_eq!(decode(KEY, &bytes, 4).unwrap(), entry());
        let text = String::from_utf8(bytes).unwrap();
        let json: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(json["record"]["ids"][2], u32::MAX);
        let resume = entry().record.resume.unwrap();
        assert_eq!((resume.counts(), resume.pending), (memory().counts, memory().pending));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let bytes = encode(KEY, &entry());
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(KEY, &flipped, 4).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(decode(KEY, &bytes[..len], 4).is_err(), "length {len}");
        }
    }

    #[test]
    fn a_record_under_another_number_or_of_another_version_is_refused() {
        let bytes = encode(KEY, &entry());
        assert!(decode(KEY, &bytes, 5).unwrap_err().0.contains("turn 4"));
        let text = String::from_utf8(bytes).unwrap();
        let json = text.lines().next().unwrap().replace(r#""format":1"#, r#""format":2"#);
        let newer = format!("{json}\n{}\n", blake3::hash(json.as_bytes()).to_hex());
        assert!(decode(KEY, newer.as_bytes(), 4).unwrap_err().0.contains("version 2"));
    }

    #[test]
    fn a_record_of_an_older_version_is_read() {
        let text = String::from_utf8(encode(KEY, &entry())).unwrap();
        let json = text.lines().next().unwrap();
        let mut older: serde_json::Value = serde_json::from_str(json).unwrap();
        let fields = older.as_object_mut().unwrap();
        fields.retain(|name, _| ["format", "turn", "first", "began", "record"].contains(&name.as_str()));
        fields["record"].as_object_mut().unwrap().retain(|name, _| !["beginning", "resume"].contains(&name.as_str()));
        let older = older.to_string();
        let bytes = format!("{older}\n{}\n", blake3::hash(older.as_bytes()).to_hex());
        let read = decode(KEY, bytes.as_bytes(), 4).unwrap();
        assert_eq!((read.record.beginning, read.record.resume), (None, None));
        assert_eq!((read.depth, read.run, read.back, read.made), (3, 2, None, 5));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode(KEY, &bytes, 1).is_err());
        }
    }
}
