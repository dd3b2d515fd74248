//! What the engine knows of a job: where its states are, and how far its choices have come.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::draft::Drafter;
use super::park::Parked;
use super::response::Response;
use super::{Event, Job, Permit};
use crate::scheduler::Seat;
use crate::types::{Finish, SlotId};

/// A job in the engine, waiting, running or parked.
pub(super) struct Live {
    pub job: Job,
    pub events: UnboundedSender<Event>,
    /// `None` once it was parked: somebody else may have its place.
    pub permit: Option<Permit>,
    pub since: Instant,
    pub seats: Vec<Seat>,
    /// How many of the job's ids are replayed ones of the response.
    pub replayed: usize,
    /// Where the prompt is read.
    pub prompt: Place,
    /// What every choice begins as.
    pub response: Response,
    /// Once the prompt is read; `None` = done.
    pub choices: Vec<Option<Choice>>,
    /// Its states while it is parked.
    pub parked: Option<Parked>,
    /// The same while it waits for seats to go on.
    pub resting: Option<Parked>,
}

pub(super) struct Choice {
    pub response: Response,
    pub place: Place,
    pub drafter: Drafter,
    /// What its next row reads after the tokens that wait, not knowing yet whether it will be the response's.
    pub draft: Vec<u32>,
    /// The state after the draft and how many tokens it has read, while that is being found out.
    pub ahead: Option<(SlotId, usize)>,
    /// How it ended, while the state to be kept of it has still to read on.
    pub ending: Option<Finish>,
}

/// Where a sequence's state is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub current: SlotId,
    /// How many tokens of the response `current` has read.
    pub fed: usize,
    /// An earlier state and how many tokens it has read: kept while text after it is held back, because a stop string
    /// may yet take that text out of the response, and a recurrent state cannot unread.
    pub anchor: Option<(SlotId, usize)>,
    /// Other choices begin from `current` in the next step: it must not be written over in it.
    pub shared: bool,
}

impl Place {
    /// The slot the next step writes, of the two that are the sequence's own; never the current one if that must `stay`.
    pub fn into(self, own: [SlotId; 2], stay: bool) -> SlotId {
        let keep = stay || self.shared || self.anchor.is_some_and(|(slot, _)| slot == self.current);
        if own.contains(&self.current) && !keep {
            return self.current;
        }
        let kept = [Some(self.current), self.anchor.map(|(slot, _)| slot)];
        own.into_iter().find(|&slot| !kept.contains(&Some(slot))).expect("one of two slots is not the anchor")
    }

    /// Whether a slot is left for what follows the current state, which stays.
    pub fn has_spare(self, own: [SlotId; 2]) -> bool {
        own.contains(&self.current) && self.anchor.is_none_or(|(slot, _)| slot == self.current)
    }
}

/// Sends text, if there is any and an earlier process has not sent it.
pub(super) fn tell(events: &UnboundedSender<Event>, job: &mut Job, event: Event) {
    if matches!(&event, Event::Text { text, .. } if text.is_empty()) {
        return;
    }
    match job.replay.events.checked_sub(1) {
        Some(left) => job.replay.events = left,
        None => send(events, event),
    }
}

/// Sends an event. Nobody listening is no error: the job is dropped before the next step.
pub(super) fn send(events: &UnboundedSender<Event>, event: Event) {
    let _ = events.send(event);
}
