//! Replies to requests that are not granted, as the documentation groups them.

use utoipa::IntoResponses;

use super::ErrorBody;

/// Replies to requests that are wrong in themselves.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "only for the documentation")]
pub enum Refusals {
    /// A parameter is wrong or not supported; `param` names it. `invalid_value`, `invalid_type`, `invalid_json`,
    /// `missing_required_parameter`, `unsupported_parameter`, `unknown_parameter` (of a server that is strict),
    /// `context_length_exceeded`, or `invalid_state`: what was brought is no state, or nothing can be computed from it.
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// No valid API key: `invalid_api_key`.
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// There is no such thing; one of another tenant looks the same. `model_not_found`, `state_not_found`, `session_not_found`,
    /// `response_not_found`, `conversation_not_found`, `item_not_found` or `unknown_url`; with 405, `method_not_allowed`.
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// The server failed: `store_failed`, `engine_failed` or `internal_error`; its log tells more under the `x-request-id`. Or
    /// what is stored is not what was written: `state_damaged`, `session_damaged`, `response_damaged` or
    /// `conversation_damaged`; asking again does not help, and it can be deleted (a stream as a response). Where the disk that holds states is full,
    /// read-only or not to be written, the message of `store_failed` says so, and nothing was changed.
    #[response(status = 500)]
    Failed(ErrorBody),
}

/// Further replies to turns.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "only for the documentation")]
pub enum Conflicts {
    /// `state_model_mismatch` (with `retry-after` of a response that waits for its weights), `initial_state_mismatch`, `session_busy`, `response_cancelled` (as the last event of a stream), or `session_conflict` (another server committed a
    /// turn first; the header `x-state-id` names the state of this one), with `x-should-retry: false`. `session_busy` with
    /// `retry-after` when the very turn is running, by its `Idempotency-Key`.
    #[response(status = 409)]
    Conflict(ErrorBody),
    /// `session_conflict`: the session's head is not what `If-Match` says.
    #[response(status = 412)]
    Precondition(ErrorBody),
    /// `state_quota_exceeded`: the tenant's stored states are as many, or as large, as they may be.
    #[response(status = 403)]
    Quota(ErrorBody),
    /// `request_too_large`: the body has more bytes than the server takes.
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// `unsupported_media_type`: the body is not JSON, or is compressed.
    #[response(status = 415)]
    ContentType(ErrorBody),
}

/// Replies of a server that takes no turn now, with `retry-after` and `retry-after-ms`.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "only for the documentation")]
pub enum Unavailable {
    /// `rate_limit_exceeded`: the queue is full.
    #[response(status = 429)]
    Full(ErrorBody),
    /// `loading` or `shutting_down`; `engine_stopped` is only mended by starting the server again.
    #[response(status = 503)]
    NotReady(ErrorBody),
}
