//! What the router does around turns: keys, bodies, paths, headers.

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use rewake::api::{ApiLimits, App, Key, KeyHash, router};
use rewake::types::Tenant;
use serde_json::json;

use crate::support::{self, Client, Reply, get, post};

const BODY_BYTES: usize = 100_000;

fn app(keys: &[&str]) -> App {
    let key = |key: &&str| Key {
        name: "test".into(),
        hash: KeyHash::of(key),
        tenant: Tenant::parse("someone").expect("a good name"),
    };
    App {
        sessions: support::sessions(),
        keys: keys.iter().map(key).collect(),
        limits: ApiLimits { body_bytes: BODY_BYTES, ..ApiLimits::default() },
        strict: false,
        metrics: rewake::telemetry::metrics::install().expect("the recorder is installed once"),
    }
}

fn open() -> Router {
    router(app(&[]))
}

async fn call(router: Router, request: Request<Body>) -> Reply {
    Client::of(router).call(request).await
}

#[tokio::test]
async fn unknown_paths_and_methods_have_the_error_body() {
    for path in ["/nowhere", "/v1/nothing", "/v1", "/v1/sessions/a/b/c"] {
        let reply = call(open(), get(path)).await;
        assert_eq!((reply.status, reply.code().as_str()), (404, "unknown_url"), "{path}");
    }
    for (method, path) in
        [("GET", "/v1/completions"), ("POST", "/v1/models"), ("PUT", "/v1/states/x"), ("BREW", "/health")]
    {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).expect("a good request");
        let reply = call(open(), request).await;
        assert_eq!((reply.status, reply.code().as_str()), (405, "method_not_allowed"), "{method} {path}");
        assert!(reply.header("allow").is_some(), "{method} {path}");
    }
}

#[tokio::test]
async fn bad_bodies_are_refused_in_the_clients_language() {
    for path in ["/v1/completions", "/v1/chat/completions"] {
        for (body, status, code) in [
            ("", 400, "invalid_json"),
            ("{", 400, "invalid_json"),
            ("[]", 400, "invalid_json"),
            (r#"{"temperature": "hot"}"#, 400, "invalid_type"),
            (r#"{"model": "nobody's", "prompt": "a", "messages": []}"#, 404, "model_not_found"),
            (r#"{"model": 3}"#, 400, "invalid_type"),
        ] {
            let reply = call(open(), post(path, body)).await;
            assert_eq!((reply.status, reply.code().as_str()), (status, code), "{path} {body}");
        }
        let many = json!({"prompt": "a", "messages": [{"role": "user", "content": "a"}], "stop": vec!["x"; 10_000]});
        let reply = call(open(), post(path, many.to_string())).await;
        assert_eq!((reply.status, reply.json()["error"]["param"].as_str()), (400, Some("stop")));
        let huge = json!({ "prompt": "a".repeat(BODY_BYTES) });
        let reply = call(open(), post(path, huge.to_string())).await;
        assert_eq!((reply.status, reply.code().as_str()), (413, "request_too_large"));
        let endless = Body::from_stream(futures::stream::repeat_with(|| Ok::<_, std::io::Error>("[".repeat(1000))));
        let reply = call(open(), post(path, endless)).await;
        assert_eq!((reply.status, reply.code().as_str()), (413, "request_too_large"));
        let announced = Request::post(path).header("content-type", "application/json");
        let announced = announced.header("content-length", "99999999999");
        let silent = Body::from_stream(futures::stream::pending::<std::io::Result<&str>>());
        let reply = call(open(), announced.body(silent).expect("a good request")).await;
        assert_eq!((reply.status, reply.code().as_str()), (413, "request_too_large"));
        for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"] {
            let request = Request::post(path).header("content-type", kind).body("{}".into()).expect("a good request");
            let reply = call(open(), request).await;
            assert_eq!((reply.status, reply.code().as_str()), (415, "unsupported_media_type"), "{kind}");
        }
    }
}

#[tokio::test]
async fn keys_guard_everything_under_v1() {
    let with = |path: &str, key: &str| {
        Request::get(path).header("authorization", format!("Bearer {key}")).body(Body::empty()).expect("a good request")
    };
    let document = serde_json::to_value(rewake::api::openapi()).expect("the document is JSON");
    for (path, item) in document["paths"].as_object().expect("paths") {
        for method in item.as_object().expect("operations").keys() {
            let method: Method = method.to_uppercase().parse().expect("a method");
            let uri = path.replace("{id}", "x");
            let request = Request::builder().method(method).uri(&uri).body(Body::empty()).expect("a good request");
            let reply = call(router(app(&["sk-good"])), request).await;
            if path.starts_with("/v1/") {
                assert_eq!((reply.status, reply.code().as_str()), (401, "invalid_api_key"), "{path}");
            } else {
                assert_eq!(reply.status, 200, "{path}");
            }
        }
    }
    for open in ["/docs/", "/openapi.json"] {
        assert_eq!(call(router(app(&["sk-good"])), get(open)).await.status, 200, "{open}");
    }
    assert_eq!(call(router(app(&["sk-good"])), with("/v1/models", "sk-bad")).await.status, 401);
    assert_eq!(call(router(app(&["sk-bad", "sk-good"])), with("/v1/models", "sk-good")).await.status, 200);
    assert_eq!(call(open(), with("/v1/models", "anything")).await.status, 200);
}

#[tokio::test]
async fn every_response_has_a_request_id() {
    for (path, status) in [("/health", 200), ("/nowhere", 404), ("/v1/completions", 405), ("/openapi.json", 200)] {
        let reply = call(open(), get(path)).await;
        assert_eq!(reply.status, status);
        assert!(reply.header("x-request-id").is_some_and(|id| id.starts_with("req_")), "{path}");
    }
    let sent =
        |id: &str| Request::get("/health").header("x-request-id", id).body(Body::empty()).expect("a good request");
    assert_eq!(call(open(), sent("mine-1")).await.header("x-request-id"), Some("mine-1"));
    assert_ne!(call(open(), sent("mine 1")).await.header("x-request-id"), Some("mine 1"));
}

#[tokio::test]
async fn browsers_may_ask_first() {
    let request = Request::options("/v1/chat/completions")
        .header("origin", "http://localhost:3000")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type,x-stainless-os")
        .body(Body::empty())
        .expect("a good request");
    let reply = call(router(app(&["sk-good"])), request).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("access-control-allow-origin"), Some("*"));
    let allowed = reply.header("access-control-allow-headers").expect("headers are allowed");
    assert!(["authorization", "content-type", "x-stainless-os"].iter().all(|name| allowed.contains(name)), "{allowed}");
    assert!(reply.header("access-control-allow-methods").is_some_and(|methods| methods.contains("DELETE")));
    let request = Request::get("/v1/models").header("origin", "http://x").body(Body::empty()).expect("a good request");
    let reply = call(open(), request).await;
    let exposed = reply.header("access-control-expose-headers").expect("headers are exposed");
    assert!(["x-request-id", "x-state-id", "retry-after"].iter().all(|name| exposed.contains(name)), "{exposed}");
}

#[tokio::test]
async fn paths_may_end_with_a_slash() {
    for path in ["/health/", "/v1/models/", "/ready//"] {
        assert_eq!(call(open(), get(path)).await.status, 200, "{path}");
    }
    let reply = call(open(), get("/v1/states/?limit=0")).await;
    assert_eq!((reply.status, reply.json()["error"]["param"].as_str()), (400, Some("limit")));
    let docs = call(open(), get("/docs")).await;
    assert_eq!((docs.status, docs.header("location")), (303, Some("/docs/")));
    assert!(call(open(), get("/docs/")).await.text.contains("swagger-ui"));
}

#[tokio::test]
async fn models_are_listed_and_shown() {
    let list = call(open(), get("/v1/models")).await.json();
    assert_eq!((&list["object"], &list["has_more"]), (&json!("list"), &json!(false)));
    let model = &list["data"][0];
    assert_eq!((&model["object"], &model["owned_by"]), (&json!("model"), &json!("rewake")));
    let id = model["id"].as_str().expect("an id");
    let shown = call(open(), get(&format!("/v1/models/{id}"))).await;
    assert_eq!((shown.status, &shown.json()), (200, model));
    let shown = call(open(), get(&format!("/v1/models/{}/", id.replace('/', "%2F")))).await;
    assert_eq!(&shown.json(), model);
    for unknown in ["nobody", "no/body", "no%2Fbody"] {
        let reply = call(open(), get(&format!("/v1/models/{unknown}"))).await;
        assert_eq!((reply.status, reply.code().as_str()), (404, "model_not_found"));
        assert!(reply.json()["error"]["message"].as_str().is_some_and(|m| m.contains(&unknown.replace("%2F", "/"))));
    }
}

#[tokio::test]
async fn unknown_states_and_sessions_all_look_the_same() {
    let unknown = rewake::types::StateId::new(1, 2).to_string();
    for id in [unknown.as_str(), "st_x", "x%2F..%2Fy"] {
        let reply = call(open(), get(&format!("/v1/states/{id}"))).await;
        assert_eq!((reply.status, reply.code().as_str()), (404, "state_not_found"), "{id}");
    }
    for id in ["unknown", "not%20a%20name"] {
        let reply = call(open(), get(&format!("/v1/sessions/{id}"))).await;
        assert_eq!((reply.status, reply.code().as_str()), (404, "session_not_found"), "{id}");
    }
}

#[tokio::test]
async fn queries_are_read_strictly() {
    for (path, param) in [
        ("/v1/states?limit=101", "limit"),
        ("/v1/states?limit=many", "limit"),
        ("/v1/sessions?limit=-1", "limit"),
        ("/v1/sessions/x/turns?token_ids=maybe", "token_ids"),
    ] {
        let reply = call(open(), get(path)).await;
        assert_eq!((reply.status, reply.json()["error"]["param"].as_str()), (400, Some(param)), "{path}");
    }
    let reply = call(open(), get("/v1/states?order=asc")).await;
    assert_eq!(reply.status, 400);
    assert!(reply.json()["error"]["message"].as_str().is_some_and(|message| message.contains("order")));
}

#[tokio::test]
async fn operators_see_the_server() {
    assert_eq!(call(open(), get("/health")).await.json(), json!({"status": "ok"}));
    assert_eq!(call(open(), get("/ready")).await.json(), json!({"status": "ready"}));
    assert_eq!(call(open(), get("/")).await.json()["docs"], "/docs/");
    assert_eq!(call(open(), get("/openapi.json")).await.json()["openapi"], "3.1.0");
    call(open(), get("/v1/models/never-served")).await;
    let metrics = call(open(), get("/metrics")).await;
    assert_eq!(metrics.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let series = r#"rewake_requests_total{method="GET",route="/v1/models/{id}",status="404"}"#;
    assert!(metrics.text.contains(series), "{}", metrics.text);
    assert!(!metrics.text.contains("never-served"), "raw paths would be endless series");
    assert_eq!(StatusCode::OK.as_u16(), metrics.status);
}
