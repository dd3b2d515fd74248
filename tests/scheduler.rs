//! Laws of the scheduler, for any order of submits, cancels, steps and endings.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;
use rewake::scheduler::{Busy, Error, JobId, Limits, Need, Next, Plan, Scheduler, Seat};
use rewake::types::Tenant;

/// What the world does to the scheduler.
#[derive(Clone, Debug)]
enum Op {
    /// `lives`: for each choice, the tokens that wait in it after each of its spans; then it is done.
    Submit {
        tenant: usize,
        tokens: usize,
        lives: Vec<Vec<usize>>,
        stops: Vec<usize>,
    },
    /// Of the jobs there are, the one at this place.
    Cancel(prop::sample::Index),
    EndChoice(prop::sample::Index, usize),
    Park(prop::sample::Index),
    /// Of the parked jobs, the one at this place.
    Unpark(prop::sample::Index),
    Step,
}

const TENANTS: [&str; 4] = ["ann", "bob", "cy", "dee"];

fn tenant(index: usize) -> Tenant {
    Tenant::parse(TENANTS[index]).unwrap()
}

/// A job as the world knows it.
#[derive(Clone, Debug)]
struct Known {
    tenant: usize,
    tokens: usize,
    /// Where a span of the prompt must end.
    stops: Vec<usize>,
    /// Prompt tokens read.
    read: usize,
    /// Spans still to come after the present one, for each choice; `None` = done.
    lives: Vec<Option<VecDeque<usize>>>,
    /// Tokens that wait in each choice.
    waiting: Vec<usize>,
    /// Choices that had their first span.
    moved: Vec<bool>,
    /// Empty = not admitted.
    seats: Vec<Seat>,
    parked: bool,
    /// It was parked once, and waits or waited for seats again.
    again: bool,
    /// Steps since it was admitted or since its tenant last read something.
    hungry: usize,
}

impl Known {
    /// The seats it must hold now: one for each choice, and the prompt's while a choice has still to leave it.
    fn holds(&self) -> BTreeSet<Seat> {
        let alive = |choice: &usize| self.lives[*choice].is_some();
        let own = (0..self.seats.len()).filter(alive).map(|choice| self.seats[choice]);
        let shared =
            (0..self.seats.len()).filter(alive).filter(|&choice| !self.moved[choice]).map(|_| self.prompt_seat());
        own.chain(shared).collect()
    }

    /// Where the prompt is read.
    fn prompt_seat(&self) -> Seat {
        self.seats[0]
    }

    /// How many seats it takes to go on.
    fn needs(&self) -> usize {
        self.lives.iter().flatten().count()
    }

    /// Where its next span must end at the latest, when it may pass over `pass` stops.
    fn stop(&self, pass: usize) -> usize {
        let mut ahead = self.stops.iter().copied().filter(|&stop| stop > self.read);
        ahead.nth(pass).unwrap_or(self.tokens).min(self.tokens)
    }

    /// How much of its prompt can be read in one step.
    fn demand(&self, pass: usize) -> usize {
        if self.seats.is_empty() { 0 } else { self.stop(pass) - self.read }
    }
}

/// The scheduler beside a naive account of what it must do.
struct World {
    limits: Limits,
    /// Stops that a plan may pass over.
    passes: usize,
    scheduler: Scheduler,
    jobs: BTreeMap<JobId, Known>,
    /// Who waits, in order, by tenant.
    queues: [VecDeque<JobId>; 4],
    /// For each tenant that waits: how often each other one was admitted since it came or had its last turn.
    overtaken: [[usize; 4]; 4],
    next: u64,
    steps: usize,
}

/// What there is room for beside those who decode, by steps.
const ROOM: [usize; 7] = [usize::MAX, 2, 0, usize::MAX, 7, 1, 0];

impl World {
    fn new(limits: Limits, passes: usize) -> Self {
        let scheduler = Scheduler::new(limits).passing(passes);
        let (jobs, queues, overtaken) = (BTreeMap::new(), Default::default(), [[0; 4]; 4]);
        Self { limits, passes, scheduler, jobs, queues, overtaken, next: 0, steps: 0 }
    }

    fn apply(&mut self, op: &Op) -> Option<Plan> {
        match op {
            Op::Submit { tenant, tokens, lives, stops } => self.submit(*tenant, *tokens, lives, stops),
            Op::Cancel(index) => self.cancel(index),
            Op::EndChoice(index, choice) => self.end_choice(index, *choice),
            Op::Park(index) => self.park(index),
            Op::Unpark(index) => self.unpark(index),
            Op::Step => return Some(self.step()),
        }
        None
    }

    fn submit(&mut self, owner: usize, tokens: usize, lives: &[Vec<usize>], stops: &[usize]) {
        let (id, seats) = (JobId(self.next), lives.len());
        self.next += 1;
        let stops = stops.to_vec();
        let result = self.scheduler.submit(id, Need { tenant: tenant(owner), tokens, seats, stops: stops.clone() });
        if seats > self.limits.seats {
            assert_eq!(result, Err(Error::TooLarge { needs: seats, seats: self.limits.seats }));
        } else if self.queues.iter().flatten().filter(|id| !self.jobs[id].again).count() == self.limits.queue {
            assert_eq!(result, Err(Error::Full(self.limits.queue)));
        } else {
            assert_eq!(result, Ok(()));
            if self.queues[owner].is_empty() {
                self.overtaken[owner] = [0; 4];
            }
            self.queues[owner].push_back(id);
            let lives: Vec<_> = lives.iter().map(|life| Some(life.iter().copied().collect())).collect();
            let (waiting, moved) = (vec![0; seats], vec![false; seats]);
            let (read, hungry, parked, again, seats) = (0, 0, false, false, Vec::new());
            let tenant = owner;
            let known = Known { tenant, tokens, stops, read, lives, waiting, moved, seats, parked, again, hungry };
            self.jobs.insert(id, known);
        }
        self.compare();
    }

    fn pick(&self, index: &prop::sample::Index) -> Option<JobId> {
        (!self.jobs.is_empty()).then(|| *self.jobs.keys().nth(index.index(self.jobs.len())).unwrap())
    }

    fn cancel(&mut self, index: &prop::sample::Index) {
        let Some(id) = self.pick(index) else { return };
        self.scheduler.cancel(id);
        self.forget(id);
        self.compare();
    }

    fn park(&mut self, index: &prop::sample::Index) {
        let Some(id) = self.pick(index) else { return };
        self.scheduler.park(id);
        self.queues.iter_mut().for_each(|queue| queue.retain(|waiting| *waiting != id));
        let job = self.jobs.get_mut(&id).unwrap();
        (job.parked, job.seats) = (true, Vec::new());
        self.compare();
    }

    fn unpark(&mut self, index: &prop::sample::Index) {
        let parked = self.parked();
        if !parked.is_empty() {
            self.go_on(parked[index.index(parked.len())]);
        }
        self.compare();
    }

    fn parked(&self) -> Vec<JobId> {
        self.jobs.iter().filter(|(_, job)| job.parked).map(|(&id, _)| id).collect()
    }

    fn go_on(&mut self, id: JobId) {
        let job = self.jobs.get_mut(&id).unwrap();
        (job.parked, job.again) = (false, true);
        let owner = job.tenant;
        if self.queues[owner].is_empty() {
            self.overtaken[owner] = [0; 4];
        }
        self.queues[owner].push_back(id);
        self.scheduler.unpark(id, tenant(owner));
    }

    fn end_choice(&mut self, index: &prop::sample::Index, choice: usize) {
        let Some(id) = self.pick(index) else { return };
        self.scheduler.commit(id, choice, Next::Done);
        let job = self.jobs.get_mut(&id).unwrap();
        if !job.seats.is_empty() && choice < job.lives.len() {
            self.end(id, choice);
        }
        self.compare();
    }

    fn end(&mut self, id: JobId, choice: usize) {
        let job = self.jobs.get_mut(&id).unwrap();
        job.lives[choice] = None;
        job.waiting[choice] = 0;
        if job.lives.iter().all(Option::is_none) {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: JobId) {
        self.jobs.remove(&id);
        self.queues.iter_mut().for_each(|queue| queue.retain(|waiting| *waiting != id));
    }

    /// Seats are free exactly when nobody must hold them, at once.
    fn compare(&self) {
        self.scheduler.check();
        let held: usize = self.jobs.values().map(|job| job.holds().len()).sum();
        assert_eq!(self.scheduler.free_seats(), self.limits.seats - held);
        assert_eq!(self.scheduler.waiting(), self.queues.iter().map(VecDeque::len).sum::<usize>());
        let parked = self.jobs.values().filter(|job| job.parked).count();
        assert_eq!(self.scheduler.running(), self.jobs.len() - parked - self.scheduler.waiting());
        assert_eq!(self.scheduler.idle(), self.jobs.len() == parked);
    }

    fn step(&mut self) -> Plan {
        let free = self.scheduler.free_seats();
        let room = ROOM[self.steps % ROOM.len()];
        self.steps += 1;
        let mut told = None;
        let plan = self.scheduler.plan_within(|busy| {
            told = Some(busy);
            room
        });
        let decoding = plan.spans.iter().filter(|span| span.choice.is_some());
        let (streams, tokens) = (decoding.clone().count(), decoding.map(|span| span.tokens.len()).sum());
        let prompts = self.jobs.iter().filter(|(id, job)| {
            let admitted = !job.seats.is_empty() || plan.admitted.iter().any(|(admitted, _)| admitted == *id);
            admitted && job.read < job.tokens
        });
        assert_eq!(told, (streams > 0).then_some(Busy { streams, tokens, prompts: prompts.count() }));
        assert_eq!(
            plan.spans.is_empty(),
            self.jobs.values().all(|job| job.parked),
            "a step does something exactly if there is something to do"
        );
        self.seat(&plan, free);
        self.decode(&plan);
        self.read(&plan, room);
        self.compare();
        self.commit(&plan);
        self.compare();
        plan
    }

    fn seat(&mut self, plan: &Plan, mut free: usize) {
        for (id, seats) in &plan.admitted {
            let held: BTreeSet<Seat> = self.jobs.values().flat_map(Known::holds).collect();
            assert!(seats.iter().all(|seat| !held.contains(seat) && (seat.0 as usize) < self.limits.seats));
            assert_eq!(seats.iter().collect::<BTreeSet<_>>().len(), seats.len());
            let job = self.jobs.get_mut(id).unwrap();
            assert_eq!(seats.len(), job.needs());
            free -= seats.len();
            let mut given = seats.iter();
            // A choice that is done has none; which seat stands for it does not matter.
            let seat = |life: &Option<_>| life.as_ref().map_or(seats[0], |_| *given.next().unwrap());
            job.seats = job.lives.iter().map(seat).collect();
            // The prompt is read in the first seat; once it is read, each choice is in its own.
            job.moved = vec![job.read == job.tokens; job.lives.len()];
            let owner = job.tenant;
            assert_eq!(self.queues[owner].pop_front(), Some(*id), "first come, first served within a tenant");
            self.overtaken[owner] = [0; 4];
            for other in (0..4).filter(|&other| other != owner && !self.queues[other].is_empty()) {
                self.overtaken[other][owner] += 1;
                assert!(self.overtaken[other][owner] <= 1, "one turn each, whatever the heads need");
            }
        }
        let heads = self.queues.iter().filter_map(VecDeque::front).map(|id| self.jobs[id].needs());
        assert!(heads.max().is_none_or(|needs| needs > free), "somebody is kept waiting though everybody fits");
    }

    /// Every choice in which tokens wait reads all of them in this step, before any prompt.
    fn decode(&mut self, plan: &Plan) {
        let decoded: Vec<_> = plan.spans.iter().take_while(|span| span.choice.is_some()).collect();
        let mut expected = Vec::new();
        for (&id, job) in self.jobs.iter().filter(|(_, job)| !job.seats.is_empty()) {
            expected
                .extend((0..job.waiting.len()).filter(|&choice| job.waiting[choice] > 0).map(|choice| (id, choice)));
        }
        assert_eq!(decoded.iter().map(|span| (span.job, span.choice.unwrap())).collect::<Vec<_>>(), expected);
        for span in decoded {
            let (job, choice) = (self.jobs.get_mut(&span.job).unwrap(), span.choice.unwrap());
            let from = if job.moved[choice] { job.seats[choice] } else { job.prompt_seat() };
            assert_eq!((span.from, span.seat), (from, job.seats[choice]));
            assert_eq!((span.tokens.clone(), span.last), (0..job.waiting[choice], true));
            job.moved[choice] = true;
            job.waiting[choice] = 0;
        }
    }

    /// Prompt tokens: contiguous, once each, all of the budget that can be used, fairly shared.
    fn read(&mut self, plan: &Plan, room: usize) {
        let decoding = plan.spans.iter().filter(|span| span.choice.is_some()).count();
        let budget = if decoding > 0 { self.limits.busy_budget.min(room) } else { self.limits.budget };
        let mut demand = [0; 4];
        let mut share = [0; 4];
        let reading = self.jobs.values().filter(|job| job.demand(0) > 0).count();
        let (pass, mut passed) = (self.passes / reading.max(1), 0);
        self.jobs.values().for_each(|job| demand[job.tenant] += job.demand(pass));
        for span in &plan.spans[decoding..] {
            assert_eq!(span.choice, None, "prompts come after all that decodes");
            let job = self.jobs.get_mut(&span.job).unwrap();
            assert_eq!((span.from, span.seat), (job.prompt_seat(), job.prompt_seat()));
            assert_eq!(span.tokens.start, job.read);
            assert!(!span.tokens.is_empty() && span.tokens.end <= job.stop(pass));
            passed += job.stops.iter().filter(|&&stop| span.tokens.start < stop && stop < span.tokens.end).count();
            assert_eq!(span.last, span.tokens.end == job.tokens);
            job.read = span.tokens.end;
            share[job.tenant] += span.tokens.len();
        }
        assert!(passed <= self.passes, "{passed} stops are passed over");
        assert_eq!(share.iter().sum::<usize>(), budget.min(demand.iter().sum()));
        let readers = demand.iter().filter(|&&demand| demand > 0).count();
        for tenant in (0..4).filter(|&tenant| demand[tenant] > 0) {
            assert!(share[tenant] >= demand[tenant].min(budget / readers), "{share:?} of {demand:?}");
        }
        let sequences: BTreeSet<_> = plan.spans.iter().map(|span| (span.job, span.choice)).collect();
        assert_eq!(sequences.len(), plan.spans.len(), "one span for each sequence");
        for job in self.jobs.values_mut().filter(|job| !job.seats.is_empty() && budget > 0) {
            job.hungry = if demand[job.tenant] == 0 || share[job.tenant] > 0 { 0 } else { job.hungry + 1 };
            assert!(job.hungry < TENANTS.len(), "every tenant reads at least every fourth step with room for it");
        }
    }

    fn commit(&mut self, plan: &Plan) {
        for span in plan.spans.iter().filter(|span| span.last) {
            let choices = span.choice.map_or(0..self.jobs[&span.job].lives.len(), |choice| choice..choice + 1);
            for choice in choices {
                let Some(job) = self.jobs.get_mut(&span.job) else { break };
                let Some(life) = job.lives[choice].as_mut() else { continue };
                match life.pop_front() {
                    Some(tokens) => {
                        job.waiting[choice] = tokens;
                        self.scheduler.commit(span.job, choice, Next::Tokens(tokens));
                    }
                    None => {
                        self.end(span.job, choice);
                        self.scheduler.commit(span.job, choice, Next::Done);
                    }
                }
            }
        }
    }

    /// Steps until nothing is left; each must bring the end nearer by a token.
    fn finish(&mut self) {
        let life = |life: &VecDeque<usize>| life.iter().sum::<usize>();
        let left = |job: &Known| {
            let lives: usize = job.lives.iter().flatten().map(life).sum();
            job.tokens - job.read + job.waiting.iter().sum::<usize>() + lives
        };
        self.parked().into_iter().for_each(|id| self.go_on(id));
        let mut steps: usize = self.jobs.values().map(left).sum();
        while !self.scheduler.idle() {
            assert!(steps > 0, "everyone finishes");
            steps -= 1;
            self.step();
        }
        assert_eq!(self.scheduler.free_seats(), self.limits.seats);
        assert_eq!(self.scheduler.plan(), Plan::default());
    }
}

fn limits() -> impl Strategy<Value = Limits> {
    (1..7usize, 1..12usize, 1..40usize, 1..12usize).prop_map(|(seats, queue, budget, busy_budget)| Limits {
        seats,
        queue,
        budget,
        busy_budget,
    })
}

fn op() -> impl Strategy<Value = Op> {
    let life = prop::collection::vec(prop_oneof![Just(1usize), 1..9usize], 0..6);
    let stops = prop_oneof![2 => Just(BTreeSet::new()), 1 => prop::collection::btree_set(0..70usize, 1..6)];
    let submit = (0..4usize, 1..60usize, prop::collection::vec(life, 1..8), stops);
    prop_oneof![
        6 => submit.prop_map(|(tenant, tokens, lives, stops)| {
            Op::Submit { tenant, tokens, lives, stops: stops.into_iter().collect() }
        }),
        1 => any::<prop::sample::Index>().prop_map(Op::Cancel),
        1 => (any::<prop::sample::Index>(), 0..8usize).prop_map(|(job, choice)| Op::EndChoice(job, choice)),
        1 => any::<prop::sample::Index>().prop_map(Op::Park),
        2 => any::<prop::sample::Index>().prop_map(Op::Unpark),
        8 => Just(Op::Step),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn the_laws_hold(limits in limits(), passes in 0usize..6, ops in prop::collection::vec(op(), 1..120)) {
        let mut world = World::new(limits, passes);
        ops.iter().for_each(|op| { world.apply(op); });
        world.finish();
    }

    #[test]
    fn equal_calls_give_equal_plans(limits in limits(), ops in prop::collection::vec(op(), 1..60)) {
        let (mut one, mut other) = (World::new(limits, 2), World::new(limits, 2));
        for op in &ops {
            prop_assert_eq!(one.apply(op), other.apply(op));
        }
    }
}

/// A job that needs every seat gets them in bounded time though small ones never stop coming.
#[test]
fn many_seats_are_had_in_the_end() {
    let mut world = World::new(Limits { seats: 4, queue: 64, budget: 8, busy_budget: 4 }, 0);
    let small = Op::Submit { tenant: 1, tokens: 2, lives: vec![vec![1, 1, 1]], stops: vec![] };
    (0..8).for_each(|_| {
        world.apply(&small);
    });
    world.step();
    world.apply(&Op::Submit { tenant: 0, tokens: 2, lives: vec![vec![1]; 4], stops: vec![1] });
    let large = JobId(world.next - 1);
    let steps = (0..16).take_while(|_| {
        world.apply(&small);
        world.apply(&small);
        world.step().admitted.iter().all(|(job, _)| *job != large)
    });
    assert!(steps.count() < 16);
}
