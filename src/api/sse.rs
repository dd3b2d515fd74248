//! Server-sent events: a turn as a stream of frames.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event as Frame, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use serde::Serialize;

use super::openai::reply::broken_off;
use super::record::Record;
use crate::session::Event;
use crate::telemetry::metrics::StreamOpen;

/// Proxies close connections that say nothing; a long prompt must not look like one.
const PING: Duration = Duration::from_secs(15);

/// nginx would otherwise hold the events back.
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// How an endpoint tells of a turn: a pure machine from its events to frames, whose numbers are those of the output itself.
pub trait Script: Send + 'static {
    fn response_id(&self) -> &str;
    /// What comes before all events.
    fn opening(&mut self) -> Vec<Said>;
    fn tell(&mut self, event: Event) -> Vec<Said>;
    /// Whether all is told.
    fn ended(&self) -> bool;
}

/// What one frame says.
#[derive(Debug)]
pub struct Said {
    /// Of the event, where the endpoint has names for them.
    pub name: Option<&'static str>,
    pub data: String,
}

impl Said {
    /// An event without a name.
    pub fn new(value: &impl Serialize) -> Self {
        let data = serde_json::to_string(value).expect("replies have only text keys and finite numbers");
        Self { name: None, data }
    }
}

/// The reply that streams a turn, after the frame of number `after` if the client has that. When the client goes away,
/// `events` are dropped.
pub fn reply(
    script: impl Script,
    events: impl Stream<Item = Event> + Send + Unpin + 'static,
    record: Record,
    after: Option<u64>,
) -> Response {
    frames(Feed { after, ..Feed::new(script, events, record) }, PING)
}

/// The same from the beginning, saying something at least once every `ping`.
#[cfg(test)]
pub fn reply_pinging(
    script: impl Script,
    events: impl Stream<Item = Event> + Send + Unpin + 'static,
    record: Record,
    ping: Duration,
) -> Response {
    frames(Feed::new(script, events, record), ping)
}

/// The number of the last frame that these events led to; `None` = there was none. A failure has no number.
pub fn last_frame(mut script: impl Script, events: Vec<Event>) -> Option<u64> {
    let mut frames = script.opening().len();
    for event in events.into_iter().take_while(|event| !matches!(event, Event::Failed(_))) {
        frames += script.tell(event).len();
    }
    (frames as u64).checked_sub(1)
}

fn frames<S: Script>(feed: Feed<S, impl Stream<Item = Event> + Send + Unpin + 'static>, ping: Duration) -> Response {
    let frames = futures::stream::unfold(feed, |mut feed| async move {
        let frame = feed.next().await?;
        Some((Ok::<_, Infallible>(frame), feed))
    });
    let mut response = Sse::new(frames).keep_alive(KeepAlive::new().interval(ping).text("ping")).into_response();
    response.headers_mut().insert(ACCEL_BUFFERING, HeaderValue::from_static("no"));
    response
}

/// Turns events into frames.
struct Feed<S, E> {
    script: S,
    events: E,
    record: Record,
    /// To be sent before the next event is asked for.
    ready: VecDeque<Said>,
    /// Number of the next frame.
    sequence: u64,
    /// What is told is a failure. It has no id: the response may go on, in another process, and then its number is another
    /// event's, which a client that asks for what follows this one would miss.
    failed: bool,
    /// The client has the frames up to this one.
    after: Option<u64>,
    _open: StreamOpen,
}

impl<S: Script, E: Stream<Item = Event> + Unpin> Feed<S, E> {
    fn new(mut script: S, events: E, record: Record) -> Self {
        let ready = script.opening().into();
        Self { script, events, record, ready, sequence: 0, failed: false, after: None, _open: StreamOpen::new() }
    }

    async fn next(&mut self) -> Option<Frame> {
        loop {
            while self.ready.is_empty() && !self.script.ended() {
                let event = self.events.next().await.unwrap_or_else(|| Event::Failed(broken_off()));
                self.record.heard(&event);
                self.failed = matches!(event, Event::Failed(_));
                self.ready.extend(self.script.tell(event));
            }
            let Said { name, data } = self.ready.pop_front()?;
            if self.ready.is_empty() && self.script.ended() {
                // Now, not at the next poll: many clients hang up when they have seen the last frame.
                self.record.ends();
            }
            let number = self.sequence;
            self.sequence += 1;
            if self.after.is_none_or(|after| number > after) {
                let mut frame = name.map_or_else(Frame::default, |name| Frame::default().event(name));
                if !self.failed {
                    frame = frame.id(format!("{}:{number}", self.script.response_id()));
                }
                return Some(frame.data(data));
            }
        }
    }
}
