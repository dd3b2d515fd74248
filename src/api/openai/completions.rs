//! `POST /v1/completions`: text goes on.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::form::Form;
use super::generation::{Generation, Order, Part, Rules, some_tokens};
use super::head::Head;
use super::parameters::sort_out;
use super::prompts::Prompts;
use super::reply::{self, Chunk, FinishReason, Kept, Reply, Shape};
use crate::api::extract::JsonBody;
use crate::api::record::Record;
use crate::api::refusals::{Conflicts, Refusals, Unavailable};
use crate::api::{App, Error};
use crate::session::Input;
use crate::types::Finish;

/// OpenAI's.
const DEFAULT_MAX_TOKENS: u64 = 16;

/// A text to go on with.
///
/// Not supported yet, and refused unless neutral: `logprobs`, `echo`, `suffix`, `best_of` (other than 1 or `n`), and
/// what chats refuse. Accepted without effect: `user`, and what chats accept so. Unknown fields are accepted and listed in the header `x-ignored-params`.
#[derive(Clone, Debug, ToSchema)]
pub struct CompletionRequest {
    #[serde(flatten)]
    pub generation: Generation,
    #[serde(flatten)]
    pub own: CompletionFields,
}

/// The fields that only completions have.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct CompletionFields {
    /// A text, several texts, the token ids of a text, or those of several. Left out or empty: the beginning of a
    /// document or, with a state, just go on.
    pub prompt: Option<Prompts>,
}

impl CompletionRequest {
    /// Reads the body; also returns the names of fields that nobody knows.
    pub fn read(body: &JsonBody) -> Result<(Self, Vec<String>), Error> {
        let (generation, own, others) = body.split_both::<Generation, CompletionFields>()?;
        let ignored = sort_out(others, generation.choices())?;
        Ok((Self { generation, own }, ignored))
    }

    /// Checks the request and makes an order of it.
    pub fn order(self, ignored: Vec<String>, head: Head, rules: Rules) -> Result<Order, Error> {
        let prompts = self.own.prompt.unwrap_or_default().check(&rules)?;
        let max_tokens = some_tokens("max_tokens", self.generation.max_tokens)?.or(Some(DEFAULT_MAX_TOKENS));
        let form = Form::completion(&self.generation).text();
        let part = Part { input: Input::Prompts(prompts), max_tokens, prefix: "cmpl-", ignored, form, keep: false };
        self.generation.order(part, head, rules)
    }
}

/// How completions look on the wire.
pub struct TextCompletion;

impl Shape for TextCompletion {
    type Choice = CompletionChoice;
    type Piece = CompletionPiece;
    const OBJECT: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";
    const SERVICE_TIER: Option<&'static str> = None;

    fn choice(index: usize, text: String, finish: Finish, kept: Kept) -> CompletionChoice {
        CompletionChoice { text, index, logprobs: (), finish_reason: finish, kept }
    }
    fn opening(_: usize) -> Option<CompletionPiece> {
        None
    }
    fn piece(index: usize, text: String) -> CompletionPiece {
        CompletionPiece { text, index, logprobs: (), finish_reason: None, kept: Kept::default() }
    }
    fn last(index: usize, finish: Finish, kept: Kept) -> CompletionPiece {
        CompletionPiece { text: String::new(), index, logprobs: (), finish_reason: Some(finish), kept }
    }
}

/// One answer to one prompt.
#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    pub text: String,
    /// Prompt × `n` + choice.
    pub index: usize,
    /// Always null: not supported yet.
    #[schema(value_type = Option<Object>, required = true)]
    pub logprobs: (),
    #[schema(value_type = FinishReason)]
    pub finish_reason: Finish,
    #[serde(flatten)]
    pub kept: Kept,
}

/// A part of one answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionPiece {
    /// To append.
    pub text: String,
    /// Prompt × `n` + choice.
    pub index: usize,
    /// Always null: not supported yet.
    #[schema(value_type = Option<Object>, required = true)]
    pub logprobs: (),
    /// Null before the last piece.
    #[schema(value_type = Option<FinishReason>, required = true)]
    pub finish_reason: Option<Finish>,
    #[serde(flatten)]
    pub kept: Kept,
}

/// Generate text that goes on from a prompt, or from a stored state.
///
/// With `stream: true` the reply is a stream of server-sent events, each a `Chunk`, ended by `data: [DONE]`. A failure
/// after the stream has begun is one last event that holds an `error`.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "generate",
    params(
        ("If-Match" = Option<String>, Header, description = "A state id in double quotes: run only if it is the session's head"),
        ("Idempotency-Key" = Option<String>, Header, description = "On a session turn: a repeated key returns the committed turn"),
    ),
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answers", content(
            (Reply<CompletionChoice> = "application/json"),
            (Chunk<CompletionPiece> = "text/event-stream"),
        ), headers(
            ("x-state-id" = String, description = "The stored state, when there is one answer and no stream"),
            ("x-ignored-params" = String, description = "Fields of the request that nobody knows"),
        )),
        Refusals,
        Conflicts,
        Unavailable,
    ),
)]
pub async fn completions(
    State(app): State<Arc<App>>,
    head: Head,
    record: Record,
    body: JsonBody,
) -> Result<Response, Error> {
    let (request, ignored) = CompletionRequest::read(&body)?;
    let card = app.card(request.generation.model.as_deref())?;
    let order = request.order(ignored, head, app.rules(&card))?;
    reply::respond::<TextCompletion>(&app, order, record).await
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{blamed, card, head, lenient};
    use super::*;
    use crate::api::ApiLimits;
    use crate::session::Start;
    use crate::types::{SessionId, StateId};
    use serde_json::{Value, json};

    fn order_with(body: &Value, head: Head, rules: Rules) -> Result<Order, Error> {
        let (request, ignored) = CompletionRequest::read(&JsonBody::from(body.to_string().as_str()))?;
        request.order(ignored, head, rules)
    }

    fn order(body: Value) -> Result<Order, Error> {
        lenient(|rules| order_with(&body, head(), rules))
    }

    #[test]
    fn defaults_are_openai_s_below_the_model_s() {
        let Order { turn, stream, ignored } = order(json!({"prompt": "a"})).unwrap();
        assert_eq!(turn.response_id, format!("cmpl-{:032x}", 0xabc));
        assert_eq!((turn.model, turn.choices, turn.max_tokens), (None, 1, Some(16)));
        assert_eq!((turn.start, turn.store, turn.ttl_s), (Start::Fresh, false, None));
        assert_eq!((turn.initial_state, turn.idempotency_key), (None, None));
        assert_eq!(turn.sampling, crate::types::Sampling { seed: 77, ..card().sampling });
        assert!(turn.stop.is_empty() && stream.is_none() && ignored.is_empty());
    }

    #[test]
    fn every_parameter_reaches_the_turn() {
        let body = json!({
            "model": "demo", "prompt": ["a", "b"], "n": 2, "max_tokens": 5, "temperature": 0, "top_p": 0, "top_k": 40,
            "min_p": 0.25, "presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.5,
            "penalty_decay": 0.5, "logit_bias": {"7": -100, "10": 1.5}, "stop": ["x", "\n"], "seed": -1,
            "store_state": true, "state_ttl_s": 60, "initial_state": "tuned", "stream": true,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true}, "user": "u", "mirostat": 2,
        });
        let Order { turn, stream, ignored } = order(body).unwrap();
        assert_eq!((turn.model.as_deref(), turn.choices, turn.max_tokens), (Some("demo"), 2, Some(5)));
        let expected = crate::types::Sampling {
            temperature: 0.0,
            top_p: 0.0,
            top_k: 40,
            min_p: 0.25,
            presence_penalty: -2.0,
            frequency_penalty: 2.0,
            repetition_penalty: 1.5,
            penalty_decay: 0.5,
            logit_bias: vec![(7, -100.0), (10, 1.5)],
            seed: u64::MAX,
        };
        assert_eq!(turn.sampling, expected);
        assert_eq!(turn.stop, ["x", "\n"]);
        assert_eq!((turn.store, turn.ttl_s, turn.initial_state.as_deref()), (true, Some(60), Some("tuned")));
        assert_eq!(stream.unwrap().include_usage, Some(true));
        assert_eq!(ignored, ["mirostat", "stream_options.continuous_usage_stats"]);
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        for (name, value) in [
            ("temperature", json!(-0.1)),
            ("temperature", json!(2.1)),
            ("temperature", json!("hot")),
            ("top_p", json!(1.1)),
            ("top_p", json!(-0.1)),
            ("top_k", json!(-2)),
            ("top_k", json!(1.5)),
            ("min_p", json!(2)),
            ("presence_penalty", json!(2.5)),
            ("frequency_penalty", json!(-2.5)),
            ("repetition_penalty", json!(0)),
            ("repetition_penalty", json!(-1)),
            ("repetition_penalty", json!(11)),
            ("penalty_decay", json!(1.01)),
            ("n", json!(0)),
            ("n", json!(129)),
            ("n", json!(-1)),
            ("n", json!(18446744073709551615_u64)),
            ("max_tokens", json!(0)),
            ("max_tokens", json!(-1)),
            ("max_tokens", json!(1.5)),
            ("seed", json!(1.5)),
            ("stop", json!("")),
            ("stop", json!(["a", ""])),
            ("stop", json!(vec!["x"; 17])),
            ("stop", json!(vec!["x"; 10_000])),
            ("stop", json!("x".repeat(1025))),
            ("stop", json!(3)),
            ("stop[0]", json!([3])),
            ("stream", json!("yes")),
            ("stream_options", json!({})),
            ("logit_bias", json!([1])),
            ("logit_bias.x", json!({"x": 1})),
            ("logit_bias.-1", json!({"-1": 1})),
            ("logit_bias.07", json!({"07": 1})),
            ("logit_bias.1000", json!({"1000": 1})),
            ("logit_bias.5", json!({"5": 100.5})),
            ("logit_bias.5", json!({"5": "much"})),
            ("state_ttl_s", json!(5)),
            ("session_id", json!("a/b")),
            ("session_id", json!("")),
            ("store_state", json!(1)),
            ("logprobs", json!(0)),
            ("echo", json!(true)),
            ("best_of", json!(2)),
            ("suffix", json!("x")),
        ] {
            let field = name.split(['.', '[']).next().unwrap();
            assert_eq!(blamed(order(json!({"prompt": "a", field: value}))).0, name, "{value}");
        }
        let n_of_many = json!({"prompt": vec!["a"; 60], "n": 3});
        assert_eq!(blamed(order(n_of_many)).0, "n");
    }

    #[test]
    fn seeds_are_any_64_bits() {
        for (seed, expected) in
            [(json!(0), 0), (json!(i64::MIN), 1 << 63), (json!(u64::MAX), u64::MAX), (json!(null), 77)]
        {
            assert_eq!(order(json!({"prompt": "a", "seed": seed})).unwrap().turn.sampling.seed, expected);
        }
        // Larger than JSON integers of 64 bits.
        let huge = JsonBody::from(r#"{"prompt": "a", "seed": 18446744073709551616}"#);
        assert_eq!(blamed(CompletionRequest::read(&huge)).0, "seed");
    }

    #[test]
    fn null_is_the_same_as_nothing() {
        let names = crate::api::extract::fields_of::<Generation>();
        let body: serde_json::Map<String, Value> = names.iter().map(|name| ((*name).into(), Value::Null)).collect();
        assert_eq!(format!("{:?}", order(body.into()).unwrap()), format!("{:?}", order(json!({})).unwrap()));
    }

    #[test]
    fn turns_begin_where_they_say() {
        let state = StateId::new(1, 2);
        let turn = order(json!({"prompt": ["", "b"], "state_id": state.as_str()})).unwrap().turn;
        assert_eq!((turn.start, turn.store), (Start::State(state.clone()), true));
        let turn = order(json!({"state_id": state.as_str(), "store_state": false})).unwrap().turn;
        assert!(!turn.store);
        let session = SessionId::parse("chat:1").unwrap();
        let conditional = Head { if_match: Some(state.clone()), idempotency_key: Some("once".into()), ..head() };
        let body = json!({"prompt": "a", "session_id": "chat:1", "state_ttl_s": 9});
        let turn = lenient(|rules| order_with(&body, conditional.clone(), rules)).unwrap().turn;
        assert_eq!(turn.start, Start::Session { id: session, if_match: Some(state.clone()), begins: false });
        assert_eq!((turn.store, turn.ttl_s, turn.idempotency_key.as_deref()), (true, Some(9), Some("once")));
        // Elsewhere an idempotency key has no meaning, and a condition none that could hold.
        let key_only = Head { if_match: None, ..conditional.clone() };
        assert_eq!(lenient(|rules| order_with(&json!({}), key_only, rules)).unwrap().turn.idempotency_key, None);
        assert_eq!(blamed(lenient(|rules| order_with(&json!({}), conditional, rules))).0, "if-match");
    }

    #[test]
    fn contradictory_beginnings_are_refused() {
        let state = StateId::new(1, 2).to_string();
        for (body, param) in [
            (json!({"state_id": state, "session_id": "s"}), "session_id"),
            (json!({"session_id": "s", "n": 2}), "session_id"),
            (json!({"session_id": "s", "prompt": ["a", "b"]}), "session_id"),
            (json!({"session_id": "s", "store_state": false}), "store_state"),
            (json!({"session_id": "s", "state_ttl_s": 0}), "state_ttl_s"),
            (json!({"session_id": "s", "state_ttl_s": u64::MAX}), "state_ttl_s"),
            (json!({"state_id": state, "initial_state": "x"}), "initial_state"),
        ] {
            assert_eq!(blamed(order(body.clone())), (param.into(), "invalid_value"), "{body}");
        }
        for unknown in ["st_x", "", "../../etc"] {
            let refused = order(json!({"state_id": unknown}));
            assert!(matches!(&refused, Err(Error::UnknownState(id)) if id == unknown), "{refused:?}");
        }
    }

    #[test]
    fn a_strict_server_refuses_what_nobody_knows() {
        let card = card();
        let rules = Rules { card: &card, limits: &ApiLimits::default(), strict: true };
        let refused = order_with(&json!({"prompt": "a", "mirostat": 2}), head(), rules);
        assert_eq!(blamed(refused), ("mirostat".into(), "unknown_parameter"));
        assert!(order_with(&json!({"prompt": "a", "user": "u", "tools": []}), head(), rules).is_ok());
    }
}
