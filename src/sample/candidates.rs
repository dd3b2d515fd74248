//! The tokens that may still be chosen, put in order only where somebody looks.

use std::borrow::Cow;
use std::cmp::Ordering;

use super::adjust::possible;
use super::weights::{Depths, STEPS, of_step, split, sums};

/// Tokens in their order, the best first: by descending logit, equal ones by ascending id. Each cut keeps the first few, so
/// all that it changes is how much those kept weigh together; a draw finds the token into whose part of that the coin falls.
///
/// How much all tokens of a step weigh is known, and steps lie in that order, so only within one step tokens are put in order, and
/// there only those around the place that is looked for. Sums are exact: it is as if all had been sorted.
#[derive(Debug)]
pub(super) struct Candidates<'a> {
    /// By id, or by index in `ids`; NaN and -inf are impossible.
    logits: Cow<'a, [f32]>,
    /// Ascending, if only some tokens were kept.
    ids: Option<Vec<u32>>,
    depths: Depths,
    /// For each step.
    sums: Vec<u64>,
    /// What those that may be drawn weigh together.
    mass: u128,
}

/// One of a step's tokens.
#[derive(Clone, Copy, Debug)]
struct Token {
    index: u32,
    logit: f32,
    part: u64,
}

/// Logits that are compared at once.
const STRETCH: usize = 64;

fn better_first(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.partial_cmp(&a.1).expect("possible logits are numbers").then(a.0.cmp(&b.0))
}

/// The best possible token.
pub(super) fn best(logits: &[f32]) -> Option<u32> {
    top(logits, 1).first().map(|&(id, _)| id)
}

/// The `count` best possible tokens, in any order.
fn top(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut kept: Vec<(u32, f32)> = Vec::with_capacity(2 * count + STRETCH);
    // The last of the best so far, once there are enough: a later token must be better, as of equal ones the earlier counts.
    let mut least = f32::NEG_INFINITY;
    for (n, stretch) in logits.chunks(STRETCH).enumerate() {
        // Nearly always false, and without a branch for each; NaN is not better than anything.
        if !stretch.iter().fold(false, |any, &logit| any | (logit > least)) {
            continue;
        }
        let ids = (n * STRETCH) as u32..;
        kept.extend(ids.zip(stretch.iter().copied()).filter(|&(_, logit)| logit > least));
        if kept.len() >= 2 * count {
            kept.select_nth_unstable_by(count - 1, better_first);
            kept.truncate(count);
            least = kept[count - 1].1;
        }
    }
    if kept.len() > count {
        kept.select_nth_unstable_by(count - 1, better_first);
        kept.truncate(count);
    }
    kept
}

impl<'a> Candidates<'a> {
    /// The `count` best tokens, or, if that is 0, all; `None` if none is possible. `temperature` is above 0.
    pub fn new(logits: &'a [f32], temperature: f32, count: usize) -> Option<Self> {
        let (logits, ids) = if (1..logits.len()).contains(&count) {
            let mut kept = top(logits, count);
            kept.sort_unstable_by_key(|&(id, _)| id);
            let (ids, kept): (Vec<_>, Vec<_>) = kept.into_iter().unzip();
            (Cow::Owned(kept), Some(ids))
        } else {
            (Cow::Borrowed(logits), None)
        };
        let best = greatest(&logits);
        let depths = Depths::new(best, temperature);
        let sums = sums(&logits, depths);
        let mass = (0..STEPS).map(|step| mass(step, sums[step])).sum();
        possible(best).then_some(Self { logits, ids, depths, sums, mass })
    }

    /// Keeps the fewest best ones whose probabilities sum to `share` of the whole, at least one.
    pub fn top_p(&mut self, share: f32) {
        if share < 1.0 {
            let enough = (f64::from(share) * self.mass as f64).ceil() as u128;
            self.mass = self.find(enough.saturating_sub(1)).1;
        }
    }

    /// Keeps those at least `fraction` as likely as the best one.
    pub fn min_p(&mut self, fraction: f32) {
        if fraction > 0.0 {
            let most = Depths::at(fraction);
            let (last, _) = split(most);
            let whole: u128 = (0..last).map(|step| mass(step, self.sums[step])).sum();
            let likely = |token: &&Token| self.depths.of(token.logit) <= most;
            let parts = self.step(last).iter().filter(likely).map(|token| token.part).sum();
            self.mass = self.mass.min(whole + mass(last, parts));
        }
    }

    /// The token into whose part of the whole the coin falls, parts lying in the order of the tokens.
    pub fn draw(self, coin: f64) -> u32 {
        let (index, _) = self.find((coin * self.mass as f64) as u128);
        self.ids.map_or(index, |ids| ids[index as usize])
    }

    /// The index of the first token with which those from the best one on weigh more than `target`, or of the last one that
    /// may be drawn if rounding made that too much; and what they weigh.
    fn find(&self, target: u128) -> (u32, u128) {
        let target = target.min(self.mass - 1);
        let mut before = 0;
        for step in 0..STEPS {
            let through = before + mass(step, self.sums[step]);
            if through > target {
                let rest = (target - before) / u128::from(of_step(step));
                let (index, parts) = within(&mut self.step(step), rest as u64);
                return (index, before + mass(step, parts));
            }
            before = through;
        }
        unreachable!("all steps together weigh what may be drawn at least")
    }

    /// The tokens of a step.
    fn step(&self, step: usize) -> Vec<Token> {
        let mut tokens = Vec::new();
        let (least, greatest) = self.depths.range(step);
        for (n, stretch) in self.logits.chunks(STRETCH).enumerate() {
            if stretch.iter().fold(false, |any, &logit| any | ((logit >= least) & (logit <= greatest))) {
                let all = ((n * STRETCH) as u32..).zip(stretch).map(|(index, &logit)| {
                    let (own, part) = split(self.depths.of(logit));
                    (own, Token { index, logit, part })
                });
                tokens.extend(all.filter(|&(own, _)| own == step).map(|(_, token)| token));
            }
        }
        tokens
    }
}

/// The greatest of the logits; -inf if none is a number.
fn greatest(logits: &[f32]) -> f32 {
    // Side by side, so that a comparison does not wait for the one before it.
    let mut most = [f32::NEG_INFINITY; STRETCH];
    for stretch in logits.chunks(STRETCH) {
        most.iter_mut().zip(stretch).for_each(|(most, &logit)| *most = if logit > *most { logit } else { *most });
    }
    most.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// What tokens of a step weigh whose parts sum to `parts`.
fn mass(step: usize, parts: u64) -> u128 {
    u128::from(of_step(step)) * u128::from(parts)
}

/// The index of the first of a step's tokens, in their order, with which the sum of their parts is more than `target`, which that of
/// all is; and that sum.
fn within(mut tokens: &mut [Token], target: u64) -> (u32, u64) {
    /// So few are put in order.
    const FEW: usize = 16;
    let order = |a: &Token, b: &Token| better_first(&(a.index, a.logit), &(b.index, b.logit));
    let mut before = 0;
    while tokens.len() > FEW {
        let (better, worse) = {
            let middle = tokens.len() / 2;
            tokens.select_nth_unstable_by(middle, order);
            tokens.split_at_mut(middle)
        };
        let through = before + better.iter().map(|token| token.part).sum::<u64>();
        (tokens, before) = if through > target { (better, before) } else { (worse, through) };
    }
    tokens.sort_unstable_by(order);
    for token in tokens.iter() {
        before += token.part;
        if before > target {
            return (token.index, before);
        }
    }
    unreachable!("all of them together are more")
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    const NO: f32 = f32::NEG_INFINITY;

    fn candidates(logits: &[f32]) -> Candidates<'_> {
        Candidates::new(logits, 1.0, 0).expect("something is possible")
    }

    /// What may be drawn, in order, with what each weighs, when all is sorted and summed one by one.
    fn sorted(logits: &[f32], temperature: f32, (top_k, top_p, min_p): (usize, f32, f32)) -> Vec<(u32, u128)> {
        let mut all: Vec<_> = (0..).zip(logits.iter().copied()).filter(|&(_, logit)| possible(logit)).collect();
        all.sort_by(better_first);
        all.truncate(if top_k == 0 { all.len() } else { top_k });
        let depths = Depths::new(all[0].1, temperature);
        let weigh = |(id, logit): (u32, f32)| {
            let (step, part) = split(depths.of(logit));
            (id, logit, u128::from(of_step(step)) * u128::from(part))
        };
        let all: Vec<_> = all.into_iter().map(weigh).collect();
        let enough = (f64::from(top_p) * all.iter().map(|&(.., weight)| weight).sum::<u128>() as f64).ceil() as u128;
        let mut sum = 0;
        let mut kept = Vec::new();
        for (id, logit, weight) in all {
            let within = kept.is_empty() || top_p >= 1.0 || sum < enough;
            let likely = min_p == 0.0 || depths.of(logit) <= Depths::at(min_p);
            sum += weight;
            if within && likely && weight > 0 {
                kept.push((id, weight));
            }
        }
        kept
    }

    /// Draws each token that may be drawn, by coins about the middle of its part and both ends.
    fn assert_drawn(logits: &[f32], temperature: f32, cuts: (usize, f32, f32), coins: &[f64]) {
        let expected = sorted(logits, temperature, cuts);
        let (top_k, top_p, min_p) = cuts;
        let draw = |coin| {
            let mut candidates = Candidates::new(logits, temperature, top_k).expect("something is possible");
            candidates.top_p(top_p);
            candidates.min_p(min_p);
            candidates.draw(coin)
        };
        let mass: u128 = expected.iter().map(|&(_, weight)| weight).sum();
        for &coin in coins {
            let target = ((coin * mass as f64) as u128).min(mass - 1);
            let mut sum = 0;
            let place = expected.iter().position(|&(_, weight)| {
                sum += weight;
                sum > target
            });
            let (id, _) = expected[place.expect("the target is below the sum")];
            assert_eq!(draw(coin), id, "coin {coin}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

        #[test]
        fn it_is_as_if_all_were_sorted(
            // Many in one step, equal ones among them; or spread over some.
            logits in prop_oneof![
                prop::collection::vec((0..50i32).prop_map(|n| n as f32 / 1000.0), 1..500),
                prop::collection::vec(prop_oneof![9 => -20.0..20f32, 1 => Just(f32::NAN), 1 => Just(NO)], 1..500),
                prop::collection::vec(prop_oneof![Just(1.0), Just(f32::INFINITY), Just(f32::MAX), Just(NO)], 1..20),
            ].prop_filter("something is possible", |logits| logits.iter().copied().any(possible)),
            temperature in prop_oneof![Just(1f32), 1e-3..3f32],
            top_k in prop_oneof![Just(0), 1..600usize],
            top_p in prop_oneof![Just(1f32), Just(0f32), 0.0..1f32],
            min_p in prop_oneof![Just(0f32), Just(1f32), 0.0..1f32, 0.0..1e-6f32],
            coins in prop::collection::vec(0.0..1f64, 20),
        ) {
            assert_drawn(&logits, temperature, (top_k, top_p, min_p), &coins);
            assert_drawn(&logits, temperature, (top_k, top_p, min_p), &[0.0, 1.0 - f64::EPSILON / 2.0]);
        }
    }

    #[test]
    fn a_whole_vocabulary_is_as_if_it_were_sorted() {
        // Numbers about a bell, and the same so near to each other that all are of one step.
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        let bell: Vec<f32> = (0..65_536).map(|_| 6.0 * (0..6).map(|_| random() - 0.5).sum::<f32>()).collect();
        let coins: Vec<f64> = (0..20).map(|n| f64::from(n) / 20.0 + 0.01).collect();
        for cuts in [(0, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.3, 0.0), (40, 0.95, 0.05), (5000, 0.9, 0.0), (0, 1.0, 1e-3)] {
            assert_drawn(&bell, 1.0, cuts, &coins);
            assert_drawn(&bell, 1e4, cuts, &coins);
        }
    }

    #[test]
    fn the_best_are_found_in_any_order_of_logits() {
        for holes in [1, 3, 7] {
            let logit = |i: usize| match i % holes {
                1 => NO,
                2 => f32::NAN,
                _ => (i * 7919 % 101) as f32,
            };
            let mixed: Vec<f32> = (0..1000).map(logit).collect();
            let (mut rising, mut falling) = (mixed.clone(), mixed.clone());
            rising.sort_by(f32::total_cmp);
            falling.sort_by(|a, b| b.total_cmp(a));
            for logits in [mixed, rising, falling, vec![1.0; 300], vec![NO, f32::INFINITY, f32::NAN]] {
                let mut whole: Vec<_> = (0..).zip(logits.iter().copied()).filter(|&(_, l)| possible(l)).collect();
                whole.sort_by(better_first);
                for count in [1, 2, 63, 64, 65, 300, 999, 5000] {
                    let mut found = top(&logits, count);
                    found.sort_by(better_first);
                    assert_eq!(found, whole[..count.min(whole.len())], "{count}");
                }
                assert_eq!(best(&logits), Some(whole[0].0));
                assert_eq!(greatest(&logits), whole[0].1);
            }
        }
        assert_eq!(best(&[f32::NAN, NO]), None);
        assert!(Candidates::new(&[f32::NAN, NO], 1.0, 0).is_none() && Candidates::new(&[], 1.0, 0).is_none());
    }

    #[test]
    fn each_cut_keeps_the_best() {
        // Probabilities 8/16, 4/16, 2/16, 1/16, 1/16.
        let logits: Vec<f32> = [1.0f32, 4.0, 2.0, 8.0, 1.0].map(f32::ln).to_vec();
        let after = |top_k: usize, cut: &dyn Fn(&mut Candidates<'_>)| {
            let drawn = |coin: i32| {
                let mut candidates = Candidates::new(&logits, 1.0, top_k).expect("something is possible");
                cut(&mut candidates);
                candidates.draw(f64::from(coin) / 100.0)
            };
            let mut ids: Vec<_> = (0..100).map(drawn).collect();
            ids.dedup();
            ids
        };
        assert_eq!(after(0, &|_| ()), [3, 1, 2, 0, 4]);
        assert_eq!(after(2, &|_| ()), [3, 1]);
        assert_eq!(after(0, &|c| c.top_p(0.0)), [3]);
        assert_eq!(after(0, &|c| c.top_p(0.6)), [3, 1]);
        assert_eq!(after(0, &|c| c.top_p(0.9)), [3, 1, 2, 0]);
        assert_eq!(after(0, &|c| c.top_p(1.0)), [3, 1, 2, 0, 4]);
        assert_eq!(after(0, &|c| c.min_p(0.24)), [3, 1, 2]);
        assert_eq!(after(0, &|c| c.min_p(7.0)), [3]);
    }

    #[test]
    fn infinite_logits_share_everything() {
        let logits = [0.0, f32::INFINITY, 3.0, f32::INFINITY];
        assert_eq!(candidates(&logits).draw(0.49), 1);
        assert_eq!(candidates(&logits).draw(0.51), 3);
        assert_eq!(candidates(&logits).draw(1.0 - f64::EPSILON), 3);
    }
}
