//! Keys: each opens its own tenant's states and sessions, and does not even learn that there are others.

use std::sync::Arc;

use rewake::config::Config;
use rewake::state::InMemory;
use rewake::types::StateId;
use serde_json::{Value, json};

use crate::server::{CHAT, COMPLETIONS, Client, Reply, Server, config};
use crate::{key, user};

fn server() -> Server {
    let key = vec![key("ann", "one"), key("bob", "two"), key("ann-too", "one")];
    Server::with(&Config { key, ..config() }, Arc::new(InMemory::default()))
}

async fn ids(client: &Client, path: &str) -> Vec<String> {
    let list = client.get(path).await.json();
    list["data"].as_array().expect("a list").iter().map(|item| item["id"].as_str().expect("an id").into()).collect()
}

/// Everything of a refusal but the names in it.
fn refusal(reply: &Reply, name: &str) -> (u16, Value, Vec<String>) {
    let error: Value = serde_json::from_str(&reply.error().to_string().replace(name, "NAME")).expect("still JSON");
    let mut headers: Vec<_> = reply.headers.keys().map(ToString::to_string).collect();
    headers.sort_unstable();
    (reply.status, error, headers)
}

#[tokio::test]
async fn what_is_another_s_does_not_exist() {
    let server = server();
    let (ann, bob) = (server.client().with_key("sk-ann"), server.client().with_key("sk-bob"));
    let turn = |session: &str| json!({"prompt": "A cat", "session_id": session, "temperature": 0, "max_tokens": 2});
    let owned = ann.ok(COMPLETIONS, turn("secret")).await.state_id();
    let unknown = StateId::new(1, 2).to_string();
    // Malformed names are unknown as well.
    for id in [owned.as_str(), unknown.as_str(), "st_x", "../../etc/passwd", ""] {
        for (path, new) in [(COMPLETIONS, json!({"prompt": "x"})), (CHAT, json!({"messages": user("x")}))] {
            let mut body = new;
            body["state_id"] = json!(id);
            let reply = bob.post(path, body).await;
            assert_eq!((reply.status, reply.code().as_str()), (404, "state_not_found"), "{path} {id}");
        }
    }
    for method in ["GET", "DELETE"] {
        for (folder, name, nobody) in [("states", &*owned, &*unknown), ("sessions", "secret", "nobody")] {
            let call = async |name: &str| match method {
                "GET" => bob.get(&format!("/v1/{folder}/{name}")).await,
                _ => bob.delete(&format!("/v1/{folder}/{name}")).await,
            };
            let (foreign, unknown) = (call(name).await, call(nobody).await);
            assert_eq!(refusal(&foreign, name), refusal(&unknown, nobody), "{method} {folder}");
            assert_eq!(foreign.status, 404);
        }
    }
    for (path, code) in [
        (format!("/v1/sessions/secret/turns?after={owned}"), "session_not_found"),
        ("/v1/sessions/secret/turns".into(), "session_not_found"),
        ("/v1/sessions/..%2F..%2Fone%2Fsessions%2Fsecret".into(), "session_not_found"),
        ("/v1/states/..%2F..%2Fone%2Fstates%2Fx".into(), "state_not_found"),
    ] {
        assert_eq!(bob.get(&path).await.code(), code, "{path}");
    }
    let by_state = |id: &str| json!({"prompt": "x", "state_id": id});
    let foreign = bob.post(COMPLETIONS, by_state(&owned)).await;
    let never = bob.post(COMPLETIONS, by_state(&unknown)).await;
    assert_eq!(refusal(&foreign, &owned), refusal(&never, &unknown));
    // All that Bob tried has changed nothing of Ann's.
    assert_eq!(ann.get(&format!("/v1/states/{owned}")).await.status, 200);
    assert_eq!(ann.get("/v1/sessions/secret").await.json()["head"], owned);
}

#[tokio::test]
async fn lists_show_one_s_own() {
    let server = server();
    let (ann, bob) = (server.client().with_key("sk-ann"), server.client().with_key("sk-bob"));
    let turn = |prompt: &str, session: &str| json!({"prompt": prompt, "session_id": session, "temperature": 0, "max_tokens": 2});
    // Sessions of the same name are two sessions.
    let hers = ann.ok(COMPLETIONS, turn("A cat", "both")).await.state_id();
    let his = bob.ok(COMPLETIONS, turn("A dog", "both")).await;
    assert_eq!((&his.json()["state"]["turn"], &his.json()["state"]["parent"]), (&json!(1), &Value::Null));
    let his = his.state_id();
    let hers_only = ann.ok(COMPLETIONS, turn("A cow", "hers")).await.state_id();
    assert_eq!(ids(&ann, "/v1/sessions").await, ["both", "hers"]);
    assert_eq!(ids(&bob, "/v1/sessions").await, ["both"]);
    let mut all = [hers.clone(), hers_only];
    all.sort();
    assert_eq!(ids(&ann, "/v1/states").await, all);
    assert_eq!(ids(&bob, "/v1/states").await, [&*his]);
    assert_eq!(ids(&bob, "/v1/states?session_id=both").await, [&*his]);
    assert_eq!(ids(&bob, "/v1/states?session_id=hers").await, Vec::<String>::new());
    assert_eq!(ids(&bob, "/v1/sessions/both/turns").await, [&*his]);
    let foreign = bob.get(&format!("/v1/sessions/both/turns?after={hers}")).await;
    assert_eq!(foreign.code(), "state_not_found");
    // Two keys of one tenant see the same.
    let too = server.client().with_key("sk-ann-too");
    assert_eq!(ids(&too, "/v1/states").await, all);
    too.ok(COMPLETIONS, json!({"prompt": "x", "state_id": hers, "max_tokens": 1})).await;
    // Deleting one does not touch the other of that name.
    assert_eq!(bob.delete("/v1/sessions/both").await.status, 200);
    assert_eq!(ann.get("/v1/sessions/both").await.json()["head"], hers);
    assert_eq!(ids(&bob, "/v1/states").await, Vec::<String>::new());
}

#[tokio::test]
async fn tenants_do_not_wait_for_each_other_s_sessions() {
    let server = server();
    let (ann, bob) = (server.client().with_key("sk-ann"), server.client().with_key("sk-bob"));
    let mut slow = crate::endless();
    slow["session_id"] = json!("both");
    let mut running = ann.stream(COMPLETIONS, slow).await;
    running.next().await.expect("a first chunk");
    bob.ok(COMPLETIONS, json!({"prompt": "A dog", "session_id": "both", "max_tokens": 1})).await;
    let busy = server.client().with_key("sk-ann-too");
    let busy = busy.post(COMPLETIONS, json!({"prompt": "A dog", "session_id": "both"})).await;
    assert_eq!(busy.code(), "session_busy");
}

#[tokio::test]
async fn without_a_good_key_there_is_nothing() {
    let server = server();
    let turn = json!({"prompt": "A", "max_tokens": 1});
    for client in [server.client(), server.client().with_key("sk-nobody"), server.client().with_key("")] {
        let reply = client.post(COMPLETIONS, turn.clone()).await;
        assert_eq!((reply.status, reply.code().as_str()), (401, "invalid_api_key"));
        assert_eq!(client.get("/v1/states").await.status, 401);
        assert_eq!(client.get("/health").await.status, 200);
    }
    let header = server.client().post_with(COMPLETIONS, &[("x-api-key", "sk-bob")], turn).await;
    assert_eq!(header.status, 200);
}

#[tokio::test]
async fn a_state_is_whoever_s_imports_it() {
    use axum::body::Body;
    use axum::http::Request;
    let server = server();
    let (ann, bob) = (server.client().with_key("sk-ann"), server.client().with_key("sk-bob"));
    let owned = ann.ok("/v1/states", json!({"prompt": "A cat"})).await.json()["id"].as_str().expect("an id").to_owned();
    let content = format!("/v1/states/{owned}/content");
    let unknown = StateId::new(1, 2).to_string();
    let (foreign, nobody) = (bob.get(&content).await, bob.get(&format!("/v1/states/{unknown}/content")).await);
    assert_eq!(refusal(&foreign, &owned), refusal(&nobody, &unknown));
    assert_eq!(bob.post("/v1/states", json!({"prompt": "x", "state_id": owned})).await.code(), "state_not_found");
    let file = ann.send(crate::server::get(&content)).await.expect("a reply").into_body();
    let file = axum::body::to_bytes(file, usize::MAX).await.expect("a file");
    let import = Request::post("/v1/states/import").header("content-type", "application/octet-stream");
    let brought = bob.call(import.body(Body::from(file)).expect("a good request")).await;
    assert_eq!(brought.status, 200, "{}", brought.text);
    let brought = brought.json()["id"].as_str().expect("an id").to_owned();
    assert_eq!(ids(&bob, "/v1/states").await, std::slice::from_ref(&brought));
    assert_eq!(ids(&ann, "/v1/states").await, [owned]);
    assert_eq!(ann.get(&format!("/v1/states/{brought}")).await.code(), "state_not_found");
}
