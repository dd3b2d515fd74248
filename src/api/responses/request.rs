//! Reading and checking a request for a response.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::item::{self, Brought, Given};
use super::object::{Ask, output_id};
use crate::api::Error;
use crate::api::extract::JsonBody;
use crate::api::openai::generation::{Generation, metadata, some_tokens};
use crate::api::openai::parameters::sort_out;
use crate::session::ModelCard;

/// What a client of OpenAI's Responses asks for.
///
/// The fields of other endpoints that say how to sample are understood here too. Not supported, and refused unless neutral: `tools`,
/// `tool_choice`, `text` (other than plain text), `reasoning`, `prompt`, `top_logprobs`, `include` of log
/// probabilities, `n`, `max_tokens`, `state_id`, `session_id`, `store_state` and `detach` (use `max_output_tokens`,
/// `previous_response_id`, `conversation`, `store` and `background`). Accepted without effect: `parallel_tool_calls`, `max_tool_calls`,
/// `service_tier`, `prompt_cache_key`, `safety_identifier`, `user`.
#[derive(Clone, Debug, ToSchema)]
pub struct ResponseRequest {
    #[serde(flatten)]
    pub generation: Generation,
    #[serde(flatten)]
    pub own: ResponseFields,
}

/// The fields that only responses have.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct ResponseFields {
    /// A text, or messages; what is new when something goes on.
    pub input: Option<Given>,
    /// A system message before everything, in the place of any earlier one. Together with `previous_response_id` or
    /// `conversation`: the same or none goes on from the kept state; with others the stored messages are read anew behind them, as
    /// long as all of them are there, and the conversation's states of before are deleted.
    pub instructions: Option<String>,
    /// Go on from this stored response.
    pub previous_response_id: Option<String>,
    /// Go on with this conversation: its id, or an object with its `id`.
    #[schema(value_type = Option<Object>)]
    pub conversation: Option<Value>,
    /// Keep the response and its state. True by default.
    pub store: Option<bool>,
    /// Answer at once and go on generating; poll the response, or read its stream. Needs `store`.
    pub background: Option<bool>,
    /// The most tokens to generate; the server's default of chats otherwise.
    #[schema(minimum = 1)]
    pub max_output_tokens: Option<u64>,
    /// At most 16 pairs; names of 64 and values of 512 characters.
    pub metadata: Option<BTreeMap<String, String>>,
    /// `auto` or `disabled`; nothing is ever truncated.
    pub truncation: Option<String>,
    /// What else to show; nothing of it exists here.
    pub include: Option<Vec<String>>,
    pub user: Option<String>,
    pub safety_identifier: Option<String>,
    pub prompt_cache_key: Option<String>,
}

/// What `include` can name that an answer of text has nothing of.
const INCLUDABLE: [&str; 7] = [
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
];

/// A checked request, but for where it begins.
pub struct Checked {
    pub generation: Generation,
    /// Without the items, of which some may only be named.
    pub ask: Ask,
    pub items: Vec<Brought>,
    pub ignored: Vec<String>,
}

impl ResponseRequest {
    /// Reads the body; also returns the names of fields that nobody knows.
    pub fn read(body: &JsonBody) -> Result<(Self, Vec<String>), Error> {
        let (generation, own, mut others) = body.split_both::<Generation, ResponseFields>()?;
        refuse_own(&mut others)?;
        let ignored = sort_out(others, 1)?;
        Ok((Self { generation, own }, ignored))
    }

    /// Checks everything that does not depend on what is stored. `id` is the response's.
    pub fn check(self, id: &str, card: &ModelCard, mut ignored: Vec<String>) -> Result<Checked, Error> {
        let Self { mut generation, own } = self;
        refuse_others(&generation)?;
        check_include(own.include.as_deref().unwrap_or_default())?;
        let metadata = metadata(own.metadata)?;
        let truncation = own.truncation.unwrap_or_else(|| "disabled".into());
        if !["auto", "disabled"].contains(&truncation.as_str()) {
            return Err(Error::invalid("truncation", "`truncation` must be `auto` or `disabled`"));
        }
        let conversation = own.conversation.map(conversation).transpose()?.flatten();
        if conversation.is_some() && own.previous_response_id.is_some() {
            let why = "a response goes on from `previous_response_id` or with `conversation`, not both";
            return Err(Error::invalid("conversation", why));
        }
        let (store, background) = (own.store.unwrap_or(true), own.background.unwrap_or(false));
        if background && !store {
            return Err(Error::invalid("background", "`background` needs `store`: it is read when it is there"));
        }
        if generation.state_ttl_s.is_some() && !store {
            return Err(Error::invalid("state_ttl_s", "`state_ttl_s` needs `store`"));
        }
        let max_output_tokens = some_tokens("max_output_tokens", own.max_output_tokens)?;
        let goes_on = conversation.is_some() || own.previous_response_id.is_some();
        let given = match own.input {
            Some(given) => given,
            None if goes_on => Given::Items(Vec::new()),
            None => return Err(Error::missing("input")),
        };
        let (items, unread) = item::read(given, "input", &output_id(id))?;
        ignored.extend(unread);
        if items.is_empty() && !goes_on {
            return Err(Error::invalid("input", "`input` may be empty only when something goes on"));
        }
        generation.detach = Some(background);
        let ask = Ask {
            effective: own.instructions.clone(),
            instructions: own.instructions,
            max_output_tokens,
            temperature: generation.temperature.unwrap_or_else(|| shown(card.sampling.temperature)),
            top_p: generation.top_p.unwrap_or_else(|| shown(card.sampling.top_p)),
            metadata,
            previous: own.previous_response_id,
            conversation,
            background,
            store,
            truncation,
            user: own.user,
            safety_identifier: own.safety_identifier,
            prompt_cache_key: own.prompt_cache_key,
            items: Vec::new(),
        };
        Ok(Checked { generation, ask, items, ignored })
    }
}

/// An f32 as the f64 that is written the same.
fn shown(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// Whether a value of a field of the Responses API changes nothing.
fn changes_nothing(name: &str, value: &Value) -> Option<bool> {
    let empty = value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty);
    let none = |of: &Value, neutral: &[&str]| of.is_null() || of.as_str().is_some_and(|of| neutral.contains(&of));
    Some(match name {
        "text" => {
            empty
                || value
                    .as_object()
                    .is_some_and(|fields| fields.keys().all(|key| ["format", "verbosity"].contains(&&**key)))
                    && (value["format"].is_null() || value["format"]["type"] == "text")
                    && none(&value["verbosity"], &["medium"])
        }
        "reasoning" => {
            empty
                || value.is_object()
                    && none(&value["effort"], &["none"])
                    && none(&value["summary"], &["auto"])
                    && none(&value["generate_summary"], &["auto"])
        }
        "prompt" | "context_management" | "moderation" => empty || value.as_array().is_some_and(Vec::is_empty),
        "max_tool_calls" | "prompt_cache_options" => true,
        _ => return None,
    })
}

/// Takes out what the Responses API alone knows; refuses what would have mattered.
fn refuse_own(others: &mut BTreeMap<String, Value>) -> Result<(), Error> {
    let known: Vec<String> = others
        .iter()
        .filter(|(name, value)| changes_nothing(name, value).is_some())
        .map(|(name, _)| name.clone())
        .collect();
    for name in known {
        if let Some(value) = others.remove(&name)
            && changes_nothing(&name, &value) != Some(true)
        {
            let message = format!("`{name}` is not supported by this server yet; leave it out");
            return Err(Error::unsupported(name, message));
        }
    }
    Ok(())
}

/// Refuses the fields of other endpoints that have another name here.
fn refuse_others(generation: &Generation) -> Result<(), Error> {
    let Generation { n, max_tokens, state_id, session_id, store_state, detach, stream_options, .. } = generation;
    for (name, given, instead) in [
        ("n", n.is_some_and(|n| n != 1), "a response has one answer"),
        ("max_tokens", max_tokens.is_some(), "use `max_output_tokens`"),
        ("state_id", state_id.is_some(), "use `previous_response_id`"),
        ("session_id", session_id.is_some(), "use `conversation`"),
        ("store_state", store_state.is_some(), "use `store`"),
        ("detach", detach.is_some_and(|detach| detach), "use `background`"),
        (
            "stream_options.include_usage",
            stream_options.as_ref().is_some_and(|options| options.include_usage == Some(true)),
            "the last event of a response has its usage",
        ),
    ] {
        if given {
            return Err(Error::unsupported(name, format!("`{name}` is no parameter of responses: {instead}")));
        }
    }
    Ok(())
}

/// Refuses what a query cannot have shown.
pub fn check_included(include: Option<String>) -> Result<(), Error> {
    include.map_or(Ok(()), |name| check_includable("include", &name))
}

fn check_include(include: &[String]) -> Result<(), Error> {
    include.iter().enumerate().try_for_each(|(at, name)| check_includable(&format!("include[{at}]"), name))
}

fn check_includable(param: &str, name: &str) -> Result<(), Error> {
    if INCLUDABLE.contains(&name) {
        return Ok(());
    }
    Err(Error::unsupported(param, format!("`{param}`: `{name}` is not supported by this server yet")))
}

/// The id of a conversation that is named by it, or by an object.
fn conversation(given: Value) -> Result<Option<String>, Error> {
    match given {
        Value::Null => Ok(None),
        Value::String(id) => Ok(Some(id)),
        Value::Object(fields) if fields.get("id").is_some_and(Value::is_string) => {
            Ok(fields["id"].as_str().map(String::from))
        }
        _ => Err(Error::Invalid {
            param: Some("conversation".into()),
            code: "invalid_type",
            message: "`conversation` must be an id, or an object with an `id`".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::openai::fixture::{blamed, card};
    use serde_json::json;

    fn check(body: Value) -> Result<Checked, Error> {
        let (request, ignored) = ResponseRequest::read(&JsonBody::from(body.to_string().as_str()))?;
        request.check("resp_1", &card(), ignored)
    }

    #[test]
    fn the_neutral_is_never_refused() {
        let body = json!({
            "input": "hi", "tools": [], "tool_choice": "auto", "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "reasoning": {"effort": null}, "parallel_tool_calls": true, "max_tool_calls": 3, "include": [],
            "truncation": "auto", "metadata": {"a": "b"}, "user": "me", "service_tier": "auto", "prompt": null,
            "background": false, "top_logprobs": 0, "conversation": null, "odd": 1,
        });
        let checked = check(body).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(checked.ignored, ["odd"]);
        assert!(checked.ask.store && checked.items.len() == 1);
    }

    #[test]
    fn what_would_matter_is_refused_by_name() {
        for (name, value) in [
            ("tools", json!([{"type": "web_search"}])),
            ("tool_choice", json!("required")),
            ("text", json!({"format": {"type": "json_schema"}})),
            ("reasoning", json!({"effort": "high"})),
            ("reasoning", json!("high")),
            ("prompt", json!({"id": "p"})),
            ("top_logprobs", json!(2)),
            ("n", json!(2)),
            ("max_tokens", json!(5)),
            ("state_id", json!("st_1")),
            ("session_id", json!("s")),
            ("store_state", json!(true)),
            ("detach", json!(true)),
        ] {
            let refused = check(json!({"input": "hi", name: value})).map(|_| ());
            assert_eq!(blamed(refused), (name.into(), "unsupported_parameter"));
        }
        for (param, code, body) in [
            ("input", "missing_required_parameter", json!({})),
            ("input", "invalid_value", json!({"input": []})),
            ("include[0]", "unsupported_parameter", json!({"input": "a", "include": ["message.output_text.logprobs"]})),
            ("truncation", "invalid_value", json!({"input": "a", "truncation": "all"})),
            ("background", "invalid_value", json!({"input": "a", "background": true, "store": false})),
            ("max_output_tokens", "unsupported_parameter", json!({"input": "a", "max_output_tokens": 0})),
            ("metadata", "invalid_value", json!({"input": "a", "metadata": {"k": "v".repeat(513)}})),
            ("conversation", "invalid_type", json!({"input": "a", "conversation": 3})),
            ("conversation", "invalid_value", json!({"input": "a", "conversation": "c", "previous_response_id": "r"})),
        ] {
            assert_eq!(blamed(check(body).map(|_| ())), (param.into(), code));
        }
    }
}
