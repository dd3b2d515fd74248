//! Server-sent events: a turn as a stream of chunks.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event as Frame, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use serde::Serialize;

use super::Error;
use super::openai::reply::{Chunk, Chunks, Shape, broken_off};
use super::record::Record;
use crate::session::Event;
use crate::telemetry::metrics::StreamOpen;

/// Proxies close connections that say nothing; a long prompt must not look like one.
pub const PING: Duration = Duration::from_secs(15);

/// nginx would otherwise hold the events back.
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// The reply that streams a turn, after the frame of number `after` if the client has that. When the client goes away,
/// `events` are dropped.
pub fn reply<S: Shape>(
    chunks: Chunks<S>,
    events: impl Stream<Item = Event> + Send + Unpin + 'static,
    record: Record,
    after: Option<u64>,
) -> Response {
    let feed = Feed { after, ..Feed::new(chunks, events, record) };
    frames(feed, PING)
}

/// The same from the beginning, saying something at least once every `ping`.
#[cfg(test)]
pub fn reply_pinging<S: Shape>(
    chunks: Chunks<S>,
    events: impl Stream<Item = Event> + Send + Unpin + 'static,
    record: Record,
    ping: Duration,
) -> Response {
    frames(Feed::new(chunks, events, record), ping)
}

fn frames<S: Shape>(feed: Feed<S, impl Stream<Item = Event> + Send + Unpin + 'static>, ping: Duration) -> Response {
    let frames = futures::stream::unfold(feed, |mut feed| async move {
        let frame = feed.next().await?;
        Some((frame, feed))
    });
    streamed(frames, ping)
}

/// A reply of frames that says something at least once every `ping`.
pub fn streamed(frames: impl Stream<Item = Frame> + Send + 'static, ping: Duration) -> Response {
    let frames = frames.map(Ok::<_, Infallible>);
    let mut response = Sse::new(frames).keep_alive(KeepAlive::new().interval(ping).text("ping")).into_response();
    response.headers_mut().insert(ACCEL_BUFFERING, HeaderValue::from_static("no"));
    response
}

/// Turns events into frames, numbered by the output itself.
struct Feed<S, E> {
    chunks: Chunks<S>,
    events: E,
    record: Record,
    /// Data to send before the next event is asked for.
    ready: VecDeque<String>,
    /// Number of the next frame.
    sequence: u64,
    /// The client has the frames up to this one.
    after: Option<u64>,
    stage: Stage,
    _open: StreamOpen,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    /// Everything that is still to be sent is ready.
    Complete,
    /// The same, and it ends with an error.
    Failed,
}

impl<S: Shape, E: Stream<Item = Event> + Unpin> Feed<S, E> {
    fn new(chunks: Chunks<S>, events: E, record: Record) -> Self {
        let ready = chunks.first().iter().map(json).collect();
        let stage = Stage::Running;
        Self { chunks, events, record, ready, sequence: 0, after: None, stage, _open: StreamOpen::new() }
    }

    async fn next(&mut self) -> Option<Frame> {
        loop {
            let (number, frame) = self.numbered().await?;
            if self.after.is_none_or(|after| number > after) {
                return Some(frame);
            }
        }
    }

    async fn numbered(&mut self) -> Option<(u64, Frame)> {
        while self.ready.is_empty() && self.stage == Stage::Running {
            match self.events.next().await {
                Some(event) => self.take(event),
                None => self.fail(broken_off()),
            }
        }
        let data = self.ready.pop_front()?;
        if self.ready.is_empty() && self.stage == Stage::Complete {
            // Now, not at the next poll: many clients hang up when they have seen `[DONE]`.
            self.record.ends();
        }
        let number = self.sequence;
        self.sequence += 1;
        Some((number, Frame::default().id(format!("{}:{number}", self.chunks.response_id())).data(data)))
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Text { choice, text } => {
                self.record.text(choice);
                self.send(self.chunks.text(choice, text));
            }
            Event::Done { choice, finish, completion_tokens, stored } => {
                self.record.completed(completion_tokens);
                let chunk = self.chunks.done(choice, finish, completion_tokens, stored.into());
                self.send(chunk);
                if self.chunks.complete() {
                    self.ready.extend(self.chunks.usage().as_ref().map(json));
                    self.ready.push_back("[DONE]".into());
                    self.stage = Stage::Complete;
                }
            }
            Event::Failed(error) => self.fail(error.into()),
        }
    }

    fn send(&mut self, chunk: Chunk<S::Piece>) {
        self.ready.push_back(json(&chunk));
    }

    fn fail(&mut self, error: Error) {
        self.record.fails(&error);
        self.ready.push_back(json(&error.body()));
        self.stage = Stage::Failed;
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("replies have only text keys and finite numbers")
}
