//! The snapshot format: exact, deterministic, readable by others, and suspicious.

use proptest::prelude::*;
use rewake::state::{Info, Precision, Storage, decode, decode_head, encode, encode_as, head_len};
use rewake::types::{Memory, Pending, SegmentData, Snapshot, TAIL};
use safetensors::{Dtype, SafeTensors};

use super::snapshot;

/// Bits, so that -0.0 is not 0.0.
fn bits(snapshot: &Snapshot) -> Vec<Vec<u32>> {
    let counts = snapshot.memory.counts.iter().map(|(_, x)| x.to_bits()).collect();
    let segments = snapshot.memory.segments.iter().map(|s| s.data.iter().map(|x| x.to_bits()).collect());
    segments.chain([counts]).collect()
}

/// The file with its checksum made right again, as a forger would.
fn resealed(mut file: Vec<u8>) -> Vec<u8> {
    let end = file.len() - 32;
    let hash = blake3::hash(&file[..end]);
    file[end..].copy_from_slice(hash.as_bytes());
    file
}

/// A sealed file with `from` replaced by `to` (of the same length) in its header.
fn forged(from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut file = encode(&snapshot(1)).unwrap();
    let at = file.windows(from.len()).position(|w| w == from.as_bytes()).unwrap_or_else(|| panic!("no {from}"));
    file[at..at + to.len()].copy_from_slice(to.as_bytes());
    resealed(file)
}

fn refusal(snapshot: &Snapshot) -> String {
    encode(snapshot).unwrap_err().0
}

#[test]
fn the_file_is_a_safetensors_file_that_ends_in_its_checksum() {
    let file = encode(&snapshot(1)).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut names = tensors.names();
    names.sort_unstable();
    assert_eq!(names, ["a.second", "checksum", "counts.ids", "counts.values", "tail", "z.first"]);
    let first = tensors.tensor("z.first").unwrap();
    assert_eq!((first.dtype(), first.shape()), (Dtype::F32, &[2, 2][..]));
    let checksum = tensors.tensor("checksum").unwrap();
    assert_eq!((checksum.dtype(), checksum.data()), (Dtype::U8, &file[file.len() - 32..]));
    assert_eq!(checksum.data(), blake3::hash(&file[..file.len() - 32]).as_bytes());
    let (_, header) = SafeTensors::read_metadata(&file).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap().keys().collect::<Vec<_>>(), ["rewake"]);
}

#[test]
fn encoding_is_deterministic_and_keeps_the_order_of_segments() {
    let file = encode(&snapshot(1)).unwrap();
    for _ in 0..20 {
        assert_eq!(encode(&snapshot(1)).unwrap(), file);
    }
    let names: Vec<String> = decode(&file).unwrap().memory.segments.into_iter().map(|s| s.name).collect();
    assert_eq!(names, ["z.first", "a.second"]);
}

#[test]
fn the_start_tells_head_tokens_and_bytes() {
    let (whole, file) = (snapshot(1), encode(&snapshot(1)).unwrap());
    let size = file.len() as u64;
    let len = head_len(&file[..8], size).unwrap();
    let info = decode_head(&file[..len], size).unwrap();
    assert_eq!((info.head, info.tokens, info.bytes), (whole.head, 42, 20));
    assert!(decode_head(&file[..len - 1], size).unwrap_err().0.contains("cut off"));
    assert!(decode_head(&file[..len], size - 1).unwrap_err().0.contains("its tensors are"));
}

#[test]
fn every_flipped_bit_and_every_cut_of_a_small_file_is_noticed() {
    let file = encode(&snapshot(1)).unwrap();
    for bit in 0..file.len() * 8 {
        let mut flipped = file.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&flipped).is_err(), "bit {bit}");
    }
    for len in 0..file.len() {
        assert!(decode(&file[..len]).is_err(), "length {len}");
    }
    let longer = [&file[..], &[0]].concat();
    assert!(decode(&longer).is_err());
}

#[test]
fn what_cannot_be_resumed_is_never_written() {
    let mut s = snapshot(1);
    s.memory.segments[0].data[1] = f32::NAN;
    assert_eq!(refusal(&s), "segment `z.first` is not finite: value 1 is NaN");
    let mut s = snapshot(1);
    s.memory.segments[1].data[0] = f32::NEG_INFINITY;
    assert_eq!(refusal(&s), "segment `a.second` is not finite: value 0 is -inf");
    let mut s = snapshot(1);
    s.memory.segments[0].shape = vec![3, 2];
    assert_eq!(refusal(&s), "segment `z.first` has 4 values and shape [3, 2]");
    let mut s = snapshot(1);
    s.memory.segments[0].shape = vec![usize::MAX, 2];
    assert!(refusal(&s).contains("has 4 values"));
    let mut s = snapshot(1);
    s.memory.segments[1].name = "z.first".into();
    assert_eq!(refusal(&s), "segment `z.first` is there twice");
    let mut s = snapshot(1);
    s.memory.segments[1].name = "checksum".into();
    assert_eq!(refusal(&s), "`checksum` cannot be the name of a segment");
    let mut s = snapshot(1);
    s.memory.counts = vec![(9, 1.0), (5, 1.0)];
    assert_eq!(refusal(&s), "its counts are not by ascending id");
    let mut s = snapshot(1);
    s.memory.counts = vec![(9, f32::INFINITY)];
    assert_eq!(refusal(&s), "the count of token 9 is inf");
    let mut s = snapshot(1);
    s.memory.tail = vec![0; TAIL + 1];
    assert_eq!(refusal(&s), "its tail has 4097 ids, more than 4096");
    let mut s = snapshot(1);
    s.memory.consumed = u64::MAX;
    assert_eq!(refusal(&s), "it claims to have read 18446744073709551615 tokens");
}

#[test]
fn a_forged_file_with_a_right_checksum_is_refused_with_the_reason() {
    let why = |from: &str, to: &str| decode(&forged(from, to)).unwrap_err().0;
    assert!(decode(&forged("demo", "made")).is_ok(), "resealing itself works");
    assert_eq!(why(r#"\"format\":1"#, r#"\"format\":3"#), "it has format version 3; this program knows 1 and 2");
    assert_eq!(why(r#""rewake""#, r#""rewoke""#), "it is a safetensors file but not a snapshot");
    assert_eq!(why(r#""tail":{"dtype":"U32""#, r#""tail":{"dtype":"I32""#), "`tail` is I32 and not U32");
    assert_eq!(why(r#""a.second":{"dtype":"F32""#, r#""a.second":{"dtype":"I32""#), "`a.second` is I32 and not F32");
    assert_eq!(
        why(r#"[\"z.first\",\"a.second\"]"#, r#"[\"z.first\",\"z.first\" ]"#),
        "segment `z.first` is there twice"
    );
    assert_eq!(
        why(r#"[\"z.first\",\"a.second\"]"#, r#"[\"z.first\"             ]"#),
        "it has tensors that its metadata does not name"
    );
    assert_eq!(why(r#"\"a.second\"]"#, r#"\"b.second\"]"#), "the tensor `b.second` is missing");
    assert_eq!(
        why(r#""shape":[2,2]"#, r#""shape":[4,2]"#).split(':').next(),
        Some("its header is not that of a safetensors file")
    );
    assert!(why(r#"\"consumed\":41"#, r#"\"consumed\":-1"#).starts_with("its metadata cannot be read"));
    assert!(why("st_018bcfe56801", "st_..8bcfe56801").contains("state_id must be st_"));
}

#[test]
fn a_tensor_that_is_there_twice_is_refused() {
    // An empty one is the only kind that would not leave a hole in the file.
    let empty = r#""tail":{"dtype":"U32","shape":[0],"data_offsets":[0,0]},"#;
    let file = encode(&snapshot(1)).unwrap();
    let len = head_len(&file, file.len() as u64).unwrap();
    let json = std::str::from_utf8(&file[8..len]).unwrap();
    let json = json.replacen(r#""counts.values""#, &format!(r#"{empty}"counts.values""#), 1);
    let forged = [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &file[len..]].concat();
    assert!(decode(&resealed(forged)).unwrap_err().0.contains("`tail` is there twice"));
}

#[test]
fn values_that_are_not_finite_are_refused_on_reading_too() {
    let mut file = encode(&snapshot(1)).unwrap();
    let at = file.windows(4).rposition(|w| w == f32::MAX.to_le_bytes()).unwrap();
    file[at..at + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    assert_eq!(decode(&resealed(file)).unwrap_err().0, "segment `a.second` is not finite: value 0 is inf");
}

#[test]
fn a_header_that_claims_the_world_is_refused_without_allocating_it() {
    for claim in [u64::MAX, u64::MAX - 7, 1 << 40] {
        let file = [&claim.to_le_bytes()[..], b"{}"].concat();
        assert!(decode(&file).unwrap_err().0.contains("does not fit"));
    }
    let json = br#"{"checksum":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}"#;
    let file = [&(json.len() as u64).to_le_bytes()[..], json].concat();
    assert!(decode(&file).is_err());
}

/// Every way to store but the plain exact one.
fn storages() -> impl Iterator<Item = Storage> {
    let all = [Precision::F32, Precision::F16, Precision::Int8].into_iter();
    all.flat_map(|precision| [false, true].map(|compress| Storage { precision, compress })).skip(1)
}

/// A snapshot that is worth compressing, with two heads and a vector.
fn large() -> Snapshot {
    let mut large = snapshot(1);
    let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 7.0;
    let segment = |name: &str, shape: &[usize]| {
        let data = (0..shape.iter().product()).map(value).collect();
        SegmentData { name: name.into(), shape: shape.into(), data }
    };
    large.memory.segments = vec![segment("b.matrix", &[2, 16, 16]), segment("a.vector", &[40])];
    large
}

fn info(file: &[u8]) -> Info {
    decode_head(&file[..head_len(file, file.len() as u64).unwrap()], file.len() as u64).unwrap()
}

#[test]
fn less_exact_and_compressed_files_tell_what_they_are() {
    let (large, plain) = (large(), encode(&large()).unwrap());
    for storage in storages() {
        let file = encode_as(&large, storage).unwrap();
        assert!(file.len() < plain.len(), "{storage:?}");
        assert_eq!(encode_as(&large, storage).unwrap(), file, "{storage:?} is deterministic");
        assert_eq!(info(&file), info(&plain), "{storage:?}");
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let of = |name: &str| tensors.tensor(name).map(|tensor| tensor.dtype()).ok();
        let (matrix, vector, scales) = match (storage.precision, storage.compress) {
            (Precision::Int8, true) => (None, None, Some(Dtype::F32)),
            (_, true) => (None, None, None),
            (Precision::F32, false) => unreachable!("it is plain"),
            (Precision::F16, false) => (Some(Dtype::F16), Some(Dtype::F16), None),
            (Precision::Int8, false) => (Some(Dtype::I8), Some(Dtype::F16), Some(Dtype::F32)),
        };
        assert_eq!((of("b.matrix"), of("a.vector"), of("scales")), (matrix, vector, scales), "{storage:?}");
        assert_eq!(of("body.zstd").is_some(), storage.compress);
        let back = decode(&file).unwrap();
        assert_eq!((&back.head, &back.memory.pending), (&large.head, &large.memory.pending));
        for (one, other) in back.memory.segments.iter().zip(&large.memory.segments) {
            assert_eq!((&one.name, &one.shape), (&other.name, &other.shape));
            let off = one.data.iter().zip(&other.data).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            let most = match storage.precision {
                Precision::F32 => 0.0,
                Precision::F16 => 50.0 / 7.0 / 2048.0,
                Precision::Int8 => 50.0 / 7.0 / 254.0 * 1.001,
            };
            assert!(off <= most, "{storage:?}, {}: {off}", one.name);
        }
    }
}

#[test]
fn damage_of_every_kind_of_file_is_noticed() {
    for storage in storages() {
        let file = encode_as(&large(), storage).unwrap();
        for bit in (0..file.len() * 8).step_by(13) {
            let mut flipped = file.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&flipped).is_err(), "{storage:?}, bit {bit}");
            // With a checksum that fits, it only must not panic.
            let _ = decode(&resealed(flipped));
        }
        (0..file.len()).for_each(|len| assert!(decode(&file[..len]).is_err()));
    }
}

#[test]
fn a_state_that_is_nearly_nothing_is_not_compressed() {
    let mut zeros = large();
    zeros.memory.segments[0] = SegmentData { name: "z".into(), shape: vec![1 << 16], data: vec![0.0; 1 << 16] };
    let file = encode_as(&zeros, Storage { precision: Precision::F32, compress: true }).unwrap();
    assert!(file.len() > 1 << 18, "a reader could not tell it from a bomb");
    assert_eq!(decode(&file).unwrap(), zeros);
}

#[test]
fn a_body_that_lies_is_refused() {
    let compressed = |compress| Storage { precision: Precision::Int8, compress };
    let lie = |storage, from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let mut file = encode_as(&large(), storage).unwrap();
        let at = file.windows(from.len()).position(|w| w == from.as_bytes()).unwrap_or_else(|| panic!("no {from}"));
        file[at..at + to.len()].copy_from_slice(to.as_bytes());
        decode(&resealed(file)).unwrap_err().0
    };
    let body = compressed(true);
    assert!(lie(body, r#"\"shape\":[40]"#, r#"\"shape\":[41]"#).contains("cannot be read"));
    assert!(lie(body, r#"\"shape\":[40]"#, r#"\"shape\":[39]"#).contains("longer than its segments"));
    assert!(lie(body, r#"\"shape\":[2,16,16]"#, r#"\"shape\":[2,16,1e]"#).contains("cannot be read"));
    assert!(lie(body, r#"\"shape\":[2,16,16]"#, r#"\"shape\":[2,99,99]"#).contains("cannot be in a file"));
    assert!(lie(body, r#"\"dtype\":\"I8\""#, r#"\"dtype\":\"U8\""#).contains("is U8 and not"));
    assert!(lie(body, r#"\"dtype\":\"F16\""#, r#"\"dtype\":\"F64\""#).contains("is F64 and not"));
    assert!(lie(body, r#"\"format\":2"#, r#"\"format\":1"#).contains("has no compressed body"));
    assert!(lie(body, r#""scales""#, r#""scalez""#).contains("does not name"));
    assert!(lie(compressed(false), r#"\"format\":2"#, r#"\"format\":1"#).contains("not F32"));
    assert!(lie(compressed(false), r#"[2,16,16]"#, r#"[2, 16,16"#).starts_with("its header"));
    assert!(lie(compressed(false), r#""shape":[2,16,16]"#, r#""shape":[16,2,16]"#).contains("2 scales where 16"));
    assert!(lie(compressed(false), r#""shape":[2,16,16]"#, r#""shape":[1,32,16]"#).contains("belong to no segment"));
}

fn finite() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |x| x.is_finite())
}

prop_compose! {
    fn any_memory()(
        shapes in prop::collection::vec(prop::collection::vec(0usize..5, 0..4), 0..6),
        values in prop::collection::vec(prop_oneof![Just(-0.0f32), Just(f32::from_bits(1)), finite()], 64),
        consumed in 0u64..1 << 53,
        ends in prop::collection::vec(any::<u32>(), 0..1),
        goes_on in prop::collection::vec(any::<u32>(), 0..5),
        tail in prop::collection::vec(any::<u32>(), 0..50),
        counts in prop::collection::btree_map(any::<u32>(), finite(), 0..20),
        (unseen, begun) in any::<(u32, bool)>(),
    ) -> Memory {
        let segments = shapes.into_iter().enumerate().map(|(i, shape)| {
            let data = values[..shape.iter().product()].iter().map(|x| if i % 2 == 0 { *x } else { -x }).collect();
            SegmentData { name: format!("blocks.{i}.ü\"\\"), shape, data }
        });
        let pending = Pending { ends, goes_on, unseen, begun };
        Memory { segments: segments.collect(), consumed, pending, tail, counts: counts.into_iter().collect() }
    }
}

proptest! {
    #[test]
    fn decoding_what_was_encoded_is_the_identity_bit_for_bit(memory in any_memory()) {
        let whole = Snapshot { head: snapshot(1).head, memory };
        let file = encode(&whole).unwrap();
        let back = decode(&file).unwrap();
        prop_assert_eq!(&back, &whole);
        prop_assert_eq!(bits(&back), bits(&whole));
        let info = decode_head(&file[..head_len(&file, file.len() as u64).unwrap()], file.len() as u64).unwrap();
        prop_assert_eq!((info.tokens, info.bytes), (whole.memory.tokens(), whole.memory.bytes()));
    }

    #[test]
    fn whatever_can_be_stored_exactly_can_be_stored_otherwise(memory in any_memory()) {
        let whole = Snapshot { head: snapshot(1).head, memory };
        for storage in storages() {
            let file = encode_as(&whole, storage).unwrap();
            let back = decode(&file).unwrap();
            if storage.precision == Precision::F32 {
                prop_assert_eq!(bits(&back), bits(&whole));
            }
            let parts = |s: &Snapshot| -> Vec<_> {
                s.memory.segments.iter().map(|s| (s.name.clone(), s.shape.clone())).collect()
            };
            prop_assert_eq!(parts(&back), parts(&whole));
            prop_assert_eq!(&back.memory.counts, &whole.memory.counts);
            // What was stored less exactly is stored in the same way without a further loss.
            if storage.precision == Precision::F16 {
                prop_assert_eq!(encode_as(&back, storage).unwrap(), file);
            }
        }
    }

    #[test]
    fn damage_is_noticed_and_never_panics(
        memory in any_memory(),
        hits in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..4),
        cut in any::<prop::sample::Index>(),
        reseal in any::<bool>(),
    ) {
        let whole = Snapshot { head: snapshot(1).head, memory };
        let file = encode(&whole).unwrap();
        let mut bad = file.clone();
        for (at, xor) in hits {
            bad[at.index(file.len())] ^= xor;
        }
        if reseal {
            // Only that it does not panic: a resealed file may well be a valid one.
            let _ = decode(&resealed(bad));
        } else if bad != file {
            prop_assert!(decode(&bad).is_err());
        }
        prop_assert!(decode(&file[..cut.index(file.len())]).is_err());
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), as_header in any::<bool>()) {
        let mut file = bytes;
        if as_header && file.len() >= 8 {
            let len = (file.len() as u64 - 8) / 2;
            file[..8].copy_from_slice(&len.to_le_bytes());
        }
        prop_assert!(decode(&file).is_err());
        prop_assert!(decode_head(&file, file.len() as u64).is_err());
    }
}
