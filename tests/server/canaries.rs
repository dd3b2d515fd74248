//! Leak canaries: two hundred sessions of four tenants, each with a secret, all at once. No answer, listing, log of turns or
//! kept state of one ever shows another's.

use std::sync::Arc;

use futures::stream::{self, StreamExt};
use rewake::api::Key;
use rewake::config::Config;
use rewake::state::{Archive, InMemory, Store};
use rewake::text;
use rewake::types::StateId;
use serde_json::{Value, json};

use crate::server::{CHAT, COMPLETIONS, Client, Server, config};
use crate::user;

const TENANTS: usize = 4;
const SESSIONS: usize = 200;

/// Five letters that no other session has, spelled so that each is tokens of its own.
fn secret(session: usize) -> String {
    let letters = "bcdfghjklm".as_bytes();
    let digits = [session / 100, session / 10 % 10, session % 10];
    digits.iter().map(|&digit| letters[digit] as char).fold("qx".into(), |text, letter| text + &letter.to_string())
}

fn key(tenant: usize) -> Key {
    let name = format!("t{tenant}");
    crate::key(&name, &name)
}

/// Where a session's tenant calls it what every other tenant calls one of its own.
fn name(session: usize) -> String {
    format!("chat-{}", session / TENANTS)
}

fn turns(session: usize) -> Vec<(&'static str, Value)> {
    let (id, secret) = (name(session), secret(session));
    let rules = json!({"temperature": 0.8, "seed": session, "max_tokens": 12, "session_id": id});
    let said = format!("My secret word is {secret}. Say {secret}.");
    let first = if session.is_multiple_of(2) {
        (CHAT, crate::with(rules.clone(), json!({"messages": user(&said)})))
    } else {
        (COMPLETIONS, crate::with(rules.clone(), json!({"prompt": said})))
    };
    vec![first, (COMPLETIONS, crate::with(rules, json!({"prompt": " It was"})))]
}

/// Fails if a text has any session's secret but `own`.
fn no_other(text: &str, own: usize, place: &str) {
    for other in (0..SESSIONS).filter(|other| *other != own) {
        assert!(!text.contains(&secret(other)), "{place} of session {own} shows the secret of {other}: {text}");
    }
}

async fn pages(client: &Client, path: &str) -> Vec<Value> {
    let (mut all, mut after) = (Vec::new(), String::new());
    loop {
        let page = client.get(&format!("{path}limit=100{after}")).await.json();
        all.extend(page["data"].as_array().expect("a list").clone());
        if page["has_more"] != true {
            return all;
        }
        after = format!("&after={}", page["last_id"].as_str().expect("an id"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_sees_another_s_secret() {
    let store = Arc::new(InMemory::default());
    let config = Config { key: (0..TENANTS).map(key).collect(), ..config() };
    let server = Server::with(&config, store.clone());
    let client = |session: usize| server.client().with_key(&format!("sk-t{}", session % TENANTS));
    let tokenizer =
        text::from_json(include_bytes!("../../assets/demo/tokenizer.json")).expect("the embedded tokenizer");

    // All at once, so that their rows share the model's steps.
    let answers = stream::iter(0..SESSIONS).map(|session| {
        let client = client(session);
        async move {
            let mut said = Vec::new();
            for (path, body) in turns(session) {
                let reply = client.ok(path, body).await;
                no_other(&reply.text, session, "an answer");
                said.push(reply);
            }
            let (id, last) = (name(session), said.last().expect("two turns").state_id());
            client.ok(&format!("/v1/sessions/{id}/fork"), json!({"to": format!("{id}-fork"), "at": 1})).await;
            (session, said, last)
        }
    });
    let answers: Vec<_> = answers.buffer_unordered(48).collect().await;

    // What each was told is what it would have been told alone.
    let alone = Server::new();
    for (session, said, _) in answers.iter().filter(|(session, ..)| session % 10 == 3) {
        for ((path, mut body), reply) in turns(*session).into_iter().zip(said) {
            body["session_id"] = json!(format!("alone-{session}"));
            assert_eq!(alone.client().ok(path, body).await.answer(), reply.answer());
        }
    }

    let archive = Archive::new(store.clone());
    for (session, _, state) in &answers {
        let (session, id, client) = (*session, name(*session), client(*session));
        let tenant = key(session % TENANTS).tenant;
        for name in [id.clone(), format!("{id}-fork")] {
            let log = client.get(&format!("/v1/sessions/{name}/turns?token_ids=true")).await;
            assert!(log.text.contains(&secret(session)), "its own is there: {}", log.text);
            no_other(&log.text, session, "the log");
        }
        // The kept state: what it has read last, and what it will read next.
        let kept = archive.load(&tenant, &StateId::parse(state.as_str()).expect("an id"), 0).await;
        let kept = kept.expect("a store").expect("it is there").memory;
        let read = String::from_utf8_lossy(&tokenizer.decode(&kept.tail)).into_owned();
        assert!(read.contains(&secret(session)), "{read}");
        no_other(&read, session, "a kept state");
        no_other(&String::from_utf8_lossy(&tokenizer.decode(&kept.pending.goes_on)), session, "a kept state");
        // Nobody else can even ask.
        let other = self::Client::with_key(&server.client(), &format!("sk-t{}", (session + 1) % TENANTS));
        let body = json!({"prompt": "Say it.", "state_id": state, "max_tokens": 1});
        assert_eq!(other.post(COMPLETIONS, body).await.code(), "state_not_found");
        assert_eq!(other.get(&format!("/v1/states/{state}")).await.code(), "state_not_found");
    }
    for tenant in 0..TENANTS {
        let client = client(tenant);
        let (states, sessions) = (pages(&client, "/v1/states?").await, pages(&client, "/v1/sessions?").await);
        assert_eq!((states.len(), sessions.len()), (2 * SESSIONS / TENANTS, 2 * SESSIONS / TENANTS));
        let listed = json!([states, sessions]).to_string();
        for session in 0..SESSIONS {
            assert!(!listed.contains(&secret(session)), "listings hold no text");
        }
        let own: Vec<&str> =
            answers.iter().filter(|(s, ..)| s % TENANTS == tenant).map(|(.., state)| state.as_str()).collect();
        assert!(own.iter().all(|state| listed.contains(state)));
        let foreign = answers.iter().filter(|(s, ..)| s % TENANTS != tenant);
        assert!(foreign.into_iter().all(|(.., state)| !listed.contains(state.as_str())));
    }
    // Every object of the store lies under its tenant.
    let folders = store.children("t", None, 99).await.expect("a store");
    assert_eq!(folders, ["t0", "t1", "t2", "t3"]);
    for metric in server.client().get("/metrics").await.text.lines() {
        no_other(metric, SESSIONS, "a metric");
    }
}
