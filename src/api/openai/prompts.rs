//! The prompts of a completion, in all the forms that they are sent in.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor, value::SeqAccessDeserializer};
use utoipa::ToSchema;

use super::generation::Rules;
use crate::api::Error;
use crate::session::Prompt;

/// The prompts of a request, all of one kind.
#[derive(Clone, Debug, PartialEq, ToSchema)]
#[schema(value_type = PromptSchema)]
pub struct Prompts(pub Vec<Prompt>);

/// A text, several texts, the token ids of a text, or those of several.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum PromptSchema {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    IdLists(Vec<Vec<u32>>),
}

impl Default for Prompts {
    /// One without any text.
    fn default() -> Self {
        Self(vec![Prompt::Text(String::new())])
    }
}

impl Prompts {
    /// The prompts, unless they are none, too many, or not this model's ids.
    pub fn check(self, rules: &Rules) -> Result<Vec<Prompt>, Error> {
        let Self(prompts) = self;
        let vocabulary = rules.card.vocabulary;
        if prompts.is_empty() {
            return Err(Error::invalid("prompt", "`prompt` must not be an empty list"));
        }
        if prompts.len() > rules.limits.prompts {
            let message = format!("{} prompts are more than {}", prompts.len(), rules.limits.prompts);
            return Err(Error::invalid("prompt", message));
        }
        for (index, prompt) in prompts.iter().enumerate() {
            let Prompt::Ids(ids) = prompt else { continue };
            if ids.is_empty() {
                return Err(Error::invalid("prompt", format!("prompt {index} is an empty list of token ids")));
            }
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
                let message = format!("prompt {index} has the token id {id}; ids of this model are below {vocabulary}");
                return Err(Error::invalid("prompt", message));
            }
        }
        Ok(prompts)
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyPrompts).map(Self)
    }
}

/// The first element of a list decides what all of them are, so that a mixed one is refused where it turns.
struct AnyPrompts;

impl<'de> Visitor<'de> for AnyPrompts {
    type Value = Vec<Prompt>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a string, a list of strings, a list of token ids or a list of such lists")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(vec![Prompt::Text(text.into())])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let Some(first) = seq.next_element::<Element>()? else { return Ok(Vec::new()) };
        match first {
            Element::Id(first) => {
                let mut ids = vec![first];
                while let Some(id) = seq.next_element()? {
                    ids.push(id);
                }
                Ok(vec![Prompt::Ids(ids)])
            }
            Element::Text(first) => {
                let mut texts = vec![Prompt::Text(first)];
                while let Some(text) = seq.next_element()? {
                    texts.push(Prompt::Text(text));
                }
                Ok(texts)
            }
            Element::Ids(first) => {
                let mut lists = vec![Prompt::Ids(first)];
                while let Some(ids) = seq.next_element()? {
                    lists.push(Prompt::Ids(ids));
                }
                Ok(lists)
            }
        }
    }
}

enum Element {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyElement;
        impl<'de> Visitor<'de> for AnyElement {
            type Value = Element;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.into()))
            }
            fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<Element, E> {
                u32::try_from(id).map(Element::Id).map_err(|_| E::custom(format!("{id} is no token id")))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Element, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(Element::Ids)
            }
        }
        deserializer.deserialize_any(AnyElement)
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{VOCABULARY, blamed, lenient};
    use super::*;
    use crate::api::extract::JsonBody;
    use serde_json::{Value, json};

    #[derive(Debug, Deserialize)]
    struct Body {
        prompt: Option<Prompts>,
    }

    fn prompts(body: Value) -> Result<Vec<Prompt>, Error> {
        let Body { prompt } = JsonBody::from(body.to_string().as_str()).read()?;
        lenient(|rules| prompt.unwrap_or_default().check(&rules))
    }

    #[test]
    fn all_prompt_forms_are_read() {
        let text = |text: &str| Prompt::Text(text.into());
        assert_eq!(prompts(json!({"prompt": "a"})).unwrap(), [text("a")]);
        assert_eq!(prompts(json!({"prompt": ["a", ""]})).unwrap(), [text("a"), text("")]);
        assert_eq!(prompts(json!({"prompt": [1, 2]})).unwrap(), [Prompt::Ids(vec![1, 2])]);
        assert_eq!(prompts(json!({"prompt": [[1, 2], [3]]})).unwrap(), [Prompt::Ids(vec![1, 2]), Prompt::Ids(vec![3])]);
        assert_eq!(prompts(json!({"prompt": null})).unwrap(), [text("")]);
        assert_eq!(prompts(json!({})).unwrap(), [text("")]);
    }

    #[test]
    fn wrong_prompts_are_refused_where_they_turn() {
        for (wrong, param) in [
            (json!([]), "prompt"),
            (json!([[]]), "prompt"),
            (json!([[1], []]), "prompt"),
            (json!(7), "prompt"),
            (json!({"text": "a"}), "prompt"),
            (json!([VOCABULARY]), "prompt"),
            (json!([[1], [VOCABULARY]]), "prompt"),
            (json!(["a", 1]), "prompt[1]"),
            (json!([1, "a"]), "prompt[1]"),
            (json!([1, [2]]), "prompt[1]"),
            (json!([[1], 2]), "prompt[1]"),
            (json!([[1, "a"]]), "prompt[0][1]"),
            (json!([[[1]]]), "prompt[0][0]"),
            (json!([-1]), "prompt[0]"),
            (json!([1, -1]), "prompt[1]"),
            (json!([1.5]), "prompt[0]"),
            (json!([5_000_000_000_u64]), "prompt[0]"),
            (json!([null]), "prompt[0]"),
            (json!(vec!["a"; 65]), "prompt"),
        ] {
            assert_eq!(blamed(prompts(json!({ "prompt": wrong }))).0, param, "{wrong}");
        }
    }
}
