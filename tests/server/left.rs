//! A conversation that was read anew: its id means what it is now, and what it has left is gone.

use std::sync::Arc;

use rewake::state::InMemory;
use serde_json::{Value, json};

use crate::responses::{RESPONSES, ask, id, plain, said, text};
use crate::server::{CHAT, COMPLETIONS, Client, Server, config};
use crate::store::Failing;
use crate::{user, with};

const CONVERSATIONS: &str = "/v1/conversations";

async fn begin(client: &Client, items: Value) -> String {
    id(&client.ok(CONVERSATIONS, json!({ "items": items })).await.json())
}

async fn turn(client: &Client, conversation: &str, input: &str, more: Value) -> Value {
    client.ok(RESPONSES, with(with(ask(input), json!({ "conversation": conversation })), more)).await.json()
}

fn state(response: &Value) -> String {
    response["state"]["id"].as_str().unwrap_or_else(|| panic!("no state: {response}")).to_owned()
}

/// How many tokens of a chat that begins so are known already.
async fn known(client: &Client, messages: Value) -> Value {
    let reply = client.ok(CHAT, json!({"messages": messages, "max_tokens": 1})).await.json();
    reply["usage"]["prompt_tokens_details"]["cached_tokens"].clone()
}

/// Nothing is to be had of a state.
async fn is_gone(client: &Client, state: &str) {
    for reply in [
        client.get(&format!("/v1/states/{state}")).await,
        client.get(&format!("/v1/states/{state}/content")).await,
        client.delete(&format!("/v1/states/{state}")).await,
        client.post(COMPLETIONS, json!({"prompt": "x", "state_id": state, "max_tokens": 1})).await,
    ] {
        assert_eq!((reply.status, reply.code().as_str()), (404, "state_not_found"));
    }
}

const SECRET: &str = "Zebras sing at noon, said the old green captain.";

#[tokio::test]
async fn what_has_read_a_deleted_item_goes_with_it() {
    let client = Server::new().client();
    let conversation = begin(&client, json!([])).await;
    let first = turn(&client, &conversation, SECRET, json!({})).await;
    let second = turn(&client, &conversation, "And then?", json!({})).await;
    let secret = said(&client, &conversation).await[0].0.clone();
    let gone = client.delete(&format!("{CONVERSATIONS}/{conversation}/items/{secret}")).await;
    assert_eq!(gone.status, 200, "{}", gone.text);

    is_gone(&client, &state(&first)).await;
    is_gone(&client, &state(&second)).await;
    assert_eq!(client.get("/v1/sessions").await.json()["data"], json!([]));
    assert_eq!(client.get(&format!("/v1/states?session_id={conversation}")).await.json()["data"], json!([]));
    let shown = client.get(&format!("/v1/sessions/{conversation}/turns")).await;
    assert_eq!((shown.status, shown.code().as_str()), (404, "session_not_found"), "it has no turn yet");
    // Nor of what was kept of it to save reading it again, which there is where nothing was deleted.
    let told = json!([
        {"role": "user", "content": SECRET}, {"role": "assistant", "content": text(&first)}, {"role": "user", "content": "And?"},
    ]);
    let other = Server::new().client();
    turn(&other, &begin(&other, json!([])).await, SECRET, json!({})).await;
    assert_ne!(known(&other, told.clone()).await, json!(0));
    assert_eq!(known(&client, told).await, json!(0));

    // It goes on without it.
    let third = turn(&client, &conversation, "Well?", json!({})).await;
    let turns = client.get(&format!("/v1/sessions/{conversation}/turns")).await;
    assert_eq!((turns.status, turns.json()["data"].as_array().map(Vec::len)), (200, Some(1)));
    assert!(!turns.text.contains("Zebras") && turns.text.contains("Well?"), "{}", turns.text);
    let session = client.get(&format!("/v1/sessions/{conversation}")).await.json();
    assert_eq!((&session["head"], &session["turn"]), (&third["state"]["id"], &json!(1)));
}

#[tokio::test]
async fn other_instructions_leave_nothing_behind_either() {
    let client = Server::new().client();
    let conversation = begin(&client, json!([])).await;
    let first = turn(&client, &conversation, "A dog?", json!({"instructions": "Be kind."})).await;
    let second = turn(&client, &conversation, "A cat?", json!({"instructions": "Be rude."})).await;
    is_gone(&client, &state(&first)).await;
    let sessions = client.get("/v1/sessions").await.json();
    assert_eq!(sessions["data"].as_array().map(Vec::len), Some(1), "{sessions}");
    assert_eq!(sessions["data"][0]["head"], second["state"]["id"]);
    // A response that was made before still goes on: its words are in the conversation.
    let apart = with(ask("And?"), json!({"previous_response_id": id(&first)}));
    let apart = client.ok(RESPONSES, apart).await.json();
    let whole = json!({"messages": [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "A dog?"},
        {"role": "assistant", "content": text(&first)}, {"role": "user", "content": "And?"},
    ], "temperature": 0, "max_tokens": 12, "store_state": true});
    let whole = client.ok(CHAT, whole).await;
    assert_eq!(
        (text(&apart), &apart["usage"]["input_tokens"]),
        (whole.answer(), &whole.json()["usage"]["prompt_tokens"])
    );
    assert_eq!(client.delete(&format!("{CONVERSATIONS}/{conversation}")).await.status, 200);
    is_gone(&client, &state(&second)).await;
    assert_eq!(client.get("/v1/sessions").await.json()["data"], json!([]));
    let late = json!({"messages": user("x"), "session_id": conversation});
    assert_eq!(client.post(CHAT, late).await.code(), "session_not_found");
    assert_eq!(client.get("/v1/sessions").await.json()["data"], json!([]), "no session takes its name");
}

#[tokio::test]
async fn a_conversation_s_id_is_the_name_of_its_session() {
    let client = Server::new().client();
    let conversation = begin(&client, json!([{"role": "user", "content": "Hello."}])).await;
    let path = format!("/v1/sessions/{conversation}");
    let chat = |content: &str| json!({"messages": user(content), "session_id": conversation, "temperature": 0, "max_tokens": 12});
    let transcript = async |said: &[(String, String, String)], new: &str| {
        let mut messages: Vec<Value> =
            said.iter().map(|(_, role, text)| json!({"role": role, "content": text})).collect();
        messages.extend([json!({"role": "user", "content": new})]);
        let body = json!({"messages": messages, "temperature": 0, "max_tokens": 12, "store_state": true});
        client.ok(CHAT, body).await
    };
    // A chat reads what waits there first, as it is now, however often it was read anew.
    for round in 0..3 {
        let before = said(&client, &conversation).await;
        let reply = client.ok(CHAT, chat("A dog?")).await;
        let whole = transcript(&before, "A dog?").await;
        assert_eq!(reply.answer(), whole.answer(), "round {round}");
        assert_eq!(reply.json()["usage"]["prompt_tokens"], whole.json()["usage"]["prompt_tokens"]);
        let answer = reply.answer();
        let now = said(&client, &conversation).await;
        assert_eq!(plain(&now[before.len()..]), [("user", "A dog?"), ("assistant", &*answer)]);
        assert_eq!(client.get(&path).await.json()["head"], reply.state_id());
        let item = &now[before.len()].0;
        client.delete(&format!("{CONVERSATIONS}/{conversation}/items/{item}")).await;
        assert_eq!(said(&client, &conversation).await.len(), before.len() + 1);
        is_gone(&client, &reply.state_id()).await;
    }
    // A prompt cannot read what waits; where nothing does, it goes on.
    let prompt = json!({"prompt": " The", "session_id": conversation, "max_tokens": 4});
    let refused = client.post(COMPLETIONS, prompt.clone()).await;
    assert_eq!((refused.status, refused.error()["param"].as_str()), (400, Some("session_id")));
    let nothing = json!({"messages": [], "session_id": conversation});
    assert_eq!(client.post(CHAT, nothing).await.error()["param"], "messages", "its last words are an answer");
    client.ok(CHAT, chat("A cat?")).await;
    let answer = client.ok(COMPLETIONS, prompt).await.answer();
    let last = said(&client, &conversation).await.pop().expect("an item");
    assert_eq!((&*last.1, last.2), ("assistant", format!(" The{answer}")), "nothing that was read is left out");

    // Back to its first turn, forked, and on from there.
    let all = client.get(&format!("{path}/turns")).await.json();
    let [first, second] = [0, 1].map(|n| all["data"][n]["id"].as_str().expect("a state").to_owned());
    let wrong = [("if-match", format!("\"{first}\""))];
    let wrong = wrong.each_ref().map(|(name, value)| (*name, value.as_str()));
    assert_eq!(client.post_with(&format!("{path}/rewind"), &wrong, json!({"at": 1})).await.status, 412);
    let right = format!("\"{second}\"");
    let back = client.post_with(&format!("{path}/rewind"), &[("if-match", &*right)], json!({"at": 1})).await;
    assert_eq!((back.status, &back.json()["head"]), (200, &json!(first)), "{}", back.text);
    assert_eq!(client.ok(&format!("{path}/fork"), json!({"to": "forked"})).await.json()["head"], first);
    let before = said(&client, &conversation).await;
    let (mine, forked) = (chat("Well?"), with(chat("Well?"), json!({"session_id": "forked"})));
    assert_eq!(client.ok(CHAT, mine).await.answer(), client.ok(CHAT, forked).await.answer());
    assert_eq!(said(&client, &conversation).await.len(), before.len() + 2);

    // What would be without effect, or take the conversation's place, is refused.
    let deleted = client.delete(&path).await;
    assert_eq!((deleted.status, deleted.error()["param"].as_str()), (400, Some("session_id")));
    for to in [conversation.clone(), format!("{conversation}.9")] {
        let refused = client.post("/v1/sessions/forked/fork", json!({ "to": to })).await;
        assert_eq!((refused.status, refused.error()["param"].as_str()), (400, Some("to")));
    }
    for other in ["1", "9", "x"].map(|number| format!("{conversation}.{number}")) {
        let path = format!("/v1/sessions/{other}");
        for reply in [
            client.get(&path).await,
            client.get(&format!("{path}/turns")).await,
            client.delete(&path).await,
            client.post(&format!("{path}/rewind"), json!({"at": 1})).await,
            client.post(&format!("{path}/fork"), json!({"to": "x"})).await,
            client.post(CHAT, with(chat("x"), json!({ "session_id": other }))).await,
            client.post(COMPLETIONS, json!({"prompt": "x", "session_id": other})).await,
        ] {
            assert!(
                reply.status == 404 && reply.code() == "session_not_found" || reply.status == 400,
                "{}",
                reply.text
            );
        }
    }
    // A deleted conversation takes along all but the fork.
    assert_eq!(client.delete(&format!("{CONVERSATIONS}/{conversation}")).await.status, 200);
    let left = client.get("/v1/sessions").await.json();
    assert_eq!((left["data"].as_array().map(Vec::len), &left["data"][0]["id"]), (Some(1), &json!("forked")));
    client.ok(CHAT, with(chat("On."), json!({"session_id": "forked"}))).await;
}

#[tokio::test]
async fn what_could_not_be_removed_is_swept() {
    let store = Arc::new(Failing::new(InMemory::default()));
    store.fail(false);
    let server = Server::with(&config(), store.clone());
    let client = server.client();
    let conversation = begin(&client, json!([])).await;
    let first = turn(&client, &conversation, SECRET, json!({})).await;
    let secret = said(&client, &conversation).await[0].0.clone();
    store.only("/sessions/");
    store.fail(true);
    let failed = client.delete(&format!("{CONVERSATIONS}/{conversation}/items/{secret}")).await;
    assert_eq!((failed.status, failed.code().as_str()), (500, "store_failed"));
    store.fail(false);
    assert_eq!(client.get(&format!("/v1/sessions/{conversation}")).await.status, 404, "it is left all the same");
    server.sessions.sweep().await.expect("the store works");
    is_gone(&client, &state(&first)).await;
    // What the conversation has now is none of the sweep's.
    let second = turn(&client, &conversation, "Well?", json!({})).await;
    server.sessions.sweep().await.expect("the store works");
    assert_eq!(client.get(&format!("/v1/states/{}", state(&second))).await.status, 200);
}

/// Turns at once, and items that go meanwhile: each either happens or is refused, and no word is read twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn turns_at_once_read_nothing_twice() {
    let client = Server::new().client();
    let conversation = begin(&client, json!([{"role": "user", "content": "Hello."}])).await;
    let mut done = 0;
    for round in 0..6 {
        let turns = (0..4).map(|n| {
            let (client, conversation) = (client.clone(), conversation.clone());
            tokio::spawn(async move {
                let input = format!("Dog {round} {n}?");
                let more = json!({"conversation": conversation, "instructions": format!("Be {}.", n % 2), "max_output_tokens": 2});
                client.post(RESPONSES, with(ask(&input), more)).await
            })
        });
        for reply in futures::future::join_all(turns).await {
            let reply = reply.expect("no panic");
            match reply.status {
                200 => done += 1,
                _ => assert_eq!((reply.status, &reply.code()[..7]), (409, "session"), "{}", reply.text),
            }
        }
    }
    let all = said(&client, &conversation).await;
    assert_eq!(all.len(), 1 + 2 * done, "{all:?}");
    assert_eq!(all.iter().filter(|(_, _, text)| text == "Hello.").count(), 1);
    let mut ids: Vec<_> = all.iter().map(|(id, ..)| id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), all.len(), "no two items have one id");
}
