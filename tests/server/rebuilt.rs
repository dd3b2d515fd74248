//! Lost and evicted states: the token log brings them back to the same bits.

use std::path::Path;
use std::sync::Arc;

use rewake::config::Config;
use rewake::state::{Archive, InMemory, Local, Store};
use rewake::types::{SessionId, Snapshot, StateId, Tenant};
use serde_json::{Value, json};

use crate::server::{CHAT, COMPLETIONS, Client, Reply, Server, config, get};
use crate::{user, with};

/// Sampling that depends on all a snapshot carries.
fn rules() -> Value {
    json!({"temperature": 1.0, "seed": 11, "frequency_penalty": 0.7, "presence_penalty": 0.3, "penalty_decay": 0.93,
           "repetition_penalty": 1.2})
}

/// One turn after another: answers that are cut, that go on, that end at a stop string, and new text.
fn script() -> Vec<(&'static str, Value)> {
    let text = |prompt: &str, more: Value| (COMPLETIONS, with(with(rules(), json!({"prompt": prompt})), more));
    let chat = |messages: Value, more: Value| (CHAT, with(with(rules(), json!({"messages": messages})), more));
    vec![
        text("Once upon a time", json!({"max_tokens": 9})),
        text("", json!({"max_tokens": 6})),
        text("", json!({"max_tokens": 5, "stop": ["zebra", "\n\n"]})),
        text(" The big dog", json!({"max_tokens": 40, "stop": [" the", "."]})),
        text("", json!({"max_tokens": 8})),
        chat(user("Tell me about it."), json!({"max_tokens": 10})),
        chat(json!([]), json!({"max_tokens": 7})),
        chat(user("Why?"), json!({"max_tokens": 300})),
        text(" So", json!({"max_tokens": 3})),
    ]
}

async fn say(client: &Client, session: &str, (path, body): &(&str, Value)) -> Reply {
    client.ok(path, with(body.clone(), json!({ "session_id": session }))).await
}

async fn memory(store: &Arc<InMemory>, state: &str) -> Option<Snapshot> {
    let id = StateId::parse(state).expect("an id");
    Archive::new(store.clone()).load(&Tenant::local(), &id, 0).await.expect("a store")
}

#[tokio::test]
async fn a_lost_snapshot_changes_nothing_whatever_follows() {
    let store = Arc::new(InMemory::default());
    let server = Server::over(store.clone());
    let client = server.client();
    let script = script();
    let mut whole = Vec::new();
    for turn in &script {
        whole.push(say(&client, "whole", turn).await);
    }
    // One session loses every snapshot as soon as it is there, another one all of them at once before the last turn.
    for (n, turn) in script.iter().enumerate() {
        let reply = say(&client, "lost", turn).await;
        assert_eq!(reply.answer(), whole[n].answer(), "turn {}", n + 1);
        assert_eq!(reply.finish(), whole[n].finish());
        let (told, expected) = (memory(&store, &reply.state_id()).await, memory(&store, &whole[n].state_id()).await);
        assert_eq!(told.expect("kept").memory, expected.expect("kept").memory, "turn {}: to the bit", n + 1);
        assert_eq!(client.delete(&format!("/v1/states/{}", reply.state_id())).await.status, 200);
    }
    for at in 1..script.len() {
        let to = format!("at-{at}");
        client.ok("/v1/sessions/lost/fork", json!({"to": to, "at": at})).await;
        let reply = say(&client, &to, &script[at]).await;
        assert_eq!(reply.answer(), whole[at].answer(), "after turn {at}");
        let (told, expected) = (memory(&store, &reply.state_id()).await, memory(&store, &whole[at].state_id()).await);
        assert_eq!(told.expect("kept").memory, expected.expect("kept").memory, "after turn {at}: to the bit");
        // What had to be read again was not cached, and the context is as long as it was.
        let (usage, expected) = (reply.json()["usage"].clone(), whole[at].json()["usage"].clone());
        assert_eq!(usage["prompt_tokens"], expected["prompt_tokens"]);
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    }
}

fn keeping(snapshots: u64) -> Config {
    let mut config = config();
    config.states.session_snapshots = snapshots;
    config
}

/// Waits for the evictions that follow a turn.
async fn settled(client: &Client, states: usize) -> Vec<String> {
    for _ in 0..10_000 {
        let list = client.get("/v1/states?limit=100").await.json();
        let ids: Vec<String> =
            list["data"].as_array().expect("states").iter().map(|s| s["id"].as_str().expect("an id").into()).collect();
        if ids.len() == states {
            return ids;
        }
        tokio::task::yield_now().await;
    }
    panic!("there are still more than {states} states");
}

#[tokio::test]
async fn old_states_are_evicted_and_come_back_when_they_are_asked_for() {
    let all = Server::new();
    let store = Arc::new(InMemory::default());
    let few = Server::with(&keeping(2), store.clone());
    let (all, few) = (all.client(), few.client());
    let mut states = Vec::new();
    let mut told = Vec::new();
    for turn in &script() {
        let (expected, reply) = (say(&all, "s", turn).await, say(&few, "s", turn).await);
        assert_eq!(reply.answer(), expected.answer());
        states.push((expected.state_id(), reply.state_id()));
        told.push(few.get(&format!("/v1/states/{}", reply.state_id())).await.json());
        settled(&few, states.len().min(2)).await;
    }
    let kept: Vec<_> = states[states.len() - 2..].iter().map(|(_, state)| state.clone()).collect();
    assert_eq!(settled(&few, 2).await, kept);
    for (n, (expected, state)) in states.iter().enumerate() {
        assert_eq!(few.get(&format!("/v1/states/{state}")).await.json(), told[n], "it is told of as before");
        if n % 2 == 0 {
            let file = few.send(get(&format!("/v1/states/{state}/content"))).await.expect("the server answers");
            assert_eq!(file.status(), 200, "it comes back to be downloaded");
        }
        let on =
            |state: &str, new: &str| with(rules(), json!({"prompt": new, "state_id": state, "store_state": false}));
        for new in ["", " And"] {
            let answer = few.ok(COMPLETIONS, on(state, new)).await.answer();
            assert_eq!(answer, all.ok(COMPLETIONS, on(expected, new)).await.answer(), "after turn {}", n + 1);
        }
        let again = memory(&store, state).await.expect("it is stored again");
        assert_eq!((again.head.id.as_str(), again.head.turn), (state.as_str(), n as u64 + 1));
    }
    // Going back to an evicted turn costs nothing, and the next turn rebuilds it.
    let fresh = Server::with(&keeping(1), store.clone());
    let client = fresh.client();
    let back = client.ok("/v1/sessions/s/rewind", json!({"at": 4})).await.json();
    assert_eq!(back["head"], states[3].1);
    all.ok("/v1/sessions/s/rewind", json!({"at": 4})).await;
    let next = json!({"prompt": " But", "session_id": "s", "max_tokens": 9, "temperature": 0});
    assert_eq!(client.ok(COMPLETIONS, next.clone()).await.answer(), all.ok(COMPLETIONS, next).await.answer());
}

#[tokio::test]
async fn what_a_client_deletes_does_not_come_back_by_its_id() {
    let server = Server::with(&keeping(1), Arc::new(InMemory::default()));
    let client = server.client();
    let first = say(&client, "s", &script()[0]).await.state_id();
    say(&client, "s", &script()[1]).await;
    settled(&client, 1).await;
    let by_id = json!({"prompt": "x", "state_id": first, "max_tokens": 1});
    client.ok(COMPLETIONS, by_id.clone()).await;
    assert_eq!(client.delete(&format!("/v1/states/{first}")).await.status, 200);
    assert_eq!(client.post(COMPLETIONS, by_id).await.code(), "state_not_found");
    assert_eq!(client.get(&format!("/v1/states/{first}")).await.code(), "state_not_found");
    // It still is a turn of its session, whose log is the truth, but not by that id.
    for (route, body) in [("rewind", json!({"at": first})), ("fork", json!({"at": first, "to": "f"}))] {
        let refused = client.post(&format!("/v1/sessions/s/{route}"), body).await;
        assert_eq!((refused.status, refused.code().as_str()), (404, "state_not_found"));
        assert_eq!(refused.error()["param"], "at");
    }
    let back = client.ok("/v1/sessions/s/rewind", json!({"at": 1})).await;
    assert_eq!(back.json()["turn"], 1);
    say(&client, "s", &script()[1]).await;
}

/// A server over a folder, and the folder of its sessions.
async fn on_disk(config: &Config) -> (Server, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Local::open(folder.path().to_owned()).await.expect("a good folder");
    (Server::with(config, Arc::new(store)), folder)
}

fn flip(file: &Path, at: usize) {
    let mut bytes = std::fs::read(file).expect("the file");
    bytes[at] ^= 0x10;
    std::fs::write(file, bytes).expect("the file");
}

#[tokio::test]
async fn a_damaged_state_is_rebuilt_by_its_id() {
    let (server, folder) = on_disk(&config()).await;
    let client = server.client();
    let mut last = String::new();
    for turn in &script()[..3] {
        last = say(&client, "s", turn).await.state_id();
    }
    let on = with(rules(), json!({"prompt": "", "state_id": last, "store_state": false, "max_tokens": 9}));
    let expected = client.ok(COMPLETIONS, on.clone()).await.answer();
    let file = folder.path().join("t/local/states").join(&last);
    flip(&file, 100_000);
    assert_eq!(client.ok(COMPLETIONS, on.clone()).await.answer(), expected);
    let cached = |reply: Reply| reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"].clone();
    assert_ne!(cached(client.ok(COMPLETIONS, on).await), 0, "it is stored again");
}

#[tokio::test]
async fn a_strange_file_among_the_sessions_is_none_of_them() {
    let (server, folder) = on_disk(&config()).await;
    let client = server.client();
    say(&client, "s", &script()[0]).await;
    std::fs::write(folder.path().join("t/local/sessions/.DS_Store"), "junk").expect("a file");
    assert_eq!(client.get("/v1/sessions").await.json()["data"].as_array().map(Vec::len), Some(1));
    for id in [".DS_Store", "nobody"] {
        assert_eq!(client.get(&format!("/v1/sessions/{id}")).await.code(), "session_not_found");
    }
    assert_eq!(client.get(&format!("/v1/states/st_{}", "1".repeat(44))).await.code(), "state_not_found");
}

#[tokio::test]
async fn a_damaged_older_record_is_listed_as_damaged_and_nothing_else_fails() {
    let (server, folder) = on_disk(&config()).await;
    let client = server.client();
    let script = script();
    let mut expected = Vec::new();
    for turn in &script {
        expected.push(say(&client, "whole", turn).await);
    }
    let mut states = Vec::new();
    for turn in &script[..5] {
        states.push(say(&client, "s", turn).await.state_id());
    }
    let record = |n: u64| folder.path().join(format!("t/local/sessions/s/{n:012}"));
    flip(&record(2), 40);
    let list = client.get("/v1/sessions/s/turns").await.json();
    let (damaged, whole): (Vec<&Value>, Vec<&Value>) =
        list["data"].as_array().expect("turns").iter().partition(|turn| turn["damaged"] == true);
    let numbers = |turns: Vec<&Value>| turns.into_iter().map(|turn| turn["turn"].clone()).collect::<Vec<_>>();
    assert_eq!((numbers(whole), numbers(damaged)), (vec![1.into(), 3.into(), 4.into(), 5.into()], vec![2.into()]));
    let page = client.get(&format!("/v1/sessions/s/turns?limit=2&after={}", states[0])).await.json();
    let turns = (&page["data"][0]["turn"], &page["data"][1]["turn"]);
    assert_eq!((turns, &page["has_more"]), ((&json!(2), &json!(3)), &json!(true)));
    assert_eq!(client.get("/v1/sessions").await.json()["data"].as_array().map(Vec::len), Some(2));
    // It goes on, and a snapshot that is lost after the damage is rebuilt from one between the two.
    std::fs::remove_file(folder.path().join("t/local/states").join(&states[4])).expect("the snapshot");
    for (turn, expected) in script[5..].iter().zip(&expected[5..]) {
        assert_eq!(say(&client, "s", turn).await.answer(), expected.answer());
    }
    assert_eq!(client.ok("/v1/sessions/s/fork", json!({"to": "f", "at": 4})).await.json()["turn"], 4);
    let lost = client.post("/v1/sessions/s/fork", json!({"to": "g", "at": 2})).await;
    assert_eq!((lost.status, lost.code().as_str()), (500, "session_damaged"));
    // Without any snapshot after the damage there is nothing to read it again from.
    for state in std::fs::read_dir(folder.path().join("t/local/states")).expect("a folder") {
        std::fs::remove_file(state.expect("an entry").path()).expect("a file");
    }
    let gone = client.post(COMPLETIONS, json!({"prompt": "x", "session_id": "s"})).await;
    assert_eq!((gone.status, gone.code().as_str()), (404, "state_not_found"));
    client.ok(COMPLETIONS, json!({"prompt": "x", "session_id": "whole", "max_tokens": 1})).await;
}

#[tokio::test]
async fn a_repeated_key_is_found_however_many_turns_ago_it_was() {
    let store = Arc::new(InMemory::default());
    let server = Server::over(store.clone());
    let client = server.client();
    let turn = json!({"prompt": "A", "session_id": "s", "max_tokens": 1});
    client.ok(COMPLETIONS, turn.clone()).await;
    // A turn with that key was cut off after it had left its mark.
    let (tenant, session) = (Tenant::local(), SessionId::parse("s").expect("a name"));
    Archive::new(store.clone()).note_key(&tenant, &session, "k", 2).await.expect("a store");
    client.ok(COMPLETIONS, turn.clone()).await;
    let keyed = client.post_with(COMPLETIONS, &[("idempotency-key", "k")], turn.clone()).await;
    assert_eq!(keyed.json()["state"]["turn"], 3);
    for _ in 0..70 {
        client.ok(COMPLETIONS, turn.clone()).await;
    }
    let again = client.post_with(COMPLETIONS, &[("idempotency-key", "k")], turn.clone()).await;
    assert_eq!(again.json(), keyed.json());
    assert_eq!(client.get("/v1/sessions/s").await.json()["turn"], 73);
    // The key of a session that was deleted is free again.
    client.delete("/v1/sessions/s").await;
    let anew = client.post_with(COMPLETIONS, &[("idempotency-key", "k")], turn.clone()).await;
    assert_eq!(anew.json()["state"]["turn"], 1);
    assert_eq!(client.post_with(COMPLETIONS, &[("idempotency-key", "k")], turn).await.json(), anew.json());
}

#[tokio::test]
async fn a_key_whose_turn_still_runs_is_to_be_asked_for_again() {
    let server = Server::new();
    let client = server.client();
    let body = with(crate::endless(), json!({"session_id": "s", "stream": true}));
    let mut request = crate::server::post(COMPLETIONS, body.to_string());
    request.headers_mut().insert("idempotency-key", "k".parse().expect("a header"));
    let running = client.send(request).await.expect("the server answers");
    let same = client.post_with(COMPLETIONS, &[("idempotency-key", "k")], body.clone()).await;
    assert_eq!((same.status, same.code().as_str()), (409, "session_busy"));
    assert_eq!(same.header("x-should-retry"), None, "an SDK asks again by itself");
    assert!(same.header("retry-after-ms").is_some());
    let other = client.post_with(COMPLETIONS, &[("idempotency-key", "l")], body).await;
    assert_eq!((other.code().as_str(), other.header("x-should-retry")), ("session_busy", Some("false")));
    drop(running);
}

/// A file that is gone, or is damaged to its first byte, with no mark of why.
#[tokio::test]
async fn a_state_that_was_lost_is_found_by_its_id_in_the_log() {
    let whole = Server::new().client();
    let store = Arc::new(InMemory::default());
    // What is lost shall not be found again in memory.
    let client = Server::with(&crate::server::forgetful(config()), store.clone()).client();
    let lose = async |state: &str| {
        assert!(store.delete(&format!("t/local/states/{state}")).await.expect("a store"), "{state} was there");
    };
    for n in 0..40 {
        client.ok(COMPLETIONS, json!({"prompt": "x", "max_tokens": 1, "session_id": format!("other-{n}")})).await;
    }
    let (mut expected, mut states) = (Vec::new(), Vec::new());
    for turn in &script() {
        expected.push(say(&whole, "s", turn).await.state_id());
        states.push(say(&client, "s", turn).await.state_id());
    }
    client.ok("/v1/sessions/s/fork", json!({"to": "forked", "at": 5})).await;
    client.ok("/v1/sessions/s/rewind", json!({"at": 3})).await;
    say(&client, "s", &script()[3]).await;
    let told: Vec<String> = {
        let mut told = Vec::new();
        for state in &states {
            told.push(client.get(&format!("/v1/states/{state}")).await.text);
        }
        told
    };
    let go_on = |state: &str| {
        with(rules(), json!({"prompt": " And", "state_id": state, "max_tokens": 9, "store_state": false}))
    };
    for (n, state) in states.iter().enumerate() {
        lose(state).await;
        if n % 2 == 1 {
            let junk = bytes::Bytes::from_static(b"no safetensors file");
            store.put_if_absent(&format!("t/local/states/{state}"), junk).await.expect("a store");
        }
        let shown = client.get(&format!("/v1/states/{state}")).await;
        assert_eq!((shown.status, &shown.text), (200, &told[n]), "turn {}", n + 1);
        let reply = client.ok(COMPLETIONS, go_on(state)).await;
        assert_eq!(reply.answer(), whole.ok(COMPLETIONS, go_on(&expected[n])).await.answer(), "turn {}", n + 1);
        assert!(memory(&store, state).await.is_some(), "it is stored again");
    }
    // What a client deletes stays so, though it was lost before or is lost after.
    for (state, before) in [(&states[0], true), (&states[1], false)] {
        if before {
            lose(state).await;
        }
        assert_eq!(client.delete(&format!("/v1/states/{state}")).await.status, 200);
        for reply in [
            client.get(&format!("/v1/states/{state}")).await,
            client.delete(&format!("/v1/states/{state}")).await,
            client.post(COMPLETIONS, go_on(state)).await,
        ] {
            assert_eq!(reply.code(), "state_not_found");
        }
    }
    // And what went with its session, but for what a fork has.
    assert_eq!(client.delete("/v1/sessions/s").await.status, 200);
    lose(&states[3]).await;
    let reply = client.ok(COMPLETIONS, go_on(&states[3])).await;
    assert_eq!(reply.answer(), whole.ok(COMPLETIONS, go_on(&expected[3])).await.answer());
    assert_eq!(client.post(COMPLETIONS, go_on(&states[8])).await.code(), "state_not_found");
    // Nobody's is not found, and looked for in no other's sessions.
    let unknown = StateId::new(1_700_000_000_000, 7).to_string();
    assert_eq!(client.post(COMPLETIONS, go_on(&unknown)).await.code(), "state_not_found");
}
