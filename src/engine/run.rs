//! The loop of one engine.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::draw::{Draw, Drawn, Logits, Said};
use super::live::{Choice, Live, Place, send, tell};
use super::pace::{Load, Pace};
use super::response::Response;
use super::worth::{Ahead, Costs};
use super::{Backend, Event, Failure, Gauges, Kept, Letter, Submission, middle, replay};
use crate::sample;
use crate::scheduler::{JobId, Limits, Need, Next, Plan, Scheduler, Seat, Span};
use crate::telemetry::{clock, metrics};
use crate::text::Tokenizer;
use crate::types::{Finish, Memory, Row, SeqId, SlotId, Want};

/// Everything the engine thread owns.
pub(super) struct Engine {
    name: String,
    pub(super) backend: Box<dyn Backend>,
    pub(super) text: Arc<dyn Tokenizer>,
    pub(super) scheduler: Scheduler,
    seats: usize,
    /// For states in the middle of a step's spans.
    pub(super) spare: Range<u32>,
    pub(super) jobs: BTreeMap<JobId, Live>,
    next_job: u64,
    pub(super) gauges: Arc<Gauges>,
    /// Of the step under way; kept so that no step allocates them.
    ids: Vec<u32>,
    logits: Vec<f32>,
    costs: Costs,
    pace: Pace,
}

impl Engine {
    pub fn new(
        name: &str,
        backend: Box<dyn Backend>,
        text: Arc<dyn Tokenizer>,
        limits: Limits,
        gauges: Arc<Gauges>,
    ) -> Self {
        // The semaphore of the handle bounds the queue; a job that got its permit is never refused here.
        let scheduler = Scheduler::new(Limits { queue: limits.queue + limits.seats, ..limits });
        let spare = 2 * limits.seats as u32..backend.slots() as u32;
        let scheduler = scheduler.passing(spare.len());
        Self {
            name: name.into(),
            backend,
            text,
            scheduler,
            seats: limits.seats,
            spare,
            jobs: BTreeMap::new(),
            next_job: 0,
            gauges,
            ids: Vec::new(),
            logits: Vec::new(),
            costs: Costs::new(),
            pace: Pace::default(),
        }
    }

    /// Runs until the handle is dropped.
    pub fn run(mut self, arrivals: &Receiver<Letter>) {
        while self.receive(arrivals) {
            self.drop_deserted();
            self.heed_pauses();
            metrics::occupancy(
                &self.name,
                self.scheduler.waiting(),
                self.seats - self.scheduler.free_seats(),
                self.seats,
            );
            let parked = self.jobs.values().filter_map(|live| live.parked.as_ref());
            metrics::parked(&self.name, parked.clone().count(), parked.map(|parked| parked.bytes).sum());
            let plan = self.scheduler.plan_within(|busy| self.pace.room(&self.costs, busy));
            if !plan.spans.is_empty() {
                self.step(&plan);
            }
        }
        for id in self.jobs.keys().copied().collect::<Vec<_>>() {
            self.fail(id, Failure::Other("the server is shutting down".into()));
        }
    }

    /// Takes in what has arrived, and waits for it when there is nothing else to do. False when nobody can send any more.
    fn receive(&mut self, arrivals: &Receiver<Letter>) -> bool {
        if self.scheduler.idle() {
            metrics::occupancy(&self.name, 0, 0, self.seats);
            match arrivals.recv() {
                Ok(letter) => self.open(letter),
                Err(_) => return false,
            }
        }
        loop {
            match arrivals.try_recv() {
                Ok(letter) => self.open(letter),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn open(&mut self, letter: Letter) {
        if let Letter::Job(submission) = letter {
            self.take(*submission);
        }
    }

    fn take(&mut self, Submission { mut job, events, permit }: Submission) {
        let id = JobId(self.next_job);
        self.next_job += 1;
        let mut response = Response::new(&job, &*self.text);
        let primed = response.take_primed();
        tell(&events, &mut job, Event::Text { choice: 0, text: primed, ids: Vec::new() });
        // A stop string ended it before, or there is nothing to read.
        if response.over() || job.ids.is_empty() {
            let ids = |memory: &Memory| if job.goes_on { memory.pending.ends.clone() } else { Vec::new() };
            let kept = job
                .memory
                .as_deref()
                .filter(|_| job.keep)
                .map(|memory| Box::new(Kept { memory: memory.clone(), ids: ids(memory) }));
            drop(permit);
            return send(&events, Event::Done { choice: 0, finish: Finish::Stop, sampled: 0, kept });
        }
        let replayed = replay::begin(&mut job, &mut response, &*self.text);
        let stops = job.checkpoints.as_ref().map_or_else(Vec::new, |wanted| wanted.at.clone());
        let need = Need { tenant: job.tenant.clone(), tokens: job.ids.len(), seats: job.choices, stops };
        if let Err(refused) = self.scheduler.submit(id, need) {
            drop(permit);
            return send(&events, Event::Failed(Failure::Other(refused.to_string())));
        }
        let prompt = Place { current: SlotId(0), fed: 0, anchor: None, shared: false };
        let since = clock::now();
        let (seats, choices, parked, resting) = (Vec::new(), Vec::new(), None, None);
        let permit = Some(permit);
        let live = Live { job, events, permit, since, seats, replayed, prompt, response, choices, parked, resting };
        self.jobs.insert(id, live);
    }

    /// Cancels the jobs nobody listens to.
    fn drop_deserted(&mut self) {
        let deserted: Vec<_> = self.jobs.iter().filter(|(_, j)| j.events.is_closed()).map(|(&id, _)| id).collect();
        for id in deserted {
            self.jobs.remove(&id);
            self.scheduler.cancel(id);
        }
    }

    fn fail(&mut self, id: JobId, why: Failure) {
        self.scheduler.cancel(id);
        self.leave(id, Event::Failed(why));
    }

    fn step(&mut self, plan: &Plan) {
        for (id, seats) in &plan.admitted {
            if let Err(why) = self.seat(*id, seats) {
                self.fail(*id, Failure::Other(why));
            }
        }
        self.ids.clear();
        let spans: Vec<&Span> = plan.spans.iter().filter(|span| self.jobs.contains_key(&span.job)).collect();
        let mut spare = self.spare.clone();
        let rows: Vec<Row> = spans.iter().flat_map(|span| self.rows(span, &mut spare)).collect();
        if rows.is_empty() {
            return;
        }
        let began = clock::now();
        let (backend, ids, logits) = (&mut self.backend, &self.ids, &mut self.logits);
        // A panic here is a defect of a kernel. It must cost the jobs of this step, not the server: every slot is written
        // afresh before it is used again.
        let outcome = catch_unwind(AssertUnwindSafe(|| backend.step(ids, &rows, logits)))
            .unwrap_or_else(|_| Err("the model's step panicked".into()));
        metrics::step(&self.name, ids.len(), clock::now() - began);
        if let Err(why) = outcome {
            tracing::error!(model = self.name, why, "a step failed");
            spans.iter().for_each(|span| self.fail(span.job, Failure::Other(why.clone())));
            return;
        }
        let mut logits = std::mem::take(&mut self.logits);
        let mut wanted = logits.as_mut_slice();
        let (mut draws, mut ended) = (Vec::new(), Vec::new());
        for (span, chain) in spans.iter().zip(rows.chunk_by(|before, row| row.goes_on(before))) {
            self.moved(span, chain);
            let row = chain.last().expect("a span is at least one row");
            let positions = match row.want {
                Want::Nothing => {
                    ended.extend(span.choice.map(|choice| (span.job, choice)));
                    continue;
                }
                Want::From(first) => row.tokens.len() - first,
                Want::Last | Want::All => 1,
            };
            let logits = wanted.split_off_mut(..positions * self.backend.vocabulary());
            let logits = logits.expect("logits of every position that a row wants them of");
            let choices = span.choice.map_or_else(|| self.begin(span.job), |choice| choice..choice + 1);
            if self.jobs.get(&span.job).is_some_and(|live| live.job.max_tokens == 0) {
                // Nothing is to be said: the state after the prompt is what was asked for.
                choices.for_each(|choice| self.finish(span.job, choice, Finish::Length));
                continue;
            }
            // Sampling spoils the logits, so choices that begin from the same ones have copies.
            let copies: Vec<_> = choices.clone().skip(1).map(|_| Logits::Copy(logits.to_vec())).collect();
            let live = self.jobs.get_mut(&span.job).expect("only live jobs are planned");
            for (index, logits) in choices.zip(std::iter::once(Logits::Own(logits)).chain(copies)) {
                let choice = live.choices[index].take().expect("only live choices are planned");
                draws.push(Draw { job: span.job, index, choice, logits, drawn: Drawn::default() });
            }
        }
        let drawn = self.sample(draws);
        self.measured(&spans, clock::now() - began);
        let mut ahead = Ahead { tokens: drawn.len(), streams: drawn.len(), waiting: 1, trust: 0.0 };
        for (job, index, drawn) in drawn {
            ahead.tokens += self.advance(job, index, (drawn, ahead));
        }
        for (job, index) in ended {
            self.complete(job, index);
        }
        self.logits = logits;
    }

    /// A step took so long, sampling included.
    fn measured(&mut self, spans: &[&Span], took: Duration) {
        let prompts = spans.iter().filter(|span| span.choice.is_none()).map(|span| span.tokens.len()).sum();
        let load = Load { decoding: self.ids.len() - prompts, prompts };
        if prompts == 0 {
            self.costs.measured(load.decoding, took);
        }
        self.pace.measured(&self.costs, load, took);
    }

    /// Chooses the next tokens of every choice in `draws`, which do not depend on each other, on all processors, and puts
    /// the choices back.
    fn sample(&mut self, draws: Vec<Draw>) -> Vec<(JobId, usize, Drawn)> {
        let draws: Vec<_> = draws.into_iter().map(Mutex::new).collect();
        let (vocabulary, text) = (self.backend.vocabulary(), &*self.text);
        self.backend.share(draws.len(), &|n| {
            draws[n].lock().unwrap_or_else(PoisonError::into_inner).run(vocabulary, text);
        });
        let put_back = |draw: Mutex<Draw>| {
            let Draw { job, index, choice, drawn, .. } = draw.into_inner().unwrap_or_else(PoisonError::into_inner);
            self.jobs.get_mut(&job)?.choices[index] = Some(choice);
            Some((job, index, drawn))
        };
        draws.into_iter().filter_map(put_back).collect()
    }

    /// Gives a job its seats and puts its state there.
    fn seat(&mut self, id: JobId, seats: &[Seat]) -> Result<(), String> {
        let Some(live) = self.jobs.get_mut(&id) else { return Ok(()) };
        if let Some(parked) = live.resting.take().filter(|parked| !parked.is_fresh()) {
            return self.sit_again(id, seats, parked);
        }
        let slot = seats[0].slots()[0];
        live.seats = seats.to_vec();
        // Text of what is read now is still held back: the state before it must stay until that is decided.
        let anchored = live.job.keeps() && live.response.delivered_tokens() < live.response.tokens();
        live.prompt = Place { current: slot, fed: 0, anchor: anchored.then_some((slot, 0)), shared: false };
        match &live.job.memory {
            Some(memory) => self.backend.restore(slot, &memory.segments)?,
            None => self.backend.reset(slot),
        }
        Ok(())
    }

    /// The row of a span, as a whole; its tokens are appended to the step's ids.
    pub(super) fn row(&mut self, span: &Span) -> Row {
        let live = &self.jobs[&span.job];
        let start = self.ids.len();
        let (place, at, stay, want) = match span.choice {
            None => {
                self.ids.extend_from_slice(&live.job.ids[span.tokens.clone()]);
                let want = if span.last { Want::Last } else { Want::Nothing };
                (live.prompt, live.job.at() + span.tokens.start as u64, false, want)
            }
            Some(choice) => {
                let choice = live.choices[choice].as_ref().expect("only live choices are planned");
                self.ids.extend_from_slice(choice.waiting());
                self.ids.extend_from_slice(&choice.draft);
                let at = choice.response.position(choice.place.fed);
                (choice.place, at, !choice.draft.is_empty(), choice.wants())
            }
        };
        Row {
            // One number for each choice of each job; the prompt is its first choice's.
            seq: SeqId(span.job.0 << 16 | span.choice.unwrap_or(0) as u64),
            from: place.current,
            into: place.into(span.seat.slots(), stay),
            at,
            tokens: start..self.ids.len(),
            want,
        }
    }

    /// Notes where the state is now that the rows of a span have left, and hands out those that are wanted.
    fn moved(&mut self, span: &Span, chain: &[Row]) {
        let (Some(live), Some(row)) = (self.jobs.get_mut(&span.job), chain.last()) else { return };
        match span.choice {
            None => {
                live.prompt.current = row.into;
                if let Some(wanted) = &live.job.checkpoints {
                    middle::hand_out(wanted, span, chain, &*self.backend);
                }
            }
            Some(choice) => live.choices[choice].as_mut().expect("only live choices are planned").moved(row),
        }
    }

    /// The prompt is read: makes its choices, which sample their first token from the same logits, and says which.
    fn begin(&mut self, id: JobId) -> Range<usize> {
        let live = self.jobs.get_mut(&id).expect("only live jobs are planned");
        let (first, n) = (live.job.first_choice, live.job.choices);
        let fed = live.response.tokens();
        let place = Place { fed, shared: n > 1, ..live.prompt };
        let speculation = self.backend.speculation();
        let choice = |j| Some(Choice::new(live.response.for_choice(first + j), place, speculation));
        live.choices = (0..n).map(choice).collect();
        0..n
    }

    /// Sends the text of a choice's next tokens and says how the choice goes on; gives the tokens that its next row has
    /// beyond the one that every step reads.
    fn advance(&mut self, id: JobId, index: usize, (drawn, ahead): (Drawn, Ahead)) -> usize {
        let Some(live) = self.jobs.get_mut(&id) else { return 0 };
        let Some(choice) = live.choices[index].as_mut() else { return 0 };
        for said in &drawn.said {
            let Said { text, ids } = said.clone();
            tell(&live.events, &mut live.job, Event::Text { choice: index, text, ids });
        }
        if !choice.draft.is_empty() {
            metrics::speculation(&self.name, choice.draft.len(), drawn.right);
        }
        choice.settle(&drawn, live.job.keeps());
        match drawn.end {
            None => {}
            Some(Ok(finish)) => {
                self.finish(id, index, finish);
                return 0;
            }
            Some(Err(sample::Error::NoToken)) => {
                self.fail(id, Failure::NotFinite);
                return 0;
            }
        }
        let own = live.seats[index].slots();
        if live.job.keeps() {
            let (place, delivered) = (&mut choice.place, choice.response.delivered_tokens());
            if delivered == choice.response.tokens() {
                place.anchor = None;
            } else if place.fed <= delivered {
                // The prompt's state is in another choice's seat, which will write over it.
                if !own.contains(&place.current) {
                    self.backend.copy(place.current, own[1]);
                    place.anchor = Some((own[1], place.fed));
                } else {
                    place.anchor = Some((place.current, place.fed));
                }
            }
        }
        let more = choice.look_ahead(own, ahead, (&self.costs, self.backend.speculation()));
        self.scheduler.commit(id, index, Next::Tokens(1 + more));
        more
    }
}
