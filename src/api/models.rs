//! `GET /v1/models`, `GET /v1/models/{id}`: what is served.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::extract::Name;
use super::list::{Identified, List};
use super::refusals::Refusals;
use super::{App, Caller, Error};
use crate::session::{Listing, ModelCard};

/// A served model.
#[derive(Debug, Serialize, ToSchema)]
pub struct Model {
    pub id: String,
    /// `model`.
    #[schema(value_type = String)]
    pub object: &'static str,
    /// Unix seconds when it was loaded.
    pub created: u64,
    #[schema(value_type = String)]
    pub owned_by: &'static str,
    pub rewake: ModelDetails,
}

/// What RWKV users want to know of a model.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelDetails {
    /// Other names that requests may use.
    pub aliases: Vec<String>,
    /// RWKV generation, such as `v7`.
    pub generation: String,
    pub layers: usize,
    pub width: usize,
    /// Every token id is below it.
    pub vocabulary: usize,
    pub parameters: u64,
    /// Bytes of the recurrent state of one sequence, whatever its length.
    pub state_bytes: u64,
    /// Bytes by which it grows with every token: 0 but for models that look back over the text.
    pub state_bytes_per_token: u64,
    /// Tokens a sequence can have; null when there is no limit, as for every generation but the first.
    #[schema(required = true)]
    pub context: Option<usize>,
    /// Identity of the weights: a state continues only on the same.
    pub fingerprint: String,
    pub tokenizer: String,
    /// The chat template.
    pub template: String,
    /// Stop strings of chats.
    pub stop: Vec<String>,
    /// End tokens.
    pub stop_tokens: Vec<u32>,
    /// Defaults of sampling parameters.
    pub sampling: SamplingDefaults,
    /// Initial states that a request may name in `initial_state`.
    pub initial_states: Vec<String>,
}

/// Values of sampling parameters that a request leaves out.
#[derive(Debug, Serialize, ToSchema)]
pub struct SamplingDefaults {
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: usize,
    pub min_p: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub repetition_penalty: f32,
    pub penalty_decay: f32,
}

impl From<ModelCard> for Model {
    fn from(card: ModelCard) -> Self {
        let sampling = SamplingDefaults {
            temperature: card.sampling.temperature,
            top_p: card.sampling.top_p,
            top_k: card.sampling.top_k,
            min_p: card.sampling.min_p,
            presence_penalty: card.sampling.presence_penalty,
            frequency_penalty: card.sampling.frequency_penalty,
            repetition_penalty: card.sampling.repetition_penalty,
            penalty_decay: card.sampling.penalty_decay,
        };
        let rewake = ModelDetails {
            aliases: card.aliases,
            generation: card.generation,
            layers: card.layers,
            width: card.width,
            vocabulary: card.vocabulary,
            parameters: card.parameters,
            state_bytes: card.state_bytes,
            state_bytes_per_token: card.state_bytes_per_token,
            context: card.context,
            fingerprint: card.fingerprint,
            tokenizer: card.tokenizer,
            template: card.template,
            stop: card.stop,
            stop_tokens: card.stop_tokens,
            sampling,
            initial_states: card.initial_states,
        };
        Self { id: card.id, object: "model", created: card.created, owned_by: "rewake", rewake }
    }
}

impl Identified for Model {
    fn id(&self) -> &str {
        &self.id
    }
}

/// List the served models, all on one page.
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "models",
    responses((status = 200, description = "Every model once, under its own name", body = List<Model>), Refusals),
)]
pub async fn list_models(State(app): State<Arc<App>>, _: Caller) -> Json<List<Model>> {
    Json(List::new(Listing { data: app.sessions.models(), has_more: false }))
}

/// Show one model.
#[utoipa::path(
    get,
    path = "/v1/models/{id}",
    tag = "models",
    params(("id" = String, Path, description = "Id or alias of a model; slashes may be encoded or not")),
    responses((status = 200, description = "The model", body = Model), Refusals),
)]
pub async fn show_model(State(app): State<Arc<App>>, _: Caller, Name(id): Name) -> Result<Json<Model>, Error> {
    Ok(Json(app.sessions.model(Some(&id))?.into()))
}
