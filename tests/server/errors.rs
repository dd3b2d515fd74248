//! A server that is full, and states and sessions that are not there.

use std::sync::Arc;

use rewake::app::{App, load_models};
use rewake::config::{Config, Engine};
use rewake::state::InMemory;
use rewake::types::StateId;
use serde_json::json;

use crate::server::{CHAT, COMPLETIONS, Client, Server, config};
use crate::{endless, user, with};

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let engine = Engine { seats: 1, queue: 1, ..Engine::default() };
    let server = Server::with(&Config { engine, ..config() }, Arc::new(InMemory::default()));
    let client = server.client();
    let mut running = client.stream(COMPLETIONS, endless()).await;
    running.next().await.expect("a first chunk");
    let waiting = client.stream(COMPLETIONS, endless()).await;
    for (path, new) in [(COMPLETIONS, json!({"prompt": "x"})), (CHAT, json!({"messages": user("x")}))] {
        for stream in [false, true] {
            let reply = client.post(path, with(new.clone(), json!({"max_tokens": 1, "stream": stream}))).await;
            assert_eq!((reply.status, reply.code().as_str()), (429, "rate_limit_exceeded"));
            assert_eq!(reply.error()["type"], "rate_limit_error");
            let number = |name: &str| reply.header(name).expect(name).parse::<u64>().expect("a number");
            assert!(number("retry-after-ms") > 0 && number("retry-after") == number("retry-after-ms").div_ceil(1000));
            assert_eq!(reply.header("x-should-retry"), None, "a retry may well succeed");
        }
    }
    assert_eq!(client.get("/ready").await.status, 200);
    // More than could ever fit is no matter of time.
    let many = json!({"prompt": ["a", "b", "c"], "max_tokens": 1});
    assert_eq!(client.post(COMPLETIONS, many).await.status, 400);
    drop((running, waiting));
    let freed = client.post_while(429, COMPLETIONS, json!({"prompt": "x", "max_tokens": 1})).await;
    assert_eq!(freed.status, 200, "{}", freed.text);
    // More choices than seats take their turns.
    let several = json!({"prompt": "x", "n": 2, "max_tokens": 3, "seed": 1});
    assert_eq!(client.ok(COMPLETIONS, several).await.json()["choices"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn a_server_that_loads_says_so() {
    let app = App::with_store(&config(), Arc::new(InMemory::default())).expect("the router");
    let client = Client::of(app.router);
    for reply in [client.get("/ready").await, client.post(COMPLETIONS, json!({"prompt": "x"})).await] {
        assert_eq!((reply.status, reply.code().as_str()), (503, "loading"));
        assert!(reply.header("retry-after").is_some() && reply.header("retry-after-ms").is_some());
    }
    assert_eq!(client.get("/health").await.status, 200);
    app.sessions.open(load_models(&config(), &|_, _, _| {}).expect("the embedded model"));
    assert_eq!(client.get("/ready").await.status, 200);
    client.ok(COMPLETIONS, json!({"prompt": "x", "max_tokens": 1})).await;
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let client = Server::shared().client();
    let unknown = StateId::new(1, 2).to_string();
    let upper = unknown.to_uppercase();
    for id in [&unknown, &upper, "st_", "", "../../../etc/passwd", &"x".repeat(10_000), "st_\u{0}"] {
        for (path, new) in [(COMPLETIONS, json!({"prompt": "x"})), (CHAT, json!({"messages": user("x")}))] {
            for stream in [false, true] {
                let reply = client.post(path, with(new.clone(), json!({"state_id": id, "stream": stream}))).await;
                assert_eq!((reply.status, reply.code().as_str()), (404, "state_not_found"), "{id:.60}");
                assert_eq!(reply.error()["param"], "state_id");
            }
        }
    }
    for id in [&*unknown, "st_x", "%00", "%2e%2e", "%ff"] {
        for reply in [client.get(&format!("/v1/states/{id}")).await, client.delete(&format!("/v1/states/{id}")).await] {
            assert_eq!(reply.status, 404, "{id}: {}", reply.text);
            reply.error();
        }
    }
    for id in ["nobody", "a%20b", "%00", "%2e%2e", "%ff"] {
        for path in [format!("/v1/sessions/{id}"), format!("/v1/sessions/{id}/turns")] {
            let reply = client.get(&path).await;
            assert_eq!(reply.status, 404, "{path}: {}", reply.text);
            reply.error();
        }
        assert_eq!(client.delete(&format!("/v1/sessions/{id}")).await.status, 404);
    }
    assert_eq!(client.get("/v1/states?after=x").await.error()["param"], "after");
    assert_eq!(client.get("/v1/sessions?after=a%2Fb").await.error()["param"], "after");
}

#[tokio::test]
async fn a_turn_has_one_beginning() {
    let client = Server::shared().client();
    let state = client.ok(COMPLETIONS, json!({"prompt": "A", "max_tokens": 1, "store_state": true})).await.state_id();
    for (path, new) in [(COMPLETIONS, json!({"prompt": "x"})), (CHAT, json!({"messages": user("x")}))] {
        for (more, param) in [
            (json!({"state_id": state, "session_id": "s"}), "session_id"),
            (json!({"state_id": state, "initial_state": "x"}), "initial_state"),
            (json!({"initial_state": "x"}), "initial_state"),
            (json!({"session_id": "s", "n": 2}), "session_id"),
            (json!({"session_id": "s", "store_state": false}), "store_state"),
            (json!({"session_id": "a/b"}), "session_id"),
            (json!({"state_ttl_s": 60}), "state_ttl_s"),
        ] {
            let reply = client.post(path, with(new.clone(), more.clone())).await;
            assert_eq!((reply.status, reply.error()["param"].as_str()), (400, Some(param)), "{path} {more}");
        }
    }
    let prompts = json!({"prompt": ["a", "b"], "session_id": "s"});
    assert_eq!(client.post(COMPLETIONS, prompts).await.error()["param"], "session_id");
    for fresh in [json!({"messages": []}), json!({"messages": [], "session_id": "never-begun"})] {
        assert_eq!(client.post(CHAT, fresh).await.error()["param"], "messages");
    }
    assert_eq!(client.get("/v1/sessions/never-begun").await.status, 404, "a refused turn begins no session");
    assert_eq!(client.get("/v1/sessions/s").await.status, 404);
}
