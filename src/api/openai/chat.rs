//! `POST /v1/chat/completions`: a conversation goes on.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::form::Form;
use super::generation::{Generation, Order, Part, Rules, some_tokens};
use super::head::Head;
use super::message::{self, ChatMessage};
use super::parameters::sort_out;
use super::reply::{self, Chunk, FinishReason, Kept, Reply, Shape};
use crate::api::extract::JsonBody;
use crate::api::record::Record;
use crate::api::refusals::{Conflicts, Refusals, Unavailable};
use crate::api::{App, Error};
use crate::session::Input;
use crate::types::{Finish, Role};

/// A conversation to go on with.
///
/// Not supported yet, and refused unless neutral: `logprobs`, `top_logprobs`, `tools`, `tool_choice`, `functions`,
/// `function_call`, `response_format` (other than text), `modalities` (other than text), `audio`, `prediction`,
/// `reasoning_effort`, `verbosity`, `web_search_options`, and a last message of the assistant. Accepted without effect:
/// `user`, `safety_identifier`, `service_tier`, `store`, `prompt_cache_key`, `prompt_cache_retention`.
/// Unknown fields are accepted and listed in the header `x-ignored-params`.
#[derive(Clone, Debug, ToSchema)]
pub struct ChatRequest {
    #[serde(flatten)]
    pub generation: Generation,
    #[serde(flatten)]
    pub own: ChatFields,
}

/// The fields that only chats have.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct ChatFields {
    /// The conversation or, with a state or session, what is new of it; then it may be empty: the answer goes on.
    #[schema(required = true)]
    pub messages: Option<Vec<ChatMessage>>,
    /// The most tokens to generate for each choice; wins over `max_tokens`.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<u64>,
}

impl ChatRequest {
    /// Reads the body; also returns the names of fields that nobody knows.
    pub fn read(body: &JsonBody) -> Result<(Self, Vec<String>), Error> {
        let (generation, own, others) = body.split_both::<Generation, ChatFields>()?;
        let mut ignored = sort_out(others, generation.choices())?;
        ignored.extend(message::ignored(own.messages.as_deref().unwrap_or_default()));
        Ok((Self { generation, own }, ignored))
    }

    /// Checks the request and makes an order of it.
    pub fn order(self, ignored: Vec<String>, head: Head, rules: Rules) -> Result<Order, Error> {
        let sent = self.own.messages.ok_or_else(|| Error::missing("messages"))?;
        let messages = message::messages(sent)?;
        if messages.is_empty() && !self.generation.resumes() {
            let message = "`messages` may be empty only with `state_id` or `session_id`";
            return Err(Error::invalid("messages", message));
        }
        if messages.last().is_some_and(|message| message.role == Role::Assistant) {
            let message = "the last message is the assistant's: beginning the answer for it is not supported yet";
            return Err(Error::unsupported("messages", message));
        }
        let max_tokens = some_tokens("max_tokens", self.generation.max_tokens)?;
        let max_tokens = some_tokens("max_completion_tokens", self.own.max_completion_tokens)?.or(max_tokens);
        let form = Form::chat(&self.generation).text();
        let part = Part { input: Input::Chat(messages), max_tokens, prefix: "chatcmpl-", ignored, form, keep: false };
        self.generation.order(part, head, rules)
    }
}

/// How chats look on the wire.
pub struct ChatCompletion;

impl Shape for ChatCompletion {
    type Choice = ChatChoice;
    type Piece = ChatPiece;
    const OBJECT: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";
    const SERVICE_TIER: Option<&'static str> = Some("default");

    fn choice(index: usize, text: String, finish: Finish, kept: Kept) -> ChatChoice {
        let message = ChatAnswer { role: "assistant", content: text, refusal: () };
        ChatChoice { index, message, logprobs: (), finish_reason: finish, kept }
    }
    fn opening(index: usize) -> Option<ChatPiece> {
        Some(ChatPiece::new(index, Delta { role: Some("assistant"), content: Some(String::new()) }))
    }
    fn piece(index: usize, text: String) -> ChatPiece {
        ChatPiece::new(index, Delta { role: None, content: Some(text) })
    }
    fn last(index: usize, finish: Finish, kept: Kept) -> ChatPiece {
        ChatPiece { finish_reason: Some(finish), kept, ..ChatPiece::new(index, Delta::default()) }
    }
}

/// One answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: usize,
    pub message: ChatAnswer,
    /// Always null: not supported yet.
    #[schema(value_type = Option<Object>, required = true)]
    pub logprobs: (),
    #[schema(value_type = FinishReason)]
    pub finish_reason: Finish,
    #[serde(flatten)]
    pub kept: Kept,
}

/// The assistant's message.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatAnswer {
    #[schema(value_type = String)]
    pub role: &'static str,
    pub content: String,
    /// Always null: models here do not refuse in a field of its own.
    #[schema(value_type = Option<String>, required = true)]
    pub refusal: (),
}

/// A part of one answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatPiece {
    pub index: usize,
    pub delta: Delta,
    /// Always null: not supported yet.
    #[schema(value_type = Option<Object>, required = true)]
    pub logprobs: (),
    /// Null before the last piece.
    #[schema(value_type = Option<FinishReason>, required = true)]
    pub finish_reason: Option<Finish>,
    #[serde(flatten)]
    pub kept: Kept,
}

impl ChatPiece {
    fn new(index: usize, delta: Delta) -> Self {
        Self { index, delta, logprobs: (), finish_reason: None, kept: Kept::default() }
    }
}

/// What to append to the assistant's message.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Generate the next message of a conversation, or of a stored one.
///
/// With `stream: true` the reply is a stream of server-sent events, each a `Chunk`, ended by `data: [DONE]`. A failure
/// after the stream has begun is one last event that holds an `error`.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "generate",
    params(
        ("If-Match" = Option<String>, Header, description = "A state id in double quotes: run only if it is the session's head"),
        ("Idempotency-Key" = Option<String>, Header, description = "On a session turn: a repeated key returns the committed turn"),
    ),
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The answers", content(
            (Reply<ChatChoice> = "application/json"),
            (Chunk<ChatPiece> = "text/event-stream"),
        ), headers(
            ("x-state-id" = String, description = "The stored state, when there is one answer and no stream"),
            ("x-ignored-params" = String, description = "Fields of the request that nobody knows"),
        )),
        Refusals,
        Conflicts,
        Unavailable,
    ),
)]
pub async fn chat_completions(
    State(app): State<Arc<App>>,
    head: Head,
    record: Record,
    body: JsonBody,
) -> Result<Response, Error> {
    let (request, ignored) = ChatRequest::read(&body)?;
    let card = app.card(request.generation.model.as_deref())?;
    let newer = request.own.max_completion_tokens.is_some();
    let order = request.order(ignored, head, app.rules(&card))?;
    let names: &[_] = if newer { &[("max_tokens", "max_completion_tokens")] } else { &[] };
    reply::respond::<ChatCompletion>(&app, order, record).await.map_err(|error| error.renamed(names))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{blamed, head, lenient};
    use super::*;
    use crate::types::{Message, StateId};
    use serde_json::{Value, json};

    fn order(body: Value) -> Result<Order, Error> {
        let (request, ignored) = ChatRequest::read(&JsonBody::from(body.to_string().as_str()))?;
        lenient(|rules| request.order(ignored, head(), rules))
    }

    fn hello() -> Value {
        json!([{"role": "user", "content": "hello"}])
    }

    #[test]
    fn a_chat_becomes_a_turn() {
        let body = json!({"messages": [{"role": "user", "content": "hello", "mood": 1}], "top_a": 1});
        let Order { turn, ignored, .. } = order(body).unwrap();
        let message = Message { role: Role::User, content: "hello".into(), name: None };
        assert_eq!(turn.input, Input::Chat(vec![message]));
        assert_eq!(turn.response_id, format!("chatcmpl-{:032x}", 0xabc));
        assert_eq!(turn.max_tokens, None, "the server's default of chats holds");
        assert_eq!(ignored, ["top_a", "messages[].mood"]);
    }

    #[test]
    fn the_newer_token_limit_wins() {
        let limit = |max_tokens: Value, newer: Value| {
            let body = json!({"messages": hello(), "max_tokens": max_tokens, "max_completion_tokens": newer});
            order(body).map(|order| order.turn.max_tokens)
        };
        assert_eq!(limit(json!(3), json!(5)).unwrap(), Some(5));
        assert_eq!(limit(json!(3), json!(null)).unwrap(), Some(3));
        assert_eq!(blamed(limit(json!(3), json!(0))).0, "max_completion_tokens");
        assert_eq!(blamed(limit(json!(0), json!(null))).0, "max_tokens");
    }

    #[test]
    fn messages_may_be_empty_only_when_something_goes_on() {
        let state = StateId::new(1, 2).to_string();
        assert!(order(json!({"messages": [], "state_id": state})).is_ok());
        assert!(order(json!({"messages": [], "session_id": "s"})).is_ok());
        assert_eq!(blamed(order(json!({"messages": []}))), ("messages".into(), "invalid_value"));
        for missing in [json!({}), json!({"messages": null}), json!({"state_id": state})] {
            assert_eq!(blamed(order(missing)), ("messages".into(), "missing_required_parameter"));
        }
        assert_eq!(blamed(order(json!({"messages": "hi"}))), ("messages".into(), "invalid_type"));
    }

    #[test]
    fn the_assistant_s_answer_cannot_be_begun_for_it() {
        let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        assert_eq!(blamed(order(json!({ "messages": messages }))), ("messages".into(), "unsupported_parameter"));
    }

    #[test]
    fn what_chats_cannot_do_yet_is_refused_by_name() {
        for (name, value) in [
            ("logprobs", json!(true)),
            ("top_logprobs", json!(2)),
            ("tools", json!([{"type": "function", "function": {"name": "f"}}])),
            ("tool_choice", json!("required")),
            ("response_format", json!({"type": "json_schema", "json_schema": {}})),
            ("modalities", json!(["audio"])),
            ("reasoning_effort", json!("high")),
        ] {
            let refused = order(json!({"messages": hello(), name: value}));
            assert_eq!(blamed(refused), (name.into(), "unsupported_parameter"));
        }
        let neutral = json!({"messages": hello(), "tools": [], "logprobs": false, "response_format": {"type": "text"}});
        assert!(order(neutral).unwrap().ignored.is_empty());
    }
}
