//! States as files: taken elsewhere, brought from there.

use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequest, Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde::Deserialize;
use utoipa::IntoParams;

use super::extract::{Name, Query, check_encoding, check_length};
use super::openai::ttl;
use super::refusals::{Refusals, Unavailable};
use super::states::{StateObject, state_id};
use super::{App, Caller, Error, ErrorBody};

const BINARY: &str = "application/octet-stream";

/// Download a stored state, to be imported elsewhere.
///
/// A safetensors file: each part of the recurrent state as an F32 tensor under its name, exact however the server stores
/// it; what the sequence has yet to read, and where it comes from, as JSON in the metadata; BLAKE3 of all bytes before as
/// the last tensor, `checksum`.
#[utoipa::path(
    get,
    path = "/v1/states/{id}/content",
    tag = "states",
    params(("id" = String, Path, description = "Id of a state")),
    responses(
        (status = 200, description = "The file", body = Vec<u8>, content_type = "application/octet-stream"),
        Refusals,
    ),
)]
pub async fn state_content(State(app): State<Arc<App>>, caller: Caller, Name(id): Name) -> Result<Response, Error> {
    let id = state_id(id)?;
    let file = app.sessions.content(&caller.tenant, &id).await?;
    let name = format!("attachment; filename=\"{id}.safetensors\"");
    let name = HeaderValue::try_from(name).expect("an id is made of ASCII letters and digits");
    let headers = [(header::CONTENT_TYPE, HeaderValue::from_static(BINARY)), (header::CONTENT_DISPOSITION, name)];
    Ok((headers, file).into_response())
}

/// How an imported state is kept.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ImportQuery {
    /// Seconds until the state may be removed; the server's default otherwise.
    #[param(minimum = 1)]
    ttl_s: Option<u64>,
}

/// Store a state that was downloaded here or elsewhere, as a new one.
///
/// It becomes the caller's, with a new id and time and no parent. It must be of a model that is served here, whole, finite,
/// and laid out as that model's states are.
#[utoipa::path(
    post,
    path = "/v1/states/import",
    tag = "states",
    params(ImportQuery),
    request_body(content = Vec<u8>, content_type = "application/octet-stream", description = "The file"),
    responses(
        (status = 200, description = "The new state", body = StateObject),
        (status = 409, description = "It is of weights that are not served here (`state_model_mismatch`)", body = ErrorBody),
        (status = 413, description = "The file is too large", body = ErrorBody),
        (status = 415, description = "The body is not `application/octet-stream`, or is compressed", body = ErrorBody),
        Refusals,
        Unavailable,
    ),
)]
pub async fn import_state(
    State(app): State<Arc<App>>,
    caller: Caller,
    Query(query): Query<ImportQuery>,
    BinaryBody(file): BinaryBody,
) -> Result<Json<StateObject>, Error> {
    let ttl_s = ttl("ttl_s", query.ttl_s)?;
    Ok(Json(app.sessions.import(&caller.tenant, file, ttl_s).await?.into()))
}

/// A body of bytes, with a limit of its own: states are larger than prompts.
pub struct BinaryBody(Bytes);

impl FromRequest<Arc<App>> for BinaryBody {
    type Rejection = Error;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Error> {
        // As with JSON: what browsers send across origins without asking first is refused.
        let sent = request.headers().get(header::CONTENT_TYPE).map(|sent| String::from_utf8_lossy(sent.as_bytes()));
        let essence = sent.as_deref().and_then(|sent| sent.split(';').next()).unwrap_or_default().trim();
        if !essence.eq_ignore_ascii_case(BINARY) {
            let sent = if essence.is_empty() { "nothing".into() } else { format!("`{essence}`") };
            return Err(Error::BinaryType(sent));
        }
        check_encoding(request.headers())?;
        let limit = app.limits.state_bytes;
        check_length(request.headers(), limit)?;
        let mut chunks = request.into_body().into_data_stream();
        let mut file = BytesMut::new();
        while let Some(chunk) = chunks.next().await {
            let broken = |e| Error::invalid("body", format!("the body could not be read: {e}"));
            let chunk = chunk.map_err(broken)?;
            if chunk.len() > limit - file.len() {
                return Err(Error::TooLarge { limit });
            }
            file.extend_from_slice(&chunk);
        }
        Ok(Self(file.freeze()))
    }
}
