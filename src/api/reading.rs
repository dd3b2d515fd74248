//! `POST /v1/states`: a text is read once, to be answered from many times.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::extract::{JsonBody, fields_of};
use super::openai::reply::Usage;
use super::openai::{ChatMessage, Generation, Head, Prompts, STATE_ID, message, metadata, neutral, sort_out, ttl};
use super::record::Record;
use super::refusals::{Conflicts, Refusals, Unavailable};
use super::states::StateObject;
use super::{App, Error};
use crate::session::{Delivery, Input, Prompt, Start, Turn};
use crate::types::{Sampling, StateId};

/// A text to read. Nothing is generated, so what steers a generation is refused.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct ReadRequest {
    /// Id or alias of a served model; left out, the default model reads.
    pub model: Option<String>,
    /// A text, or its token ids. Later turns with `prompt` go on from its end.
    pub prompt: Option<Prompts>,
    /// A conversation, in place of `prompt`. Later turns with `messages` go on with it.
    pub messages: Option<Vec<ChatMessage>>,
    /// Read on from this stored state.
    pub state_id: Option<String>,
    /// Begin from this configured initial state; not with `state_id`.
    pub initial_state: Option<String>,
    /// Seconds until the state may be removed; the server's default otherwise.
    #[schema(minimum = 1)]
    pub ttl_s: Option<u64>,
    /// At most 16 pairs, with keys of at most 64 and values of at most 512 characters; shown with the state.
    pub metadata: Option<BTreeMap<String, String>>,
}

/// The state after a text, and what reading it took.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReadState {
    #[serde(flatten)]
    pub state: StateObject,
    pub usage: Usage,
}

impl ReadRequest {
    /// Reads the body; also returns the names of fields that nobody knows.
    fn read(body: &JsonBody) -> Result<(Self, Vec<String>), Error> {
        let (request, mut others) = body.split::<Self>()?;
        for name in fields_of::<Generation>() {
            if others.remove(*name).is_some_and(|value| !neutral(&value)) {
                let hint = if *name == "state_ttl_s" { "; here it is called `ttl_s`" } else { "" };
                let why = format!("`{name}` has no meaning where a text is only read{hint}");
                return Err(Error::unsupported(*name, why));
            }
        }
        let mut ignored = sort_out(others, 1)?;
        ignored.extend(message::ignored(request.messages.as_deref().unwrap_or_default()));
        Ok((request, ignored))
    }

    /// Checks the request and makes a turn of it that says nothing.
    fn turn(self, head: Head) -> Result<Turn, Error> {
        let start = match (self.state_id, &self.initial_state) {
            (Some(_), Some(_)) => {
                return Err(Error::invalid(
                    "initial_state",
                    "a text is read after `state_id` or `initial_state`, not both",
                ));
            }
            (None, _) => Start::Fresh,
            (Some(id), None) => Start::State(StateId::parse(id.as_str()).map_err(|_| Error::UnknownState(id))?),
        };
        Ok(Turn {
            response_id: format!("read-{:032x}", head.id),
            input: input(self.prompt, self.messages)?,
            ttl_s: ttl("ttl_s", self.ttl_s)?,
            tenant: head.caller.tenant,
            model: self.model,
            start,
            anew: None,
            choices: 1,
            sampling: Sampling::default(),
            stop: Vec::new(),
            max_tokens: Some(0),
            store: true,
            initial_state: self.initial_state,
            idempotency_key: None,
            metadata: metadata(self.metadata)?,
            delivery: Delivery::default(),
        })
    }
}

/// The one text of a request.
fn input(prompt: Option<Prompts>, messages: Option<Vec<ChatMessage>>) -> Result<Input, Error> {
    match (prompt, messages) {
        (Some(_), Some(_)) => Err(Error::invalid("messages", "give `prompt` or `messages`, not both")),
        (None, Some(messages)) if messages.is_empty() => Err(Error::invalid("messages", "there is nothing to read")),
        (None, Some(messages)) => Ok(Input::Chat(message::messages(messages)?)),
        (Some(Prompts(prompts)), None) => match &prompts[..] {
            [Prompt::Text(text)] if text.is_empty() => Err(Error::invalid("prompt", "there is nothing to read")),
            [Prompt::Ids(ids)] if ids.is_empty() => Err(Error::invalid("prompt", "there is nothing to read")),
            [_] => Ok(Input::Prompts(prompts)),
            _ => Err(Error::invalid("prompt", format!("one text is read into a state, not {}", prompts.len()))),
        },
        (None, None) => Err(Error::Invalid {
            param: Some("prompt".into()),
            code: "missing_required_parameter",
            message: "`prompt` or `messages` is missing".into(),
        }),
    }
}

/// Read a text once and keep the state after it, generating nothing. Turns can begin from it any number of times.
#[utoipa::path(
    post,
    path = "/v1/states",
    tag = "states",
    request_body = ReadRequest,
    responses(
        (status = 200, description = "The new state", body = ReadState, headers(
            ("x-state-id" = String, description = "Its id"),
            ("x-ignored-params" = String, description = "Fields of the request that nobody knows"),
        )),
        Refusals,
        Conflicts,
        Unavailable,
    ),
)]
pub async fn read_state(
    State(app): State<Arc<App>>,
    head: Head,
    record: Record,
    body: JsonBody,
) -> Result<Response, Error> {
    let (request, ignored) = ReadRequest::read(&body)?;
    let ignored = app.ignored(ignored)?;
    let tenant = head.caller.tenant.clone();
    let (running, receipt) = app.sessions.read(request.turn(head)?).await?;
    record.begins(&running.facts);
    let state = StateObject::from(app.sessions.state(&tenant, &receipt.id).await?);
    let id = HeaderValue::from_str(&state.id).expect("an id is made of ASCII letters and digits");
    let usage = Usage::new(running.facts.prompt_tokens, running.facts.cached_tokens.into(), 0);
    record.ends();
    Ok(([(STATE_ID, id)], ignored, Json(ReadState { state, usage })).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Caller;
    use crate::types::{Message, Role, Tenant};
    use serde_json::{Value, json};

    fn turn(body: Value) -> Result<(Turn, Vec<String>), Error> {
        let head =
            Head { caller: Caller { tenant: Tenant::local() }, if_match: None, idempotency_key: None, id: 1, seed: 2 };
        let (request, ignored) = ReadRequest::read(&JsonBody::from(body.to_string().as_str()))?;
        Ok((request.turn(head)?, ignored))
    }

    fn blamed(body: Value) -> String {
        match turn(body.clone()) {
            Err(Error::Invalid { param: Some(param), .. }) => param,
            other => panic!("{body}: {other:?}"),
        }
    }

    #[test]
    fn a_text_becomes_a_turn_that_says_nothing() {
        let (read, ignored) = turn(json!({"prompt": "a", "ttl_s": 9, "metadata": {"k": "v"}, "mood": 1})).unwrap();
        assert_eq!((read.max_tokens, read.store, read.ttl_s), (Some(0), true, Some(9)));
        assert_eq!(read.input, Input::Prompts(vec![Prompt::Text("a".into())]));
        assert_eq!((&read.metadata["k"][..], &ignored[..]), ("v", &["mood".to_owned()][..]));
        let (read, _) = turn(json!({"messages": [{"role": "assistant", "content": "b"}]})).unwrap();
        let message = Message { role: Role::Assistant, content: "b".into(), name: None };
        assert_eq!((read.input, read.start), (Input::Chat(vec![message]), Start::Fresh));
        let neutral = json!({"prompt": [1, 2], "state_id": StateId::new(1, 2).to_string(), "n": null, "stream": false});
        assert!(turn(neutral).is_ok());
    }

    #[test]
    fn what_has_no_meaning_here_is_refused_by_name() {
        for (name, value) in [
            ("max_tokens", json!(5)),
            ("temperature", json!(0)),
            ("stream", json!(true)),
            ("session_id", json!("s")),
            ("store_state", json!(true)),
            ("state_ttl_s", json!(5)),
            ("tools", json!([{}])),
        ] {
            assert_eq!(blamed(json!({"prompt": "a", name: value})), name);
        }
        let state = StateId::new(1, 2).to_string();
        for (body, param) in [
            (json!({}), "prompt"),
            (json!({"prompt": null, "state_id": state}), "prompt"),
            (json!({"prompt": ""}), "prompt"),
            (json!({"prompt": []}), "prompt"),
            (json!({"prompt": ["a", "b"]}), "prompt"),
            (json!({"messages": []}), "messages"),
            (json!({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}), "messages"),
            (json!({"prompt": "a", "ttl_s": 0}), "ttl_s"),
            (json!({"prompt": "a", "metadata": {"": "x"}}), "metadata"),
            (json!({"prompt": "a", "metadata": {"k": "v".repeat(513)}}), "metadata"),
            (json!({"prompt": "a", "metadata": {"k": 1}}), "metadata.k"),
            (json!({"prompt": "a", "state_id": state, "initial_state": "poet"}), "initial_state"),
        ] {
            assert_eq!(blamed(body), param);
        }
        assert!(matches!(turn(json!({"prompt": "a", "state_id": "x"})), Err(Error::UnknownState(_))));
    }
}
