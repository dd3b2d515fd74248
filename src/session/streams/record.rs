//! What is stored of a stream.

use serde::{Deserialize, Serialize};

use super::Facts;
use crate::session::{Error, Event, StateError, StateReceipt, Turn};
use crate::telemetry::clock;
use crate::types::{Finish, SessionId, StateId};

/// An entry of a stream's journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::session) enum Entry {
    /// The first: all that is needed to begin again.
    Begun(Box<Begun>),
    /// Events, before anybody hears of them. None = another process goes on from here, or this one still lives.
    Told {
        /// Unix seconds.
        at: u64,
        events: Vec<Told>,
    },
}

impl Entry {
    pub fn told(events: Vec<Told>) -> Self {
        Self::Told { at: clock::unix_seconds(), events }
    }

    /// When it was written, in Unix seconds.
    pub fn at(&self) -> u64 {
        match self {
            Self::Begun(begun) => begun.facts.created,
            Self::Told { at, .. } => *at,
        }
    }

    pub fn events(self) -> Vec<Told> {
        match self {
            Self::Begun(_) => Vec::new(),
            Self::Told { events, .. } => events,
        }
    }
}

/// A response and how it began.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::session) struct Begun {
    pub facts: Facts,
    /// With its seed.
    pub turn: Turn,
    /// The state it began from, which a session may have left behind.
    pub parent: Option<StateId>,
}

/// An event and the tokens behind its text.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "is")]
pub(in crate::session) enum Told {
    Text {
        #[serde(default, skip_serializing_if = "is_first")]
        choice: usize,
        text: String,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ids: Vec<u32>,
    },
    Done {
        choice: usize,
        finish: Finish,
        completion_tokens: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        state: Option<StateReceipt>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<StateError>,
    },
    Failed {
        message: String,
        /// Another turn of the session was committed first; this one's state may be kept without it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        conflict: Option<Conflict>,
    },
    Cancelled,
}

/// What a turn that lost a race was for, and what is left of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::session) struct Conflict {
    session: SessionId,
    state: Option<StateId>,
}

/// A response that has ended, with all its events.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::session) struct Answer {
    pub facts: Facts,
    /// Unix seconds.
    pub ended: u64,
    pub events: Vec<Told>,
    /// It is kept until it is deleted; otherwise for the resume window.
    pub kept: bool,
}

impl Answer {
    /// Whether nobody can ask for it any more.
    pub fn is_over(&self, window_s: u64) -> bool {
        !self.kept && self.ended.saturating_add(window_s) < clock::unix_seconds()
    }
}

fn is_first(choice: &usize) -> bool {
    *choice == 0
}

impl Told {
    pub fn new(event: &Event, ids: &[u32]) -> Self {
        match event.clone() {
            Event::Text { choice, text } => Self::Text { choice, text, ids: ids.to_vec() },
            Event::Done { choice, finish, completion_tokens, stored } => {
                let (state, error) = match stored {
                    None => (None, None),
                    Some(Ok(receipt)) => (Some(receipt), None),
                    Some(Err(error)) => (None, Some(error)),
                };
                Self::Done { choice, finish, completion_tokens, state, error }
            }
            Event::Failed(Error::Cancelled) => Self::Cancelled,
            Event::Failed(Error::Engine(message)) => Self::Failed { message, conflict: None },
            Event::Failed(error) => {
                let message = error.to_string();
                let conflict = match error {
                    Error::TurnConflict { session, state } => Some(Conflict { session, state }),
                    _ => None,
                };
                Self::Failed { message, conflict }
            }
        }
    }

    pub fn event(self) -> Event {
        match self {
            Self::Text { choice, text, .. } => Event::Text { choice, text },
            Self::Done { choice, finish, completion_tokens, state, error } => {
                Event::Done { choice, finish, completion_tokens, stored: state.map(Ok).or(error.map(Err)) }
            }
            Self::Failed { conflict: Some(Conflict { session, state }), .. } => {
                Event::Failed(Error::TurnConflict { session, state })
            }
            Self::Failed { message, conflict: None } => Event::Failed(Error::Engine(message)),
            Self::Cancelled => Event::Failed(Error::Cancelled),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_back_from_the_store() {
        let session = SessionId::parse("s").expect("a name");
        let again = |event: &Event| {
            let json = serde_json::to_string(&Told::new(event, &[1, 2])).expect("JSON");
            serde_json::from_str::<Told>(&json).expect("the same").event()
        };
        let lost = |code| Err(StateError { code, message: "m".into() });
        let done = |stored| Event::Done { choice: 1, finish: Finish::Length, completion_tokens: 9, stored };
        for event in [
            Event::Text { choice: 0, text: "a\n".into() },
            done(None),
            done(Some(lost(StateError::STORE))),
            done(Some(lost(StateError::QUOTA))),
            Event::Failed(Error::Cancelled),
            Event::Failed(Error::Engine("e".into())),
            Event::Failed(Error::TurnConflict { session: session.clone(), state: Some(StateId::new(1, 2)) }),
            Event::Failed(Error::TurnConflict { session, state: None }),
        ] {
            assert_eq!(format!("{:?}", again(&event)), format!("{event:?}"));
        }
        // Of other errors their message is left.
        let other = again(&Event::Failed(Error::Store("s".into())));
        assert!(matches!(other, Event::Failed(Error::Engine(message)) if message.contains("store failed: s")));
    }
}
