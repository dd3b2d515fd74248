//! The fields that both generating endpoints share, and their way into a [`Turn`].

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;
use utoipa::ToSchema;

use super::head::Head;
use super::parameters::refuse_unknown;
use super::sampling::{Seed, Stop};
use crate::api::{ApiLimits, Error};
use crate::session::{Delivery, Input, ModelCard, Start, Turn, check_metadata};
use crate::types::{SessionId, StateId};

/// A hundred years: longer is the same as for ever, and sums of times cannot overflow.
const LONGEST_TTL_S: u64 = 100 * 365 * 24 * 3600;

/// Parameters of a generation, in completions and chats alike. `null` is the same as leaving a field out.
///
/// Defaults of sampling parameters are the model's (`GET /v1/models/{id}` shows them), else the ones named here.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, ToSchema)]
pub struct Generation {
    /// Id or alias of a served model; left out, the default model answers.
    pub model: Option<String>,
    /// Choices for each prompt; they share one reading of it. 1 by default.
    #[schema(minimum = 1)]
    pub n: Option<usize>,
    /// The most tokens to generate for each choice. 16 by default for completions, the server's default for chats.
    #[schema(minimum = 1)]
    pub max_tokens: Option<u64>,
    /// 0 is greedy. 1 by default.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// Sample from the smallest set of tokens whose probability reaches this; 0 keeps the best one. 1 by default.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// Sample from this many best tokens; 0 or -1 is all. 0 by default.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Drop tokens less likely than this fraction of the best one. 0 by default.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f64>,
    /// Subtracted from the logit of every token that the response already has. 0 by default.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f64>,
    /// Subtracted for each time that the response already has a token. 0 by default.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f64>,
    /// Divides positive and multiplies negative logits of recent tokens, the prompt's included. 1 by default.
    #[schema(exclusive_minimum = 0, maximum = 10)]
    pub repetition_penalty: Option<f64>,
    /// What is left of every count of the other penalties after each token. 1 by default: counts never fade.
    #[schema(minimum = 0, maximum = 1)]
    pub penalty_decay: Option<f64>,
    /// Added to the logits of tokens by id, from -100 (never) to 100 (always).
    pub logit_bias: Option<BTreeMap<String, f64>>,
    /// Text that ends a choice and is not part of it.
    pub stop: Option<Stop>,
    /// With the same seed the same request has the same answer. Any 64-bit integer; left out, a random one.
    #[schema(value_type = Option<i64>)]
    pub seed: Option<Seed>,
    /// Answer with server-sent events as the text comes, ended by `data: [DONE]`.
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    /// Continue from this stored state; the prompt or messages then hold only what is new.
    pub state_id: Option<String>,
    /// Continue from the head of this session, which is made when absent and moves to the new state on success. A conversation's id
    /// means the session that has its next turn.
    pub session_id: Option<String>,
    /// Store the state reached at the end. By default exactly when `state_id` or `session_id` is given.
    pub store_state: Option<bool>,
    /// Seconds until the stored state may be removed; the server's default otherwise.
    #[schema(minimum = 1)]
    pub state_ttl_s: Option<u64>,
    /// Begin from this configured initial state (a state-tuned file; `GET /v1/models/{id}` lists them) instead of the model's
    /// own. Only for what begins here: with `state_id` or a session that exists it is refused.
    pub initial_state: Option<String>,
    /// What is to be known of the stored state, and of the session from now on: up to 16 pairs of texts. Without a state to
    /// be stored it has no effect.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Go on generating when the reader is gone, and after a restart of the server; `GET /v1/streams/{response_id}` goes on
    /// reading. Otherwise a stream waits for a lost reader for the server's resume window, and a whole reply does not. Where what
    /// this needs cannot be written, the answer is as without it, and its end has a `state_error`.
    pub detach: Option<bool>,
}

/// Options of a stream; refused without `stream: true`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, ToSchema)]
#[serde(expecting = "an object")]
pub struct StreamOptions {
    /// Send one more chunk at the end, with `usage` and no choices; all other chunks then carry `"usage": null`.
    pub include_usage: Option<bool>,
    /// Accepted and without effect: nothing is obfuscated.
    pub include_obfuscation: Option<bool>,
    #[serde(flatten)]
    #[schema(ignore)]
    others: BTreeMap<String, IgnoredAny>,
}

/// A request that passed every check: what to run and how to answer.
#[derive(Clone, Debug)]
pub struct Order {
    pub turn: Turn,
    pub stream: Option<StreamOptions>,
    /// Names of fields that nobody knows.
    pub ignored: Vec<String>,
}

/// What an endpoint adds to the shared fields.
pub struct Part {
    pub input: Input,
    pub max_tokens: Option<u64>,
    /// `cmpl-`, `chatcmpl-` or `resp_`.
    pub prefix: &'static str,
    /// Names of fields that the endpoint found nobody to read.
    pub ignored: Vec<String>,
    /// What is needed to write the reply again.
    pub form: String,
    /// The whole response is stored.
    pub keep: bool,
}

/// Where requests meet the server: the model they name and the limits that hold.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    pub card: &'a ModelCard,
    pub limits: &'a ApiLimits,
    pub strict: bool,
}

impl Generation {
    pub fn choices(&self) -> usize {
        self.n.unwrap_or(1)
    }

    /// Whether the turn goes on from something stored, so that nothing new needs to be said.
    pub fn resumes(&self) -> bool {
        self.state_id.is_some() || self.session_id.is_some()
    }

    /// Checks everything the endpoints share and puts the turn together.
    pub fn order(self, part: Part, head: Head, rules: Rules) -> Result<Order, Error> {
        let limits = rules.limits;
        let prompts = match &part.input {
            Input::Prompts(prompts) => prompts.len(),
            Input::Chat(_) => 1,
        };
        let choices = self.choices();
        if choices == 0 {
            return Err(Error::invalid("n", "`n` must be at least 1"));
        }
        if choices.saturating_mul(prompts) > limits.choices {
            let message =
                format!("{prompts} prompts with {choices} choices each are more than {} answers", limits.choices);
            return Err(Error::invalid("n", message));
        }
        let stream = self.stream()?;
        let start = self.start(&head, prompts)?;
        let store = self.store(&start)?;
        let mut ignored = part.ignored;
        if let Some(options) = &stream {
            ignored.extend(options.others.keys().map(|name| format!("stream_options.{name}")));
        }
        if rules.strict {
            refuse_unknown(&ignored)?;
        }
        let delivery = Delivery {
            form: part.form,
            stream: stream.is_some(),
            detach: self.detach.unwrap_or(false),
            keep: part.keep,
        };
        let in_session = matches!(start, Start::Session { .. });
        let turn = Turn {
            response_id: format!("{}{:032x}", part.prefix, head.id),
            sampling: self.sampling(rules.card, head.seed)?,
            stop: self.stop(limits)?,
            ttl_s: self.ttl(store)?,
            metadata: metadata(self.metadata)?,
            initial_state: self.initial_state,
            tenant: head.caller.tenant,
            model: self.model,
            start,
            anew: None,
            input: part.input,
            choices,
            max_tokens: part.max_tokens,
            store,
            // Elsewhere a repeated request is simply answered again.
            idempotency_key: head.idempotency_key.filter(|_| in_session),
            delivery,
        };
        Ok(Order { turn, stream, ignored })
    }

    fn stream(&self) -> Result<Option<StreamOptions>, Error> {
        match (self.stream.unwrap_or(false), &self.stream_options) {
            (true, options) => Ok(Some(options.clone().unwrap_or_default())),
            (false, None) => Ok(None),
            (false, Some(_)) => {
                Err(Error::invalid("stream_options", "`stream_options` is only possible with `stream: true`"))
            }
        }
    }

    fn start(&self, head: &Head, prompts: usize) -> Result<Start, Error> {
        if head.if_match.is_some() && self.session_id.is_none() {
            return Err(Error::invalid("if-match", "`If-Match` is a condition on a session's head; give `session_id`"));
        }
        if self.state_id.is_some() && self.initial_state.is_some() {
            return Err(Error::invalid(
                "initial_state",
                "a turn begins from `state_id` or from `initial_state`, not both",
            ));
        }
        match (&self.state_id, &self.session_id) {
            (Some(_), Some(_)) => {
                Err(Error::invalid("session_id", "a turn begins from `state_id` or from `session_id`, not both"))
            }
            (None, None) => Ok(Start::Fresh),
            (Some(id), None) => {
                // What cannot be an id is unknown like any other.
                StateId::parse(id.as_str()).map(Start::State).map_err(|_| Error::UnknownState(id.clone()))
            }
            (None, Some(id)) => {
                let id = SessionId::parse(id.as_str()).map_err(|e| Error::invalid("session_id", e.to_string()))?;
                if prompts > 1 {
                    return Err(Error::invalid("session_id", "a session takes one prompt a turn"));
                }
                if self.choices() > 1 {
                    return Err(Error::invalid("session_id", "a session takes one answer a turn: `n` must be 1"));
                }
                Ok(Start::Session { id, if_match: head.if_match.clone(), begins: false })
            }
        }
    }

    fn store(&self, start: &Start) -> Result<bool, Error> {
        let store = self.store_state.unwrap_or(*start != Start::Fresh);
        if !store && matches!(start, Start::Session { .. }) {
            return Err(Error::invalid("store_state", "a turn of a session always stores its state"));
        }
        Ok(store)
    }

    fn ttl(&self, store: bool) -> Result<Option<u64>, Error> {
        match self.state_ttl_s {
            Some(_) if !store => Err(Error::invalid("state_ttl_s", "`state_ttl_s` needs `store_state: true`")),
            seconds => ttl("state_ttl_s", seconds),
        }
    }

    fn stop(&self, limits: &ApiLimits) -> Result<Vec<String>, Error> {
        let stop = self.stop.clone().map(|stop| stop.0).unwrap_or_default();
        if stop.len() > limits.stop_strings {
            let message = format!("{} stop strings are more than {}", stop.len(), limits.stop_strings);
            return Err(Error::invalid("stop", message));
        }
        if stop.iter().any(String::is_empty) {
            return Err(Error::invalid("stop", "a stop string must not be empty"));
        }
        if stop.iter().any(|text| text.len() > limits.stop_bytes) {
            return Err(Error::invalid("stop", format!("a stop string is longer than {} bytes", limits.stop_bytes)));
        }
        Ok(stop)
    }
}

/// Refuses a time to live that is none, or longer than any.
pub fn ttl(name: &'static str, seconds: Option<u64>) -> Result<Option<u64>, Error> {
    match seconds {
        Some(ttl) if !(1..=LONGEST_TTL_S).contains(&ttl) => {
            Err(Error::invalid(name, format!("`{name}` must be from 1 to {LONGEST_TTL_S}")))
        }
        ttl => Ok(ttl),
    }
}

/// Refuses metadata beyond OpenAI's limits.
pub fn metadata(given: Option<BTreeMap<String, String>>) -> Result<BTreeMap<String, String>, Error> {
    let pairs = given.unwrap_or_default();
    check_metadata(&pairs).map_err(|why| Error::invalid("metadata", why))?;
    Ok(pairs)
}

/// Refuses a token limit that leaves nothing to answer.
pub fn some_tokens(name: &'static str, limit: Option<u64>) -> Result<Option<u64>, Error> {
    match limit {
        Some(0) => Err(Error::unsupported(name, format!("`{name}` must be at least 1: 0 leaves nothing to answer"))),
        limit => Ok(limit),
    }
}
