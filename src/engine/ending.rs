//! How choices and their jobs end, and what is kept of them.

use std::sync::atomic::Ordering;

use super::live::{Choice, Live, Place, send, tell};
use super::response::Response;
use super::run::Engine;
use super::{Backend, Checkpoint, Event, Kept};
use crate::scheduler::{JobId, Next};
use crate::telemetry::clock;
use crate::text::Tokenizer;
use crate::types::{Finish, Memory, SlotId};

impl Engine {
    /// Ends a choice whose state has read on to what is kept of it.
    pub(super) fn complete(&mut self, id: JobId, index: usize) {
        let choice = self.jobs.get_mut(&id).and_then(|live| live.choices[index].as_mut());
        if let Some(finish) = choice.and_then(|choice| choice.ending.take()) {
            self.finish(id, index, finish);
        }
    }

    /// Ends a choice, and with its last choice the job.
    pub(super) fn finish(&mut self, id: JobId, index: usize, mut finish: Finish) {
        let Some(live) = self.jobs.get_mut(&id) else { return };
        if let Some(choice) = live.choices[index].as_mut().filter(|_| live.job.keep) {
            let behind = choice.rewind();
            if behind > 0 {
                choice.ending = Some(finish);
                return self.scheduler.commit(id, index, Next::Tokens(behind));
            }
        }
        self.scheduler.commit(id, index, Next::Done);
        let Some(Choice { mut response, place, .. }) = live.choices[index].take() else { return };
        // What is held back at the token limit goes out now, or, when the response may go on, with what follows it.
        if finish == Finish::Length && !live.job.keep {
            let text = response.flush();
            let ids = if text.is_empty() { Vec::new() } else { response.take_unreported() };
            tell(&live.events, &mut live.job, Event::Text { choice: index, text, ids });
            // A complete stop string had waited for a longer one that begins earlier.
            if response.over() {
                finish = Finish::Stop;
            }
        }
        if let Some(wanted) = live.job.checkpoints.as_ref().filter(|wanted| wanted.answers) {
            let (slot, fed) = received(&response, place);
            let (read, answer) = (live.job.ids.len() - live.replayed, response.fed(fed).to_vec());
            (wanted.to)(Checkpoint { read, answer, segments: self.backend.snapshot(slot) });
        }
        let kept = live.job.keep.then(|| Box::new(keep(live, &response, place, &*self.backend, &*self.text)));
        let done = Event::Done { choice: index, finish, sampled: response.sampled(), kept };
        if live.choices.iter().any(Option::is_some) {
            return send(&live.events, done);
        }
        let millis = (clock::now() - live.since).as_millis() as u64;
        let average = self.gauges.job_millis.load(Ordering::Relaxed);
        let average = if average == 0 { millis } else { (7 * average + millis) / 8 };
        self.gauges.job_millis.store(average, Ordering::Relaxed);
        self.leave(id, done);
    }

    /// Sends a job's last event. Its place is free by then: who hears of the end may take it.
    pub(super) fn leave(&mut self, id: JobId, last: Event) {
        if let Some(Live { events, permit, .. }) = self.jobs.remove(&id) {
            drop(permit);
            send(&events, last);
        }
    }
}

/// The slot of the last state that has read nothing the client did not receive, and how many tokens of the response it has.
fn received(response: &Response, place: Place) -> (SlotId, usize) {
    if place.fed <= response.delivered_tokens() {
        return (place.current, place.fed);
    }
    place.anchor.expect("a state that has read text which is held back has an anchor before it")
}

/// The sequence as it is to be kept: a state that has read nothing the client did not receive, and what follows it.
fn keep(live: &Live, response: &Response, place: Place, backend: &dyn Backend, text: &dyn Tokenizer) -> Kept {
    let job = &live.job;
    let (slot, fed) = received(response, place);
    let pending = response.pending(fed, text);
    let mut ids = if job.goes_on { Vec::new() } else { job.ids[..job.ids.len() - live.replayed].to_vec() };
    ids.extend_from_slice(response.fed(fed));
    ids.extend_from_slice(&pending.ends);
    let memory = Memory {
        segments: backend.snapshot(slot),
        consumed: response.position(fed),
        pending,
        tail: response.tail(fed),
        counts: response.counts(),
    };
    Kept { memory, ids }
}
