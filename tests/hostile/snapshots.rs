//! Snapshots that lie: each has the checksum that belongs to it.

use rewake::model::{Checkpoint, LoadOptions, Model, load};
use rewake::state::{self, Precision, Storage};
use rewake::types::{Memory, Pending, Row, SegmentData, SeqId, SlotId, Snapshot, SnapshotHead, StateId, Tenant, Want};
use serde_json::{Value, json};

use super::seeds::{self, raw, small};
use super::sweep::harmed;
use super::{readers, within};

/// A small sound model of a generation.
pub fn model(case: &str) -> Model {
    let checkpoint = Checkpoint::in_memory("seed", seeds::safetensors(&small(case, 16))).expect("a sound file");
    load(&checkpoint, &LoadOptions::default()).expect("a sound model")
}

/// A state of `model` that has read three tokens.
pub fn state_of(model: &mut Model) -> Vec<u8> {
    let (mut pool, slot) = (model.pool(1).expect("a slot"), SlotId(0));
    pool.reset(slot);
    let row = Row { seq: SeqId(0), from: slot, into: slot, at: 0, tokens: 0..3, want: Want::Nothing };
    model.step(&mut pool, &[1, 2, 3], &[row], &mut Vec::new()).expect("a step");
    let mut snapshot = state::decode(&sound()).expect("a sound file");
    snapshot.memory = Memory { segments: pool.snapshot(slot), consumed: 3, tail: vec![1, 2, 3], ..snapshot.memory };
    snapshot.memory.counts = vec![(2, 0.5)];
    state::encode(&snapshot).expect("a sound file")
}

#[test]
fn a_state_that_is_brought_can_be_gone_on_with_or_is_refused() {
    for case in seeds::CASES {
        let mut model = model(case);
        let file = state_of(&mut model);
        readers::import(&mut model, &file).unwrap_or_else(|e| panic!("{case}: {e}"));
        let mut let_in = 0;
        for (harm, file) in harmed(&file, 5, 60) {
            let file = sealed(file);
            let what = format!("{case}, {harm}");
            let_in += usize::from(within(&what, file.len(), 256, || readers::import(&mut model, &file)).is_ok());
        }
        assert!(let_in > 0, "{case}: most values may be anything");
        let elsewhere = readers::import(&mut self::model("v7_bf16"), &file);
        assert_eq!(elsewhere.is_ok(), case == "v7_bf16", "{case} for v7: {elsewhere:?}");
    }
}

/// A sound state in every way to store it.
pub fn stored() -> Vec<Vec<u8>> {
    let snapshot = state::decode(&state_of(&mut model("v7_bf16"))).expect("a sound file");
    let all = [Precision::F32, Precision::F16, Precision::Int8].into_iter();
    let all = all.flat_map(|precision| [false, true].map(|compress| Storage { precision, compress }));
    all.map(|storage| state::encode_as(&snapshot, storage).expect("it can be stored")).collect()
}

/// A sealed file whose only segment, of so many values, is in this compressed body.
fn packed(values: usize, body: &[u8]) -> Vec<u8> {
    let sound = sound();
    let length = u64::from_le_bytes(*sound.first_chunk().expect("a length")) as usize;
    let header: Value = serde_json::from_slice(&sound[8..8 + length]).expect("JSON");
    let meta = header["__metadata__"]["rewake"].as_str().expect("our metadata");
    let mut meta: Value = serde_json::from_str(meta).expect("JSON");
    (meta["format"], meta["segments"]) = (json!(2), json!(["z"]));
    meta["body"] = json!([{"dtype": "F32", "shape": [values]}]);
    let end = 8 + body.len();
    let header = json!({
        "__metadata__": {"rewake": meta.to_string()},
        "counts.values": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        "counts.ids": {"dtype": "U32", "shape": [0], "data_offsets": [0, 0]},
        "tail": {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]},
        "body.zstd": {"dtype": "U8", "shape": [body.len()], "data_offsets": [8, end]},
        "checksum": {"dtype": "U8", "shape": [32], "data_offsets": [end, end + 32]},
    });
    sealed(raw(&header.to_string(), &[&[1, 0, 0, 0, 2, 0, 0, 0], body, &[0; 32]].concat()))
}

#[test]
fn a_bomb_is_not_set_off() {
    let squeezed = |bytes: &[u8]| zstd::stream::encode_all(bytes, 3).expect("it is compressed");
    let values = |n: usize| (0..n).flat_map(|i| (i as f32).sin().to_le_bytes()).collect::<Vec<u8>>();
    snapshot("sound", &packed(1000, &squeezed(&values(1000)))).expect("what is made here is a snapshot");
    let zeros = squeezed(&vec![0; 64 << 20]);
    for values in [16 << 20, 1 << 40, usize::MAX] {
        let error = snapshot("a bomb", &packed(values, &zeros)).expect_err("a bomb");
        assert!(error.contains("cannot be in a file"), "{error}");
    }
    for (what, body) in [
        ("more than it says", zeros),
        ("more by a byte", squeezed(&[&values(1000)[..], &[0]].concat())),
        ("less", squeezed(&values(999))),
        ("two frames", [squeezed(&values(500)), squeezed(&values(500))].concat()),
        ("something behind it", [&squeezed(&values(1000))[..], &[0; 9]].concat()),
        ("nothing", Vec::new()),
        ("no frame", values(1000)),
    ] {
        snapshot(what, &packed(1000, &body)).expect_err(what);
    }
    // A window that the decoder would need 128 MB for.
    let mut wide = zstd::stream::Encoder::new(Vec::new(), 3).expect("an encoder");
    wide.window_log(27).and_then(|()| std::io::Write::write_all(&mut wide, &values(1000))).expect("it is compressed");
    let error = snapshot("a wide window", &packed(1000, &wide.finish().expect("it ends"))).expect_err("a wide window");
    assert!(error.contains("body cannot be read"), "{error}");
}

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
