//! Items that a request names instead of giving them.

use super::item::Brought;
use super::object::output_id;
use super::place::{Stored, stored};
use crate::api::{App, Error};
use crate::session::{self, StoredItem};
use crate::types::Tenant;

/// Items that a request can name: each is looked for in the store.
const MOST: usize = 100;

/// Digits in the id of a response, which the ids of its items begin with.
const DIGITS: usize = 32;

/// The items that were brought, those that are named in full: items of `conversation`, or of any stored response of `tenant`.
///
/// # Errors
/// [`Error::UnknownReference`], also for what is another's.
pub async fn resolve(
    app: &App,
    tenant: &Tenant,
    conversation: Option<&str>,
    brought: Vec<Brought>,
) -> Result<Vec<StoredItem>, Error> {
    let named = brought.iter().filter_map(|item| match item {
        Brought::Reference { at, .. } => Some(at),
        Brought::Message(_) => None,
    });
    let known = match (named.clone().next(), conversation) {
        (Some(_), Some(id)) => app.sessions.conversation(tenant, id).await?.items,
        _ => Vec::new(),
    };
    if let Some(at) = named.clone().nth(MOST) {
        return Err(Error::invalid(at, format!("a request can name {MOST} items")));
    }
    let (mut items, mut bytes) = (Vec::<StoredItem>::new(), 0);
    for item in brought {
        let item = match item {
            Brought::Message(item) => item,
            Brought::Reference { at, id, own } => {
                let found = match known.iter().find(|item| item.id == id) {
                    Some(item) => item.clone(),
                    None => of_response(app, tenant, &at, &id).await?,
                };
                bytes += found.text.len();
                if bytes > app.limits.body_bytes {
                    let most = app.limits.body_bytes;
                    return Err(Error::invalid(
                        at,
                        format!("the named items have more than {most} bytes of text together"),
                    ));
                }
                let taken = items.iter().any(|item| item.id == found.id);
                StoredItem { id: if taken { own } else { found.id }, ..found }
            }
        };
        items.push(item);
    }
    Ok(items)
}

/// The item of a stored response.
async fn of_response(app: &App, tenant: &Tenant, at: &str, id: &str) -> Result<StoredItem, Error> {
    let unknown = || Error::UnknownReference { at: at.into(), id: id.into() };
    let digits = id.strip_prefix("msg_").and_then(|id| id.get(..DIGITS)).ok_or_else(unknown)?;
    let response = format!("resp_{digits}");
    let found = match stored(app, tenant, &response).await {
        Err(Error::Session(session::Error::ResponseNotFound(_))) => return Err(unknown()),
        found => found?,
    };
    if id != output_id(&response) {
        return found.ask.items.into_iter().find(|item| item.id == id).ok_or_else(unknown);
    }
    let Stored { answer: text, ended: true, complete, .. } = found else {
        return Err(Error::invalid(at, format!("response `{response}` is still in progress")));
    };
    Ok(StoredItem { id: id.into(), role: "assistant".into(), text, complete })
}
