//! What a turn takes from a request besides its body.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::{HeaderMap, header, request::Parts};

use crate::api::{App, Caller, Error};
use crate::telemetry::clock;
use crate::types::StateId;

/// What a turn takes from a request besides its body.
#[derive(Clone, Debug)]
pub struct Head {
    pub caller: Caller,
    pub if_match: Option<StateId>,
    pub idempotency_key: Option<String>,
    /// Randomness for the response id.
    pub id: u128,
    /// The seed of a request that brings none.
    pub seed: u64,
}

impl FromRequestParts<Arc<App>> for Head {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Error> {
        Ok(Self {
            caller: Caller::from_request_parts(parts, app).await?,
            if_match: if_match(&parts.headers)?,
            idempotency_key: text_header(&parts.headers, "idempotency-key")?,
            id: clock::random_u128(),
            seed: clock::random_u64(),
        })
    }
}

/// The condition of a request on a session's head: the state id in `If-Match: "st_…"`.
pub fn if_match(headers: &HeaderMap) -> Result<Option<StateId>, Error> {
    let sent = text_header(headers, header::IF_MATCH.as_str())?;
    sent.as_deref().map(entity_tag).transpose()
}

fn text_header(headers: &HeaderMap, name: &str) -> Result<Option<String>, Error> {
    let mut values = headers.get_all(name).into_iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Error::invalid(name, format!("the header `{name}` can be given once")));
    }
    let text = value.as_bytes();
    if !(1..=255).contains(&text.len()) || !text.iter().all(u8::is_ascii_graphic) {
        let why = format!("the header `{name}` must be 1 to 255 visible ASCII characters without spaces");
        return Err(Error::invalid(name, why));
    }
    Ok(Some(String::from_utf8_lossy(text).into_owned()))
}

fn entity_tag(tag: &str) -> Result<StateId, Error> {
    let quoted = tag.trim().strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    quoted
        .and_then(|id| StateId::parse(id).ok())
        .ok_or_else(|| Error::invalid("if-match", "`If-Match` must be one state id in double quotes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_is_one_state_id_in_quotes() {
        let read = |tag: &str| if_match(&HeaderMap::from_iter([(header::IF_MATCH, tag.parse().unwrap())]));
        let state = StateId::new(1, 2);
        assert_eq!(read(&format!("\"{state}\"")).unwrap(), Some(state.clone()));
        assert_eq!(if_match(&HeaderMap::new()).unwrap(), None);
        for tag in ["", "*", state.as_str(), "\"x\"", "W/\"x\"", &"x".repeat(256)] {
            match read(tag) {
                Err(Error::Invalid { param: Some(param), .. }) => assert_eq!(param, "if-match"),
                other => panic!("{tag}: {other:?}"),
            }
        }
    }
}
