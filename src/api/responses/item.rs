//! Items: what goes into a response and what comes out of it. Here they are messages.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::api::Error;
use crate::api::list::Identified;
use crate::session::StoredItem;
use crate::types::{Message, Role};

/// What a response is to answer: a text, or messages.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text, or a list of messages")]
pub enum Given {
    Text(String),
    #[schema(value_type = Vec<GivenItem>)]
    Items(Vec<Value>),
}

/// A message that a client gives.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(expecting = "a message, which is an object")]
pub struct GivenItem {
    /// `message`, or `item_reference`: what has the same `id`, in the conversation or in any stored response, is meant, and
    /// only that `id` is given. Left out, it is a message unless there is nothing but an `id`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// `user`, `system` (or `developer`) or `assistant`.
    pub role: Option<String>,
    /// A text, or parts of type `input_text`, `output_text` or `text`, which are joined by line breaks.
    #[schema(value_type = Option<Object>)]
    pub content: Option<Value>,
    /// Of what an `item_reference` means; otherwise accepted without effect, as in an item that is given back.
    pub id: Option<String>,
    /// Accepted without effect.
    pub status: Option<String>,
    /// Accepted without effect.
    pub phase: Option<String>,
    #[serde(flatten)]
    #[schema(ignore)]
    others: BTreeMap<String, Value>,
}

/// One message, as it is shown.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Item {
    pub id: String,
    /// `message`.
    #[serde(rename = "type")]
    #[schema(value_type = String)]
    pub kind: &'static str,
    /// `completed`, `incomplete` or `in_progress`.
    #[schema(value_type = String)]
    pub status: &'static str,
    pub role: String,
    pub content: Vec<Part>,
}

/// The text of a message.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    InputText {
        text: String,
    },
    OutputText {
        text: String,
        /// Always empty.
        #[schema(value_type = Vec<Object>)]
        annotations: [(); 0],
        /// Always empty: not supported yet.
        #[schema(value_type = Vec<Object>)]
        logprobs: [(); 0],
    },
}

impl Part {
    pub fn output(text: String) -> Self {
        Self::OutputText { text, annotations: [], logprobs: [] }
    }
}

impl Identified for Item {
    fn id(&self) -> &str {
        &self.id
    }
}

impl From<StoredItem> for Item {
    fn from(item: StoredItem) -> Self {
        let StoredItem { id, role, text, complete } = item;
        let part = if role == "assistant" { Part::output(text) } else { Part::InputText { text } };
        let status = if complete { "completed" } else { "incomplete" };
        Self { id, kind: "message", status, role, content: vec![part] }
    }
}

/// An item that was read.
#[derive(Clone, Debug, PartialEq)]
pub enum Brought {
    Message(StoredItem),
    /// The item of this id, named at this place of the request. `own` is what it is called where that id is taken.
    Reference {
        at: String,
        id: String,
        own: String,
    },
}

/// Reads what was given; `at` is the field it stands in. Ids begin with `prefix`. Also returns the fields nobody reads.
pub fn read(given: Given, at: &str, prefix: &str) -> Result<(Vec<Brought>, Vec<String>), Error> {
    let items = match given {
        Given::Text(text) => {
            let item = StoredItem { id: format!("{prefix}000"), role: "user".into(), text, complete: true };
            return Ok((vec![Brought::Message(item)], Vec::new()));
        }
        Given::Items(items) => items,
    };
    let mut ignored = Vec::new();
    let mut read = Vec::new();
    for (index, value) in items.into_iter().enumerate() {
        let place = format!("{at}[{index}]");
        let item: GivenItem = serde_json::from_value(value).map_err(|e| invalid_type(&place, &e.to_string()))?;
        ignored.extend(item.others.keys().map(|name| format!("{at}[].{name}")));
        read.push(item.check(&place, format!("{prefix}{index:03}"))?);
    }
    ignored.sort_unstable();
    ignored.dedup();
    Ok((read, ignored))
}

/// Items as the messages that are read.
pub fn messages(items: &[StoredItem]) -> Vec<Message> {
    let message = |item: &StoredItem| Message { role: role(&item.role), content: item.text.clone(), name: None };
    items.iter().map(message).collect()
}

fn role(name: &str) -> Role {
    match name {
        "assistant" => Role::Assistant,
        "user" => Role::User,
        _ => Role::System,
    }
}

fn invalid_type(at: &str, why: &str) -> Error {
    Error::Invalid { param: Some(at.into()), code: "invalid_type", message: format!("`{at}`: {why}") }
}

impl GivenItem {
    fn check(self, at: &str, own: String) -> Result<Brought, Error> {
        let says_nothing = self.role.is_none() && self.content.is_none();
        let kind = match self.kind.as_deref() {
            None if says_nothing && self.id.is_some() => "item_reference",
            kind => kind.unwrap_or("message"),
        };
        if kind == "item_reference" {
            let Some(id) = self.id.filter(|_| says_nothing) else {
                return Err(Error::invalid(
                    format!("{at}.id"),
                    format!("`{at}`: an `item_reference` has an `id` and nothing else"),
                ));
            };
            return Ok(Brought::Reference { at: format!("{at}.id"), id, own });
        }
        if kind != "message" {
            let message = format!("`{at}.type`: items of the type `{kind}` are not supported by this server yet");
            return Err(Error::unsupported(format!("{at}.type"), message));
        }
        let role = self.role.unwrap_or_default();
        if !["user", "system", "developer", "assistant"].contains(&role.as_str()) {
            let message = format!("`{at}.role` must be user, system, developer or assistant, not `{role}`");
            return Err(Error::invalid(format!("{at}.role"), message));
        }
        let text = text(self.content.unwrap_or_default(), &format!("{at}.content"))?;
        Ok(Brought::Message(StoredItem { id: own, role, text, complete: true }))
    }
}

fn text(content: Value, at: &str) -> Result<String, Error> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) if !parts.is_empty() => parts,
        _ => return Err(invalid_type(at, "it must be a text or a list of parts")),
    };
    let mut texts = Vec::new();
    for (index, part) in parts.into_iter().enumerate() {
        let at = format!("{at}[{index}]");
        let kind = part["type"].as_str().unwrap_or_default();
        if !["input_text", "output_text", "text"].contains(&kind) {
            let message = format!("`{at}.type`: this model reads text only, not `{kind}`");
            return Err(Error::unsupported(format!("{at}.type"), message));
        }
        let text = part["text"].as_str().ok_or_else(|| invalid_type(&format!("{at}.text"), "it must be a text"))?;
        texts.push(text.to_owned());
    }
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn given(value: Value) -> Result<Vec<(String, String)>, Error> {
        let given: Given = serde_json::from_value(value).expect("a text or a list");
        let read = |item| match item {
            Brought::Message(item) => (item.role, item.text),
            Brought::Reference { id, .. } => ("".into(), id),
        };
        Ok(super::read(given, "input", "msg_1")?.0.into_iter().map(read).collect())
    }

    #[test]
    fn a_text_is_a_message_of_the_user() {
        assert_eq!(given(json!("hi")).unwrap(), [("user".into(), "hi".into())]);
    }

    #[test]
    fn messages_are_read_in_all_their_forms() {
        let items = json!([
            {"role": "developer", "content": "Be kind."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "message", "id": "msg_0", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "text": "c", "annotations": []}]},
            {"type": "item_reference", "id": "msg_7"},
            {"id": "msg_8"},
        ]);
        let expected = [("developer", "Be kind."), ("user", "a\nb"), ("assistant", "c"), ("", "msg_7"), ("", "msg_8")];
        assert_eq!(given(items).unwrap(), expected.map(|(role, text)| (role.to_owned(), text.to_owned())));
    }

    #[test]
    fn what_is_no_text_is_refused_by_its_place() {
        for (item, param) in [
            (json!({"type": "function_call", "name": "f"}), "input[0].type"),
            (json!({"role": "robot", "content": "x"}), "input[0].role"),
            (json!({"role": "user"}), "input[0].content"),
            (json!({"role": "user", "content": []}), "input[0].content"),
            (json!({"role": "user", "content": [{"type": "input_image"}]}), "input[0].content[0].type"),
            (json!({"role": "user", "content": [{"type": "input_text"}]}), "input[0].content[0].text"),
            (json!({"role": 1}), "input[0]"),
            (json!({}), "input[0].role"),
            (json!({"type": "item_reference"}), "input[0].id"),
            (json!({"type": "item_reference", "id": "msg_7", "content": "x"}), "input[0].id"),
            (json!("hi"), "input[0]"),
        ] {
            match given(json!([item])) {
                Err(Error::Invalid { param: Some(blamed), .. }) => assert_eq!(blamed, param),
                other => panic!("{item}: {other:?}"),
            }
        }
    }
}
