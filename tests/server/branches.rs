//! Sessions that are forked and rewound: every branch says what it would say alone, and nothing is computed twice.

use std::sync::Arc;

use rewake::state::{Archive, InMemory};
use rewake::types::{SessionId, StateId, Tenant};
use serde_json::{Value, json};

use crate::server::{CHAT, COMPLETIONS, Client, Reply, Server, config};
use crate::{endless, user, with};

fn turn(session: &str, new: &str) -> Value {
    json!({"prompt": new, "session_id": session, "temperature": 0.9, "seed": 4, "max_tokens": 7, "presence_penalty": 0.4})
}

async fn fork(client: &Client, from: &str, body: Value) -> Reply {
    client.post(&format!("/v1/sessions/{from}/fork"), body).await
}

async fn rewind(client: &Client, session: &str, at: Value) -> Reply {
    client.post(&format!("/v1/sessions/{session}/rewind"), json!({ "at": at })).await
}

/// The states of a session's turns, with their numbers, and the text of all of them.
async fn turns(client: &Client, session: &str) -> (Vec<(u64, String)>, String) {
    let list = client.get(&format!("/v1/sessions/{session}/turns?limit=100")).await;
    assert_eq!(list.status, 200, "{}", list.text);
    let list = list.json();
    let turns = list["data"].as_array().expect("turns");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let ids = turns.iter().map(|turn| (turn["turn"].as_u64().expect("a number"), text(&turn["id"]))).collect();
    (ids, turns.iter().map(|turn| text(&turn["text"])).collect())
}

/// Runs turns of a session; what it answered.
async fn talk(client: &Client, session: &str, news: &[&str]) -> Vec<Reply> {
    let mut replies = Vec::new();
    for new in news {
        replies.push(client.ok(COMPLETIONS, turn(session, new)).await);
    }
    replies
}

const NEWS: [&str; 5] = ["Once upon a time", " Then", " But", " So the dog", " At last"];

#[tokio::test]
async fn a_fork_goes_on_as_its_source_would_at_every_turn() {
    let server = Server::new();
    let client = server.client();
    let source = talk(&client, "source", &NEWS).await;
    let states: Vec<String> = source.iter().map(Reply::state_id).collect();
    for (n, state) in states.iter().enumerate() {
        for at in [json!(n + 1), json!(state)] {
            let to = format!("fork-{n}-{}", at.is_string());
            let made = fork(&client, "source", json!({"to": to, "at": at})).await.json();
            assert_eq!((&made["id"], &made["object"]), (&json!(to), &json!("session")));
            assert_eq!((&made["head"], &made["turn"]), (&json!(state), &json!(n + 1)));
            let (_, said) = turns(&client, &to).await;
            assert_eq!(turns(&client, &to).await.0.len(), n + 1, "the whole lineage is the fork's");
            let Some(new) = NEWS.get(n + 1) else { continue };
            let (fork, source) = (client.ok(COMPLETIONS, turn(&to, new)).await, &source[n + 1]);
            assert_eq!(fork.answer(), source.answer());
            assert_eq!(fork.json()["usage"], source.json()["usage"], "no token is computed again");
            let state = &fork.json()["state"];
            assert_eq!((&state["parent"], &state["turn"]), (&json!(states[n]), &json!(n + 2)));
            assert_eq!(turns(&client, &to).await.1, format!("{said}{new}{}", fork.answer()));
        }
    }
    // Without `at`, the head; and the source has noticed nothing.
    assert_eq!(fork(&client, "source", json!({"to": "last"})).await.json()["head"], states[4]);
    let (listed, _) = turns(&client, "source").await;
    assert_eq!(listed, (1..=5).zip(states).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_fork_outlives_its_source_and_that_one_s_source() {
    let store = Arc::new(InMemory::default());
    let server = Server::over(store.clone());
    let client = server.client();
    let undisturbed = talk(&client, "undisturbed", &NEWS).await;
    talk(&client, "a", &NEWS[..3]).await;
    fork(&client, "a", json!({"to": "b", "at": 2})).await.json();
    talk(&client, "b", &NEWS[2..4]).await;
    fork(&client, "b", json!({"to": "c", "at": 3})).await.json();
    let before = turns(&client, "c").await;
    for gone in ["a", "b"] {
        assert_eq!(client.delete(&format!("/v1/sessions/{gone}")).await.status, 200);
        server.sessions.sweep().await.expect("the store works");
        assert_eq!(turns(&client, "c").await, before, "after {gone} is gone");
        assert_eq!(client.get(&format!("/v1/sessions/{gone}")).await.status, 404);
    }
    // All of its states are there, inherited ones too.
    for (_, state) in &before.0 {
        assert_eq!(client.get(&format!("/v1/states/{state}")).await.status, 200);
    }
    // And if they were not: the log is.
    for state in client.get("/v1/states?session_id=a").await.json()["data"].as_array().expect("states") {
        client.delete(&format!("/v1/states/{}", state["id"].as_str().expect("an id"))).await;
    }
    for state in client.get("/v1/states?session_id=b").await.json()["data"].as_array().expect("states") {
        client.delete(&format!("/v1/states/{}", state["id"].as_str().expect("an id"))).await;
    }
    let replies = talk(&client, "c", &NEWS[3..]).await;
    for (reply, undisturbed) in replies.iter().zip(&undisturbed[3..]) {
        assert_eq!(reply.answer(), undisturbed.answer());
        assert_eq!(reply.json()["usage"]["prompt_tokens"], undisturbed.json()["usage"]["prompt_tokens"]);
    }
    let forked = fork(&client, "c", json!({"to": "d", "at": 1})).await;
    assert_eq!(forked.json()["turn"], 1);
    assert_eq!(talk(&client, "d", &NEWS[1..2]).await[0].answer(), undisturbed[1].answer());
    // The last that needs them takes them along.
    for gone in ["c", "d"] {
        assert_eq!(client.delete(&format!("/v1/sessions/{gone}")).await.status, 200);
    }
    let left = client.get("/v1/states?limit=100").await.json()["data"].as_array().expect("states").clone();
    assert!(left.iter().all(|state| state["session_id"] == "undisturbed"), "{left:?}");
}

#[tokio::test]
async fn a_fork_costs_the_same_at_any_length() {
    let store = Arc::new(crate::store::Recording::new(InMemory::default()));
    let server = Server::over(store.clone());
    let client = server.client();
    let mut costs = Vec::new();
    for (length, n) in [(1, "short"), (30, "long")] {
        for _ in 0..length {
            client.ok(COMPLETIONS, with(turn(n, " and"), json!({"max_tokens": 1}))).await;
        }
        let metrics = client.get("/metrics").await.text;
        store.forget();
        fork(&client, n, json!({"to": format!("{n}-fork")})).await.json();
        costs.push(store.log().len());
        let steps = |text: &str| text.lines().find(|line| line.starts_with("rewake_steps_total")).map(String::from);
        assert_eq!(steps(&client.get("/metrics").await.text).is_some(), steps(&metrics).is_some());
    }
    assert_eq!(costs[0], costs[1], "calls of the store");
}

#[tokio::test]
async fn what_cannot_be_forked_is_refused() {
    let server = Server::new();
    let client = server.client();
    let states = talk(&client, "s", &NEWS[..2]).await;
    talk(&client, "taken", &NEWS[..1]).await;
    let unknown = StateId::new(1, 2).to_string();
    for (body, status, code, param) in [
        (json!({}), 400, "invalid_value", Some("to")),
        (json!({"to": "a/b"}), 400, "invalid_value", Some("to")),
        (json!({"to": ""}), 400, "invalid_value", Some("to")),
        (json!({"to": "x", "at": 0}), 400, "invalid_value", Some("at")),
        (json!({"to": "x", "at": 3}), 400, "invalid_value", Some("at")),
        (json!({"to": "x", "at": unknown}), 404, "state_not_found", Some("at")),
        (json!({"to": "x", "at": "head"}), 404, "state_not_found", Some("at")),
        (json!({"to": "x", "at": -1}), 400, "invalid_type", Some("at")),
        (json!({"to": "x", "turn": 1}), 400, "unknown_parameter", Some("turn")),
        (json!({"to": "taken"}), 409, "session_exists", Some("to")),
        (json!({"to": "s"}), 409, "session_exists", Some("to")),
    ] {
        let refused = fork(&client, "s", body.clone()).await;
        assert_eq!((refused.status, refused.code().as_str()), (status, code), "{body}: {}", refused.text);
        assert_eq!(refused.error()["param"].as_str(), param, "{body}");
    }
    let odd = fork(&client, "s", json!({"to": "x", "at": true})).await;
    assert_eq!(odd.error()["message"], "`at`: expected the number of a turn or the id of a state");
    assert_eq!(fork(&client, "nobody", json!({"to": "x"})).await.code(), "session_not_found");
    assert_eq!(rewind(&client, "nobody", json!(1)).await.code(), "session_not_found");
    assert_eq!(rewind(&client, "s", Value::Null).await.error()["param"], "at");
    assert_eq!(rewind(&client, "s", json!(9)).await.error()["param"], "at");
    // A state of another session is not a turn of this one.
    let other = client.get("/v1/sessions/taken").await.json()["head"].clone();
    assert_eq!(rewind(&client, "s", other).await.code(), "state_not_found");
    for path in ["/v1/sessions/s/fork", "/v1/sessions/s/rewind"] {
        let tag = format!("\"{}\"", states[0].state_id());
        let moved = client.post_with(path, &[("if-match", &tag)], json!({"to": "x", "at": 1})).await;
        let expected = if path.ends_with("fork") { (412, "session_conflict") } else { (400, "unknown_parameter") };
        assert_eq!((moved.status, moved.code().as_str()), expected);
    }
    let tag = format!("\"{}\"", states[1].state_id());
    let held = client.post_with("/v1/sessions/s/rewind", &[("if-match", &tag)], json!({"at": 1})).await;
    assert_eq!((held.status, &held.json()["turn"]), (200, &json!(1)));
    let moved = client.post_with("/v1/sessions/s/rewind", &[("if-match", &tag)], json!({"at": 1})).await;
    assert_eq!((moved.status, moved.code().as_str()), (412, "session_conflict"));
    assert_eq!(client.get("/v1/sessions").await.json()["data"].as_array().map(Vec::len), Some(2), "nothing was made");
    let delete = |tag: String| client.delete_with("/v1/sessions/s", ("if-match", tag));
    assert_eq!(delete(tag).await.code(), "session_conflict");
    assert_eq!(delete("nonsense".into()).await.error()["param"], "if-match");
    assert_eq!(delete(format!("\"{}\"", states[0].state_id())).await.status, 200);
}

#[tokio::test]
async fn a_rewound_session_goes_on_from_there_and_can_come_back() {
    let server = Server::new();
    let client = server.client();
    let first = talk(&client, "s", &NEWS).await;
    let states: Vec<String> = first.iter().map(Reply::state_id).collect();
    let back = rewind(&client, "s", json!(2)).await.json();
    assert_eq!(
        (&back["head"], &back["turn"], &back["tokens"]),
        (&json!(states[1]), &json!(2), &first[1].json()["state"]["tokens"])
    );
    assert_eq!(turns(&client, "s").await.0.len(), 2);
    // The same new text gives the same turn, other text another one.
    let again = talk(&client, "s", &NEWS[2..3]).await;
    assert_eq!((again[0].answer(), &again[0].json()["state"]["turn"]), (first[2].answer(), &json!(3)));
    assert_ne!(again[0].state_id(), states[2]);
    assert_eq!(again[0].json()["usage"], first[2].json()["usage"], "no token is computed again");
    rewind(&client, "s", json!(2)).await.json();
    let other = talk(&client, "s", &[" A wolf"]).await;
    assert_eq!(other[0].json()["state"]["turn"], 3);
    // What was taken back works by its id, as a state and as a place to come back to.
    let on = json!({"prompt": NEWS[4], "state_id": states[3], "temperature": 0.9, "seed": 4, "max_tokens": 7, "presence_penalty": 0.4});
    assert_eq!(client.ok(COMPLETIONS, on).await.answer(), first[4].answer());
    let forth = rewind(&client, "s", json!(states[3])).await.json();
    assert_eq!((&forth["head"], &forth["turn"]), (&json!(states[3]), &json!(4)));
    let (listed, _) = turns(&client, "s").await;
    assert_eq!(listed, (1..=4).zip(states[..4].to_vec()).collect::<Vec<_>>());
    assert_eq!(talk(&client, "s", &NEWS[4..]).await[0].answer(), first[4].answer());
    // To where it is already: nothing happens.
    let here = client.get("/v1/sessions/s").await.json();
    assert_eq!(rewind(&client, "s", json!(5)).await.json(), here);
    // Pages go by turns, whatever records they came by.
    let mut all = Vec::new();
    let mut after = String::new();
    loop {
        let page = client.get(&format!("/v1/sessions/s/turns?limit=2{after}")).await.json();
        all.extend(page["data"].as_array().expect("turns").iter().map(|turn| turn["turn"].clone()));
        after = format!("&after={}", page["last_id"].as_str().expect("an id"));
        if page["has_more"] == false {
            break;
        }
    }
    assert_eq!(all, [1, 2, 3, 4, 5]);
    assert_eq!(client.delete("/v1/sessions/s").await.status, 200);
    let left = client.get("/v1/states").await.json()["data"].as_array().expect("states").clone();
    assert!(left.iter().all(|state| state["session_id"].is_null() || state["id"] == states[3]), "{left:?}");
}

#[tokio::test]
async fn a_session_that_runs_is_not_rewound_but_can_be_forked() {
    let server = Server::new();
    let client = server.client();
    talk(&client, "s", &NEWS[..2]).await;
    let mut running = client.stream(COMPLETIONS, with(endless(), json!({"session_id": "s"}))).await;
    running.begun().await;
    let refused = rewind(&client, "s", json!(1)).await;
    assert_eq!((refused.status, refused.code().as_str()), (409, "session_busy"));
    assert_eq!(fork(&client, "s", json!({"to": "f"})).await.json()["turn"], 2);
    assert_eq!(talk(&client, "f", &NEWS[2..3]).await[0].json()["state"]["turn"], 3);
}

#[tokio::test]
async fn chats_fork_as_well() {
    let server = Server::new();
    let client = server.client();
    let ask = |session: &str, text: &str| json!({"messages": user(text), "session_id": session, "temperature": 0, "max_tokens": 12});
    client.ok(CHAT, ask("s", "Tell me a story.")).await;
    let second = client.ok(CHAT, ask("s", "And then?")).await;
    fork(&client, "s", json!({"to": "f", "at": 1})).await.json();
    assert_eq!(client.ok(CHAT, ask("f", "And then?")).await.answer(), second.answer());
    // A response that was cut goes on in the fork as well, penalties included.
    let rest = |session: &str| json!({"messages": [], "session_id": session, "temperature": 0, "max_tokens": 12, "frequency_penalty": 0.5});
    fork(&client, "s", json!({"to": "g"})).await.json();
    assert_eq!(client.ok(CHAT, rest("g")).await.answer(), client.ok(CHAT, rest("s")).await.answer());
}

/// Another server may be deleting the source while it is forked: either the fork is whole, or there is none.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_fork_and_a_deletion_at_once() {
    let store = Arc::new(InMemory::default());
    let (one, two) = (Server::over(store.clone()), Server::over(store.clone()));
    let tenant = Tenant::local();
    for round in 0..20 {
        let name = format!("s{round}");
        talk(&one.client(), &name, &NEWS[..2]).await;
        let forks = one.client();
        let (forked, deleted) = {
            let (name, deleter) = (name.clone(), two.client());
            let from = name.clone();
            let fork =
                tokio::spawn(async move { fork(&forks, &from, json!({"to": format!("{from}f"), "at": 2})).await });
            let delete = tokio::spawn(async move { deleter.delete(&format!("/v1/sessions/{name}")).await });
            (fork.await.expect("no panic"), delete.await.expect("no panic"))
        };
        assert_eq!(deleted.status, 200, "{}", deleted.text);
        two.sessions.sweep().await.expect("the store works");
        let to = format!("{name}f");
        if forked.status == 200 {
            assert_eq!(turns(&two.client(), &to).await.0.len(), 2);
            for (_, state) in turns(&two.client(), &to).await.0 {
                assert_eq!(two.client().get(&format!("/v1/states/{state}")).await.status, 200);
            }
            talk(&two.client(), &to, &NEWS[2..3]).await;
        } else {
            assert_eq!(forked.code(), "session_not_found");
            let archive = Archive::new(store.clone());
            let head = archive.head(&tenant, &SessionId::parse(to).expect("a name")).await.expect("a store");
            assert_eq!(head.live, None);
        }
    }
}

#[tokio::test]
async fn a_damaged_head_can_be_gone_back_from() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = rewake::state::Local::open(folder.path().to_owned()).await.expect("a good folder");
    let server = Server::with(&config(), Arc::new(store));
    let client = server.client();
    let first = talk(&client, "s", &NEWS[..3]).await;
    std::fs::write(folder.path().join("t/local/sessions/s/000000000003"), "torn").expect("the file");
    assert_eq!(client.post(COMPLETIONS, turn("s", "x")).await.code(), "session_damaged");
    let back = rewind(&client, "s", json!(2)).await.json();
    assert_eq!((&back["turn"], &back["head"]), (&json!(2), &json!(first[1].state_id())));
    assert_eq!(talk(&client, "s", &NEWS[2..3]).await[0].answer(), first[2].answer());
}

#[tokio::test]
async fn a_session_has_the_metadata_that_was_said_last() {
    let server = Server::new();
    let client = server.client();
    let told = async |session: &str| client.get(&format!("/v1/sessions/{session}")).await.json()["metadata"].clone();
    client.ok(COMPLETIONS, with(turn("s", "A"), json!({"metadata": {"topic": "cats", "ü": ""}}))).await;
    client.ok(COMPLETIONS, turn("s", " b")).await;
    assert_eq!(told("s").await, json!({"topic": "cats", "ü": ""}));
    let third = client.ok(COMPLETIONS, with(turn("s", " c"), json!({"metadata": {"topic": "dogs"}}))).await;
    fork(&client, "s", json!({"to": "f", "at": 2})).await.json();
    assert_eq!((told("s").await, told("f").await), (json!({"topic": "dogs"}), json!({"topic": "cats", "ü": ""})));
    let state = client.get(&format!("/v1/states/{}", third.state_id())).await.json();
    assert_eq!(state["metadata"], json!({"topic": "dogs"}));
    let many: serde_json::Map<String, Value> = (0..17).map(|n| (n.to_string(), json!("x"))).collect();
    for bad in
        [json!({"a": 1}), json!({"": "x"}), json!({"a": "x".repeat(513)}), json!({"x".repeat(65): ""}), json!(many)]
    {
        let refused = client.post(COMPLETIONS, with(turn("s", "x"), json!({ "metadata": bad }))).await;
        let param = refused.error()["param"].as_str().expect("a param").to_owned();
        assert!(refused.status == 400 && param.starts_with("metadata"), "{}", refused.text);
    }
}
