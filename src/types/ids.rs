//! Names of things. Text ids are validated when made, so that any of them is safe as one segment of a storage key.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A sequence inside one engine: one choice of one running request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// A place in a model's state pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

/// Text that is not a valid id of its kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} must be {rule}")]
pub struct IdError {
    pub kind: &'static str,
    pub rule: &'static str,
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $rule:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks `text` against the rule of this kind of id.
            pub fn parse(text: impl Into<String>) -> Result<Self, IdError> {
                let text = text.into();
                let valid: fn(&str) -> bool = $valid;
                if valid(&text) { Ok(Self(text)) } else { Err(IdError { kind: $kind, rule: $rule }) }
            }
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::parse(text)
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

fn made_of(text: &str, longest: usize, allowed: fn(u8) -> bool) -> bool {
    (1..=longest).contains(&text.len()) && text.bytes().all(allowed)
}

text_id!(
    /// Who owns states, sessions and queue entries. Without configured keys everything belongs to [`Tenant::local`].
    Tenant, "tenant", "1 to 64 characters of a-z, 0-9, _ and -",
    |s| made_of(s, 64, |b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-')
);
text_id!(
    /// A client's own name for a conversation.
    SessionId, "session_id", "1 to 128 characters of A-Z, a-z, 0-9, _, ., : and -",
    |s| made_of(s, 128, |b| b.is_ascii_alphanumeric() || b"_.:-".contains(&b))
);
text_id!(
    /// The configured name of a state that fresh sequences can begin from.
    InitialName, "the name of an initial state", "1 to 128 characters of A-Z, a-z, 0-9, _, ., : and -",
    |s| made_of(s, 128, |b| b.is_ascii_alphanumeric() || b"_.:-".contains(&b))
);
text_id!(
    /// The name of one immutable snapshot: `st_`, 12 hex digits of milliseconds since 1970, 32 hex digits of randomness.
    /// Ids sort by the time they were made, so a listing by time is a range.
    StateId, "state_id", "st_ followed by 44 hexadecimal digits",
    |s| s.strip_prefix("st_").is_some_and(|d| {
        d.len() == 44 && d.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
);

impl Tenant {
    /// The tenant of a server that has no keys configured.
    pub fn local() -> Self {
        Self("local".into())
    }
}

impl StateId {
    /// The id for a state made at `millis` since 1970 with 128 bits of `randomness`.
    pub fn new(millis: u64, randomness: u128) -> Self {
        Self(format!("st_{:012x}{randomness:032x}", millis & 0xffff_ffff_ffff))
    }

    /// When it was made, in milliseconds since 1970.
    pub fn millis(&self) -> u64 {
        u64::from_str_radix(&self.0[3..15], 16).expect("twelve hexadecimal digits")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_safe_as_one_path_segment() {
        for bad in ["", "a/b", "a\0", "ü", "a b", &"x".repeat(129)] {
            assert!(SessionId::parse(bad).is_err(), "{bad:?}");
            assert!(Tenant::parse(bad).is_err(), "{bad:?}");
            assert!(StateId::parse(bad).is_err(), "{bad:?}");
        }
        assert!(SessionId::parse("Chat-1:a.b_c").is_ok());
        assert!(StateId::parse("st_../../etc").is_err());
    }

    #[test]
    fn state_ids_sort_by_time() {
        let (early, late) = (StateId::new(1_000, u128::MAX), StateId::new(1_001, 0));
        assert!(early < late);
        assert_eq!((early.millis(), late.millis()), (1_000, 1_001));
        assert_eq!(StateId::parse(early.to_string()), Ok(early));
    }
}
