//! The background sweep: it takes what nobody can ask for, and nothing that anybody can.

use std::path::Path;
use std::sync::Arc;

use rewake::config::Config;
use rewake::session::Swept;
use rewake::state::{Archive, Local, Put, Store};
use rewake::types::{SessionId, Snapshot, StateId, Tenant};
use serde_json::json;

use crate::server::{COMPLETIONS, Client, Process, Server, config};

fn turn(session: &str) -> serde_json::Value {
    json!({"prompt": " A cat", "session_id": session, "temperature": 0, "max_tokens": 3})
}

/// A server over a folder. Without grace everything is long ago.
async fn server(folder: &Path, grace_s: u64) -> (Server, Arc<Local>) {
    let store = Arc::new(Local::open(folder.to_owned()).await.expect("a good folder"));
    let mut config: Config = config();
    config.states.grace_s = grace_s;
    (Server::with(&config, store.clone()), store)
}

async fn sweep(server: &Server) -> Swept {
    server.sessions.sweep().await.expect("the store works")
}

fn id(state: &str) -> StateId {
    StateId::parse(state).expect("an id")
}

/// Stores a copy of a state as somebody else's, or as nobody's.
async fn copy(store: &Arc<Local>, state: &str, change: impl FnOnce(&mut Snapshot)) -> String {
    let archive = Archive::new(store.clone());
    let mut snapshot = archive.load(&Tenant::local(), &id(state), 0).await.expect("a store").expect("it is there");
    snapshot.head.id = StateId::new(1_000, rand::random());
    change(&mut snapshot);
    let id = snapshot.head.id.to_string();
    archive.keep(Arc::new(snapshot)).await.expect("it is kept");
    id
}

async fn status(client: &Client, state: &str) -> u16 {
    client.get(&format!("/v1/states/{state}")).await.status
}

#[tokio::test]
async fn what_a_crash_left_goes_and_everything_else_stays() {
    let folder = tempfile::tempdir().expect("a folder");
    let (server, store) = server(folder.path(), 0).await;
    let client = server.client();
    let mut states = Vec::new();
    for _ in 0..3 {
        states.push(client.ok(COMPLETIONS, turn("s")).await.state_id());
    }
    client.ok("/v1/sessions/s/fork", json!({"to": "f", "at": 2})).await;
    client.ok("/v1/sessions/s/rewind", json!({"at": 1})).await;
    let free = json!({"prompt": "x", "state_id": states[2], "max_tokens": 1});
    states.push(client.ok(COMPLETIONS, free).await.state_id());
    assert_eq!(sweep(&server).await, Swept::default(), "what a rewind took back stays as well");

    // Killed between the snapshot and its record; with a record that another turn won; long ago.
    let orphan = copy(&store, &states[0], |snapshot| snapshot.head.record = Some(99)).await;
    let beaten = copy(&store, &states[0], |snapshot| snapshot.head.record = Some(2)).await;
    let expired = copy(&store, &states[3], |snapshot| snapshot.head.expires_at = Some(1_000)).await;
    let stranger = copy(&store, &states[0], |snapshot| snapshot.head.record = None).await;
    let torn = copy(&store, &states[0], |_| ()).await;
    let states_folder = folder.path().join("t/local/states");
    let whole = std::fs::read(states_folder.join(&torn)).expect("a file");
    std::fs::write(states_folder.join(&torn), &whole[..whole.len() / 2]).expect("a file");
    let staging =
        [states_folder.join(format!("{}#1", states[0])), folder.path().join("t/local/sessions/s/000000000009#2")];
    for file in &staging {
        std::fs::write(file, "half a f").expect("a file");
        let past = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000);
        std::fs::File::open(file).and_then(|file| file.set_modified(past)).expect("a time");
    }
    let found = sweep(&server).await;
    assert_eq!(found, Swept { expired: 1, orphans: 2, set_aside: 1, torn: 2, buried: 0 });
    for gone in [&orphan, &beaten, &expired, &torn] {
        assert_eq!(status(&client, gone).await, 404);
    }
    // Set aside, not thrown away.
    assert_eq!(std::fs::read(folder.path().join("t/local/aside").join(&torn)).expect("a file").len(), whole.len() / 2);
    assert!(staging.iter().all(|file| !file.exists()));
    for there in states.iter().chain([&stranger]) {
        assert_eq!(status(&client, there).await, 200);
    }
    assert_eq!(sweep(&server).await, Swept::default());
    let metrics = client.get("/metrics").await.text;
    assert!(metrics.contains("rewake_swept_total{what=\"set_aside\"}"), "{metrics}");
}

#[tokio::test]
async fn what_is_new_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let (server, store) = server(folder.path(), 3600).await;
    let client = server.client();
    let state = client.ok(COMPLETIONS, turn("s")).await.state_id();
    // As a turn looks that is between its snapshot and its record.
    let running = copy(&store, &state, |snapshot| {
        snapshot.head.record = Some(2);
        snapshot.head.id = StateId::new(id(&state).millis(), 9);
    });
    let running = running.await;
    std::fs::write(folder.path().join(format!("t/local/states/{state}#1")), "half").expect("a file");
    client.ok(COMPLETIONS, turn("gone")).await;
    client.delete("/v1/sessions/gone").await;
    assert_eq!(sweep(&server).await, Swept::default());
    assert_eq!(status(&client, &running).await, 200);
    // The records of what was just deleted are what a turn that still runs would meet.
    assert!(folder.path().join("t/local/sessions/gone/000000000001").exists());
}

#[tokio::test]
async fn deleted_sessions_leave_a_tombstone_only() {
    let folder = tempfile::tempdir().expect("a folder");
    let (server, store) = server(folder.path(), 0).await;
    let client = server.client();
    for _ in 0..2 {
        for _ in 0..3 {
            client.post_with(COMPLETIONS, &[("idempotency-key", "k")], turn("s")).await;
            client.ok(COMPLETIONS, turn("s")).await;
        }
        client.ok("/v1/sessions/s/rewind", json!({"at": 1})).await;
        assert_eq!(client.delete("/v1/sessions/s").await.status, 200);
    }
    sweep(&server).await;
    let names = async |folder: &str| store.children(folder, None, 99).await.expect("a store");
    assert_eq!(names("t/local/sessions/s").await.len(), 1);
    assert_eq!(names("t/local/states").await.len() + names("t/local/keys/s").await.len(), 0);
    let anew = client.ok(COMPLETIONS, turn("s")).await.json();
    assert_eq!(anew["state"]["turn"], 1);
    sweep(&server).await;
    assert_eq!(names("t/local/sessions/s").await.len(), 1, "the new session's record");
    assert_eq!(client.get("/v1/sessions/s").await.json()["head"], anew["state"]["id"]);
}

/// A turn, a fork and the sweep of another server at once, with no grace for anybody but what they need.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn it_never_takes_what_somebody_is_using() {
    let folder = tempfile::tempdir().expect("a folder");
    let (server, _) = server(folder.path(), 60).await;
    let client = server.client();
    let sweeping = server.sessions.clone();
    let sweeper = tokio::spawn(async move {
        loop {
            sweeping.sweep().await.expect("the store works");
        }
    });
    for n in 0..12 {
        let (source, fork) = (format!("s{n}"), format!("f{n}"));
        client.ok(COMPLETIONS, turn(&source)).await;
        let second = client.ok(COMPLETIONS, turn(&source)).await;
        client.ok(&format!("/v1/sessions/{source}/fork"), json!({"to": fork})).await;
        let third = client.ok(COMPLETIONS, turn(&source)).await;
        assert_eq!(client.delete(&format!("/v1/sessions/{source}")).await.status, 200);
        let forked = client.ok(COMPLETIONS, turn(&fork)).await;
        assert_eq!((forked.answer(), &forked.json()["state"]["parent"]), (third.answer(), &json!(second.state_id())));
        assert_eq!(forked.json()["usage"], third.json()["usage"]);
    }
    sweeper.abort();
}

/// Nothing that is stored is looked at before the server is ready: strange things in every folder do not even slow it.
#[tokio::test]
async fn readiness_does_not_wait_for_a_sweep() {
    let folder = tempfile::tempdir().expect("a folder");
    let states = folder.path().join("t/local/states");
    std::fs::create_dir_all(&states).expect("a folder");
    for n in 0..3_000_u128 {
        std::fs::write(states.join(StateId::new(5, n).to_string()), "not a state").expect("a file");
    }
    let server = Process::start(folder.path(), &[]);
    assert_eq!(server.client().get("/ready").await.status, 200);
    // It was ready before the sweep could have gone far: most of it is still where it was.
    let left = std::fs::read_dir(&states).expect("a folder").count();
    assert!(left > 2_000, "{left}");
    server.client().ok(COMPLETIONS, turn("s")).await;
}

/// Names of deleted sessions are not forgotten while anything of them is needed.
#[tokio::test]
async fn a_tombstone_is_never_overtaken() {
    let folder = tempfile::tempdir().expect("a folder");
    let (server, store) = server(folder.path(), 0).await;
    let client = server.client();
    for _ in 0..2 {
        client.ok(COMPLETIONS, turn("s")).await;
    }
    client.ok("/v1/sessions/s/fork", json!({"to": "f"})).await;
    client.delete("/v1/sessions/s").await;
    sweep(&server).await;
    let anew = client.ok(COMPLETIONS, turn("s")).await.json();
    sweep(&server).await;
    assert_eq!(client.get("/v1/sessions/s").await.json()["head"], anew["state"]["id"]);
    assert_eq!(client.get("/v1/sessions/f/turns").await.json()["data"].as_array().map(Vec::len), Some(2));
    client.delete("/v1/sessions/f").await;
    sweep(&server).await;
    let archive = Archive::new(store.clone());
    let session = SessionId::parse("s").expect("a name");
    assert_eq!(archive.head(&Tenant::local(), &session).await.expect("a store").depth(), 1);
    let names = store.children("t/local/sessions/s", None, 9).await.expect("a store");
    assert_eq!(names, ["000000000004"], "what was needed by the fork went with it");
    let put = store.put_if_absent("t/local/sessions/s/000000000004", "x".into()).await;
    assert_eq!(put.expect("a store"), Put::Exists);
}
