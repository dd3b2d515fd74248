//! Disks that are full, read-only or forbidden, and what they did to files: what can be given is given, what cannot is said in
//! plain words, and nothing that was there is lost.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rewake::config::{Config, parse_kind};
use rewake::state::{InMemory, Local, Store};
use serde_json::{Value, json};

use crate::server::{COMPLETIONS, Client, Process, Server, config, forgetful, said};
use crate::states::{download, upload};
use crate::store::Failing;
use crate::with;

fn turn(new: &str, session: &str) -> Value {
    json!({"prompt": new, "session_id": session, "temperature": 0, "max_tokens": 6})
}

/// A folder that is there and that nobody may write, where this machine has one for whoever runs this.
#[cfg(unix)]
fn forbidden(parent: &std::path::Path) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let folder = parent.join("forbidden");
    std::fs::create_dir(&folder).expect("a folder");
    std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o500)).expect("it is ours");
    // Permissions are nothing to root, but for the kernel's own folders.
    let refuses = |folder: &PathBuf| folder.is_dir() && std::fs::write(folder.join("probe"), "x").is_err();
    [folder, "/sys/kernel".into()].into_iter().find(refuses)
}

#[cfg(unix)]
#[tokio::test]
async fn a_server_starts_where_nothing_can_be_written() {
    let parent = tempfile::tempdir().expect("a folder");
    let Some(folder) = forbidden(parent.path()) else { return };
    let server = Process::start(&folder, &[]);
    let client = server.client();
    assert_eq!(client.get("/ready").await.status, 200);
    assert_eq!(client.get("/v1/sessions").await.json()["data"], json!([]));
    let reply = client.ok(COMPLETIONS, turn("A cat", "s")).await;
    let undisturbed = Server::shared().client().ok(COMPLETIONS, turn("A cat", "disks:undisturbed")).await;
    assert_eq!(reply.answer(), undisturbed.answer());
    let error = &reply.json()["state_error"];
    assert_eq!(error["code"], "state_store_failed");
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains("may not use the folder") || message.contains("read-only"), "{message}");
    assert!(!message.contains(&*folder.to_string_lossy()), "{message}");
    assert_eq!(client.get("/v1/sessions/s").await.code(), "session_not_found");
}

/// What is not a disk's fault is told at the start, and how it is mended.
#[test]
fn a_file_where_the_folder_should_be_stays_an_error_at_the_start() {
    let parent = tempfile::tempdir().expect("a folder");
    let file = parent.path().join("file");
    std::fs::write(&file, "in the way").expect("a file");
    for wrong in [file.clone(), file.join("below")] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_rewake"));
        command.args(["serve", "--port", "0", "--state-dir"]).arg(&wrong);
        let output = command.output().expect("the binary runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        assert!(said.contains(&*wrong.to_string_lossy()) && said.contains("--state-dir"), "{said}");
    }
}

/// A server over a store that works, until it is told to fail.
fn failing() -> (Arc<Failing<InMemory>>, Server) {
    let store = Arc::new(Failing::new(InMemory::default()));
    store.fail(false);
    let server = Server::over(store.clone());
    (store, server)
}

#[tokio::test]
async fn what_only_stores_says_that_the_disk_is_full_and_changes_nothing() {
    let (store, server) = failing();
    let client = server.client();
    client.ok(COMPLETIONS, turn("A cat", "s")).await;
    client.ok(COMPLETIONS, turn(" and a", "s")).await;
    let alone = json!({"prompt": "A cat", "store_state": true, "max_tokens": 2});
    let alone = client.ok(COMPLETIONS, alone).await.state_id();
    let file = download(&client, &alone).await;
    let response = client.ok("/v1/responses", json!({"input": "A cat", "max_output_tokens": 2})).await.json();
    let response = format!("/v1/responses/{}", response["id"].as_str().expect("an id"));
    let items = json!({"items": [{"role": "user", "content": "A cat"}]});
    let conversation = client.ok("/v1/conversations", items.clone()).await.json();
    let conversation = format!("/v1/conversations/{}", conversation["id"].as_str().expect("an id"));
    let shown = async || {
        let mut all = Vec::new();
        for path in ["/v1/sessions", "/v1/states", "/v1/sessions/s/turns", &response, &format!("{conversation}/items")]
        {
            all.push(client.get(path).await.json());
        }
        all
    };
    let before = shown().await;
    store.fail(true);
    let refused = [
        client.post("/v1/sessions/s/rewind", json!({"at": 1})).await,
        client.post("/v1/sessions/s/fork", json!({"to": "f"})).await,
        client.delete("/v1/sessions/s").await,
        client.delete(&format!("/v1/states/{alone}")).await,
        client.post("/v1/states", json!({"prompt": "A dog"})).await,
        upload(&client, file).await,
        client.post("/v1/conversations", items.clone()).await,
        client.post(&format!("{conversation}/items"), items.clone()).await,
        client.post(&conversation, json!({"metadata": {"a": "b"}})).await,
        client.delete(&conversation).await,
        client.delete(&response).await,
        client.post("/v1/responses", json!({"input": "A cat", "background": true})).await,
    ];
    for (n, reply) in refused.iter().enumerate() {
        assert_eq!((reply.status, reply.code().as_str()), (500, "store_failed"), "{n}: {}", reply.text);
        let message = reply.error()["message"].as_str().expect("a message").to_owned();
        assert!(message.contains("the disk that holds states is full"), "{n}: {message}");
        assert!(!message.contains("t/local"), "{n}: {message}");
        assert_eq!(reply.header("x-should-retry"), Some("false"));
    }
    assert_eq!(server.sessions.sweep().await.expect("it can be read"), Default::default());
    assert_eq!(shown().await, before);
    store.fail(false);
    assert_eq!(shown().await, before);
    assert_eq!(left(&*store).await.len(), 1, "but for the stored response nothing is left of any");
    assert_eq!(client.ok("/v1/sessions/s/rewind", json!({"at": 1})).await.json()["turn"], 1);
}

#[tokio::test]
async fn a_response_that_cannot_be_stored_is_delivered_and_says_so() {
    let (store, server) = failing();
    let client = server.client();
    let ask = json!({"input": "A cat", "temperature": 0, "max_output_tokens": 5});
    let well = client.ok("/v1/responses", ask.clone()).await.json();
    // The state is kept, and what makes it a response is not.
    store.only("/responses/");
    store.fail(true);
    let reply = client.ok("/v1/responses", ask).await.json();
    assert_eq!(reply["output"][0]["content"], well["output"][0]["content"]);
    let message = reply["state_error"]["message"].as_str().expect("a message");
    assert!(message.contains("is full"), "{message}");
    let state = message.split([' ', ',', ':']).find(|word| word.starts_with("st_")).expect("it names the state");
    assert_eq!(client.get(&format!("/v1/states/{state}")).await.status, 200);
    let id = reply["id"].as_str().expect("an id");
    assert_eq!(client.get(&format!("/v1/responses/{id}")).await.code(), "response_not_found");
}

/// The keys that a store holds about streams.
async fn left(store: &dyn Store) -> Vec<String> {
    let mut keys = Vec::new();
    for folder in ["running/local", "t/local/streams", "t/local/responses"] {
        for name in store.children(folder, None, 100).await.expect("a list") {
            keys.push(format!("{folder}/{name}"));
        }
    }
    keys
}

#[tokio::test]
async fn a_detached_response_is_delivered_though_its_journal_cannot_be_written() {
    let (store, server) = failing();
    let client = server.client();
    let body = json!({"prompt": "Once", "seed": 4, "max_tokens": 40, "detach": true});
    let well = client.ok(COMPLETIONS, body.clone()).await.answer();
    let before = left(&*store).await;
    for only in ["", "running/", "/streams/"] {
        store.only(only);
        store.fail(true);
        let whole = client.ok(COMPLETIONS, body.clone()).await;
        let chunks = client.stream(COMPLETIONS, body.clone()).await.all().await;
        store.fail(false);
        assert_eq!((whole.answer(), said(&chunks, 0)), (well.clone(), well.clone()), "{only}");
        for end in [&whole.json(), crate::server::last(&chunks)] {
            assert_eq!(
                (end.get("state"), &end["state_error"]["code"]),
                (Some(&Value::Null), &json!("state_store_failed"))
            );
            let message = end["state_error"]["message"].as_str().expect("a message");
            assert!(message.contains("not detached") && message.contains("is full"), "{message}");
        }
        assert_eq!(left(&*store).await, before, "{only}: no later process begins it again");
    }
}

/// A copy of what a store holds about streams.
async fn copy(store: &InMemory) -> Arc<InMemory> {
    let copy = InMemory::default();
    let mut folders = vec!["running/local".to_owned()];
    for id in store.children("t/local/streams", None, 100).await.expect("a list") {
        folders.push(format!("t/local/streams/{id}"));
    }
    for folder in folders {
        for name in store.children(&folder, None, 1000).await.expect("a list") {
            let key = format!("{folder}/{name}");
            let bytes = store.get(&key).await.expect("a store").expect("it is there");
            copy.put_if_absent(&key, bytes).await.expect("a store");
        }
    }
    Arc::new(copy)
}

/// A long detached answer, and what is left of it by a server that has stopped in the middle: its id and the entries' number.
async fn unfinished(store: &Arc<InMemory>) -> (Value, String, usize) {
    let body = json!({"prompt": "Once", "seed": 4, "temperature": 0.7, "max_tokens": 2000, "logit_bias": {"0": -100}, "detach": true});
    let server = Server::over(store.clone());
    let mut stream = server.client().stream(COMPLETIONS, body.clone()).await;
    let id = stream.next().await.expect("a chunk")["id"].as_str().expect("an id").to_owned();
    for _ in 0..40 {
        stream.next().await.expect("a chunk");
    }
    drop(stream);
    server.sessions.drain();
    server.sessions.finish(Duration::ZERO).await;
    let entries = store.children(&format!("t/local/streams/{id}"), None, 1000).await.expect("a list").len();
    assert!(entries > 4, "{entries}");
    (body, id, entries)
}

async fn truncate(store: &InMemory, key: &str) {
    let bytes = store.get(key).await.expect("a store").expect("it is there");
    store.delete(key).await.expect("a store");
    store.put_if_absent(key, bytes.slice(..bytes.len() / 2)).await.expect("a store");
}

#[tokio::test]
async fn a_damaged_journal_is_computed_again_from_where_it_is_damaged() {
    let whole = Arc::new(InMemory::default());
    let (body, id, entries) = unfinished(&whole).await;
    let uncut = Server::shared().client().ok(COMPLETIONS, with(body, json!({"detach": false}))).await.answer();
    for (at, gone) in [(entries - 1, false), (entries - 1, true), (2, false), (2, true)] {
        let store = copy(&whole).await;
        let key = format!("t/local/streams/{id}/{at:012}");
        if gone {
            store.delete(&key).await.expect("a store");
        } else {
            truncate(&store, &key).await;
        }
        let server = Server::over(store.clone());
        server.sessions.recover().await;
        let all = server.client().resume(&id, None).await.expect("it goes on").all().await;
        assert_eq!(said(&all, 0), uncut, "entry {at} of {entries}, gone: {gone}");
        let aside = store.get(&format!("t/local/aside/{id}-{at}")).await.expect("a store");
        assert_eq!(aside.is_some(), !gone);
    }
}

#[tokio::test]
async fn a_journal_without_its_beginning_is_told_and_can_be_deleted_or_is_swept() {
    let whole = Arc::new(InMemory::default());
    let (_, id, _) = unfinished(&whole).await;
    for (gone, by_hand) in [(false, true), (true, true), (false, false), (true, false)] {
        let store = copy(&whole).await;
        let key = format!("t/local/streams/{id}/{:012}", 0);
        if gone {
            store.delete(&key).await.expect("a store");
        } else {
            truncate(&store, &key).await;
        }
        let server = Server::over(store.clone());
        let client = server.client();
        server.sessions.recover().await;
        let told = client.get(&format!("/v1/streams/{id}")).await;
        assert_eq!((told.status, told.code().as_str()), (500, "response_damaged"), "{}", told.text);
        if by_hand {
            assert_eq!(client.delete(&format!("/v1/responses/{id}")).await.status, 200);
        } else {
            assert_eq!(server.sessions.sweep().await.expect("the store works").set_aside, 1);
        }
        assert_eq!(client.get(&format!("/v1/streams/{id}")).await.code(), "response_not_found");
        assert_eq!(left(&*store).await, [""; 0]);
    }
}

#[tokio::test]
async fn a_response_waits_for_its_weights() {
    let store = Arc::new(InMemory::default());
    let (body, id, entries) = unfinished(&store).await;
    // The same name, and other weights.
    let mut other: Config = config();
    other.model[0].quantize = Some(parse_kind("q8_0").expect("a type"));
    let there = left(&*store).await;
    let wrong = Server::with(&other, store.clone());
    wrong.sessions.recover().await;
    for path in [format!("/v1/streams/{id}"), format!("/v1/responses/{id}")] {
        let told = wrong.client().get(&path).await;
        assert_eq!((told.status, told.code().as_str()), (409, "state_model_mismatch"), "{}", told.text);
        assert!(told.header("retry-after").is_some() && told.header("x-should-retry").is_none());
        assert!(told.text.contains(&id) && told.text.contains("stories"), "{}", told.text);
    }
    assert_eq!(left(&*store).await, there);
    let names = store.children(&format!("t/local/streams/{id}"), None, 1000).await.expect("a list");
    assert_eq!(names.len(), entries, "nothing is written to its journal");
    let deleted = copy(&store).await;

    let right = Server::over(store);
    right.sessions.recover().await;
    let all = right.client().resume(&id, None).await.expect("it goes on").all().await;
    let uncut = Server::shared().client().ok(COMPLETIONS, with(body, json!({"detach": false}))).await.answer();
    assert_eq!(said(&all, 0), uncut);

    // Whoever does not want to wait deletes it.
    let wrong = Server::with(&other, deleted.clone());
    assert_eq!(wrong.client().delete(&format!("/v1/responses/{id}")).await.status, 200);
    assert_eq!(left(&*deleted).await, [""; 0]);
}

async fn keyed(client: &Client, session: &str, key: &str) -> crate::server::Reply {
    client.post_with(COMPLETIONS, &[("idempotency-key", key)], turn("A cat", session)).await
}

#[tokio::test]
async fn a_turn_whose_key_is_damaged_is_not_run_twice() {
    let store = Arc::new(InMemory::default());
    let server = Server::over(store.clone());
    let client = server.client();
    let first = keyed(&client, "s", "one").await.json();
    let names = store.children("t/local/keys/s", None, 9).await.expect("a list");
    let mark = format!("t/local/keys/s/{}", names[0]);
    let good = store.get(&mark).await.expect("a store").expect("it is there");
    let mut flipped = good.to_vec();
    let digit = flipped.iter().position(u8::is_ascii_digit).expect("a number");
    flipped[digit] ^= 1;
    let damages = [good.slice(..0), good.slice(..5), flipped.into()];
    let damage = async |bytes: &bytes::Bytes| {
        store.delete(&mark).await.expect("a store");
        store.put_if_absent(&mark, bytes.clone()).await.expect("a store");
    };
    for bytes in &damages {
        damage(bytes).await;
        // The last turn tells its key itself.
        assert_eq!(keyed(&client, "s", "one").await.json(), first);
    }
    client.ok(COMPLETIONS, turn(" and", "s")).await;
    for bytes in &damages {
        damage(bytes).await;
        let refused = keyed(&client, "s", "one").await;
        assert_eq!((refused.status, refused.code().as_str()), (500, "session_damaged"), "{}", refused.text);
        assert_eq!(refused.error()["param"], "idempotency-key");
        assert_eq!(refused.header("x-should-retry"), Some("false"));
        assert_eq!(client.get("/v1/sessions/s").await.json()["turn"], 2);
    }
    // One of an earlier version was not sealed.
    for bytes in [good.clone(), r#"{"record":1}"#.into()] {
        damage(&bytes).await;
        assert_eq!(keyed(&client, "s", "one").await.json(), first);
    }
    damage(&damages[1]).await;
    assert_eq!(keyed(&client, "s", "two").await.json()["state"]["turn"], 3);
}

#[tokio::test]
async fn a_damaged_turn_stands_in_its_place_among_the_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Local::open(folder.path()).await.expect("a good folder");
    let server = Server::with(&forgetful(config()), Arc::new(store));
    let client = server.client();
    for _ in 0..4 {
        client.ok(COMPLETIONS, turn("A cat", "s")).await;
    }
    let good = client.get("/v1/sessions/s/turns").await.json()["data"].clone();
    let record = folder.path().join("t/local/sessions/s/000000000002");
    let bytes = std::fs::read(&record).expect("a file");
    for gone in [false, true] {
        if gone {
            std::fs::remove_file(&record).expect("it is there");
        } else {
            std::fs::write(&record, &bytes[..bytes.len() / 2]).expect("a file");
        }
        let listed = client.get("/v1/sessions/s/turns").await.json()["data"].clone();
        let damaged = json!({"id": "turn-2", "object": "session.turn", "turn": 2, "damaged": true});
        assert_eq!(listed, json!([good[0], damaged, good[2], good[3]]), "gone: {gone}");
        let page = client.get("/v1/sessions/s/turns?limit=2").await.json();
        assert_eq!((&page["last_id"], &page["has_more"]), (&json!("turn-2"), &json!(true)));
        let page = client.get("/v1/sessions/s/turns?limit=2&after=turn-2").await.json();
        assert_eq!((&page["data"], &page["has_more"]), (&json!([good[2], good[3]]), &json!(false)));
        assert_eq!(client.get("/v1/sessions/s/turns?after=turn-x").await.status, 400);
        assert_eq!(
            client.get(&format!("/v1/sessions/s/turns?after=turn-{}", u64::MAX)).await.json()["data"],
            json!([])
        );
    }
    assert_eq!(client.ok(COMPLETIONS, turn(" so", "s")).await.json()["state"]["turn"], 5);
}

#[tokio::test]
async fn a_conversation_whose_journal_has_a_gap_says_so() {
    let store = Arc::new(InMemory::default());
    let server = Server::over(store.clone());
    let client = server.client();
    let items = json!({"items": [{"role": "user", "content": "A cat"}]});
    let conversation = client.ok("/v1/conversations", items.clone()).await.json();
    let path = format!("/v1/conversations/{}", conversation["id"].as_str().expect("an id"));
    for _ in 0..2 {
        client.ok(&format!("{path}/items"), items.clone()).await;
    }
    assert!(store.delete(&format!("t/local/{}/000000000001", &path[4..])).await.expect("a store"));
    for reply in [client.get(&path).await, client.post(&format!("{path}/items"), items).await] {
        assert_eq!((reply.status, reply.code().as_str()), (500, "conversation_damaged"), "{}", reply.text);
    }
    assert_eq!(client.delete(&path).await.status, 200);
    assert_eq!(client.get(&path).await.code(), "conversation_not_found");
}
