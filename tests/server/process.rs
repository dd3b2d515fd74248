//! A real process: asked to stop, deserted by its clients.

use std::path::Path;

use futures::future::join_all;
use serde_json::{Value, json};

use crate::server::{COMPLETIONS, Client, Process, last};
use crate::{endless, with};

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
    server.terminate(1);
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

#[tokio::test]
async fn a_signal_that_comes_twice_at_once_is_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Process::start(folder.path(), &[]);
    let mut stream = server.client().stream(COMPLETIONS, with(endless(), json!({"max_tokens": 500}))).await;
    stream.begun().await;
    // As `timeout` sends it: to the process, and to the group that it is in.
    server.terminate(2);
    assert_eq!(last(&stream.all().await)["choices"][0]["finish_reason"], "length");
    assert!(server.ended().await.success());
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
    server.terminate(1);
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
