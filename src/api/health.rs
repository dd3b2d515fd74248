//! What operators and their tools ask: is it alive, is it ready, how is it doing.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use serde::Serialize;
use utoipa::ToSchema;

use super::{App, Error, ErrorBody};

/// How the server is.
#[derive(Debug, Serialize, ToSchema)]
pub struct Status {
    /// `ok` or `ready`.
    #[schema(value_type = String)]
    pub status: &'static str,
}

/// Whether the process is alive. Needs no key.
#[utoipa::path(
    get,
    path = "/health",
    tag = "operate",
    security(()),
    responses((status = 200, description = "It is", body = Status)),
)]
pub async fn health() -> Json<Status> {
    Json(Status { status: "ok" })
}

/// Whether the server takes requests now: not while it loads or shuts down, nor when a model has stopped. Needs no key.
#[utoipa::path(
    get,
    path = "/ready",
    tag = "operate",
    security(()),
    responses(
        (status = 200, description = "It does", body = Status),
        (status = 503, description = "It does not yet or no more; see `retry-after`", body = ErrorBody),
    ),
)]
pub async fn ready(State(app): State<Arc<App>>) -> Result<Json<Status>, Error> {
    Error::not_ready(app.sessions.readiness()).map_or(Ok(Json(Status { status: "ready" })), Err)
}

/// Metrics in the Prometheus text format. Needs no key.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "operate",
    security(()),
    responses((status = 200, description = "All metrics", body = String, content_type = "text/plain")),
)]
pub async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.render())
}

/// Where to go from here.
#[derive(Debug, Serialize, ToSchema)]
pub struct Pointers {
    #[schema(value_type = String)]
    pub name: &'static str,
    #[schema(value_type = String)]
    pub version: &'static str,
    /// Documentation to read and try.
    #[schema(value_type = String)]
    pub docs: &'static str,
    /// The same for programs.
    #[schema(value_type = String)]
    pub openapi: &'static str,
    /// Base URL for OpenAI clients.
    #[schema(value_type = String)]
    pub api: &'static str,
}

/// Where to go from here. Needs no key.
#[utoipa::path(
    get,
    path = "/",
    tag = "operate",
    security(()),
    responses((status = 200, description = "Pointers", body = Pointers)),
)]
pub async fn root() -> Json<Pointers> {
    let (name, version) = ("rewake", env!("CARGO_PKG_VERSION"));
    Json(Pointers { name, version, docs: "/docs/", openapi: "/openapi.json", api: "/v1" })
}
