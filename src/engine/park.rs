//! Jobs that rest: their states are out of the slots, and their seats are free for others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::live::{Choice, Live, Place};
use super::run::Engine;
use crate::scheduler::{JobId, Seat};
use crate::types::SegmentData;

/// Holds a job, and lets it go on: whoever submits it keeps a clone. The engine heeds it before its next step, if it is
/// told to [look](super::Handle::look). A job that pauses gives its place back, and needs none to go on.
#[derive(Clone, Debug, Default)]
pub struct Pause(Arc<AtomicBool>);

impl Pause {
    /// Says whether it changed anything.
    pub fn set(&self, on: bool) -> bool {
        self.0.swap(on, Ordering::AcqRel) != on
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The states of a job that has no seats.
#[derive(Default)]
pub(super) struct Parked {
    /// While the prompt is read.
    prompt: Option<Held>,
    /// After that, of each choice that is not done.
    choices: Vec<Option<Held>>,
    pub(super) bytes: u64,
}

/// A [`Place`] with the states themselves.
struct Held {
    current: Vec<SegmentData>,
    fed: usize,
    /// `None` in it = `current`.
    anchor: Option<(Option<Vec<SegmentData>>, usize)>,
}

impl Engine {
    /// Parks the jobs that are to pause, and lets those go on that are not to any more.
    pub(super) fn heed_pauses(&mut self) {
        let changed = |live: &Live| live.job.pause.is_set() != live.parked.is_some();
        let changed: Vec<JobId> = self.jobs.iter().filter(|(_, live)| changed(live)).map(|(&id, _)| id).collect();
        for id in changed {
            let live = self.jobs.get_mut(&id).expect("it was just there");
            // What was parked twice before it had a seat still has its states.
            if !live.job.pause.is_set() {
                live.resting = live.parked.take();
                self.scheduler.unpark(id, live.job.tenant.clone());
            } else {
                let mut parked = live.resting.take().unwrap_or_else(|| hold(live, &*self.backend));
                parked.bytes = parked.states().flatten().map(|segment| 4 * segment.data.len() as u64).sum();
                live.parked = Some(parked);
                live.permit = None;
                // Who waits for them must not wait for its reader.
                live.job.checkpoints = None;
                self.scheduler.park(id);
            }
        }
    }

    /// Puts the states of a job that was parked into its new seats.
    pub(super) fn sit_again(&mut self, id: JobId, seats: &[Seat], parked: Parked) -> Result<(), String> {
        let Some(live) = self.jobs.get_mut(&id) else { return Ok(()) };
        let Parked { prompt, choices, .. } = parked;
        if let Some(held) = prompt {
            live.seats = seats.to_vec();
            live.prompt = restore(&mut *self.backend, held, seats[0])?;
            return Ok(());
        }
        let mut free = seats.iter();
        // Of a choice that is done the seat does not matter.
        live.seats = vec![seats[0]; choices.len()];
        for (index, held) in choices.into_iter().enumerate() {
            let (Some(held), Some(choice)) = (held, live.choices[index].as_mut()) else { continue };
            let seat = *free.next().expect("a seat for each choice that is not done");
            choice.place = restore(&mut *self.backend, held, seat)?;
            live.seats[index] = seat;
        }
        Ok(())
    }
}

/// Copies a job's states out of its slots.
fn hold(live: &Live, backend: &dyn super::Backend) -> Parked {
    let held = |place: &Place| Held {
        current: backend.snapshot(place.current),
        fed: place.fed,
        anchor: place.anchor.map(|(slot, fed)| ((slot != place.current).then(|| backend.snapshot(slot)), fed)),
    };
    if live.seats.is_empty() {
        // It has not begun.
        return Parked::default();
    }
    if live.choices.is_empty() {
        return Parked { prompt: Some(held(&live.prompt)), ..Parked::default() };
    }
    let choice = |choice: &Option<Choice>| choice.as_ref().map(|choice| held(&choice.place));
    Parked { choices: live.choices.iter().map(choice).collect(), ..Parked::default() }
}

fn restore(backend: &mut dyn super::Backend, held: Held, seat: Seat) -> Result<Place, String> {
    let [current, other] = seat.slots();
    backend.restore(current, &held.current)?;
    let anchor = match held.anchor {
        None => None,
        Some((None, fed)) => Some((current, fed)),
        Some((Some(state), fed)) => {
            backend.restore(other, &state)?;
            Some((other, fed))
        }
    };
    Ok(Place { current, fed: held.fed, anchor, shared: false })
}

impl Parked {
    /// Whether the job had not begun, so that it begins as any other.
    pub(super) fn is_fresh(&self) -> bool {
        self.prompt.is_none() && self.choices.is_empty()
    }

    fn states(&self) -> impl Iterator<Item = &Vec<SegmentData>> {
        let held = self.prompt.iter().chain(self.choices.iter().flatten());
        held.flat_map(|held| {
            let anchor = held.anchor.as_ref().and_then(|(state, _)| state.as_ref());
            std::iter::once(&held.current).chain(anchor)
        })
    }
}
