//! L4: the HTTP API. Requests become turns, events become replies; nothing here decides what a turn does.

mod auth;
mod beside;
mod error;
mod extract;
mod health;
mod list;
mod models;
mod openai;
mod portable;
mod reading;
mod record;
mod refusals;
mod responses;
mod sessions;
mod sse;
mod states;
mod streams;

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderName, Method, Uri, header};
use axum::middleware::{from_fn, from_fn_with_state, map_request};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, Any as Anywhere, CorsLayer};
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use utoipa_swagger_ui::SwaggerUi;

pub use auth::{Caller, Key, KeyHash};
pub use error::{Error, ErrorBody, ErrorDetail};

use crate::session::{ModelCard, Sessions};
use crate::telemetry::metrics::PrometheusHandle;

/// Everything the handlers need.
pub struct App {
    pub sessions: Arc<Sessions>,
    /// Without any, everybody is the local tenant.
    pub keys: Vec<Key>,
    pub limits: ApiLimits,
    /// Refuse unknown request fields instead of listing them in `x-ignored-params`.
    pub strict: bool,
    pub metrics: PrometheusHandle,
}

/// What one request may ask for: the part of `[limits]` that the wire checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApiLimits {
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Bytes of a state that is imported.
    pub state_bytes: usize,
    /// Prompts of a request.
    pub prompts: usize,
    /// Answers of a request: prompts × `n`.
    pub choices: usize,
    /// Stop strings of a request.
    pub stop_strings: usize,
    /// Bytes of a stop string.
    pub stop_bytes: usize,
}

impl Default for ApiLimits {
    fn default() -> Self {
        Self {
            body_bytes: 16 << 20,
            state_bytes: 256 << 20,
            prompts: 64,
            choices: 128,
            stop_strings: 16,
            stop_bytes: 1024,
        }
    }
}

impl App {
    /// The model that a turn names.
    fn card(&self, model: Option<&str>) -> Result<ModelCard, Error> {
        Ok(self.sessions.model(model)?)
    }

    /// The names of fields that nobody knows, which a strict server refuses.
    fn ignored(&self, names: Vec<String>) -> Result<openai::Ignored, Error> {
        if self.strict {
            openai::refuse_unknown(&names)?;
        }
        Ok(openai::Ignored(names))
    }

    fn rules<'a>(&'a self, card: &'a ModelCard) -> openai::Rules<'a> {
        openai::Rules { card, limits: &self.limits, strict: self.strict }
    }
}

/// All routes with their documentation, so that neither can be without the other.
fn documented() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(outline())
        .routes(routes!(openai::completions::completions))
        .routes(routes!(openai::chat::chat_completions))
        .routes(routes!(streams::show_stream))
        .routes(routes!(responses::create_response))
        .routes(routes!(responses::show_response, responses::delete_response))
        .routes(routes!(responses::cancel_response))
        .routes(routes!(responses::list_input_items))
        .routes(routes!(responses::conversations::create_conversation))
        .routes(routes!(
            responses::conversations::show_conversation,
            responses::conversations::update_conversation,
            responses::conversations::delete_conversation
        ))
        .routes(routes!(responses::conversations::list_items, responses::conversations::create_items))
        .routes(routes!(responses::conversations::show_item, responses::conversations::delete_item))
        .routes(routes!(models::list_models))
        .routes(routes!(models::show_model))
        .routes(routes!(states::list_states, reading::read_state))
        .routes(routes!(portable::import_state))
        .routes(routes!(portable::state_content))
        .routes(routes!(states::show_state, states::delete_state))
        .routes(routes!(sessions::list_sessions))
        .routes(routes!(sessions::show_session, sessions::delete_session))
        .routes(routes!(sessions::list_turns))
        .routes(routes!(sessions::fork_session))
        .routes(routes!(sessions::rewind_session))
        .routes(routes!(health::health))
        .routes(routes!(health::ready))
        .routes(routes!(health::metrics))
        .routes(routes!(health::root))
}

/// The document's head: what is not about a single route.
fn outline() -> OpenApi {
    use utoipa::OpenApi as _;

    #[derive(utoipa::OpenApi)]
    #[openapi(
        info(
            title = "Rewake",
            description = "An OpenAI-compatible API for RWKV language models, whose turns can be resumed from stored \
                           states. Every error has the same body; every response has an `x-request-id`.",
            license(name = "Apache-2.0", identifier = "Apache-2.0"),
        ),
        tags(
            (name = "generate", description = "Text from a prompt, a conversation or a stored state"),
            (name = "responses", description = "OpenAI's Responses and Conversations, over states and sessions"),
            (name = "models", description = "What is served"),
            (name = "states", description = "Immutable snapshots that later turns may continue from"),
            (name = "sessions", description = "Named conversations"),
            (name = "operate", description = "For operators and their tools"),
        ),
        components(schemas(ErrorBody, ErrorDetail)),
        security(("key" = [])),
    )]
    struct Outline;

    let mut document = Outline::openapi();
    let scheme = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some(
            "An API key of the server's configuration. A server without configured keys takes any or none.",
        ))
        .build();
    let components = document.components.get_or_insert_default();
    components.add_security_scheme("key", SecurityScheme::Http(scheme));
    document
}

/// The OpenAPI document of all routes.
pub fn openapi() -> OpenApi {
    documented().into_openapi()
}

/// The server's routes, ready to be served or called.
pub fn router(app: App) -> Router {
    let limit = DefaultBodyLimit::max(app.limits.body_bytes);
    let (routes, document) = documented().split_for_parts();
    let readable = Arc::new(beside::Readable::of(&document));
    let routes = routes
        .with_state(Arc::new(app))
        .route_layer(from_fn_with_state(readable, beside::check))
        .merge(SwaggerUi::new("/docs").url("/openapi.json", document))
        .fallback(async |uri: Uri| Error::NoRoute(uri.path().into()))
        .method_not_allowed_fallback(async |method: Method| Error::Method { method: method.to_string() })
        .layer(limit)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(cors())
        .layer(from_fn(record::observe));
    // A path can only be rewritten before it is routed: hence a router around the router.
    Router::new().fallback_service(routes).layer(map_request(tidy_path))
}

/// Browsers may call from anywhere: a key, not the origin, says who may do what.
fn cors() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(Anywhere)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // Whatever is asked for: `x-stainless-*` has no end and `*` does not cover `authorization`.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            record::REQUEST_ID,
            openai::STATE_ID,
            HeaderName::from_static(openai::IGNORED_PARAMS),
            header::RETRY_AFTER,
            HeaderName::from_static("retry-after-ms"),
        ])
        .max_age(Duration::from_secs(3600))
}

fn panicked(_: Box<dyn Any + Send>) -> Response {
    // The panic itself has been reported by the process's hook.
    Error::Panic.into_response()
}

async fn tidy_path(mut request: Request) -> Request {
    if let Some(path) = tidied(request.uri().path()) {
        let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
        if let Ok(uri) = format!("{path}{query}").parse() {
            *request.uri_mut() = uri;
        }
    }
    request
}

/// The path that is meant, where it is not the one that is written: no slash at the end, and an id of a model, which
/// may have slashes, as one segment.
fn tidied(path: &str) -> Option<String> {
    const MODELS: &str = "/v1/models/";
    // The documentation's pages link relative to their slash.
    if path == "/docs/" {
        return None;
    }
    let short = path.trim_end_matches('/');
    let id = short.strip_prefix(MODELS).filter(|id| id.contains('/'));
    match id {
        Some(id) => Some(format!("{MODELS}{}", id.replace('/', "%2F"))),
        None if short.is_empty() || short.len() == path.len() => None,
        None => Some(short.into()),
    }
}
