//! A real process: killed under load, asked to stop, deserted by its clients.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::join_all;
use futures::stream::{self, StreamExt};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::server::{CHAT, COMPLETIONS, Client, Process, Server, last};
use crate::{endless, user, with};

/// A state id that a client has seen.
#[derive(Clone, Debug)]
struct Seen {
    session: usize,
    /// From 1.
    turn: usize,
    state: String,
}

/// The turn of that number of that session: chats and completions, greedy and not, of different lengths.
fn turn(session: usize, turn: usize) -> (&'static str, Value) {
    let rules = json!({
        "seed": 1000 * session + turn, "temperature": 0.3 * (session % 4) as f64, "max_tokens": 3 + (5 * session + 7 * turn) % 19,
    });
    if session.is_multiple_of(2) {
        (CHAT, with(rules, json!({"messages": user(&format!("Tell me more of number {turn}."))})))
    } else {
        (COMPLETIONS, with(rules, json!({"prompt": format!(" Then, on day {turn}, they")})))
    }
}

/// How the text goes on from a state, without leaving a trace.
async fn continuation(client: &Client, state: &str) -> String {
    let body = json!({"state_id": state, "store_state": false, "temperature": 0, "max_tokens": 10});
    client.ok(COMPLETIONS, body).await.answer()
}

/// What a server that nobody disturbed says: computed once for each turn, in this process.
struct Undisturbed {
    client: Client,
    /// Of each session, by turn: the answer, and how it goes on from its state.
    turns: Vec<tokio::sync::Mutex<Vec<(String, String)>>>,
}

impl Undisturbed {
    fn new(sessions: usize) -> Self {
        let turns = (0..sessions).map(|_| tokio::sync::Mutex::default()).collect();
        Self { client: Server::shared().client(), turns }
    }

    async fn turn(&self, session: usize, number: usize) -> (String, String) {
        let mut known = self.turns[session].lock().await;
        while known.len() < number {
            let (path, body) = turn(session, known.len() + 1);
            let body = with(body, json!({"session_id": format!("undisturbed:{session}")}));
            let reply = self.client.ok(path, body).await;
            known.push((reply.answer(), continuation(&self.client, &reply.state_id()).await));
        }
        known[number - 1].clone()
    }
}

/// Runs turns of one session, one after another, until the server is gone.
async fn load(
    client: Client,
    round: usize,
    session: usize,
    chunks: &AtomicUsize,
    enough: (usize, &Notify),
) -> Vec<Seen> {
    let mut seen = Vec::new();
    for number in 1.. {
        let (path, body) = turn(session, number);
        let body = with(body, json!({"session_id": format!("load:{round}:{session}")}));
        let Ok(mut stream) = client.try_stream(path, body).await else { return seen };
        while let Some(chunk) = stream.next().await {
            assert!(chunk.get("error").is_none(), "{chunk}");
            if chunk["choices"][0]["finish_reason"].is_string() {
                let state = chunk["state"]["id"].as_str().expect("the disk is not full").to_owned();
                assert_eq!(chunk["state"]["turn"], number);
                seen.push(Seen { session, turn: number, state });
            }
            if chunks.fetch_add(1, Ordering::SeqCst) + 1 == enough.0 {
                enough.1.notify_one();
            }
        }
        if !stream.done {
            return seen;
        }
    }
    seen
}

/// Checks all that clients of a round have seen, and that every session goes on where it was.
async fn check(client: &Client, undisturbed: &Undisturbed, round: usize, seen: &[Seen]) {
    let resumed = stream::iter(seen).map(|Seen { session, turn, state }| async move {
        let (_, expected) = undisturbed.turn(*session, *turn).await;
        assert_eq!(continuation(client, state).await, expected, "round {round}: turn {turn} of session {session}");
    });
    resumed.buffer_unordered(32).collect::<Vec<()>>().await;
    let mut last: BTreeMap<usize, &Seen> = BTreeMap::new();
    for one in seen {
        last.insert(one.session, one);
    }
    let went_on = last.into_values().map(|Seen { session, turn: number, state }| async move {
        let name = format!("load:{round}:{session}");
        let head = client.get(&format!("/v1/sessions/{name}")).await.json();
        let reached = head["turn"].as_u64().expect("a head") as usize;
        // The turn that was running may have been committed and not yet told of.
        assert!(reached == *number || reached == number + 1, "{head} after turn {number}");
        assert_eq!(reached == *number, head["head"] == *state, "{head}");
        let (path, body) = turn(*session, reached + 1);
        let next = client.ok(path, with(body, json!({ "session_id": name }))).await;
        assert_eq!(next.answer(), undisturbed.turn(*session, reached + 1).await.0, "turn {reached} was the head");
    });
    join_all(went_on).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_has_seen_survives_kill_9() {
    const SESSIONS: usize = 16;
    const ROUNDS: usize = 4;
    let folder = tempfile::tempdir().expect("a folder");
    let undisturbed = Undisturbed::new(SESSIONS);
    let mut server = Process::start(folder.path(), &[]);
    let mut all = 0;
    for round in 0..ROUNDS {
        let (chunks, enough) = (AtomicUsize::new(0), Notify::new());
        let moment = rand::random_range(100..1500);
        let client = server.client();
        let clients = (0..SESSIONS).map(|session| load(client.clone(), round, session, &chunks, (moment, &enough)));
        let kill = async {
            enough.notified().await;
            println!("round {round}: killed after {moment} chunks");
            server.kill_9();
        };
        let (seen, ()) = tokio::join!(join_all(clients), kill);
        let seen = seen.concat();
        all += seen.len();
        server = Process::start(folder.path(), &[]);
        check(&server.client(), &undisturbed, round, &seen).await;
    }
    assert!(all > ROUNDS, "turns were acknowledged before the server was killed: {all}");
    // Whatever else the killed processes left is no trouble.
    let mut after = String::new();
    loop {
        let page = server.client().get(&format!("/v1/states?limit=100{after}")).await.json();
        assert!(page["data"].as_array().is_some_and(|states| !states.is_empty()), "{page}");
        if page["has_more"] == false {
            break;
        }
        after = format!("&after={}", page["last_id"].as_str().expect("an id"));
    }
}

/// Asks again and again until `is` says yes, but not for ever.
async fn until(client: &Client, path: &str, is: impl Fn(u16, &str) -> bool) {
    let mut last = String::new();
    for _ in 0..20_000 {
        let reply = client.get(path).await;
        if is(reply.status, &reply.text) {
            return;
        }
        last = reply.text;
    }
    panic!("{path} stays {last}");
}

#[tokio::test]
async fn sigterm_lets_running_streams_finish() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Process::start(folder.path(), &[]);
    let client = server.client();
    let long = with(endless(), json!({"max_tokens": 1500, "session_id": "long"}));
    let mut stream = client.stream(COMPLETIONS, long).await;
    stream.begun().await;
    assert_eq!(client.get("/ready").await.status, 200);
    server.terminate();
    until(&client, "/ready", |status, _| status == 503).await;
    assert_eq!(client.get("/health").await.status, 200, "it still lives");
    let refused = client.post(COMPLETIONS, json!({"prompt": "x"})).await;
    assert_eq!((refused.status, refused.code().as_str()), (503, "shutting_down"));
    assert!(refused.header("retry-after").is_some());
    let chunks = stream.all().await;
    let end = last(&chunks);
    assert_eq!(end["choices"][0]["finish_reason"], "length");
    let state = end["state"]["id"].clone();
    assert!(server.ended().await.success());
    let server = Process::start(folder.path(), &[]);
    assert_eq!(server.client().get("/v1/sessions/long").await.json()["head"], state);
}

fn config(folder: &Path, toml: &str) -> String {
    let path = folder.join("rewake.toml");
    std::fs::write(&path, toml).expect("a file");
    path.to_string_lossy().into_owned()
}

#[tokio::test]
async fn a_stream_that_does_not_finish_in_time_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = config(folder.path(), "[server]\ndrain_s = 0\n");
    let server = Process::start(&folder.path().join("states"), &["--config", &config]);
    let mut stream = server.client().stream(COMPLETIONS, endless()).await;
    stream.begun().await;
    server.terminate();
    let mut last = Value::Null;
    while let Some(chunk) = stream.next().await {
        last = chunk;
    }
    assert_eq!(last["error"]["code"], "shutting_down");
    assert!(!stream.done);
    assert!(server.ended().await.success());
}

#[tokio::test]
async fn clients_that_go_away_free_their_seats() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Process::start(folder.path(), &[]);
    let client = server.client();
    let running =
        |n: usize| move |_: u16, text: &str| text.contains(&format!("rewake_seats_running{{model=\"stories\"}} {n}\n"));
    let streams = (0..20).map(|_| async {
        let mut stream = client.stream(COMPLETIONS, endless()).await;
        stream.begun().await;
        stream
    });
    let streams = join_all(streams).await;
    let whole: Vec<_> = (0..10)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.post(COMPLETIONS, endless()).await })
        })
        .collect();
    until(&client, "/metrics", running(30)).await;
    drop(streams);
    whole.iter().for_each(|call| call.abort());
    until(&client, "/metrics", running(0)).await;
    let cancelled = "rewake_turns_total{model=\"stories\",outcome=\"cancelled\"} 30\n";
    until(&client, "/metrics", |_, text| text.contains(cancelled)).await;
    client.ok(COMPLETIONS, json!({"prompt": "x", "max_tokens": 1})).await;
}
