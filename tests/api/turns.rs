//! How turns look on the wire.

use futures::StreamExt;
use serde_json::{Value, json};

use crate::support::{CHAT, COMPLETIONS, Client, Server, last, post, said};

fn client() -> Client {
    Server::shared().client()
}

/// A request to either endpoint.
fn hello(path: &str) -> Value {
    match path {
        CHAT => {
            json!({"messages": [{"role": "user", "content": "Tell me about a cat."}], "temperature": 0, "max_tokens": 8})
        }
        _ => json!({"prompt": "Once upon a time", "temperature": 0, "max_tokens": 8}),
    }
}

#[tokio::test]
async fn a_reply_is_openai_s() {
    for (path, object, prefix) in [(COMPLETIONS, "text_completion", "cmpl-"), (CHAT, "chat.completion", "chatcmpl-")] {
        let mut body = hello(path);
        body["zzz"] = json!(1);
        let sent = client().post(&format!("{path}/"), body).await;
        assert_eq!((sent.status, sent.header("x-ignored-params")), (200, Some("zzz")), "{}", sent.text);
        assert!(sent.header("x-request-id").is_some() && sent.header("x-state-id").is_none());
        let reply = sent.json();
        assert_eq!((&reply["object"], &reply["model"]), (&json!(object), &json!("stories")));
        assert!(reply["id"].as_str().is_some_and(|id| id.starts_with(prefix)));
        assert!(reply["created"].is_u64() && reply["system_fingerprint"].is_string());
        assert!(reply.get("state").is_none() && reply.get("state_error").is_none());
        let choice = &reply["choices"][0];
        assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(0), &json!("length")));
        assert!(choice.get("logprobs").is_some_and(Value::is_null));
        if path == CHAT {
            assert_eq!(choice["message"]["role"], "assistant");
            assert!(choice["message"].get("refusal").is_some_and(Value::is_null));
            assert_eq!(reply["service_tier"], "default");
        }
        let count = |name: &str| reply["usage"][name].as_u64().expect("a count");
        assert_eq!(count("completion_tokens"), 8);
        assert_eq!(count("total_tokens"), count("prompt_tokens") + 8);
    }
}

#[tokio::test]
async fn a_stream_is_the_reply_in_pieces() {
    for (path, object) in [(COMPLETIONS, "text_completion"), (CHAT, "chat.completion.chunk")] {
        let whole = client().ok(path, hello(path)).await;
        for include_usage in [false, true] {
            let mut body = hello(path);
            body["stream_options"] = json!({ "include_usage": include_usage });
            let stream = client().stream(path, body).await;
            assert!(stream.headers.contains_key("x-request-id"));
            assert_eq!(stream.headers["cache-control"], "no-cache");
            let mut chunks = stream.all().await;
            if include_usage {
                let usage = chunks.pop().expect("a last chunk");
                assert_eq!((&usage["choices"], &usage["usage"]), (&json!([]), &whole.json()["usage"]));
            }
            for chunk in &chunks {
                assert_eq!((&chunk["object"], &chunk["id"]), (&json!(object), &chunks[0]["id"]));
                assert_eq!(chunk.get("usage"), include_usage.then_some(&Value::Null));
                assert!(chunk["choices"][0].get("finish_reason").is_some() && chunk.get("error").is_none());
            }
            if path == CHAT {
                let first = json!({"role": "assistant", "content": ""});
                assert_eq!(chunks[0]["choices"][0]["delta"], first);
                assert_eq!(last(&chunks)["choices"][0]["delta"], json!({}));
            }
            assert_eq!(last(&chunks), chunks.last().expect("chunks"));
            assert_eq!(last(&chunks)["choices"][0]["finish_reason"], "length");
            assert_eq!(said(&chunks, 0), whole.answer());
        }
    }
}

#[tokio::test]
async fn choices_are_numbered_by_prompt_and_answer() {
    let body = json!({"prompt": ["The cat", "The dog"], "n": 2, "seed": 5, "temperature": 1, "max_tokens": 8});
    let whole = client().ok(COMPLETIONS, body.clone()).await.json();
    let texts: Vec<_> = whole["choices"].as_array().expect("choices").iter().map(|c| c["text"].clone()).collect();
    assert_eq!(texts.len(), 4);
    assert_ne!(texts[0], texts[1], "answers to one prompt differ by their random numbers");
    let chunks = client().stream(COMPLETIONS, body).await.all().await;
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(*text, said(&chunks, index as u64), "choice {index}");
    }
    for (prompt, at) in [("The cat", 0), ("The dog", 2)] {
        let body = json!({"prompt": prompt, "seed": 5, "temperature": 1, "max_tokens": 8});
        assert_eq!(client().ok(COMPLETIONS, body).await.answer(), texts[at], "as if it were asked alone");
    }
    assert_eq!(whole["usage"]["completion_tokens"], 32);
}

#[tokio::test]
async fn a_draining_server_takes_no_turns() {
    let server = Server::new();
    let client = server.client();
    assert_eq!(client.get("/ready").await.status, 200);
    server.sessions.drain();
    for reply in [client.get("/ready").await, client.post(CHAT, hello(CHAT)).await] {
        assert_eq!((reply.status, reply.code().as_str()), (503, "shutting_down"));
        assert!(reply.header("retry-after").is_some() && reply.header("retry-after-ms").is_some());
    }
    assert_eq!(client.get("/health").await.status, 200);
}

/// Whoever hangs up gives the session back: the next turn of it is not refused, though this one would run for minutes.
#[tokio::test]
async fn hanging_up_cancels_the_turn() {
    let endless = |session: &str, stream: bool| {
        let body = json!({
            "prompt": "Once", "session_id": session, "max_tokens": 900_000, "logit_bias": {"0": -100}, "stream": stream,
        });
        post(COMPLETIONS, body.to_string())
    };
    let next = |session: &str| json!({"prompt": "Once", "session_id": session, "max_tokens": 1});

    let response = client().send(endless("hang-up:stream", true)).await.expect("an answer");
    let mut frames = response.into_body().into_data_stream();
    frames.next().await.expect("a first chunk").expect("is well");
    assert_eq!(client().post(COMPLETIONS, next("hang-up:stream")).await.code(), "session_busy");
    drop(frames);
    let freed = client().post_while(409, COMPLETIONS, next("hang-up:stream")).await;
    assert_eq!(freed.status, 200, "{}", freed.text);

    let client = client();
    let mut call = Box::pin(client.send(endless("hang-up:whole", false)));
    loop {
        assert!(futures::poll!(&mut call).is_pending());
        if client.post(COMPLETIONS, next("hang-up:whole")).await.status == 409 {
            break;
        }
    }
    drop(call);
    let freed = client.post_while(409, COMPLETIONS, next("hang-up:whole")).await;
    assert_eq!(freed.status, 200, "{}", freed.text);
}
