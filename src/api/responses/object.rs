//! A response as clients see it, and its stream: a pure machine from a turn's events.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::item::{Item, Part};
use crate::api::Error;
use crate::api::openai::reply::Kept;
use crate::api::sse::{Said, Script};
use crate::session::{self, Event, Facts, StoredItem};
use crate::types::Finish;

/// What a response was asked for: it is kept with it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ask {
    pub instructions: Option<String>,
    /// The instructions that its state has read: those, or an earlier response's.
    pub effective: Option<String>,
    pub max_output_tokens: Option<u64>,
    pub temperature: f64,
    pub top_p: f64,
    pub metadata: BTreeMap<String, String>,
    pub previous: Option<String>,
    pub conversation: Option<String>,
    pub background: bool,
    pub store: bool,
    pub truncation: String,
    pub user: Option<String>,
    pub safety_identifier: Option<String>,
    pub prompt_cache_key: Option<String>,
    /// What was new in its input.
    pub items: Vec<StoredItem>,
}

/// A response. Fields that this server has no use for have the values of one that used nothing of the kind.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ResponseObject {
    pub id: String,
    /// `response`.
    #[schema(value_type = String)]
    pub object: &'static str,
    /// Unix seconds.
    pub created_at: u64,
    /// `in_progress`, `completed`, `incomplete`, `failed` or `cancelled`.
    #[schema(value_type = String)]
    pub status: &'static str,
    pub background: bool,
    #[schema(value_type = Option<Object>, required = true)]
    pub error: Value,
    /// Why it is `incomplete`: `{"reason": "max_output_tokens"}`.
    #[schema(value_type = Option<Object>, required = true)]
    pub incomplete_details: Value,
    #[schema(required = true)]
    pub instructions: Option<String>,
    #[schema(required = true)]
    pub max_output_tokens: Option<u64>,
    /// Served name of the model that answers.
    pub model: String,
    /// The answer, once it has begun.
    pub output: Vec<Item>,
    pub parallel_tool_calls: bool,
    #[schema(required = true)]
    pub previous_response_id: Option<String>,
    /// `{"id": …}`.
    #[schema(value_type = Option<Object>, required = true)]
    pub conversation: Value,
    #[schema(value_type = Object)]
    pub reasoning: Value,
    #[schema(value_type = String)]
    pub service_tier: &'static str,
    pub store: bool,
    pub temperature: f64,
    #[schema(value_type = Object)]
    pub text: Value,
    #[schema(value_type = String)]
    pub tool_choice: &'static str,
    #[schema(value_type = Vec<Object>)]
    pub tools: [(); 0],
    pub top_logprobs: u64,
    pub top_p: f64,
    pub truncation: String,
    /// Null before the end.
    #[schema(required = true)]
    pub usage: Option<ResponseUsage>,
    #[schema(required = true)]
    pub user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub safety_identifier: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_cache_key: Option<String>,
    pub metadata: BTreeMap<String, String>,
    /// The state that it is kept as.
    #[serde(flatten)]
    pub kept: Kept,
}

/// Token counts.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ResponseUsage {
    /// The whole context.
    pub input_tokens: u64,
    #[schema(value_type = Object)]
    pub input_tokens_details: Value,
    pub output_tokens: u64,
    #[schema(value_type = Object)]
    pub output_tokens_details: Value,
    pub total_tokens: u64,
}

/// Tells a response from its events.
pub struct Teller {
    facts: Facts,
    ask: Ask,
    text: String,
    ending: Option<Ending>,
    /// Number of the next event of the stream.
    sequence: u64,
}

enum Ending {
    Done { finish: Finish, completion_tokens: u64, kept: Kept },
    Cancelled,
    Failed(Error),
}

impl Teller {
    pub fn new(facts: Facts, ask: Ask) -> Self {
        Self { facts, ask, text: String::new(), ending: None, sequence: 0 }
    }

    /// Takes an event without telling of it.
    pub fn take(&mut self, event: Event) {
        match event {
            Event::Text { text, .. } => self.text.push_str(&text),
            Event::Done { finish, completion_tokens, stored, .. } => {
                self.ending = Some(Ending::Done { finish, completion_tokens, kept: stored.into() });
            }
            Event::Failed(session::Error::Cancelled) => self.ending = Some(Ending::Cancelled),
            Event::Failed(error) => self.ending = Some(Ending::Failed(error.into())),
        }
    }

    /// Why it has failed.
    pub fn failure(&self) -> Option<&Error> {
        match &self.ending {
            Some(Ending::Failed(error)) => Some(error),
            _ => None,
        }
    }

    /// The response as it is now.
    pub fn object(&self) -> ResponseObject {
        let Self { facts, ask, .. } = self;
        let (mut error, mut incomplete_details, mut usage, mut kept) =
            (Value::Null, Value::Null, None, Kept::default());
        match &self.ending {
            Some(Ending::Failed(why)) => {
                error = json!({"code": "server_error", "message": why.body().error.message});
            }
            Some(Ending::Done { finish, completion_tokens, kept: state }) => {
                if *finish == Finish::Length {
                    incomplete_details = json!({"reason": "max_output_tokens"});
                }
                usage = Some(self.usage(*completion_tokens));
                kept = state.clone();
            }
            Some(Ending::Cancelled) | None => {}
        }
        let output = if self.ended() || !self.text.is_empty() { vec![self.item()] } else { Vec::new() };
        ResponseObject {
            id: facts.response_id.clone(),
            object: "response",
            created_at: facts.created,
            status: self.status(),
            background: ask.background,
            error,
            incomplete_details,
            instructions: ask.instructions.clone(),
            max_output_tokens: ask.max_output_tokens,
            model: facts.model.clone(),
            output,
            parallel_tool_calls: true,
            previous_response_id: ask.previous.clone(),
            conversation: ask.conversation.as_ref().map_or(Value::Null, |id| json!({ "id": id })),
            reasoning: json!({"effort": null, "summary": null}),
            service_tier: "default",
            store: ask.store,
            temperature: ask.temperature,
            text: json!({"format": {"type": "text"}}),
            tool_choice: "auto",
            tools: [],
            top_logprobs: 0,
            top_p: ask.top_p,
            truncation: ask.truncation.clone(),
            usage,
            user: ask.user.clone(),
            safety_identifier: ask.safety_identifier.clone(),
            prompt_cache_key: ask.prompt_cache_key.clone(),
            metadata: ask.metadata.clone(),
            kept,
        }
    }

    fn status(&self) -> &'static str {
        match &self.ending {
            None => "in_progress",
            Some(Ending::Done { finish: Finish::Stop, .. }) => "completed",
            Some(Ending::Done { finish: Finish::Length, .. }) => "incomplete",
            Some(Ending::Cancelled) => "cancelled",
            Some(Ending::Failed(_)) => "failed",
        }
    }

    fn usage(&self, output_tokens: u64) -> ResponseUsage {
        let (input_tokens, cached_tokens) = (self.facts.prompt_tokens, self.facts.cached_tokens.get());
        ResponseUsage {
            input_tokens,
            input_tokens_details: json!({"cached_tokens": cached_tokens, "cache_write_tokens": 0}),
            output_tokens,
            output_tokens_details: json!({"reasoning_tokens": 0}),
            total_tokens: input_tokens + output_tokens,
        }
    }

    fn item(&self) -> Item {
        let status = match &self.ending {
            None => "in_progress",
            Some(Ending::Done { finish: Finish::Stop, .. }) => "completed",
            Some(_) => "incomplete",
        };
        let content =
            if self.ended() || !self.text.is_empty() { vec![Part::output(self.text.clone())] } else { vec![] };
        Item { id: output_id(&self.facts.response_id), kind: "message", status, role: "assistant".into(), content }
    }

    fn of_part(&self, mut fields: Value) -> Value {
        fields["item_id"] = json!(output_id(&self.facts.response_id));
        fields["output_index"] = json!(0);
        fields["content_index"] = json!(0);
        fields
    }

    fn told(&mut self, name: &'static str, mut fields: Value) -> Said {
        fields["type"] = json!(name);
        fields["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        Said { name: Some(name), data: fields.to_string() }
    }
}

impl Script for Teller {
    fn response_id(&self) -> &str {
        &self.facts.response_id
    }

    fn opening(&mut self) -> Vec<Said> {
        let response = json!(self.object());
        let item = json!(self.item());
        let part = json!(Part::output(String::new()));
        vec![
            self.told("response.created", json!({ "response": response })),
            self.told("response.in_progress", json!({ "response": response })),
            self.told("response.output_item.added", json!({"output_index": 0, "item": item})),
            self.told("response.content_part.added", self.of_part(json!({ "part": part }))),
        ]
    }

    fn tell(&mut self, event: Event) -> Vec<Said> {
        if let Event::Text { text, .. } = &event {
            let delta = self.of_part(json!({"delta": text, "logprobs": []}));
            self.text.push_str(text);
            return vec![self.told("response.output_text.delta", delta)];
        }
        self.take(event);
        let response = json!({ "response": self.object() });
        let name = match &self.ending {
            // OpenAI has no event for it: the response in it says what happened.
            Some(Ending::Failed(_) | Ending::Cancelled) => return vec![self.told("response.failed", response)],
            Some(Ending::Done { finish: Finish::Length, .. }) => "response.incomplete",
            _ => "response.completed",
        };
        let (part, item) = (json!(Part::output(self.text.clone())), json!(self.item()));
        let text = self.of_part(json!({"text": self.text, "logprobs": []}));
        vec![
            self.told("response.output_text.done", text),
            self.told("response.content_part.done", self.of_part(json!({ "part": part }))),
            self.told("response.output_item.done", json!({"output_index": 0, "item": item})),
            self.told(name, response),
        ]
    }

    fn ended(&self) -> bool {
        self.ending.is_some()
    }
}

/// The id of a response's answer.
pub fn output_id(response: &str) -> String {
    format!("msg_{}", response.trim_start_matches("resp_"))
}
