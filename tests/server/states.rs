//! States that are read once, taken along and brought back: what comes of them, and what is refused.

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::http::Request;
use rewake::config::{Config, Model};
use rewake::state::{InMemory, decode, encode};
use rewake::types::{SegmentData, Snapshot, Tenant};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::server::{CHAT, COMPLETIONS, Client, Reply, Server, config, get};
use crate::{user, with};

const STATES: &str = "/v1/states";
const STORY: &str = "Once upon a time there was a small boat that wanted to see the sea.";

fn rules(limit: u64) -> Value {
    json!({"temperature": 0.8, "seed": 5, "max_tokens": limit})
}

/// The file of a state.
pub async fn download(client: &Client, id: &str) -> Vec<u8> {
    let response = client.send(get(&format!("{STATES}/{id}/content"))).await.expect("the server answers");
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/octet-stream");
    assert_eq!(response.headers()["content-disposition"], format!("attachment; filename=\"{id}.safetensors\""));
    to_bytes(response.into_body(), usize::MAX).await.expect("a whole body").to_vec()
}

async fn upload_as(client: &Client, kind: &str, query: &str, file: Vec<u8>) -> Reply {
    let request = Request::post(format!("{STATES}/import{query}")).header("content-type", kind);
    client.call(request.body(Body::from(file)).expect("a good request")).await
}

pub async fn upload(client: &Client, file: Vec<u8>) -> Reply {
    upload_as(client, "application/octet-stream", "", file).await
}

/// The file after a change of what is in it, with the checksum that belongs to it.
fn changed(file: &[u8], change: impl FnOnce(&mut Snapshot)) -> Vec<u8> {
    let mut snapshot = decode(file).expect("a sound file");
    change(&mut snapshot);
    encode(&snapshot).expect("a file that can be written")
}

#[tokio::test]
async fn a_text_is_read_once_and_answered_from_many_times() {
    let client = Server::shared().client();
    let read = json!({"prompt": STORY, "ttl_s": 1000, "metadata": {"book": "boat"}});
    let sent = client.ok(STATES, read.clone()).await;
    let state = sent.json();
    let id = state["id"].as_str().expect("an id").to_owned();
    assert_eq!(sent.header("x-state-id"), Some(id.as_str()));
    assert_eq!((&state["object"], &state["turn"], &state["parent"]), (&json!("state"), &json!(1), &Value::Null));
    assert_eq!(state["metadata"], json!({"book": "boat"}));
    let lives = state["expires_at"].as_u64().expect("a time") - state["created"].as_u64().expect("a time");
    assert!((999..=1001).contains(&lives), "{lives}");
    let usage = &state["usage"];
    assert_eq!((&usage["completion_tokens"], &usage["total_tokens"]), (&json!(0), &usage["prompt_tokens"]));
    assert_eq!(state["tokens"], usage["prompt_tokens"]);
    // It is shown and listed as it was told.
    let shown = client.get(&format!("{STATES}/{id}")).await.json();
    for (field, value) in shown.as_object().expect("an object") {
        assert_eq!(value, &state[field], "{field}");
    }

    for limit in [1, 7, 40] {
        let whole = client.ok(COMPLETIONS, with(rules(limit), json!({"prompt": STORY}))).await;
        for _ in 0..2 {
            let resumed = with(rules(limit), json!({"state_id": id, "store_state": false}));
            let resumed = client.ok(COMPLETIONS, resumed).await;
            assert_eq!((resumed.answer(), resumed.finish()), (whole.answer(), whole.finish()));
            assert_eq!(resumed.json()["usage"]["prompt_tokens"], usage["prompt_tokens"]);
        }
    }
    // Read on in parts: a state like that of the whole.
    let on = client.ok(STATES, json!({"prompt": " But", "state_id": id})).await.json();
    assert_eq!((&on["parent"], &on["turn"]), (&json!(id), &json!(2)));
    // The last token is read by whoever goes on.
    let read = |state: &Value| state["tokens"].as_u64().expect("a count") - 1;
    assert_eq!(on["usage"]["prompt_tokens_details"]["cached_tokens"], read(&state));
    let begun = with(rules(20), json!({"prompt": " But", "state_id": id, "store_state": false}));
    let expected = client.ok(COMPLETIONS, begun).await.answer();
    let resumed = with(rules(20), json!({"state_id": on["id"], "store_state": false}));
    assert_eq!(client.ok(COMPLETIONS, resumed).await.answer(), expected);
}

#[tokio::test]
async fn a_single_token_is_a_text_too() {
    let client = Server::shared().client();
    let whole = client.ok(COMPLETIONS, with(rules(12), json!({"prompt": [17, 18, 19]}))).await;
    let mut parent = Value::Null;
    for (n, id) in [17, 18, 19].into_iter().enumerate() {
        let read = client.ok(STATES, json!({"prompt": [id], "state_id": parent})).await.json();
        assert_eq!((&read["tokens"], &read["turn"]), (&json!(n + 1), &json!(n + 1)));
        assert_eq!(read["usage"]["prompt_tokens_details"]["cached_tokens"], n.saturating_sub(1));
        parent = read["id"].clone();
    }
    let resumed = client.ok(COMPLETIONS, with(rules(12), json!({"state_id": parent}))).await;
    assert_eq!((resumed.answer(), resumed.finish()), (whole.answer(), whole.finish()));
}

#[tokio::test]
async fn a_conversation_is_read_up_to_the_next_question() {
    let client = Server::shared().client();
    let said = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who was the friend?"},
        {"role": "assistant", "content": "A little dog named Max."},
    ]);
    let read = client.ok(STATES, json!({ "messages": said })).await.json();
    let mut whole = said.as_array().expect("messages").clone();
    whole.extend(user("And then?").as_array().expect("messages").clone());
    let whole = client.ok(CHAT, with(rules(30), json!({ "messages": whole }))).await;
    let resumed = with(rules(30), json!({"messages": user("And then?"), "state_id": read["id"]}));
    let resumed = client.ok(CHAT, resumed).await;
    assert_eq!((resumed.answer(), resumed.finish()), (whole.answer(), whole.finish()));
    assert_eq!(resumed.json()["usage"]["prompt_tokens"], whole.json()["usage"]["prompt_tokens"]);
    let cached = resumed.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert_eq!(cached.map(|cached| cached + 1), read["tokens"].as_u64());
    // What a cut answer held back is read before what is new.
    let cut = with(rules(3), json!({"messages": user("Who?"), "store_state": true}));
    let cut = client.ok(CHAT, cut).await;
    let more = json!({"messages": user("Go on."), "state_id": cut.state_id()});
    let read = client.ok(STATES, more.clone()).await.json();
    let empty = with(rules(9), json!({"messages": user("Now."), "state_id": read["id"]}));
    let both = json!([{"role": "user", "content": "Go on."}, {"role": "user", "content": "Now."}]);
    let both = with(rules(9), json!({"messages": both, "state_id": cut.state_id()}));
    assert_eq!(client.ok(CHAT, empty).await.answer(), client.ok(CHAT, both).await.answer());
}

#[tokio::test]
async fn a_state_is_taken_to_another_server() {
    let (here, there) = (Server::new().client(), Server::new().client());
    let begin = with(rules(9), json!({"prompt": STORY, "store_state": true}));
    let begun = here.ok(COMPLETIONS, begin).await;
    let file = download(&here, &begun.state_id()).await;

    // Anything that reads safetensors can look into it.
    let tensors = SafeTensors::deserialize(&file).expect("a safetensors file");
    assert!(tensors.tensor("blocks.0.att.shift").is_ok() && tensors.tensor("checksum").is_ok());

    let sent = upload(&there, file.clone()).await;
    assert_eq!(sent.status, 200, "{}", sent.text);
    let state = sent.json();
    assert_ne!(state["id"], begun.state_id());
    assert_eq!((&state["object"], &state["parent"], &state["turn"]), (&json!("state"), &Value::Null, &json!(1)));
    assert_eq!(
        (&state["tokens"], &state["bytes"]),
        (&begun.json()["state"]["tokens"], &begun.json()["state"]["bytes"])
    );
    let go_on = |id: &Value| with(rules(30), json!({"state_id": id, "store_state": false}));
    let expected = here.ok(COMPLETIONS, go_on(&json!(begun.state_id()))).await;
    let resumed = there.ok(COMPLETIONS, go_on(&state["id"])).await;
    assert_eq!((resumed.answer(), resumed.finish()), (expected.answer(), expected.finish()));
    // Each import is a state of its own; it is listed like any other, and can be given a time to live.
    let again = upload_as(&there, "application/octet-stream", "?ttl_s=60", file).await.json();
    assert!(again["id"] != state["id"] && again["expires_at"].is_u64());
    let listed = there.get(STATES).await.json();
    assert_eq!(listed["data"].as_array().expect("states").len(), 2);
    // What it says of itself but for whose it is stays with it.
    let back = decode(&download(&there, state["id"].as_str().expect("an id")).await).expect("a sound file");
    assert_eq!((back.head.owner, back.head.session), (Tenant::local(), None));
}

#[tokio::test]
async fn what_is_no_state_of_a_served_model_is_refused() {
    let client = Server::new().client();
    let id = client.ok(STATES, json!({"prompt": STORY})).await.json()["id"].as_str().expect("an id").to_owned();
    let file = download(&client, &id).await;
    let mut flipped = file.clone();
    flipped[file.len() / 2] ^= 1;
    let mut infinite = file.clone();
    let at = file.len() - 400;
    infinite[at..at + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let vocabulary = client.get("/v1/models/stories").await.json()["rewake"]["vocabulary"].as_u64().expect("a number");
    let foreign = vocabulary as u32;
    for (what, bad) in [
        ("nothing", Vec::new()),
        ("text", b"{\"prompt\": \"hello\"}".to_vec()),
        ("half", file[..file.len() / 2].to_vec()),
        ("a flipped bit", flipped),
        ("no checksum", infinite),
        ("other shapes", changed(&file, |s| s.memory.segments[0].shape.insert(0, 1))),
        ("a segment too few", changed(&file, |s| drop(s.memory.segments.pop()))),
        ("segments in another order", changed(&file, |s| s.memory.segments.reverse())),
        ("foreign ids to read", changed(&file, |s| s.memory.pending.ends = vec![foreign])),
        ("foreign ids to go on with", changed(&file, |s| s.memory.pending.goes_on = vec![foreign])),
        ("a foreign tail", changed(&file, |s| s.memory.tail[0] = foreign)),
        ("foreign counts", changed(&file, |s| s.memory.counts = vec![(foreign, 1.0)])),
        ("much metadata", changed(&file, |s| drop(s.head.metadata.insert("k".into(), "v".repeat(9999))))),
    ] {
        let refused = upload(&client, bad).await;
        assert_eq!((refused.status, refused.code().as_str()), (400, "invalid_state"), "{what}: {}", refused.text);
        assert_eq!(refused.error()["param"], "body", "{what}");
    }
    // Before it is unpacked: a small file may claim to be a large state.
    let large = |s: &mut Snapshot| {
        let more = SegmentData { name: "more".into(), shape: vec![1 << 16], data: vec![0.0; 1 << 16] };
        s.memory.segments.push(more);
    };
    let refused = upload(&client, changed(&file, large)).await;
    assert!(refused.status == 400 && refused.text.contains("at most"), "{}", refused.text);
    let other = upload(&client, changed(&file, |s| s.head.fingerprint = "other".into())).await;
    assert_eq!((other.status, other.code().as_str()), (409, "state_model_mismatch"));
    assert_eq!(other.header("x-should-retry"), Some("false"));
    for kind in ["application/json", "application/x-www-form-urlencoded", "text/plain"] {
        let refused = upload_as(&client, kind, "", file.clone()).await;
        assert_eq!((refused.status, refused.code().as_str()), (415, "unsupported_media_type"), "{kind}");
    }
    for (query, param) in [("?ttl_s=0", "ttl_s"), ("?ttl_s=x", "ttl_s"), ("?model=stories", "model")] {
        let refused = upload_as(&client, "application/octet-stream", query, file.clone()).await;
        assert_eq!(refused.status, 400, "{query}");
        assert!(refused.text.contains(param), "{query}: {}", refused.text);
    }
    for missing in ["x", &format!("st_{}", "0".repeat(44))] {
        let reply = client.get(&format!("{STATES}/{missing}/content")).await;
        assert_eq!((reply.status, reply.code().as_str()), (404, "state_not_found"));
    }
    assert_eq!(client.get(STATES).await.json()["data"].as_array().expect("states").len(), 1, "nothing was kept");
}

#[tokio::test]
async fn a_state_has_a_limit_of_its_own() {
    let mut config = config();
    (config.requests.body_bytes, config.requests.state_bytes) = (1000, 1 << 20);
    let client = Server::with(&config, Arc::new(InMemory::default())).client();
    let id = client.ok(STATES, json!({"prompt": "A boat"})).await.json()["id"].as_str().expect("an id").to_owned();
    let file = download(&client, &id).await;
    assert!(file.len() > 1000);
    assert_eq!(upload(&client, file.clone()).await.status, 200, "prompts have another limit");
    let mut larger = file;
    larger.resize((1 << 20) + 1, 0);
    // Whether its length is told or not.
    let told = upload(&client, larger.clone()).await;
    let chunks = larger.chunks(4096).map(|chunk| Ok::<_, std::io::Error>(chunk.to_vec())).collect::<Vec<_>>();
    let untold = Request::post(format!("{STATES}/import")).header("content-type", "application/octet-stream");
    let untold = untold.body(Body::from_stream(futures::stream::iter(chunks))).expect("a good request");
    for reply in [told, client.call(untold).await] {
        assert_eq!((reply.status, reply.code().as_str()), (413, "request_too_large"));
    }
}

#[tokio::test]
async fn what_grows_with_the_text_is_taken_along_too() {
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    // The embedded model's first ids, as many as these models have.
    let tokenizer = include_str!("../../assets/demo/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(tokenizer).expect("JSON");
    tokenizer["model"]["merges"] = json!([]);
    let ids = tokenizer["model"]["vocab"].as_object_mut().expect("a vocabulary");
    ids.retain(|_, id| id.as_u64().is_some_and(|id| id < 100));
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tokenizer.json");
    std::fs::write(&file, tokenizer.to_string()).expect("a file");
    let model = |case: &str| Model {
        name: case.into(),
        file: Some(data.join(case).join("model.safetensors")),
        tokenizer: Some(file.display().to_string()),
        ..Model::default()
    };
    let cases = ["v1_fp32", "v2_fp32", "v7b_bf16", "v8_rc00_hybrid_bf16"];
    let config = Config { model: cases.map(model).into(), ..config() };
    let client = Server::with(&config, Arc::new(InMemory::default())).client();
    for case in cases {
        let read = json!({"model": case, "prompt": [3, 1, 4, 1, 5, 9]});
        let id = client.ok(STATES, read).await.json()["id"].as_str().expect("an id").to_owned();
        let file = download(&client, &id).await;
        let brought = upload(&client, file.clone()).await;
        assert_eq!((brought.status, &brought.json()["model"]), (200, &json!(case)), "{}", brought.text);
        let answer = |id: Value| {
            let client = client.clone();
            let body = with(rules(12), json!({"model": case, "state_id": id, "store_state": false}));
            async move { client.ok(COMPLETIONS, body).await.text }
        };
        let (one, two) = (answer(json!(id)).await, answer(brought.json()["id"].clone()).await);
        let text = |reply: &str| serde_json::from_str::<Value>(reply).expect("JSON")["choices"][0]["text"].clone();
        assert_eq!(text(&one), text(&two), "{case}");
        // A log that does not belong to the tokens, or that points outside the vocabulary, would fail other people's steps.
        let longer = changed(&file, |s| s.memory.consumed = 4);
        let ids = changed(&file, |s| {
            let log = s.memory.segments.iter_mut().find(|s| s.name.contains("text") || s.name.contains("copy"));
            match log {
                Some(log) => log.data.fill(1e9),
                None => s.memory.consumed = 7,
            }
        });
        for bad in [longer, ids] {
            let refused = upload(&client, bad).await;
            assert_eq!((refused.status, refused.code().as_str()), (400, "invalid_state"), "{case}: {}", refused.text);
        }
    }
}

/// Whole, finite, laid out as it should be, and no model ever made it.
#[tokio::test]
async fn a_state_of_which_nothing_can_be_computed_is_to_blame_for_that() {
    let server = Server::new();
    let client = server.client();
    let begun = client.ok(COMPLETIONS, with(rules(9), json!({"prompt": STORY, "store_state": true}))).await;
    let file = download(&client, &begun.state_id()).await;
    for huge in [f32::MAX, -f32::MAX, 1e30] {
        let file = changed(&file, |snapshot| {
            snapshot.memory.segments.iter_mut().for_each(|segment| segment.data.fill(huge));
        });
        let brought = upload(&client, file).await;
        let id = brought.json()["id"].clone();
        assert_eq!(brought.status, 200, "{}", brought.text);
        for (path, body) in [
            (COMPLETIONS, json!({"prompt": "x"})),
            (COMPLETIONS, json!({"prompt": "x", "temperature": 0, "n": 2, "max_tokens": 3})),
            (CHAT, json!({"messages": user("x")})),
            (STATES, json!({"prompt": "x and more"})),
        ] {
            let refused = client.post(path, with(body, json!({"state_id": id}))).await;
            let error = refused.error();
            assert_eq!(
                (refused.status, &error["code"], &error["param"]),
                (400, &json!("invalid_state"), &json!("state_id"))
            );
        }
        let body = json!({"prompt": "x", "state_id": id});
        let mut chunks = client.stream(COMPLETIONS, body).await;
        let mut last = Value::Null;
        while let Some(chunk) = chunks.next().await {
            last = chunk;
        }
        assert_eq!(last["error"]["code"], "invalid_state", "{last}");
    }
    client.ok(COMPLETIONS, json!({"prompt": "x", "state_id": begun.state_id()})).await;
}
