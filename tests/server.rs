//! The whole server with the embedded model, over HTTP: its laws, its errors, and what it survives.

#[path = "server/beside.rs"]
mod beside;
#[path = "server/bodies.rs"]
mod bodies;
#[path = "server/branches.rs"]
mod branches;
#[path = "server/canaries.rs"]
mod canaries;
#[path = "server/cluster.rs"]
mod cluster;
#[path = "server/conformance.rs"]
mod conformance;
#[path = "server/conversations.rs"]
mod conversations;
#[path = "server/disks.rs"]
mod disks;
#[path = "server/durability.rs"]
mod durability;
#[path = "server/errors.rs"]
mod errors;
#[path = "server/faults.rs"]
mod faults;
#[path = "server/initial.rs"]
mod initial;
#[path = "server/laws.rs"]
mod laws;
#[path = "server/left.rs"]
mod left;
#[path = "server/prefix.rs"]
mod prefix;
#[path = "server/process.rs"]
mod process;
#[path = "server/quotas.rs"]
mod quotas;
#[path = "server/rebuilt.rs"]
mod rebuilt;
#[path = "server/responses.rs"]
mod responses;
#[path = "support/server.rs"]
mod server;
#[path = "server/sessions.rs"]
mod sessions;
#[path = "server/speculation.rs"]
mod speculation;
#[path = "server/states.rs"]
mod states;
#[path = "support/store.rs"]
mod store;
#[path = "server/streams.rs"]
mod streams;
#[path = "server/swept.rs"]
mod swept;
#[path = "server/tenants.rs"]
mod tenants;

use rewake::api::{Key, KeyHash};
use rewake::types::Tenant;
use serde_json::{Value, json};

/// The key `sk-{name}`, which is of a tenant.
fn key(name: &str, tenant: &str) -> Key {
    let tenant = Tenant::parse(tenant).expect("a good name");
    Key { name: name.into(), hash: KeyHash::of(&format!("sk-{name}")), tenant }
}

/// `body` with the fields of `more` put over it.
fn with(mut body: Value, more: Value) -> Value {
    let fields = body.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    body
}

/// A chat of one message.
fn user(content: &str) -> Value {
    json!([{"role": "user", "content": content}])
}

/// A completion that goes on until it is dropped: the end of the document is never chosen.
fn endless() -> Value {
    json!({"prompt": "Once upon a time", "max_tokens": 900_000, "logit_bias": {"0": -100}, "seed": 1})
}
