//! How many prompt tokens a step reads while answers are being generated, so that those do not falter. Pure: measurements come in
//! as arguments.
//!
//! How a prompt is cut depends on the clock, and may: the output does not depend on it.

use std::time::Duration;

use super::worth::Costs;
use crate::scheduler::Busy;

/// How many times as long a step may take that also reads prompts, while these are no more than the streams. A step is not exactly
/// what was expected of it, and a stream should not wait three times as long as usual for its next token.
const STRETCH: f64 = 2.0;
/// How much more than the streams' own time a step may take for each further prompt a stream: where many clients wait for their first
/// token, few may wait longer for their next.
const CLAIM: f64 = 3.0;
/// The most it is stretched so.
const FAR: f64 = 8.0;
/// Prompt tokens that are read in any case, so that a prompt is read at all. Fewer say too little of what one takes.
const LEAST: usize = 8;
/// After so many steps in a row with prompt tokens comes one without: what that takes changes with the streams.
const ROUND: u32 = 16;
/// What a measurement counts for.
const WEIGHT: f64 = 1.0 / 4.0;

/// What prompt tokens take beside decoding, as measured lately.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// Seconds of each more; 0 = not known.
    token: f64,
    /// The most that were read in one step.
    most: usize,
    /// Seconds of the last step without any; 0 = there was none.
    without: f64,
    /// Steps with both since then.
    mixed: u32,
}

/// The tokens of a step.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub decoding: usize,
    pub prompts: usize,
}

impl Pace {
    /// How many prompt tokens the next step may read beside what decodes; 0 when it is time for a step without.
    pub fn room(&self, costs: &Costs, busy: Busy) -> usize {
        let Some(base) = self.base(costs, busy.tokens).filter(|_| self.mixed < ROUND) else { return 0 };
        let further = busy.prompts.saturating_sub(1) as f64 / busy.streams as f64;
        let stretch = (CLAIM * further).clamp(STRETCH, FAR);
        if self.token == 0.0 {
            return LEAST;
        }
        // No measurement is trusted so far that the next step reads much more than any before.
        (((stretch - 1.0) * base / self.token) as usize).clamp(LEAST, 2 * self.most.max(LEAST))
    }

    /// A step took so long.
    pub fn measured(&mut self, costs: &Costs, load: Load, took: Duration) {
        let took = took.as_secs_f64();
        match load {
            Load { decoding: 0, .. } => {}
            Load { prompts: 0, .. } => (self.without, self.mixed) = (took, 0),
            Load { decoding, prompts } => {
                self.mixed += 1;
                let Some(base) = self.base(costs, decoding).filter(|_| prompts >= LEAST) else { return };
                self.most = self.most.max(prompts);
                let each = (took - base).max(0.0) / prompts as f64;
                self.token = match self.token {
                    0.0 => each,
                    // A processor that is taken away for a while says nothing of the model.
                    known => known + WEIGHT * (each.min(2.0 * known) - known),
                };
            }
        }
    }

    /// What a step without prompt tokens takes.
    fn base(&self, costs: &Costs, decoding: usize) -> Option<f64> {
        costs.of(decoding).or_else(|| Some(self.without).filter(|&seconds| seconds > 0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One prompt beside so many streams.
    fn busy(streams: usize) -> Busy {
        Busy { streams, tokens: streams, prompts: 1 }
    }

    /// Runs steps of `decoding` streams that take `time` until so many prompt tokens are read; gives the times of the steps.
    fn read(
        pace: &mut Pace,
        costs: &mut Costs,
        (decoding, mut unread): (usize, usize),
        time: &dyn Fn(Load) -> f64,
    ) -> Vec<f64> {
        let mut times = Vec::new();
        while unread > 0 {
            let prompts = pace.room(costs, busy(decoding)).min(unread).min(512);
            unread -= prompts;
            let load = Load { decoding, prompts };
            times.push(time(load));
            let took = Duration::from_secs_f64(time(load));
            pace.measured(costs, load, took);
            if prompts == 0 {
                costs.measured(decoding, took);
            }
        }
        times
    }

    #[test]
    fn steps_stay_below_three_times_what_decoding_takes() {
        let steps = std::cell::Cell::new(0u32);
        // No two steps take the same time, and one in fifty is twice as long.
        let jitter = || {
            steps.set(steps.get() + 1);
            let hiccup = if steps.get() % 50 == 49 { 2.0 } else { 1.0 };
            hiccup * (0.85 + f64::from(steps.get() * 7919 % 31) / 100.0)
        };
        for token in [1e-6, 1e-4, 5e-4] {
            for decoding in [1, 4, 16, 64, 200] {
                let base = 5e-3 + 8e-4 * decoding as f64;
                let time = |load: Load| (base + token * load.prompts as f64) * jitter();
                let (mut pace, mut costs) = (Pace::default(), Costs::new());
                let mut times = read(&mut pace, &mut costs, (decoding, 20_000), &time);
                let fair = base / token;
                assert!(
                    times.len() as f64 <= 20_000.0 / fair.min(512.0) * 1.4 + 10.0,
                    "{token} {decoding}: {}",
                    times.len()
                );
                times.sort_by(f64::total_cmp);
                let p99 = times[times.len() * 99 / 100 - usize::from(times.len() < 100)];
                assert!(
                    p99 < 5.0 * base && times[times.len() * 9 / 10] < 3.0 * base,
                    "{token} {decoding}: {p99} {base}"
                );
            }
        }
    }

    #[test]
    fn what_is_not_known_is_measured_first_and_again() {
        let (mut pace, mut costs) = (Pace::default(), Costs::new());
        let many = |prompts| Load { decoding: 100, prompts };
        let ms = Duration::from_millis;
        assert_eq!(pace.room(&costs, busy(100)), 0);
        pace.measured(&costs, many(0), ms(10));
        assert_eq!(pace.room(&costs, busy(100)), LEAST, "for more streams than costs are known of");
        pace.measured(&costs, many(3), ms(500));
        assert_eq!(pace.room(&costs, busy(100)), LEAST, "a short rest of a prompt says nothing");
        pace.measured(&costs, many(8), ms(11));
        assert_eq!(pace.room(&costs, busy(100)), 2 * LEAST, "room for more, but not for much more at once");
        pace.measured(&costs, many(16), ms(12));
        assert_eq!(pace.room(&costs, busy(100)), 4 * LEAST);
        (4..ROUND).for_each(|_| pace.measured(&costs, many(32), ms(14)));
        assert!((64..90).contains(&pace.room(&costs, busy(100))), "{pace:?}");
        pace.measured(&costs, many(32), ms(14));
        assert_eq!(pace.room(&costs, busy(100)), 0, "it is time for a step without");
        costs.measured(10, ms(2));
        pace.measured(&costs, Load { decoding: 10, prompts: 0 }, ms(2));
        assert!((12..20).contains(&pace.room(&costs, busy(10))), "{pace:?}");
        pace.measured(&costs, Load { decoding: 0, prompts: 512 }, ms(900));
        assert!((12..20).contains(&pace.room(&costs, busy(10))), "a step of prompts alone says nothing");
    }

    #[test]
    fn slower_prompts_get_less_room() {
        let (mut pace, mut costs) = (Pace::default(), Costs::new());
        let time = |token: f64| move |load: Load| 1e-2 + token * load.prompts as f64;
        read(&mut pace, &mut costs, (4, 4000), &time(1e-4));
        pace.mixed = 0;
        assert!((80..=120).contains(&pace.room(&costs, busy(4))), "{pace:?}");
        read(&mut pace, &mut costs, (4, 4000), &time(1e-3));
        pace.mixed = 0;
        assert!(pace.room(&costs, busy(4)) <= 12, "{pace:?}");
    }

    #[test]
    fn many_prompts_have_more_of_the_time_than_few_streams() {
        let (mut pace, mut costs) = (Pace::default(), Costs::new());
        read(&mut pace, &mut costs, (4, 10_000), &|load| 1e-2 + 1e-4 * load.prompts as f64);
        (pace.mixed, pace.most) = (0, 1000);
        let room = |prompts| pace.room(&costs, Busy { prompts, ..busy(4) });
        let fair = room(1);
        assert!((80..=120).contains(&fair));
        for (prompts, times) in [(2, 1), (3, 1), (5, 2), (9, 5), (16, 7), (60, 7)] {
            assert!(room(prompts).abs_diff(times * fair) <= times, "{prompts}: {} and {fair}", room(prompts));
        }
    }
}
