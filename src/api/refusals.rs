//! Replies to requests that are not granted, as the documentation groups them.

use utoipa::IntoResponses;

use super::ErrorBody;

/// Replies to requests that are wrong in themselves.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "only for the documentation")]
pub enum Refusals {
    /// A parameter is wrong or not supported; `param` names it.
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// No valid API key.
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// No such model, state or session; one of another tenant looks the same.
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// The server failed. Its log tells more under the `x-request-id`.
    #[response(status = 500)]
    Failed(ErrorBody),
}

/// Further replies to turns.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "only for the documentation")]
pub enum Conflicts {
    /// `state_model_mismatch`, `initial_state_mismatch`, `session_busy`, or `session_conflict` (another server committed a
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
    /// The body is too large.
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// The body is not JSON.
    #[response(status = 415)]
    ContentType(ErrorBody),
}

/// Replies of a server that takes no turn now, with `retry-after` and `retry-after-ms`.
#[derive(IntoResponses)]
#[allow(dead_code, reason = "only for the documentation")]
pub enum Unavailable {
    /// The queue is full.
    #[response(status = 429)]
    Full(ErrorBody),
    /// Loading or shutting down.
    #[response(status = 503)]
    NotReady(ErrorBody),
}
