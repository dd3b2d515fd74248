//! Bodies that are wrong: always an error that OpenAI's clients understand, never a panic, never a 5xx.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Request;
use rewake::config::Config;
use rewake::session::TurnLimits;
use rewake::state::InMemory;
use serde_json::{Value, json};

use crate::server::{CHAT, COMPLETIONS, Client, Reply, Server, config, post};
use crate::{user, with};

/// Tokens of a prompt that are read, so that long ones can be refused quickly.
const PROMPT_TOKENS: usize = 2000;

fn server() -> Server {
    let turns = TurnLimits { prompt_tokens: PROMPT_TOKENS, ..TurnLimits::default() };
    Server::with(&Config { turns, ..config() }, Arc::new(InMemory::default()))
}

/// A valid request of each endpoint.
fn valid(path: &str) -> Value {
    let new = if path == CHAT { json!({"messages": user("Hi")}) } else { json!({"prompt": "Hi"}) };
    with(new, json!({"max_tokens": 1}))
}

async fn send(client: &Client, path: &str, body: impl Into<Body>) -> Reply {
    client.call(post(path, body)).await
}

/// Checks that a reply is a refusal of the client's fault.
fn refused(reply: &Reply, what: &str) {
    assert!((400..500).contains(&reply.status), "{what:.200}: {} {}", reply.status, reply.text);
    reply.error();
    assert!(reply.text.len() < 5000, "{what:.200}: a refusal does not repeat a whole body");
}

/// The fields of both endpoints by what they hold.
const FIELDS: [(&str, Kind); 29] = [
    ("detach", Kind::Flag),
    ("frequency_penalty", Kind::Number),
    ("initial_state", Kind::Text),
    ("logit_bias", Kind::Object),
    ("max_completion_tokens", Kind::Count),
    ("max_tokens", Kind::Count),
    ("messages", Kind::Messages),
    ("metadata", Kind::Object),
    ("min_p", Kind::Number),
    ("model", Kind::Text),
    ("n", Kind::Count),
    ("penalty_decay", Kind::Number),
    ("presence_penalty", Kind::Number),
    ("prompt", Kind::Prompt),
    ("repetition_penalty", Kind::Number),
    ("seed", Kind::Integer),
    ("session_id", Kind::Text),
    ("state_id", Kind::Text),
    ("state_ttl_s", Kind::Count),
    ("stop", Kind::Texts),
    ("store_state", Kind::Flag),
    ("stream", Kind::Flag),
    ("stream_options", Kind::Object),
    ("temperature", Kind::Number),
    ("top_k", Kind::Integer),
    ("top_p", Kind::Number),
    // Known and refused unless neutral.
    ("echo", Kind::Nothing),
    ("tools", Kind::Nothing),
    ("suffix", Kind::Nothing),
];

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Number,
    Integer,
    Count,
    Text,
    Texts,
    Flag,
    Object,
    Prompt,
    Messages,
    Nothing,
}

impl Kind {
    /// JSON that is not of this kind.
    fn wrong(self) -> Vec<String> {
        let number =
            ["1e300", "-1e300", "9.5", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "00", "0x10", "1_000"];
        let integer = ["1.5", "-1.5", "99999999999999999999999", "-99999999999999999999999", "1e40"];
        let other =
            ["[]", "[[]]", "[null]", "[{}]", "[true]", "[1.5]", "[-1]", "[\"a\", 1]", "{\"a\": [1]}", "{\"a\": null}"];
        let (text, flag, object, nothing) =
            (["\"\"", "\"x\"", "\"\\ud800\""], ["true", "false"], ["{}"], ["'x'", "undefined"]);
        let all =
            || number.iter().chain(&integer).chain(&other).chain(&text).chain(&flag).chain(&object).chain(&nothing);
        let right: &[&str] = match self {
            // Some of them may be as large.
            Self::Number => &["1.5", "-1.5", "9.5"],
            // Any text is a good name; nothing of that name is there.
            Self::Integer | Self::Count | Self::Text | Self::Messages => &[],
            Self::Texts => &["[]", "\"x\""],
            Self::Flag => &["true", "false"],
            Self::Object => &["{}"],
            Self::Prompt => &["\"\"", "\"x\""],
            Self::Nothing => &["[]", "{}", "\"\"", "false"],
        };
        all().filter(|value| !right.contains(value)).map(ToString::to_string).collect()
    }
}

#[tokio::test]
async fn every_field_refuses_what_it_is_not() {
    let server = server();
    let client = server.client();
    let document = serde_json::to_value(rewake::api::openapi()).expect("the document is JSON");
    for schema in ["Generation", "CompletionFields", "ChatFields"] {
        let properties = document["components"]["schemas"][schema]["properties"].as_object().expect(schema);
        for field in properties.keys() {
            assert!(FIELDS.iter().any(|(name, _)| name == field), "{field} is not tried");
        }
    }
    let mut tried = 0;
    for path in [COMPLETIONS, CHAT] {
        let theirs = if path == CHAT { "prompt" } else { "messages" };
        for (field, kind) in FIELDS.into_iter().filter(|(field, _)| *field != theirs) {
            if path == COMPLETIONS && field == "max_completion_tokens" {
                continue;
            }
            for value in kind.wrong() {
                let mut body = valid(path);
                body.as_object_mut().expect("an object").remove(field);
                let body = format!("{}, \"{field}\": {value}}}", body.to_string().trim_end_matches('}'));
                // A session is a good one whatever its name, if it has a name's letters.
                if field == "session_id" && value == "\"x\"" {
                    continue;
                }
                let reply = send(&client, path, body.clone()).await;
                refused(&reply, &body);
                tried += 1;
                let error = reply.error();
                let named = error["param"].as_str().is_some_and(|param| param.starts_with(field));
                assert!(named || error["code"] == "invalid_json", "{body}: {error}");
            }
        }
    }
    assert!(tried > 1000, "{tried}");
    assert_eq!(client.post(COMPLETIONS, valid(COMPLETIONS)).await.status, 200);
}

#[tokio::test]
async fn what_is_no_json_is_told_so() {
    let server = server();
    let client = server.client();
    for path in [COMPLETIONS, CHAT] {
        let whole = valid(path).to_string();
        let mut bodies: Vec<String> = (0..whole.len()).map(|end| whole[..end].to_owned()).collect();
        bodies.extend([
            format!("{whole}x"),
            format!("{whole}{whole}"),
            format!("\u{feff}{whole}"),
            "null".into(),
            "\"x\"".into(),
        ]);
        for open in ["[", "{\"a\":", "{\"prompt\":[", "{\"messages\":[{\"content\":", "{\"stop\":["] {
            bodies.push(open.repeat(100_000));
        }
        for field in [
            "prompt",
            "messages",
            "stop",
            "temperature",
            "stream_options",
            "logit_bias",
            "metadata",
            "tools",
            "x",
            "user",
        ] {
            bodies.push(format!("{{\"{field}\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000)));
            bodies.push(format!("{{\"{field}\": {}1{}}}", "{\"a\":".repeat(100_000), "}".repeat(100_000)));
        }
        for body in bodies {
            let reply = send(&client, path, body.clone()).await;
            refused(&reply, &body);
            assert_eq!(reply.status, 400, "{body:.100}");
        }
        for bytes in [&b"{\"prompt\": \"\xff\xfe\"}"[..], b"\x00", b"\x1f\x8b\x08\x00", b"{\"model\": \"\xc3\"}"] {
            refused(&send(&client, path, bytes).await, &format!("{bytes:?}"));
        }
    }
}

#[tokio::test]
async fn a_field_is_given_once() {
    let server = server();
    let client = server.client();
    for (path, body) in [
        (COMPLETIONS, r#"{"prompt": "a", "prompt": "b"}"#),
        (COMPLETIONS, r#"{"prompt": "a", "max_tokens": 1, "max_tokens": 2}"#),
        (COMPLETIONS, r#"{"prompt": "a", "state_id": null, "state_id": null}"#),
        (
            COMPLETIONS,
            r#"{"prompt": "a", "stream": true, "stream_options": {"include_usage": true, "include_usage": false}}"#,
        ),
        (COMPLETIONS, r#"{"prompt": "a", "echo": true, "echo": false}"#),
        (CHAT, r#"{"messages": [{"role": "user", "role": "system", "content": "a"}]}"#),
        (CHAT, r#"{"messages": [{"role": "user", "content": "a"}], "messages": [{"role": "user", "content": "b"}]}"#),
    ] {
        refused(&send(&client, path, body).await, body);
    }
}

#[tokio::test]
async fn what_is_too_much_is_refused() {
    let server = server();
    let client = server.client();
    for path in [COMPLETIONS, CHAT] {
        let text =
            |text: String| if path == CHAT { json!({ "messages": user(&text) }) } else { json!({ "prompt": text }) };
        for long in ["word ".repeat(200_000), "a".repeat(1 << 20), "-\n".repeat(1 << 19), "é漢🙂".repeat(1 << 17)] {
            let reply = client.post(path, text(long.clone())).await;
            refused(&reply, &long);
            assert_eq!((reply.status, reply.code().as_str()), (400, "context_length_exceeded"));
        }
        let param = async |more: Value| {
            let reply = client.post(path, with(valid(path), more.clone())).await;
            refused(&reply, &more.to_string());
            reply.error()["param"].as_str().expect("a field is to blame").to_owned()
        };
        assert_eq!(param(json!({"stop": vec!["x"; 10_000]})).await, "stop");
        assert_eq!(param(json!({"stop": "x".repeat(100_000)})).await, "stop");
        assert_eq!(param(json!({"n": u64::MAX})).await, "n");
        assert_eq!(param(json!({"n": 129})).await, "n");
        assert_eq!(param(json!({"max_tokens": u64::MAX})).await, "max_tokens");
        assert_eq!(param(json!({"max_tokens": 1_000_001})).await, "max_tokens");
        assert_eq!(param(json!({"store_state": true, "state_ttl_s": u64::MAX})).await, "state_ttl_s");
        assert_eq!(param(json!({"logit_bias": {"99999999999999": 1}})).await, "logit_bias.99999999999999");
        assert_eq!(param(json!({"initial_state": "x".repeat(100_000)})).await, "initial_state");
        assert_eq!(param(json!({"model": "x".repeat(100_000)})).await, "model");
        assert_eq!(param(json!({"session_id": "x".repeat(129)})).await, "session_id");
        let limit = config().requests.body_bytes;
        let reply = send(&client, path, " ".repeat(limit + 1)).await;
        assert_eq!((reply.status, reply.code().as_str()), (413, "request_too_large"));
        let reply = send(&client, path, format!("{}{}", valid(path), " ".repeat(limit - 1000))).await;
        assert_eq!(reply.status, 200, "white space is no fault, but for its length");
    }
    let newer = with(json!({"messages": user("x")}), json!({"max_completion_tokens": 1_000_001}));
    assert_eq!(client.post(CHAT, newer).await.error()["param"], "max_completion_tokens");
    let many = json!({"prompt": vec!["a"; 65]});
    assert_eq!(client.post(COMPLETIONS, many).await.error()["param"], "prompt");
    let ids = json!({"prompt": vec![5; PROMPT_TOKENS + 1]});
    assert_eq!(client.post(COMPLETIONS, ids).await.code(), "context_length_exceeded");
    let most = json!({"prompt": vec![5; PROMPT_TOKENS], "max_tokens": 1});
    assert_eq!(client.post(COMPLETIONS, most).await.status, 200);
}

#[tokio::test]
async fn only_json_to_known_models_is_read() {
    let server = server();
    let client = server.client();
    for path in [COMPLETIONS, CHAT] {
        let unknown = client.post(path, with(valid(path), json!({"model": "gpt-4"}))).await;
        assert_eq!((unknown.status, unknown.code().as_str()), (404, "model_not_found"));
        assert_eq!(unknown.error()["param"], "model");
        for kind in ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"] {
            let request = Request::post(path).header("content-type", kind).body(valid(path).to_string().into());
            let reply = client.call(request.expect("a good request")).await;
            assert_eq!((reply.status, reply.code().as_str()), (415, "unsupported_media_type"), "{kind}");
        }
        let request = Request::post(path).body(valid(path).to_string().into()).expect("a good request");
        assert_eq!(client.call(request).await.status, 415);
    }
}
