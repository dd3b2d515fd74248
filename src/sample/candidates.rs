//! The tokens that may still be chosen, put in order only as far as somebody looks.

use std::cmp::Ordering;

use super::adjust::possible;

/// Tokens with their logits, the best first: by descending logit, equal ones by ascending id. Every cut keeps the first
/// few, and a draw seldom looks far; so only the beginning is ever put in order, and a vocabulary of 65,536 never is unless the
/// coin falls into its farthest tail. The order is total, so what is ranked when does not matter to the result.
#[derive(Debug)]
pub(super) struct Candidates<'a> {
    /// By id; NaN and -inf are impossible.
    logits: &'a [f32],
    /// How many may be drawn: so many of the best.
    count: usize,
    /// Whether those are fewer than what is possible.
    cut: bool,
    /// The best ones as far as somebody looked, in order.
    ranked: Vec<(u32, f32)>,
    best: f32,
    temperature: f64,
}

/// How many are ranked at first; each time they do not suffice, four times as many.
const FIRST: usize = 64;
/// Logits that are compared at once with the worst of those kept so far.
const STRETCH: usize = 64;

fn better_first(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.partial_cmp(&a.1).expect("possible logits are numbers").then(a.0.cmp(&b.0))
}

/// The best possible token.
pub(super) fn best(logits: &[f32]) -> Option<u32> {
    top(logits, 1).first().map(|&(id, _)| id)
}

/// The `count` best possible tokens, in order.
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
    kept.sort_unstable_by(better_first);
    kept.truncate(count);
    kept
}

impl<'a> Candidates<'a> {
    /// `None` if no token is possible; `temperature` is above 0.
    pub fn new(logits: &'a [f32], temperature: f32) -> Option<Self> {
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let count = logits.iter().filter(|&&logit| possible(logit)).count();
        let (ranked, temperature) = (Vec::new(), f64::from(temperature));
        (count > 0).then_some(Self { logits, count, cut: false, ranked, best, temperature })
    }

    /// Keeps the `count` best; 0 keeps all.
    pub fn top_k(&mut self, count: usize) {
        if count > 0 {
            self.keep(count);
        }
    }

    /// Keeps the fewest best ones whose probabilities sum to `share` of the whole, at least one.
    pub fn top_p(&mut self, share: f32) {
        if share < 1.0 {
            let enough = f64::from(share) * self.mass();
            let last = self.first_where(|sum| sum >= enough);
            self.keep(last + 1);
        }
    }

    /// Keeps those at least `fraction` as likely as the best one.
    pub fn min_p(&mut self, fraction: f32) {
        if fraction > 0.0 {
            // Not more than 1, the weight of the best, so that it is always kept.
            let least = f64::from(fraction.min(1.0));
            let (best, temperature) = (self.best, self.temperature);
            let likely = |logit: f32| weight(logit, best, temperature) >= least;
            let count = if self.cut {
                self.rank(self.count);
                self.ranked.iter().take(self.count).take_while(|&&(_, logit)| likely(logit)).count()
            } else {
                // Far below it nothing need be computed.
                let far = f64::from(best) + temperature * (least.ln() - 1.0);
                self.logits.iter().filter(|&&logit| f64::from(logit) >= far && likely(logit)).count()
            };
            self.keep(count);
        }
    }

    /// The token into whose part of the whole the coin falls, parts lying in the order of the tokens.
    pub fn draw(mut self, coin: f64) -> u32 {
        let target = coin * self.mass();
        let index = self.first_where(|sum| sum > target);
        self.ranked[index].0
    }

    /// The index of the first token at which the sum of the weights from the best one on is `enough`. The last token of
    /// any weight, if rounding keeps the sum short of it. It is ranked.
    fn first_where(&mut self, enough: impl Fn(f64) -> bool) -> usize {
        let mut sum = 0.0;
        let mut last = 0;
        for index in 0..self.count {
            if index >= self.ranked.len() {
                self.rank((4 * index).max(FIRST));
            }
            let weight = self.weight(self.ranked[index].1);
            if weight == 0.0 {
                break;
            }
            sum += weight;
            last = index;
            if enough(sum) {
                break;
            }
        }
        last
    }

    /// The sum of all weights, by id if nothing is cut, else in order.
    fn mass(&mut self) -> f64 {
        if !self.cut {
            return self.logits.iter().filter(|&&logit| possible(logit)).map(|&logit| self.weight(logit)).sum();
        }
        self.rank(self.count);
        self.ranked[..self.count].iter().map(|&(_, logit)| self.weight(logit)).sum()
    }

    fn keep(&mut self, count: usize) {
        if count < self.count {
            (self.count, self.cut) = (count, true);
        }
    }

    /// Puts at least the `count` best that may be drawn in order.
    fn rank(&mut self, count: usize) {
        let count = count.min(self.count);
        if self.ranked.len() < count {
            self.ranked = top(self.logits, count);
        }
    }

    fn weight(&self, logit: f32) -> f64 {
        weight(logit, self.best, self.temperature)
    }
}

/// The probability of a token in units of the best one's. Equal logits are told apart from the difference, as infinite
/// ones have none.
fn weight(logit: f32, best: f32, temperature: f64) -> f64 {
    if logit == best { 1.0 } else { ((f64::from(logit) - f64::from(best)) / temperature).exp() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(logits: &[f32]) -> Candidates<'_> {
        Candidates::new(logits, 1.0).expect("something is possible")
    }

    /// The ids kept, in order.
    fn ids(mut candidates: Candidates<'_>) -> Vec<u32> {
        candidates.rank(usize::MAX);
        candidates.ranked[..candidates.count].iter().map(|&(id, _)| id).collect()
    }

    #[test]
    fn the_best_are_found_in_any_order_of_logits() {
        const NO: f32 = f32::NEG_INFINITY;
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
                    assert_eq!(top(&logits, count), whole[..count.min(whole.len())], "{count}");
                }
                assert_eq!(best(&logits), Some(whole[0].0));
            }
        }
        assert_eq!(best(&[f32::NAN, NO]), None);
        assert!(Candidates::new(&[f32::NAN, NO], 1.0).is_none() && Candidates::new(&[], 1.0).is_none());
    }

    #[test]
    fn each_cut_keeps_the_best() {
        // Probabilities 8/16, 4/16, 2/16, 1/16, 1/16.
        let logits: Vec<f32> = [1.0f32, 4.0, 2.0, 8.0, 1.0].map(f32::ln).to_vec();
        let after = |cut: fn(&mut Candidates<'_>)| {
            let mut candidates = candidates(&logits);
            cut(&mut candidates);
            ids(candidates)
        };
        assert_eq!(after(|c| c.top_k(0)), [3, 1, 2, 0, 4]);
        assert_eq!(after(|c| c.top_k(2)), [3, 1]);
        assert_eq!(after(|c| c.top_p(0.0)), [3]);
        assert_eq!(after(|c| c.top_p(0.6)), [3, 1]);
        assert_eq!(after(|c| c.top_p(0.9)), [3, 1, 2, 0]);
        assert_eq!(after(|c| c.top_p(1.0)), [3, 1, 2, 0, 4]);
        assert_eq!(after(|c| c.min_p(0.24)), [3, 1, 2]);
        assert_eq!(after(|c| c.min_p(7.0)), [3]);
    }

    #[test]
    fn infinite_logits_share_everything() {
        let logits = [0.0, f32::INFINITY, 3.0, f32::INFINITY];
        assert_eq!(candidates(&logits).draw(0.49), 1);
        assert_eq!(candidates(&logits).draw(0.51), 3);
        assert_eq!(candidates(&logits).draw(1.0 - f64::EPSILON), 3);
    }
}
