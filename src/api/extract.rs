//! Reading requests: every rejection is an [`Error`] that names what is wrong.

use std::collections::BTreeMap;
use std::fmt;

use axum::RequestPartsExt;
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::{HeaderMap, StatusCode, header, request::Parts};
use serde::de::value::Error as Never;
use serde::de::{
    Deserialize, DeserializeOwned, DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::Value;
use std::sync::Arc;

use super::{App, Error};

/// A JSON body, still as bytes: several types read their own fields from it.
///
/// Reading twice is cheaper than a tree of values, and keeps the path of a wrong field, which serde's `flatten` loses.
#[derive(Clone, Debug)]
pub struct JsonBody(Bytes);

impl FromRequest<Arc<App>> for JsonBody {
    type Rejection = Error;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Error> {
        check_content_type(request.headers())?;
        check_encoding(request.headers())?;
        check_length(request.headers(), app.limits.body_bytes)?;
        let bytes = Bytes::from_request(request, app).await.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Error::TooLarge { limit: app.limits.body_bytes },
            _ => malformed(format!("the body could not be read: {}", rejection.body_text())),
        })?;
        Ok(Self(bytes))
    }
}

impl From<&str> for JsonBody {
    fn from(text: &str) -> Self {
        Self(Bytes::copy_from_slice(text.as_bytes()))
    }
}

impl JsonBody {
    /// Reads the fields that `T` knows and passes over the others.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, Error> {
        let mut json = serde_json::Deserializer::from_slice(&self.0);
        let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let path = error.path().to_string();
            let inner = error.into_inner();
            if !inner.is_data() {
                return malformed(format!("the body is not valid JSON: {inner}"));
            }
            // A path of "." is the body itself.
            let param = Some(path).filter(|path| path != ".");
            let place = param.as_deref().map(|param| format!("`{param}`: ")).unwrap_or_default();
            Error::Invalid { param, code: "invalid_type", message: format!("{place}{}", without_position(&inner)) }
        })?;
        json.end().map_err(|error| malformed(format!("the body goes on after its JSON: {error}")))?;
        Ok(value)
    }

    /// Reads the fields that `T` knows; also returns the others.
    pub fn split<T: DeserializeOwned>(&self) -> Result<(T, BTreeMap<String, Value>), Error> {
        // First, because it refuses what is not an object.
        let others = self.others(fields_of::<T>())?;
        Ok((self.read()?, others))
    }

    /// Reads the fields that `A` or `B` know; also returns those that neither does.
    pub fn split_both<A: DeserializeOwned, B: DeserializeOwned>(
        &self,
    ) -> Result<(A, B, BTreeMap<String, Value>), Error> {
        let others = self.others(&[fields_of::<A>(), fields_of::<B>()].concat())?;
        Ok((self.read()?, self.read()?, others))
    }

    /// The fields that are not in `known`, with their values.
    fn others(&self, known: &[&str]) -> Result<BTreeMap<String, Value>, Error> {
        let mut json = serde_json::Deserializer::from_slice(&self.0);
        Others { known }.deserialize(&mut json).map_err(|error| match error.is_data() {
            true => {
                malformed(format!("the body must be a JSON object with each field once: {}", without_position(&error)))
            }
            false => malformed(format!("the body is not valid JSON: {error}")),
        })
    }
}

fn malformed(message: String) -> Error {
    Error::Invalid { param: None, code: "invalid_json", message }
}

/// serde_json's message less its " at line 1 column 27": the field's path says it better.
fn without_position(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let position = format!(" at line {} column {}", error.line(), error.column());
    message.strip_suffix(&position).map(String::from).unwrap_or(message)
}

/// A browser sends other types across origins without asking first, so a missing one is refused as well.
fn check_content_type(headers: &HeaderMap) -> Result<(), Error> {
    let sent = headers.get(header::CONTENT_TYPE).ok_or_else(|| Error::ContentType("nothing".into()))?;
    let text = String::from_utf8_lossy(sent.as_bytes());
    let essence = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let json = essence == "application/json" || essence.starts_with("application/") && essence.ends_with("+json");
    if json { Ok(()) } else { Err(Error::ContentType(format!("`{essence}`"))) }
}

/// Refuses a body that is compressed: its size says nothing of what it becomes.
pub(super) fn check_encoding(headers: &HeaderMap) -> Result<(), Error> {
    let sent = headers.get_all(header::CONTENT_ENCODING).into_iter();
    match sent.map(|sent| String::from_utf8_lossy(sent.as_bytes())).find(|sent| !sent.eq_ignore_ascii_case("identity"))
    {
        Some(encoding) => Err(Error::Encoding(encoding.into_owned())),
        None => Ok(()),
    }
}

/// Refuses a body that is announced as too large before any of it is sent.
pub(super) fn check_length(headers: &HeaderMap, limit: usize) -> Result<(), Error> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit as u64) { Err(Error::TooLarge { limit }) } else { Ok(()) }
}

struct Others<'a> {
    known: &'a [&'a str],
}

impl<'de> DeserializeSeed<'de> for Others<'_> {
    type Value = BTreeMap<String, Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Others<'_> {
    type Value = BTreeMap<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut others = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if self.known.contains(&name.as_str()) {
                map.next_value::<IgnoredAny>()?;
            } else if others.insert(name.clone(), map.next_value()?).is_some() {
                return Err(A::Error::custom(format!("duplicate field `{name}`")));
            }
        }
        Ok(others)
    }
}

/// The names of the fields that `T`, a struct, reads.
pub fn fields_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    // It always fails: the point is what the derived code asks for on the way.
    let _ = T::deserialize(FieldNames(&mut names));
    names
}

struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = Never;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Never> {
        *self.0 = fields;
        Err(Never::custom("only the names were wanted"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Never> {
        Err(Never::custom("not a struct"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// The one variable of a route's path, percent-decoded.
pub struct Name(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        let Path(name) = parts.extract::<Path<String>>().await.map_err(|_| Error::NoRoute(parts.uri.path().into()))?;
        Ok(Self(name))
    }
}

/// The two variables of a route's path, percent-decoded.
pub struct Names(pub String, pub String);

impl<S: Send + Sync> FromRequestParts<S> for Names {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        let names = parts.extract::<Path<(String, String)>>().await;
        let Path((first, second)) = names.map_err(|_| Error::NoRoute(parts.uri.path().into()))?;
        Ok(Self(first, second))
    }
}

/// A query string; an unknown or malformed parameter is refused.
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        let query = axum::extract::Query::<T>::try_from_uri(&parts.uri);
        let axum::extract::Query(value) = query.map_err(|rejection| {
            let message = rejection.body_text();
            let message = message.strip_prefix("Failed to deserialize query string: ").unwrap_or(&message);
            // serde_path_to_error puts the parameter's name first.
            let param = message.split_once(": ").map(|(param, _)| param.into());
            Error::Invalid { param, code: "invalid_value", message: format!("query: {message}") }
        })?;
        Ok(Self(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Body {
        #[allow(dead_code)]
        count: Option<u32>,
        #[allow(dead_code)]
        list: Option<Vec<u8>>,
    }

    fn refusal(body: &str) -> (Option<String>, &'static str, String) {
        match JsonBody::from(body).read::<Body>() {
            Err(Error::Invalid { param, code, message }) => (param, code, message),
            other => panic!("{body}: {other:?}"),
        }
    }

    #[test]
    fn a_wrong_type_names_its_field() {
        let (param, code, message) = refusal(r#"{"count": "three"}"#);
        assert_eq!((param.as_deref(), code), (Some("count"), "invalid_type"));
        assert_eq!(message, r#"`count`: invalid type: string "three", expected u32"#);
        assert_eq!(refusal(r#"{"list": [1, 2, 300]}"#).0.as_deref(), Some("list[2]"));
        assert_eq!(refusal(r#"{"count": -1}"#).0.as_deref(), Some("count"));
        assert_eq!(refusal(r#"{"count": 1, "count": 2}"#).1, "invalid_type");
    }

    #[test]
    fn malformed_json_is_told_apart() {
        let deep = "[".repeat(100_000);
        for body in ["", "{", r#"{"count": 1"#, r#"{"count": 1} x"#, "{count: 1}", r#"{"x": "\ud800"}"#, &deep] {
            let others = JsonBody::from(body).others(&["count"]);
            let read = JsonBody::from(body).read::<Body>();
            let refused = [others.err(), read.err()].into_iter().flatten().next();
            match refused {
                Some(Error::Invalid { param: None, code: "invalid_json", .. }) => {}
                other => panic!("{body:.40}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_body_that_is_no_object_is_refused() {
        for body in ["[1, [2]]", "null", "3", r#""text""#] {
            assert!(JsonBody::from(body).others(&[]).is_err(), "{body}");
        }
    }

    #[test]
    fn fields_of_nobody_are_listed() {
        let others = JsonBody::from(r#"{"count": {"deep": [1]}, "a": 1, "b": null}"#).others(&["count"]).unwrap();
        assert_eq!(others, BTreeMap::from([("a".into(), Value::from(1)), ("b".into(), Value::Null)]));
    }

    #[test]
    fn only_json_is_read() {
        let check =
            |value: &str| check_content_type(&[(header::CONTENT_TYPE, value.parse().unwrap())].into_iter().collect());
        for good in ["application/json", "Application/JSON; charset=utf-8", "application/problem+json"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "", "text/x+json"] {
            assert!(check(bad).is_err(), "{bad}");
        }
        assert!(check_content_type(&HeaderMap::new()).is_err());
    }

    #[test]
    fn field_names_are_those_that_serde_reads() {
        #[derive(serde::Deserialize)]
        #[allow(dead_code)]
        struct Two {
            one: u8,
            #[serde(rename = "deux")]
            two: u8,
        }
        assert_eq!(fields_of::<Two>(), ["one", "deux"]);
        assert!(fields_of::<String>().is_empty());
    }
}
