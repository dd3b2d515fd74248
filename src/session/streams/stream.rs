//! One response on its way to whoever listens.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::log::Log;
use super::{Facts, Rules};
use crate::engine::Pause;
use crate::session::{Delivery, Event, Model};
use crate::types::{SessionId, Tenant};

/// So many events may wait for the fastest reader before the response is parked; it goes on when half of them are read.
const LAG: usize = 512;

/// A response that runs or has ended, its events, and who listens to it.
pub(in crate::session) struct Stream {
    pub facts: Facts,
    pub tenant: Tenant,
    pub session: Option<SessionId>,
    pub delivery: Delivery,
    /// It goes on when nobody listens.
    detached: AtomicBool,
    /// Parks the jobs behind it.
    pub pause: Pause,
    /// Ends it.
    pub cancel: CancellationToken,
    why: OnceLock<Why>,
    /// Who computes it.
    model: Arc<Model>,
    rules: Arc<Rules>,
    state: Mutex<State>,
    /// Changes with every event.
    told: watch::Sender<()>,
}

/// Why a stream ends before its response does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::session) enum Why {
    /// Somebody wanted it, or nobody came back.
    Cancelled,
    /// The process ends; another one may go on.
    Interrupted,
}

#[derive(Default)]
struct State {
    log: Log,
    ended: bool,
    readers: usize,
    /// What the fastest reader has taken.
    furthest: usize,
    /// Readers are too far behind.
    lagging: bool,
    /// How many times the last reader has left.
    left: u64,
}

/// What a stream is made of.
pub(in crate::session) struct Parts {
    pub facts: Facts,
    pub tenant: Tenant,
    pub session: Option<SessionId>,
    pub delivery: Delivery,
    pub model: Arc<Model>,
    pub rules: Arc<Rules>,
    /// What was sent before.
    pub events: Vec<Event>,
}

impl Stream {
    pub fn new(parts: Parts) -> Arc<Self> {
        let Parts { facts, tenant, session, delivery, model, rules, events } = parts;
        let mut state = State::default();
        events.into_iter().for_each(|event| state.log.push(event));
        Arc::new(Self {
            facts,
            tenant,
            session,
            detached: delivery.detach.into(),
            delivery,
            pause: Pause::default(),
            cancel: CancellationToken::new(),
            why: OnceLock::new(),
            model,
            rules,
            state: Mutex::new(state),
            told: watch::Sender::new(()),
        })
    }

    /// A reader of all events, those that were sent included. A parked response goes on.
    pub fn listen(self: &Arc<Self>) -> Reader {
        let mut state = self.state();
        state.readers += 1;
        self.park_or_not(&mut state);
        Reader { told: self.told.subscribe(), stream: self.clone(), at: 0 }
    }

    /// Lets everybody who listens hear of an event.
    pub fn push(self: &Arc<Self>, event: Event) {
        let mut state = self.state();
        state.log.push(event);
        let parked = self.park_or_not(&mut state);
        drop(state);
        self.told.send_replace(());
        // A reader who is too slow is waited for like one who is lost.
        if parked && self.delivery.stream {
            self.rules.parked(self);
        }
    }

    /// Nothing follows.
    pub fn end(&self) {
        self.state().ended = true;
        self.told.send_replace(());
    }

    /// Whether this model computes it.
    pub fn is_of(&self, model: &Arc<Model>) -> bool {
        Arc::ptr_eq(&self.model, model)
    }

    pub fn ended(&self) -> bool {
        self.state().ended
    }

    pub fn is_detached(&self) -> bool {
        self.detached.load(Ordering::Acquire)
    }

    /// It is to be one that ends with its readers, while there is one.
    pub fn attach(&self) {
        self.detached.store(false, Ordering::Release);
    }

    /// Waits until it has ended.
    pub async fn wait(&self) {
        let mut told = self.told.subscribe();
        while !self.ended() {
            // Its sender is in `self`.
            let _ = told.changed().await;
        }
    }

    pub fn is_heard(&self) -> bool {
        self.state().readers > 0
    }

    /// Whether nobody listens and it waits for somebody to come back.
    pub fn is_abandoned(&self) -> bool {
        let state = self.state();
        state.readers == 0 && !state.ended && !self.is_detached()
    }

    /// Whether it rests until somebody reads.
    pub fn is_parked(&self) -> bool {
        self.pause.is_set() && !self.ended()
    }

    /// All events so far, and whether that is all.
    pub fn so_far(&self) -> (Vec<Event>, bool) {
        let state = self.state();
        (state.log.iter().collect(), state.ended)
    }

    /// Bytes of memory, about.
    pub fn bytes(&self) -> usize {
        self.state().log.bytes() + self.facts.form.len()
    }

    /// Ends it early; the first reason counts.
    pub fn stop(&self, why: Why) {
        let _ = self.why.set(why);
        self.cancel.cancel();
    }

    pub fn why(&self) -> Why {
        *self.why.get().unwrap_or(&Why::Cancelled)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Plain data: a panic elsewhere leaves it usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Parks the response or lets it go on. Says whether this parked it.
    fn park_or_not(&self, state: &mut State) -> bool {
        let behind = state.log.len() - state.furthest.min(state.log.len());
        state.lagging = if state.lagging { behind > LAG / 2 } else { behind > LAG };
        let park = !self.is_detached() && !state.ended && (state.readers == 0 || state.lagging);
        let changed = self.pause.set(park);
        if changed {
            self.model.engine.look();
        }
        changed && park
    }

    /// A reader has left. The last one parks the response for the window.
    fn leave(self: &Arc<Self>) {
        let mut state = self.state();
        state.readers -= 1;
        if state.readers > 0 || state.ended || self.is_detached() {
            return;
        }
        state.left += 1;
        let left = state.left;
        let window = self.rules.window();
        let runtime = tokio::runtime::Handle::try_current().ok();
        let (Some(runtime), true) = (runtime, self.delivery.stream && !window.is_zero()) else {
            drop(state);
            return self.stop(Why::Cancelled);
        };
        self.park_or_not(&mut state);
        drop(state);
        self.rules.parked(self);
        // Who waits must not keep what has ended meanwhile.
        let (stream, cancel) = (Arc::downgrade(self), self.cancel.clone());
        runtime.spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(window) => {}
                () = cancel.cancelled() => return,
            }
            let Some(stream) = stream.upgrade() else { return };
            let state = stream.state();
            if state.readers == 0 && state.left == left && !state.ended {
                drop(state);
                stream.stop(Why::Cancelled);
            }
        });
    }
}

/// Somebody who listens to a stream; when the last one is dropped, the response is parked.
pub(in crate::session) struct Reader {
    stream: Arc<Stream>,
    told: watch::Receiver<()>,
    at: usize,
}

impl Reader {
    /// Whether the response has ended.
    pub fn is_over(&self) -> bool {
        self.stream.ended()
    }

    /// All events so far, those that it has read too.
    pub fn so_far(&self) -> Vec<Event> {
        self.stream.so_far().0
    }

    /// The next event; `None` at the end.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            self.told.mark_unchanged();
            let ended = {
                let mut state = self.stream.state();
                if let Some(event) = state.log.get(self.at) {
                    self.at += 1;
                    state.furthest = state.furthest.max(self.at);
                    if state.lagging {
                        self.stream.park_or_not(&mut state);
                    }
                    return Some(event);
                }
                state.ended
            };
            if ended || self.told.changed().await.is_err() {
                return None;
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stream.leave();
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("at", &self.at).finish_non_exhaustive()
    }
}
