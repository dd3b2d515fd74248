//! OpenAI's Conversations.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::item::{self, Given, GivenItem};
use super::reference::resolve;
use super::request::check_included;
use super::{IncludeQuery, Item, ItemsQuery, items};
use crate::api::extract::{JsonBody, Name, Names, Query};
use crate::api::list::{Deleted, List};
use crate::api::openai::{Ignored, metadata};
use crate::api::refusals::Refusals;
use crate::api::{App, Caller, Error};
use crate::session::{Conversation, Listing, StoredItem};
use crate::telemetry::clock;
use crate::types::Tenant;

/// Items that can be added at once.
const MOST_ITEMS: usize = 20;

/// A conversation: a session under OpenAI's name.
#[derive(Debug, Serialize, ToSchema)]
pub struct ConversationObject {
    pub id: String,
    /// `conversation`.
    #[schema(value_type = String)]
    pub object: &'static str,
    /// Unix seconds.
    pub created_at: u64,
    pub metadata: BTreeMap<String, String>,
}

impl ConversationObject {
    fn new(id: String, conversation: Conversation) -> Self {
        let Conversation { created, metadata, .. } = conversation;
        Self { id, object: "conversation", created_at: created, metadata }
    }
}

/// What a conversation begins with.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct ConversationRequest {
    /// Messages, or items of stored responses by their ids; at most 20.
    #[schema(value_type = Option<Vec<GivenItem>>)]
    items: Option<Vec<Value>>,
    /// At most 16 pairs; names of 64 and values of 512 characters.
    metadata: Option<BTreeMap<String, String>>,
}

/// What is known of a conversation from now on.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct MetadataRequest {
    /// At most 16 pairs; names of 64 and values of 512 characters.
    #[schema(required = true)]
    metadata: Option<BTreeMap<String, String>>,
}

/// What is added to a conversation.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct ItemsRequest {
    /// Messages, or items by their ids; 1 to 20.
    #[schema(value_type = Vec<GivenItem>, required = true)]
    items: Option<Vec<Value>>,
}

/// Reads a body; also returns the names of fields that nobody knows.
fn read<T: DeserializeOwned>(body: &JsonBody) -> Result<(T, Vec<String>), Error> {
    let (request, others) = body.split()?;
    Ok((request, others.into_keys().collect()))
}

/// Checks the items that are given for a conversation, which may name some that are there, and adds the names of their fields
/// that nobody knows to `ignored`; a server that is strict refuses these.
async fn read_items(
    (app, tenant): (&App, &Tenant),
    conversation: Option<&str>,
    given: Vec<Value>,
    mut ignored: Vec<String>,
) -> Result<(Vec<StoredItem>, Ignored), Error> {
    if given.len() > MOST_ITEMS {
        return Err(Error::invalid("items", format!("{} items are more than {MOST_ITEMS}", given.len())));
    }
    let prefix = format!("msg_{:032x}", clock::random_u128());
    let (items, unread) = item::read(Given::Items(given), "items", &prefix)?;
    ignored.extend(unread);
    let ignored = app.ignored(ignored)?;
    Ok((resolve(app, tenant, conversation, items).await?, ignored))
}

/// Begin a conversation.
#[utoipa::path(
    post,
    path = "/v1/conversations",
    tag = "responses",
    request_body = ConversationRequest,
    responses((status = 200, description = "The conversation", body = ConversationObject), Refusals),
)]
pub async fn create_conversation(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: JsonBody,
) -> Result<(Ignored, Json<ConversationObject>), Error> {
    let (ConversationRequest { items, metadata: pairs }, ignored) = read(&body)?;
    let pairs = metadata(pairs)?;
    let (items, ignored) = read_items((&app, &caller.tenant), None, items.unwrap_or_default(), ignored).await?;
    let (id, conversation) = app.sessions.create_conversation(&caller.tenant, pairs, items).await?;
    Ok((ignored, Json(ConversationObject::new(id, conversation))))
}

/// Show a conversation.
#[utoipa::path(
    get,
    path = "/v1/conversations/{conversation_id}",
    tag = "responses",
    params(("conversation_id" = String, Path, description = "Id of a conversation")),
    responses((status = 200, description = "The conversation", body = ConversationObject), Refusals),
)]
pub async fn show_conversation(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
) -> Result<Json<ConversationObject>, Error> {
    let conversation = app.sessions.conversation(&caller.tenant, &id).await?;
    Ok(Json(ConversationObject::new(id, conversation)))
}

/// Replace the metadata of a conversation.
#[utoipa::path(
    post,
    path = "/v1/conversations/{conversation_id}",
    tag = "responses",
    params(("conversation_id" = String, Path, description = "Id of a conversation")),
    request_body = MetadataRequest,
    responses((status = 200, description = "The conversation", body = ConversationObject), Refusals),
)]
pub async fn update_conversation(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
    body: JsonBody,
) -> Result<(Ignored, Json<ConversationObject>), Error> {
    let (MetadataRequest { metadata: pairs }, ignored) = read(&body)?;
    if pairs.is_none() {
        return Err(Error::missing("metadata"));
    }
    let (pairs, ignored) = (metadata(pairs)?, app.ignored(ignored)?);
    let conversation = app.sessions.set_metadata(&caller.tenant, &id, pairs).await?;
    Ok((ignored, Json(ConversationObject::new(id, conversation))))
}

/// Delete a conversation with its sessions. Refused with 409 while it runs a turn.
#[utoipa::path(
    delete,
    path = "/v1/conversations/{conversation_id}",
    tag = "responses",
    params(("conversation_id" = String, Path, description = "Id of a conversation")),
    responses((status = 200, description = "It is gone", body = Deleted), Refusals),
)]
pub async fn delete_conversation(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
) -> Result<Json<Deleted>, Error> {
    app.sessions.delete_conversation(&caller.tenant, &id).await?;
    Ok(Json(Deleted { id, object: "conversation.deleted", deleted: true }))
}

/// List the items of a conversation.
#[utoipa::path(
    get,
    path = "/v1/conversations/{conversation_id}/items",
    tag = "responses",
    params(("conversation_id" = String, Path, description = "Id of a conversation"), ItemsQuery),
    responses((status = 200, description = "One page", body = List<Item>), Refusals),
)]
pub async fn list_items(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
    Query(query): Query<ItemsQuery>,
) -> Result<Json<List<Item>>, Error> {
    let conversation = app.sessions.conversation(&caller.tenant, &id).await?;
    Ok(Json(items(conversation.items, query)?))
}

/// Add items to a conversation: its next response reads them. Refused with 409 while it runs a turn.
#[utoipa::path(
    post,
    path = "/v1/conversations/{conversation_id}/items",
    tag = "responses",
    params(("conversation_id" = String, Path, description = "Id of a conversation"), IncludeQuery),
    request_body = ItemsRequest,
    responses((status = 200, description = "What was added", body = List<Item>), Refusals),
)]
pub async fn create_items(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(id): Name,
    Query(query): Query<IncludeQuery>,
    body: JsonBody,
) -> Result<(Ignored, Json<List<Item>>), Error> {
    check_included(query.include)?;
    let (ItemsRequest { items }, ignored) = read(&body)?;
    let given = items.unwrap_or_default();
    if given.is_empty() {
        return Err(Error::invalid("items", "`items` must have at least one"));
    }
    let (items, ignored) = read_items((&app, &caller.tenant), Some(&id), given, ignored).await?;
    app.sessions.add_items(&caller.tenant, &id, items.clone()).await?;
    Ok((ignored, Json(List::new(Listing { data: items, has_more: false }))))
}

/// Show one item of a conversation.
#[utoipa::path(
    get,
    path = "/v1/conversations/{conversation_id}/items/{item_id}",
    tag = "responses",
    params(
        ("conversation_id" = String, Path, description = "Id of a conversation"),
        ("item_id" = String, Path, description = "Id of one of its items"),
        IncludeQuery,
    ),
    responses((status = 200, description = "The item", body = Item), Refusals),
)]
pub async fn show_item(
    State(app): State<Arc<App>>,
    caller: Caller,
    Names(id, item): Names,
    Query(query): Query<IncludeQuery>,
) -> Result<Json<Item>, Error> {
    check_included(query.include)?;
    let conversation = app.sessions.conversation(&caller.tenant, &id).await?;
    let found = conversation.items.into_iter().find(|other| other.id == item);
    Ok(Json(found.ok_or(Error::UnknownItem(item))?.into()))
}

/// Delete an item of a conversation, with the states that may have read it; what is left is read anew by its next response. A
/// stored response keeps its own input and answer until it is deleted itself. Refused with 409 while the conversation runs a turn.
#[utoipa::path(
    delete,
    path = "/v1/conversations/{conversation_id}/items/{item_id}",
    tag = "responses",
    params(
        ("conversation_id" = String, Path, description = "Id of a conversation"),
        ("item_id" = String, Path, description = "Id of one of its items"),
    ),
    responses((status = 200, description = "The conversation without it", body = ConversationObject), Refusals),
)]
pub async fn delete_item(
    State(app): State<Arc<App>>,
    caller: Caller,
    Names(id, item): Names,
) -> Result<Json<ConversationObject>, Error> {
    let conversation = app.sessions.remove_item(&caller.tenant, &id, &item).await?;
    Ok(Json(ConversationObject::new(id, conversation)))
}
