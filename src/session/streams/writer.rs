//! The way of a response's events: into its journal if it has one, then to whoever listens.

use std::sync::Arc;
use std::time::Duration;

use futures::{Stream as Outputs, StreamExt};

use super::record::{Answer, Begun, Entry, Told};
use super::{ELSEWHERE, Hub, Resumed, Stream};
use crate::session::keep::failed;
use crate::session::{Error, Event, StateError, Turn};
use crate::state::{self, Archive, Journal, Put};
use crate::telemetry::clock;
use crate::types::StateId;

/// So many events, ready at once, go into one entry.
const TOGETHER: usize = 64;

/// So many are waited for while nobody listens: fewer and larger entries.
const UNHEARD: usize = 32;

/// A journal has an entry at least so often.
const BEAT: Duration = Duration::from_secs(5);

/// Writes one stream.
pub(in crate::session) struct Writer {
    pub stream: Arc<Stream>,
    hub: Arc<Hub>,
    archive: Archive,
    journal: Option<Open>,
    /// A journal that could not be written, and not be removed either.
    stuck: Option<Journal>,
    /// Why the journal that was asked for is not there.
    unkept: Option<StateError>,
    /// Events that nobody has heard of, with the tokens behind them.
    held: Vec<(Event, Vec<u32>)>,
    /// Choices that are not complete.
    open: usize,
    /// The last event was sent.
    over: bool,
}

/// A journal that this process writes.
struct Open {
    journal: Journal,
    next: u64,
}

impl Writer {
    pub fn new(stream: Arc<Stream>, hub: Arc<Hub>, archive: Archive) -> Self {
        let open = stream.facts.choices;
        Self { stream, hub, archive, journal: None, stuck: None, unkept: None, held: Vec::new(), open, over: false }
    }

    /// Opens a journal: from when this returns, the response is not lost with this process.
    pub async fn begin(&mut self, turn: &Turn, parent: Option<StateId>) -> Result<(), state::Error> {
        let (tenant, facts) = (&turn.tenant, self.stream.facts.clone());
        let id = facts.response_id.clone();
        let journal = Journal::stream(tenant, &id);
        let first = Entry::Begun(Box::new(Begun { facts, turn: turn.clone(), parent }));
        let begun = async {
            self.archive.mark_running(tenant, &id).await?;
            self.archive.append(&journal, 0, &first).await
        };
        match begun.await {
            Ok(_) => self.journal = Some(Open { journal, next: 1 }),
            Err(error) => {
                // A later process must not begin it again.
                self.stuck = Some(journal);
                self.remove_stuck().await;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Lets the response go on as one that is not detached, because there is no journal; its end says so.
    pub fn attach(&mut self, error: &state::Error) {
        self.stream.attach();
        let why = "the response is not detached, as its journal could not be written";
        self.unkept = Some(failed(StateError::STORE, why, Some(error)));
    }

    /// Goes on with a journal that is there.
    pub fn resume(&mut self, resumed: Resumed) {
        self.open -= resumed.done().min(self.open);
        self.journal = Some(Open { journal: resumed.journal, next: resumed.next });
    }

    /// Takes an event; nobody hears of it before [`flush`](Self::flush).
    pub fn hold(&mut self, event: Event, ids: Vec<u32>) {
        match &event {
            Event::Text { .. } => {}
            Event::Done { .. } => self.open -= self.open.min(1),
            Event::Failed(_) => self.open = 0,
        }
        self.held.push((event, ids));
        self.excuse();
    }

    /// Lets the ends that are held say that the journal is not there, if they say nothing else of what is kept.
    fn excuse(&mut self) {
        let Some(why) = &self.unkept else { return };
        for (event, _) in &mut self.held {
            if let Event::Done { stored: stored @ None, .. } = event {
                *stored = Some(Err(why.clone()));
            }
        }
    }

    /// Whether the last event was sent.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Whether the next event, if it is ready, goes with those that are held.
    pub fn has_room(&self) -> bool {
        self.journal.is_some() && self.open > 0 && self.held.len() < TOGETHER
    }

    /// Whether the next event should be waited for, because nobody listens.
    pub fn may_wait(&self) -> bool {
        self.has_room() && self.held.len() < UNHEARD && !self.stream.is_heard()
    }

    /// The next output, or `None` at the end. Meanwhile those who read the journal see that somebody is at it.
    pub async fn wait<T>(&mut self, outputs: &mut (impl Outputs<Item = T> + Unpin)) -> Option<T> {
        loop {
            if self.journal.is_none() {
                return outputs.next().await;
            }
            match tokio::time::timeout(BEAT, outputs.next()).await {
                Ok(next) => return next,
                Err(_) => self.beat().await,
            }
        }
    }

    /// Writes an entry though nothing has happened.
    async fn beat(&mut self) {
        if !self.held.is_empty() {
            return self.flush().await;
        }
        if let Some(open) = &mut self.journal
            && self.archive.append(&open.journal, open.next, &Entry::told(Vec::new())).await == Ok(Put::Created)
        {
            open.next += 1;
            if self.ended_elsewhere().await {
                self.lost();
            }
        }
    }

    /// Whether another server has ended the response. It puts the answer before it erases the journal, whose entries can
    /// be written anew after that: having written one says nothing until this was asked.
    async fn ended_elsewhere(&self) -> bool {
        let (Some(open), true) = (&self.journal, self.hub.rules.shared) else { return false };
        let (tenant, id) = (&self.stream.tenant, &self.stream.facts.response_id);
        match self.archive.answer::<Answer>(tenant, id).await {
            Ok(None) => false,
            Ok(Some(_)) => {
                if let Err(error) = self.archive.erase(&open.journal).await {
                    tracing::warn!(%error, response = id, "what is left of its journal could not be removed");
                }
                true
            }
            Err(error) => {
                tracing::warn!(%error, response = id, "it could not be found out whether another server has ended it");
                false
            }
        }
    }

    /// Another server has the response now.
    fn lost(&mut self) {
        self.journal = None;
        self.held.clear();
        self.open = 0;
        self.last(Event::Failed(Error::Engine(ELSEWHERE.into())), false);
    }

    /// Makes what is held durable, if it must be, and lets everybody hear of it.
    pub async fn flush(&mut self) {
        if self.held.is_empty() || self.over {
            return;
        }
        if self.open == 0 {
            return self.finish().await;
        }
        let told = self.held.iter().map(|(event, ids)| Told::new(event, ids)).collect();
        if let Some(open) = &mut self.journal {
            match self.archive.append(&open.journal, open.next, &Entry::told(told)).await {
                Ok(Put::Created) => {
                    open.next += 1;
                    if self.ended_elsewhere().await {
                        return self.lost();
                    }
                }
                Ok(Put::Exists) => return self.lost(),
                Err(error) => self.go_on_without(&error).await,
            }
        }
        self.held.drain(..).for_each(|(event, _)| self.stream.push(event));
    }

    /// The response ends before it is complete.
    pub async fn cancelled(&mut self) {
        if self.over {
            return;
        }
        self.held.clear();
        self.hold(Event::Failed(Error::Cancelled), Vec::new());
        self.finish().await;
    }

    /// The process ends: what has a journal is left to the next one.
    pub fn interrupted(&mut self) {
        if !self.over {
            self.held.clear();
            self.journal = None;
            self.last(Event::Failed(Error::Draining), false);
        }
    }

    /// Stores the whole response, if it is to be kept, and then tells of its end.
    async fn finish(&mut self) {
        let keep = self.stream.delivery.keep || self.journal.is_some();
        let mut stored = false;
        if keep {
            let (sent, _) = self.stream.so_far();
            let held = self.held.iter().map(|(event, _)| event);
            let events = sent.iter().chain(held).map(|event| Told::new(event, &[])).collect();
            let (facts, kept) = (self.stream.facts.clone(), self.stream.delivery.keep);
            let answer = Answer { facts, ended: clock::unix_seconds(), events, kept };
            let (tenant, id) = (&self.stream.tenant, &self.stream.facts.response_id);
            match self.archive.put_answer(tenant, id, &answer).await {
                Ok(_) => stored = true,
                // A later process finds the journal, and stores it.
                Err(error) if self.journal.is_some() => {
                    tracing::error!(%error, response = id, "a response is not stored yet");
                }
                Err(error) => self.not_stored(&error),
            }
        }
        self.remove_stuck().await;
        let Some((last, _)) = self.held.pop() else { return };
        self.held.drain(..).for_each(|(event, _)| self.stream.push(event));
        self.last(last, stored);
        if let Some(Open { journal, .. }) = self.journal.take().filter(|_| stored) {
            let (tenant, id) = (&self.stream.tenant, &self.stream.facts.response_id);
            if let Err(error) = self.hub.clear(&self.archive, &journal, (tenant, id), self.stream.delivery.keep).await {
                tracing::warn!(%error, response = id, "the journal of a finished response is still there");
            }
        }
    }

    /// The response will not be found by its id, which its end says.
    fn not_stored(&mut self, error: &state::Error) {
        let id = &self.stream.facts.response_id;
        let Some((Event::Done { stored, .. }, _)) = self.held.last_mut() else {
            return tracing::error!(%error, response = id, "a response was not stored");
        };
        let why = match stored {
            Some(Err(_)) => return,
            Some(Ok(receipt)) => format!("the response could not be stored under its id; its state is {}", receipt.id),
            None => "the response could not be stored under its id".into(),
        };
        *stored = Some(Err(failed(StateError::STORE, &why, Some(error))));
    }

    fn last(&mut self, event: Event, stored: bool) {
        self.over = true;
        self.stream.push(event);
        self.stream.end();
        self.hub.close(&self.stream, stored);
    }

    /// The journal cannot be written. The text is still sent, and a later process must not take the journal up.
    async fn go_on_without(&mut self, error: &state::Error) {
        let id = &self.stream.facts.response_id;
        tracing::error!(%error, response = id, "a response goes on without its journal");
        self.stuck = self.journal.take().map(|open| open.journal);
        let why = "the response has lost its journal, and will not go on in another process";
        self.unkept = Some(failed(StateError::STORE, why, Some(error)));
        self.excuse();
        self.remove_stuck().await;
    }

    async fn remove_stuck(&mut self) {
        let Some(journal) = &self.stuck else { return };
        let (tenant, id) = (&self.stream.tenant, &self.stream.facts.response_id);
        let erased = self.archive.erase(journal).await;
        match erased.and(self.archive.unmark_running(tenant, id).await) {
            Ok(()) => self.stuck = None,
            Err(error) => tracing::error!(%error, response = id, "what is left of its journal could not be removed"),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Only when its task has panicked: readers must not wait for ever.
        if !self.over {
            self.last(Event::Failed(Error::Engine("the response's task has ended".into())), false);
        }
    }
}
