//! What was read once is not read again, and nobody can tell but by the time it takes.

use std::sync::Arc;

use futures::future::join_all;
use rewake::app::{App, load_models};
use rewake::config::{Config, Model};
use rewake::session::PrefixLimits;
use rewake::state::{InMemory, Local};
use serde_json::{Value, json};

use crate::server::{CHAT, COMPLETIONS, Client, Reply, Server, config, forgetful};
use crate::{key, with};

/// A server of its own; `name` is the model's, and so the label of its metrics.
fn server(name: &str) -> (Server, Client) {
    let model = vec![Model { name: name.into(), ..Model::default() }];
    let server = Server::with(&Config { model, ..config() }, Arc::new(InMemory::default()));
    let client = server.client();
    (server, client)
}

fn stranger() -> Client {
    Server::with(&forgetful(config()), Arc::new(InMemory::default())).client()
}

fn cached(reply: &Reply) -> u64 {
    reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count")
}

fn prompt_tokens(reply: &Reply) -> u64 {
    reply.json()["usage"]["prompt_tokens"].as_u64().expect("a count")
}

/// Ids that no other seed gives.
fn ids(seed: u64, len: usize) -> Vec<u32> {
    let mut bits = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        300 + (bits >> 40) as u32 % 1500
    };
    (0..len).map(next).collect()
}

fn ask(prompt: &[u32]) -> Value {
    json!({"prompt": prompt, "max_tokens": 6, "temperature": 0.9, "seed": 5, "repetition_penalty": 1.2})
}

/// The reply without what tells of one request: its id, its time and what was saved.
fn essence(reply: &Reply) -> Value {
    let mut reply = reply.json();
    for field in ["id", "created", "system_fingerprint", "model"] {
        reply[field] = Value::Null;
    }
    reply["usage"]["prompt_tokens_details"] = Value::Null;
    reply
}

#[tokio::test]
async fn a_transcript_is_read_from_where_the_last_one_ended() {
    let ((_server, client), stranger) = (server("transcript"), stranger());
    let long = "Once there was a cat who lived by the sea with a small boat. ".repeat(12);
    let questions = [long.as_str(), "What did the cat do then?", "Who was the friend?", "Tell me more."];
    let mut messages = vec![json!({"role": "system", "content": "You tell stories to children."})];
    let mut before: Option<Reply> = None;
    for question in questions {
        messages.push(json!({"role": "user", "content": question}));
        let body = json!({"messages": messages, "temperature": 0.8, "seed": 2, "max_tokens": 40});
        let reply = client.ok(CHAT, body.clone()).await;
        assert_eq!(essence(&reply), essence(&stranger.ok(CHAT, body.clone()).await));
        match &before {
            None => assert_eq!(cached(&reply), 0),
            // The prompt at least, whose end is known whatever its answer's words tokenise to.
            Some(before) => assert!(cached(&reply) >= prompt_tokens(before), "{} of {}", cached(&reply), reply.text),
        }
        // The same again: all but the last few tokens.
        let again = client.ok(CHAT, body).await;
        assert_eq!(essence(&again), essence(&reply));
        assert!(cached(&again) + 64 >= prompt_tokens(&again) && cached(&again) >= cached(&reply), "{}", again.text);
        messages.push(json!({"role": "assistant", "content": reply.answer()}));
        before = Some(reply);
    }
    // Another conversation under the same system message, and one that begins with the first question.
    let told = json!([{"role": "user", "content": long}]);
    assert_eq!(cached(&client.ok(CHAT, json!({"messages": told, "max_tokens": 1})).await), 0);
}

#[tokio::test]
async fn the_end_of_an_answer_is_known() {
    let ((_server, client), stranger) = (server("ends"), stranger());
    let prompt = ids(1, 40);
    let body =
        |prompt: &[u32]| json!({"prompt": prompt, "max_tokens": 30, "temperature": 0, "logit_bias": {"0": -100}});
    let answer = client.ok(COMPLETIONS, with(body(&prompt), json!({"session_id": "ends"}))).await;
    let turns = client.get("/v1/sessions/ends/turns?token_ids=true").await.json();
    let told: Vec<u32> = serde_json::from_value(turns["data"][0]["token_ids"].clone()).expect("ids");
    assert_eq!((told.len(), &told[..40]), (70, &prompt[..]), "{}", answer.text);
    let transcript = [told, ids(2, 10)].concat();
    let reply = client.ok(COMPLETIONS, body(&transcript)).await;
    // The token that was sampled last was never read.
    assert_eq!(cached(&reply), 69);
    assert_eq!(essence(&reply), essence(&stranger.ok(COMPLETIONS, body(&transcript)).await));
}

#[tokio::test]
async fn two_prompts_that_share_half_read_it_once_whoever_comes_first() {
    let stranger = stranger();
    let shared = ids(1, 700);
    let (one, other) = ([shared.clone(), ids(2, 700)].concat(), [shared.clone(), ids(3, 700)].concat());
    for (name, first, second) in [("half-1", &one, &other), ("half-2", &other, &one)] {
        let (_server, client) = server(name);
        let fresh = client.ok(COMPLETIONS, ask(first)).await;
        let reply = client.ok(COMPLETIONS, ask(second)).await;
        assert_eq!((prompt_tokens(&reply), cached(&fresh)), (1400, 0));
        assert!((650..=700).contains(&cached(&reply)), "{}", cached(&reply));
        assert_eq!(essence(&reply), essence(&stranger.ok(COMPLETIONS, ask(second)).await));
        // Where they part is known from then on.
        let third = [shared.clone(), ids(4, 100)].concat();
        assert_eq!(cached(&client.ok(COMPLETIONS, ask(&third)).await), 700);
    }
}

/// The value of a metric of one model.
async fn metric(client: &Client, name: &str, model: &str) -> u64 {
    let text = client.get("/metrics").await.text;
    let series = format!("{name}{{model=\"{model}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&series)).map_or(0, |value| value.parse().expect("a count"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_at_once_read_what_they_share_once() {
    let ((_server, client), stranger) = (server("ten"), stranger());
    let shared = ids(1, 3000);
    let prompts: Vec<Vec<u32>> = (0..10).map(|n| [shared.clone(), ids(10 + n, 20)].concat()).collect();
    let replies = join_all(prompts.iter().map(|prompt| client.ok(COMPLETIONS, ask(prompt)))).await;
    let read: u64 = replies.iter().map(|reply| prompt_tokens(reply) - cached(reply)).sum();
    assert!(read < 3000 + 10 * 60, "{read} tokens were read");
    assert_eq!(replies.iter().filter(|reply| cached(reply) == 0).count(), 1, "one leads");
    // What was sampled is read too, but for the last one.
    assert_eq!(metric(&client, "rewake_step_tokens_total", "ten").await, read + 10 * 5);
    for (prompt, reply) in prompts.iter().zip(&replies).take(3) {
        assert_eq!(essence(reply), essence(&stranger.ok(COMPLETIONS, ask(prompt)).await));
    }
    // Equal ones as well, the choices of one request among them.
    let same = ids(99, 1000);
    let body = with(ask(&same), json!({"prompt": [same, same, same], "n": 2}));
    let reply = client.ok(COMPLETIONS, body).await;
    assert!(prompt_tokens(&reply) == 3000 && cached(&reply) >= 2 * 950, "{}", reply.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leads_may_leave() {
    let ((_server, client), stranger) = (server("leaves"), stranger());
    let shared = ids(1, 6000);
    let stream = client.stream(COMPLETIONS, ask(&[shared.clone(), ids(2, 9)].concat())).await;
    let prompt = [shared.clone(), ids(3, 9)].concat();
    let leave = async {
        // Not before somebody waits for it.
        while metric(&client, "rewake_prefix_waits_total", "leaves").await == 0 {
            tokio::task::yield_now().await;
        }
        drop(stream);
    };
    // One of those who follow leaves as well.
    let follower = async { client.stream(COMPLETIONS, ask(&prompt)).await };
    let (followed, others, ()) =
        tokio::join!(follower, join_all((0..3).map(|_| client.ok(COMPLETIONS, ask(&prompt)))), async {
            leave.await;
        });
    drop(followed);
    let expected = stranger.ok(COMPLETIONS, ask(&prompt)).await;
    for reply in &others {
        assert_eq!(essence(reply), essence(&expected));
    }
    assert!(cached(&client.ok(COMPLETIONS, ask(&prompt)).await) >= 5900);
}

#[tokio::test]
async fn what_one_tenant_read_is_nothing_to_another() {
    let key = vec![key("ann", "one"), key("bob", "two"), key("ann-too", "one")];
    let server = Server::with(&Config { key, ..config() }, Arc::new(InMemory::default()));
    let client = |key: &str| server.client().with_key(key);
    let prompt = ids(1, 500);
    assert_eq!(cached(&client("sk-ann").ok(COMPLETIONS, ask(&prompt)).await), 0);
    assert_eq!(cached(&client("sk-bob").ok(COMPLETIONS, ask(&prompt)).await), 0, "it is another tenant's");
    assert!(cached(&client("sk-ann-too").ok(COMPLETIONS, ask(&prompt)).await) >= 480, "it is the same tenant's");
    // At the same time neither waits for the other: each reads all of it.
    let prompt = ids(2, 500);
    let (ann, bob) = (client("sk-ann"), client("sk-bob"));
    let (a, b) = tokio::join!(ann.ok(COMPLETIONS, ask(&prompt)), bob.ok(COMPLETIONS, ask(&prompt)));
    assert_eq!((cached(&a), cached(&b)), (0, 0));
}

#[tokio::test]
async fn a_beginning_is_known_by_what_it_began_from() {
    let ((_server, client), stranger) = (server("parents"), stranger());
    let (document, question) = (ids(1, 300), ids(2, 250));
    let kept = with(ask(&document), json!({"store_state": true}));
    let (here, there) = (client.ok(COMPLETIONS, kept.clone()).await, stranger.ok(COMPLETIONS, kept).await);
    let on = |state: &Reply| with(ask(&question), json!({"state_id": state.state_id(), "store_state": false}));
    let first = client.ok(COMPLETIONS, on(&here)).await;
    let again = client.ok(COMPLETIONS, on(&here)).await;
    let expected = stranger.ok(COMPLETIONS, on(&there)).await;
    assert_eq!((essence(&first), essence(&again)), (essence(&expected), essence(&expected)));
    assert_eq!(cached(&first), cached(&expected), "only the stored state");
    assert!(cached(&again) >= cached(&first) + 230, "{}", again.text);
    // The question alone is another text.
    assert_eq!(cached(&client.ok(COMPLETIONS, ask(&question)).await), 0);
}

#[tokio::test]
async fn it_can_be_turned_off_and_small() {
    let prompt = ids(1, 400);
    let expected = essence(&stranger().ok(COMPLETIONS, ask(&prompt)).await);
    let small =
        |bytes| Config { prefix_cache: PrefixLimits { enabled: true, bytes, ..PrefixLimits::default() }, ..config() };
    for (config, least) in [(forgetful(config()), 0), (small(0), 0), (small(1000), 0), (small(4 << 20), 100)] {
        let client = Server::with(&config, Arc::new(InMemory::default())).client();
        for round in 0..2 {
            let reply = client.ok(COMPLETIONS, ask(&prompt)).await;
            assert_eq!(essence(&reply), expected);
            assert!(cached(&reply) >= if round > 0 { least } else { 0 }, "{}", reply.text);
            assert!(least > 0 || cached(&reply) == 0, "nothing is kept");
        }
    }
}

/// A server with a prefix cache on disk that is stopped as a server is.
#[tokio::test]
async fn it_outlives_the_server() {
    let folder = tempfile::tempdir().expect("a folder");
    let prefix_cache = PrefixLimits { disk_bytes: 1 << 30, ..PrefixLimits::default() };
    let model = vec![Model { name: "outlives".into(), ..Model::default() }];
    let config = Config { prefix_cache, model, ..config() };
    let serve = async || {
        let disk = Arc::new(Local::open(folder.path()).await.expect("a folder"));
        let app = App::with_stores(&config, Arc::new(InMemory::default()), Some(disk)).expect("the router");
        app.sessions.open(load_models(&config, &|_, _, _| {}).expect("the embedded model"));
        app
    };
    let prompt = ids(77, 300);
    let expected = essence(&stranger().ok(COMPLETIONS, ask(&prompt)).await);
    for least in [0, 200] {
        let app = serve().await;
        app.sessions.prefix_settled().await;
        let reply = Client::of(app.router.clone()).ok(COMPLETIONS, ask(&prompt)).await;
        assert_eq!(essence(&reply), expected);
        assert!((cached(&reply) > 0) == (least > 0) && cached(&reply) >= least, "{}", reply.text);
        app.sessions.drain();
        app.sessions.finish(std::time::Duration::from_secs(60)).await;
    }
    let client = Client::of(serve().await.router);
    assert!(metric(&client, "rewake_prefix_disk_hits_total", "outlives").await >= 1);
    assert!(metric(&client, "rewake_cached_tokens_total", "outlives").await >= 200);
}

/// States of every shape, those that grow with the text among them.
#[tokio::test]
async fn every_generation_goes_on_from_what_was_read() {
    let folder = tempfile::tempdir().expect("a folder");
    // The embedded model's first ids are single bytes, and all these models have that many.
    let mut tokenizer: Value = serde_json::from_str(include_str!("../../assets/demo/tokenizer.json")).expect("JSON");
    tokenizer["model"]["merges"] = json!([]);
    let ids_of = tokenizer["model"]["vocab"].as_object_mut().expect("a vocabulary");
    ids_of.retain(|_, id| id.as_u64().is_some_and(|id| id < 128));
    let vocabulary = folder.path().join("tokenizer.json");
    std::fs::write(&vocabulary, tokenizer.to_string()).expect("a file");
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    for case in ["v1_fp32", "v2_fp32", "v4_bf16", "v6_bf16", "v7_bf16", "v7a_bf16", "v7b_bf16", "v8_rc00_hybrid_bf16"] {
        let model = Model {
            name: case.into(),
            file: Some(data.join(case).join("model.safetensors")),
            tokenizer: Some(vocabulary.to_string_lossy().into_owned()),
            ..Model::default()
        };
        let config = Config { model: vec![model], ..config() };
        let serve = |config: &Config| Server::with(config, Arc::new(InMemory::default()));
        let (server, stranger) = (serve(&config), serve(&forgetful(config.clone())));
        let (client, stranger) = (server.client(), stranger.client());
        let text = |seed: u64, len: usize| ids(seed, len).into_iter().map(|id| 1 + id % 20).collect::<Vec<_>>();
        let mut saved = Vec::new();
        for n in 0..3 {
            let prompt = [text(1, 60), vec![n + 1], text(u64::from(n) + 2, 10)].concat();
            let kept = with(ask(&prompt), json!({"store_state": true}));
            let (reply, expected) = (client.ok(COMPLETIONS, kept.clone()).await, stranger.ok(COMPLETIONS, kept).await);
            assert_eq!((reply.answer(), reply.finish()), (expected.answer(), expected.finish()), "{case}");
            let of = |reply: &Reply| reply.json()["state"].clone();
            assert_eq!(
                (&of(&reply)["tokens"], &of(&reply)["bytes"]),
                (&of(&expected)["tokens"], &of(&expected)["bytes"])
            );
            saved.push(cached(&reply));
        }
        assert_eq!(saved, [0, 0, 60], "{case}");
    }
}
