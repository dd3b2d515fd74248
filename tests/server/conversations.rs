//! What a response begins with: instructions that are its own, items that are only named, and what is left of a state that is
//! damaged. Nothing of a refused request is written.

use std::sync::Arc;

use rewake::config::Config;
use rewake::state::InMemory;
use serde_json::{Value, json};

use crate::responses::{RESPONSES, ask, id, plain, said, text};
use crate::server::{CHAT, Client, Server, config};
use crate::store::{Op, Recording};
use crate::{key, with};

const CONVERSATIONS: &str = "/v1/conversations";

fn message(role: &str, text: &str) -> Value {
    json!({"role": role, "content": text})
}

/// What a fresh chat of these messages answers, and how many tokens it reads.
async fn fresh(client: &Client, messages: Vec<Value>) -> (String, Value) {
    let body = json!({"messages": messages, "temperature": 0, "max_tokens": 12, "store_state": true});
    let reply = client.ok(CHAT, body).await;
    (reply.answer(), reply.json()["usage"]["prompt_tokens"].clone())
}

fn told(response: &Value) -> (String, Value) {
    (text(response), response["usage"]["input_tokens"].clone())
}

#[tokio::test]
async fn other_instructions_take_the_place_of_earlier_ones_everywhere() {
    let client = Server::shared().client();
    let conversation = id(&client.ok(CONVERSATIONS, json!({"items": [message("user", "Hello.")]})).await.json());
    let in_it = |input: &str, instructions: &str| {
        with(ask(input), json!({"conversation": conversation, "instructions": instructions}))
    };
    let first = client.ok(RESPONSES, in_it("A dog?", "Be kind.")).await.json();
    let beginning = [message("user", "Hello."), message("user", "A dog?"), message("assistant", &text(&first))];
    // After a response of a conversation, apart from it.
    for instructions in ["Be rude.", "Be brief."] {
        let apart = json!({"previous_response_id": id(&first), "instructions": instructions});
        let apart = client.ok(RESPONSES, with(ask("And?"), apart)).await.json();
        let mut whole = vec![message("system", instructions)];
        whole.extend(beginning.clone());
        whole.push(message("user", "And?"));
        assert_eq!(told(&apart), fresh(&client, whole.clone()).await);
        // And after that, of which the conversation is only the beginning.
        let on = json!({"previous_response_id": id(&apart), "instructions": "Sing."});
        let on = client.ok(RESPONSES, with(ask("More."), on)).await.json();
        whole[0] = message("system", "Sing.");
        whole.extend([message("assistant", &text(&apart)), message("user", "More.")]);
        assert_eq!(told(&on), fresh(&client, whole).await);
    }
    // In it, as often as they change; then none goes on from there.
    let mut whole = beginning.to_vec();
    for (input, instructions) in [("A cat?", "Be rude."), ("A cow?", "Be kind.")] {
        let response = client.ok(RESPONSES, in_it(input, instructions)).await.json();
        whole.push(message("user", input));
        let all = [&[message("system", instructions)], &whole[..]].concat();
        assert_eq!(told(&response), fresh(&client, all).await);
        whole.push(message("assistant", &text(&response)));
    }
    let last = client.ok(RESPONSES, with(ask("Well?"), json!({ "conversation": conversation }))).await.json();
    whole.push(message("user", "Well?"));
    assert_eq!(told(&last), fresh(&client, [&[message("system", "Be kind.")], &whole[..]].concat()).await);
    assert_eq!(said(&client, &conversation).await.len(), whole.len() + 1);
    // Of what was deleted from it nothing is read again.
    let answer = first["output"][0]["id"].as_str().expect("an id");
    assert_eq!(client.delete(&format!("{CONVERSATIONS}/{conversation}/items/{answer}")).await.status, 200);
    let apart = json!({"previous_response_id": id(&first), "instructions": "Be rude."});
    let refused = client.post(RESPONSES, with(ask("And?"), apart)).await;
    assert_eq!((refused.status, refused.error()["param"].as_str()), (400, Some("previous_response_id")));
}

#[tokio::test]
async fn a_refused_request_changes_no_conversation() {
    let store = Arc::new(Recording::new(InMemory::default()));
    let mut config = config();
    config.turns.prompt_tokens = 300;
    let client = Server::with(&config, store.clone()).client();
    let conversation = id(&client.ok(CONVERSATIONS, json!({"items": [message("user", "Hello.")]})).await.json());
    let in_it = |input: &str, more: Value| {
        with(with(ask(input), json!({"conversation": conversation, "instructions": "Be kind."})), more)
    };
    client.ok(RESPONSES, in_it("A dog?", json!({}))).await;
    let before = said(&client, &conversation).await;
    store.forget();
    for (body, param) in [
        (in_it("x", json!({"temperature": 7})), "temperature"),
        (in_it("x", json!({"max_output_tokens": 2_000_000})), "max_output_tokens"),
        (in_it("x", json!({"logit_bias": {"x": 1}})), "logit_bias.x"),
        (in_it("x", json!({"stop": [""]})), "stop"),
        (in_it("x", json!({"input": []})), "input"),
        (in_it(&"word ".repeat(400), json!({})), "input"),
        (in_it("x", json!({"initial_state": "poet"})), "initial_state"),
        (in_it("x", json!({"input": [{"type": "item_reference", "id": "msg_1"}]})), "input[0].id"),
    ] {
        let refused = client.post(RESPONSES, with(body, json!({"instructions": "Be rude."}))).await;
        assert_eq!(refused.error()["param"].as_str(), Some(param), "{}", refused.text);
        let written: Vec<Op> =
            store.log().into_iter().filter(|op| matches!(op, Op::PutBegun(_) | Op::Deleted(_))).collect();
        assert_eq!(written, [], "{param}");
    }
    assert_eq!(said(&client, &conversation).await, before);
    // What waits in the journal is what was asked for last, and that only.
    let rude = client.ok(RESPONSES, with(in_it("Well?", json!({})), json!({"instructions": "Be rude."}))).await.json();
    let mut whole = vec![message("system", "Be rude.")];
    whole.extend(before.iter().map(|(_, role, text)| message(role, text)));
    whole.push(message("user", "Well?"));
    assert_eq!(told(&rude), fresh(&client, whole).await);
}

#[tokio::test]
async fn an_item_can_be_named_instead_of_given() {
    let client = Server::shared().client();
    let reference = |id: &str| json!({"type": "item_reference", "id": id});
    let input = json!([message("developer", "Be kind."), message("user", "A dog?")]);
    let first = client.ok(RESPONSES, with(ask(""), json!({ "input": input }))).await.json();
    let items = client.get(&format!("{RESPONSES}/{}/input_items?order=asc", id(&first))).await.json()["data"].clone();
    let [system, user] = [0, 1].map(|n| items[n]["id"].as_str().expect("an id").to_owned());
    let answer = first["output"][0]["id"].as_str().expect("an id");
    let named = json!([reference(&system), {"id": user}, reference(answer), message("user", "And?"), reference(&user)]);
    let second = client.ok(RESPONSES, with(ask(""), json!({ "input": named }))).await.json();
    let whole = vec![
        message("system", "Be kind."),
        message("user", "A dog?"),
        message("assistant", &text(&first)),
        message("user", "And?"),
        message("user", "A dog?"),
    ];
    assert_eq!(told(&second), fresh(&client, whole).await);
    let shown = client.get(&format!("{RESPONSES}/{}/input_items?order=asc", id(&second))).await.json()["data"].clone();
    let ids: Vec<_> =
        shown.as_array().expect("a list").iter().map(|item| item["id"].as_str().expect("an id")).collect();
    assert_eq!(ids[..3], [&*system, &*user, answer]);
    assert_ne!(ids[4], user, "no two have one id");
    // One of a conversation, where that goes on; and in it, what a response said elsewhere.
    let begun = json!({"items": [message("user", "Hello."), reference(answer)]});
    let conversation = id(&client.ok(CONVERSATIONS, begun).await.json());
    let all = said(&client, &conversation).await;
    assert_eq!(plain(&all), [("user", "Hello."), ("assistant", &text(&first))]);
    let added = json!({"items": [reference(&all[0].0)]});
    client.ok(&format!("{CONVERSATIONS}/{conversation}/items"), added).await;
    let in_it = json!({"conversation": conversation, "input": [reference(&all[0].0), message("user", "Well?")]});
    let third = client.ok(RESPONSES, with(ask(""), in_it)).await.json();
    let mut whole = vec![message("user", "Hello."), message("assistant", &text(&first))];
    whole.extend([message("user", "Hello."), message("user", "Hello."), message("user", "Well?")]);
    assert_eq!(told(&third), fresh(&client, whole).await);
    // What ends with the assistant's words cannot be answered, named or not; and nobody names what is not there.
    let refused = client.post(RESPONSES, with(ask(""), json!({"input": [reference(answer)]}))).await;
    assert_eq!((refused.status, refused.error()["param"].as_str()), (400, Some("input")));
    let many = json!({ "input": vec![reference(&user); 101] });
    assert_eq!(client.post(RESPONSES, with(ask(""), many)).await.error()["param"], "input[100].id");
    let unknown = [
        "",
        "msg_",
        "msg_1",
        &format!("{answer}009"),
        &format!("msg_{}", "0".repeat(32)),
        &all[0].0,
        "é".repeat(40).as_str(),
    ]
    .map(String::from);
    for unknown in unknown {
        let input = json!([message("user", "x"), reference(&unknown)]);
        let refused = client.post(RESPONSES, with(ask(""), json!({ "input": input }))).await;
        let error = refused.error();
        assert_eq!(
            (refused.status, &error["code"], &error["param"]),
            (404, &json!("item_not_found"), &json!("input[1].id"))
        );
    }
}

#[tokio::test]
async fn nobody_names_another_s_items() {
    let server = Server::with(
        &Config { key: vec![key("ann", "ann"), key("bob", "bob")], ..config() },
        Arc::new(InMemory::default()),
    );
    let (ann, bob) = (server.client().with_key("sk-ann"), server.client().with_key("sk-bob"));
    let response = ann.ok(RESPONSES, ask("A secret.")).await.json();
    let answer = response["output"][0]["id"].as_str().expect("an id").to_owned();
    for item in [answer.clone(), format!("{answer}000")] {
        let body = with(ask(""), json!({"input": [{"type": "item_reference", "id": item}, message("user", "?")]}));
        assert_eq!(bob.post(RESPONSES, body.clone()).await.code(), "item_not_found");
        ann.ok(RESPONSES, body).await;
    }
    let given = json!({"items": [{"type": "item_reference", "id": answer}]});
    assert_eq!(bob.post(CONVERSATIONS, given).await.code(), "item_not_found");
    let off = client_id(&ann).await;
    assert_eq!(bob.post(RESPONSES, with(ask(""), json!({"input": [{"id": off}]}))).await.code(), "item_not_found");
}

/// The id of the answer of a response that is not stored: nobody can name it.
async fn client_id(client: &Client) -> String {
    let response = client.ok(RESPONSES, with(ask("Hello."), json!({"store": false}))).await.json();
    let item = response["output"][0]["id"].as_str().expect("an id").to_owned();
    let named = json!({"input": [{"id": item}, message("user", "?")]});
    assert_eq!(client.post(RESPONSES, with(ask(""), named)).await.code(), "item_not_found");
    item
}
