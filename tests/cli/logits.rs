//! `rewake logits`.

use std::path::Path;
use std::process::Stdio;

use safetensors::{Dtype, SafeTensors};

use super::{Case, Ran, carried, case, command, data, folder, rewake, run};

/// A file that `rewake logits` wrote: shapes and values of its tensors, in the order in which they lie.
fn read(path: &Path) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(path).expect("a file");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensor = |(name, view): (&str, safetensors::tensor::TensorView)| {
        assert_eq!(view.dtype(), Dtype::F32, "{name}");
        let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes")));
        (view.data().as_ptr(), (name.to_owned(), view.shape().to_vec(), values.collect()))
    };
    let mut tensors: Vec<_> = file.iter().map(tensor).collect();
    tensors.sort_by_key(|(place, _)| *place);
    tensors.into_iter().map(|(_, tensor)| tensor).collect()
}

/// Logits `[T, V]` that the command gives for these tokens, row by row.
pub fn logits(model: &[&str], tokens: &[u32]) -> Vec<Vec<f32>> {
    let folder = folder();
    let (ids, out) = (folder.path().join("ids.json"), folder.path().join("logits.safetensors"));
    std::fs::write(&ids, serde_json::to_vec(tokens).expect("JSON")).expect("a file");
    let to = ["--tokens", &ids.display().to_string(), "--out", &out.display().to_string()].map(String::from);
    rewake(["logits".to_owned()].into_iter().chain(model.iter().map(|&arg| arg.into())).chain(to)).ok();
    let (name, shape, values) = read(&out).remove(0);
    assert_eq!((name.as_str(), shape[0]), ("logits", tokens.len()));
    values.chunks(shape[1]).map(<[f32]>::to_vec).collect()
}

/// The model of a case with what belongs to it.
fn model(case: &Case) -> Vec<String> {
    let at = |name: &str| case.folder.join(name).display().to_string();
    let mut args = vec![at("model.safetensors")];
    if let Some(alpha) = case.json["lora"]["alpha"].as_f64() {
        args.extend(["--lora".into(), at("lora.safetensors"), "--lora-alpha".into(), alpha.to_string()]);
    }
    if case.folder.join("state.safetensors").exists() {
        args.extend(["--state".into(), at("state.safetensors")]);
    }
    args
}

#[test]
fn every_generation_gives_the_numbers_of_its_original_in_any_chunks() {
    for case in carried() {
        let (name, folder) = (case.name(), folder());
        let run = |out: &str, more: &[&str]| {
            let out = folder.path().join(out);
            let (tokens, to) = (case.folder.join("case.json").display().to_string(), out.display().to_string());
            let mut args: Vec<String> = vec!["logits".into(), "--tokens".into(), tokens, "--out".into(), to];
            args.extend(model(&case).into_iter().chain(more.iter().map(|&arg| arg.into())));
            assert!(rewake(args).ok().contains(&out.display().to_string()));
            out
        };
        let whole = run("whole", &[]);
        let tensors = read(&whole);
        let (first, shape, logits) = &tensors[0];
        assert_eq!((first.as_str(), shape), ("logits", &vec![case.tokens.len(), case.logits[0].len()]), "{name}");
        let worst = logits.iter().zip(case.logits.iter().flatten()).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
        assert!(worst <= 1e-4 * case.rms(), "{name}: {worst} of {}", case.rms());
        // The original code of v1 has no state.
        if !case.states.is_empty() {
            assert_eq!(tensors.len() - 1, case.states.len(), "{name}");
            for (n, (segment, _, got)) in tensors[1..].iter().enumerate() {
                let want = case.state(n, segment.strip_prefix("state.").expect("a state"));
                let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
                assert!(got.len() == want.len() && worst <= 5e-3, "{name} {segment}: {worst}");
            }
        }
        let whole = std::fs::read(whole).expect("a file");
        for chunk in ["1", "7"] {
            let pieces = std::fs::read(run(chunk, &["--chunk", chunk])).expect("a file");
            assert!(pieces == whole, "{name} in chunks of {chunk}");
        }
    }
}

#[test]
fn states_and_adapters_matter_and_tokens_come_in_any_shape() {
    let plain = |case: &Case| {
        let file = case.folder.join("model.safetensors").display().to_string();
        logits(&[&file], &case.tokens)
    };
    for name in ["v7_state_bf16", "v7_lora_bf16"] {
        let case = case(name);
        let with = model(&case);
        let with: Vec<_> = with.iter().map(String::as_str).collect();
        assert!(logits(&with, &case.tokens) != plain(&case), "{name}");
    }
    // A list, a list in a file, and a case give the same bytes.
    let (case, folder) = (case("v7_bf16"), folder());
    let at = |name: &str| folder.path().join(name);
    let list = serde_json::to_string(&case.tokens).expect("JSON");
    std::fs::write(at("ids.json"), &list).expect("a file");
    let forms = [
        list.trim_matches(['[', ']']).to_owned(),
        at("ids.json").display().to_string(),
        case.folder.join("case.json").display().to_string(),
    ];
    let outs = forms.iter().zip(["a", "b", "c"]).map(|(tokens, out)| {
        run!("logits", case.folder, "--tokens", tokens, "--out", at(out)).ok();
        std::fs::read(at(out)).expect("a file")
    });
    let outs: Vec<_> = outs.collect();
    assert!(outs[0] == outs[1] && outs[1] == outs[2]);
    // A text goes through the tokenizer.
    run!("logits", "--text", "Once upon a time", "--out", at("text")).ok();
    assert_eq!(read(&at("text"))[0].1, [4, 2048]);
    run!("logits", data("v1_fp32"), "--text", "häßlich", "--out", at("text")).ok();
    assert_eq!(read(&at("text"))[0].1, ["häßlich".len(), 256], "a byte is a token");
}

#[test]
fn what_cannot_be_read_or_written_leaves_nothing() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name).display().to_string();
    for (name, text) in [("empty", "[]"), ("negative", "[-1]"), ("large", "[4294967296]"), ("other", "{\"a\": [1]}")] {
        std::fs::write(at(name), text).expect("a file");
    }
    let (v1, v7) = (data("v1_fp32").display().to_string(), data("v7_bf16").display().to_string());
    let ids = |n: usize| vec!["3"; n].join(",");
    let before = super::listing(folder.path());
    for (model, tokens, out, said) in [
        (&v7, "1,320", at("out"), vec!["token id 320", "vocabulary of 320"]),
        (&v7, "", at("out"), vec!["neither token ids, such as 1,2,3, nor a file"]),
        (&v7, "1,x", at("out"), vec!["`1,x` is neither"]),
        (&v7, "1,-1", at("out"), vec!["`1,-1` is neither"]),
        (&v7, &at("empty"), at("out"), vec!["no tokens"]),
        (&v7, &at("negative"), at("out"), vec!["negative", "-1"]),
        (&v7, &at("large"), at("out"), vec!["large", "4294967296"]),
        (&v7, &at("other"), at("out"), vec!["other", "no list of token ids"]),
        (&v1, &ids(129), at("out"), vec!["129 tokens", "at most 128"]),
        #[cfg(unix)]
        (&v7, "/dev/null", at("out"), vec!["/dev/null", "no regular file"]),
        (&v7, "1", at("nowhere/out"), vec!["nowhere/out", "there is no folder"]),
        (&v7, "1", folder.path().display().to_string(), vec!["cannot write", "directory"]),
    ] {
        let error = run!("logits", model, "--tokens", tokens, "--out", out).error();
        assert!(said.iter().all(|said| error.contains(said)), "{tokens}: {error}");
        assert!(!error.contains(".part"), "what is temporary is nobody's business: {error}");
    }
    let error = run!("logits", v7, "--text", "a", "--out", at("out")).error();
    assert!(error.contains("the tokenizer") && error.contains("--tokenizer"), "{error}");
    assert_eq!(super::listing(folder.path()), before);
    run!("logits", v1, "--tokens", ids(128), "--out", at("out")).ok();
    assert_eq!(read(&folder.path().join("out"))[0].1, [128, 256], "the whole context");
}

#[test]
fn what_is_read_is_not_written_and_a_device_stays_one() {
    let (folder, case) = (folder(), case("v7_state_bf16"));
    let at = |name: &str| folder.path().join(name).display().to_string();
    for name in ["model.safetensors", "state.safetensors", "case.json"] {
        std::fs::copy(case.folder.join(name), at(name)).expect("a copy");
    }
    std::fs::copy(data("v7_lora_bf16/lora.safetensors"), at("lora.safetensors")).expect("a copy");
    std::fs::write(at("vocabulary.txt"), "").expect("a file");
    let names = super::listing(folder.path());
    let kept = || names.iter().map(|name| std::fs::read(at(name)).expect("a file")).collect::<Vec<_>>();
    let before = kept();
    let base = ["logits", &at("model.safetensors"), "--tokens", &at("case.json"), "--state", &at("state.safetensors")];
    for out in ["model.safetensors", "state.safetensors", "case.json", "../model.safetensors", "vocabulary.txt"] {
        let out = out.replace("..", &format!("../{}", folder.path().file_name().expect("a name").to_string_lossy()));
        let more = ["--tokenizer", &at("vocabulary.txt"), "--out", &at(&out)];
        let error = rewake(base.iter().chain(&more)).error();
        assert!(error.contains("is what is read; write to another name"), "{out}: {error}");
    }
    let lora = ["logits", &shown(&data("v7_lora_bf16")), "--lora", &at("lora.safetensors"), "--lora-alpha", "16"];
    let error = rewake(lora.iter().chain(&["--tokens", "1", "--out", &at("lora.safetensors")])).error();
    assert!(error.contains("is what is read"), "{error}");
    assert!(kept() == before && super::listing(folder.path()) == names);

    #[cfg(unix)]
    {
        use std::os::unix::fs::{FileTypeExt, symlink};
        // A link leads to what is written, and stays.
        std::fs::write(at("old"), "old").expect("a file");
        symlink(at("old"), at("link")).expect("a link");
        rewake(base.iter().chain(&["--out", &at("link")])).ok();
        assert!(std::fs::symlink_metadata(at("link")).expect("a link").is_symlink());
        assert_eq!(read(&folder.path().join("old"))[0].1[0], case.tokens.len());
        symlink(at("nothing"), at("dangling")).expect("a link");
        // A pipe of our own: a device would be the machine's.
        assert!(std::process::Command::new("mkfifo").arg(at("pipe")).status().expect("mkfifo").success());
        for out in ["pipe", "dangling"] {
            let error = rewake(base.iter().chain(&["--out", &at(out)])).error();
            assert!(error.contains(&format!("cannot write {}: ", at(out))), "{error}");
        }
        assert!(std::fs::metadata(at("pipe")).expect("a pipe").file_type().is_fifo());
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn nobody_listens() {
    let (folder, v7) = (folder(), data("v7_bf16/model.safetensors").display().to_string());
    let out = |name: &str| folder.path().join(name).display().to_string();
    for args in [
        vec!["inspect".into(), "--tensors".into(), v7.clone()],
        vec!["logits".into(), v7.clone(), "--tokens".into(), "1".into(), "--out".into(), out("a")],
        vec!["convert".into(), v7.clone(), out("a.pth")],
        vec![
            "eval".into(),
            "--text".into(),
            data("v7_bf16/case.json").display().to_string(),
            "--limit".into(),
            "9".into(),
        ],
    ] {
        let mut child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary");
        drop(child.stdout.take());
        let ended = child.wait_with_output().expect("an end");
        assert!(ended.status.success() && ended.stderr.is_empty(), "{args:?}: {ended:?}");
        #[cfg(target_os = "linux")]
        {
            let full = std::fs::File::options().write(true).open("/dev/full").expect("the device");
            let error = Ran::of(command(&args).stdout(full)).error();
            assert!(error.contains("cannot write to the standard output"), "{args:?}: {error}");
        }
    }
    assert_eq!(super::listing(folder.path()), ["a", "a.pth"], "what was written is there all the same");
}
