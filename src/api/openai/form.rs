//! What is kept of a request so that its reply can be written again, for a reader who comes back.

use serde::{Deserialize, Serialize};

use super::generation::Generation;
use crate::api::responses::Ask;

/// The endpoint of a request, and what its replies depend on.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum Form {
    Chat { include_usage: bool },
    Completion { include_usage: bool },
    Response(Box<Ask>),
}

impl Form {
    pub fn chat(generation: &Generation) -> Self {
        Self::Chat { include_usage: include_usage(generation) }
    }

    pub fn completion(generation: &Generation) -> Self {
        Self::Completion { include_usage: include_usage(generation) }
    }

    pub fn text(&self) -> String {
        serde_json::to_string(self).expect("a form is text and numbers under text keys")
    }

    /// `None` is a turn of which no stream was kept.
    pub fn read(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

fn include_usage(generation: &Generation) -> bool {
    generation.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
}
