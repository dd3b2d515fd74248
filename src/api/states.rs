//! `/v1/states`: snapshots that later turns may continue from.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::extract::{Name, Query};
use super::list::{Deleted, Identified, List, page};
use super::refusals::Refusals;
use super::{App, Caller, Error};
use crate::session::StateInfo;
use crate::types::{SessionId, StateId};

/// Metadata of a stored state.
#[derive(Debug, Serialize, ToSchema)]
pub struct StateObject {
    pub id: String,
    /// `state`.
    #[schema(value_type = String)]
    pub object: &'static str,
    /// The model that made it.
    pub model: String,
    #[schema(required = true)]
    pub parent: Option<String>,
    #[schema(required = true)]
    pub session_id: Option<String>,
    /// Number of the turn in its session or chain, from 1.
    pub turn: u64,
    /// Total positions of the sequence.
    pub tokens: u64,
    /// Size of the recurrent state.
    pub bytes: u64,
    /// Unix seconds.
    pub created: u64,
    /// Unix seconds; null = kept until deleted.
    #[schema(required = true)]
    pub expires_at: Option<u64>,
    pub metadata: BTreeMap<String, String>,
}

impl From<StateInfo> for StateObject {
    fn from(info: StateInfo) -> Self {
        Self {
            id: info.id.into(),
            object: "state",
            model: info.model,
            parent: info.parent.map(String::from),
            session_id: info.session_id.map(String::from),
            turn: info.turn,
            tokens: info.tokens,
            bytes: info.bytes,
            created: info.created,
            expires_at: info.expires_at,
            metadata: info.metadata,
        }
    }
}

impl Identified for StateObject {
    fn id(&self) -> &str {
        &self.id
    }
}

/// Which states.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct StatesQuery {
    /// How many at most, 1 to 100; 20 by default.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<usize>,
    /// Only what comes after this id; `last_id` of the page before.
    after: Option<String>,
    /// Only states of this session, or of the one that a conversation of this id has now.
    session_id: Option<String>,
}

/// List stored states, oldest first.
#[utoipa::path(
    get,
    path = "/v1/states",
    tag = "states",
    params(StatesQuery),
    responses((status = 200, description = "One page", body = List<StateObject>), Refusals),
)]
pub async fn list_states(
    State(app): State<Arc<App>>,
    caller: Caller,
    Query(query): Query<StatesQuery>,
) -> Result<Json<List<StateObject>>, Error> {
    let page = page(query.limit, query.after)?;
    let session = query.session_id.map(|id| SessionId::parse(id.as_str()).map_err(|_| Error::UnknownSession(id)));
    let listing = app.sessions.states(&caller.tenant, session.transpose()?.as_ref(), page).await?;
    Ok(Json(List::new(listing)))
}

/// Show a stored state.
#[utoipa::path(
    get,
    path = "/v1/states/{id}",
    tag = "states",
    params(("id" = String, Path, description = "Id of a state")),
    responses((status = 200, description = "Its metadata", body = StateObject), Refusals),
)]
pub async fn show_state(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
) -> Result<Json<StateObject>, Error> {
    Ok(Json(app.sessions.state(&caller.tenant, &state_id(id)?).await?.into()))
}

/// Delete a stored state. States made from it stay.
#[utoipa::path(
    delete,
    path = "/v1/states/{id}",
    tag = "states",
    params(("id" = String, Path, description = "Id of a state")),
    responses((status = 200, description = "It is gone", body = Deleted), Refusals),
)]
pub async fn delete_state(State(app): State<Arc<App>>, caller: Caller, Name(id): Name) -> Result<Json<Deleted>, Error> {
    let id = state_id(id)?;
    app.sessions.delete_state(&caller.tenant, &id).await?;
    Ok(Json(Deleted { id: id.into(), object: "state.deleted", deleted: true }))
}

/// What cannot be an id is unknown like any other.
pub fn state_id(id: String) -> Result<StateId, Error> {
    StateId::parse(id.as_str()).map_err(|_| Error::UnknownState(id))
}
