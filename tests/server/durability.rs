//! When a state is announced it is durable; when it cannot be stored or read, that is said and nothing else breaks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use rewake::state::{Archive, Error, InMemory, Local, Put, Start, Store};
use rewake::types::{StateId, Tenant};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};

use crate::server::{CHAT, COMPLETIONS, Client, Server, config, forgetful, last, piece, said};
use crate::store::{Failing, Op, Recording};
use crate::{user, with};

fn turn(new: &str, session: &str) -> Value {
    json!({"prompt": new, "session_id": session, "temperature": 0, "max_tokens": 6})
}

#[tokio::test]
async fn the_snapshot_then_the_record_then_the_last_chunk() {
    let store = Arc::new(Recording::new(InMemory::default()));
    let server = Server::over(store.clone());
    for path in [COMPLETIONS, CHAT] {
        let new = if path == CHAT { json!({"messages": user("Hi")}) } else { json!({"prompt": "A cat"}) };
        let body = with(new, json!({"session_id": "order", "max_tokens": 5}));
        store.forget();
        let mut stream = server.client().stream(path, body).await;
        let end = loop {
            let chunk = stream.next().await.expect("a finish reason comes");
            if chunk["choices"][0]["finish_reason"].is_string() {
                break chunk;
            }
        };
        let log = store.log();
        let state = format!("t/local/states/{}", end["state"]["id"].as_str().expect("a state"));
        let writes: Vec<&Op> = log.iter().filter(|op| !matches!(op, Op::Read(_) | Op::Listed(_))).collect();
        let turn = end["state"]["turn"].as_u64().expect("a number");
        let record = format!("t/local/sessions/order/{turn:012}");
        let expected = [
            Op::PutBegun(state.clone()),
            Op::PutDone(state, Put::Created),
            Op::PutBegun(record.clone()),
            Op::PutDone(record, Put::Created),
        ];
        assert_eq!(writes, expected.iter().collect::<Vec<_>>());
    }
}

/// A disk that takes as long as the test likes: every put says which it is and waits for leave.
struct Slow {
    inner: Arc<InMemory>,
    begun: mpsc::UnboundedSender<String>,
    leave: Semaphore,
}

impl Store for Slow {
    fn put_if_absent<'a>(&'a self, key: &'a str, value: Bytes) -> BoxFuture<'a, Result<Put, Error>> {
        async move {
            let put = self.inner.put_if_absent(key, value).await;
            self.begun.send(key.into()).expect("the test listens");
            self.leave.acquire().await.expect("it stays open").forget();
            put
        }
        .boxed()
    }
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Bytes>, Error>> {
        self.inner.get(key)
    }
    fn get_start<'a>(&'a self, key: &'a str, len: usize) -> BoxFuture<'a, Result<Option<Start>, Error>> {
        self.inner.get_start(key, len)
    }
    fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<bool, Error>> {
        self.inner.delete(key)
    }
    fn children<'a>(
        &'a self,
        folder: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<String>, Error>> {
        self.inner.children(folder, after, limit)
    }
}

#[tokio::test]
async fn nothing_is_announced_while_it_is_being_written() {
    let (begun, mut puts) = mpsc::unbounded_channel();
    let store = Arc::new(Slow { inner: Arc::default(), begun, leave: Semaphore::new(0) });
    let server = Server::over(store.clone());
    let client = server.client();
    let mut chunks = Vec::new();
    let mut stream = client.stream(COMPLETIONS, turn("A cat", "slow")).await;
    let whole = tokio::spawn({
        let client = client.clone();
        async move { client.ok(COMPLETIONS, turn("A cat", "slow-whole")).await }
    });
    for folder in ["states", "sessions"] {
        // Both turns wait for the same step.
        for _ in 0..2 {
            let key = puts.recv().await.expect("a put");
            assert_eq!(key.split('/').nth(2), Some(folder), "{key}");
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
            while let Some(chunk) = stream.next().now_or_never() {
                let chunk = chunk.expect("the stream goes on");
                assert!(chunk["choices"][0]["finish_reason"].is_null(), "before {folder} is durable: {chunk}");
                chunks.push(chunk);
            }
            assert!(!whole.is_finished(), "before {folder} is durable");
        }
        store.leave.add_permits(2);
    }
    while let Some(chunk) = stream.next().await {
        chunks.push(chunk);
    }
    assert!(last(&chunks)["state"]["id"].is_string());
    assert_eq!(said(&chunks, 0), whole.await.expect("no panic").answer());
    assert!(chunks.iter().filter(|chunk| piece(chunk).is_some()).count() > 2, "text came before");
}

/// Two servers over one store: only one of two turns that saw the same head becomes part of the session.
#[tokio::test]
async fn of_two_servers_one_commits_the_turn() {
    let (begun, mut puts) = mpsc::unbounded_channel();
    let inner = Arc::new(InMemory::default());
    let store = Arc::new(Slow { inner: inner.clone(), begun, leave: Semaphore::new(0) });
    let (slow, quick) = (Server::over(store.clone()), Server::over(inner));
    let first = quick.client().ok(COMPLETIONS, turn("A cat", "raced")).await.state_id();
    let late = tokio::spawn({
        let client = slow.client();
        async move { client.post(COMPLETIONS, turn(" and", "raced")).await }
    });
    puts.recv().await.expect("its snapshot is written");
    let winner = quick.client().ok(COMPLETIONS, turn(" and", "raced")).await;
    // The snapshot, the record, and the snapshot that takes its place.
    store.leave.add_permits(3);
    let loser = late.await.expect("no panic");
    assert_eq!((loser.status, loser.code().as_str()), (409, "session_conflict"));
    assert_eq!(loser.header("x-should-retry"), Some("false"));
    // What it generated is kept as a state of no session, and the refusal says which.
    let kept = loser.header("x-state-id").expect("it is named").to_owned();
    assert!(loser.error()["message"].as_str().is_some_and(|message| message.contains(&kept)), "{}", loser.text);
    let info = quick.client().get(&format!("/v1/states/{kept}")).await.json();
    assert_eq!((&info["session_id"], &info["parent"], &info["turn"]), (&Value::Null, &json!(first), &json!(2)));
    let on = |state: &str| json!({"prompt": "!", "state_id": state, "store_state": false, "temperature": 0});
    let ours = quick.client().ok(COMPLETIONS, on(&kept)).await;
    assert_eq!(ours.answer(), quick.client().ok(COMPLETIONS, on(&winner.state_id())).await.answer());
    let session = slow.client().get("/v1/sessions/raced").await.json();
    assert_eq!((&session["head"], &session["turn"]), (&json!(winner.state_id()), &json!(2)));
    let turns = quick.client().get("/v1/sessions/raced/turns").await.json()["data"].clone();
    let ids: Vec<_> = turns.as_array().expect("turns").iter().map(|turn| turn["id"].clone()).collect();
    assert_eq!(ids, [first, winner.state_id()]);
    assert_eq!(
        quick.client().get("/v1/states?session_id=raced").await.json()["data"].as_array().map(Vec::len),
        Some(2)
    );

    // In a stream the text has been sent: an error event ends it, and names the state.
    while puts.try_recv().is_ok() {}
    let mut late = slow.client().stream(COMPLETIONS, turn(" so", "raced")).await;
    let mut said = String::new();
    let reading = async {
        let mut end = Value::Null;
        while let Some(chunk) = late.next().await {
            said.extend(piece(&chunk));
            end = chunk;
        }
        end
    };
    let racing = async {
        puts.recv().await.expect("its snapshot is written");
        let winner = quick.client().ok(COMPLETIONS, turn(" so", "raced")).await;
        store.leave.add_permits(3);
        winner
    };
    let (end, winner) = tokio::join!(reading, racing);
    assert_eq!((said, &end["error"]["code"]), (winner.answer(), &json!("session_conflict")));
    let message = end["error"]["message"].as_str().expect("a message");
    let kept = message.split([' ', ',']).find(|word| word.starts_with("st_")).expect("it names the state");
    assert_eq!(quick.client().get(&format!("/v1/states/{kept}")).await.json()["session_id"], Value::Null);
    assert!(!late.done);
}

#[tokio::test]
async fn a_full_disk_costs_the_state_and_not_the_answer() {
    let store = Arc::new(Failing::new(InMemory::default()));
    store.fail(false);
    let server = Server::over(store.clone());
    let client = server.client();
    let head = client.ok(COMPLETIONS, turn("A cat", "full")).await.state_id();
    let well = client.ok(COMPLETIONS, turn(" and a", "full")).await;
    let again = json!({"prompt": " and a", "state_id": head, "temperature": 0, "max_tokens": 6});
    store.fail(true);

    let sent = client.ok(COMPLETIONS, turn(" and a", "full")).await;
    assert_eq!(sent.header("x-state-id"), None);
    let error = sent.json()["state_error"].clone();
    assert_eq!(error["code"], "state_store_failed");
    assert!(
        error["message"].as_str().is_some_and(|message| !message.is_empty() && !message.contains("t/local")),
        "{error}"
    );
    let forked = client.ok(COMPLETIONS, again.clone()).await;
    assert_eq!(forked.answer(), well.answer());
    for reply in [sent.json(), forked.json()] {
        assert_eq!((reply.get("state"), &reply["state_error"]), (Some(&Value::Null), &error));
        assert_eq!(reply["choices"][0].get("state"), Some(&Value::Null));
        assert_eq!(reply["choices"][0]["state_error"], error);
    }
    let chunks = client.stream(COMPLETIONS, again.clone()).await.all().await;
    assert_eq!(said(&chunks, 0), well.answer());
    assert_eq!((last(&chunks).get("state"), &last(&chunks)["state_error"]), (Some(&Value::Null), &error));
    let session = client.get("/v1/sessions/full").await.json();
    assert_eq!((&session["head"], &session["turn"]), (&json!(well.state_id()), &json!(2)));
    assert_eq!(client.delete("/v1/sessions/full").await.code(), "store_failed");
    // Whoever asks for no state does not notice.
    client.ok(COMPLETIONS, json!({"prompt": "A cat", "max_tokens": 1})).await;

    store.fail(false);
    let next = client.ok(COMPLETIONS, turn(" sat", "full")).await.json();
    assert_eq!((&next["state"]["parent"], &next["state"]["turn"]), (&json!(well.state_id()), &json!(3)));
}

/// The snapshot is there and its record cannot be written: the state is not lost, and no session claims it.
#[tokio::test]
async fn a_turn_that_cannot_be_committed_is_kept_without_its_session() {
    let store = Arc::new(Failing::new(InMemory::default()));
    store.fail(false);
    let server = Server::over(store.clone());
    let client = server.client();
    let head = client.ok(COMPLETIONS, turn("A cat", "s")).await.state_id();
    store.only("/sessions/");
    store.fail(true);
    let reply = client.ok(COMPLETIONS, turn(" and", "s")).await;
    assert!(!reply.answer().is_empty());
    let error = reply.json()["state_error"].clone();
    assert_eq!((reply.json().get("state"), &error["code"]), (Some(&Value::Null), &json!("state_store_failed")));
    let message = error["message"].as_str().expect("a message");
    let kept = message.split([' ', ',']).find(|word| word.starts_with("st_")).expect("it names the state");
    let info = client.get(&format!("/v1/states/{kept}")).await.json();
    assert_eq!((&info["session_id"], &info["parent"]), (&Value::Null, &json!(head)));
    assert_eq!(client.get("/v1/sessions/s").await.json()["head"], head);
    assert_eq!(client.get("/v1/states").await.json()["data"].as_array().map(Vec::len), Some(2));
    // Going back cannot be noted either, and says so.
    for (route, body) in [("fork", json!({"to": "f"})), ("rewind", json!({"at": 1}))] {
        let path = format!("/v1/sessions/s/{route}");
        let reply = client.post(&path, body).await;
        assert!(
            reply.status == 200 || (reply.status, reply.code().as_str()) == (500, "store_failed"),
            "{}",
            reply.text
        );
    }
    store.fail(false);
    let next = client.ok(COMPLETIONS, turn(" and", "s")).await;
    assert_eq!((next.answer(), &next.json()["state"]["turn"]), (reply.answer(), &json!(2)));
}

#[tokio::test]
async fn a_lost_permission_costs_what_needs_it_and_nothing_else() {
    let store = Arc::new(Failing::new(InMemory::default()));
    store.fail(false);
    let server = Server::over(store.clone());
    let client = server.client();
    let head = client.ok(COMPLETIONS, turn("A cat", "s")).await;
    store.fail(true);
    store.unreadable(true);
    // What has to be read cannot be; what is only to be kept is not kept, and its text arrives.
    for body in [turn(" and", "s"), json!({"prompt": "x", "state_id": head.state_id()})] {
        let reply = client.post(COMPLETIONS, body).await;
        assert_eq!((reply.status, reply.code().as_str()), (500, "store_failed"));
    }
    let fresh = json!({"prompt": "A cat", "store_state": true, "temperature": 0, "max_tokens": 6});
    for stream in [false, true] {
        let reply = client.post(COMPLETIONS, with(fresh.clone(), json!({ "stream": stream }))).await;
        assert!(reply.status == 200 && reply.text.contains("state_store_failed"), "{}", reply.text);
        assert!(stream || reply.answer() == head.answer());
    }
    for path in ["/v1/sessions", "/v1/sessions/s", "/v1/states", "/v1/sessions/s/turns"] {
        assert_eq!(client.get(path).await.code(), "store_failed");
    }
    assert!(server.sessions.sweep().await.is_err());
    assert_eq!(client.get("/ready").await.status, 200);
    store.fail(false);
    store.unreadable(false);
    assert_eq!(client.ok(COMPLETIONS, turn(" and", "s")).await.json()["state"]["turn"], 2);
}

/// A server over a folder, and that folder.
async fn on_disk() -> (Server, Client, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Local::open(folder.path().to_owned()).await.expect("a good folder");
    // What is lost shall not be found again in memory.
    let server = Server::with(&forgetful(config()), Arc::new(store));
    let client = server.client();
    (server, client, folder)
}

/// The file of that name somewhere below `folder`.
fn find(folder: &Path, name: &str) -> PathBuf {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let named = |path: &&PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(name));
    let here = files.iter().find(named).cloned();
    here.or_else(|| folders.iter().map(|sub| find(sub, name)).find(|path| path.exists())).unwrap_or_default()
}

fn flip(file: &Path, at: usize) {
    let mut bytes = std::fs::read(file).expect("the file");
    let len = bytes.len();
    bytes[at % len] ^= 0x10;
    std::fs::write(file, bytes).expect("the file");
}

#[tokio::test]
async fn a_damaged_state_is_told_and_the_server_lives() {
    let (_server, client, folder) = on_disk().await;
    for at in [9, 300, 5_000, 100_000, usize::MAX] {
        // One that no session's log can rebuild.
        let alone = json!({"prompt": "A cat", "store_state": true, "temperature": 0, "max_tokens": 6});
        let state = client.ok(COMPLETIONS, alone).await.state_id();
        let file = find(folder.path(), &state);
        let good = std::fs::read(&file).expect("the snapshot is a file");
        flip(&file, at);
        for path in [COMPLETIONS, CHAT] {
            let new = if path == CHAT { json!({"messages": user("Hi")}) } else { json!({"prompt": "x"}) };
            for stream in [false, true] {
                let body = with(new.clone(), json!({"state_id": state, "stream": stream}));
                let reply = client.post(path, body).await;
                assert_eq!((reply.status, reply.code().as_str()), (500, "state_damaged"), "byte {at}");
                assert_eq!(
                    (&reply.error()["type"], &reply.error()["param"]),
                    (&json!("server_error"), &json!("state_id"))
                );
                assert_eq!(reply.header("x-should-retry"), Some("false"));
                assert!(!reply.text.contains(&*folder.path().to_string_lossy()), "no paths: {}", reply.text);
            }
        }
        // The same for one that lost its end.
        std::fs::write(&file, &good[..good.len() / 2]).expect("the file");
        let reply = client.post(COMPLETIONS, json!({"prompt": "x", "state_id": state})).await;
        assert_eq!(reply.code(), "state_damaged");
        assert_eq!(client.get(&format!("/v1/states/{state}")).await.code(), "state_damaged");
        assert_eq!(client.get("/v1/states").await.status, 200);
        std::fs::write(&file, &good).expect("the file");
        client.ok(COMPLETIONS, json!({"prompt": "x", "state_id": state, "max_tokens": 1})).await;
    }
    assert_eq!(client.get("/ready").await.status, 200);
}

#[tokio::test]
async fn a_session_outlives_its_snapshot() {
    let (_server, client, folder) = on_disk().await;
    let chat = |session: &str, content: &str| json!({"messages": user(content), "session_id": session, "temperature": 0, "max_tokens": 25});
    // One session keeps its snapshots, the others lose theirs.
    let mut heads = Vec::new();
    for session in ["kept", "lost", "damaged"] {
        client.ok(CHAT, chat(session, "Tell me about a dog.")).await;
        heads.push(client.ok(CHAT, chat(session, "And the cat?")).await.state_id());
    }
    assert_eq!(client.delete(&format!("/v1/states/{}", heads[1])).await.status, 200);
    flip(&find(folder.path(), &heads[2]), 50_000);
    let expected = client.ok(CHAT, chat("kept", "Who won?")).await;
    for (session, head) in ["lost", "damaged"].into_iter().zip(&heads[1..]) {
        let reply = client.ok(CHAT, chat(session, "Who won?")).await;
        assert_eq!(reply.answer(), expected.answer(), "{session}");
        let (reply, expected) = (reply.json(), expected.json());
        assert_eq!((&reply["state"]["parent"], &reply["state"]["turn"]), (&json!(head), &json!(3)));
        assert_eq!(reply["state"]["tokens"], expected["state"]["tokens"]);
        assert_eq!(reply["usage"]["prompt_tokens"], expected["usage"]["prompt_tokens"]);
        let cached =
            |reply: &Value| reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count");
        assert!(cached(&reply) < cached(&expected), "what the turn before had not read was read again");
        let turns = client.get(&format!("/v1/sessions/{session}/turns")).await.json()["data"].clone();
        assert_eq!(
            turns[2]["token_count"],
            client.get("/v1/sessions/kept/turns").await.json()["data"][2]["token_count"]
        );
    }
    for session in ["lost", "damaged"] {
        let next = client.ok(CHAT, chat(session, "Why?")).await.json();
        assert!(next["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().is_some_and(|n| n > 0));
    }
}

/// An answer that was cut goes on after its snapshot was lost, as far as the client had it.
#[tokio::test]
async fn a_cut_answer_outlives_its_snapshot() {
    let server = Server::shared();
    let client = server.client();
    let first = |session: &str| json!({"messages": user("Tell me about a dog."), "session_id": session, "temperature": 0, "max_tokens": 12});
    let rest = |session: &str| json!({"messages": [], "session_id": session, "temperature": 0, "max_tokens": 12});
    client.ok(CHAT, first("cut:kept")).await;
    let lost = client.ok(CHAT, first("cut:lost")).await.state_id();
    let expected = client.ok(CHAT, rest("cut:kept")).await.answer();
    assert_eq!(client.delete(&format!("/v1/states/{lost}")).await.status, 200);
    assert_eq!(client.ok(CHAT, rest("cut:lost")).await.answer(), expected);
}

#[tokio::test]
async fn a_state_of_other_weights_is_refused() {
    let store = Arc::new(InMemory::default());
    let server = Server::over(store.clone());
    let client = server.client();
    let own = client.ok(COMPLETIONS, turn("A cat", "mine")).await.state_id();
    let archive = Archive::new(store);
    let tenant = Tenant::local();
    let id = StateId::parse(own).expect("an id");
    let mut snapshot = archive.load(&tenant, &id, 0).await.expect("a store").expect("it is there");
    snapshot.head.id = StateId::new(7, 7);
    snapshot.head.fingerprint = "0".repeat(64);
    snapshot.head.model = "another".into();
    let foreign = snapshot.head.id.to_string();
    archive.keep(Arc::new(snapshot)).await.expect("it is kept");
    for (path, new) in [(COMPLETIONS, json!({"prompt": "x"})), (CHAT, json!({"messages": user("x")}))] {
        let reply = client.post(path, with(new, json!({"state_id": foreign}))).await;
        assert_eq!((reply.status, reply.code().as_str()), (409, "state_model_mismatch"));
        assert_eq!((reply.header("x-should-retry"), &reply.error()["param"]), (Some("false"), &json!("state_id")));
        assert!(reply.text.contains("another") && reply.text.contains("stories"), "it names both: {}", reply.text);
    }
    assert_eq!(client.get(&format!("/v1/states/{foreign}")).await.json()["model"], "another", "it can still be seen");

    // A session that another model began.
    let session = rewake::types::SessionId::parse("mine").expect("a name");
    let head = archive.head(&tenant, &session).await.expect("a store");
    let mut record = head.live.clone().expect("a turn").record;
    record.state = Some(StateId::new(7, 7));
    record.fingerprint = "0".repeat(64);
    archive.commit(&tenant, &session, &head, &record).await.expect("a store");
    let reply = client.post(COMPLETIONS, turn("x", "mine")).await;
    assert_eq!((reply.status, reply.code().as_str()), (409, "state_model_mismatch"));
    assert_eq!(client.delete(&format!("/v1/states/{foreign}")).await.status, 200);
    let reply = client.post(COMPLETIONS, turn("x", "mine")).await;
    assert_eq!(reply.code(), "state_model_mismatch", "its ids are another vocabulary's");
}

#[tokio::test]
async fn an_expired_state_is_unknown() {
    let store = Arc::new(InMemory::default());
    let server = Server::over(store.clone());
    let client = server.client();
    let own = client.ok(COMPLETIONS, turn("A cat", "old")).await.state_id();
    let archive = Archive::new(store);
    let id = StateId::parse(own).expect("an id");
    let mut snapshot = archive.load(&Tenant::local(), &id, 0).await.expect("a store").expect("it is there");
    snapshot.head.id = StateId::new(7, 7);
    snapshot.head.expires_at = Some(1_000);
    archive.keep(Arc::new(snapshot)).await.expect("it is kept");
    let expired = StateId::new(7, 7).to_string();
    let reply = client.post(COMPLETIONS, json!({"prompt": "x", "state_id": expired})).await;
    assert_eq!((reply.status, reply.code().as_str()), (404, "state_not_found"));
    assert_eq!(client.get(&format!("/v1/states/{expired}")).await.code(), "state_not_found");
    assert!(!client.get("/v1/states").await.text.contains(&expired));
}

#[tokio::test]
async fn a_damaged_record_is_told_and_its_states_still_work() {
    let (_server, client, folder) = on_disk().await;
    client.ok(COMPLETIONS, turn("A cat", "torn")).await;
    let second = client.ok(COMPLETIONS, turn(" sat", "torn")).await.state_id();
    let record = folder.path().join("t/local/sessions/torn/000000000002");
    let good = std::fs::read(&record).expect("the record is a file");
    for damage in [&good[..0], &good[..good.len() / 2]] {
        std::fs::write(&record, damage).expect("the file");
        for reply in [client.post(COMPLETIONS, turn("!", "torn")).await, client.get("/v1/sessions/torn").await] {
            assert_eq!((reply.status, reply.code().as_str()), (500, "session_damaged"), "{}", reply.text);
            assert_eq!(reply.header("x-should-retry"), Some("false"));
            assert!(!reply.text.contains("t/local"), "no keys: {}", reply.text);
        }
    }
    client.ok(COMPLETIONS, json!({"prompt": "!", "state_id": second, "max_tokens": 1})).await;
    assert_eq!(client.delete("/v1/sessions/torn").await.status, 200);
    assert_eq!(client.get("/v1/sessions/torn").await.code(), "session_not_found");
}

#[tokio::test]
async fn a_damaged_response_or_conversation_is_told_by_its_name_and_can_be_deleted() {
    let (_server, client, folder) = on_disk().await;
    let responses = "/v1/responses";
    let [one, other] = ["A cat", "A dog"].map(|input| json!({"input": input, "max_output_tokens": 2}));
    let (one, other) = (client.ok(responses, one).await, client.ok(responses, other).await);
    let [one, other] = [one, other].map(|response| response.json()["id"].as_str().expect("an id").to_owned());
    let file = |id: &str| folder.path().join("t/local/responses").join(id);
    let good = std::fs::read(file(&one)).expect("a file");
    let foreign = std::fs::read(file(&other)).expect("a file");
    for damage in [&foreign[..], &good[..good.len() / 2]] {
        std::fs::write(file(&one), damage).expect("the file");
        let shown = client.get(&format!("{responses}/{one}")).await;
        let went_on = client.post(responses, json!({"input": "x", "previous_response_id": one})).await;
        for (reply, param) in [(shown, "response_id"), (went_on, "previous_response_id")] {
            let error = &reply.json()["error"];
            assert_eq!(
                (reply.status, &error["code"], &error["param"]),
                (500, &json!("response_damaged"), &json!(param))
            );
        }
    }
    assert_eq!(client.delete(&format!("{responses}/{one}")).await.status, 200);
    assert_eq!(client.get(&format!("{responses}/{one}")).await.code(), "response_not_found");
    assert_eq!(client.get(&format!("{responses}/{other}")).await.status, 200);

    let begun = client.ok("/v1/conversations", json!({"items": [{"role": "user", "content": "A cat"}]})).await.json();
    let path = format!("/v1/conversations/{}", begun["id"].as_str().expect("an id"));
    client.ok(responses, json!({"conversation": begun["id"], "input": "x", "max_output_tokens": 2})).await;
    std::fs::write(folder.path().join("t/local").join(&path[4..]).join("000000000000"), "{").expect("the file");
    for reply in [
        client.get(&path).await,
        client.post(responses, json!({"conversation": begun["id"], "input": "x"})).await,
        client.get(&format!("{path}/items")).await,
    ] {
        let error = &reply.json()["error"];
        assert_eq!((&error["code"], &error["param"]), (&json!("conversation_damaged"), &json!("conversation")));
    }
    assert_eq!(client.delete(&path).await.status, 200);
    assert_eq!(client.get(&path).await.code(), "conversation_not_found");
    let sessions = client.get("/v1/sessions").await;
    assert_eq!(sessions.json()["data"], json!([]), "{}", sessions.text);
}

/// What two have in each other's place is nobody's: a file that was renamed must not show one's words to the other.
#[tokio::test]
async fn records_in_each_other_s_place_are_damaged() {
    let (_server, client, folder) = on_disk().await;
    let mut conversations = Vec::new();
    for secret in ["Alice", "Bob"] {
        let items = json!([{"role": "user", "content": format!("I am {secret}.")}]);
        let begun = client.ok("/v1/conversations", json!({ "items": items })).await.json();
        conversations.push(begun["id"].as_str().expect("an id").to_owned());
        client.ok(COMPLETIONS, turn(secret, secret)).await;
    }
    let swap = |[one, other]: [PathBuf; 2]| {
        let aside = folder.path().join("aside");
        for (from, to) in [(&one, &aside), (&other, &one), (&aside, &other)] {
            std::fs::rename(from, to).expect("both are there");
        }
    };
    swap([0, 1].map(|n| folder.path().join("t/local/conversations").join(&conversations[n]).join("000000000000")));
    for id in &conversations {
        for path in [format!("/v1/conversations/{id}"), format!("/v1/conversations/{id}/items")] {
            let reply = client.get(&path).await;
            assert_eq!(reply.code(), "conversation_damaged", "{}", reply.text);
        }
    }
    swap(["Alice", "Bob"].map(|name| folder.path().join("t/local/sessions").join(name).join("000000000001")));
    for name in ["Alice", "Bob"] {
        assert_eq!(client.get(&format!("/v1/sessions/{name}")).await.code(), "session_damaged");
        assert_eq!(client.delete(&format!("/v1/sessions/{name}")).await.status, 200);
    }
    for id in &conversations {
        assert_eq!(client.delete(&format!("/v1/conversations/{id}")).await.status, 200);
    }
}

/// A stored response is its messages too: a state of it that is damaged costs the time to read them.
#[tokio::test]
async fn a_response_outlives_its_state() {
    let (_server, client, folder) = on_disk().await;
    let responses = "/v1/responses";
    let ask = |more: Value| with(json!({"input": "A cat", "temperature": 0, "max_output_tokens": 9}), more);
    let first = client.ok(responses, ask(json!({"instructions": "Be kind."}))).await.json();
    let on = |more: Value| with(ask(json!({"previous_response_id": first["id"]})), more);
    let words = |response: &Value| response["output"][0]["content"][0]["text"].as_str().expect("text").to_owned();
    let expected = client.ok(responses, on(json!({"input": "And?"}))).await.json();
    let file = find(folder.path(), first["state"]["id"].as_str().expect("a state"));
    let good = std::fs::read(&file).expect("a file");
    for at in [9, 300, 100_000, usize::MAX] {
        flip(&file, at);
        let reply = client.ok(responses, on(json!({"input": "And?"}))).await.json();
        assert_eq!(
            (words(&reply), &reply["usage"]["input_tokens"]),
            (words(&expected), &expected["usage"]["input_tokens"])
        );
        // Its answer was cut, and where is not in its words.
        let refused = client.post(responses, on(json!({"input": []}))).await;
        assert_eq!((refused.status, &refused.error()["param"]), (400, &json!("previous_response_id")), "byte {at}");
        std::fs::write(&file, &good).expect("the file");
    }
}
