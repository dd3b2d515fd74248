//! A model, a caller and limits for the tests of this folder.

use super::generation::Rules;
use super::head::Head;
use crate::api::{ApiLimits, Caller, Error};
use crate::session::ModelCard;
use crate::types::{Sampling, Tenant};

pub const VOCABULARY: usize = 1000;

pub fn card() -> ModelCard {
    ModelCard {
        id: "demo".into(),
        aliases: Vec::new(),
        created: 1,
        generation: "v7".into(),
        layers: 2,
        width: 64,
        vocabulary: VOCABULARY,
        parameters: 1,
        weight_bytes: 1,
        state_bytes: 1,
        state_bytes_per_token: 0,
        context: None,
        fingerprint: "f".into(),
        tokenizer: "t".into(),
        template: "base".into(),
        stop: Vec::new(),
        stop_tokens: vec![0],
        sampling: Sampling { top_p: 0.5, penalty_decay: 0.996, ..Sampling::default() },
        initial_states: Vec::new(),
    }
}

pub fn head() -> Head {
    Head { caller: Caller { tenant: Tenant::local() }, if_match: None, idempotency_key: None, id: 0xabc, seed: 77 }
}

/// Calls `with` with the rules of a lenient server.
pub fn lenient<T>(with: impl FnOnce(Rules) -> T) -> T {
    with(Rules { card: &card(), limits: &ApiLimits::default(), strict: false })
}

/// The parameter and the code that a refusal names.
pub fn blamed<T: std::fmt::Debug>(result: Result<T, Error>) -> (String, &'static str) {
    match result {
        Err(Error::Invalid { param, code, .. }) => (param.unwrap_or_default(), code),
        other => panic!("{other:?}"),
    }
}
