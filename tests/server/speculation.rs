//! Drafts over HTTP: whether the server may draft or not, every answer and every state is the same.

use std::sync::Arc;

use futures::future::join_all;
use rewake::config::Drafts;
use rewake::state::InMemory;
use rewake::types::Memory;
use serde_json::{Value, json};

use crate::initial::{memory, texts};
use crate::server::{CHAT, COMPLETIONS, Reply, Server, config};
use crate::{user, with};

/// What is asked, all at once: some texts repeat themselves.
fn requests() -> Vec<(&'static str, Value)> {
    let again = "The cat sat on the mat. The dog sat on the mat. ".repeat(4);
    let story = json!({"prompt": "Once upon a time", "max_tokens": 60, "seed": 5, "n": 3, "temperature": 0.9});
    let chat = json!({"messages": user("Tell me a story about a cat."), "temperature": 0, "max_tokens": 80, "store_state": true});
    let greedy = json!({"prompt": again, "max_tokens": 80, "temperature": 0, "store_state": true});
    let penalised = json!({"temperature": 0.7, "seed": 9, "frequency_penalty": 0.4, "stop": [" mat. The", "\n\n"]});
    let cut = json!({"max_tokens": 7, "logit_bias": {"0": -100}});
    vec![
        (COMPLETIONS, story),
        (CHAT, chat.clone()),
        (CHAT, with(chat, json!({"temperature": 0.3, "seed": 2, "repetition_penalty": 1.1}))),
        (COMPLETIONS, greedy.clone()),
        (COMPLETIONS, with(greedy.clone(), penalised)),
        (COMPLETIONS, with(greedy, cut)),
    ]
}

/// The text and the end of each choice, what was used, and the state that was kept.
type Answer = (Vec<(String, String)>, Value, Option<Memory>);

fn finishes(reply: &Reply) -> Vec<String> {
    let reply = reply.json();
    let choices = reply["choices"].as_array().expect("choices");
    choices.iter().map(|choice| choice["finish_reason"].as_str().expect("an end").to_owned()).collect()
}

async fn answers(drafts: Drafts) -> Vec<Answer> {
    let (mut config, store) = (config(), Arc::new(InMemory::default()));
    config.engine.speculation = drafts;
    let client = Server::with(&config, store.clone()).client();
    let answer = |(path, body): (&'static str, Value)| {
        let (client, store) = (client.clone(), store.clone());
        async move {
            let stored = body["store_state"] == true;
            let reply = client.ok(path, body).await;
            let kept = if stored { Some(memory(&store, &reply.state_id()).await) } else { None };
            let said: Vec<_> = texts(&reply).into_iter().zip(finishes(&reply)).collect();
            (said, reply.json()["usage"].clone(), kept)
        }
    };
    join_all(requests().into_iter().map(answer)).await
}

#[tokio::test]
async fn answers_and_states_are_the_same_with_drafts_and_without() {
    let without = answers(Drafts::Whether(false)).await;
    for drafts in [Drafts::Whether(true), Drafts::Most(3)] {
        for (with, without) in answers(drafts).await.into_iter().zip(&without) {
            assert_eq!((&with.0, &with.1), (&without.0, &without.1), "{drafts:?}");
            assert!(with.2 == without.2, "{drafts:?}: the state kept of {:?}", with.0);
        }
    }
}
