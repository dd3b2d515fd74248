//! What a request says beside its body: nothing of it is passed over in silence.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{MatchedPath, Query, Request, State};
use axum::http::{Method, header};
use axum::middleware::Next;
use axum::response::Response;
use serde_json::Value;
use utoipa::openapi::OpenApi;

use super::Error;

/// What each route reads, by its path and method, as its documentation has it.
pub struct Readable(HashMap<(String, String), Parts>);

struct Parts {
    /// Its own reader refuses what is unknown.
    query: bool,
    if_match: bool,
}

impl Readable {
    /// Of all routes but those for operators, whose tools may append what they like.
    pub fn of(document: &OpenApi) -> Self {
        let document = serde_json::to_value(document).expect("the document has only text keys");
        let mut routes = HashMap::new();
        for (path, item) in document["paths"].as_object().into_iter().flatten() {
            for (method, operation) in item.as_object().into_iter().flatten() {
                if operation["tags"][0] == "operate" {
                    continue;
                }
                let reads = |place: &str, name: Option<&str>| {
                    let parameters = operation["parameters"].as_array().into_iter().flatten();
                    let is_it = |found: &Value| {
                        name.is_none_or(|name| found.as_str().unwrap_or_default().eq_ignore_ascii_case(name))
                    };
                    parameters.filter(|parameter| parameter["in"] == place).any(|parameter| is_it(&parameter["name"]))
                };
                let parts = Parts { query: reads("query", None), if_match: reads("header", Some("if-match")) };
                routes.insert((path.clone(), method.to_uppercase()), parts);
            }
        }
        Self(routes)
    }
}

/// Refuses a query where none is read, and a condition where nothing depends on one.
pub async fn check(State(readable): State<Arc<Readable>>, request: Request, next: Next) -> Result<Response, Error> {
    let path = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let method = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
    if let Some(parts) = readable.0.get(&(path.to_owned(), method.to_string())) {
        if !parts.query
            && let Ok(Query(pairs)) = Query::<Vec<(String, String)>>::try_from_uri(request.uri())
            && let Some((name, _)) = pairs.into_iter().next()
        {
            let why = format!("query: `{name}` is no parameter of this route, which reads none from its query");
            return Err(Error::invalid(name, why));
        }
        if !parts.if_match && request.headers().contains_key(header::IF_MATCH) {
            let why = "`If-Match` is a condition on a session's head, and none is moved here";
            return Err(Error::invalid("if-match", why));
        }
    }
    Ok(next.run(request).await)
}
