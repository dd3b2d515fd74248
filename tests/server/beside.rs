//! What a request says beside its body, and ids of what is gone: all of it counts, or is refused by its name.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderValue, Request};
use rewake::state::{InMemory, Store};
use rewake::types::StateId;
use serde_json::{Value, json};

use crate::responses::{RESPONSES, ask, id};
use crate::server::{CHAT, COMPLETIONS, Client, Reply, Server, config, forgetful, get, post};
use crate::store::{Op, Recording};
use crate::{user, with};

/// Every route that wants a key, with ids that are nobody's.
fn routes() -> Vec<(String, String)> {
    let document = serde_json::to_value(rewake::api::openapi()).expect("the document is JSON");
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for method in item.as_object().expect("operations").keys().filter(|_| path.starts_with("/v1/")) {
            let mut parts: Vec<&str> = path.split('/').collect();
            parts.iter_mut().filter(|part| part.starts_with('{')).for_each(|part| *part = "x");
            routes.push((method.to_uppercase(), parts.join("/")));
        }
    }
    assert!(routes.len() >= 25, "{routes:?}");
    routes
}

fn request(method: &str, path: &str, headers: &[(&str, &str)]) -> Request<Body> {
    let import = path.starts_with("/v1/states/import");
    let kind = if import { "application/octet-stream" } else { "application/json" };
    let mut request = Request::builder().method(method).uri(path).header("content-type", kind);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let body = match path.split('/').next_back() {
        Some("fork") => r#"{"to": "y"}"#,
        Some("rewind") => r#"{"at": 1}"#,
        _ => "{}",
    };
    request.body(Body::from(body)).expect("a good request")
}

fn refused(reply: &Reply, param: &str, what: &str) {
    assert_eq!((reply.status, reply.error()["param"].as_str()), (400, Some(param)), "{what}: {}", reply.text);
}

#[tokio::test]
async fn no_route_passes_over_a_query_that_nobody_knows() {
    let client = Server::shared().client();
    for (method, path) in routes() {
        for query in ["odd=1", "odd", "odd=1&odd=2", "%6Fdd=1"] {
            let reply = client.call(request(&method, &format!("{path}?{query}"), &[])).await;
            refused(&reply, "odd", &format!("{method} {path}?{query}"));
        }
        let bare = client.call(request(&method, &format!("{path}?"), &[])).await;
        assert!(bare.status == 200 || bare.error()["param"] != "odd");
    }
    let begun = id(&client.ok("/v1/conversations", json!({"items": [{"role": "user", "content": "x"}]})).await.json());
    let items = format!("/v1/conversations/{begun}/items");
    let item = client.get(&items).await.json()["data"][0]["id"].as_str().expect("an id").to_owned();
    let added = json!({"items": [{"role": "user", "content": "y"}]});
    for (include, status) in [("message.input_image.image_url", 200), ("message.output_text.logprobs", 400)] {
        for name in ["include", "include[]", "include%5B%5D"] {
            for reply in [
                client.get(&format!("{items}?{name}={include}")).await,
                client.get(&format!("{items}/{item}?{name}={include}")).await,
                client.post(&format!("{items}?{name}={include}"), added.clone()).await,
            ] {
                assert_eq!(reply.status, status, "{}", reply.text);
                assert!(status == 200 || reply.error()["param"] == "include", "{}", reply.text);
            }
        }
    }
    for path in ["/health?x=1", "/ready?x", "/metrics?x=1"] {
        assert_eq!(client.get(path).await.status, 200, "operators' tools append what they like");
    }
}

#[tokio::test]
async fn a_condition_is_held_or_refused() {
    let client = Server::shared().client();
    let tag = format!("\"{}\"", StateId::new(1, 2));
    let honoured = [COMPLETIONS, CHAT, "/v1/sessions/x", "/v1/sessions/x/fork", "/v1/sessions/x/rewind"];
    for (method, path) in routes() {
        let reply = client.call(request(&method, &path, &[("if-match", &tag)])).await;
        if method == "GET" || !honoured.contains(&&*path) {
            refused(&reply, "if-match", &format!("{method} {path}"));
        } else {
            // Of a turn it needs a session, and of a session one that is there.
            let known = ["session_not_found", "missing_required_parameter"].contains(&&*reply.code());
            let without = reply.text.contains("give `session_id`");
            assert!(known || without || reply.error()["param"] != "if-match", "{method} {path}: {}", reply.text);
            let two = client.call(request(&method, &path, &[("if-match", &tag), ("if-match", &tag)])).await;
            refused(&two, "if-match", &format!("twice {method} {path}"));
        }
    }
}

#[tokio::test]
async fn a_key_is_given_once_and_in_full() {
    let client = Server::shared().client();
    let long = "k".repeat(256);
    for (path, body) in [
        (COMPLETIONS, json!({"prompt": "A", "session_id": "keyed", "max_tokens": 1})),
        (CHAT, json!({"messages": user("A"), "session_id": "keyed", "max_tokens": 1})),
        (RESPONSES, ask("A")),
    ] {
        let send = async |keys: &[&[u8]]| {
            let mut request = post(path, body.to_string());
            for key in keys {
                let key = HeaderValue::from_bytes(key).expect("a header's value");
                request.headers_mut().append("idempotency-key", key);
            }
            client.call(request).await
        };
        for keys in [
            &[&b"a"[..], b"b"][..],
            &[b"a", b"a"],
            &[b""],
            &[b"a b"],
            &[long.as_bytes()],
            &["ü".as_bytes()],
            &[b"a\tb"],
        ] {
            refused(&send(keys).await, "idempotency-key", &format!("{keys:?}"));
        }
    }
    assert_eq!(client.get("/v1/sessions/keyed").await.status, 404, "a refused turn begins no session");
}

#[tokio::test]
async fn a_compressed_body_is_refused_for_that() {
    let client = Server::shared().client();
    let gzip = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
    for (path, kind) in [
        (COMPLETIONS, "application/json"),
        (RESPONSES, "application/json"),
        ("/v1/conversations", "application/json"),
        ("/v1/states/import", "application/octet-stream"),
    ] {
        for encoding in ["gzip", "br", "identity, gzip", "zstd", ""] {
            let request = Request::post(path).header("content-type", kind).header("content-encoding", encoding);
            let reply = client.call(request.body(Body::from(gzip.to_vec())).expect("a good request")).await;
            assert_eq!((reply.status, reply.code().as_str()), (415, "unsupported_media_type"), "{path} {encoding}");
            assert_eq!(reply.error()["param"], "content-encoding");
        }
    }
    let mut plain = post(COMPLETIONS, json!({"prompt": "A", "max_tokens": 1}).to_string());
    plain.headers_mut().insert("content-encoding", HeaderValue::from_static("Identity"));
    assert_eq!(client.call(plain).await.status, 200);
}

#[tokio::test]
async fn a_wrong_type_is_told_in_words() {
    let client = Server::shared().client();
    let wrong = [json!(5), json!(true), json!({}), json!([[]]), json!([5]), json!([null]), json!("\u{0}"), json!(-1.5)];
    let conversation = id(&client.ok("/v1/conversations", json!({})).await.json());
    let bodies = [
        (RESPONSES.to_owned(), ask("x")),
        ("/v1/conversations".to_owned(), json!({"items": [], "metadata": {}})),
        (format!("/v1/conversations/{conversation}"), json!({"metadata": {}})),
        (format!("/v1/conversations/{conversation}/items"), json!({"items": []})),
        ("/v1/sessions/x/fork".to_owned(), json!({"to": "y", "at": 1})),
        ("/v1/sessions/x/rewind".to_owned(), json!({"at": 1})),
        (
            "/v1/states".to_owned(),
            json!({"prompt": "x", "messages": [], "ttl_s": 1, "metadata": {}, "state_id": "x", "initial_state": "x", "model": "x"}),
        ),
    ];
    let more = json!({"instructions": "x", "previous_response_id": "x", "conversation": "x", "store": true,
        "background": false, "metadata": {}, "truncation": "auto", "include": [], "model": "stories", "stop": "x", "seed": 1});
    for (path, body) in bodies {
        let body = if path == RESPONSES { with(body, more.clone()) } else { body };
        for field in body.as_object().expect("an object").keys() {
            for value in &wrong {
                let mut body = body.clone();
                body[field] = value.clone();
                let reply = client.post(&path, body).await;
                assert!(reply.status < 500, "{path} {field} {value}: {}", reply.text);
                for word in ["struct ", "variant", "untagged", "tuple", "newtype", "Given"] {
                    assert!(!reply.text.contains(word), "{path} {field} {value}: {}", reply.text);
                }
            }
        }
    }
    let reply = client.post(RESPONSES, json!({"input": 5})).await;
    refused(&reply, "input", "a number");
    assert!(reply.text.contains("a text, or a list of messages"), "{}", reply.text);
}

async fn after(client: &Client, response: &str, last: u64) -> (Reply, Reply) {
    let mut by_header = get(&format!("/v1/streams/{response}"));
    let value = HeaderValue::from_str(&format!("{response}:{last}")).expect("an id");
    by_header.headers_mut().insert("last-event-id", value);
    let by_query = format!("/v1/streams/{response}?starting_after={last}");
    (client.call(by_header).await, client.get(&by_query).await)
}

#[tokio::test]
async fn an_event_that_was_never_sent_is_none_to_go_on_from() {
    let client = Server::shared().client();
    for (path, body) in [
        (CHAT, json!({"messages": user("A"), "max_tokens": 3, "stream_options": {"include_usage": true}})),
        (COMPLETIONS, json!({"prompt": "A", "max_tokens": 3, "n": 2})),
        (RESPONSES, with(ask("A"), json!({}))),
    ] {
        let mut stream = client.stream(path, body).await;
        while stream.next().await.is_some() {}
        let last = stream.last_id.expect("an id");
        let (response, number) = last.rsplit_once(':').expect("an id");
        let number: u64 = number.parse().expect("a number");
        let (by_header, by_query) = after(&client, response, number).await;
        assert_eq!((by_header.status, by_query.status), (200, 200), "there is nothing more: {}", by_header.text);
        for beyond in [number + 1, number + 1000, u64::MAX] {
            let (by_header, by_query) = after(&client, response, beyond).await;
            refused(&by_header, "last-event-id", path);
            refused(&by_query, "starting_after", path);
            assert!(by_header.text.contains(&last) && by_query.text.contains(&last), "{}", by_query.text);
        }
        if path == RESPONSES {
            let beyond = client.get(&format!("{RESPONSES}/{response}?stream=true&starting_after={}", number + 1)).await;
            refused(&beyond, "starting_after", path);
        }
    }
    // While it runs too; and what was sent is gone on from.
    let mut running = client.stream(COMPLETIONS, crate::endless()).await;
    running.begun().await;
    let last = running.last_id.clone().expect("an id");
    let (response, number) = last.rsplit_once(':').expect("an id");
    let number: u64 = number.parse().expect("a number");
    let (by_header, by_query) = after(&client, response, number + (1 << 40)).await;
    refused(&by_header, "last-event-id", "running");
    refused(&by_query, "starting_after", "running");
    let mut on = client.resume(response, Some(&last)).await.expect("it goes on");
    on.begun().await;
    assert_eq!(on.last_id, Some(format!("{response}:{}", number + 1)));
}

#[tokio::test]
async fn instructions_change_while_the_earlier_text_is_there() {
    let client = Server::shared().client();
    let on =
        |previous: &Value, more: Value| with(with(ask("And?"), json!({"previous_response_id": id(previous)})), more);
    let first = client.ok(RESPONSES, ask("A dog?")).await.json();
    let second = client.ok(RESPONSES, on(&first, json!({}))).await.json();
    assert_eq!(client.delete(&format!("{RESPONSES}/{}", id(&first))).await.status, 200);
    let refused_for = client.post(RESPONSES, on(&second, json!({"instructions": "Be rude."}))).await;
    refused(&refused_for, "instructions", "the first is gone");
    assert!(
        refused_for.text.contains(&id(&first)) && refused_for.text.contains("earlier text"),
        "{}",
        refused_for.text
    );
    // The state needs nothing of it; when that is gone as well, this is said.
    client.ok(RESPONSES, on(&second, json!({}))).await;
    let state = second["state"]["id"].as_str().expect("a state");
    assert_eq!(client.delete(&format!("/v1/states/{state}")).await.status, 200);
    refused(&client.post(RESPONSES, on(&second, json!({}))).await, "previous_response_id", "its state is gone too");
}

/// What is asked of the store for an id that is nobody's does not grow with the sessions there are.
#[tokio::test]
async fn an_unknown_state_costs_one_look_at_the_sessions() {
    let store = Arc::new(Recording::new(InMemory::default()));
    let client = Server::with(&forgetful(config()), store.clone()).client();
    for n in 0..60 {
        client.ok(COMPLETIONS, json!({"prompt": "x", "max_tokens": 1, "session_id": format!("s-{n}")})).await;
    }
    let asked = async |id: &StateId| {
        store.forget();
        assert_eq!(client.get(&format!("/v1/states/{id}")).await.code(), "state_not_found");
        store.log().len()
    };
    assert!(asked(&StateId::new(1_700_000_000_000, 1)).await > 60, "the first looks at all of them");
    for n in 2..40 {
        let asked = asked(&StateId::new(1_700_000_000_000 + n, n.into())).await;
        assert!(asked < 8, "{asked}: {:?}", store.log());
    }
    // What is not made yet is not looked for at all.
    assert!(asked(&StateId::new(u64::MAX, 1)).await < 8);
    // Of what may have come since only that is read.
    let made = client.ok(COMPLETIONS, json!({"prompt": "x", "max_tokens": 1, "session_id": "s-7"})).await.state_id();
    let made = StateId::parse(made).expect("an id");
    store.forget();
    let near = StateId::new(made.millis(), 7);
    assert_eq!(client.get(&format!("/v1/states/{near}")).await.code(), "state_not_found");
    let read: Vec<Op> =
        store.log().into_iter().filter(|op| matches!(op, Op::Read(key) if key.contains("/sessions/"))).collect();
    assert_eq!(read.len(), 1, "{read:?}");
}

#[tokio::test]
async fn a_lost_state_of_another_server_is_found_after_any_number_of_unknown_ones() {
    let store = Arc::new(InMemory::default());
    let [here, there] = [0, 1].map(|_| Server::with(&forgetful(config()), store.clone()).client());
    for n in 0..4u64 {
        let unknown = StateId::new(1_700_000_000_000, n.into());
        assert_eq!(here.get(&format!("/v1/states/{unknown}")).await.code(), "state_not_found");
        let turn = json!({"prompt": "A cat", "max_tokens": 2, "session_id": format!("s-{}", n % 2)});
        let made = there.ok(COMPLETIONS, turn).await.state_id();
        let told = there.get(&format!("/v1/states/{made}")).await.text;
        assert!(store.delete(&format!("t/local/states/{made}")).await.expect("a store"));
        let shown = here.get(&format!("/v1/states/{made}")).await;
        assert_eq!((shown.status, shown.text), (200, told));
    }
}
