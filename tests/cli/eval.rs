//! `rewake eval`, against the same sums over what `rewake logits` gives.

use std::f64::consts::LN_2;
use std::path::Path;

use rewake::text;
use serde_json::{Value, json};

use super::logits::logits;
use super::{data, folder, rewake, root, run};

/// -ln p of each id from `scored` on, and whether it was the likeliest.
fn judged(model: &[&str], ids: &[u32], scored: usize) -> Vec<(f64, bool)> {
    let rows = logits(model, &ids[..ids.len() - 1]);
    let judge = |(row, &id): (&Vec<f32>, &u32)| {
        let exp: Vec<f64> = row.iter().map(|&l| f64::from(l).exp()).collect();
        let p = exp[id as usize] / exp.iter().sum::<f64>();
        (-p.ln(), exp.iter().all(|&other| other <= exp[id as usize]))
    };
    rows.iter().zip(&ids[1..]).map(judge).skip(scored - 1).collect()
}

fn json_of(args: &[&str]) -> Value {
    serde_json::from_str(&rewake(["eval", "--json"].iter().chain(args)).ok()).expect("JSON")
}

fn near(found: &Value, expected: f64, what: &str) {
    let found = found.as_f64().expect("a number");
    assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{what}: {found}, expected {expected}");
}

fn write(path: &Path, text: &str) -> String {
    std::fs::write(path, text).expect("a file");
    path.display().to_string()
}

const STORY: &str = "Once upon a time, there was a little dog named Max. Max loved to play.<|endoftext|>One day, a cat \
                     came to the park. \"Hello!\" said the cat.\n";

#[test]
fn perplexity_is_what_the_logits_say() {
    let folder = folder();
    let file = write(&folder.path().join("story.txt"), STORY);
    let bytes = std::fs::read(root().join("assets/demo/tokenizer.json")).expect("the tokenizer");
    let tokenizer = text::from_json(&bytes).expect("a tokenizer");
    let end = tokenizer.end_of_text().expect("an end of text");
    let read = tokenizer.encode_special(STORY);
    assert!(read.contains(&end), "an end of text that is written out is one");
    for limit in [read.len(), 5] {
        let ids: Vec<_> = [end].into_iter().chain(read.iter().copied().take(limit)).collect();
        let scores = judged(&[], &ids, 1);
        check(&json_of(&["--text", &file, "--limit", &limit.to_string()]), &scores, tokenizer.decode(&ids[1..]).len());
    }
    // People see the same, shorter.
    let text = run!("eval", "--text", file).ok();
    let perplexity = json_of(&["--text", &file])["perplexity"].as_f64().expect("a number");
    assert!(text.contains(&format!("perplexity      {perplexity:.4}\n")), "{text}");

    // Where nothing stands before the first byte, and the context is 128, pieces of 127 are read.
    let (v1, readme) = (data("v1_fp32").display().to_string(), "A server for RWKV models, bytes and all. ".repeat(9));
    let file = write(&folder.path().join("long.txt"), &readme);
    let ids: Vec<u32> = readme.bytes().map(u32::from).collect();
    let pieces = ids.chunks(127).filter(|piece| piece.len() > 1);
    let scores: Vec<_> = pieces.flat_map(|piece| judged(&[&v1], piece, 1)).collect();
    check(&json_of(&["--text", &file, &v1]), &scores, scores.len());
}

/// Holds that the command found these scores in so many bytes.
fn check(found: &Value, scores: &[(f64, bool)], bytes: usize) {
    let nats: f64 = scores.iter().map(|(nats, _)| nats).sum();
    let count = scores.len() as f64;
    assert_eq!((&found["tokens"], &found["bytes"]), (&scores.len().into(), &bytes.into()));
    near(&found["nats_per_token"], nats / count, "nats per token");
    near(&found["perplexity"], (nats / count).exp(), "perplexity");
    near(&found["bits_per_byte"], nats / LN_2 / bytes as f64, "bits per byte");
    near(&found["top1_agreement"], scores.iter().filter(|(_, first)| *first).count() as f64 / count, "agreement");
}

/// Texts of very different lengths, some with a last word that is easy to guess.
fn passages() -> Vec<String> {
    let tale = "Once upon a time, there was a little girl named Lily. She loved to play with her ball in the park. One \
                day, she saw a big dog. The dog was sad. Lily gave the dog a hug and they were happy. The";
    let words: Vec<_> = tale.split(' ').collect();
    (2..words.len()).map(|n| words[..=n].join(" ")).collect()
}

fn lambada_file(path: &Path, passages: &[String]) -> String {
    write(path, &passages.iter().map(|text| format!("{}\n", json!({ "text": text }))).collect::<String>())
}

#[test]
fn lambada_is_what_the_logits_say_however_passages_are_grouped() {
    let folder = folder();
    let mut passages = passages();
    let file = lambada_file(&folder.path().join("all.jsonl"), &passages);
    let all = json_of(&["--lambada", &file]);
    assert_eq!(all["passages"], passages.len());
    assert!(passages.len() > 32 && all["accuracy"].as_f64().is_some_and(|a| a > 0.2 && a < 0.9), "{all}");
    // Others beside them, and other lengths together.
    let count = passages.len();
    passages.reverse();
    passages.swap(3, count - 4);
    let other = json_of(&["--lambada", &lambada_file(&folder.path().join("other.jsonl"), &passages)]);
    assert_eq!(other["accuracy"], all["accuracy"]);
    let bits = |value: &Value| value.as_f64().expect("a number");
    assert!((bits(&other["perplexity"]) / bits(&all["perplexity"]) - 1.0).abs() < 1e-13, "{other} {all}");

    // A few, alone and together, against the sums.
    let bytes = std::fs::read(root().join("assets/demo/tokenizer.json")).expect("the tokenizer");
    let tokenizer = text::from_json(&bytes).expect("a tokenizer");
    let mut sums = (0.0, 0);
    for (n, text) in passages.iter().take(4).enumerate() {
        let (context, word) = text.split_at(text.rfind(' ').expect("two words"));
        let begin: Vec<_> = tokenizer.end_of_text().into_iter().chain(tokenizer.encode(context)).collect();
        let scores = judged(&[], &[begin.as_slice(), &tokenizer.encode(word)].concat(), begin.len());
        let (nats, right) = (scores.iter().map(|(nats, _)| nats).sum::<f64>(), scores.iter().all(|(_, first)| *first));
        let alone = folder.path().join("one.jsonl");
        // The space behind a text is none of its words.
        let one = json_of(&["--lambada", &lambada_file(&alone, &[format!("{text} ")])]);
        near(&one["perplexity"], nats.exp(), text);
        assert_eq!(one["accuracy"], f64::from(u8::from(right)), "{text}");
        sums = (sums.0 + nats, sums.1 + usize::from(right));
        let first = folder.path().join("other.jsonl").display().to_string();
        let some = json_of(&["--lambada", &first, "--limit", &(n + 1).to_string()]);
        assert_eq!(some["passages"], n + 1);
        near(&some["perplexity"], (sums.0 / (n + 1) as f64).exp(), "the first of them");
        near(&some["accuracy"], sums.1 as f64 / (n + 1) as f64, "the first of them");
    }
}

#[test]
fn what_cannot_be_judged_is_told_by_line() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let v1 = data("v1_fp32").display().to_string();
    let good = json!({"text": "two words"});
    for (content, said) in [
        (format!("{good}\n\n{good}\nnonsense\n"), "file, line 4: "),
        (format!("{good}\n[1]\n"), "file, line 2: "),
        ("{\"text\": \"word\"}".into(), "file, line 1: "),
        ("{\"text\": 3}".into(), "file, line 1: "),
        ("\n\n".into(), "file holds no passages"),
        (
            format!("{good}\n{}\n", json!({"text": "too long ".repeat(20)})),
            "file, line 2: 178 tokens are read, and the model has 128",
        ),
    ] {
        let error = run!("eval", v1, "--lambada", write(&at("file"), &content)).error();
        assert!(error.contains(said), "{error}");
    }
    // An unfinished line is no trouble when it is not wanted.
    let file = write(&at("file"), &format!("{good}\nnonsense\n"));
    assert_eq!(json_of(&["--lambada", &file, "--limit", "1", &v1])["passages"], 1);
    std::fs::write(at("latin"), b"h\xe4\xdflich").expect("a file");
    for (file, said) in
        [("latin", "UTF-8"), ("empty", "too little to judge"), ("one", "too little to judge"), ("missing", "missing")]
    {
        if ["empty", "one"].contains(&file) {
            write(&at(file), if file == "one" { "x" } else { "" });
        }
        let error = run!("eval", v1, "--text", at(file)).error();
        assert!(error.contains(said) && error.contains(&at(file).display().to_string()), "{error}");
    }
    // A device would never end; this one is harmless.
    #[cfg(unix)]
    for what in ["--text", "--lambada"] {
        let error = run!("eval", v1, what, "/dev/null").error();
        assert!(error.contains("cannot read /dev/null: it is no regular file"), "{error}");
    }
    let error = run!("eval", data("v7_bf16"), "--text", at("one")).error();
    assert!(error.contains("the tokenizer: none is known for a vocabulary of 320 ids"), "{error}");
}

#[test]
fn divergence_is_what_the_logits_say() {
    let folder = folder();
    let file = write(&folder.path().join("story.txt"), STORY);
    let demo = root().join("assets/demo/model.safetensors").display().to_string();
    let bytes = std::fs::read(root().join("assets/demo/tokenizer.json")).expect("the tokenizer");
    let tokenizer = text::from_json(&bytes).expect("a tokenizer");
    let ids: Vec<_> = tokenizer.end_of_text().into_iter().chain(tokenizer.encode_special(STORY)).collect();

    let same = json_of(&["--text", &file, "--against", &demo]);
    assert_eq!((&same["kl_divergence"], &same["same_top1"]), (&json!(0.0), &json!(1.0)));
    assert_eq!(same["reference_perplexity"], same["perplexity"]);

    let quantised = ["--quantize", "q4_0"];
    let found = json_of(&["--text", &file, "--against", &demo, quantised[0], quantised[1]]);
    let (p, q) = (logits(&[], &ids[..ids.len() - 1]), logits(&quantised, &ids[..ids.len() - 1]));
    let probabilities = |row: &Vec<f32>| {
        let exp: Vec<f64> = row.iter().map(|&l| f64::from(l).exp()).collect();
        let sum: f64 = exp.iter().sum();
        exp.into_iter().map(|e| e / sum).collect::<Vec<_>>()
    };
    let divergence = |(p, q): (&Vec<f32>, &Vec<f32>)| -> f64 {
        probabilities(p).iter().zip(probabilities(q)).map(|(p, q)| p * (p / q).ln()).sum()
    };
    let mean = p.iter().zip(&q).map(divergence).sum::<f64>() / p.len() as f64;
    assert!(mean > 1e-4, "{mean}");
    near(&found["kl_divergence"], mean, "divergence");
    near(&found["reference_perplexity"], same["perplexity"].as_f64().expect("a number"), "perplexity of the reference");
    let other = data("v7_bf16/model.safetensors").display().to_string();
    let refused = run!("eval", "--text", file, "--against", other).error();
    assert!(refused.contains("vocabulary of 320"), "{refused}");
}

#[test]
fn storing_exactly_costs_nothing_and_less_exactly_little() {
    let folder = folder();
    let file = write(&folder.path().join("story.txt"), &STORY.repeat(4));
    let report = json_of(&["--states", "--text", &file]);
    let number = |line: &Value, key: &str| line[key].as_f64().expect("a number");
    let [f32, f16, int8] = &report["stored"].as_array().expect("lines")[..] else { panic!("{report}") };
    assert_eq!([f32, f16, int8].map(|line| line["precision"].as_str()), [Some("f32"), Some("f16"), Some("int8")]);
    assert_eq!((number(f32, "kl_divergence_worst"), number(f32, "top1_agreement")), (0.0, 1.0));
    assert!(number(f16, "kl_divergence") > 0.0 && number(f16, "kl_divergence") < 1e-6, "{f16}");
    assert!(number(int8, "kl_divergence") > 0.0 && number(int8, "kl_divergence") < 1e-2, "{int8}");
    for line in [f32, f16, int8] {
        assert!(number(line, "top1_agreement") > 0.95, "{line}");
        assert!(number(line, "bytes_compressed") < number(line, "bytes"), "{line}");
    }
    assert!(number(f16, "bytes") < 0.55 * number(f32, "bytes") && number(int8, "bytes") < 0.3 * number(f32, "bytes"));
    // People see the same, shorter.
    let text = run!("eval", "--states", "--text", file).ok();
    assert!(text.starts_with("precision ") && text.lines().count() == 4, "{text}");
    let short = write(&folder.path().join("short.txt"), "Once");
    assert!(run!("eval", "--states", "--text", short).error().contains("states are stored after 16"));
    assert_eq!(run!("eval", "--states", "--lambada", file).code, Some(2));
}
