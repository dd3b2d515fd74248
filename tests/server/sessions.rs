//! Sessions and forks: what a turn through a session says, what is told of it, and when it is refused.

use std::sync::Arc;

use rewake::state::InMemory;
use rewake::text::{self, Tokenizer};
use serde_json::{Value, json};

use crate::server::{CHAT, COMPLETIONS, Client, Server, config, forgetful, last};
use crate::{endless, user, with};

fn tokenizer() -> Arc<dyn Tokenizer> {
    text::from_json(include_bytes!("../../assets/demo/tokenizer.json")).expect("the embedded tokenizer")
}

fn client() -> Client {
    Server::shared().client()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// A session's turns, with their ids, and the whole sequence after each of them.
async fn log(client: &Client, session: &str) -> (Vec<Value>, Vec<Vec<u32>>) {
    let list = client.get(&format!("/v1/sessions/{session}/turns?token_ids=true&limit=100")).await;
    assert_eq!(list.status, 200, "{}", list.text);
    let turns = list.json()["data"].as_array().expect("turns").clone();
    let mut sequence: Vec<u32> = Vec::new();
    let mut sequences = Vec::new();
    for turn in &turns {
        let takes_back = turn["takes_back"].as_u64().expect("a count") as usize;
        sequence.truncate(sequence.len() - takes_back);
        sequence.extend(ids(&turn["token_ids"]));
        sequences.push(sequence.clone());
    }
    (turns, sequences)
}

const QUESTIONS: [&str; 4] =
    ["Tell me a story about a cat and a boat.", "What did the cat do then?", "Who was the friend?", "Tell me more."];

/// Answers differ in how they end: at a blank line, or cut by the limit, even inside a word.
const LIMITS: [u64; 4] = [60, 7, 300, 9];

#[tokio::test]
async fn a_session_s_turn_is_the_one_shot_request_over_the_same_ids() {
    let (client, tokenizer) = (client(), tokenizer());
    // It knows nothing of the turns: neither their states nor what they have read.
    let stranger = Server::with(&forgetful(config()), Arc::new(InMemory::default())).client();
    let stop = client.get("/v1/models/stories").await.json()["rewake"]["stop"].clone();
    let mut transcripts = 0;
    for (n, temperature) in [0.0, 0.8, 1.0].into_iter().enumerate() {
        let session = format!("one-shot:{n}");
        let rules = |limit: u64| json!({"temperature": temperature, "top_p": 0.9, "seed": 3, "max_tokens": limit});
        let mut replies = Vec::new();
        for (question, limit) in QUESTIONS.into_iter().zip(LIMITS) {
            let body = with(rules(limit), json!({"messages": user(question), "session_id": session}));
            replies.push(client.ok(CHAT, body).await);
        }
        let (turns, sequences) = log(&client, &session).await;
        assert_eq!(turns.len(), QUESTIONS.len());
        let mut transcript = Vec::new();
        let mut same_ids = true;
        for (turn, reply) in replies.iter().enumerate() {
            // 1. By ids: what was read before the answer is the prompt.
            let prompt_tokens = reply.json()["usage"]["prompt_tokens"].as_u64().expect("a count") as usize;
            let (prompt, answer) = sequences[turn].split_at(prompt_tokens);
            let by_ids = with(rules(LIMITS[turn]), json!({"prompt": prompt, "stop": stop}));
            let by_ids = stranger.ok(COMPLETIONS, by_ids).await;
            assert_eq!(by_ids.answer().trim(), reply.answer(), "turn {turn} at {temperature}");
            assert_eq!(by_ids.finish(), reply.finish());
            assert_eq!(by_ids.json()["usage"]["prompt_tokens"], prompt_tokens);
            assert_eq!(by_ids.json()["usage"]["completion_tokens"], reply.json()["usage"]["completion_tokens"]);
            assert_eq!(by_ids.json()["usage"]["prompt_tokens_details"]["cached_tokens"], 0);

            // 2. By the transcript, as long as its words give the ids that were sampled.
            transcript.push(json!({"role": "user", "content": QUESTIONS[turn]}));
            if same_ids {
                let whole = with(rules(LIMITS[turn]), json!({ "messages": transcript }));
                let whole = client.ok(CHAT, whole).await;
                assert_eq!(
                    (whole.answer(), whole.finish()),
                    (reply.answer(), reply.finish()),
                    "turn {turn} at {temperature}"
                );
                assert_eq!(whole.json()["usage"]["prompt_tokens"], prompt_tokens);
                transcripts += 1;
            }
            transcript.push(json!({"role": "assistant", "content": reply.answer()}));
            same_ids &= tokenizer.encode(&format!(" {}", reply.answer())) == answer;
        }
    }
    assert!(transcripts >= 8, "most transcripts tokenise to what was sampled, but {transcripts} did");
}

#[tokio::test]
async fn a_turn_is_told_of_truly() {
    let client = client();
    let ask = |question: &str, limit: u64| json!({"messages": user(question), "session_id": "told", "temperature": 0, "max_tokens": limit});
    let mut parent = Value::Null;
    let mut tokens = 0;
    for (n, (question, limit)) in QUESTIONS.into_iter().zip(LIMITS).enumerate() {
        let sent = client.ok(CHAT, ask(question, limit)).await;
        let reply = sent.json();
        let (state, usage) = (&reply["state"], &reply["usage"]);
        let count = |value: &Value| value.as_u64().expect("a count");
        assert_eq!((sent.header("x-state-id"), state), (state["id"].as_str(), &reply["choices"][0]["state"]));
        assert_eq!((&state["parent"], &state["turn"]), (&parent, &json!(n + 1)));
        assert_eq!((&state["session_id"], &state["expires_at"]), (&json!("told"), &Value::Null));

        let (turns, sequences) = log(&client, "told").await;
        assert_eq!(count(&state["tokens"]) as usize, sequences[n].len());
        let new = count(&usage["prompt_tokens"]) - tokens;
        assert_eq!(
            count(&turns[n]["token_count"]),
            count(&state["tokens"]) - tokens,
            "no turn here takes anything back"
        );
        assert!(new > 0 && new < 30, "only the question is new, not {new} tokens");
        let cached = count(&usage["prompt_tokens_details"]["cached_tokens"]);
        // What was sampled last, or held back, is read with the next turn. Another test may have asked the first question.
        assert!(n == 0 || (cached <= tokens && cached + 8 >= tokens), "{cached} of {tokens}");
        assert_eq!(count(&usage["total_tokens"]), count(&usage["prompt_tokens"]) + count(&usage["completion_tokens"]));
        if reply["choices"][0]["finish_reason"] == "length" {
            assert_eq!(count(&usage["completion_tokens"]), limit);
        }

        let turn = &turns[n];
        assert_eq!((&turn["id"], &turn["parent"], &turn["turn"]), (&state["id"], &parent, &state["turn"]));
        assert_eq!(
            (&turn["usage"], &turn["response_id"], &turn["object"]),
            (usage, &reply["id"], &json!("session.turn"))
        );
        let said = json!([
            {"role": "user", "content": question},
            {"role": "assistant", "content": reply["choices"][0]["message"]["content"]},
        ]);
        assert_eq!(turn["messages"], said);

        let info = client.get(&format!("/v1/states/{}", sent.state_id())).await.json();
        for field in ["id", "parent", "session_id", "turn", "tokens", "bytes", "expires_at"] {
            assert_eq!(info[field], state[field], "{field}");
        }
        let session = client.get("/v1/sessions/told").await.json();
        assert_eq!((&session["head"], &session["turn"]), (&state["id"], &state["turn"]));
        assert_eq!((&session["tokens"], &session["bytes"]), (&state["tokens"], &state["bytes"]));
        (parent, tokens) = (state["id"].clone(), count(&state["tokens"]));
    }

    // In a stream it stands beside the finish reason and nowhere else.
    let chunks = client.stream(CHAT, ask("And then?", 5)).await.all().await;
    let end = last(&chunks);
    assert_eq!((&end["state"]["parent"], &end["state"]["turn"]), (&parent, &json!(5)));
    assert_eq!(end["state"], end["choices"][0]["state"]);
    let silent = |chunk: &&Value| chunk.get("state").is_none() && chunk["choices"][0].get("state").is_none();
    assert_eq!(chunks.iter().filter(silent).count(), chunks.len() - 1);

    // Without a session the chain of states counts; a time to live becomes a time.
    let body = json!({"prompt": "A", "max_tokens": 1, "store_state": true, "state_ttl_s": 1000});
    let first = client.ok(COMPLETIONS, body).await.json();
    assert_eq!((&first["state"]["turn"], &first["state"]["parent"]), (&json!(1), &Value::Null));
    let lives = first["state"]["expires_at"].as_u64().expect("a time") - first["created"].as_u64().expect("a time");
    assert_eq!(lives, 1000);
    let second = client.ok(COMPLETIONS, json!({"state_id": first["state"]["id"], "max_tokens": 1})).await.json();
    assert_eq!((&second["state"]["turn"], &second["state"]["parent"]), (&json!(2), &first["state"]["id"]));
    assert_eq!(second["state"]["session_id"], Value::Null);
    let third = json!({"state_id": second["state"]["id"], "max_tokens": 1, "store_state": false});
    assert!(client.ok(COMPLETIONS, third).await.json().get("state").is_none());
}

#[tokio::test]
async fn each_of_several_answers_has_its_state() {
    let client = client();
    let rules = json!({"temperature": 1, "seed": 9, "max_tokens": 6});
    let many = with(rules.clone(), json!({"prompt": ["The cat", "A dog"], "n": 2, "store_state": true}));
    let sent = client.ok(COMPLETIONS, many).await;
    let reply = sent.json();
    assert!(reply.get("state").is_none() && sent.header("x-state-id").is_none());
    for (choice, answer) in reply["choices"].as_array().expect("choices").iter().enumerate() {
        // The state of one answer does not know the others: it goes on as that answer does when it is asked alone.
        let prompt = ["The cat", "A dog"][choice / 2];
        let alone = with(rules.clone(), json!({"prompt": prompt, "n": choice % 2 + 1, "max_tokens": 16}));
        let alone = client.ok(COMPLETIONS, alone).await.json()["choices"][choice % 2]["text"].clone();
        assert!(alone.as_str().is_some_and(|text| text.starts_with(answer["text"].as_str().expect("text"))));
        // Other random numbers belong to other choices: greedily there are none.
        let rest = json!({"state_id": answer["state"]["id"], "temperature": 0, "max_tokens": 8});
        let prompt = format!("{prompt}{}", answer["text"].as_str().expect("text"));
        let whole = client.ok(COMPLETIONS, json!({"prompt": prompt, "temperature": 0, "max_tokens": 8})).await;
        assert_eq!(client.ok(COMPLETIONS, rest).await.answer(), whole.answer(), "choice {choice}");
    }
}

#[tokio::test]
async fn a_fork_disturbs_nobody() {
    let (client, tokenizer) = (client(), tokenizer());
    let begin = json!({"prompt": "Once upon a time", "session_id": "forked", "temperature": 0, "max_tokens": 12});
    let base = client.ok(COMPLETIONS, begin).await;
    let (_, sequences) = log(&client, "forked").await;
    let branch = |new: &str| json!({"prompt": new, "state_id": base.state_id(), "temperature": 0.8, "seed": 6, "max_tokens": 20});
    let news = [" But the wolf", "\nThe end of"];
    let (left, right) = tokio::join!(client.ok(COMPLETIONS, branch(news[0])), client.ok(COMPLETIONS, branch(news[1])));
    assert_ne!(left.answer(), right.answer());
    for (fork, new) in [&left, &right].into_iter().zip(news) {
        assert_eq!(
            (&fork.json()["state"]["parent"], &fork.json()["state"]["turn"]),
            (&json!(base.state_id()), &json!(2))
        );
        let again = client.ok(COMPLETIONS, branch(new)).await;
        assert_eq!(again.answer(), fork.answer());
        assert_ne!(again.state_id(), fork.state_id());
        let whole = [sequences[0].clone(), tokenizer.encode_special(new)].concat();
        let whole = json!({"prompt": whole, "temperature": 0.8, "seed": 6, "max_tokens": 20});
        assert_eq!(client.ok(COMPLETIONS, whole).await.answer(), fork.answer());
    }
    let session = client.get("/v1/sessions/forked").await.json();
    assert_eq!((&session["head"], &session["turn"]), (&json!(base.state_id()), &json!(1)));
    // States live and die alone.
    assert_eq!(client.delete(&format!("/v1/states/{}", left.state_id())).await.json()["object"], "state.deleted");
    assert_eq!(client.get(&format!("/v1/states/{}", left.state_id())).await.code(), "state_not_found");
    let on = json!({"prompt": "", "state_id": right.state_id(), "max_tokens": 1});
    client.ok(COMPLETIONS, on).await;
}

#[tokio::test]
async fn one_turn_at_a_time() {
    let client = client();
    let turn = |new: &str| json!({"prompt": new, "session_id": "busy", "temperature": 0, "max_tokens": 3});
    let first = client.ok(COMPLETIONS, turn("A cat")).await;
    let mut slow = client.stream(COMPLETIONS, with(endless(), json!({"session_id": "busy"}))).await;
    slow.begun().await;
    for (path, body) in [(COMPLETIONS, turn(" sat")), (CHAT, json!({"messages": user("Hi"), "session_id": "busy"}))] {
        let refused = client.post(path, body).await;
        assert_eq!((refused.status, refused.code().as_str()), (409, "session_busy"));
        assert_eq!(refused.header("x-should-retry"), Some("false"));
    }
    let deleted = client.delete("/v1/sessions/busy").await;
    assert_eq!((deleted.status, deleted.code().as_str()), (409, "session_busy"));
    // Others are not in the way, nor is its state, nor its history.
    client.ok(COMPLETIONS, json!({"prompt": "", "state_id": first.state_id(), "max_tokens": 1})).await;
    client.ok(COMPLETIONS, json!({"prompt": "A", "session_id": "not-busy", "max_tokens": 1})).await;
    assert_eq!(client.get("/v1/sessions/busy").await.json()["head"], first.state_id());
    drop(slow);
    let next = client.post_while(409, COMPLETIONS, turn(" sat")).await;
    assert_eq!(next.status, 200, "{}", next.text);
    assert_eq!(next.json()["state"]["parent"], first.state_id(), "a turn that was dropped never was");
    assert_eq!(next.json()["state"]["turn"], 2);
}

#[tokio::test]
async fn a_turn_may_be_conditional_on_the_head() {
    let client = client();
    let turn = json!({"prompt": "A cat", "session_id": "conditional", "max_tokens": 1});
    let tag = |state: &str| format!("\"{state}\"");
    let early =
        client.post_with(COMPLETIONS, &[("if-match", &tag(&format!("st_{}", "0".repeat(44))))], turn.clone()).await;
    assert_eq!((early.status, early.code().as_str()), (412, "session_conflict"), "there is no head yet");
    let first = client.ok(COMPLETIONS, turn.clone()).await.state_id();
    let second = client.post_with(COMPLETIONS, &[("if-match", &tag(&first))], turn.clone()).await;
    assert_eq!((second.status, &second.json()["state"]["parent"]), (200, &json!(first)));
    let moved = client.post_with(COMPLETIONS, &[("if-match", &tag(&first))], turn.clone()).await;
    assert_eq!((moved.status, moved.code().as_str()), (412, "session_conflict"));
    assert!(
        moved.error()["message"].as_str().is_some_and(|m| m.contains(&second.state_id())),
        "it says where the head is"
    );
    assert_eq!(client.get("/v1/sessions/conditional").await.json()["head"], second.state_id());
    let nowhere = client.post_with(COMPLETIONS, &[("if-match", &tag(&first))], json!({"prompt": "A"})).await;
    assert_eq!((nowhere.status, nowhere.error()["param"].as_str()), (400, Some("if-match")));
}

#[tokio::test]
async fn a_repeated_turn_is_not_run_again() {
    let client = client();
    for (path, new) in [(COMPLETIONS, json!({"prompt": " A cat"})), (CHAT, json!({"messages": user("A cat?")}))] {
        let session = format!("once:{}", path.len());
        let turn = with(new, json!({"session_id": session, "max_tokens": 9, "temperature": 1}));
        client.ok(path, turn.clone()).await;
        let head = client.get(&format!("/v1/sessions/{session}")).await.json()["head"].clone();
        let tag = format!("\"{}\"", head.as_str().expect("a state"));
        let headers = [("idempotency-key", "k1"), ("if-match", &tag)];
        let first = client.post_with(path, &headers, turn.clone()).await;
        assert_eq!(first.status, 200, "{}", first.text);
        // The seed was random: only the very turn can say the same again. Its condition held when it was run.
        let again = client.post_with(path, &headers, turn.clone()).await;
        assert_eq!(again.json(), first.json());
        assert_eq!(again.header("x-state-id"), first.header("x-state-id"));
        let mut request = crate::server::post(path, with(turn.clone(), json!({"stream": true})).to_string());
        request.headers_mut().insert("idempotency-key", "k1".parse().expect("a header"));
        let streamed = client.call(request).await.text;
        assert!(streamed.contains(&first.state_id()) && streamed.ends_with("data: [DONE]\n\n"), "{streamed}");
        assert_eq!(client.get(&format!("/v1/sessions/{session}")).await.json()["turn"], 2);
        let other = client.post_with(path, &[("idempotency-key", "k2")], turn.clone()).await;
        assert_eq!(
            (&other.json()["state"]["turn"], &other.json()["state"]["parent"]),
            (&json!(3), &json!(first.state_id()))
        );
        // Also when other turns came since; but the key is the request's.
        assert_eq!(client.post_with(path, &headers, turn.clone()).await.json(), first.json());
        for (path, new) in [(COMPLETIONS, json!({"prompt": "Other"})), (CHAT, json!({"messages": user("Other")}))] {
            let turn = with(new, json!({"session_id": session, "max_tokens": 9}));
            let refused = client.post_with(path, &[("idempotency-key", "k1")], turn).await;
            assert_eq!((refused.status, refused.error()["param"].as_str()), (400, Some("idempotency-key")));
        }
    }
}

#[tokio::test]
async fn a_deleted_session_begins_anew() {
    let client = client();
    let turn = json!({"prompt": "A cat", "session_id": "mortal", "temperature": 0, "max_tokens": 4});
    let first = client.ok(COMPLETIONS, turn.clone()).await;
    let second = client.ok(COMPLETIONS, turn.clone()).await;
    let kept = json!({"prompt": " and", "state_id": first.state_id(), "max_tokens": 1});
    let kept = client.ok(COMPLETIONS, kept).await.state_id();
    assert_eq!(client.delete("/v1/sessions/mortal").await.json()["object"], "session.deleted");
    for path in ["/v1/sessions/mortal", "/v1/sessions/mortal/turns"] {
        assert_eq!(client.get(path).await.code(), "session_not_found");
    }
    assert_eq!(client.delete("/v1/sessions/mortal").await.code(), "session_not_found");
    for gone in [&first, &second] {
        assert_eq!(client.get(&format!("/v1/states/{}", gone.state_id())).await.code(), "state_not_found");
    }
    assert_eq!(client.get(&format!("/v1/states/{kept}")).await.status, 200, "a state outside the session stays");
    let anew = client.ok(COMPLETIONS, turn).await;
    assert_eq!(anew.answer(), first.answer());
    assert_eq!((&anew.json()["state"]["turn"], &anew.json()["state"]["parent"]), (&json!(1), &Value::Null));
    assert_eq!(log(&client, "mortal").await.0.len(), 1);
}

#[tokio::test]
async fn lists_come_in_pages() {
    let server = Server::new();
    let client = server.client();
    for n in 0..5 {
        let turn = json!({"prompt": "A", "session_id": format!("s{}", n % 3), "max_tokens": 1});
        client.ok(COMPLETIONS, turn).await;
    }
    let collect = |path: &'static str| {
        let client = client.clone();
        async move {
            let (mut all, mut after) = (Vec::new(), String::new());
            loop {
                let page = client.get(&format!("{path}limit=2{after}")).await.json();
                let data = page["data"].as_array().expect("a page").clone();
                assert!(!data.is_empty() && data.len() <= 2);
                assert_eq!((&page["first_id"], &page["last_id"]), (&data[0]["id"], &data[data.len() - 1]["id"]));
                after = format!("&after={}", page["last_id"].as_str().expect("an id"));
                all.extend(data.iter().map(|item| item["id"].as_str().expect("an id").to_owned()));
                if page["has_more"] == false {
                    return all;
                }
            }
        }
    };
    let states = collect("/v1/states?").await;
    assert_eq!(states.len(), 5);
    assert!(states.is_sorted());
    assert_eq!(collect("/v1/sessions?").await, ["s0", "s1", "s2"]);
    assert_eq!(collect("/v1/states?session_id=s1&").await.len(), 2);
    let turns = collect("/v1/sessions/s1/turns?").await;
    assert_eq!(turns, collect("/v1/states?session_id=s1&").await);
    assert_eq!(client.get("/v1/states?session_id=never").await.json()["data"], json!([]));
}
