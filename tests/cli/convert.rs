//! `rewake convert`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::{Ran, case, command, data, folder, listing, run};

fn about(file: &Path) -> Value {
    serde_json::from_str(&run!("inspect", file, "--json").ok()).expect("JSON")
}

fn fingerprint(file: &Path) -> String {
    about(file)["fingerprint"].as_str().expect("a fingerprint").to_owned()
}

/// Converts, and holds that the new file's name is all that is printed, but for a word on the vocabulary.
fn convert(from: &Path, to: &Path, more: &[&str]) {
    let mut command = command(["convert"]);
    let ran = Ran::of(command.arg(from).arg(to).args(more));
    assert!(ran.code == Some(0) && ran.out == format!("{}\n", to.display()), "{ran:?}");
    let known = ["no vocabulary is in the file", "the vocabulary stays behind"];
    let known = known.iter().any(|known| ran.err.starts_with(known));
    assert!(ran.err.is_empty() || known && ran.err.lines().count() == 1, "{ran:?}");
}

#[test]
fn any_format_to_any_other_keeps_the_fingerprint() {
    let folder = folder();
    for (from, endings) in [
        ("v7_bf16/model.pth", &["gguf", "safetensors", "gguf", "pth", "safetensors"][..]),
        ("v6_bf16/model.safetensors", &["pth", "gguf", "pth"]),
        ("v4_bf16/model.safetensors", &["pth", "safetensors"]),
        ("v1_fp32", &["pth", "safetensors"]),
        ("formats/hf_v4", &["safetensors", "pth"]),
        ("formats/fla_v7", &["pth", "gguf", "safetensors"]),
        ("formats/v7.bin", &["gguf", "safetensors"]),
        ("formats/v6.st", &["pth"]),
    ] {
        let mut file = data(from);
        let original = fingerprint(&file);
        for (n, ending) in endings.iter().enumerate() {
            let to = folder.path().join(format!("{n}.{ending}"));
            convert(&file, &to, &[]);
            let about = about(&to);
            assert_eq!(about["format"], *ending, "{from}");
            assert_eq!(about["fingerprint"], original.as_str(), "{from} → {ending}");
            file = to;
        }
    }
    // A state that is inside goes along, and a state-tuned file is tensors like any other.
    let to = folder.path().join("state.pth");
    convert(&data("v6_state_bf16/model.safetensors"), &to, &[]);
    assert_eq!(fingerprint(&to), fingerprint(&data("v6_state_bf16")));
    convert(&data("v7_state_bf16/state.safetensors"), &to, &[]);
    let out = |name: &str| folder.path().join(name);
    for (state, to) in [(data("v7_state_bf16/state.safetensors"), out("a")), (to, out("b"))] {
        let model = data("v7_state_bf16/model.safetensors");
        run!("logits", model, "--state", state, "--tokens", "1,2,3", "--out", to).ok();
    }
    assert!(std::fs::read(out("a")).expect("a file") == std::fs::read(out("b")).expect("a file"));
}

#[test]
fn types_adapters_and_vocabularies() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let types = |file: &Path| about(file)["types"].as_object().expect("types").keys().cloned().collect::<Vec<_>>();
    let v7 = data("v7_bf16/model.safetensors");
    for (ending, kind, found) in [
        ("pth", "f32", &["bf16", "f32"][..]),
        ("safetensors", "f16", &["bf16", "f16"]),
        ("gguf", "q8_0", &["f32", "q8_0"]),
        ("gguf", "q5_1", &["f32", "q5_1"]),
    ] {
        let to = at(&format!("out.{ending}"));
        convert(&v7, &to, &["--type", kind]);
        assert_eq!(types(&to), found, "{ending} {kind}");
    }
    convert(&v7, &at("wide.pth"), &["--type", "f32"]);
    assert_eq!(fingerprint(&at("wide.pth")), fingerprint(&v7), "more room for the same values");
    // Blocks become f16 where they have no place; where they have one, they stay.
    let kinds = data("formats/kinds.gguf");
    convert(&kinds, &at("kinds.safetensors"), &[]);
    assert_eq!(types(&at("kinds.safetensors")), ["bf16", "f16", "f32"]);
    convert(&kinds, &at("kinds.gguf"), &[]);
    assert_eq!(about(&at("kinds.gguf")), about(&kinds), "the vocabulary too");

    // What is quantised is not quantised once more, but for what it has already; anything that is no block may come of it.
    let (q8, names) = (at("q8.gguf"), || listing(folder.path()));
    convert(&v7, &q8, &["--type", "q8_0"]);
    let before = names();
    for (from, to) in [(&q8, "q4_0"), (&q8, "q5_1"), (&kinds, "q8_0")] {
        let error = run!("convert", from, at("twice.gguf"), "--type", to).error();
        assert!(error.contains(".weight` is quantised already, as ") && error.contains("the original file"), "{error}");
    }
    assert_eq!(names(), before);
    convert(&q8, &at("same.gguf"), &["--type", "q8_0"]);
    assert_eq!(fingerprint(&at("same.gguf")), fingerprint(&q8));
    for (kind, ending) in [("f16", "gguf"), ("bf16", "pth"), ("f32", "gguf")] {
        let to = at(&format!("plain-{kind}.{ending}"));
        convert(&q8, &to, &["--type", kind]);
        assert!(types(&to).iter().all(|found| found != "q8_0"), "{kind}");
    }

    // A merged adapter is the model with it.
    let case = case("v7_lora_bf16");
    let (model, lora) = (case.folder.join("model.safetensors"), case.folder.join("lora.safetensors"));
    let lora = ["--lora", &lora.display().to_string(), "--lora-alpha", "16"];
    convert(&model, &at("merged.pth"), &[&lora[..], &["--type", "f32"]].concat());
    run!("logits", at("merged.pth"), "--tokens", case.folder.join("case.json"), "--out", at("merged")).ok();
    run!(
        "logits",
        model,
        lora[0],
        lora[1],
        lora[2],
        lora[3],
        "--tokens",
        case.folder.join("case.json"),
        "--out",
        at("with")
    )
    .ok();
    assert!(std::fs::read(at("merged")).expect("a file") == std::fs::read(at("with")).expect("a file"));

    // Where nothing says which vocabulary it is, that is said; where somebody says it, it is in the file.
    let silent = run!("convert", v7, at("silent.gguf"));
    assert!(silent.code == Some(0) && silent.err.contains("no vocabulary is in the file"), "{silent:?}");
    assert!(about(&at("silent.gguf"))["template"].is_null());
    assert_eq!(run!("convert", v7, at("bytes.gguf"), "--tokenizer", "bytes").err, "");
    assert!(about(&at("bytes.gguf"))["template"].is_string());
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let copy = |from: &str, to: &str| std::fs::copy(data(from), at(to)).expect("a copy");
    copy("v7_bf16/model.safetensors", "model.safetensors");
    std::fs::create_dir(at("folder.pth")).expect("a folder");
    std::fs::create_dir(at("shards")).expect("a folder");
    for file in std::fs::read_dir(data("formats/fla_v7")).expect("the folder") {
        let file = file.expect("an entry");
        std::fs::copy(file.path(), at("shards").join(file.file_name())).expect("a copy");
    }
    let shard = listing(&at("shards")).into_iter().find(|name| name.ends_with(".safetensors")).expect("a shard");
    let (model, shard) = (at("model.safetensors"), at("shards").join(shard));
    #[cfg(unix)]
    std::os::unix::fs::symlink(&model, at("link.safetensors")).expect("a link");
    #[cfg(not(unix))]
    std::fs::copy(&model, at("link.safetensors")).expect("a copy");
    let kept = || [&model, &shard].map(|file| std::fs::read(file).expect("a file"));
    let (before, names) = (kept(), listing(folder.path()));
    let mut refused = vec![
        (model.clone(), at("model.safetensors"), vec![], "is what is read"),
        (model.clone(), at("shards/../model.safetensors"), vec![], "is what is read"),
        (at("shards"), shard.clone(), vec![], "is what is read"),
        (model.clone(), at("out"), vec![], "end it with .pth, .safetensors or .gguf"),
        (model.clone(), at("out.onnx"), vec![], "end it with .pth, .safetensors or .gguf"),
        (model.clone(), at("out.st"), vec![], "end it with .pth, .safetensors or .gguf"),
        (model.clone(), at("folder.pth"), vec![], "directory"),
        (model.clone(), at("nowhere/out.pth"), vec![], "there is no folder"),
        (at("missing.pth"), at("out.pth"), vec![], "missing.pth"),
        (model.clone(), at("out.pth"), vec!["--type", "q8_0"], "only GGUF holds q8_0"),
        (model.clone(), at("out.gguf"), vec!["--tokenizer", "world"], "65530 ids and the model only 320"),
        (data("v4_bf16"), at("out.gguf"), vec![], "llama.cpp knows RWKV v6 and v7, and this is v4"),
        (data("v6_state_bf16"), at("out.gguf"), vec![], "blocks.0.att.time_state"),
        (data("v7_bf16/expected.safetensors"), at("out.gguf"), vec![], "v7_bf16/expected.safetensors"),
    ];
    if cfg!(unix) {
        refused.push((at("link.safetensors"), model.clone(), vec![], "is what is read"));
        refused.push((model.clone(), at("link.safetensors"), vec![], "is what is read"));
    }
    for (from, to, more, said) in refused {
        let error = Ran::of(command(["convert"]).arg(&from).arg(&to).args(more)).error();
        assert!(error.contains(said), "{} → {}: {error}", from.display(), to.display());
    }
    assert!(kept() == before && listing(folder.path()) == names, "{:?}", listing(folder.path()));
}

/// The small v7 with other tensors.
fn changed(to: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let from = data("v7_bf16/model.safetensors");
    let mut tensors = candle_core::safetensors::load(from, &Device::Cpu).expect("tensors");
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, to).expect("a file");
}

#[test]
fn gguf_takes_whole_models_and_nothing_else() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let tensor = || Tensor::zeros(128, DType::F32, &Device::Cpu).expect("a tensor");
    for (name, said) in [
        ("extra.weight", "no part of a v7 model: extra.weight"),
        ("blocks.0.att.extra", "no part of a v7 model: blocks.0.att.extra"),
        ("blocks.1.ffn.key.weight", "`blocks.1.ffn.key.weight` has shape [128]"),
    ] {
        changed(&at("model.safetensors"), |tensors| drop(tensors.insert(name.into(), tensor())));
        for args in [vec!["inspect"], vec!["convert"]] {
            let mut command = command(&args);
            command.arg(at("model.safetensors"));
            if args[0] == "convert" {
                command.arg(at("out.gguf"));
            }
            let error = Ran::of(&mut command).error();
            assert!(error.contains(said) && error.contains("model.safetensors"), "{args:?}: {error}");
        }
        assert!(!at("out.gguf").exists());
    }
    // What stands the wrong way round has as many values.
    changed(&at("model.safetensors"), |tensors| {
        let key = tensors["blocks.0.ffn.key.weight"].t().and_then(|key| key.contiguous()).expect("a matrix");
        tensors.insert("blocks.0.ffn.key.weight".into(), key);
    });
    let error = run!("convert", at("model.safetensors"), at("out.gguf")).error();
    assert!(error.contains("blocks.0.ffn"), "{error}");

    // A broken tokenizer is not one that nobody knows.
    changed(&at("model.safetensors"), |_| {});
    std::fs::write(at("tokenizer.json"), "{").expect("a file");
    let error = run!("convert", at("model.safetensors"), at("out.gguf")).error();
    assert!(error.contains("the tokenizer: cannot use") && error.contains("tokenizer.json"), "{error}");
}

#[test]
fn what_a_conversion_cannot_keep_is_told() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let left = run!("convert", data("formats/v7.gguf"), at("out.pth"));
    assert!(left.code == Some(0) && left.err.starts_with("the vocabulary stays behind"), "{left:?}");
    assert!(left.err.contains("--tokenizer") && left.err.lines().count() == 1, "{left:?}");
    // 128 columns are no whole blocks of 256.
    let unfit = run!("convert", data("v7_bf16/model.safetensors"), at("out.gguf"), "--type", "q4_k");
    assert!(unfit.code == Some(0) && unfit.err.contains(" of the large matrices have no rows of whole blocks of q4_k"));
}

#[test]
fn the_same_vocabulary_gives_the_same_template_in_every_container() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let speaks = |file: &Path| {
        let about = about(file);
        (about["template"].clone(), about["stop"].clone(), about["stop_tokens"].clone())
    };
    // Bytes.
    let rows = |tensors: &mut HashMap<String, Tensor>| {
        for name in ["emb.weight", "head.weight"] {
            let table = tensors[name].narrow(0, 0, 256).and_then(|table| table.contiguous()).expect("rows");
            tensors.insert(name.into(), table);
        }
    };
    changed(&at("bytes.safetensors"), rows);
    convert(&at("bytes.safetensors"), &at("bytes.gguf"), &[]);
    convert(&at("bytes.gguf"), &at("again.pth"), &[]);
    for file in ["bytes.safetensors", "bytes.gguf", "again.pth"] {
        assert_eq!(about(&at(file))["tokenizer"], "bytes", "{file}");
        assert_eq!(speaks(&at(file)), speaks(&at("bytes.safetensors")), "{file}");
    }
    // A vocabulary file that is not World's, beside a model and in a GGUF.
    let mut lines: String = (0..256).map(|byte| format!("{} b'\\x{byte:02x}' 1\n", byte + 1)).collect();
    lines += "257 'ab' 2\n";
    std::fs::write(at("vocabulary.txt"), lines).expect("a file");
    let vocabulary = at("vocabulary.txt").display().to_string();
    let model = data("v7_bf16/model.safetensors");
    convert(&model, &at("own.gguf"), &["--tokenizer", &vocabulary]);
    let given = run!("inspect", model, "--tokenizer", vocabulary, "--json").ok();
    let given: Value = serde_json::from_str(&given).expect("JSON");
    assert_eq!(
        (given["template"].clone(), given["stop"].clone(), given["stop_tokens"].clone()),
        speaks(&at("own.gguf"))
    );
}

/// A sound v7 whose tables are so large that writing them takes a while.
fn large(folder: &Path) -> PathBuf {
    let mut tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(data("v7_bf16/model.safetensors"), &Device::Cpu).expect("tensors");
    for name in ["emb.weight", "head.weight"] {
        tensors.insert(name.into(), Tensor::randn(0f32, 1.0, (50_000, 128), &Device::Cpu).expect("a table"));
    }
    let path = folder.join("large.safetensors");
    candle_core::safetensors::save(&tensors, &path).expect("a file");
    path
}

/// A file that is not complete yet and has at least this size.
fn unfinished(folder: &Path, size: u64) -> bool {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry"));
    entries.filter(|entry| entry.path().extension().is_some_and(|ending| ending == "part")).any(|entry| {
        // It may have got its name in between.
        entry.metadata().is_ok_and(|metadata| metadata.len() >= size)
    })
}

fn clear(folder: &Path) {
    listing(folder).iter().for_each(|file| std::fs::remove_file(folder.join(file)).expect("a file"));
}

/// Kills a conversion when so much of the new file is written. Whether it was killed rather than done.
fn killed(from: &Path, to: &Path, size: u64) -> bool {
    let mut child = command(["convert"]).arg(from).arg(to).stdout(Stdio::null()).spawn().expect("the binary");
    while !unfinished(to.parent().expect("a folder"), size) {
        if child.try_wait().expect("a child").is_some() {
            return false;
        }
        std::thread::yield_now();
    }
    child.kill().expect("a kill");
    child.wait().expect("an end").code().is_none()
}

#[test]
fn a_kill_or_a_full_disk_leaves_what_was_there() {
    let (input, out) = (folder(), folder());
    let large = large(input.path());
    for name in ["out.pth", "out.safetensors"] {
        let to = out.path().join(name);
        for old in [None, Some(b"what was there")] {
            // At the very beginning, and in the middle of a table.
            for size in [0, 1 << 22] {
                // A machine with other things to do may be too late now and then.
                let tries = (0..20).find(|_| {
                    clear(out.path());
                    if let Some(old) = old {
                        std::fs::write(&to, old).expect("a file");
                    }
                    killed(&large, &to, size)
                });
                assert!(tries.is_some(), "{name} was always done before it was killed");
                assert_eq!(std::fs::read(&to).ok().as_deref(), old.map(|old| &old[..]), "{name} after {size} bytes");
                for left in listing(out.path()) {
                    assert!(left.starts_with(name), "whose it is can be seen: {left}");
                }
            }
        }
        clear(out.path());
        disk_full(&large, &to);
        convert(&large, &to, &[]);
        assert_eq!(fingerprint(&to), fingerprint(&large));
        std::fs::remove_file(&to).expect("a file");
        assert_eq!(listing(out.path()), Vec::<String>::new());
    }
    read_only(&large, out.path());
}

/// A limit on the size of files stands for a disk without room.
fn disk_full(from: &Path, to: &Path) {
    if cfg!(not(unix)) {
        return;
    }
    std::fs::write(to, "what was there").expect("a file");
    // In blocks of 512 bytes; the signal would kill.
    for blocks in ["0", "20000"] {
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_rewake"), "convert"]).arg(from).arg(to);
        let error = Ran::of(&mut shell).error();
        assert!(error.starts_with(&format!("cannot write {}: ", to.display())), "{error}");
        assert!(!error.contains(".part") && error.matches("os error").count() == 1, "said once: {error}");
    }
    assert_eq!(std::fs::read(to).expect("a file"), b"what was there");
    assert_eq!(listing(to.parent().expect("a folder")).len(), 1);
}

#[cfg(unix)]
fn read_only(from: &Path, folder: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let mode = |mode| std::fs::set_permissions(folder, PermissionsExt::from_mode(mode)).expect("a mode");
    mode(0o555);
    if std::fs::write(folder.join("root"), "").is_ok() {
        println!("skipped: no folder is read-only for this user");
    } else {
        let error = run!("convert", from, folder.join("out.pth")).error();
        assert!(error.contains("cannot write") && error.contains("denied"), "{error}");
    }
    mode(0o755);
}

#[cfg(not(unix))]
fn read_only(_: &Path, _: &Path) {}
