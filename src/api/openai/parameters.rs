//! Parameters that are not fields of a request type: harmless ones, and ones whose only acceptable value is neutral.
//!
//! The rule of the contract: honour a parameter, or refuse it by name; never ignore it silently.

use std::collections::BTreeMap;
use std::convert::Infallible;

use axum::http::HeaderValue;
use axum::response::{IntoResponseParts, ResponseParts};
use serde_json::{Value, json};

use crate::api::Error;

/// The response header that lists what was not understood.
pub const IGNORED_PARAMS: &str = "x-ignored-params";
/// Field names come from the client; a header must stay small.
const LONGEST_HEADER: usize = 1024;

/// Metadata: no value of it changes an answer.
const HARMLESS: [&str; 6] =
    ["user", "safety_identifier", "service_tier", "store", "prompt_cache_key", "prompt_cache_retention"];

/// Whether a value changes nothing, though it is not [`neutral`].
type Accepts = fn(&Value) -> bool;

/// Known and not supported: refused unless `null`, `false`, `""`, `[]`, `{}` or this further value that changes nothing.
const UNSUPPORTED: [(&str, Accepts); 25] = [
    ("add_generation_prompt", |v| v == true),
    ("audio", never),
    ("best_of", |v| v == 1),
    ("continue_final_message", never),
    ("echo", never),
    ("function_call", |v| v == "none" || v == "auto"),
    ("functions", never),
    ("grammar", never),
    ("guided_choice", never),
    ("guided_grammar", never),
    ("guided_json", never),
    ("guided_regex", never),
    ("logprobs", never),
    ("modalities", |v| *v == json!(["text"])),
    ("parallel_tool_calls", |_| true),
    ("prediction", never),
    ("reasoning_effort", |v| v == "none"),
    ("response_format", |v| v["type"] == "text"),
    ("structured_outputs", never),
    ("suffix", never),
    ("tool_choice", |v| v == "none" || v == "auto"),
    ("tools", never),
    ("top_logprobs", |v| v == 0),
    ("verbosity", |v| v == "medium"),
    ("web_search_options", never),
];

fn never(_: &Value) -> bool {
    false
}

/// Values that ask for nothing, whatever the parameter.
pub fn neutral(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Number(_) => false,
    }
}

/// Refuses what would have mattered and returns the names of what nobody knows.
///
/// `best_of` equal to `choices` is neutral: it asks for every candidate to be returned.
pub fn sort_out(others: BTreeMap<String, Value>, choices: usize) -> Result<Vec<String>, Error> {
    let mut unknown = Vec::new();
    for (name, value) in others {
        if let Some((_, accepted)) = UNSUPPORTED.iter().find(|(known, _)| *known == name) {
            let same = name == "best_of" && value == choices;
            if !neutral(&value) && !accepted(&value) && !same {
                return Err(Error::unsupported(
                    &name,
                    format!("`{name}` is not supported by this server yet; leave it out"),
                ));
            }
        } else if !HARMLESS.contains(&name.as_str()) {
            unknown.push(name);
        }
    }
    Ok(unknown)
}

/// The error of strict mode.
pub fn refuse_unknown(unknown: &[String]) -> Result<(), Error> {
    match unknown.first() {
        None => Ok(()),
        Some(name) => Err(Error::Invalid {
            param: Some(name.clone()),
            code: "unknown_parameter",
            message: format!("unknown parameter `{name}`"),
        }),
    }
}

/// The names of fields that nobody knows, as a part of the reply: the header that lists them.
#[derive(Debug, Default)]
pub struct Ignored(pub Vec<String>);

impl IntoResponseParts for Ignored {
    type Error = Infallible;

    fn into_response_parts(self, mut parts: ResponseParts) -> Result<ResponseParts, Infallible> {
        if let Some(list) = ignored_header(&self.0) {
            parts.headers_mut().insert(IGNORED_PARAMS, list);
        }
        Ok(parts)
    }
}

/// The names as a header value, or `None` when there are none. Other than visible ASCII is escaped.
fn ignored_header(unknown: &[String]) -> Option<HeaderValue> {
    let mut list = String::new();
    for name in unknown {
        let name = name.escape_default().to_string();
        if list.len() + name.len() + 2 > LONGEST_HEADER {
            list.push_str(if list.is_empty() { "..." } else { ", ..." });
            break;
        }
        if !list.is_empty() {
            list.push_str(", ");
        }
        list.push_str(&name);
    }
    if list.is_empty() { None } else { HeaderValue::from_str(&list).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(name: &str, value: Value) -> Result<Vec<String>, Error> {
        sort_out(BTreeMap::from([(name.into(), value)]), 3)
    }

    #[test]
    fn neutral_values_are_never_refused() {
        for (name, _) in UNSUPPORTED {
            for value in [json!(null), json!(false), json!([]), json!({}), json!("")] {
                assert_eq!(sorted(name, value).unwrap(), Vec::<String>::new(), "{name}");
            }
        }
        for (name, value) in [
            ("best_of", json!(1)),
            ("best_of", json!(3)),
            ("response_format", json!({"type": "text"})),
            ("tool_choice", json!("none")),
            ("tool_choice", json!("auto")),
            ("function_call", json!("auto")),
            ("parallel_tool_calls", json!(true)),
            ("modalities", json!(["text"])),
            ("top_logprobs", json!(0)),
            ("verbosity", json!("medium")),
            ("reasoning_effort", json!("none")),
        ] {
            assert!(sorted(name, value).unwrap().is_empty(), "{name}");
        }
    }

    #[test]
    fn values_that_would_matter_are_refused_by_name() {
        for (name, value) in [
            ("logprobs", json!(0)),
            ("logprobs", json!(true)),
            ("top_logprobs", json!(3)),
            ("echo", json!(true)),
            ("best_of", json!(4)),
            ("suffix", json!("end")),
            ("tools", json!([{"type": "function"}])),
            ("tool_choice", json!("required")),
            ("functions", json!([{}])),
            ("function_call", json!({"name": "f"})),
            ("response_format", json!({"type": "json_object"})),
            ("response_format", json!("json")),
            ("modalities", json!(["text", "audio"])),
            ("audio", json!({"voice": "x"})),
            ("prediction", json!({"type": "content"})),
            ("reasoning_effort", json!("low")),
            ("verbosity", json!("high")),
            ("web_search_options", json!({"x": 1})),
            ("grammar", json!("root ::= x")),
            ("add_generation_prompt", json!(0)),
        ] {
            match sorted(name, value) {
                Err(Error::Invalid { param, code: "unsupported_parameter", .. }) => {
                    assert_eq!(param.as_deref(), Some(name))
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn harmless_ones_pass_and_unknown_ones_are_listed() {
        for name in HARMLESS {
            assert!(sorted(name, json!({"any": "thing"})).unwrap().is_empty());
        }
        let unknown = sorted("mirostat", json!(2)).unwrap();
        assert_eq!(unknown, ["mirostat"]);
        assert!(refuse_unknown(&unknown).is_err() && refuse_unknown(&[]).is_ok());
    }

    #[test]
    fn the_header_is_small_and_ascii() {
        assert_eq!(ignored_header(&[]), None);
        assert_eq!(ignored_header(&["a".into(), "b\r\nx: ü".into()]).unwrap(), r"a, b\r\nx: \u{fc}");
        let many = ignored_header(&vec!["x".repeat(100); 100]).unwrap();
        assert!(many.len() <= LONGEST_HEADER + 5 && many.to_str().unwrap().ends_with("..."));
    }
}
