//! Snapshots that lie: each has the checksum that belongs to it.

use rewake::state;
use rewake::types::{Memory, Pending, SegmentData, Snapshot, SnapshotHead, StateId, Tenant};

use super::seeds::raw;
use super::{readers, within};

pub fn sound() -> Vec<u8> {
    let segment = |name: &str, shape: &[usize]| {
        let data = vec![0.5; shape.iter().product()];
        SegmentData { name: name.into(), shape: shape.into(), data }
    };
    let memory = Memory {
        segments: vec![segment("blocks.0.att.shift", &[4]), segment("blocks.0.att.wkv", &[1, 4, 4])],
        consumed: 7,
        pending: Pending { ends: vec![1, 2], goes_on: vec![3], ..Pending::default() },
        tail: vec![5, 6],
        counts: vec![(5, 1.0), (6, 0.5)],
    };
    let head = SnapshotHead {
        id: StateId::new(1, 1),
        parent: None,
        owner: Tenant::local(),
        model: "m".into(),
        fingerprint: "f".into(),
        arithmetic: "a".into(),
        session: None,
        record: None,
        turn: 1,
        created: 1,
        expires_at: None,
        metadata: [("k".into(), "v".into())].into(),
    };
    state::encode(&Snapshot { head, memory }).expect("a sound snapshot")
}

/// The same with the checksum that belongs to it.
pub fn sealed(mut file: Vec<u8>) -> Vec<u8> {
    if let Some((body, end)) = file.split_last_chunk_mut::<32>() {
        end.copy_from_slice(blake3::hash(body).as_bytes());
    }
    file
}

fn snapshot(what: &str, file: &[u8]) -> Result<(), String> {
    within(what, file.len(), 64, || readers::snapshot(file))
}

#[test]
fn a_snapshot_that_lies_is_refused() {
    let file = sound();
    let length = u64::from_le_bytes(*file.first_chunk().expect("a length")) as usize;
    let header = std::str::from_utf8(&file[8..8 + length]).expect("JSON").trim_end().to_owned();
    let values = &file[8 + length..];
    assert!(snapshot("sound", &sealed(raw(&header, values))).is_ok(), "what is made here is a snapshot");
    for (from, to) in [
        ("\"shape\":[1,4,4]", "\"shape\":[4294967296,4294967296,4]"),
        ("\"shape\":[1,4,4]", "\"shape\":[0,1152921504606846976,4]"),
        ("\"shape\":[1,4,4]", "\"shape\":[4,4,4]"),
        ("\"shape\":[4]", "\"shape\":[-4]"),
        ("\"shape\":[32]", "\"shape\":[31]"),
        ("\"F32\"", "\"F64\""),
        ("\"U32\"", "\"F4\""),
        ("\\\"consumed\\\":7", "\\\"consumed\\\":18446744073709551615"),
        ("\\\"consumed\\\":7", "\\\"consumed\\\":1e999"),
        ("\\\"format\\\":1", "\\\"format\\\":4294967295"),
        ("\\\"turn\\\":1", "\\\"turn\\\":-1"),
        ("\\\"metadata\\\":{", "\\\"metadata\\\":{\\\"metadata\\\":{"),
        ("blocks.0.att.shift", "blocks.0.att.\\u0000\\u001b"),
        ("\"__metadata__\":{", "\"__metadata__\":[["),
        ("{", "[[[["),
    ] {
        let forged = header.replacen(from, to, 1);
        assert_ne!(forged, header, "{from}");
        snapshot(to, &sealed(raw(&forged, values))).expect_err(to);
    }
    for (what, file) in [
        ("nothing", vec![]),
        ("one byte", vec![1]),
        ("a checksum of nothing", sealed(vec![0; 32])),
        ("an endless header", sealed([&u64::MAX.to_le_bytes()[..], &[0; 64]].concat())),
        ("a header that ends where numbers do", sealed([&(u64::MAX - 7).to_le_bytes()[..], &[0; 64]].concat())),
        ("deep JSON", sealed(raw(&"[".repeat(100_000), &[0; 32]))),
        (
            "deep JSON in JSON",
            sealed(raw(&format!(r#"{{"__metadata__":{{"rewake":"{}"}}}}"#, "[".repeat(100_000)), &[])),
        ),
        ("a long name", sealed(raw(&header.replacen("blocks.0.att.wkv", &"n".repeat(100_000), 1), values))),
    ] {
        snapshot(what, &file).expect_err(what);
    }
}
