//! When a draft is worth its time. Pure: measurements come in as arguments.
//!
//! Which drafts are run depends on the clock, and may: the output does not depend on it.

use std::time::Duration;

/// Tokens a step up to which times are known. With as many, arithmetic is the limit and not memory: drafts gain nothing.
const MOST_TOKENS: usize = 64;
/// What one more token is taken to cost, in parts of a step, before it was measured.
const PRIOR: f64 = 0.15;
/// What a measurement counts for.
const WEIGHT: f64 = 1.0 / 8.0;
/// A draft must be expected to save as many times what it costs: what is expected is not what comes.
const MARGIN: f64 = 1.25;

/// What steps of so many tokens take, as measured lately.
#[derive(Clone, Debug)]
pub struct Costs {
    /// By tokens, in seconds; 0 = not known.
    seconds: [f64; MOST_TOKENS + 1],
    /// Whether that of n tokens is known, in bit n - 1 of as many: looked for at every token.
    known: u64,
}

/// The next step of a sequence that may run a draft.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    /// Tokens of all sequences in that step, without this draft.
    pub tokens: usize,
    /// Sequences that gain a token by it in any case.
    pub streams: usize,
    /// Tokens of this sequence in it without the draft: they are read again if the draft is wrong.
    pub waiting: usize,
    /// How likely each drafted token is right, if those before it are.
    pub trust: f64,
}

impl Costs {
    /// Nothing is known.
    pub fn new() -> Self {
        Self { seconds: [0.0; MOST_TOKENS + 1], known: 0 }
    }

    /// A step of `tokens` tokens, none of a prompt, took so long.
    pub fn measured(&mut self, tokens: usize, took: Duration) {
        // The first step of its length makes its buffers too. Were that believed, none would ever be tried again.
        let most = self.of(tokens).map_or(f64::INFINITY, |expected| 2.0 * expected);
        let Some(known) = self.seconds.get_mut(tokens) else { return };
        let took = took.as_secs_f64().min(most);
        if *known == 0.0 && took > 0.0 {
            *known = took;
            self.known |= tokens.checked_sub(1).map_or(0, |bit| 1 << bit);
        }
        // A processor that is taken away for a while says nothing of the model.
        *known += WEIGHT * (took.min(2.0 * *known) - *known);
    }

    /// How long a draft is best, of at most `most` tokens; 0 = none is worth while.
    ///
    /// What it saves is the time in which its right tokens would have come otherwise, all streams moving together. What it
    /// costs is the longer step, and, when it is wrong somewhere, that the right ones are read again in the next.
    pub fn best(&self, ahead: Ahead, most: usize) -> usize {
        let Ahead { tokens, streams, waiting, trust } = ahead;
        let (Some(without), Some(base)) = (self.of(streams), self.of(tokens)) else { return 0 };
        let (mut best, mut gain) = (0, 0.0);
        // Chance that all tokens so far are right; how many are, and how many are read again, on average.
        let (mut chance, mut right, mut again) = (1.0, 0.0, 0.0);
        for drafted in 1..=most {
            again += chance * (1.0 - trust) * (waiting + drafted - 1) as f64;
            chance *= trust;
            right += chance;
            let Some(longer) = self.of(tokens + drafted).map(|longer| (longer - base).max(0.0)) else { break };
            let spent = longer * (1.0 + again / drafted as f64);
            let net = right / streams as f64 * without - MARGIN * spent;
            if net > gain {
                (best, gain) = (drafted, net);
            }
        }
        best
    }

    /// What a step of so many tokens takes: as measured, or between its neighbours, or beyond the last as it grew until there,
    /// by the prior at least.
    pub fn of(&self, tokens: usize) -> Option<f64> {
        if tokens > MOST_TOKENS {
            return None;
        }
        let below = self.last_known(tokens)?;
        let shorter = self.seconds[below];
        let beyond = (tokens - below) as f64;
        let Some(above) = self.first_known(tokens) else {
            let before = self.last_known(below - 1);
            let slope = before.map_or(0.0, |n| (shorter - self.seconds[n]) / (below - n) as f64);
            return Some(shorter + beyond * slope.max(PRIOR * shorter / below as f64));
        };
        let part = if above > below { beyond / (above - below) as f64 } else { 0.0 };
        Some(shorter + part * (self.seconds[above] - shorter))
    }

    /// The largest number of tokens, up to so many, of which it is known.
    fn last_known(&self, tokens: usize) -> Option<usize> {
        let among = self.known & u64::MAX.checked_shr(u64::BITS - tokens as u32).unwrap_or(0);
        (among > 0).then(|| among.ilog2() as usize + 1)
    }

    /// The smallest one from so many on.
    fn first_known(&self, tokens: usize) -> Option<usize> {
        let among = self.known >> (tokens - 1);
        (among > 0).then(|| tokens + among.trailing_zeros() as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::super::draft::Drafter;
    use super::*;

    fn costs(known: &[(usize, u64)]) -> Costs {
        let mut costs = Costs::new();
        known.iter().for_each(|&(tokens, micros)| costs.measured(tokens, Duration::from_micros(micros)));
        costs
    }

    fn ahead(streams: usize, trust: f64) -> Ahead {
        Ahead { tokens: streams, streams, waiting: 1, trust }
    }

    #[test]
    fn times_are_measured_or_between_or_beyond() {
        let costs = costs(&[(1, 1000), (5, 1400), (8, 2000)]);
        for (tokens, expected) in [(1, 1e-3), (2, 1.1e-3), (5, 1.4e-3), (6, 1.6e-3), (8, 2e-3), (16, 3.6e-3)] {
            let found = costs.of(tokens).expect("it is known");
            assert!((found - expected).abs() < 1e-9, "{tokens}: {found}");
        }
        assert_eq!(costs.of(65), None);
        let alone = self::costs(&[(2, 1000)]);
        assert!((alone.of(4).expect("beyond") - 1.15e-3).abs() < 1e-9);
        assert_eq!(alone.of(1), None);
        assert_eq!(Costs::new().of(1), None);
    }

    #[test]
    fn one_slow_step_says_little() {
        let mut costs = costs(&[(1, 1000)]);
        costs.measured(1, Duration::from_secs(1));
        assert!(costs.of(1).expect("known") <= 1.2e-3);
        (0..200).for_each(|_| costs.measured(1, Duration::from_micros(500)));
        assert!((costs.of(1).expect("known") - 5e-4).abs() < 1e-6);
    }

    #[test]
    fn the_first_step_of_a_length_is_not_believed_whatever_it_takes() {
        let mut costs = costs(&[(1, 200), (8, 20_000)]);
        assert!(costs.best(ahead(1, 0.95), 7) > 0, "it is tried again");
        (0..50).for_each(|_| costs.measured(8, Duration::from_micros(400)));
        assert_eq!(costs.best(ahead(1, 0.95), 7), 7);
        (0..50).for_each(|_| costs.measured(8, Duration::from_micros(20_000)));
        assert_eq!(costs.best(ahead(1, 0.95), 7), 0, "it is dear indeed");
    }

    #[test]
    fn a_draft_must_earn_what_it_costs() {
        let cheap = costs(&[(1, 1000), (8, 1200), (16, 1400), (64, 3000)]);
        assert_eq!(cheap.best(ahead(1, 0.95), 7), 7);
        assert_eq!(cheap.best(ahead(1, 0.01), 7), 0);
        assert!((1..4).contains(&cheap.best(ahead(1, 0.3), 7)));
        assert_eq!(cheap.best(ahead(1, 0.95), 0), 0);
        // With many streams the same time brings more tokens without.
        assert_eq!(cheap.best(ahead(16, 0.3), 7), 0);
        assert!(cheap.best(ahead(60, 1.0), 7) <= 4, "nothing is known beyond");
        // Where arithmetic is the limit there is nothing to be had.
        let dear = costs(&[(1, 1000), (8, 8000), (16, 16000)].repeat(50));
        assert_eq!(dear.best(ahead(1, 0.95), 7), 0);
        assert_eq!(Costs::new().best(ahead(1, 1.0), 7), 0, "a step without is measured first");
        // What waits already is read again too.
        let slow = costs(&[(1, 1000), (8, 3000)]);
        assert!(slow.best(ahead(1, 0.6), 7) > 0);
        assert_eq!(slow.best(Ahead { tokens: 8, waiting: 8, ..ahead(1, 0.6) }, 7), 0);
    }

    /// Generates `text` where a step of n tokens takes `time(n)`; gives the time it took and what it takes without drafts.
    fn race(text: &[u32], time: &dyn Fn(usize) -> f64) -> (f64, f64) {
        const MOST: usize = 7;
        let (mut costs, mut drafter) = (Costs::new(), Drafter::new(MOST));
        let (mut at, mut waiting, mut took) = (1, 1, 0.0);
        while at < text.len() {
            drafter.follow(&text[..at]);
            let ahead = Ahead { tokens: waiting, streams: 1, waiting, trust: drafter.trust() };
            let most = MOST.min(drafter.draft().len()).min(text.len() - at - 1);
            let draft = &drafter.draft()[..if waiting > MOST { 0 } else { costs.best(ahead, most) }];
            let right = draft.iter().zip(&text[at..]).take_while(|(a, b)| a == b).count();
            let seconds = time(waiting + draft.len());
            costs.measured(waiting + draft.len(), Duration::from_secs_f64(seconds));
            took += seconds;
            waiting = if right == draft.len() { 1 } else { waiting + right + 1 };
            at += right + 1;
        }
        (took, (1..text.len()).map(|_| time(1)).sum())
    }

    #[test]
    fn it_never_loses_much_and_gains_where_there_is_something_to_gain() {
        // Pseudo-random ids below `alphabet`, of which one in `copies` begins a copy of an earlier stretch.
        let text = |alphabet: u64, copies: u64| {
            let mut state = 42u64;
            let mut random = |below: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) % below
            };
            let mut ids: Vec<u32> = Vec::new();
            while ids.len() < 5000 {
                if copies > 0 && ids.len() > 50 && random(copies) == 0 {
                    let from = random(ids.len() as u64 - 40) as usize;
                    ids.extend_from_within(from..from + 30);
                } else {
                    ids.push(random(alphabet) as u32);
                }
            }
            ids
        };
        for slope in [0.0, 0.05, 0.2, 0.5, 1.0] {
            let steps = std::cell::Cell::new(0u32);
            // No two steps take the same time.
            let time = |tokens: usize| {
                steps.set(steps.get() + 1);
                let jitter = f64::from(steps.get() * 7919 % 31) / 100.0 - 0.15;
                1e-3 * (1.0 + slope * (tokens - 1) as f64) * (1.0 + jitter)
            };
            for alphabet in [2, 4, 16, 1000] {
                for copies in [0, 200, 50, 10] {
                    let (with, without) = race(&text(alphabet, copies), &time);
                    assert!(with <= 1.02 * without, "slope {slope}, {alphabet} ids, {copies}: {with} of {without}");
                }
            }
            let (with, without) = race(&text(1000, 10), &time);
            assert!(slope > 0.05 || with < 0.6 * without, "slope {slope}: {with} of {without}");
        }
    }
}
