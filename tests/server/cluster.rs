//! Servers that share nothing but a bucket: any of them continues any session, no two commit one turn, and what is gone is
//! gone everywhere. `tests/cluster/run.py` shows the same with processes that are killed, a proxy and a real bucket.

use std::sync::Arc;

use object_store::memory::InMemory as Objects;
use rewake::state::{Bounded, Bucket, InMemory, Precision, Tiered, is_state};
use serde_json::{Value, json};

use crate::server::{COMPLETIONS, Client, Server, config};

const SERVERS: usize = 3;

/// Servers over one bucket, each with copies of its own in memory. One of them compresses.
fn servers() -> Vec<Client> {
    let bucket = Arc::new(Objects::new());
    let server = |precision| {
        let mut config = config();
        (config.states.precision, config.states.compress) = precision;
        let shared = Arc::new(Bucket::over(bucket.clone(), "shared"));
        let store = Tiered::new(Bounded::new(InMemory::default(), 2 << 20), shared, is_state);
        Server::with(&config, Arc::new(store)).client()
    };
    // Exact, or texts would differ.
    [(Precision::F32, false), (Precision::F32, true), (Precision::F32, false)].map(server).into()
}

fn turn(session: usize, n: usize) -> Value {
    let prompt = if n == 0 { format!("Once upon a time number {session}") } else { format!(" And {n}") };
    json!({
        "session_id": format!("c{session}"), "prompt": prompt, "seed": session * 100 + n, "temperature": 0.9,
        "max_tokens": 2 + (session + n) % 5, "logit_bias": {"0": -100},
    })
}

#[tokio::test]
async fn turns_that_land_anywhere_say_what_one_server_says() {
    let (servers, alone) = (servers(), Server::new().client());
    for n in 0..12 {
        for session in 0..4 {
            let expected = alone.ok(COMPLETIONS, turn(session, n)).await;
            let reply = servers[(7 * n + 3 * session + n / 3) % SERVERS].ok(COMPLETIONS, turn(session, n)).await;
            assert_eq!((reply.answer(), reply.finish()), (expected.answer(), expected.finish()), "{session}, {n}");
            assert_eq!(reply.json()["state"]["turn"], n + 1, "no server misses another's turn");
        }
    }
    let heads = |client: Client| async move { client.get("/v1/sessions").await.json()["data"].clone() };
    let first = heads(servers[0].clone()).await;
    for server in &servers[1..] {
        assert_eq!(heads(server.clone()).await, first);
    }
}

#[tokio::test]
async fn of_servers_that_run_the_same_turn_at_once_one_commits_it() {
    let servers = servers();
    for round in 0..6 {
        let turn = json!({"session_id": "contended", "prompt": format!(" {round}"), "max_tokens": 3});
        let replies = servers.iter().map(|server| server.post(COMPLETIONS, turn.clone()));
        let replies = futures::future::join_all(replies).await;
        let won: Vec<_> =
            replies.iter().filter(|reply| reply.status == 200 && reply.json()["state"].is_object()).collect();
        let turns: Vec<u64> =
            won.iter().map(|reply| reply.json()["state"]["turn"].as_u64().expect("a number")).collect();
        let mut distinct = turns.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), won.len(), "{turns:?} were told of to several");
        assert!(!won.is_empty(), "somebody always gets on");
        for lost in replies.iter().filter(|reply| !(reply.status == 200 && reply.json()["state"].is_object())) {
            assert!(lost.text.contains("session_conflict"), "{}", lost.text);
        }
    }
}

#[tokio::test]
async fn what_one_server_deletes_no_other_gives_out() {
    let servers = servers();
    let read = servers[0].ok("/v1/states", json!({"prompt": "A cat and a boat", "ttl_s": 3600})).await.json();
    let id = read["id"].as_str().expect("an id").to_owned();
    let go_on = json!({"state_id": id, "max_tokens": 3, "temperature": 0, "store_state": false});
    // Each has a copy now.
    for server in &servers {
        server.ok(COMPLETIONS, go_on.clone()).await;
        server.ok(COMPLETIONS, go_on.clone()).await;
    }
    assert_eq!(servers[1].delete(&format!("/v1/states/{id}")).await.status, 200);
    for server in &servers {
        let reply = server.post(COMPLETIONS, go_on.clone()).await;
        assert_eq!((reply.status, reply.code().as_str()), (404, "state_not_found"));
        assert_eq!(server.get(&format!("/v1/states/{id}/content")).await.status, 404);
        assert_eq!(server.get("/v1/states").await.json()["data"], json!([]));
    }
}

#[tokio::test]
async fn a_server_reads_what_another_stored_less_exactly() {
    let bucket = Arc::new(Objects::new());
    let server = |precision, compress| {
        let mut config = config();
        (config.states.precision, config.states.compress) = (precision, compress);
        Server::with(&config, Arc::new(Bucket::over(bucket.clone(), ""))).client()
    };
    let exact = server(Precision::F32, false);
    for (precision, compress) in [(Precision::F16, true), (Precision::Int8, false), (Precision::Int8, true)] {
        let other = server(precision, compress);
        let begin =
            json!({"prompt": "Once upon a time there was a", "max_tokens": 4, "temperature": 0, "store_state": true});
        let id = other.ok(COMPLETIONS, begin).await.state_id();
        let go_on = json!({"state_id": id, "max_tokens": 12, "temperature": 0, "store_state": false});
        let (here, there) = (other.ok(COMPLETIONS, go_on.clone()).await, exact.ok(COMPLETIONS, go_on).await);
        assert_eq!(here.answer(), there.answer(), "both go on from what is stored");
        let path = format!("/v1/states/{id}");
        assert_eq!(other.get(&path).await.json(), exact.get(&path).await.json());
    }
}
