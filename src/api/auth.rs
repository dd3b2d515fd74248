//! API keys: who is calling.

use std::fmt;
use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::{HeaderMap, header, request::Parts};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{App, Error};
use crate::types::Tenant;

/// A `[[key]]` of the configuration. The key itself is never stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// What the logs call it.
    pub name: String,
    /// SHA-256 of the key, in hexadecimal (`printf %s "$KEY" | sha256sum`).
    pub hash: KeyHash,
    /// Whose states and sessions the key opens.
    pub tenant: Tenant,
}

/// The SHA-256 digest of a key.
///
/// A plain digest is enough, as keys are random and long; a password would need a slow one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// The digest of a key as a client sends it.
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// Compares in a time that does not depend on where the digests differ.
    fn same(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
    }
}

impl TryFrom<String> for KeyHash {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        const RULE: &str = "a key's hash must be 64 hexadecimal digits, the SHA-256 of the key";
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(RULE);
        }
        let mut digest = [0; 32];
        for (byte, at) in digest.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| RULE)?;
        }
        Ok(Self(digest))
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl From<KeyHash> for String {
    fn from(hash: KeyHash) -> String {
        hash.to_string()
    }
}

/// Whoever sent a request, already checked: every handler under `/v1` asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub tenant: Tenant,
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Error> {
        identify(&app.keys, &parts.headers)
    }
}

/// Finds the caller's tenant; without configured keys everybody is [`Tenant::local`] and any key is accepted.
fn identify(keys: &[Key], headers: &HeaderMap) -> Result<Caller, Error> {
    if keys.is_empty() {
        return Ok(Caller { tenant: Tenant::local() });
    }
    let sent = presented(headers)
        .ok_or(Error::Unauthorized("this server needs an API key, in the header `Authorization: Bearer KEY`"))?;
    let hash = KeyHash::of(sent);
    // Every key is compared, so that the time does not tell which one was nearly right.
    let found = keys.iter().fold(None, |found, key| if key.hash.same(&hash) { Some(key) } else { found });
    let key = found.ok_or(Error::Unauthorized("this API key is not known here"))?;
    Ok(Caller { tenant: key.tenant.clone() })
}

/// The key in `Authorization: Bearer …` or, failing that, in `x-api-key`.
fn presented(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    bearer.or_else(|| headers.get("x-api-key")?.to_str().ok().map(str::trim)).filter(|key| !key.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn keys() -> Vec<Key> {
        [("one", "sk-first"), ("two", "sk-second")]
            .map(|(tenant, key)| Key {
                name: tenant.into(),
                hash: KeyHash::of(key),
                tenant: Tenant::parse(tenant).unwrap(),
            })
            .into()
    }

    fn tenant_of(keys: &[Key], header: &'static str, value: &'static str) -> Option<String> {
        let headers = HeaderMap::from_iter([(header.parse().unwrap(), HeaderValue::from_static(value))]);
        identify(keys, &headers).ok().map(|caller| caller.tenant.to_string())
    }

    #[test]
    fn without_keys_everybody_is_local() {
        assert_eq!(tenant_of(&[], "authorization", "Bearer anything").as_deref(), Some("local"));
        assert_eq!(identify(&[], &HeaderMap::new()).unwrap().tenant, Tenant::local());
    }

    #[test]
    fn each_key_opens_its_own_tenant() {
        for (header, value, tenant) in [
            ("authorization", "Bearer sk-first", Some("one")),
            ("authorization", "bearer  sk-second", Some("two")),
            ("x-api-key", "sk-second", Some("two")),
            ("authorization", "Bearer sk-third", None),
            ("authorization", "Bearer ", None),
            ("authorization", "sk-first", None),
            ("authorization", "Basic sk-first", None),
            ("x-other", "sk-first", None),
        ] {
            assert_eq!(tenant_of(&keys(), header, value).as_deref(), tenant, "{header}: {value}");
        }
    }

    #[test]
    fn hashes_are_what_sha256sum_prints() {
        let printed = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(KeyHash::of("abc").to_string(), printed);
        let read = KeyHash::try_from(printed.to_uppercase()).unwrap();
        assert!(read.same(&KeyHash::of("abc")) && !read.same(&KeyHash::of("abd")));
        for bad in ["", "abc", &"g".repeat(64), &"ü".repeat(32)] {
            assert!(KeyHash::try_from(bad.to_string()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_key_section_is_read_strictly() {
        let hash = "0".repeat(64);
        let good = format!(r#"{{"name": "ci", "hash": "{hash}", "tenant": "ci"}}"#);
        assert_eq!(serde_json::from_str::<Key>(&good).unwrap().tenant.as_str(), "ci");
        assert!(serde_json::from_str::<Key>(&good.replace("\"ci\"}", "\"Not a tenant\"}")).is_err());
        assert!(serde_json::from_str::<Key>(&good.replace("tenant", "tenants")).is_err());
    }
}
