//! What outlives the process: stores, the snapshot codec, the archive of states and sessions.

mod support {
    pub mod store;
}
#[path = "state/archive.rs"]
mod archive;
#[path = "state/branches.rs"]
mod branches;
#[path = "state/bucket.rs"]
mod bucket;
#[path = "state/codec.rs"]
mod codec;
#[path = "state/kill.rs"]
mod kill;
#[path = "state/sessions.rs"]
mod sessions;
#[path = "state/store.rs"]
mod store;

use std::collections::BTreeMap;

use rewake::types::{Memory, Pending, SegmentData, SessionId, Snapshot, SnapshotHead, StateId, Tenant, TurnRecord};

fn tenant(name: &str) -> Tenant {
    Tenant::parse(name).unwrap()
}

fn session(name: &str) -> SessionId {
    SessionId::parse(name).unwrap()
}

/// A state id that sorts by `n`.
fn id(n: u64) -> StateId {
    StateId::new(1_700_000_000_000 + n, 0xfeed)
}

/// A small snapshot of tenant `a`, with something in every field.
fn snapshot(n: u64) -> Snapshot {
    let head = SnapshotHead {
        id: id(n),
        parent: (n > 0).then(|| id(n - 1)),
        owner: tenant("a"),
        model: "demo".into(),
        fingerprint: "b3".into(),
        arithmetic: "1".into(),
        session: None,
        record: None,
        turn: n,
        created: 100 + n,
        expires_at: None,
        metadata: BTreeMap::from([("note".into(), "\"quoted\" ü".into())]),
    };
    let memory = Memory {
        segments: vec![
            SegmentData {
                name: "z.first".into(),
                shape: vec![2, 2],
                data: vec![n as f32, -0.0, f32::MIN_POSITIVE / 2.0, 3.5],
            },
            SegmentData { name: "a.second".into(), shape: vec![1], data: vec![f32::MAX] },
        ],
        consumed: 41,
        pending: Pending { ends: vec![7], goes_on: vec![7, 8], unseen: 2, begun: true },
        tail: vec![1, 2, 3],
        counts: vec![(5, 0.5), (9, 1.0)],
    };
    Snapshot { head, memory }
}

/// The same snapshot, made by a session.
fn made_by(n: u64, session: &SessionId) -> Snapshot {
    let mut snapshot = snapshot(n);
    snapshot.head.session = Some(session.clone());
    snapshot.head.record = Some(n);
    snapshot
}

/// A turn that reached state `n`.
fn turn(n: u64) -> TurnRecord {
    TurnRecord {
        state: Some(id(n)),
        parent: (n > 0).then(|| id(n - 1)),
        model: "demo".into(),
        fingerprint: "b3".into(),
        beginning: None,
        messages: Vec::new(),
        text: Some(format!("text {n}")),
        answer: "answer".into(),
        finish: None,
        takes_back: 0,
        ids: vec![1, 2, 3],
        answer_ids: 1,
        resume: None,
        response_id: format!("cmpl-{n}"),
        seed: n,
        usage: Default::default(),
        idempotency_key: None,
        tokens: 42,
        bytes: 20,
        created: 100 + n,
        expires_at: None,
    }
}
