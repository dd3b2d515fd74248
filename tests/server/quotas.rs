//! How much a tenant may have stored, and what happens when it is too much.

use std::sync::Arc;

use rewake::config::{Config, TenantQuota};
use rewake::session::Quota;
use rewake::state::InMemory;
use rewake::types::Tenant;
use serde_json::{Value, json};

use crate::key;
use crate::server::{COMPLETIONS, Client, Server, config, said};
use crate::states::{download, upload};

fn tenant(name: &str) -> Tenant {
    Tenant::parse(name).expect("a good name")
}

/// Ann may have three states, Bob as many as take three states' room, others nothing to speak of.
fn server() -> (Server, Client, Client, Client) {
    let key = ["ann", "bob", "cid"].map(|name| key(name, name));
    let bytes = Server::shared().sessions.models()[0].state_bytes;
    let of = |name: &str, states: u64, bytes: u64| TenantQuota { name: tenant(name), quota: Quota { states, bytes } };
    let mut config = Config { key: key.into(), tenant: vec![of("ann", 3, 0), of("bob", 0, 7 * bytes / 2)], ..config() };
    config.states.quota = Quota { states: 0, bytes: bytes / 2 };
    let server = Server::with(&config, Arc::new(InMemory::default()));
    let client = |key: &str| server.client().with_key(key);
    let clients = (client("sk-ann"), client("sk-bob"), client("sk-cid"));
    (server, clients.0, clients.1, clients.2)
}

fn turn(session: &str) -> Value {
    json!({"prompt": "A cat", "session_id": session, "max_tokens": 3})
}

#[tokio::test]
async fn more_than_a_tenant_may_have_is_refused_before_it_is_computed() {
    let (_server, ann, bob, cid) = server();
    for client in [&ann, &bob] {
        let mut states = Vec::new();
        for _ in 0..3 {
            states.push(client.ok(COMPLETIONS, turn("s")).await.state_id());
        }
        for body in [turn("s"), turn("new"), json!({"prompt": "x", "state_id": states[0]})] {
            let refused = client.post(COMPLETIONS, body).await;
            assert_eq!((refused.status, refused.code().as_str()), (403, "state_quota_exceeded"));
            assert!(refused.error()["message"].as_str().is_some_and(|message| message.contains("delete")));
        }
        // What stores nothing is nobody's business.
        client.ok(COMPLETIONS, json!({"prompt": "x", "max_tokens": 1})).await;
        client.ok(COMPLETIONS, json!({"prompt": "x", "state_id": states[0], "store_state": false})).await;
        client.ok("/v1/sessions/s/fork", json!({"to": "f"})).await;
        // And what is deleted makes room.
        assert_eq!(client.delete(&format!("/v1/states/{}", states[0])).await.status, 200);
        client.ok(COMPLETIONS, turn("s")).await;
        assert_eq!(client.post(COMPLETIONS, turn("s")).await.code(), "state_quota_exceeded");
        for session in ["s", "f"] {
            assert_eq!(client.delete(&format!("/v1/sessions/{session}")).await.status, 200);
        }
        client.ok(COMPLETIONS, turn("s")).await;
    }
    assert_eq!(cid.post(COMPLETIONS, turn("s")).await.code(), "state_quota_exceeded");
}

#[tokio::test]
async fn a_response_that_is_deleted_makes_room() {
    let (_server, ann, ..) = server();
    let mut ids = Vec::new();
    for _ in 0..3 {
        let response = ann.ok("/v1/responses", json!({"input": "A cat", "max_output_tokens": 3})).await.json();
        ids.push(response["id"].as_str().expect("an id").to_owned());
    }
    let another = json!({"input": "A dog", "max_output_tokens": 3});
    assert_eq!(ann.post("/v1/responses", another.clone()).await.code(), "state_quota_exceeded");
    assert_eq!(ann.delete(&format!("/v1/responses/{}", ids[0])).await.status, 200);
    ann.ok("/v1/responses", another).await;
}

#[tokio::test]
async fn an_answer_that_is_there_arrives_without_its_state() {
    let (_server, ann, ..) = server();
    let body = json!({"prompt": "A cat", "n": 4, "max_tokens": 3, "store_state": true, "stream": true});
    let chunks = ann.stream(COMPLETIONS, body).await.all().await;
    let ends: Vec<_> = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"].is_string()).collect();
    let codes: Vec<_> = ends.iter().map(|end| &end["choices"][0]["state_error"]["code"]).collect();
    assert_eq!(codes.iter().filter(|code| ***code == "state_quota_exceeded").count(), 1, "{codes:?}");
    assert!((0..4).all(|choice| !said(&chunks, choice).is_empty()));
    assert_eq!(ann.get("/v1/states").await.json()["data"].as_array().map(Vec::len), Some(3));
}

#[tokio::test]
async fn old_turns_of_a_session_do_not_count() {
    let mut config = config();
    config.states.session_snapshots = 2;
    config.states.quota = Quota { states: 4, bytes: 0 };
    let server = Server::with(&config, Arc::new(InMemory::default()));
    let client = server.client();
    for number in 1..12 {
        let reply = client.post_while(403, COMPLETIONS, turn("s")).await;
        assert_eq!(reply.json()["state"]["turn"], number);
    }
}

#[tokio::test]
async fn old_turns_that_are_asked_for_again_stay_within_the_quota() {
    let mut config = config();
    config.states.session_snapshots = 2;
    config.states.quota = Quota { states: 4, bytes: 0 };
    let server = Server::with(&config, Arc::new(InMemory::default()));
    let client = server.client();
    let mut states = Vec::new();
    for _ in 0..8 {
        states.push(client.post_while(403, COMPLETIONS, turn("s")).await.state_id());
    }
    for state in &states {
        client.ok(COMPLETIONS, json!({"prompt": "x", "max_tokens": 1, "state_id": state, "store_state": false})).await;
    }
    let kept = client.get("/v1/states").await.json()["data"].as_array().map(Vec::len);
    assert!(kept <= Some(4), "{kept:?}");
}

#[tokio::test]
async fn a_state_that_is_brought_counts_like_any_other() {
    let (_server, ann, bob, _) = server();
    for client in [&ann, &bob] {
        let file = download(client, &client.ok(COMPLETIONS, turn("s")).await.state_id()).await;
        for _ in 0..2 {
            assert_eq!(upload(client, file.clone()).await.status, 200);
        }
        let refused = upload(client, file).await;
        assert_eq!((refused.status, refused.code().as_str()), (403, "state_quota_exceeded"));
    }
}
