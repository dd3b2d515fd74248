//! Streams that are cut: whoever comes back reads on without a gap and without a repeat.

use std::sync::Arc;

use rewake::config::Config;
use rewake::session::StreamLimits;
use rewake::state::{InMemory, Store};
use rewake::types::Tenant;
use serde_json::{Value, json};

use crate::server::{CHAT, COMPLETIONS, Chunks, Client, Process, Server, config, get, last, post, said};
use crate::store::Failing;
use crate::{endless, user, with};

/// A request by number: chats and completions of several choices, lengths and temperatures.
fn request(n: usize) -> (&'static str, Value, usize) {
    let choices = 1 + n % 3;
    let rules = json!({
        "seed": n, "n": choices, "temperature": 0.4 * (n % 3) as f64, "max_tokens": 20 + (11 * n) % 40,
        "stream_options": {"include_usage": n.is_multiple_of(2)}, "stop": ["zebra", " .", "\n\n\n"],
    });
    if n.is_multiple_of(2) {
        (CHAT, with(rules, json!({"messages": user(&format!("Tell me a story of number {n}."))})), choices)
    } else {
        (COMPLETIONS, with(rules, json!({"prompt": format!("On day {n}, the little dog")})), choices)
    }
}

/// What can differ between two runs of a request is left out.
fn plain(chunks: &[Value]) -> Vec<Value> {
    let plain = |chunk: &Value| json!({"choices": chunk["choices"], "usage": chunk["usage"]["total_tokens"]});
    chunks.iter().map(plain).collect()
}

/// Text and end of each choice, which do not depend on how the choices' events mix.
fn answers(chunks: &[Value], choices: usize) -> Vec<(String, Value)> {
    let end = |n: usize| {
        let ends =
            |chunk: &&Value| chunk["choices"][0]["index"] == n && chunk["choices"][0]["finish_reason"].is_string();
        chunks.iter().find(ends).map(|chunk| chunk["choices"][0]["finish_reason"].clone()).unwrap_or_default()
    };
    (0..choices).map(|n| (said(chunks, n as u64), end(n))).collect()
}

/// Reads some whole events, then hangs up, perhaps in the middle of one. Says whether the stream had ended.
async fn some(mut stream: Chunks, events: usize, all: &mut Vec<Value>, last: &mut Option<String>) -> bool {
    for _ in 0..events {
        let Some(chunk) = stream.next().await else { break };
        all.push(chunk);
        last.clone_from(&stream.last_id);
    }
    if stream.done {
        last.clone_from(&stream.last_id);
    }
    stream.done
}

/// A stream that is cut again and again.
async fn cut_often(client: &Client, n: usize, cuts: &mut usize) -> (Vec<Value>, usize) {
    let (path, body, choices) = request(n);
    let (mut all, mut last) = (Vec::new(), None);
    let stream = client.stream(path, body).await;
    let mut over = some(stream, rand::random_range(1..8), &mut all, &mut last).await;
    let id = all[0]["id"].as_str().expect("an id").to_owned();
    while !over {
        *cuts += 1;
        let stream = client.resume(&id, last.as_deref()).await.expect("the server answers");
        over = some(stream, rand::random_range(0..12), &mut all, &mut last).await;
    }
    // Whoever has everything gets nothing more.
    let rest = client.resume(&id, last.as_deref()).await.expect("the server answers");
    assert!(rest.last_id.is_none());
    let mut again = client.resume(&id, None).await.expect("the server answers");
    let mut whole = Vec::new();
    while let Some(chunk) = again.next().await {
        whole.push(chunk);
    }
    assert_eq!(all, whole, "what was read in pieces is what is there");
    (all, choices)
}

/// Cut connections: 40, or as many as `REWAKE_CUTS` says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_cut_anywhere_is_the_uncut_one() {
    let wanted = std::env::var("REWAKE_CUTS").map_or(40, |cuts| cuts.parse().expect("a number"));
    let folder = tempfile::tempdir().expect("a folder");
    let server = Process::start(folder.path(), &[]);
    let undisturbed = Server::shared().client();
    let (mut cuts, mut n) = (0, 0);
    while cuts < wanted {
        let (all, choices) = cut_often(&server.client(), n, &mut cuts).await;
        let (path, body, _) = request(n);
        let uncut = undisturbed.stream(path, body).await.all().await;
        assert_eq!(answers(&all, choices), answers(&uncut, choices), "request {n}");
        if choices == 1 {
            assert_eq!(plain(&all), plain(&uncut), "request {n}");
        }
        n += 1;
    }
    println!("{cuts} cuts in {n} streams");
}

/// Until this many answers are being generated.
async fn seats(client: &Client, n: usize) {
    measured(client, "rewake_seats_running", n).await;
}

/// Until this many wait for a seat.
async fn waiting(client: &Client, n: usize) {
    measured(client, "rewake_queue_waiting", n).await;
}

async fn measured(client: &Client, name: &str, n: usize) {
    let line = format!("{name}{{model=\"stories\"}} {n}\n");
    for _ in 0..20_000 {
        if client.get("/metrics").await.text.contains(&line) {
            return;
        }
    }
    panic!("{name} is never {n}");
}

#[tokio::test]
async fn a_stream_nobody_reads_rests_and_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Process::start(folder.path(), &[]);
    let client = server.client();
    let mut stream = client.stream(COMPLETIONS, endless()).await;
    let first = stream.next().await.expect("a chunk");
    let id = first["id"].as_str().expect("an id").to_owned();
    drop(stream);
    seats(&client, 0).await;
    let mut stream = client.resume(&id, None).await.expect("the server answers");
    assert_eq!(stream.next().await.expect("a chunk"), first);
    stream.begun().await;
    seats(&client, 1).await;
}

#[tokio::test]
async fn a_slow_reader_is_waited_for() {
    let server = Server::shared();
    let client = server.client();
    let mut stream = client.stream(COMPLETIONS, endless()).await;
    let first = stream.next().await.expect("a chunk");
    let id = first["id"].as_str().expect("an id");
    // It rests when no more events come while another answer is generated.
    let before = at_rest(server, &[id.to_owned()]).await[0];
    assert!((500..600).contains(&before), "{before} events wait for a reader who reads nothing");
    for _ in 0..2000 {
        stream.next().await.expect("it goes on where it was");
    }
}

#[tokio::test]
async fn without_a_window_nobody_is_waited_for() {
    let streams = StreamLimits { resume_window_s: 0, ..StreamLimits::default() };
    let server = Server::with(&Config { streams, ..config() }, Arc::new(InMemory::default()));
    let client = server.client();
    let mut stream = client.stream(COMPLETIONS, endless()).await;
    let id = stream.next().await.expect("a chunk")["id"].as_str().expect("an id").to_owned();
    drop(stream);
    gone(&client, &id).await;
    // It goes on by itself when that was asked for.
    let mut stream = client.stream(COMPLETIONS, with(endless(), json!({"detach": true}))).await;
    let id = stream.next().await.expect("a chunk")["id"].as_str().expect("an id").to_owned();
    drop(stream);
    let mut stream = client.resume(&id, None).await.expect("it is there");
    stream.begun().await;
}

/// Until a stream is not there any more.
async fn gone(client: &Client, id: &str) {
    for _ in 0..20_000 {
        let head = client.send(get(&format!("/v1/streams/{id}"))).await.expect("an answer");
        if head.status() == 404 {
            return;
        }
        drop(head);
        tokio::task::yield_now().await;
    }
    panic!("{id} is still there");
}

#[tokio::test]
async fn of_too_many_that_wait_the_first_is_given_up() {
    let streams = StreamLimits { parked: 2, ..StreamLimits::default() };
    let server = Server::with(&Config { streams, ..config() }, Arc::new(InMemory::default()));
    let client = server.client();
    let mut ids = Vec::new();
    for _ in 0..3 {
        let mut stream = client.stream(COMPLETIONS, endless()).await;
        ids.push(stream.next().await.expect("a chunk")["id"].as_str().expect("an id").to_owned());
    }
    // It is told to whoever asks in time.
    let mut first = client.resume(&ids[0], None).await.expect("it is there");
    let mut last = Value::Null;
    while let Some(chunk) = first.next().await {
        last = chunk;
    }
    assert_eq!(last["error"]["code"], "response_cancelled");
    for id in &ids[1..] {
        client.resume(id, None).await.expect("it is there").begun().await;
    }
}

/// How many events streams have by the time that no more come, because their readers read nothing.
async fn at_rest(server: &Server, ids: &[String]) -> Vec<usize> {
    let client = server.client();
    let mut before = Vec::new();
    loop {
        client.ok(COMPLETIONS, json!({"prompt": "x", "max_tokens": 50, "logit_bias": {"0": -100}})).await;
        let mut now = Vec::new();
        for id in ids {
            now.push(server.sessions.so_far(&Tenant::local(), id).await.expect("it is there").events.len());
        }
        if now == before {
            return now;
        }
        before = now;
    }
}

#[tokio::test]
async fn of_too_many_slow_readers_the_first_is_given_up() {
    let streams = StreamLimits { parked: 1, ..StreamLimits::default() };
    let server = Server::with(&Config { streams, ..config() }, Arc::new(InMemory::default()));
    let client = server.client();
    let (mut readers, mut ids) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let mut stream = client.stream(COMPLETIONS, endless()).await;
        ids.push(stream.next().await.expect("a chunk")["id"].as_str().expect("an id").to_owned());
        readers.push(stream);
        at_rest(&server, &ids).await;
    }
    let mut given_up = 0;
    for (mut stream, id) in readers.into_iter().zip(ids) {
        for _ in 0..1000 {
            let chunk = stream.next().await.expect("an error at the least");
            if chunk.get("error").is_some() {
                assert_eq!(chunk["error"]["code"], "response_cancelled", "{id}");
                given_up += 1;
                break;
            }
        }
    }
    assert_eq!(given_up, 1, "one waits, and goes on");
}

#[tokio::test]
async fn parking_lets_in_no_more_than_there_is_room_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("config.toml");
    std::fs::write(&config, "engine = { seats = 1, queue = 1 }\nstreams = { parked = 1 }\n").expect("it is written");
    let server = Process::start(&folder.path().join("states"), &["--config", &config.display().to_string()]);
    let client = server.client();
    // It has the seat, and never parks.
    let mut first = client.stream(COMPLETIONS, with(endless(), json!({"detach": true}))).await;
    first.begun().await;
    let mut readers = vec![first];
    for n in 0..10 {
        let body = json!({"messages": user("x"), "stream": true}).to_string();
        let reply = client.send(post(CHAT, body)).await.expect("an answer");
        if reply.status() == 429 {
            return assert!(n > 2, "{n} were let in");
        }
        // It waits for the seat until it is left, which gives its place back; then somebody reads on.
        waiting(&client, n + 1).await;
        let mut left = Chunks::of(reply);
        let id = left.next().await.expect("a chunk")["id"].as_str().expect("an id").to_owned();
        drop(left);
        waiting(&client, n).await;
        readers.push(client.resume(&id, None).await.expect("it is there"));
        waiting(&client, n + 1).await;
    }
    panic!("{} at once, with room for two", readers.len());
}

/// A server that has less room than the one before it goes on with everything that one had let in, as there is room.
#[tokio::test]
async fn what_was_let_in_goes_on_where_there_is_less_room() {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, states) = (folder.path().join("config.toml"), folder.path().join("states"));
    let start = |seats: usize| {
        std::fs::write(&config, format!("engine = {{ seats = {seats}, queue = 1 }}\n")).expect("it is written");
        Process::start(&states, &["--config", &config.display().to_string()])
    };
    let rules = json!({"logit_bias": {"0": -100}, "temperature": 1, "max_tokens": 120, "detach": true});
    let requests = [4, 1, 3].map(|n| with(rules.clone(), json!({"prompt": format!("{n} dogs"), "n": n, "seed": n})));
    let server = start(8);
    let client = server.client();
    let mut begun = Vec::new();
    for body in &requests {
        let mut stream = client.stream(COMPLETIONS, body.clone()).await;
        begun.push(stream.next().await.expect("a chunk")["id"].as_str().expect("an id").to_owned());
    }
    server.kill_9();
    // One seat and one place in the queue, for up to eight answers.
    let server = start(1);
    let client = server.client();
    for (body, id) in requests.iter().zip(begun) {
        let choices = body["n"].as_u64().expect("a number") as usize;
        let all = client.resume(&id, None).await.expect("it goes on").all().await;
        let undisturbed = Server::shared().client().stream(COMPLETIONS, body.clone()).await.all().await;
        assert_eq!(answers(&all, choices), answers(&undisturbed, choices));
    }
}

#[tokio::test]
async fn a_session_goes_back_though_a_response_waits_for_its_reader() {
    let client = Server::shared().client();
    for n in 1..3 {
        let body = json!({"prompt": "A cat", "session_id": "gone-back", "max_tokens": 3});
        assert_eq!(client.ok(COMPLETIONS, body).await.json()["state"]["turn"], n);
    }
    let mut stream = client.stream(COMPLETIONS, with(endless(), json!({"session_id": "gone-back"}))).await;
    stream.begun().await;
    drop(stream);
    assert_eq!(client.ok("/v1/sessions/gone-back/rewind", json!({"at": 1})).await.json()["turn"], 1);
}

#[tokio::test]
async fn a_turn_that_was_committed_just_before_the_end_is_told_as_it_was() {
    let store = Arc::new(Failing::new(InMemory::default()));
    store.fail(false);
    let first = Server::over(store.clone()).client();
    for n in 1..4 {
        let body = json!({"prompt": "A cat", "session_id": "trunk", "max_tokens": 3});
        assert_eq!(first.ok(COMPLETIONS, body).await.json()["state"]["turn"], n);
    }
    first.ok("/v1/sessions/trunk/fork", json!({"to": "branch"})).await;
    // As if the process were lost between the session's record and the response's end.
    store.only("/responses/");
    store.fail(true);
    let body = json!({"prompt": "A dog", "session_id": "branch", "max_tokens": 5, "detach": true});
    let told = first.stream(COMPLETIONS, body).await.all().await;
    store.fail(false);
    let id = told[0]["id"].as_str().expect("an id");
    let again = Server::over(store).client().resume(id, None).await.expect("it is there").all().await;
    assert_eq!(said(&again, 0), said(&told, 0));
    assert_eq!(last(&told)["state"]["turn"], 4);
    assert_eq!(last(&again)["state"], last(&told)["state"]);
}

#[tokio::test]
async fn another_turn_of_a_session_takes_the_place_of_one_nobody_reads() {
    let client = Server::shared().client();
    let body = with(endless(), json!({"session_id": "left-alone"}));
    let mut stream = client.stream(COMPLETIONS, body.clone()).await;
    stream.begun().await;
    // While it is read, it is in the way.
    let other = json!({"prompt": "A cat", "session_id": "left-alone", "max_tokens": 3});
    assert_eq!(client.post(COMPLETIONS, other.clone()).await.code(), "session_busy");
    drop(stream);
    let reply = client.ok(COMPLETIONS, other).await.json();
    assert_eq!(reply["state"]["turn"], 1);
}

#[tokio::test]
async fn wrong_ways_to_go_on_are_refused() {
    let client = Server::shared().client();
    for path in ["/v1/streams/cmpl-00", "/v1/streams/..%2Fx", "/v1/streams/%20"] {
        let reply = client.get(path).await;
        assert_eq!((reply.status, reply.code().as_str()), (404, "response_not_found"), "{path}");
    }
    let mut stream = client.stream(COMPLETIONS, endless()).await;
    let id = stream.next().await.expect("a chunk")["id"].as_str().expect("an id").to_owned();
    for last in ["x", "cmpl-1:3", &format!("{id}:x")] {
        let mut request = get(&format!("/v1/streams/{id}"));
        request.headers_mut().insert("last-event-id", last.parse().expect("a header"));
        let reply = client.call(request).await;
        assert_eq!((reply.status, reply.error()["param"].as_str()), (400, Some("last-event-id")), "{last}");
    }
    let reply = client.get(&format!("/v1/streams/{id}?starting_after=x")).await;
    assert_eq!(reply.status, 400);
    assert_eq!(client.get(&format!("/v1/streams/{id}?after=1")).await.status, 400);
}

/// The keys that a store holds about streams.
async fn left(store: &dyn Store) -> Vec<String> {
    let mut keys = Vec::new();
    for folder in ["running/local", "t/local/streams", "t/local/responses"] {
        keys.extend(
            store.children(folder, None, 100).await.expect("a list").into_iter().map(|key| format!("{folder}/{key}")),
        );
    }
    keys
}

#[tokio::test]
async fn a_detached_stream_is_whole_when_somebody_comes_back() {
    let store = Arc::new(InMemory::default());
    let server = Server::over(store.clone());
    let client = server.client();
    for n in 0..6 {
        let (path, body, choices) = request(n);
        let uncut = client.stream(path, body.clone()).await.all().await;
        let mut stream = client.stream(path, with(body, json!({"detach": true}))).await;
        let first = stream.next().await.expect("a chunk");
        let id = first["id"].as_str().expect("an id").to_owned();
        drop(stream);
        let all = client.resume(&id, None).await.expect("it is there").all().await;
        assert_eq!(answers(&all, choices), answers(&uncut, choices), "request {n}");
        assert_eq!(client.resume(&id, None).await.expect("it is there").all().await, all);
    }
    // A whole reply that is detached ends, too, with nobody waiting: its session's turn is committed.
    let body = json!({"prompt": "A dog", "session_id": "detached", "detach": true, "max_tokens": 5});
    assert_eq!(client.ok(COMPLETIONS, body).await.json()["state"]["turn"], 1);
    assert!(left(&*store).await.iter().all(|key| !key.contains("/streams/")), "journals are gone when streams end");
}

/// Reads a stream to its end, and says how that was.
async fn rest(stream: &mut Chunks, all: &mut Vec<Value>) -> Value {
    while let Some(chunk) = stream.next().await {
        all.push(chunk);
    }
    all.last().cloned().unwrap_or_default()
}

#[tokio::test]
async fn of_two_servers_one_goes_on_with_a_stream() {
    let store = Arc::new(InMemory::default());
    let (first, second) = (Server::over(store.clone()).client(), Server::over(store).client());
    let body = json!({"prompt": "Once", "seed": 4, "max_tokens": 3000, "logit_bias": {"0": -100}, "detach": true});
    let uncut = first.ok(COMPLETIONS, body.clone()).await.answer();
    let mut here = first.stream(COMPLETIONS, body).await;
    let mut all = vec![here.next().await.expect("a chunk")];
    let id = all[0]["id"].as_str().expect("an id").to_owned();
    // The other one takes it away; whoever reads here is told, and reads on there.
    let mut there = second.resume(&id, None).await.expect("it is there");
    there.begun().await;
    let last = rest(&mut here, &mut all).await;
    if here.done {
        // It had ended before it was taken.
        return assert_eq!(said(&all, 0), uncut);
    }
    assert_eq!(last["error"]["code"], "engine_failed", "{last}");
    all.pop();
    let number = all.len() - 1;
    let mut there = second.resume(&id, Some(&format!("{id}:{number}"))).await.expect("it is there");
    rest(&mut there, &mut all).await;
    assert!(there.done);
    assert_eq!(said(&all, 0), uncut);
}

#[tokio::test]
async fn a_full_disk_takes_no_text_away() {
    let store = Arc::new(Failing::new(InMemory::default()));
    let server = Server::over(store.clone());
    let client = server.client();
    let body = json!({"prompt": "Once", "seed": 4, "max_tokens": 400, "logit_bias": {"0": -100}, "detach": true});
    // What cannot be promised is not, and is answered all the same.
    let attached = client.ok(COMPLETIONS, body.clone()).await;
    assert_eq!(attached.json()["state_error"]["code"], "state_store_failed");
    store.fail(false);
    let uncut = client.ok(COMPLETIONS, body.clone()).await.answer();
    assert_eq!(attached.answer(), uncut);
    let mut stream = client.stream(COMPLETIONS, body).await;
    let mut all = vec![stream.next().await.expect("a chunk")];
    store.fail(true);
    rest(&mut stream, &mut all).await;
    assert!(stream.done, "{:?}", all.last());
    assert_eq!(said(&all, 0), uncut);
}

#[tokio::test]
async fn a_server_that_stops_waits_for_nobody_who_is_gone() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Process::start(folder.path(), &[]);
    let client = server.client();
    let parked = client.stream(COMPLETIONS, endless()).await;
    let mut detached = client.stream(COMPLETIONS, with(endless(), json!({"detach": true}))).await;
    let first = detached.next().await.expect("a chunk");
    let id = first["id"].as_str().expect("an id").to_owned();
    drop((parked, detached));
    seats(&client, 1).await;
    server.terminate(1);
    assert!(server.ended().await.success());
    // What was to go on does.
    let server = Process::start(folder.path(), &[]);
    let mut again = server.client().resume(&id, None).await.expect("it is there");
    assert_eq!(again.next().await.expect("a chunk"), first);
    again.begun().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn detached_streams_survive_kill_9() {
    const STREAMS: usize = 8;
    let rounds = std::env::var("REWAKE_KILLS").map_or(2, |kills| kills.parse().expect("a number"));
    let folder = tempfile::tempdir().expect("a folder");
    let undisturbed = Server::shared().client();
    let mut server = Process::start(folder.path(), &[]);
    let mut cut = 0;
    for round in 0..rounds {
        let client = server.client();
        let mut streams = Vec::new();
        for n in 0..STREAMS {
            let (path, body, choices) = request(STREAMS * round + n);
            let mut body = with(body, json!({"detach": true}));
            if choices == 1 {
                body["session_id"] = json!(format!("kill-{round}-{n}"));
            }
            let stream = client.stream(path, body).await;
            let (mut all, mut last) = (Vec::new(), None);
            some(stream, rand::random_range(1..30), &mut all, &mut last).await;
            streams.push((n, choices, all, last));
        }
        server.kill_9();
        server = Process::start(folder.path(), &[]);
        let client = server.client();
        for (n, choices, mut all, last) in streams {
            let id = all[0]["id"].as_str().expect("an id").to_owned();
            cut += usize::from(all.len() < 2 + choices);
            let mut stream = client.resume(&id, last.as_deref()).await.expect("it goes on");
            while let Some(chunk) = stream.next().await {
                all.push(chunk);
            }
            let (path, body, _) = request(STREAMS * round + n);
            let uncut = undisturbed.stream(path, body).await.all().await;
            assert_eq!(answers(&all, choices), answers(&uncut, choices), "round {round}, stream {n}");
            let ids: Vec<_> = all.iter().map(|chunk| &chunk["created"]).collect();
            assert!(ids.iter().all(|created| *created == ids[0]), "one response, one time");
            if choices == 1 {
                let session = client.get(&format!("/v1/sessions/kill-{round}-{n}")).await.json();
                assert_eq!(session["turn"], 1, "{session}");
            }
        }
    }
    println!("{} streams, {cut} of them cut at their beginning", STREAMS * rounds);
}

#[tokio::test]
async fn what_a_stopping_server_says_last_hides_nothing_of_what_follows() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("rewake.toml");
    std::fs::write(&config, "[server]\ndrain_s = 0\n").expect("a file");
    let states = folder.path().join("states");
    let server = Process::start(&states, &["--config", &config.to_string_lossy()]);
    let body = json!({"prompt": "Once", "seed": 4, "max_tokens": 1500, "logit_bias": {"0": -100}, "detach": true});
    let mut stream = server.client().stream(COMPLETIONS, body.clone()).await;
    let mut all = vec![stream.next().await.expect("a chunk")];
    server.terminate(1);
    let last = rest(&mut stream, &mut all).await;
    assert!(server.ended().await.success());
    assert_eq!(last["error"]["code"], "shutting_down", "{last}");
    all.pop();
    let server = Process::start(&states, &[]);
    let id = all[0]["id"].as_str().expect("an id").to_owned();
    // As a browser's EventSource does: after the last event that had an id.
    let mut again = server.client().resume(&id, stream.last_id.as_deref()).await.expect("it is there");
    rest(&mut again, &mut all).await;
    assert_eq!(said(&all, 0), server.client().ok(COMPLETIONS, body).await.answer());
}
