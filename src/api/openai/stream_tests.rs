//! Replies and streams of both endpoints, from events to bytes.

use std::time::Duration;

use axum::body::to_bytes;
use axum::http::Request;
use axum::response::Response;
use futures::stream;
use serde_json::{Value, json};

use super::chat::ChatCompletion;
use super::chunks::Chunks;
use super::completions::TextCompletion;
use super::reply::{Heading, Opening, Shape, collect, whole};
use crate::api::record::Record;
use crate::api::{Error, sse};
use crate::session::{self, Event, StateError, StateReceipt};
use crate::types::{Finish, SessionId, StateId};

fn opening(choices: usize) -> Opening {
    let heading = Heading { id: "cmpl-1".into(), created: 42, model: "m".into(), system_fingerprint: "fp".into() };
    Opening { heading, prompt_tokens: 10, cached_tokens: 4.into(), choices }
}

fn text(choice: usize, text: &str) -> Event {
    Event::Text { choice, text: text.into() }
}

fn done(choice: usize, finish: Finish, completion_tokens: u64) -> Event {
    Event::Done { choice, finish, completion_tokens, stored: None }
}

fn receipt() -> StateReceipt {
    StateReceipt {
        id: StateId::new(1, 2),
        parent: None,
        session_id: Some(SessionId::parse("s").unwrap()),
        turn: 3,
        tokens: 15,
        bytes: 100,
        expires_at: Some(99),
    }
}

fn stored(stored: Result<StateReceipt, StateError>) -> Event {
    Event::Done { choice: 0, finish: Finish::Stop, completion_tokens: 2, stored: Some(stored) }
}

fn lost() -> StateError {
    StateError { code: "store_failed".into(), message: "the disk is full".into() }
}

async fn record() -> Record {
    use axum::extract::FromRequestParts;
    let (mut parts, ()) = Request::new(()).into_parts();
    Record::from_request_parts(&mut parts, &()).await.expect("it cannot fail")
}

async fn body(response: Response) -> String {
    let bytes = to_bytes(response.into_body(), usize::MAX).await.expect("the body is whole");
    String::from_utf8(bytes.into()).expect("the body is text")
}

/// The events of a stream: their ids and data.
async fn streamed<S: Shape>(choices: usize, include_usage: bool, events: Vec<Event>) -> Vec<(String, String)> {
    let chunks = Chunks::<S>::new(opening(choices), include_usage);
    let response = sse::reply(chunks, stream::iter(events), record().await, None);
    let body = body(response).await;
    let event = |event: &str| {
        let two = event.strip_prefix("id: ").map(|event| event.split_once('\n').expect("an event has two lines"));
        // A failure has no id.
        let (id, data) = two.unwrap_or(("", event));
        let data = data.strip_prefix("data: ").expect("the second is its data, and there is no event name");
        assert!(!data.contains('\n'));
        (id.to_owned(), data.to_owned())
    };
    assert!(body.ends_with("\n\n"));
    body.trim_end().split("\n\n").map(event).collect()
}

fn parsed(events: &[(String, String)]) -> Vec<Value> {
    let chunks = events.iter().filter(|(_, data)| data != "[DONE]");
    chunks.map(|(_, data)| serde_json::from_str(data).expect("data is JSON")).collect()
}

#[tokio::test]
async fn a_streamed_completion_has_the_shape_of_the_contract() {
    let events = vec![text(0, "a"), text(0, "b\n"), done(0, Finish::Length, 2)];
    let events = streamed::<TextCompletion>(1, false, events).await;
    let ids: Vec<_> = events.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(ids, ["cmpl-1:0", "cmpl-1:1", "cmpl-1:2", "cmpl-1:3"]);
    assert_eq!(events[3].1, "[DONE]");
    let chunk = |text: &str, finish: Value| {
        json!({
            "id": "cmpl-1", "object": "text_completion", "created": 42, "model": "m", "system_fingerprint": "fp",
            "choices": [{"index": 0, "text": text, "logprobs": null, "finish_reason": finish}],
        })
    };
    let expected = [chunk("a", json!(null)), chunk("b\n", json!(null)), chunk("", json!("length"))];
    assert_eq!(parsed(&events), expected);
}

#[tokio::test]
async fn a_streamed_chat_opens_each_choice_and_closes_it() {
    let events = vec![text(1, "x"), text(0, "a"), done(1, Finish::Stop, 1), text(0, "b"), done(0, Finish::Length, 2)];
    let events = streamed::<ChatCompletion>(2, true, events).await;
    let chunks = parsed(&events);
    let (last, pieces) = chunks.split_last().unwrap();
    let seen: Vec<_> = pieces
        .iter()
        .map(|chunk| {
            assert_eq!(chunk["object"], "chat.completion.chunk");
            assert_eq!(chunk["service_tier"], "default");
            assert_eq!(chunk.get("usage"), Some(&Value::Null), "the key is there and null");
            let choice = &chunk["choices"][0];
            assert_eq!(choice.get("logprobs"), Some(&Value::Null));
            (choice["index"].as_u64().unwrap(), choice["delta"].clone(), choice["finish_reason"].clone())
        })
        .collect();
    let open = json!({"role": "assistant", "content": ""});
    let expected = [
        (0, open.clone(), json!(null)),
        (1, open, json!(null)),
        (1, json!({"content": "x"}), json!(null)),
        (0, json!({"content": "a"}), json!(null)),
        (1, json!({}), json!("stop")),
        (0, json!({"content": "b"}), json!(null)),
        (0, json!({}), json!("length")),
    ];
    assert_eq!(seen, expected);
    let usage = json!({
        "prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 0},
    });
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &usage));
    assert_eq!(events.last().unwrap().1, "[DONE]");
}

#[tokio::test]
async fn a_stored_state_is_on_the_chunk_that_carries_the_finish_reason() {
    let state = json!({
        "id": StateId::new(1, 2), "parent": null, "session_id": "s", "turn": 3, "tokens": 15, "bytes": 100,
        "expires_at": 99,
    });
    let chunks = parsed(&streamed::<TextCompletion>(1, true, vec![text(0, "a"), stored(Ok(receipt()))]).await);
    assert!(chunks[0].get("state").is_none() && chunks[0]["choices"][0].get("state").is_none());
    assert_eq!((&chunks[1]["state"], &chunks[1]["choices"][0]["state"]), (&state, &state));
    assert!(chunks[1].get("state_error").is_none() && chunks[2].get("state").is_none());

    let chunks = parsed(&streamed::<ChatCompletion>(1, false, vec![stored(Err(lost()))]).await);
    let problem = json!({"code": "store_failed", "message": "the disk is full"});
    for place in [&chunks[1], &chunks[1]["choices"][0]] {
        assert_eq!((place.get("state"), &place["state_error"]), (Some(&Value::Null), &problem));
    }
    // With several choices there is no such thing as the state of the response.
    let two = vec![stored(Ok(receipt())), done(1, Finish::Stop, 1)];
    let chunks = parsed(&streamed::<TextCompletion>(2, false, two).await);
    assert!(chunks[0].get("state").is_none());
    assert_eq!(chunks[0]["choices"][0]["state"], state);
}

#[tokio::test]
async fn a_failure_after_the_headers_is_one_last_event() {
    let full = session::Error::Full { retry_after: Duration::from_secs(1) };
    for (events, code) in
        [(vec![text(0, "a"), Event::Failed(full)], "rate_limit_exceeded"), (vec![text(0, "a")], "engine_failed")]
    {
        let events = streamed::<TextCompletion>(1, true, events).await;
        assert_eq!(events.len(), 2, "no [DONE] after a failure");
        assert_eq!(events.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["cmpl-1:0", ""]);
        let error = &parsed(&events)[1]["error"];
        assert_eq!(error["code"], code);
        assert_eq!(error.as_object().unwrap().len(), 4);
    }
}

#[tokio::test]
async fn a_stream_s_headers_keep_proxies_from_holding_it_back() {
    let chunks = Chunks::<TextCompletion>::new(opening(1), false);
    let response = sse::reply(chunks, stream::iter([done(0, Finish::Stop, 1)]), record().await, None);
    let header = |name: &str| response.headers()[name].to_str().unwrap();
    assert_eq!(header("content-type"), "text/event-stream");
    assert_eq!(header("cache-control"), "no-cache");
    assert_eq!(header("x-accel-buffering"), "no");
}

#[tokio::test]
async fn a_silent_stream_is_kept_alive_by_comments() {
    use futures::StreamExt;
    let chunks = Chunks::<TextCompletion>::new(opening(1), false);
    let response = sse::reply_pinging(chunks, stream::pending(), record().await, Duration::from_millis(1));
    let mut frames = response.into_body().into_data_stream();
    assert_eq!(frames.next().await.unwrap().unwrap(), ": ping\n\n");
}

#[tokio::test]
async fn dropping_a_stream_drops_the_turn() {
    use futures::StreamExt;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let events = stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
    let chunks = Chunks::<ChatCompletion>::new(opening(1), false);
    let response = sse::reply(chunks, Box::pin(events), record().await, None);
    let mut frames = response.into_body().into_data_stream();
    frames.next().await.expect("the opening chunk").expect("is well");
    assert!(!sender.is_closed());
    drop(frames);
    assert!(sender.is_closed());
}

#[tokio::test]
async fn a_whole_reply_gathers_its_choices_in_order() {
    let events = [text(1, "x"), text(0, "a"), done(1, Finish::Stop, 1), text(0, "b"), done(0, Finish::Length, 2)];
    let answers = collect(stream::iter(events), 2, &record().await).await.unwrap();
    let response = whole::<ChatCompletion>(opening(2), answers);
    assert!(!response.headers().contains_key("x-state-id"));
    let message = |text: &str| json!({"role": "assistant", "content": text, "refusal": null});
    let expected = json!({
        "id": "cmpl-1", "object": "chat.completion", "created": 42, "model": "m", "system_fingerprint": "fp",
        "choices": [
            {"index": 0, "message": message("ab"), "logprobs": null, "finish_reason": "length"},
            {"index": 1, "message": message("x"), "logprobs": null, "finish_reason": "stop"},
        ],
        "usage": {
            "prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 0},
        },
        "service_tier": "default",
    });
    assert_eq!(serde_json::from_str::<Value>(&body(response).await).unwrap(), expected);
}

#[tokio::test]
async fn a_whole_reply_names_its_state() {
    let answers = collect(stream::iter([text(0, "a"), stored(Ok(receipt()))]), 1, &record().await).await.unwrap();
    let response = whole::<TextCompletion>(opening(1), answers);
    assert_eq!(response.headers()["x-state-id"], StateId::new(1, 2).as_str());
    let reply: Value = serde_json::from_str(&body(response).await).unwrap();
    assert_eq!(reply["object"], "text_completion");
    assert_eq!(reply["choices"][0]["text"], "a");
    assert_eq!(reply["state"], reply["choices"][0]["state"]);
    assert_eq!(reply["state"]["turn"], 3);

    let answers = collect(stream::iter([stored(Err(lost()))]), 1, &record().await).await.unwrap();
    let response = whole::<TextCompletion>(opening(1), answers);
    assert!(!response.headers().contains_key("x-state-id"));
    let reply: Value = serde_json::from_str(&body(response).await).unwrap();
    assert_eq!((reply.get("state"), &reply["state_error"]["code"]), (Some(&Value::Null), &json!("store_failed")));
}

#[tokio::test]
async fn a_turn_that_breaks_off_is_an_error() {
    let broken = collect(stream::iter([text(0, "a")]), 1, &record().await).await;
    assert!(matches!(broken, Err(Error::Session(session::Error::Engine(_)))));
    let failed = collect(stream::iter([Event::Failed(session::Error::Draining)]), 1, &record().await).await;
    assert!(matches!(failed, Err(Error::Session(session::Error::Draining))));
}
