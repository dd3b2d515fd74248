//! L1: who runs next. A value machine: it is told what came and what happened, and says what to run.
//!
//! A job goes `submit → (plan: admitted) → (plan: spans of its prompt)… → commit of every choice → (plan: one span a
//! choice → commit)…` until every choice is done or the job is cancelled. It knows tokens only by number, states only by
//! [`Seat`], and neither clock nor channel; equal calls give equal plans.
//!
//! Everything that runs is *n tokens waiting*. A prompt's tokens are divisible: they fill what the step's budget
//! leaves. A choice's tokens (the one just sampled; a draft) are not: they run in the very next step, whole and before
//! any prompt, so that a long prompt never stalls a running stream.
//!
//! A job may be *parked* between two steps: it leaves its seats, or the queue, and is as it was when it is unparked and
//! has seats again. Who keeps its states meanwhile is not the scheduler's business.

mod job;
mod ring;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use crate::types::{SlotId, Tenant};
use job::{Job, Rest};
use ring::Ring;

/// A request for some choices of one prompt. An id is never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// What a running sequence owns: two slots of the state pool, its state in one and the other to write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seat(pub u32);

impl Seat {
    /// Seat *i* is the slots 2*i* and 2*i* + 1.
    pub fn slots(self) -> [SlotId; 2] {
        [SlotId(2 * self.0), SlotId(2 * self.0 + 1)]
    }
}

/// How much may run and wait; none is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that can run at once: half the slots of the pool.
    pub seats: usize,
    /// Jobs that may wait for seats.
    pub queue: usize,
    /// Prompt tokens a step when nobody is decoding.
    pub budget: usize,
    /// Prompt tokens a step at most while somebody is: what a running stream may have to wait for.
    pub busy_budget: usize,
}

/// What a job needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    pub tenant: Tenant,
    /// Tokens to read before the first is sampled; not 0.
    pub tokens: usize,
    /// How many choices it has, and so seats it takes, all when it is admitted; not 0.
    pub seats: usize,
    /// Where in its tokens, ascending, the state is wanted: a span ends there, or [passes over](Scheduler::passing) it.
    pub stops: Vec<usize>,
}

/// Why a job was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{0} jobs wait already; no more can")]
    Full(usize),
    #[error("the job needs {needs} seats at once and there are {seats}")]
    TooLarge { needs: usize, seats: usize },
    #[error("a job has at least one token to read and one choice")]
    Empty,
}

/// What a step's prompts are read beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy {
    /// Choices that decode; not 0.
    pub streams: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Prompts that are being read.
    pub prompts: usize,
}

/// What to run in one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Jobs that begin now, or go on after they were parked, with a seat for each choice that is not done. The first
    /// must hold the state their prompt is at or, if it is read, each that of its choice.
    pub admitted: Vec<(JobId, Vec<Seat>)>,
    /// First what decodes, by job and choice, then chunks of prompts. At most one span for each sequence.
    pub spans: Vec<Span>,
}

/// Some of the tokens that wait in one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub job: JobId,
    /// `None` = the prompt, which all choices share.
    pub choice: Option<usize>,
    /// Where the sequence's state is. Not `seat` only in the first span of a choice other than the first: it leaves
    /// the seat in which the prompt was read, which in that step must not be written over.
    pub from: Seat,
    /// Where its state will be.
    pub seat: Seat,
    /// Which tokens: of the prompt's, or of those last committed. Never empty.
    pub tokens: Range<usize>,
    /// Whether it reaches the end of what waits, so that its logits are wanted and [`Scheduler::commit`] must follow: for
    /// its choice, or for every choice if it is the prompt's.
    pub last: bool,
}

/// How a choice goes on when all that waited in it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// So many tokens wait; 0 is as good as `Done`.
    Tokens(usize),
    Done,
}

/// The machine. Every job it accepts runs to its end:
///
/// * Seats are given out strictly by turn (tenants in a ring, first come first served within each). When the job whose
///   turn it is does not fit, nobody is admitted before it. Some seats then stay empty for a while; in exchange a job
///   that needs many cannot be overtaken for ever by jobs that need few. As a job takes all its seats at once and needs no
///   more than there are, those who run never wait for those who do not: no deadlock.
/// * Whatever decodes does so in every step.
/// * Prompt tokens are shared equally between the tenants that read, and who comes first when they do not divide changes
///   with every step: a tenant reads at least once in as many steps as tenants read. Of a tenant's prompts those with
///   the least left are read first, so that a short one does not wait for a long one; but a quarter is the oldest's, so that
///   it is not overtaken for ever.
#[derive(Clone, Debug)]
pub struct Scheduler {
    limits: Limits,
    /// How many stops the spans of one plan may pass over.
    passes: usize,
    waiting: Ring<Waiting>,
    running: BTreeMap<JobId, Job>,
    parked: BTreeMap<JobId, Rest>,
    /// The running jobs whose prompt is not read yet.
    reading: Ring<JobId>,
    free: BTreeSet<Seat>,
}

#[derive(Clone, Debug)]
struct Waiting {
    job: JobId,
    rest: Rest,
    /// It was parked: it had its place when it was accepted and needs none in the queue.
    again: bool,
}

impl Scheduler {
    /// An idle machine.
    ///
    /// # Panics
    /// If a limit is zero: nothing could ever run.
    pub fn new(limits: Limits) -> Self {
        let Limits { seats, queue, budget, busy_budget } = limits;
        assert!([seats, queue, budget, busy_budget].iter().all(|&limit| limit > 0), "a limit is zero: {limits:?}");
        let free = (0..).take(seats).map(Seat).collect();
        let (waiting, reading) = (Ring::new(), Ring::new());
        Self { limits, passes: 0, waiting, running: BTreeMap::new(), parked: BTreeMap::new(), reading, free }
    }

    /// The same, if so many states in the middle of its spans can be had of one step: a span has to end only where one more
    /// would be wanted.
    pub fn passing(self, passes: usize) -> Self {
        Self { passes, ..self }
    }

    /// Lets a new job wait for its seats.
    pub fn submit(&mut self, job: JobId, need: Need) -> Result<(), Error> {
        let Need { tenant, tokens, seats, stops } = need;
        if tokens == 0 || seats == 0 {
            return Err(Error::Empty);
        }
        if seats > self.limits.seats {
            return Err(Error::TooLarge { needs: seats, seats: self.limits.seats });
        }
        if self.queued() >= self.limits.queue {
            return Err(Error::Full(self.limits.queue));
        }
        self.waiting.push(tenant, Waiting { job, rest: Rest::new(tokens, seats, stops), again: false });
        self.audit();
        Ok(())
    }

    /// What to run in the next step; empty only when there is nothing to do. The spans count as read: if the step
    /// fails, cancel its jobs.
    pub fn plan(&mut self) -> Plan {
        self.plan_within(|_| usize::MAX)
    }

    /// The same, with no more prompt tokens than `room` says there is for beside what decodes. 0 is no answer for ever.
    pub fn plan_within(&mut self, room: impl FnOnce(Busy) -> usize) -> Plan {
        debug_assert!(!self.running.values().any(Job::awaits_commit), "the last plan was not committed");
        let admitted = self.admit();
        let mut spans = self.decode();
        let tokens = spans.iter().map(|span| span.tokens.len()).sum();
        let busy = Busy { streams: spans.len(), tokens, prompts: self.reading.len() };
        let budget = if spans.is_empty() { self.limits.budget } else { self.limits.busy_budget.min(room(busy)) };
        // Without room nobody loses a turn either.
        if budget > 0 {
            spans.extend(self.read(budget));
        }
        self.audit();
        Plan { admitted, spans }
    }

    /// Says how a choice goes on. When it is done its seat is free (the one where the prompt was read: when the other
    /// choices have left it), and with the last choice the job is gone. `Done` may come at any time; a job that was
    /// cancelled meanwhile is no error.
    pub fn commit(&mut self, job: JobId, choice: usize, next: Next) {
        let Some(running) = self.running.get_mut(&job) else { return };
        running.set(choice, if let Next::Tokens(tokens) = next { tokens } else { 0 });
        self.free.extend(running.vacate());
        if running.seats().is_empty() {
            self.cancel(job);
        }
        self.audit();
    }

    /// Takes a job, waiting or running, out of its seats, which are free at once, until [`unpark`](Self::unpark). Only
    /// after everything that was planned is committed. Any other job is no error.
    pub fn park(&mut self, job: JobId) {
        let mut rest = self.waiting.iter().find(|waiting| waiting.job == job).map(|waiting| waiting.rest.clone());
        self.waiting.retain(|waiting| waiting.job != job);
        self.reading.retain(|reading| *reading != job);
        if let Some(running) = self.running.remove(&job) {
            debug_assert!(!running.awaits_commit(), "the last plan was not committed");
            self.free.extend(running.seats());
            rest = Some(running.rest());
        }
        self.parked.extend(rest.map(|rest| (job, rest)));
        self.audit();
    }

    /// Lets a parked job, which is `tenant`'s, wait for seats to go on. It is never refused. Any other job is no error.
    pub fn unpark(&mut self, job: JobId, tenant: Tenant) {
        if let Some(rest) = self.parked.remove(&job) {
            self.waiting.push(tenant, Waiting { job, rest, again: true });
        }
        self.audit();
    }

    /// Drops a job, waiting, running or parked; all its seats are free at once. An unknown job is no error.
    pub fn cancel(&mut self, job: JobId) {
        self.parked.remove(&job);
        self.waiting.retain(|waiting| waiting.job != job);
        self.reading.retain(|reading| *reading != job);
        if let Some(running) = self.running.remove(&job) {
            self.free.extend(running.seats());
        }
        self.audit();
    }

    /// Whether there is nothing to do and nothing to wait for; parked jobs do not wait.
    pub fn idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Jobs without seats.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Jobs that take a place in the queue.
    fn queued(&self) -> usize {
        self.waiting.iter().filter(|waiting| !waiting.again).count()
    }

    /// Jobs in seats.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn free_seats(&self) -> usize {
        self.free.len()
    }

    /// Audits the invariants; debug builds do so after every call.
    ///
    /// # Panics
    /// If one does not hold.
    pub fn check(&self) {
        let taken: Vec<Seat> = self.running.values().flat_map(Job::seats).chain(&self.free).copied().collect();
        assert_eq!(taken.len(), self.limits.seats, "a seat has two owners or none");
        assert_eq!(taken.iter().collect::<BTreeSet<_>>().len(), taken.len(), "a seat has two owners");
        assert!(self.running.values().all(|job| !job.seats().is_empty()), "a job runs without a seat");
        assert!(self.queued() <= self.limits.queue, "more wait than may");
        let waiting: BTreeSet<JobId> = self.waiting.iter().map(|waiting| waiting.job).collect();
        assert_eq!(waiting.len(), self.waiting.len(), "a job waits twice");
        assert!(waiting.iter().all(|job| !self.running.contains_key(job)), "a running job waits");
        let active = |job: &JobId| waiting.contains(job) || self.running.contains_key(job);
        assert!(!self.parked.keys().any(active), "a parked job waits or runs");
        let reading: BTreeSet<JobId> = self.reading.iter().copied().collect();
        let unread = self.running.iter().filter(|(_, job)| job.unread() > 0).map(|(&id, _)| id).collect();
        assert_eq!(reading, unread, "the readers are not the jobs with something to read");
    }

    fn audit(&self) {
        if cfg!(debug_assertions) {
            self.check();
        }
    }

    /// Gives seats to those who wait, strictly by turn.
    fn admit(&mut self) -> Vec<(JobId, Vec<Seat>)> {
        let mut admitted = Vec::new();
        while self.waiting.front().is_some_and(|next| next.rest.seats() <= self.free.len()) {
            let (tenant, Waiting { job, rest, .. }) = self.waiting.pop().expect("there is a front");
            let seats: Vec<Seat> = std::iter::from_fn(|| self.free.pop_first()).take(rest.seats()).collect();
            let sitting = rest.sit(&seats);
            if sitting.unread() > 0 {
                self.reading.push(tenant, job);
            }
            self.running.insert(job, sitting);
            admitted.push((job, seats));
        }
        admitted
    }

    /// Spans of all choices in which tokens wait.
    fn decode(&mut self) -> Vec<Span> {
        let mut spans = Vec::new();
        for (&id, job) in &mut self.running {
            job.decode(id, &mut spans);
            // Free for the next plan: by then this step has moved the state of every choice to its own seat.
            self.free.extend(job.vacate());
        }
        spans
    }

    /// Spans of prompts, at most `budget` tokens: equal shares for the tenants, shortest first within each.
    fn read(&mut self, budget: usize) -> Vec<Span> {
        let pass = self.passes / self.reading.len().max(1);
        let next = |queue: &VecDeque<JobId>| queue.iter().map(|id| self.running[id].next(pass)).sum();
        let demands: Vec<usize> = self.reading.queues().map(next).collect();
        let mut spans = Vec::new();
        for (queue, share) in self.reading.queues().zip(fair_shares(budget, &demands)) {
            let unread: Vec<_> =
                queue.iter().map(|id| (self.running[id].unread(), self.running[id].next(pass))).collect();
            for (&id, tokens) in queue.iter().zip(shortest_first(share, &unread)).filter(|&(_, tokens)| tokens > 0) {
                spans.push(self.running.get_mut(&id).expect("who reads runs").read(id, tokens));
            }
        }
        // In this order: were the first dropped before, the turn of the second would be skipped.
        self.reading.pass();
        self.reading.retain(|id| self.running[id].unread() > 0);
        spans
    }
}

/// Divides `budget` by max–min fairness: all get equally much, but nobody more than it demands, and what one leaves goes
/// to the others. What does not divide goes to the first.
fn fair_shares(mut budget: usize, demands: &[usize]) -> Vec<usize> {
    let mut shares = vec![0; demands.len()];
    loop {
        let unsatisfied = shares.iter().zip(demands).filter(|(share, demand)| share < demand).count();
        if unsatisfied == 0 || budget == 0 {
            return shares;
        }
        let equal = (budget / unsatisfied).max(1);
        for (share, demand) in shares.iter_mut().zip(demands) {
            let more = equal.min(demand - *share).min(budget);
            *share += more;
            budget -= more;
        }
    }
}

/// Divides a tenant's `share` among its prompts, given in the order they came: a quarter for the oldest, the rest for
/// those with the least unread. Of each, (how much is unread, how much of that one span can be).
fn shortest_first(mut share: usize, unread: &[(usize, usize)]) -> Vec<usize> {
    let mut tokens = vec![0; unread.len()];
    let mut order: Vec<usize> = (0..unread.len()).collect();
    order.sort_by_key(|&prompt| unread[prompt].0);
    let quarter = share.div_ceil(4);
    let oldest = (0..unread.len().min(1)).map(|first| (first, quarter));
    let by_length = order.into_iter().map(|prompt| (prompt, usize::MAX));
    for (prompt, most) in oldest.chain(by_length) {
        let more = (unread[prompt].1 - tokens[prompt]).min(most).min(share);
        tokens[prompt] += more;
        share -= more;
    }
    tokens
}

#[cfg(test)]
mod tests;
