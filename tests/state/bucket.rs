//! What a bucket's client makes of answers that are lost, refused or wrong, from a server that speaks as much of S3's
//! language as a put and a look need.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Response};
use axum::routing::put;
use bytes::Bytes;
use object_store::aws::AmazonS3Builder;
use rewake::state::{Bucket, Error, Put, Store};

/// What becomes of one put.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// It is written, and the client hears of a failure.
    Lost,
    /// Another put is under way: try again.
    Conflict,
    /// The condition is not looked at.
    Careless,
}

/// Objects with their marks, and what becomes of the next puts.
#[derive(Default)]
struct Objects {
    there: HashMap<String, (Bytes, String)>,
    fates: VecDeque<Fate>,
}

type Shared = Arc<Mutex<Objects>>;

fn reply(status: u16) -> Response<Body> {
    let headers = Response::builder().status(status).header("etag", "\"e\"");
    headers.header("last-modified", "Wed, 25 Nov 2026 12:00:00 GMT").body(Body::empty()).unwrap()
}

async fn write(
    State(objects): State<Shared>,
    Path(key): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let mut objects = objects.lock().unwrap();
    let fate = objects.fates.pop_front();
    assert_eq!(headers["if-none-match"], "*");
    if fate == Some(Fate::Conflict) {
        return reply(409);
    }
    if objects.there.contains_key(&key) && fate != Some(Fate::Careless) {
        return reply(412);
    }
    let mark = headers["x-amz-meta-rewake-put"].to_str().unwrap().to_owned();
    objects.there.insert(key, (body, mark));
    reply(if fate == Some(Fate::Lost) { 500 } else { 200 })
}

async fn read(State(objects): State<Shared>, Path(key): Path<String>) -> Response<Body> {
    let objects = objects.lock().unwrap();
    let Some((bytes, mark)) = objects.there.get(&key) else { return reply(404) };
    let mut found = reply(200);
    found.headers_mut().insert("x-amz-meta-rewake-put", mark.parse().unwrap());
    *found.body_mut() = bytes.clone().into();
    found
}

async fn remove(State(objects): State<Shared>) -> Response<Body> {
    // Only probes are deleted here.
    objects.lock().unwrap().there.clear();
    let mut done = reply(200);
    *done.body_mut() = "<DeleteResult><Deleted><Key>p</Key></Deleted></DeleteResult>".into();
    done
}

async fn bucket() -> (Bucket, Shared) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let objects = Shared::default();
    let routes = Router::new().route("/bucket/{*key}", put(write).get(read).delete(remove));
    let routes = routes.route("/bucket", axum::routing::post(remove)).with_state(objects.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async { axum::serve(listener, routes).await });
    let s3 = AmazonS3Builder::new().with_bucket_name("bucket").with_region("r").with_allow_http(true);
    let s3 = s3.with_endpoint(endpoint).with_access_key_id("a").with_secret_access_key("s").build().unwrap();
    (Bucket::over(Arc::new(s3), "p"), objects)
}

#[tokio::test]
async fn whoever_s_answer_is_lost_has_still_won() {
    let (bucket, objects) = bucket().await;
    for (n, fates) in [
        vec![],
        vec![Fate::Lost],
        vec![Fate::Conflict],
        vec![Fate::Conflict, Fate::Conflict, Fate::Lost],
        vec![Fate::Lost, Fate::Conflict],
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("t/{n}");
        objects.lock().unwrap().fates = fates.clone().into();
        assert_eq!(bucket.put_if_absent(&key, "mine".into()).await, Ok(Put::Created), "{fates:?}");
        assert_eq!(bucket.put_if_absent(&key, "mine".into()).await, Ok(Put::Exists), "though it says the same");
        assert_eq!(bucket.get(&key).await, Ok(Some("mine".into())));
    }
    // Somebody else's object, found by a put whose first answers were of no use.
    objects.lock().unwrap().there.insert("p/t/x".into(), ("theirs".into(), "other".into()));
    objects.lock().unwrap().fates = [Fate::Conflict].into();
    assert_eq!(bucket.put_if_absent("t/x", "mine".into()).await, Ok(Put::Exists));
    assert_eq!(bucket.get("t/x").await, Ok(Some("theirs".into())));
    // One that is never let in is a failure, not a loss.
    objects.lock().unwrap().fates = vec![Fate::Conflict; 100].into();
    assert!(matches!(bucket.put_if_absent("t/y", "mine".into()).await, Err(Error::Store { .. })));
}

#[tokio::test]
async fn a_bucket_that_writes_over_objects_is_found_out() {
    let (bucket, objects) = bucket().await;
    assert_eq!(bucket.probe().await, Ok(true));
    objects.lock().unwrap().fates = vec![Fate::Careless; 2].into();
    assert_eq!(bucket.probe().await, Ok(false));
}

#[tokio::test]
async fn an_address_that_is_none_is_told_at_once() {
    for (url, endpoint, why) in [
        ("bucket", "", "no address"),
        ("ftp://bucket/prefix", "", "none of s3, gs and az"),
        ("s3://bucket/a prefix", "", "prefix"),
        ("gs://bucket", "http://127.0.0.1:1", "endpoint"),
    ] {
        let place = rewake::state::BucketUrl { url: url.into(), endpoint: endpoint.into() };
        let Err(Error::Open { folder, cause }) = Bucket::open(&place).await else { panic!("{url} was opened") };
        assert!(folder == url && cause.contains(why), "{cause}");
    }
}
