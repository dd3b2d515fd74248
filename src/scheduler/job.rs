//! One admitted job: first it reads its prompt, then it is as many sequences as it has choices.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use super::{JobId, Seat, Span};

/// A job in its seats.
///
/// The prompt is read once, in the seat of the first choice; every choice then begins from the state found there and
/// moves it to its own seat with its first span.
#[derive(Clone, Debug)]
pub(super) struct Job {
    /// What of the prompt is still to read.
    unread: Range<usize>,
    /// Where in it a state is wanted, ascending; only those ahead.
    stops: VecDeque<usize>,
    /// `None` = done.
    choices: Vec<Option<Choice>>,
    /// The seats it holds; fewer as choices end.
    seats: BTreeSet<Seat>,
}

#[derive(Clone, Copy, Debug)]
struct Choice {
    seat: Seat,
    /// Where its state is now: another seat only between the prompt's end and its own first span.
    from: Seat,
    /// How many tokens wait to be read.
    waiting: usize,
}

/// A job without seats: what is left for it to do once it has some.
#[derive(Clone, Debug)]
pub(super) struct Rest {
    unread: Range<usize>,
    /// Where reading stops on the way.
    stops: VecDeque<usize>,
    /// The tokens that wait in each choice; `None` = done.
    choices: Vec<Option<usize>>,
}

impl Rest {
    /// Of a job that has `tokens` tokens to read, stopping at `stops`, for `choices` choices.
    pub fn new(tokens: usize, choices: usize, stops: Vec<usize>) -> Self {
        Self { unread: 0..tokens, stops: stops.into(), choices: vec![Some(0); choices] }
    }

    /// How many seats it takes: one for each choice that is not done.
    pub fn seats(&self) -> usize {
        self.choices.iter().flatten().count()
    }

    /// The job in as many seats. Its states must be there: that of the prompt in the first, or that of each choice in
    /// its own.
    pub fn sit(self, seats: &[Seat]) -> Job {
        let mut free = seats.iter();
        let reading = !self.unread.is_empty();
        let choices = self.choices.into_iter().map(|waiting| {
            let waiting = waiting?;
            let seat = *free.next().expect("a seat for each choice that is not done");
            Some(Choice { seat, from: if reading { seats[0] } else { seat }, waiting })
        });
        let choices = choices.collect();
        let seats = seats.iter().copied().collect();
        let mut job = Job { unread: self.unread, stops: self.stops, choices, seats };
        job.pass();
        job
    }
}

impl Job {
    /// What is left to do.
    pub fn rest(&self) -> Rest {
        let choices = self.choices.iter().map(|choice| choice.map(|choice| choice.waiting)).collect();
        Rest { unread: self.unread.clone(), stops: self.stops.clone(), choices }
    }

    /// Forgets the stops that lie behind.
    fn pass(&mut self) {
        while self.stops.front().is_some_and(|&stop| stop <= self.unread.start) {
            self.stops.pop_front();
        }
    }

    /// Tokens of the prompt that are still to read.
    pub fn unread(&self) -> usize {
        self.unread.len()
    }

    /// How many of them the next span can have when it may pass over `pass` stops.
    pub fn next(&self, pass: usize) -> usize {
        self.stops.get(pass).map_or(self.unread.end, |&stop| stop.min(self.unread.end)) - self.unread.start
    }

    pub fn seats(&self) -> &BTreeSet<Seat> {
        &self.seats
    }

    /// Whether some choice's last span was planned but what follows it was not committed.
    pub fn awaits_commit(&self) -> bool {
        self.unread.is_empty() && self.choices.iter().flatten().any(|choice| choice.waiting == 0)
    }

    /// Reads the next `tokens` tokens of the prompt.
    pub fn read(&mut self, id: JobId, tokens: usize) -> Span {
        let seat = self.choices.iter().flatten().next().expect("a job without live choices is dropped").from;
        let tokens = self.unread.start..self.unread.start + tokens;
        self.unread.start = tokens.end;
        self.pass();
        Span { job: id, choice: None, from: seat, seat, tokens, last: self.unread.is_empty() }
    }

    /// Reads all that waits in every choice.
    pub fn decode(&mut self, id: JobId, spans: &mut Vec<Span>) {
        for (index, choice) in self.choices.iter_mut().enumerate() {
            let Some(choice) = choice.as_mut().filter(|choice| choice.waiting > 0) else { continue };
            let Choice { seat, from, waiting } = *choice;
            *choice = Choice { seat, from: seat, waiting: 0 };
            spans.push(Span { job: id, choice: Some(index), from, seat, tokens: 0..waiting, last: true });
        }
    }

    /// `tokens` tokens wait in a choice whose last span was read; none is the end of it.
    pub fn set(&mut self, choice: usize, tokens: usize) {
        let Some(slot) = self.choices.get_mut(choice) else { return };
        match slot {
            Some(choice) if tokens > 0 => {
                debug_assert!(self.unread.is_empty() && choice.waiting == 0, "its last span was not read yet");
                choice.waiting = tokens;
            }
            _ => *slot = None,
        }
    }

    /// Gives back the seats in which no choice lives and from which none has still to move.
    pub fn vacate(&mut self) -> BTreeSet<Seat> {
        let held = self.choices.iter().flatten().flat_map(|choice| [choice.seat, choice.from]).collect();
        let left = self.seats.difference(&held).copied().collect();
        self.seats = held;
        left
    }
}
