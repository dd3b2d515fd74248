//! The embedded model does what an independent implementation computed of it.

use std::path::Path;

use rewake::model::{Checkpoint, LoadOptions, Model, Pool, load};
use rewake::text::{self, Tokenizer};
use rewake::types::{Row, SeqId, SlotId, Want};
use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

struct Demo {
    model: Model,
    pool: Pool,
    text: std::sync::Arc<dyn Tokenizer>,
    expected: Value,
}

fn demo() -> Demo {
    let file = |name: &str| Path::new(ROOT).join(name);
    let bytes = |name: &str| std::fs::read(file(name)).expect("a file of the repository");
    let checkpoint = Checkpoint::open(&file("assets/demo/model.safetensors")).expect("the model");
    let model = load(&checkpoint, &LoadOptions::default()).expect("the model");
    let pool = model.pool(1).expect("one slot");
    let text = text::from_json(&bytes("assets/demo/tokenizer.json")).expect("the tokenizer");
    let expected = serde_json::from_slice(&bytes("tests/data/demo/expected.json")).expect("JSON");
    Demo { model, pool, text, expected }
}

impl Demo {
    /// Logits after each token, read as one chunk.
    fn read(&mut self, ids: &[u32]) -> Vec<Vec<f32>> {
        let slot = SlotId(0);
        let row = Row { seq: SeqId(0), from: slot, into: slot, at: 0, tokens: 0..ids.len(), want: Want::All };
        let mut logits = Vec::new();
        self.model.step(&mut self.pool, ids, &[row], &mut logits).expect("a step");
        logits.chunks(self.model.description().vocabulary).map(<[f32]>::to_vec).collect()
    }

    fn fresh(&mut self) {
        self.pool.reset(SlotId(0));
    }

    /// Sum of the negative log-likelihoods of every id but the first, from the zero state.
    fn nll(&mut self, ids: &[u32]) -> f64 {
        self.fresh();
        let mut sum = 0.0;
        let mut left = ids;
        while left.len() > 1 {
            let n = (left.len() - 1).min(256);
            for (logits, &next) in self.read(&left[..n]).iter().zip(&left[1..=n]) {
                let max = logits.iter().fold(f32::MIN, |a, &b| a.max(b));
                let total: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
                sum += total.ln() - f64::from(logits[next as usize] - max);
            }
            left = &left[n..];
        }
        sum
    }
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn argmax(logits: &[f32]) -> u32 {
    (0u32..).zip(logits).max_by(|a, b| a.1.total_cmp(b.1)).expect("logits").0
}

#[test]
fn greedy_continuation_and_logits_match() {
    let mut demo = demo();
    let expected = demo.expected.clone();
    let prompt = demo.text.encode(expected["prompt"].as_str().expect("text"));
    assert_eq!(prompt, ids(&expected["prompt_ids"]));
    demo.fresh();
    let mut logits = demo.read(&prompt).pop().expect("logits after the prompt");
    for top in expected["top5_after_prompt"].as_array().expect("five") {
        let (id, want) = (top["id"].as_u64().expect("an id") as usize, top["logit"].as_f64().expect("a logit"));
        assert!((f64::from(logits[id]) - want).abs() <= 1e-3 * want.abs(), "{id}: {} {want}", logits[id]);
    }
    let want = ids(&expected["greedy_ids"]);
    let mut got = Vec::new();
    while got.len() < want.len() {
        let next = argmax(&logits);
        got.push(next);
        logits = demo.read(&[next]).pop().expect("logits");
    }
    assert_eq!(got, want);
    assert_eq!(String::from_utf8(demo.text.decode(&got)).expect("text"), expected["greedy_text"]);
}

#[test]
fn perplexity_matches_to_four_digits() {
    let Ok(eval) = std::fs::read_to_string(Path::new(ROOT).join("../shared/model/eval.txt")) else {
        println!(
            "skipped: the evaluation text is other people's and stands beside a checkout only where it was put there"
        );
        return;
    };
    let mut demo = demo();
    let four_digits = |nll: f64, tokens: usize, want: &Value| {
        let (got, want) = ((nll / tokens as f64).exp(), want["perplexity"].as_f64().expect("a number"));
        assert!((got / want - 1.0).abs() < 5e-5, "{got} instead of {want}");
    };
    let (mut nll, mut tokens) = (0.0, 0);
    for story in eval.split("<|endoftext|>").filter(|s| !s.is_empty()) {
        let ids: Vec<u32> = [0].into_iter().chain(demo.text.encode(story)).chain([0]).collect();
        nll += demo.nll(&ids);
        tokens += ids.len() - 1;
    }
    four_digits(nll, tokens, &demo.expected["eval"]["per_story"]);

    let ids: Vec<u32> = [0].into_iter().chain(demo.text.encode_special(&eval)).collect();
    let nll = demo.nll(&ids);
    four_digits(nll, ids.len() - 1, &demo.expected["eval"]["one_stream"]);
}
