use super::*;

const LIMITS: Limits = Limits { seats: 4, queue: 8, budget: 100, busy_budget: 10 };

fn need(tenant: &str, tokens: usize, seats: usize) -> Need {
    Need { tenant: Tenant::parse(tenant).unwrap(), tokens, seats, stops: Vec::new() }
}

fn scheduler(needs: &[(&str, usize, usize)]) -> Scheduler {
    let mut scheduler = Scheduler::new(LIMITS);
    for (id, &(tenant, tokens, seats)) in (0..).zip(needs) {
        scheduler.submit(JobId(id), need(tenant, tokens, seats)).unwrap();
    }
    scheduler
}

/// (job, choice, from, to, first token, end) of each span.
fn spans(plan: &Plan) -> Vec<(u64, Option<usize>, u32, u32, usize, usize)> {
    let flat = |s: &Span| (s.job.0, s.choice, s.from.0, s.seat.0, s.tokens.start, s.tokens.end);
    plan.spans.iter().map(flat).collect()
}

fn jobs(plan: &Plan) -> Vec<u64> {
    plan.admitted.iter().map(|(job, _)| job.0).collect()
}

#[test]
fn a_seat_is_two_slots() {
    assert_eq!(Seat(0).slots(), [SlotId(0), SlotId(1)]);
    assert_eq!(Seat(3).slots(), [SlotId(6), SlotId(7)]);
}

#[test]
fn what_cannot_run_is_refused() {
    let mut scheduler = scheduler(&[("a", 1, 1); 8]);
    assert_eq!(scheduler.submit(JobId(9), need("b", 1, 1)), Err(Error::Full(8)));
    assert_eq!(scheduler.submit(JobId(9), need("b", 1, 5)), Err(Error::TooLarge { needs: 5, seats: 4 }));
    assert_eq!(scheduler.submit(JobId(9), need("b", 0, 1)), Err(Error::Empty));
    assert_eq!(scheduler.submit(JobId(9), need("b", 1, 0)), Err(Error::Empty));
    scheduler.plan();
    assert_eq!((scheduler.waiting(), scheduler.running(), scheduler.free_seats()), (4, 4, 0));
    assert_eq!(scheduler.submit(JobId(9), need("b", 1, 1)), Ok(()));
}

#[test]
#[should_panic(expected = "a limit is zero")]
fn a_limit_of_zero_is_a_mistake() {
    Scheduler::new(Limits { busy_budget: 0, ..LIMITS });
}

#[test]
fn choices_leave_the_seat_of_the_prompt_before_it_is_given_away() {
    let mut scheduler = scheduler(&[("a", 3, 3), ("a", 2, 2)]);
    let plan = scheduler.plan();
    assert_eq!(plan.admitted, [(JobId(0), vec![Seat(0), Seat(1), Seat(2)])]);
    assert_eq!(spans(&plan), [(0, None, 0, 0, 0, 3)]);
    assert!(plan.spans[0].last);
    // The first choice ends with its first token: its state is still where the two others begin.
    scheduler.commit(JobId(0), 0, Next::Done);
    scheduler.commit(JobId(0), 1, Next::Tokens(1));
    scheduler.commit(JobId(0), 2, Next::Tokens(2));
    assert_eq!(scheduler.free_seats(), 1);
    let plan = scheduler.plan();
    assert!(plan.admitted.is_empty());
    assert_eq!(spans(&plan), [(0, Some(1), 0, 1, 0, 1), (0, Some(2), 0, 2, 0, 2)]);
    scheduler.commit(JobId(0), 1, Next::Tokens(1));
    scheduler.commit(JobId(0), 2, Next::Tokens(0));
    let plan = scheduler.plan();
    assert_eq!(plan.admitted, [(JobId(1), vec![Seat(0), Seat(2)])]);
    assert_eq!(spans(&plan), [(0, Some(1), 1, 1, 0, 1), (1, None, 0, 0, 0, 2)]);
}

#[test]
fn prompts_are_cut_to_the_budget_of_the_moment() {
    let mut scheduler = scheduler(&[("a", 1, 1), ("a", 250, 1)]);
    assert_eq!(spans(&scheduler.plan()), [(0, None, 0, 0, 0, 1), (1, None, 1, 1, 0, 99)]);
    scheduler.commit(JobId(0), 0, Next::Tokens(3));
    let plan = scheduler.plan();
    assert_eq!(spans(&plan), [(0, Some(0), 0, 0, 0, 3), (1, None, 1, 1, 99, 109)]);
    assert!(plan.spans[0].last && !plan.spans[1].last);
    scheduler.commit(JobId(0), 0, Next::Done);
    assert_eq!(spans(&scheduler.plan()), [(1, None, 1, 1, 109, 209)]);
    let plan = scheduler.plan();
    assert_eq!(spans(&plan), [(1, None, 1, 1, 209, 250)]);
    assert!(plan.spans[0].last);
}

#[test]
fn tenants_share_the_budget_and_equal_prompts_are_read_as_they_came() {
    let mut scheduler = scheduler(&[("a", 60, 1), ("a", 60, 1), ("b", 60, 1), ("c", 10, 1)]);
    let read = |plan: Plan| -> Vec<_> { plan.spans.iter().map(|s| (s.job.0, s.tokens.len())).collect() };
    assert_eq!(read(scheduler.plan()), [(0, 45), (2, 45), (3, 10)]);
    scheduler.cancel(JobId(3));
    assert_eq!(read(scheduler.plan()), [(2, 15), (0, 15), (1, 60)]);
}

#[test]
fn who_is_done_reading_takes_nobodys_turn_along() {
    let mut scheduler = Scheduler::new(Limits { budget: 1, ..LIMITS });
    for (id, (tenant, tokens)) in (0..).zip([("a", 2), ("b", 2), ("c", 1), ("d", 2)]) {
        scheduler.submit(JobId(id), need(tenant, tokens, 1)).unwrap();
    }
    let mut read = Vec::new();
    while !scheduler.idle() {
        for span in scheduler.plan().spans {
            read.push(span.job.0);
            if span.last {
                scheduler.commit(span.job, 0, Next::Done);
            }
        }
    }
    assert_eq!(read, [0, 1, 2, 3, 0, 1, 3]);
}

#[test]
fn who_does_not_fit_is_not_overtaken() {
    let mut scheduler = scheduler(&[("a", 1, 2), ("a", 1, 3), ("b", 1, 1), ("b", 1, 1), ("c", 1, 1)]);
    assert_eq!(jobs(&scheduler.plan()), [0, 2, 4]);
    for job in [0, 2, 4] {
        scheduler.commit(JobId(job), 0, Next::Tokens(1));
    }
    scheduler.commit(JobId(0), 1, Next::Tokens(1));
    scheduler.plan();
    for job in [0, 4] {
        scheduler.commit(JobId(job), 0, Next::Tokens(1));
    }
    scheduler.commit(JobId(0), 1, Next::Done);
    // A seat is free, and `b` could use it, but it is the turn of `a`, who needs three.
    scheduler.commit(JobId(2), 0, Next::Done);
    assert_eq!((scheduler.free_seats(), jobs(&scheduler.plan())), (2, vec![]));
    scheduler.cancel(JobId(4));
    scheduler.commit(JobId(0), 0, Next::Tokens(1));
    assert_eq!(jobs(&scheduler.plan()), [1]);
}

#[test]
fn a_cancel_takes_the_job_out_wherever_it_is() {
    let mut scheduler = scheduler(&[("a", 500, 4), ("a", 1, 1), ("b", 1, 1)]);
    scheduler.plan();
    scheduler.cancel(JobId(1));
    scheduler.cancel(JobId(7));
    assert_eq!((scheduler.waiting(), scheduler.running(), scheduler.free_seats()), (1, 1, 0));
    scheduler.cancel(JobId(0));
    scheduler.commit(JobId(0), 0, Next::Tokens(1));
    assert_eq!((scheduler.waiting(), scheduler.running(), scheduler.free_seats()), (1, 0, 4));
    scheduler.cancel(JobId(2));
    assert!(scheduler.idle());
    assert_eq!(scheduler.plan(), Plan::default());
}

#[test]
fn one_choice_may_end_while_the_prompt_is_read() {
    let mut scheduler = scheduler(&[("a", 150, 2)]);
    scheduler.plan();
    scheduler.commit(JobId(0), 0, Next::Done);
    assert_eq!(spans(&scheduler.plan()), [(0, None, 0, 0, 100, 150)]);
    scheduler.commit(JobId(0), 1, Next::Tokens(1));
    assert_eq!(spans(&scheduler.plan()), [(0, Some(1), 0, 1, 0, 1)]);
    assert_eq!(scheduler.free_seats(), 3);
    scheduler.commit(JobId(0), 1, Next::Done);
    assert!(scheduler.idle());
}

#[test]
fn shares_are_max_min_fair() {
    assert_eq!(fair_shares(10, &[100, 3, 100]), [4, 3, 3]);
    assert_eq!(fair_shares(10, &[2, 3]), [2, 3]);
    assert_eq!(fair_shares(2, &[5, 5, 5]), [1, 1, 0]);
    assert_eq!(fair_shares(9, &[]), [0; 0]);
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one_and_a_long_one_not_for_ever() {
    let mut scheduler = Scheduler::new(Limits { budget: 100, ..LIMITS });
    scheduler.submit(JobId(0), need("a", 1000, 1)).unwrap();
    let read = |plan: Plan| -> Vec<_> { plan.spans.iter().map(|s| (s.job.0, s.tokens.len(), s.last)).collect() };
    assert_eq!(read(scheduler.plan()), [(0, 100, false)]);
    for id in 1..4 {
        scheduler.submit(JobId(id), need("a", 30 * id as usize, 1)).unwrap();
    }
    assert_eq!(read(scheduler.plan()), [(0, 25, false), (1, 30, true), (2, 45, false)]);
}

#[test]
fn a_span_ends_where_a_state_is_wanted_and_others_read_what_it_leaves() {
    let mut scheduler = Scheduler::new(Limits { budget: 100, ..LIMITS });
    let stops = vec![0, 30, 90, 200, 250, 300];
    scheduler.submit(JobId(0), Need { stops, ..need("a", 250, 1) }).unwrap();
    scheduler.submit(JobId(1), need("a", 100, 1)).unwrap();
    scheduler.submit(JobId(2), need("b", 10, 1)).unwrap();
    let read = |plan: Plan| -> Vec<_> { plan.spans.iter().map(|s| (s.job.0, s.tokens.clone(), s.last)).collect() };
    assert_eq!(read(scheduler.plan()), [(0, 0..23, false), (1, 0..67, false), (2, 0..10, true)]);
    scheduler.commit(JobId(2), 0, Next::Done);
    assert_eq!(read(scheduler.plan()), [(0, 23..30, false), (1, 67..100, true)]);
    scheduler.commit(JobId(1), 0, Next::Done);
    let rest: Vec<_> = (0..4).flat_map(|_| read(scheduler.plan())).collect();
    assert_eq!(rest, [(0, 30..90, false), (0, 90..190, false), (0, 190..200, false), (0, 200..250, true)]);
}

#[test]
fn the_oldest_prompt_has_its_quarter() {
    assert_eq!(shortest_first(8, &[(100, 100), (1, 1), (100, 100)]), [7, 1, 0]);
    assert_eq!(shortest_first(8, &[(100, 100), (5, 5), (6, 6)]), [2, 5, 1]);
    assert_eq!(shortest_first(8, &[(1, 1), (100, 100)]), [1, 7]);
    assert_eq!(shortest_first(1, &[(9, 9), (1, 1)]), [1, 0]);
    assert_eq!(shortest_first(0, &[(9, 9), (1, 1)]), [0, 0]);
    assert_eq!(shortest_first(9, &[]), [0; 0]);
}
