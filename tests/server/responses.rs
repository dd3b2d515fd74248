//! OpenAI's Responses and Conversations.

use std::sync::Arc;

use rewake::api::{App, router};
use rewake::app::load_models;
use rewake::config::Config;
use rewake::session::{Sessions, StreamLimits};
use rewake::state::{Archive, InMemory};
use serde_json::{Value, json};

use crate::server::{CHAT, Client, Process, Server, config};
use crate::{key, with};

// Answers that must not end by themselves ban the end of the document and the line break, of which two end an answer.

pub const RESPONSES: &str = "/v1/responses";

pub fn ask(input: &str) -> Value {
    json!({"input": input, "temperature": 0, "max_output_tokens": 12})
}

/// The text of a response.
pub fn text(response: &Value) -> String {
    response["output"][0]["content"][0]["text"].as_str().unwrap_or_else(|| panic!("no text: {response}")).to_owned()
}

pub fn id(response: &Value) -> String {
    response["id"].as_str().unwrap_or_else(|| panic!("no id: {response}")).to_owned()
}

/// All events of a stream, checked for what every stream has.
async fn events(client: &Client, body: Value) -> Vec<Value> {
    let mut stream = client.stream(RESPONSES, body).await;
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        assert_eq!(event["sequence_number"], events.len());
        let last = stream.last_id.clone().expect("every event has an id");
        assert!(last.starts_with("resp_") && last.ends_with(&format!(":{}", events.len())), "{last}");
        events.push(event);
    }
    events
}

#[tokio::test]
async fn a_response_has_the_shape_of_openai_s() {
    let client = Server::shared().client();
    let body =
        with(ask("Tell me a story."), json!({"metadata": {"a": "b"}, "user": "me", "instructions": "Be brief."}));
    let response = client.ok(RESPONSES, body.clone()).await.json();
    assert!(id(&response).starts_with("resp_"));
    for (field, value) in [
        ("object", json!("response")),
        ("status", json!("incomplete")),
        ("incomplete_details", json!({"reason": "max_output_tokens"})),
        ("error", json!(null)),
        ("model", json!("stories")),
        ("instructions", json!("Be brief.")),
        ("metadata", json!({"a": "b"})),
        ("tools", json!([])),
        ("user", json!("me")),
        ("temperature", json!(0.0)),
        ("store", json!(true)),
        ("previous_response_id", json!(null)),
        ("conversation", json!(null)),
    ] {
        assert_eq!(response[field], value, "{field}");
    }
    let item = &response["output"][0];
    assert_eq!(
        (&item["type"], &item["role"], &item["status"]),
        (&json!("message"), &json!("assistant"), &json!("incomplete"))
    );
    assert_eq!(item["content"][0]["type"], "output_text");
    let usage = &response["usage"];
    assert_eq!(usage["output_tokens"], 12);
    let sum = usage["input_tokens"].as_u64().expect("a number") + 12;
    assert_eq!(usage["total_tokens"], sum);
    // It is the chat of the same messages.
    let chat = json!({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me a story."}],
        "temperature": 0, "max_tokens": 12, "store_state": true});
    assert_eq!(text(&response), client.ok(CHAT, chat).await.answer());
    let shown = client.get(&format!("{RESPONSES}/{}", id(&response))).await.json();
    assert_eq!(shown, response);
}

#[tokio::test]
async fn a_stream_tells_the_same_in_named_events() {
    let client = Server::shared().client();
    let whole = client.ok(RESPONSES, ask("A cat?")).await.json();
    let events = events(&client, ask("A cat?")).await;
    let names: Vec<&str> = events.iter().map(|event| event["type"].as_str().expect("a name")).collect();
    let opening =
        ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"];
    assert_eq!(names[..4], opening);
    let closing =
        ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"];
    assert_eq!(names[names.len() - 4..], closing);
    let deltas = &events[4..events.len() - 4];
    assert!(deltas.iter().all(|event| event["type"] == "response.output_text.delta"));
    let said: String = deltas.iter().map(|event| event["delta"].as_str().expect("text")).collect();
    assert_eq!(said, text(&whole));
    let last = &events.last().expect("an event")["response"];
    assert_eq!(
        (text(last), &last["usage"]["total_tokens"], &last["status"]),
        (text(&whole), &whole["usage"]["total_tokens"], &whole["status"])
    );
    assert_eq!(
        (&events[0]["response"]["status"], &events[0]["response"]["usage"]),
        (&json!("in_progress"), &json!(null))
    );
    // From anywhere, as often as is asked.
    for after in [0, 3, 5, events.len() - 1] {
        let path = format!("{RESPONSES}/{}?stream=true&starting_after={after}", id(last));
        let reply = client.get(&path).await.text;
        let rest: Vec<Value> = reply
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .map(|data| serde_json::from_str(data).expect("JSON"))
            .collect();
        assert_eq!(rest, events[after + 1..], "after {after}");
        let named = reply.lines().filter_map(|line| line.strip_prefix("event: ")).collect::<Vec<_>>();
        assert_eq!(named, &names[after + 1..]);
    }
}

#[tokio::test]
async fn a_response_goes_on_from_another_s_state() {
    let client = Server::shared().client();
    let first = client.ok(RESPONSES, with(ask("Hello."), json!({"instructions": "Be kind."}))).await.json();
    let on = |input: &str, instructions: Value| {
        with(ask(input), json!({"previous_response_id": id(&first), "instructions": instructions}))
    };
    let total = first["usage"]["total_tokens"].as_u64().expect("a number");
    // Several go on from one, with the same instructions or none.
    for instructions in [json!(null), json!("Be kind.")] {
        let second = client.ok(RESPONSES, on("And then?", instructions)).await.json();
        let cached = second["usage"]["input_tokens_details"]["cached_tokens"].as_u64().expect("a number");
        assert!(cached + 8 >= total && cached <= total + 8, "{cached} of {total} were not read again");
        let chat = json!({"messages": [
            {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": text(&first)}, {"role": "user", "content": "And then?"},
        ], "temperature": 0, "max_tokens": 12, "store_state": true});
        let chat = client.ok(CHAT, chat).await;
        assert_eq!(text(&second), chat.answer(), "a turn equals the whole transcript");
        assert_eq!(second["usage"]["input_tokens"], chat.json()["usage"]["prompt_tokens"]);
        assert_eq!(second["instructions"].is_null(), second["instructions"] != "Be kind.");
    }
    // With others the messages are read anew.
    let anew = client.ok(RESPONSES, on("And then?", json!("Be rude."))).await.json();
    let chat = json!({"messages": [
        {"role": "system", "content": "Be rude."}, {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": text(&first)}, {"role": "user", "content": "And then?"},
    ], "temperature": 0, "max_tokens": 12, "store_state": true});
    assert_eq!(text(&anew), client.ok(CHAT, chat).await.answer());
    // A response that was cut just goes on when nothing new is said.
    let more = with(ask(""), json!({"previous_response_id": id(&first), "input": []}));
    let more = client.ok(RESPONSES, more).await.json();
    let whole =
        client.ok(RESPONSES, with(ask("Hello."), json!({"instructions": "Be kind.", "max_output_tokens": 24}))).await;
    assert_eq!(format!("{}{}", text(&first), text(&more)), text(&whole.json()));
    // When the state is gone, the messages are still there.
    let state = first["state"]["id"].as_str().expect("a state").to_owned();
    let before = client.ok(RESPONSES, on("And then?", json!(null))).await.json();
    client.delete(&format!("/v1/states/{state}")).await;
    let after = client.ok(RESPONSES, on("And then?", json!(null))).await.json();
    assert_eq!(text(&after), text(&before));
}

#[tokio::test]
async fn what_was_not_stored_is_not_found() {
    let client = Server::shared().client();
    let response = client.ok(RESPONSES, with(ask("Hello."), json!({"store": false}))).await.json();
    let id = id(&response);
    assert!(response.get("state").is_none());
    assert_eq!(client.get(&format!("{RESPONSES}/{id}")).await.code(), "response_not_found");
    let on = client.post(RESPONSES, with(ask("More."), json!({"previous_response_id": id}))).await;
    assert_eq!((on.status, on.code().as_str()), (404, "response_not_found"));
    for path in [format!("{RESPONSES}/{id}"), format!("{RESPONSES}/resp_1/cancel"), format!("{RESPONSES}/x")] {
        let reply =
            if path.ends_with("cancel") { client.post(&path, json!({})).await } else { client.delete(&path).await };
        assert_eq!((reply.status, reply.code().as_str()), (404, "response_not_found"), "{path}");
    }
    assert_eq!(client.get(&format!("{RESPONSES}/{id}/input_items")).await.status, 404);
}

#[tokio::test]
async fn a_deleted_response_is_gone_with_its_state() {
    let client = Server::shared().client();
    let first = client.ok(RESPONSES, ask("Hello.")).await.json();
    let second = client.ok(RESPONSES, with(ask("More."), json!({"previous_response_id": id(&first)}))).await.json();
    let path = format!("{RESPONSES}/{}", id(&first));
    let deleted = client.delete(&path).await.json();
    assert_eq!((&deleted["id"], &deleted["deleted"]), (&json!(id(&first)), &json!(true)));
    for reply in [client.get(&path).await, client.delete(&path).await, client.get(&format!("{path}?stream=true")).await]
    {
        assert_eq!(reply.status, 404);
    }
    let state = first["state"]["id"].as_str().expect("a state");
    assert_eq!(client.get(&format!("/v1/states/{state}")).await.status, 404);
    // What was made from it stays.
    let third = with(ask("More."), json!({"previous_response_id": id(&second)}));
    client.ok(RESPONSES, third).await;
}

/// Polls until it has ended, however busy other tests keep the model.
async fn ended(client: &Client, id: &str) -> Value {
    for _ in 0..200_000 {
        let response = client.get(&format!("{RESPONSES}/{id}")).await.json();
        if response["status"] != "in_progress" {
            return response;
        }
        tokio::task::yield_now().await;
    }
    panic!("{id} does not end");
}

#[tokio::test]
async fn a_response_in_the_background_is_polled_or_cancelled() {
    let client = Server::shared().client();
    let begun = client.ok(RESPONSES, with(ask("Hello."), json!({"background": true}))).await.json();
    assert_eq!((&begun["status"], &begun["background"]), (&json!("in_progress"), &json!(true)));
    let response = ended(&client, &id(&begun)).await;
    assert_eq!(text(&response), text(&client.ok(RESPONSES, ask("Hello.")).await.json()));

    let endless = json!({"input": "Hello.", "background": true, "max_output_tokens": 900_000, "logit_bias": {"0": -100, "199": -100}});
    let begun = client.ok(RESPONSES, with(endless, json!({"seed": 3}))).await.json();
    let path = format!("{RESPONSES}/{}", id(&begun));
    let on = client.post(RESPONSES, with(ask("More."), json!({"previous_response_id": id(&begun)}))).await;
    assert_eq!((on.status, on.error()["param"].as_str()), (400, Some("previous_response_id")));
    let mut stream = client.resume(&id(&begun), None).await.expect("it is there");
    while stream.next().await.expect("an event")["type"] != "response.output_text.delta" {}
    let cancelled = client.post(&format!("{path}/cancel"), json!({})).await.json();
    assert_eq!(cancelled["status"], "cancelled");
    assert!(!text(&cancelled).is_empty());
    assert_eq!(client.get(&path).await.json(), cancelled);
    assert_eq!(client.post(&format!("{path}/cancel"), json!({})).await.json(), cancelled, "once more is no error");
    let mut last = Value::Null;
    while let Some(event) = stream.next().await {
        last = event;
    }
    assert_eq!(last["response"]["status"], "cancelled");
    // One in the foreground is not to be cancelled so.
    let plain = client.ok(RESPONSES, ask("Hello.")).await.json();
    let refused = client.post(&format!("{RESPONSES}/{}/cancel", id(&plain)), json!({})).await;
    assert_eq!(refused.status, 400);
}

#[tokio::test]
async fn input_items_are_listed() {
    let client = Server::shared().client();
    let input = json!([{"role": "developer", "content": "Be kind."}, {"role": "user", "content": [{"type": "input_text", "text": "Hi."}]}]);
    let response = client.ok(RESPONSES, json!({"input": input, "max_output_tokens": 3})).await.json();
    let path = format!("{RESPONSES}/{}/input_items", id(&response));
    let list = client.get(&path).await.json();
    let texts = |list: &Value| -> Vec<String> {
        let items = list["data"].as_array().expect("a list").iter();
        items.map(|item| item["content"][0]["text"].as_str().expect("text").to_owned()).collect()
    };
    assert_eq!((texts(&list), &list["has_more"]), (vec!["Hi.".to_owned(), "Be kind.".into()], &json!(false)));
    let first = client.get(&format!("{path}?order=asc&limit=1")).await.json();
    assert_eq!((texts(&first), &first["has_more"]), (vec!["Be kind.".to_owned()], &json!(true)));
    let after = first["last_id"].as_str().expect("an id");
    let rest = client.get(&format!("{path}?order=asc&after={after}")).await.json();
    assert_eq!(texts(&rest), ["Hi."]);
    assert_eq!(client.get(&format!("{path}?order=up")).await.status, 400);
}

#[tokio::test]
async fn responses_survive_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let server = Process::start(folder.path(), &[]);
    let client = server.client();
    let first = client.ok(RESPONSES, ask("Hello.")).await.json();
    let conversation = client.ok("/v1/conversations", json!({})).await.json();
    let in_it = |input: &str| with(ask(input), json!({ "conversation": id(&conversation) }));
    client.ok(RESPONSES, in_it("Hello.")).await;
    let long = json!({"input": "Tell me all.", "background": true, "seed": 5, "max_output_tokens": 300, "logit_bias": {"0": -100, "199": -100}});
    let background = client.ok(RESPONSES, long.clone()).await.json();
    let mut stream = client.resume(&id(&background), None).await.expect("it is there");
    let mut seen = Vec::new();
    while seen.len() < 20 {
        seen.push(stream.next().await.expect("an event"));
    }
    let last = stream.last_id.clone();
    server.kill_9();
    let server = Process::start(folder.path(), &[]);
    let client = server.client();
    assert_eq!(client.get(&format!("{RESPONSES}/{}", id(&first))).await.json(), first);
    let undisturbed = Server::shared().client();
    let before = undisturbed.ok(RESPONSES, ask("Hello.")).await.json();
    let on = |response: &Value| with(ask("More."), json!({ "previous_response_id": id(response) }));
    let second = client.ok(RESPONSES, on(&first)).await.json();
    assert_eq!(text(&second), text(&undisturbed.ok(RESPONSES, on(&before)).await.json()));
    assert_eq!(text(&client.ok(RESPONSES, in_it("More.")).await.json()), text(&second));
    // What ran in the background goes on, for its stream too.
    let mut stream = client.resume(&id(&background), last.as_deref()).await.expect("it goes on");
    while let Some(event) = stream.next().await {
        assert_eq!(event["sequence_number"], seen.len());
        seen.push(event);
    }
    let done = ended(&client, &id(&background)).await;
    let whole = undisturbed.ok(RESPONSES, with(long, json!({"background": false}))).await.json();
    assert_eq!((text(&done), &done["status"]), (text(&whole), &whole["status"]));
    let said: String = seen.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(said, text(&whole));
}

/// One of several servers over a store.
fn sharing(store: Arc<InMemory>) -> Client {
    let config = config();
    let sessions = Sessions::new(Archive::new(store), config.turns.clone(), None);
    let sessions = Arc::new(sessions.with_streams(StreamLimits::default(), true));
    sessions.open(load_models(&config, &|_, _, _| {}).expect("the embedded model"));
    let (keys, limits, strict) = (Vec::new(), config.requests.clone(), false);
    let metrics = rewake::telemetry::metrics::install().expect("the recorder is installed once");
    Client::of(router(App { sessions, keys, limits, strict, metrics }))
}

#[tokio::test]
async fn a_response_can_be_polled_at_another_server() {
    let store = Arc::new(InMemory::default());
    let (here, there) = (sharing(store.clone()), sharing(store));
    let endless =
        json!({"input": "x", "background": true, "max_output_tokens": 900_000, "logit_bias": {"0": -100, "199": -100}});
    let id = id(&here.ok(RESPONSES, endless).await.json());
    let mut stream = here.resume(&id, None).await.expect("it is there");
    let path = format!("{RESPONSES}/{id}");
    let mut last = 0;
    for _ in 0..3 {
        for _ in 0..100 {
            let event = stream.next().await.expect("it goes on");
            assert_ne!(event["type"], "response.failed", "{event}");
        }
        let seen = there.get(&path).await.json();
        assert_eq!(seen["status"], "in_progress");
        let length = text(&seen).len();
        assert!(length > last);
        last = length;
    }
    let cancelled = there.post(&format!("{path}/cancel"), json!({})).await.json();
    assert_eq!(cancelled["status"], "cancelled");
    assert!(text(&cancelled).len() >= last);
    let mut event = Value::Null;
    while let Some(next) = stream.next().await {
        event = next;
    }
    assert_eq!(event["type"], "response.failed", "whoever listens here is told");
    assert_eq!(here.get(&path).await.json(), cancelled);
}

/// Roles and texts of a conversation's items, oldest first.
pub async fn said(client: &Client, conversation: &str) -> Vec<(String, String, String)> {
    let list = client.get(&format!("/v1/conversations/{conversation}/items?order=asc&limit=100")).await.json();
    let items = list["data"].as_array().unwrap_or_else(|| panic!("no items: {list}")).iter();
    let field = |item: &Value, name: &str| item[name].as_str().expect("text").to_owned();
    items.map(|item| (field(item, "id"), field(item, "role"), field(&item["content"][0], "text"))).collect()
}

pub fn plain(items: &[(String, String, String)]) -> Vec<(&str, &str)> {
    items.iter().map(|(_, role, text)| (role.as_str(), text.as_str())).collect()
}

#[tokio::test]
async fn a_conversation_is_a_session() {
    let client = Server::shared().client();
    let message = |role: &str, text: &str| json!({"type": "message", "role": role, "content": text});
    let body =
        json!({"metadata": {"topic": "dogs"}, "items": [message("user", "Hello."), message("assistant", "Hi.")]});
    let conversation = client.ok("/v1/conversations", body).await.json();
    let name = id(&conversation);
    let path = format!("/v1/conversations/{name}");
    assert_eq!(
        (&conversation["object"], &conversation["metadata"]),
        (&json!("conversation"), &json!({"topic": "dogs"}))
    );
    assert_eq!(client.get(&path).await.json(), conversation);
    assert_eq!(plain(&said(&client, &name).await), [("user", "Hello."), ("assistant", "Hi.")]);
    let early = said(&client, &name).await;

    let in_it = |input: &str| with(ask(input), json!({"conversation": {"id": name}, "instructions": "Be kind."}));
    let first = client.ok(RESPONSES, in_it("A dog?")).await.json();
    assert_eq!(first["conversation"], json!({ "id": name }));
    let chat = |messages: Value| json!({"messages": messages, "temperature": 0, "max_tokens": 12, "store_state": true});
    let mut transcript = vec![
        json!({"role": "system", "content": "Be kind."}),
        message("user", "Hello."),
        message("assistant", "Hi."),
        message("user", "A dog?"),
    ];
    assert_eq!(text(&first), client.ok(CHAT, chat(json!(transcript))).await.answer());
    let answer = text(&first);
    let all = said(&client, &name).await;
    assert_eq!(plain(&all), [("user", "Hello."), ("assistant", "Hi."), ("user", "A dog?"), ("assistant", &answer)]);
    assert_eq!(all[..2], early, "items keep their ids");
    assert_eq!(all[3].0, first["output"][0]["id"].as_str().expect("an id"));

    // What is added is read by the next response, and nothing twice.
    let added = client.ok(&format!("{path}/items"), json!({"items": [message("user", "Listen.")]})).await.json();
    let second = client.ok(RESPONSES, in_it("A cat?")).await.json();
    transcript.extend([message("assistant", &answer), message("user", "Listen."), message("user", "A cat?")]);
    let whole = client.ok(CHAT, chat(json!(transcript))).await;
    assert_eq!(text(&second), whole.answer());
    assert_eq!(second["usage"]["input_tokens"], whole.json()["usage"]["prompt_tokens"]);
    assert!(second["usage"]["input_tokens_details"]["cached_tokens"].as_u64().expect("a number") > 10);
    let shown = client.get(&format!("{path}/items/{}", added["data"][0]["id"].as_str().expect("an id"))).await.json();
    assert_eq!(shown, added["data"][0]);

    // What is deleted was never said.
    let gone = client.delete(&format!("{path}/items/{}", all[3].0)).await.json();
    assert_eq!(gone["id"], name);
    let kept = said(&client, &name).await;
    assert_eq!(kept.len(), 6 - 1 + 1, "{kept:?}");
    let third = client.ok(RESPONSES, in_it("And?")).await.json();
    let mut messages = vec![json!({"role": "system", "content": "Be kind."})];
    messages.extend(kept.iter().map(|(_, role, text)| message(role, text)));
    messages.push(message("user", "And?"));
    assert_eq!(text(&third), client.ok(CHAT, chat(json!(messages))).await.answer());
    assert_eq!(said(&client, &name).await[..kept.len()], kept, "the others keep their ids");

    // A response of it can be gone on from apart from it.
    let apart = client.ok(RESPONSES, with(ask("Else?"), json!({"previous_response_id": id(&third)}))).await.json();
    assert!(!text(&apart).is_empty());
    let updated = client.ok(&path, json!({"metadata": {"topic": "cats"}})).await.json();
    assert_eq!(updated["metadata"], json!({"topic": "cats"}));
    let deleted = client.delete(&path).await.json();
    assert_eq!((&deleted["deleted"], client.get(&path).await.status), (&json!(true), 404));
    assert_eq!(client.post(RESPONSES, in_it("Hm?")).await.code(), "conversation_not_found");
    assert_eq!(client.get(&format!("/v1/sessions/{name}")).await.status, 404);
}

#[tokio::test]
async fn a_turn_of_a_conversation_that_is_sent_again_is_answered_again() {
    let client = Server::shared().client();
    let begun = json!({"items": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]});
    let conversation = id(&client.ok("/v1/conversations", begun).await.json());
    let body = with(ask("A dog?"), json!({"conversation": conversation, "instructions": "Be kind."}));
    let key = [("idempotency-key", "once")];
    let first = client.post_with(RESPONSES, &key, body.clone()).await.json();
    let again = client.post_with(RESPONSES, &key, body.clone()).await.json();
    assert_eq!((id(&again), text(&again)), (id(&first), text(&first)));
    let other = client.post_with(RESPONSES, &key, with(body, json!({"input": "A cat?"}))).await;
    assert_eq!((other.status, other.error()["param"].as_str()), (400, Some("idempotency-key")));
    assert_eq!(said(&client, &conversation).await.len(), 4);
}

#[tokio::test]
async fn a_turn_of_a_session_goes_on_with_what_its_conversation_is() {
    let client = Server::shared().client();
    let conversation = id(&client.ok("/v1/conversations", json!({})).await.json());
    let in_it = |input: &str| with(ask(input), json!({ "conversation": conversation }));
    client.ok(RESPONSES, in_it("A dog?")).await;
    let first = said(&client, &conversation).await[0].0.clone();
    assert_eq!(client.delete(&format!("/v1/conversations/{conversation}/items/{first}")).await.status, 200);
    // As one would that had found the conversation as it was before.
    let late = json!({"messages": [{"role": "user", "content": "A cat?"}], "session_id": conversation});
    client.ok(CHAT, late).await;
    assert_eq!(said(&client, &conversation).await.len(), 3);
    client.ok(RESPONSES, in_it("A cow?")).await;
    assert_eq!(said(&client, &conversation).await.len(), 5);
}

#[tokio::test]
async fn wrong_requests_are_refused_by_name() {
    let client = Server::shared().client();
    for (body, status, param) in [
        (json!({}), 400, "input"),
        (json!({"input": "x", "tools": [{"type": "web_search"}]}), 400, "tools"),
        (json!({"input": "x", "max_tokens": 3}), 400, "max_tokens"),
        (json!({"input": "x", "max_output_tokens": 2_000_000}), 400, "max_output_tokens"),
        (json!({"input": "x", "temperature": 3}), 400, "temperature"),
        (json!({"input": [{"type": "function_call_output"}]}), 400, "input[0].type"),
        (json!({"input": "x", "model": "gpt"}), 404, "model"),
        (json!({"input": "x", "conversation": "conv_1"}), 404, "conversation"),
        (json!({"input": "x", "previous_response_id": "resp_1"}), 404, "previous_response_id"),
    ] {
        let reply = client.post(RESPONSES, body.clone()).await;
        assert_eq!((reply.status, reply.error()["param"].as_str()), (status, Some(param)), "{body}");
    }
    for (path, body, param) in [
        ("/v1/conversations", json!({"items": [{"role": "robot", "content": "x"}]}), "items[0].role"),
        ("/v1/conversations", json!({"metadata": {"a": 1}}), "metadata.a"),
    ] {
        let reply = client.post(path, body.clone()).await;
        assert_eq!((reply.status, reply.error()["param"].as_str()), (400, Some(param)), "{body}");
    }
    let conversation = client.ok("/v1/conversations", json!({"metadata": {"topic": "cats"}, "odd": 1})).await;
    assert_eq!(conversation.header("x-ignored-params"), Some("odd"));
    let path = format!("/v1/conversations/{}", id(&conversation.json()));
    let items = json!({"items": [{"role": "user", "content": "x", "mood": 1}]});
    let added = client.ok(&format!("{path}/items"), items).await;
    assert_eq!(added.header("x-ignored-params"), Some("items[].mood"));
    assert_eq!(client.get(&format!("{path}/items?after=x")).await.error()["param"], "after");
    assert_eq!(client.post(&path, json!({})).await.error()["param"], "metadata");
    assert_eq!(client.get(&path).await.json()["metadata"], json!({"topic": "cats"}));
    let tag = format!("\"st_{}\"", "0".repeat(44));
    let conditional = client.post_with(RESPONSES, &[("if-match", &tag)], json!({"input": "x"})).await;
    assert_eq!((conditional.status, conditional.error()["param"].as_str()), (400, Some("if-match")));
}

#[tokio::test]
async fn a_strict_server_refuses_what_nobody_knows() {
    let mut config = config();
    config.server.strict = true;
    let client = Server::with(&config, Arc::new(InMemory::default())).client();
    for (path, body, param) in [
        ("/v1/conversations", json!({"odd": 1}), "odd"),
        ("/v1/conversations", json!({"items": [{"role": "user", "content": "x", "mood": 1}]}), "items[].mood"),
        (RESPONSES, json!({"input": "x", "odd": 1}), "odd"),
        ("/v1/states", json!({"prompt": "x", "odd": 1}), "odd"),
    ] {
        let reply = client.post(path, body.clone()).await;
        assert_eq!((reply.code().as_str(), reply.error()["param"].as_str()), ("unknown_parameter", Some(param)));
    }
}

#[tokio::test]
async fn what_is_another_s_is_unknown() {
    let server = Server::with(
        &Config { key: vec![key("ann", "ann"), key("bob", "bob")], ..config() },
        Arc::new(InMemory::default()),
    );
    let (ann, bob) = (server.client().with_key("sk-ann"), server.client().with_key("sk-bob"));
    let response = id(&ann.ok(RESPONSES, ask("A secret.")).await.json());
    let conversation = id(&ann.ok("/v1/conversations", json!({})).await.json());
    let running =
        json!({"input": "x", "background": true, "max_output_tokens": 900_000, "logit_bias": {"0": -100, "199": -100}});
    let running = id(&ann.ok(RESPONSES, running).await.json());
    for id in [&response, &running] {
        for path in [
            format!("{RESPONSES}/{id}"),
            format!("{RESPONSES}/{id}?stream=true"),
            format!("/v1/streams/{id}"),
            format!("{RESPONSES}/{id}/input_items"),
        ] {
            assert_eq!(bob.get(&path).await.status, 404, "{path}");
        }
        assert_eq!(bob.delete(&format!("{RESPONSES}/{id}")).await.status, 404);
        assert_eq!(bob.post(&format!("{RESPONSES}/{id}/cancel"), json!({})).await.status, 404);
        let on = bob.post(RESPONSES, with(ask("x"), json!({ "previous_response_id": id }))).await;
        assert_eq!((on.status, on.code().as_str()), (404, "response_not_found"));
    }
    let path = format!("/v1/conversations/{conversation}");
    assert_eq!(bob.get(&path).await.status, 404);
    assert_eq!(bob.delete(&path).await.status, 404);
    assert_eq!(bob.get(&format!("{path}/items")).await.status, 404);
    assert_eq!(bob.post(RESPONSES, with(ask("x"), json!({ "conversation": conversation }))).await.status, 404);
    assert_eq!(ann.get(&format!("{RESPONSES}/{running}")).await.json()["status"], "in_progress");
    assert_eq!(ann.get(&path).await.status, 200);
}
