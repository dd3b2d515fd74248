//! The fault run: a real server is killed with `kill -9` under load, again and again, and after each restart every turn that
//! a client has seen the end of is there and goes on as if nothing had happened.
//!
//! ```text
//! cargo test --test server faults:: -- --nocapture                     five kills
//! REWAKE_KILLS=200 cargo test --test server faults:: -- --nocapture    as many as one likes; counts are printed
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::join_all;
use futures::stream::{self, StreamExt};
use rewake::config::Config;
use rewake::state::Local;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::server::{CHAT, COMPLETIONS, Client, Process, Server, config, post};
use crate::{user, with};

const SESSIONS: usize = 16;

/// A turn whose end a client has seen.
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

/// What the clients of a round have seen.
#[derive(Clone, Debug, Default)]
struct Round {
    turns: Vec<Seen>,
    /// Forks that were answered: their names, and the turn they were made at.
    forks: Vec<(String, Seen)>,
}

fn name(round: usize, session: usize) -> String {
    format!("load:{round}:{session}")
}

/// Asks for a fork of a session that has just ended a turn. `None` = the server is gone.
async fn fork(client: &Client, session: &str, to: &str) -> Option<()> {
    let body = json!({ "to": to }).to_string();
    let reply = client.send(post(&format!("/v1/sessions/{session}/fork"), body)).await.ok()?;
    assert_eq!(reply.status(), 200);
    let whole = axum::body::to_bytes(reply.into_body(), usize::MAX).await.ok()?;
    let forked: Value = serde_json::from_slice(&whole).ok()?;
    assert_eq!(forked["id"], to);
    Some(())
}

/// Runs turns of one session, one after another, until the server is gone.
async fn load(client: Client, round: usize, session: usize, chunks: &AtomicUsize, enough: (usize, &Notify)) -> Round {
    let mut seen = Round::default();
    let id = name(round, session);
    for number in 1.. {
        let (path, body) = turn(session, number);
        let body = with(body, json!({ "session_id": id }));
        let Ok(mut stream) = client.try_stream(path, body).await else { return seen };
        while let Some(chunk) = stream.next().await {
            assert!(chunk.get("error").is_none(), "{chunk}");
            if chunk["choices"][0]["finish_reason"].is_string() {
                let state = chunk["state"]["id"].as_str().expect("the disk is not full").to_owned();
                assert_eq!(chunk["state"]["turn"], number);
                seen.turns.push(Seen { session, turn: number, state });
            }
            if chunks.fetch_add(1, Ordering::SeqCst) + 1 == enough.0 {
                enough.1.notify_one();
            }
        }
        if !stream.done {
            return seen;
        }
        if number % 3 == session % 3 {
            let to = format!("{id}:{number}");
            if fork(&client, &id, &to).await.is_none() {
                return seen;
            }
            seen.forks.push((to, seen.turns.last().expect("it has just ended").clone()));
        }
    }
    seen
}

/// Checks all that clients of a round have seen, and that every session goes on where it was.
async fn check(client: &Client, undisturbed: &Undisturbed, round: usize, seen: &Round) {
    let resumed = stream::iter(&seen.turns).map(|Seen { session, turn, state }| async move {
        let (_, expected) = undisturbed.turn(*session, *turn).await;
        assert_eq!(continuation(client, state).await, expected, "round {round}: turn {turn} of session {session}");
    });
    resumed.buffer_unordered(32).collect::<Vec<()>>().await;
    let forked = stream::iter(&seen.forks).map(|(name, at)| async move {
        let fork = client.get(&format!("/v1/sessions/{name}")).await.json();
        assert_eq!((&fork["head"], &fork["turn"]), (&json!(at.state), &json!(at.turn)), "round {round}");
        let turns = client.get(&format!("/v1/sessions/{name}/turns?limit=100")).await.json();
        assert_eq!(turns["data"].as_array().map(Vec::len), Some(at.turn.min(100)), "round {round}");
    });
    forked.buffer_unordered(32).collect::<Vec<()>>().await;
    let mut last: BTreeMap<usize, &Seen> = BTreeMap::new();
    for one in &seen.turns {
        last.insert(one.session, one);
    }
    let went_on = last.into_values().map(|Seen { session, turn: number, state }| async move {
        let name = name(round, *session);
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

/// The sweep takes what the killed processes left, and nothing else.
async fn swept(folder: &std::path::Path, undisturbed: &Undisturbed, rounds: &[Round]) {
    let mut config: Config = config();
    config.states.grace_s = 0;
    let store = Local::open(folder.to_owned()).await.expect("a good folder");
    let server = Server::with(&config, Arc::new(store));
    let swept = server.sessions.sweep().await.expect("the store works");
    println!("swept: {swept:?}");
    assert_eq!((swept.expired, swept.set_aside, swept.buried), (0, 0, 0));
    let client = server.client();
    for (n, round) in rounds.iter().enumerate().rev().take(5) {
        let still = stream::iter(&round.turns).map(|Seen { session, turn, state }| {
            let client = client.clone();
            async move {
                let (_, expected) = undisturbed.turn(*session, *turn).await;
                assert_eq!(continuation(&client, state).await, expected, "round {n}: turn {turn} of session {session}");
            }
        });
        still.buffer_unordered(32).collect::<Vec<()>>().await;
    }
    assert_eq!(server.sessions.sweep().await.expect("the store works"), Default::default(), "once is enough");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_has_seen_survives_kill_9() {
    let kills = std::env::var("REWAKE_KILLS").map_or(5, |kills| kills.parse().expect("a number of kills"));
    let folder = tempfile::tempdir().expect("a folder");
    let undisturbed = Undisturbed::new(SESSIONS);
    let mut server = Process::start(folder.path(), &[]);
    let mut rounds = Vec::new();
    for round in 0..kills {
        let (chunks, enough) = (AtomicUsize::new(0), Notify::new());
        let moment = rand::random_range(20..800);
        let client = server.client();
        let clients = (0..SESSIONS).map(|session| load(client.clone(), round, session, &chunks, (moment, &enough)));
        let kill = async {
            enough.notified().await;
            server.kill_9();
        };
        let (seen, ()) = tokio::join!(join_all(clients), kill);
        let seen = Round {
            turns: seen.iter().flat_map(|round| round.turns.clone()).collect(),
            forks: seen.iter().flat_map(|round| round.forks.clone()).collect(),
        };
        server = Process::start(folder.path(), &[]);
        check(&server.client(), &undisturbed, round, &seen).await;
        rounds.push(seen);
    }
    let turns: usize = rounds.iter().map(|round| round.turns.len()).sum();
    let forks: usize = rounds.iter().map(|round| round.forks.len()).sum();
    assert!(turns > kills, "turns were acknowledged before the server was killed: {turns}");
    drop(server);
    swept(folder.path(), &undisturbed, &rounds).await;
    println!("{kills} kills under {SESSIONS} sessions: {turns} turns and {forks} forks acknowledged, none lost");
}
