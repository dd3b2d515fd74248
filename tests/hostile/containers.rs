//! Checkpoints that lie, in every container.

use super::make::*;
use super::seeds::{self, Tensor, raw, safetensors, small};
use super::{refused, survived};

const HUGE: usize = 1 << 40;

/// One tensor's entry in the header of a safetensors file.
fn entry(name: &str, shape: &str, offsets: [usize; 2]) -> String {
    format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets:?}}}"#)
}

#[test]
fn a_safetensors_file_that_lies_is_refused() {
    let one = |name: &str, shape: &str, offsets| raw(&format!("{{{}}}", entry(name, shape, offsets)), &[0; 64]);
    let claims = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    let both =
        |a: [usize; 2], b: [usize; 2]| raw(&format!("{{{},{}}}", entry("a", "[4]", a), entry("b", "[4]", b)), &[0; 32]);
    for (what, file) in [
        ("nothing", vec![]),
        ("one byte", vec![7]),
        ("no header", vec![0; 8]),
        ("half a length", vec![9, 0, 0, 0]),
        ("a header of all there is", claims(u64::MAX)),
        ("a header of 1 TB", claims(1 << 40)),
        ("a header of 90 MB", claims(90_000_000)),
        ("no JSON", raw("PK", &[])),
        ("no tensors", raw("{}", &[])),
        ("deep JSON", raw(&"[".repeat(100_000), &[])),
        ("deep JSON inside", raw(&format!(r#"{{"a":{}"#, "{\"a\":".repeat(50_000)), &[])),
        ("overlapping tensors", both([0, 16], [8, 24])),
        ("the same bytes twice", both([0, 16], [0, 16])),
        ("a hole", both([0, 16], [17, 33])),
        ("past the end", both([0, 16], [16, 1 << 50])),
        ("an end before the start", both([16, 0], [16, 32])),
        ("a product that overflows", one("a", "[4294967296,4294967296]", [0, 64])),
        ("one that overflows to what is there", one("a", "[4611686018427387908,4]", [0, 64])),
        ("nothing of something huge", one("emb.weight", "[0,1152921504606846976]", [0, 0])),
        ("something huge of nothing", one("emb.weight", "[1152921504606846976,0]", [0, 0])),
        ("negative", one("a", "[-4,-4]", [0, 64])),
        ("very many axes", one("a", &format!("[16{}]", ",1".repeat(20_000)), [0, 64])),
        ("a type of other files", raw(r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#, &[0; 8])),
        ("a type of none", raw(r#"{"a":{"dtype":"F9","shape":[1],"data_offsets":[0,8]}}"#, &[0; 8])),
        ("a name of 100 kB", one(&"n".repeat(100_000), "[16]", [0, 64])),
        ("a name that rings", one(r"a\u0000\n\u001b[2J\u0007", "[16]", [0, 64])),
        ("a type of 100 kB", raw(&format!(r#"{{"a":{{"dtype":"{}"}}}}"#, "\\n".repeat(50_000)), &[])),
    ] {
        refused(what, &file);
    }
}

#[test]
fn empty_tensors_of_immense_shape_overflow_nothing() {
    let empty = |name: &str, shape: &[usize]| Tensor { shape: shape.to_vec(), ..Tensor::f32(name, &[0], 0.0) };
    for name in ["emb.weight", "a.lora.0", "blocks.0.att.w1", "blocks.0.att.time_mix_w1", "blocks.0.att.time_state"] {
        for shape in [[0, HUGE, HUGE], [HUGE, 0, HUGE], [HUGE, HUGE, 0]] {
            refused(name, &safetensors(&[empty(name, &shape)]));
            // With tensors beside it that make it a file of Ai00 or of flash-linear-attention.
            for other in ["blocks.0.att.time_mix_w1", "model.embeddings.weight", "rwkv.embeddings.weight"] {
                let other = Tensor::f32(other, &[2, 2], 0.5);
                let name = name.replace("blocks.", "model.layers.").replace("att.w1", "attn.x_x");
                refused(&name, &safetensors(&[empty(&name, &shape), other]));
            }
        }
    }
    // A conversion to GGUF would write a token for every row.
    let mut v6 = small("v6_bf16", 16);
    v6.iter_mut().filter(|t| t.name == "emb.weight").for_each(|t| *t = empty("emb.weight", &[HUGE, 0]));
    refused("a table of very many empty rows", &safetensors(&v6));
}

#[test]
fn layers_are_as_many_as_there_are_tensors() {
    let v7 = small("v7_bf16", 16);
    for number in ["1000000000", "18446744073709551614", "18446744073709551615", "99999999999999999999", "-1", "+7", ""]
    {
        let more = Tensor::f32(&format!("blocks.{number}.ln1.weight"), &[8], 1.0);
        refused(number, &safetensors(&[v7.clone(), vec![more]].concat()));
    }
}

#[test]
fn weights_that_are_not_finite_are_refused() {
    let v7 = small("v7_bf16", 16);
    for (name, value) in [("emb.weight", f32::NAN), ("head.weight", f32::INFINITY), ("blocks.0.att.r_k", f32::NAN)] {
        let poison = |t: &Tensor| {
            if t.name == name { Tensor::f32(name, &t.shape, value) } else { t.clone() }
        };
        refused(name, &safetensors(&v7.iter().map(poison).collect::<Vec<_>>()));
    }
}

#[test]
fn tensors_of_any_other_shape_are_refused_or_computed_with() {
    for case in seeds::CASES {
        let model = small(case, 16);
        for n in 0..model.len() {
            let shape = &model[n].shape;
            let mut turned = shape.clone();
            turned.reverse();
            let changed = |change: fn(usize) -> usize| shape.iter().map(|&d| change(d)).collect::<Vec<_>>();
            let last = |last| shape.iter().copied().rev().skip(1).rev().chain([last]).collect::<Vec<_>>();
            for other in [
                turned,
                vec![],
                vec![shape.iter().product()],
                vec![0; shape.len()],
                [&[1], &shape[..]].concat(),
                [&shape[..], &[1]].concat(),
                [&shape[..], &[2]].concat(),
                changed(|d| d + 1),
                changed(|d| d * 2),
                last(0),
                last(1),
                last(300),
            ] {
                let mut harmed = model.clone();
                harmed[n] = harmed[n].shaped(other.clone());
                let _ = survived(&format!("{case} with `{}` of {other:?}", model[n].name), &safetensors(&harmed));
            }
            let mut harmed = model.clone();
            harmed.remove(n);
            let _ = survived(&format!("{case} without `{}`", model[n].name), &safetensors(&harmed));
        }
    }
}

#[test]
fn a_context_of_any_length_costs_what_its_tensors_do() {
    let v1 = small("v1_fp32", 16);
    let mask = |shape: &[usize]| {
        let other = Tensor { shape: shape.to_vec(), ..Tensor::f32("copy_mask", &[0], 0.0) };
        v1.iter().map(|t| if t.name == "copy_mask" { other.clone() } else { t.clone() }).collect::<Vec<_>>()
    };
    for shape in [&[HUGE, HUGE][..], &[0, 0], &[HUGE, 0], &[0, HUGE], &[0], &[]] {
        refused(&format!("a mask of {shape:?}"), &safetensors(&mask(shape)));
    }
    for name in ["time_w", "time_alpha", "time_beta", "time_gamma"] {
        let longer = |t: &Tensor| {
            let context = |&d: &usize| if d == 8 { 9 } else { d };
            if t.name.ends_with(name) { t.shaped(t.shape.iter().map(context).collect()) } else { t.clone() }
        };
        refused(name, &safetensors(&v1.iter().map(longer).collect::<Vec<_>>()));
    }
}

/// The beginning of a GGUF file of an architecture.
fn rwkv7(head_size: u32) -> Vec<(&'static str, Vec<u8>)> {
    vec![("general.architecture", gguf_text("rwkv7")), ("rwkv7.wkv.head_size", gguf_number(head_size))]
}

#[test]
fn a_gguf_file_that_lies_is_refused() {
    let one = |info: Info| gguf(&rwkv7(4), &[info], 256);
    let with = |key, value| gguf(&[rwkv7(4), vec![(key, value)]].concat(), &[("token_embd.weight", &[4, 4], 0, 0)], 64);
    let counts = |tensors: u64, values: u64| {
        let mut file = gguf(&rwkv7(4), &[], 64);
        file[8..24].copy_from_slice(&[tensors.to_le_bytes(), values.to_le_bytes()].concat());
        file
    };
    let long = "n".repeat(100_000);
    for (what, file) in [
        ("a magic number", b"GGUF".to_vec()),
        ("very many tensors", counts(u64::MAX, 2)),
        ("many tensors", counts(1 << 30, 2)),
        ("very many values", counts(0, u64::MAX)),
        ("a long string", with("x", [&8u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat())),
        ("a long array", with("x", gguf_array(0, u64::MAX, &[]))),
        ("an array of what has no size", with("x", gguf_array(8, 1 << 40, &[0; 64]))),
        ("arrays in arrays", with("x", gguf_array(9, 1, &gguf_array(9, 1, &[])))),
        ("an alignment of 0", with("general.alignment", gguf_number(0))),
        ("an alignment of 2³¹", with("general.alignment", gguf_number(1 << 31))),
        ("an alignment that is a list", with("general.alignment", gguf_array(0, 3, &[1, 2, 3]))),
        ("a key twice", with("rwkv7.wkv.head_size", gguf_number(4))),
        ("a key that rings", with("\u{7}\n\u{1b}[2J", vec![0xff; 4])),
        ("another architecture", gguf(&[("general.architecture", gguf_text(&long))], &[], 0)),
        ("five axes", one(("a", &[1, 1, 1, 1, 1], 0, 0))),
        ("2³² axes", one(("a", &[], u32::MAX, 0))),
        ("an axis of 0", one(("token_embd.weight", &[0, 1 << 60], 0, 0))),
        ("a product that overflows", one(("token_embd.weight", &[1 << 32, 1 << 32], 0, 0))),
        ("a place that overflows", one(("token_embd.weight", &[4, 4], 0, u64::MAX - 31))),
        ("past the end", one(("token_embd.weight", &[4, 4], 0, 256))),
        ("half a block", one(("token_embd.weight", &[16, 2], 2, 0))),
        ("an unknown type", one(("token_embd.weight", &[4, 4], 4_000_000_000, 0))),
        ("overlap", gguf(&rwkv7(4), &[("token_embd.weight", &[16], 0, 0), ("output.weight", &[16], 0, 32)], 128)),
        ("aliases", gguf(&rwkv7(4), &[("token_embd.weight", &[16], 0, 0), ("output.weight", &[16], 0, 0)], 128)),
        ("a name twice", gguf(&rwkv7(4), &[("output.weight", &[8], 0, 0), ("output.weight", &[8], 0, 32)], 64)),
        ("a long name", one((&long, &[4, 4], 0, 0))),
        ("a name that rings", one(("\0\n\u{1b}[2J\u{7}", &[4, 4], 0, 0))),
        ("a layer beyond all numbers", one(("blk.99999999999999999999.attn_norm.weight", &[8], 0, 0))),
        ("the last layer there could be", one(("blk.18446744073709551615.attn_norm.weight", &[8], 0, 0))),
        ("heads of nothing", gguf(&rwkv7(0), &[("blk.0.time_mix_r_k.weight", &[16], 0, 0)], 64)),
        ("heads wider than the model", gguf(&rwkv7(u32::MAX), &[("blk.0.time_mix_r_k.weight", &[16], 0, 0)], 64)),
        ("heads that leave a rest", gguf(&rwkv7(3), &[("blk.0.time_mix_r_k.weight", &[16], 0, 0)], 64)),
    ] {
        refused(what, &file);
    }
    let scaled = |rescale: u32, layer: &str| {
        let name = format!("blk.{layer}.time_mix_output.weight");
        let metadata = [rwkv7(4), vec![("rwkv7.rescale_every_n_layers", gguf_number(rescale))]].concat();
        gguf(&metadata, &[(&name, &[4, 4], 0, 0)], 64)
    };
    for (rescale, layer) in [(1, "18446744073709551615"), (u32::MAX, "4000000000"), (1, "127")] {
        refused("outputs halved very often", &scaled(rescale, layer));
    }
}

#[test]
fn a_vocabulary_inside_a_gguf_file_that_lies_is_refused() {
    let vocabulary = |kind: &str, tokens: Vec<u8>, types: Vec<u8>| {
        let metadata = vec![
            ("tokenizer.ggml.model", gguf_text(kind)),
            ("tokenizer.ggml.tokens", tokens),
            ("tokenizer.ggml.token_type", types),
        ];
        gguf(&[rwkv7(4), metadata].concat(), &[("token_embd.weight", &[4, 4], 0, 0)], 64)
    };
    let strings = |token: &str, count: usize| {
        let token = [&(token.len() as u64).to_le_bytes()[..], token.as_bytes()].concat();
        gguf_array(8, count as u64, &token.repeat(count))
    };
    let types = |count: usize| gguf_array(5, count as u64, &1u32.to_le_bytes().repeat(count));
    for (what, file) in [
        ("no tokens", vocabulary("rwkv", gguf_number(1), types(1))),
        ("a type too few", vocabulary("rwkv", strings("a", 2), types(1))),
        ("a token twice", vocabulary("rwkv", strings("a", 300), types(300))),
        ("a token of 100 kB", vocabulary("rwkv", strings(&"a".repeat(100_000), 1), types(1))),
        ("half an escape", vocabulary("rwkv", strings("\\", 1), types(1))),
        ("very many empty tokens", vocabulary("rwkv", strings("", 100_000), types(100_000))),
        ("another kind", vocabulary(&"\n".repeat(100_000), strings("a", 1), types(1))),
    ] {
        refused(what, &file);
    }
}

#[test]
fn a_file_of_rwkv_cpp_that_lies_is_refused() {
    let numbers = |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    let header = |vocabulary, layers| numbers(&[0x6767_6d66, 101, vocabulary, 4, layers, 0]);
    let tensor = |name: &str, claimed: u32, dims: &[u32], values: usize| {
        let head = numbers(&[&[dims.len() as u32, claimed, 0], dims].concat());
        [head, name.as_bytes().to_vec(), vec![0; values * 4]].concat()
    };
    let emb = || tensor("emb.weight", 10, &[4, 4], 16);
    let norm = |layer: &str| {
        let name = format!("blocks.{layer}.ln1.weight");
        tensor(&name, name.len() as u32, &[4], 4)
    };
    let long = "n".repeat(100_000);
    for (what, file) in [
        ("a header", header(4, 0)),
        ("half a header", header(4, 0)[..17].to_vec()),
        ("a vocabulary that is not there", [header(u32::MAX, 0), emb()].concat()),
        ("layers that are not there", [header(4, u32::MAX), emb()].concat()),
        ("a long name", [header(4, 0), emb(), tensor(&long, 100_000, &[4], 4)].concat()),
        ("a name that is not there", [header(4, 0), emb(), tensor("x", u32::MAX, &[4], 4)].concat()),
        ("a name that rings", [header(4, 0), emb(), tensor("\0\n\u{1b}\u{7}", 4, &[4], 4)].concat()),
        ("an empty name", [header(4, 0), emb(), tensor("", 0, &[4], 4)].concat()),
        ("a name twice", [header(4, 0), emb(), emb()].concat()),
        ("very many axes", [header(4, 0), emb(), numbers(&[u32::MAX, 1, 0]), vec![0; 64]].concat()),
        ("an axis of 0", [header(4, 0), emb(), tensor("x", 1, &[0, u32::MAX, u32::MAX], 0)].concat()),
        ("an overflow", [header(4, 0), emb(), tensor("x", 1, &[u32::MAX; 3], 0)].concat()),
        ("past the end", [header(4, 0), emb(), tensor("x", 1, &[1 << 20], 16)].concat()),
        ("the layer 10⁹", [header(4, 1), emb(), norm("1000000000")].concat()),
        ("no layer", [header(4, 1), emb(), norm("")].concat()),
        ("the last layer there could be", [header(4, 1), emb(), norm("18446744073709551615")].concat()),
    ] {
        refused(what, &file);
    }
}

#[test]
fn a_pth_file_that_lies_is_refused() {
    let one = |tensor: Vec<u8>| pth(&dict(&[("emb.weight", tensor)]), &[0; 64]);
    let code = |module: &str, name: &str| call(module, name, &[text("touch pwned")]);
    let mut doubled = [b"]".to_vec(), text("x"), b"a".to_vec()].concat();
    (0..60).for_each(|_| doubled.extend(b"\x94(h\0h\0l0h\0h\0\x86"));
    let mut pairs = text("x");
    (0..60).for_each(|_| pairs.extend(b"2\x86"));
    let many: Vec<_> = (0..200).map(|n| (format!("t{n}"), tensor(1 << 12, 0, &[64, 64], &[64, 1]))).collect();
    let many: Vec<_> = many.iter().map(|(name, t)| (name.as_str(), t.clone())).collect();
    for (what, file) in [
        ("an empty pickle", pth(b"", &[])),
        ("code", pth(&code("os", "system"), &[])),
        ("code in a dict", one(code("builtins", "eval"))),
        ("code in an argument", one(call("torch._utils", "_rebuild_tensor_v2", &[code("os", "system")]))),
        ("pairs of pairs", pth(&dict(&[("emb.weight", pairs)]), &[])),
        ("lists of lists", pth(&doubled, &[])),
        ("deep lists", pth(&[b"]".repeat(200_000), b"a".repeat(199_999)].concat(), &[])),
        ("deep tuples", pth(&[b"N".to_vec(), b"\x85".repeat(200_000)].concat(), &[])),
        ("marks", pth(&b"(".repeat(200_000), &[])),
        ("empty tuples", pth(&b")".repeat(200_000), &[])),
        ("memo", pth(&[b"N".to_vec(), b"\x94".repeat(200_000)].concat(), &[])),
        ("empty lists put into one", pth(&[b"](".to_vec(), b"]".repeat(200_000), b"e".to_vec()].concat(), &[])),
        ("a string of 4 GB", pth(b"X\xff\xff\xff\xffx", &[])),
        ("an integer of 2 GB", pth(b"\x8b\xff\xff\xff\x7fx", &[])),
        ("a line without end", pth(&[b"I".to_vec(), b"9".repeat(100_000)].concat(), &[])),
        ("a huge tensor", one(tensor(1 << 40, 0, &[1 << 20, 1 << 20], &[1 << 20, 1]))),
        ("a huge tensor of one value", one(tensor(1, 0, &[1 << 20, 1 << 20], &[0, 0]))),
        ("a product that overflows", one(tensor(16, 0, &[1 << 32, 1 << 32], &[0, 0]))),
        ("strides that overflow", one(tensor(16, 0, &[2, 2], &[i64::MAX, i64::MAX]))),
        ("an offset that overflows", one(tensor(16, i64::MAX, &[2, 2], &[2, 1]))),
        ("a negative offset", one(tensor(16, -1, &[2, 2], &[2, 1]))),
        ("negative sizes", one(tensor(16, 0, &[-2, -2], &[2, 1]))),
        ("an empty tensor of immense shape", one(tensor(16, 0, &[0, i64::MAX, i64::MAX], &[1, 1, 1]))),
        ("a storage larger than its bytes", one(tensor(17, 0, &[4, 4], &[4, 1]))),
        ("very many axes", one(tensor(16, 0, &[1; 1000], &[1; 1000]))),
        ("one storage many times", pth(&dict(&many), &vec![0; 1 << 14])),
        ("a long name", pth(&dict(&[(&"n".repeat(100_000), tensor(16, 0, &[4, 4], &[4, 1]))]), &[0; 64])),
        ("a name that rings", pth(&dict(&[("\0\n\u{1b}[2J", tensor(16, 0, &[4, 4], &[4, 1]))]), &[0; 64])),
        ("the layer 10⁹", pth(&dict(&[("blocks.1000000000.x", tensor(16, 0, &[4, 4], &[4, 1]))]), &[0; 64])),
        ("a bomb of a zip", zip(&[("m/data.pkl", b"\x80\x02}."), ("m/../../etc/passwd", b"")])),
        ("a name twice", pth(&dict(&[("a", tensor(16, 0, &[4], &[1])), ("a", tensor(16, 0, &[4], &[1]))]), &[0; 64])),
    ] {
        refused(what, &file);
    }
}

/// A zip archive with its directory's entries as they are given: name, where the entry begins, its sizes, its method.
fn archive(local: &[u8], entries: &[(&str, u32, u32, u32, u16)], claimed: u16) -> Vec<u8> {
    let (mut file, start) = (local.to_vec(), local.len() as u32);
    for &(name, at, packed, size, method) in entries {
        file.extend(b"PK\x01\x02\x14\0\x14\0\0\0");
        file.extend(method.to_le_bytes());
        file.extend([0; 8]);
        [packed, size].iter().for_each(|n| file.extend(n.to_le_bytes()));
        file.extend((name.len() as u32).to_le_bytes());
        file.extend([0; 10]);
        file.extend(at.to_le_bytes());
        file.extend(name.as_bytes());
    }
    let size = file.len() as u32 - start;
    file.extend(b"PK\x05\x06\0\0\0\0");
    [claimed, claimed].iter().for_each(|n| file.extend(n.to_le_bytes()));
    [size, start].iter().for_each(|n| file.extend(n.to_le_bytes()));
    file.extend([0; 2]);
    file
}

#[test]
fn a_zip_archive_that_lies_is_refused() {
    // A local header of the name `m/data.pkl`, and a pickle.
    let local = [&b"PK\x03\x04\x14\0\0\0\0\0"[..], &[0; 16], &[10, 0, 0, 0], b"m/data.pkl", b"\x80\x02}."].concat();
    let names: Vec<_> = (0..2000).map(|n| format!("m/data/{n}")).collect();
    let overlapping: Vec<_> = names.iter().map(|name| (name.as_str(), 0, 4, 4, 0)).collect();
    for (what, file) in [
        ("packed", archive(&local, &[("m/data.pkl", 0, 4, 1 << 30, 8)], 1)),
        ("packed by an unknown method", archive(&local, &[("m/data.pkl", 0, 4, 4, 99)], 1)),
        ("longer than the file", archive(&local, &[("m/data.pkl", 0, 1 << 30, 1 << 30, 0)], 1)),
        ("longer than it is packed", archive(&local, &[("m/data.pkl", 0, 4, 1 << 30, 0)], 1)),
        ("beginning past the end", archive(&local, &[("m/data.pkl", 1 << 30, 4, 4, 0)], 1)),
        ("beginning in the directory", archive(&local, &[("m/data.pkl", 44, 4, 4, 0)], 1)),
        ("very many entries over each other", archive(&local, &overlapping, 2000)),
        ("entries that are not there", archive(&local, &[("m/data.pkl", 0, 4, 4, 0)], u16::MAX)),
        ("no entries", archive(&local, &[], 0)),
        ("nothing but a start", local.clone()),
        ("many ends", [local.clone(), b"PK\x05\x06".repeat(20_000)].concat()),
        ("many starts", b"PK\x03\x04".repeat(20_000)),
        ("many entries of a directory", [local.clone(), b"PK\x01\x02".repeat(20_000)].concat()),
        ("an archive in the archive", zip(&[("m/data.pkl", &zip(&[("m/data.pkl", b"\x80\x02}.")]))])),
        ("two prefixes", zip(&[("m/data.pkl", b"\x80\x02}."), ("n/data.pkl", b"\x80\x02}.")])),
        ("a long name", zip(&[("m/data.pkl", b"\x80\x02}."), (&"n".repeat(60_000), b"")])),
    ] {
        refused(what, &file);
    }
}
