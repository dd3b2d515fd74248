//! Chat messages as clients send them, and their way into plain text.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor, value::SeqAccessDeserializer};
use serde_json::Value;
use utoipa::ToSchema;

use crate::api::Error;
use crate::types::{Message, Role};

/// Parts of one content are joined by this, as the peers do.
const BETWEEN_PARTS: &str = "\n";

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(expecting = "a message, which is an object")]
pub struct ChatMessage {
    /// `system` (or `developer`), `user`, `assistant`, `tool` (or `function`).
    pub role: String,
    pub content: Option<Content>,
    /// Whose words they are, for templates that show it.
    pub name: Option<String>,
    /// Not supported yet: refused unless empty.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tool_calls: Option<Value>,
    /// Not supported yet: refused unless null.
    #[schema(value_type = Option<Object>)]
    pub function_call: Option<Value>,
    /// Which call a tool's message answers; templates do not show it.
    pub tool_call_id: Option<String>,
    /// Accepted back from earlier answers, without effect.
    pub refusal: Option<String>,
    /// Accepted back from earlier answers, without effect: thoughts are no part of the history.
    pub reasoning_content: Option<String>,
    #[serde(flatten)]
    #[schema(ignore)]
    others: BTreeMap<String, IgnoredAny>,
}

/// The text of a message, whole or in parts.
#[derive(Clone, Debug, PartialEq, ToSchema)]
#[serde(untagged)]
pub enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

/// One part of a content.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(expecting = "a part of a content, which is an object")]
pub struct ContentPart {
    /// Only `text` is supported.
    #[serde(rename = "type")]
    pub kind: String,
    pub text: Option<String>,
    #[serde(flatten)]
    #[schema(ignore)]
    others: BTreeMap<String, IgnoredAny>,
}

/// By hand, because an untagged enum forgets where in the parts something was wrong.
impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrParts;
        impl<'de> Visitor<'de> for TextOrParts {
            type Value = Content;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.into()))
            }
            fn visit_string<E: serde::de::Error>(self, text: String) -> Result<Content, E> {
                Ok(Content::Text(text))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Content, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(Content::Parts)
            }
        }
        deserializer.deserialize_any(TextOrParts)
    }
}

/// Checks every message and joins its parts.
pub fn messages(sent: Vec<ChatMessage>) -> Result<Vec<Message>, Error> {
    sent.into_iter().enumerate().map(|(index, message)| message.check(&format!("messages[{index}]"))).collect()
}

/// The fields of messages and parts that nobody reads, each once.
pub fn ignored(sent: &[ChatMessage]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for message in sent {
        names.extend(message.others.keys().map(|name| format!("messages[].{name}")));
        if let Some(Content::Parts(parts)) = &message.content {
            let of_parts = parts.iter().filter(|part| part.kind == "text").flat_map(|part| part.others.keys());
            names.extend(of_parts.map(|name| format!("messages[].content[].{name}")));
        }
    }
    names.sort_unstable();
    names.dedup();
    names
}

impl ChatMessage {
    fn check(self, at: &str) -> Result<Message, Error> {
        let role = match self.role.as_str() {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" | "function" => Role::Tool,
            other => {
                let message =
                    format!("`{at}.role` must be system, developer, user, assistant, tool or function, not `{other}`");
                return Err(Error::invalid(format!("{at}.role"), message));
            }
        };
        let calls = [("tool_calls", self.tool_calls), ("function_call", self.function_call)];
        for (name, value) in calls {
            if value.is_some_and(|value| value.as_array().is_none_or(|list| !list.is_empty())) {
                let message = format!("`{at}.{name}`: calls of tools are not supported by this server yet");
                return Err(Error::unsupported(format!("{at}.{name}"), message));
            }
        }
        let at = format!("{at}.content");
        let content = self.content.ok_or_else(|| Error::invalid(&at, format!("`{at}` must be text, not null")))?;
        Ok(Message { role, content: content.text(&at)?, name: self.name })
    }
}

impl Content {
    fn text(self, at: &str) -> Result<String, Error> {
        let parts = match self {
            Self::Text(text) => return Ok(text),
            Self::Parts(parts) => parts,
        };
        if parts.is_empty() {
            return Err(Error::invalid(at, format!("`{at}` must have at least one part")));
        }
        let texts: Result<Vec<String>, Error> = parts
            .into_iter()
            .enumerate()
            .map(|(index, part)| {
                let at = format!("{at}[{index}]");
                if part.kind != "text" {
                    let message = format!("`{at}.type`: this model reads text only, not `{}`", part.kind);
                    return Err(Error::unsupported(format!("{at}.type"), message));
                }
                part.text.ok_or_else(|| Error::invalid(format!("{at}.text"), format!("`{at}.text` is missing")))
            })
            .collect();
        Ok(texts?.join(BETWEEN_PARTS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::extract::JsonBody;
    use serde_json::json;

    #[derive(Debug, Deserialize)]
    struct Body {
        messages: Vec<ChatMessage>,
    }

    fn read(sent: Value) -> Result<Vec<Message>, Error> {
        let body = JsonBody::from(json!({ "messages": sent }).to_string().as_str());
        body.read::<Body>().and_then(|body| messages(body.messages))
    }

    fn blamed(sent: Value) -> String {
        match read(sent.clone()) {
            Err(Error::Invalid { param, .. }) => param.expect("a field is to blame"),
            other => panic!("{sent}: {other:?}"),
        }
    }

    #[test]
    fn roles_and_parts_become_plain_messages() {
        let read = read(json!([
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {"role": "assistant", "content": "c", "tool_calls": [], "refusal": null, "reasoning_content": "hm"},
            {"role": "tool", "content": "4", "tool_call_id": "call_1"},
            {"role": "function", "content": "5", "name": "add", "function_call": null},
            {"role": "system", "content": ""},
        ]));
        let expected = [
            (Role::System, "Be kind.", None),
            (Role::User, "a\nb", Some("Ann")),
            (Role::Assistant, "c", None),
            (Role::Tool, "4", None),
            (Role::Tool, "5", Some("add")),
            (Role::System, "", None),
        ]
        .map(|(role, content, name)| Message { role, content: content.into(), name: name.map(String::from) });
        assert_eq!(read.unwrap(), expected);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_index() {
        let user = json!({"role": "user", "content": "x"});
        let image = json!({"type": "image_url", "image_url": {"url": "data:"}});
        for (message, param) in [
            (json!({"role": "robot", "content": "x"}), "messages[1].role"),
            (json!({"role": "user", "content": null}), "messages[1].content"),
            (json!({"role": "user"}), "messages[1].content"),
            (json!({"role": "user", "content": 3}), "messages[1].content"),
            (json!({"role": "user", "content": []}), "messages[1].content"),
            (json!({"role": "user", "content": [{"type": "text", "text": "x"}, image]}), "messages[1].content[1].type"),
            (json!({"role": "user", "content": [{"type": "text"}]}), "messages[1].content[0].text"),
            (json!({"role": "user", "content": [{"type": "text", "text": 1}]}), "messages[1].content[0].text"),
            (json!({"role": "user", "content": ["x"]}), "messages[1].content[0]"),
            (json!({"role": "assistant", "tool_calls": [{"id": "x"}]}), "messages[1].tool_calls"),
            (json!({"role": "assistant", "content": "x", "function_call": {"name": "f"}}), "messages[1].function_call"),
            (json!({"content": "x"}), "messages[1]"),
            (json!("hi"), "messages[1]"),
            (json!(["user", "hi"]), "messages[1]"),
        ] {
            assert_eq!(blamed(json!([user, message.clone()])), param, "{message}");
        }
    }

    #[test]
    fn unknown_fields_are_listed_once() {
        let part = json!({"type": "text", "text": "x", "cache_control": {}});
        let body = json!({"messages": [
            {"role": "user", "content": [part, part], "mood": 1},
            {"role": "user", "content": "x", "mood": 2},
        ]});
        let body: Body = JsonBody::from(body.to_string().as_str()).read().unwrap();
        assert_eq!(ignored(&body.messages), ["messages[].content[].cache_control", "messages[].mood"]);
    }
}
