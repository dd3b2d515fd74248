//! A whole server for tests: the embedded demonstration model behind the real router, in this process or in its own.
#![allow(dead_code)] // Each test program uses some of it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{HeaderMap, Request, Response};
use futures::stream::{BoxStream, StreamExt, TryStreamExt};
use rewake::app::{App, load_models};
use rewake::config::{Config, Flags};
use rewake::session::{PrefixLimits, Sessions};
use rewake::state::{InMemory, Store};
use serde_json::{Value, json};
use tower::ServiceExt;

pub const COMPLETIONS: &str = "/v1/completions";
pub const CHAT: &str = "/v1/chat/completions";

/// Lets clients be made: one build has one HTTP client for all that use it, and it comes without cryptography.
pub fn prepare_clients() {
    // Only the first call counts.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The defaults: the embedded model, no keys.
pub fn config() -> Config {
    Config::load(&Flags::default(), std::iter::empty()).expect("the defaults are valid")
}

/// The same, but what was read once is read again.
pub fn forgetful(config: Config) -> Config {
    let prefix_cache = PrefixLimits { enabled: false, ..config.prefix_cache };
    Config { prefix_cache, ..config }
}

/// What an independent implementation computed of the embedded model.
pub fn expected() -> Value {
    serde_json::from_str(include_str!("../data/demo/expected.json")).expect("JSON")
}

/// A server in this process.
pub struct Server {
    pub router: Router,
    pub sessions: Arc<Sessions>,
}

impl Server {
    /// Loads the embedded model over an empty store in memory.
    pub fn new() -> Self {
        Self::over(Arc::new(InMemory::default()))
    }

    pub fn over(store: Arc<dyn Store>) -> Self {
        Self::with(&config(), store)
    }

    pub fn with(config: &Config, store: Arc<dyn Store>) -> Self {
        let App { router, sessions, .. } = Self::app(config, store);
        Self { router, sessions }
    }

    /// Ready to be run on a listener.
    pub fn app(config: &Config, store: Arc<dyn Store>) -> App {
        let app = App::with_store(config, store).expect("the router");
        app.sessions.open(load_models(config, &|_, _, _| {}).expect("the embedded model"));
        app
    }

    /// One server for all tests of a program that differ in the names of their sessions only.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Server> = OnceLock::new();
        SHARED.get_or_init(Self::new)
    }

    pub fn client(&self) -> Client {
        Client { way: Way::Router(self.router.clone()), key: None }
    }
}

/// The use-cases of the shared server, for routers of one's own.
pub fn sessions() -> Arc<Sessions> {
    Server::shared().sessions.clone()
}

/// Sends requests to a router or over the network, all the same.
#[derive(Clone)]
pub struct Client {
    way: Way,
    key: Option<String>,
}

#[derive(Clone)]
enum Way {
    Router(Router),
    Network { http: reqwest::Client, address: String },
}

impl Client {
    /// To a router in this process.
    pub fn of(router: Router) -> Self {
        Self { way: Way::Router(router), key: None }
    }

    /// To a listening server.
    pub fn to(address: &str) -> Self {
        prepare_clients();
        Self { way: Way::Network { http: reqwest::Client::new(), address: address.into() }, key: None }
    }

    pub fn with_key(&self, key: &str) -> Self {
        Self { way: self.way.clone(), key: Some(key.into()) }
    }

    /// The reply's head, when it is there. An error is the network's.
    pub async fn send(&self, mut request: Request<Body>) -> Result<Response<Body>, String> {
        if let Some(key) = &self.key {
            let value = format!("Bearer {key}").parse().expect("keys are ASCII");
            request.headers_mut().insert("authorization", value);
        }
        match &self.way {
            Way::Router(router) => Ok(router.clone().oneshot(request).await.expect("the router cannot fail")),
            Way::Network { http, address } => {
                let (head, body) = request.into_parts();
                let body = to_bytes(body, usize::MAX).await.expect("the test's own body");
                let url = format!("http://{address}{}", head.uri);
                let request = http.request(head.method, url).headers(head.headers).body(body);
                let response = request.send().await.map_err(|e| e.to_string())?;
                let mut reply = Response::builder().status(response.status());
                reply.headers_mut().expect("a good status").extend(response.headers().clone());
                let body = Body::from_stream(response.bytes_stream());
                Ok(reply.body(body).expect("a good reply"))
            }
        }
    }

    /// The whole reply.
    pub async fn call(&self, request: Request<Body>) -> Reply {
        Reply::read(self.send(request).await.expect("the server answers")).await
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.call(get(path)).await
    }

    pub async fn delete(&self, path: &str) -> Reply {
        self.call(Request::delete(path).body(Body::empty()).expect("a good request")).await
    }

    /// With a further header.
    pub async fn delete_with(&self, path: &str, (name, value): (&str, String)) -> Reply {
        self.call(Request::delete(path).header(name, value).body(Body::empty()).expect("a good request")).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Reply {
        self.call(post(path, body.to_string())).await
    }

    /// With further headers.
    pub async fn post_with(&self, path: &str, headers: &[(&str, &str)], body: Value) -> Reply {
        let mut request = post(path, body.to_string());
        for (name, value) in headers {
            let name = axum::http::HeaderName::try_from(*name).expect("a header");
            request.headers_mut().insert(name, value.parse().expect("a header's value"));
        }
        self.call(request).await
    }

    /// A whole reply that must be a success.
    pub async fn ok(&self, path: &str, body: Value) -> Reply {
        let reply = self.post(path, body.clone()).await;
        assert_eq!(reply.status, 200, "{path} {body}: {}", reply.text);
        reply
    }

    /// Asks again while the reply has this status, but not for ever: what frees a place is done by other threads.
    pub async fn post_while(&self, status: u16, path: &str, body: Value) -> Reply {
        for _ in 0..200_000 {
            let reply = self.post(path, body.clone()).await;
            if reply.status != status {
                return reply;
            }
            tokio::task::yield_now().await;
        }
        panic!("{path} {body} stays {status}");
    }

    /// The chunks of a stream that must begin well.
    pub async fn stream(&self, path: &str, body: Value) -> Chunks {
        self.try_stream(path, body).await.expect("the server answers")
    }

    /// The same over a network that may fail.
    pub async fn try_stream(&self, path: &str, mut body: Value) -> Result<Chunks, String> {
        body["stream"] = json!(true);
        self.streamed(post(path, body.to_string())).await
    }

    /// What follows in a stream after the event of this id; everything without one.
    pub async fn resume(&self, response: &str, last: Option<&str>) -> Result<Chunks, String> {
        let mut request = get(&format!("/v1/streams/{response}"));
        if let Some(last) = last {
            request.headers_mut().insert("last-event-id", last.parse().expect("an id"));
        }
        self.streamed(request).await
    }

    async fn streamed(&self, request: Request<Body>) -> Result<Chunks, String> {
        let path = request.uri().to_string();
        let (head, body) = self.send(request).await?.into_parts();
        if head.status != 200 {
            let text = to_bytes(body, usize::MAX).await.map_err(|e| e.to_string())?;
            panic!("{path}: {} {}", head.status, String::from_utf8_lossy(&text));
        }
        Ok(Chunks::of(Response::from_parts(head, body)))
    }
}

pub fn get(path: &str) -> Request<Body> {
    Request::get(path).body(Body::empty()).expect("a good request")
}

pub fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(body.into()).expect("a good request")
}

/// A whole reply.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub text: String,
}

impl Reply {
    pub async fn read(response: Response<Body>) -> Self {
        let (head, body) = response.into_parts();
        let bytes = to_bytes(body, usize::MAX).await.expect("the body is whole");
        let text = String::from_utf8(bytes.into()).expect("the body is text");
        Self { status: head.status.as_u16(), headers: head.headers, text }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {}", self.text))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("headers are text"))
    }

    /// The error, after checking that its body is what OpenAI's clients read.
    pub fn error(&self) -> Value {
        assert!(self.status >= 400, "not an error: {} {}", self.status, self.text);
        let body = self.json();
        assert_eq!(body.as_object().expect("an object").len(), 1, "{body}");
        let error = body["error"].as_object().unwrap_or_else(|| panic!("no error: {body}"));
        let mut keys: Vec<_> = error.keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["code", "message", "param", "type"]);
        assert!(error["message"].is_string() && error["type"].is_string(), "{body}");
        assert!(error["param"].is_string() || error["param"].is_null(), "{body}");
        assert!(self.header("content-type").is_some_and(|kind| kind.starts_with("application/json")));
        assert!(self.header("x-request-id").is_some());
        body["error"].clone()
    }

    /// The error's code.
    pub fn code(&self) -> String {
        self.error()["code"].as_str().expect("a code").to_owned()
    }

    /// Text of the first choice.
    pub fn answer(&self) -> String {
        let reply = self.json();
        let choice = &reply["choices"][0];
        let text = choice["text"].as_str().or_else(|| choice["message"]["content"].as_str());
        text.unwrap_or_else(|| panic!("no answer: {reply}")).to_owned()
    }

    /// Why the first choice ended.
    pub fn finish(&self) -> String {
        self.json()["choices"][0]["finish_reason"].as_str().expect("a finish reason").to_owned()
    }

    /// Id of the stored state.
    pub fn state_id(&self) -> String {
        let reply = self.json();
        reply["state"]["id"].as_str().unwrap_or_else(|| panic!("no state: {reply}")).to_owned()
    }
}

/// A stream of server-sent events. Dropping it hangs up.
pub struct Chunks {
    pub headers: HeaderMap,
    bytes: BoxStream<'static, Result<Bytes, String>>,
    buffer: Vec<u8>,
    /// Whether `[DONE]` was seen.
    pub done: bool,
    /// Id of the last whole event.
    pub last_id: Option<String>,
}

impl Chunks {
    /// Those of a reply that began well.
    pub fn of(reply: Response<Body>) -> Self {
        let (head, body) = reply.into_parts();
        assert_eq!(head.headers["content-type"], "text/event-stream");
        let bytes = body.into_data_stream().map_err(|e| e.to_string()).boxed();
        Self { headers: head.headers, bytes, buffer: Vec::new(), done: false, last_id: None }
    }

    /// The next chunk; `None` at the end, and where the connection broke.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            // Whole events only: the network may part them anywhere, inside a character too.
            if let Some(end) = self.buffer.windows(2).position(|two| two == b"\n\n") {
                let event = String::from_utf8(self.buffer.drain(..end + 2).collect()).expect("events are text");
                if let Some(id) = event.lines().find_map(|line| line.strip_prefix("id: ")) {
                    self.last_id = Some(id.into());
                }
                match event.lines().find_map(|line| line.strip_prefix("data: ")) {
                    Some("[DONE]") => self.done = true,
                    Some(data) => return Some(serde_json::from_str(data).expect("chunks are JSON")),
                    None => {}
                }
                continue;
            }
            match self.bytes.next().await? {
                Ok(bytes) => self.buffer.extend_from_slice(&bytes),
                Err(_) => return None,
            }
        }
    }

    /// Reads up to the first piece of text.
    pub async fn begun(&mut self) {
        while piece(&self.next().await.expect("the stream goes on")).is_none() {}
    }

    /// All chunks of a stream that must end well.
    pub async fn all(mut self) -> Vec<Value> {
        let mut chunks = Vec::new();
        while let Some(chunk) = self.next().await {
            chunks.push(chunk);
        }
        assert!(self.done, "the stream broke off after {:?}", chunks.last());
        chunks
    }
}

/// Text that a chunk adds to its choice, if it adds any.
pub fn piece(chunk: &Value) -> Option<&str> {
    let choice = &chunk["choices"][0];
    choice["text"].as_str().or_else(|| choice["delta"]["content"].as_str()).filter(|text| !text.is_empty())
}

/// What the chunks say for one choice.
pub fn said(chunks: &[Value], choice: u64) -> String {
    chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == choice).filter_map(piece).collect()
}

/// The chunk with the finish reason of the only choice.
pub fn last(chunks: &[Value]) -> &Value {
    let ends = |chunk: &&Value| chunk["choices"][0]["finish_reason"].is_string();
    chunks.iter().find(ends).expect("a finish reason")
}

/// A server in a process of its own.
pub struct Process {
    child: Child,
    pub address: String,
    _stdout: BufReader<ChildStdout>,
}

impl Process {
    /// Runs `rewake serve` on a free port and returns when it is ready.
    pub fn start(state_dir: &Path, extra: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rewake"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("REWAKE_")) {
            command.env_remove(name);
        }
        command.args(["serve", "--port", "0", "--state-dir"]).arg(state_dir).args(extra);
        command.env("REWAKE_LOG", "error").stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the binary runs");
        let mut stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        // It is printed when the models are loaded and requests are taken.
        let mut line = String::new();
        let address = loop {
            line.clear();
            if stdout.read_line(&mut line).expect("its output is text") == 0 {
                panic!("the server ended before it was ready: {:?}", child.wait());
            }
            if let Some((_, address)) = line.trim_end().split_once("is serving on http://") {
                break address.to_owned();
            }
        };
        Self { child, address, _stdout: stdout }
    }

    pub fn client(&self) -> Client {
        Client::to(&self.address)
    }

    /// Ends it as a power cut would.
    pub fn kill_9(mut self) {
        self.child.kill().expect("it still runs");
        self.child.wait().expect("it has ended");
    }

    /// Asks it to stop, so many times at once.
    pub fn terminate(&self, times: usize) {
        let pid = self.child.id().to_string();
        let killed = Command::new("kill").arg("-TERM").args(vec![pid; times]).status().expect("kill(1) is there");
        assert!(killed.success());
    }

    /// Waits until it has ended by itself.
    pub async fn ended(mut self) -> ExitStatus {
        let wait = move || self.child.wait().expect("it is our child");
        tokio::task::spawn_blocking(wait).await.expect("waiting does not panic")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Either may fail when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
