//! What the model says over HTTP, and that neither resuming nor company changes a byte of it.

use futures::future::join_all;
use futures::stream::{self, StreamExt};
use serde_json::{Value, json};

use crate::server::{CHAT, COMPLETIONS, Client, Server, expected, said};
use crate::{user, with};

const PROMPT: &str = "Once upon a time, there was a little";
const QUESTION: &str = "Tell me a story about a cat and a boat.";

/// How many tokens the resumed texts have.
const LENGTH: u64 = 40;

#[tokio::test]
async fn the_model_says_what_it_should() {
    let (client, expected) = (Server::shared().client(), expected());
    let text = |key: &str| expected[key].as_str().expect("text").to_owned();
    let ids = &expected["prompt_ids"];
    let tokens = expected["greedy_ids"].as_array().expect("ids").len();
    for prompt in [&expected["prompt"], ids] {
        let body = json!({"prompt": prompt, "temperature": 0, "max_tokens": tokens});
        let reply = client.ok(COMPLETIONS, body.clone()).await;
        assert_eq!((reply.answer(), reply.finish().as_str()), (text("greedy_text"), "length"));
        assert_eq!(reply.json()["usage"]["prompt_tokens"], ids.as_array().expect("ids").len());
        assert_eq!(reply.json()["usage"]["completion_tokens"], tokens);
        let chunks = client.stream(COMPLETIONS, body).await.all().await;
        assert_eq!(said(&chunks, 0), text("greedy_text"));
    }
    let body = json!({"messages": user(QUESTION), "temperature": 0, "max_tokens": 300});
    let reply = client.ok(CHAT, body.clone()).await;
    assert_eq!(reply.json()["usage"]["prompt_tokens"], expected["chat_prompt_ids"].as_array().expect("ids").len());
    let (answer, known) = (reply.answer(), text("chat_greedy_text"));
    assert!(answer.starts_with(known.trim_start()), "{answer:?} instead of {known:?}");
    assert!(!answer.contains("\n\n") && answer.trim() == answer);
    let chunks = client.stream(CHAT, body).await.all().await;
    assert_eq!(said(&chunks, 0), answer);
}

/// A request that is run at once and in parts.
struct Case {
    path: &'static str,
    temperature: f32,
    /// Further parameters, of every part.
    rules: Value,
}

impl Case {
    fn first(&self) -> Value {
        let new = if self.path == CHAT { json!({"messages": user(QUESTION)}) } else { json!({ "prompt": PROMPT }) };
        self.part(new)
    }
    /// The same response going on.
    fn rest(&self) -> Value {
        self.part(if self.path == CHAT { json!({"messages": []}) } else { json!({"prompt": ""}) })
    }
    fn part(&self, new: Value) -> Value {
        with(with(new, json!({"temperature": self.temperature, "top_p": 1, "seed": 42})), self.rules.clone())
    }
}

/// Text and finish reason of a case in parts of so many tokens, each resumed from the one before.
async fn in_parts(client: &Client, case: &Case, parts: &[u64], session: Option<String>) -> (String, String) {
    let mut text = String::new();
    let mut state: Option<String> = None;
    for (n, max_tokens) in parts.iter().enumerate() {
        let body = if n == 0 { case.first() } else { case.rest() };
        let last = n + 1 == parts.len();
        let body = match (&session, &state) {
            (Some(session), _) => with(body, json!({ "session_id": session })),
            (None, Some(state)) => with(body, json!({"state_id": state, "store_state": !last})),
            (None, None) => with(body, json!({"store_state": !last})),
        };
        let reply = client.ok(case.path, with(body, json!({ "max_tokens": max_tokens }))).await;
        text += &reply.answer();
        if reply.finish() == "stop" || last {
            return (text, reply.finish());
        }
        state = Some(reply.state_id());
    }
    unreachable!("the last part returns")
}

/// Stop strings of which the first one occurs in `text` and the others only begin to.
fn stops(text: &str) -> Value {
    let piece = |from: usize, len: usize| -> String { text.chars().skip(from).take(len).collect() };
    let stop = Some(piece(70, 7)).filter(|stop| stop.chars().count() == 7).unwrap_or_else(|| "zebra!".into());
    json!([stop, piece(4, 9) + "\u{1}", piece(20, 12) + "~~", piece(47, 15) + "#"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resumed_text_is_the_uninterrupted_one() {
    let client = Server::shared().client();
    let mut cases = Vec::new();
    for path in [COMPLETIONS, CHAT] {
        for temperature in [0.0, 0.8, 1.0] {
            let case = |rules: Value| Case { path, temperature, rules };
            let plain = client.ok(path, with(case(json!({})).first(), json!({ "max_tokens": LENGTH }))).await.answer();
            let penalties = json!({
                "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3, "penalty_decay": 0.98,
                "logit_bias": {"259": 1.5},
            });
            cases.extend([
                case(json!({})),
                case(json!({ "stop": stops(&plain) })),
                case(penalties),
                case(json!({"top_p": 0.7, "top_k": 50, "min_p": 0.02})),
            ]);
        }
    }
    let mut runs = Vec::new();
    let (mut stopped, mut went_on) = (0, 0);
    for (c, case) in cases.iter().enumerate() {
        // A stored text ends where the state does; what is held back comes with what follows it.
        let stored = with(case.first(), json!({"max_tokens": LENGTH, "store_state": true}));
        let stored = client.ok(case.path, stored).await;
        let whole = client.ok(case.path, with(case.first(), json!({ "max_tokens": LENGTH }))).await;
        if whole.finish() == "stop" {
            stopped += 1
        } else {
            went_on += 1
        }
        for parts in [&[1, 39][..], &[2, 38], &[7, 33], &[23, 17], &[38, 2], &[1, 1, 1, 5, 8, 11, 2, 11]] {
            assert_eq!(parts.iter().sum::<u64>(), LENGTH);
            let session = format!("resumed:{c}:{}:{}", parts[0], parts[1]);
            runs.push((c, parts, None, (whole.answer(), whole.finish())));
            runs.push((c, parts, Some(session), (stored.answer(), stored.finish())));
        }
    }
    assert!(stopped >= 6 && went_on >= 6, "both ends are tried: {stopped} and {went_on}");
    let run = |(c, parts, session, whole): (usize, &'static [u64], Option<String>, (String, String))| {
        let (client, case) = (&client, &cases[c]);
        async move {
            let way = if session.is_some() { "session" } else { "state" };
            let resumed = in_parts(client, case, parts, session).await;
            let Case { path, temperature, rules } = case;
            assert_eq!(resumed, whole, "{path} at {temperature} in {parts:?} by {way} with {rules}");
        }
    };
    stream::iter(runs).map(run).buffer_unordered(24).collect::<Vec<()>>().await;
}

#[tokio::test]
async fn nothing_follows_a_stop() {
    let client = Server::shared().client();
    let whole = client.ok(COMPLETIONS, json!({"prompt": PROMPT, "temperature": 0, "max_tokens": 30})).await.answer();
    let stop: String = whole.chars().skip(20).take(8).collect();
    let body = json!({"prompt": PROMPT, "temperature": 0, "max_tokens": 30, "stop": stop, "store_state": true});
    let first = client.ok(COMPLETIONS, body).await;
    assert_eq!((Some(first.answer().as_str()), first.finish().as_str()), (whole.split(&stop).next(), "stop"));
    let rest = json!({"state_id": first.state_id(), "temperature": 0, "max_tokens": 30, "stop": stop});
    let again = client.ok(COMPLETIONS, rest.clone()).await;
    assert_eq!((again.answer().as_str(), again.finish().as_str()), ("", "stop"));
    // Without that rule the same response goes on as if it had never been there.
    let free = client.ok(COMPLETIONS, with(rest, json!({"stop": null, "max_tokens": 5}))).await;
    assert!(whole.starts_with(&(first.answer() + &free.answer())), "{:?}", free.answer());
    assert!(free.answer().starts_with(&stop));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn company_changes_nothing() {
    const STREAMS: usize = 64;
    let client = Server::shared().client();
    const NAMES: [&str; 8] = ["Tom", "Lily", "the dog", "a bird", "Max", "Sue", "the frog", "a little boat"];
    let request = |i: usize| -> (&'static str, Value) {
        let name = NAMES[i % NAMES.len()];
        let temperature = [0.0, 0.7, 1.0, 1.3][i % 4];
        let n = if i.is_multiple_of(5) { 2 } else { 1 };
        let common = json!({
            "seed": i, "temperature": temperature, "max_tokens": 12 + i % 17, "n": n,
        });
        match i % 3 {
            0 => (CHAT, with(common, json!({"messages": user(&format!("Tell me about {name}."))}))),
            1 => (COMPLETIONS, with(common, json!({"prompt": format!("One day, {name} went")}))),
            // Long enough to be read in several steps between the others' tokens.
            _ => (COMPLETIONS, with(common, json!({"prompt": format!("{name} was happy. ").repeat(20 + i)}))),
        }
    };
    let mut alone = Vec::new();
    for i in 0..STREAMS {
        let (path, body) = request(i);
        let reply = client.ok(path, body).await.json();
        let text = |choice: &Value| choice["text"].as_str().or(choice["message"]["content"].as_str()).map(String::from);
        let choices = reply["choices"].as_array().expect("choices");
        alone.push(choices.iter().map(|choice| text(choice).expect("text")).collect::<Vec<_>>());
    }
    let streams = (0..STREAMS).map(|i| {
        let client = client.clone();
        tokio::spawn(async move {
            let (path, body) = request(i);
            let choices = body["n"].as_u64().expect("n");
            let chunks = client.stream(path, body).await.all().await;
            (0..choices).map(|choice| said(&chunks, choice)).collect::<Vec<_>>()
        })
    });
    for (i, together) in join_all(streams).await.into_iter().enumerate() {
        assert_eq!(together.expect("no panic"), alone[i], "{:?}", request(i));
    }
    let different: std::collections::BTreeSet<_> = alone.iter().flatten().collect();
    assert!(different.len() > STREAMS, "the requests are different ones");
}
