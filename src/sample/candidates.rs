//! The tokens that may still be chosen, put in order only as far as somebody looks.

use std::cmp::Ordering;

/// Tokens with their logits, the best first: by descending logit, equal ones by ascending id. Every cut keeps the first
/// few, and a draw seldom looks far; so only the beginning is ever sorted, and a vocabulary of 65,536 never is unless the
/// coin falls into its farthest tail. The order is total, so what is sorted when does not matter to the result.
#[derive(Debug)]
pub(super) struct Candidates {
    /// The first `ranked` are in order and better than the rest, which is in any order.
    tokens: Vec<(u32, f32)>,
    ranked: usize,
    best: f32,
    temperature: f64,
}

/// How many are ranked at first; each time they do not suffice, four times as many.
const FIRST: usize = 64;

fn better_first(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.partial_cmp(&a.1).expect("possible logits are numbers").then(a.0.cmp(&b.0))
}

/// The best of `tokens`, none of which is NaN.
pub(super) fn best(tokens: impl Iterator<Item = (u32, f32)>) -> Option<(u32, f32)> {
    tokens.min_by(better_first)
}

impl Candidates {
    /// `tokens` holds no NaN and is not empty; `temperature` is above 0.
    pub fn new(tokens: Vec<(u32, f32)>, temperature: f32) -> Self {
        let best = tokens.iter().map(|&(_, logit)| logit).fold(f32::NEG_INFINITY, f32::max);
        Self { tokens, ranked: 0, best, temperature: f64::from(temperature) }
    }

    /// Keeps the `count` best; 0 keeps all.
    pub fn top_k(&mut self, count: usize) {
        if (1..self.tokens.len()).contains(&count) {
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
            self.tokens.retain(|&(_, logit)| weight(logit, best, temperature) >= least);
            self.ranked = self.ranked.min(self.tokens.len());
        }
    }

    /// The token into whose part of the whole the coin falls, parts lying in the order of the tokens.
    pub fn draw(mut self, coin: f64) -> u32 {
        let target = coin * self.mass();
        let index = self.first_where(|sum| sum > target);
        self.tokens[index].0
    }

    /// The index of the first token at which the sum of the weights from the best one on is `enough`. The last token of
    /// any weight, if rounding keeps the sum short of it.
    fn first_where(&mut self, enough: impl Fn(f64) -> bool) -> usize {
        let mut sum = 0.0;
        let mut last = 0;
        for index in 0..self.tokens.len() {
            if index == self.ranked {
                self.rank((4 * index).max(FIRST));
            }
            let weight = weight(self.tokens[index].1, self.best, self.temperature);
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

    /// The sum of all weights. It is taken before anything is ranked (by id) or of ranked tokens only, so always in a
    /// defined order.
    fn mass(&self) -> f64 {
        self.tokens.iter().map(|&(_, logit)| weight(logit, self.best, self.temperature)).sum()
    }

    fn keep(&mut self, count: usize) {
        self.rank(count);
        self.tokens.truncate(count);
        self.ranked = self.ranked.min(count);
    }

    /// Puts at least the `count` best in order.
    fn rank(&mut self, count: usize) {
        let more = count.min(self.tokens.len()).saturating_sub(self.ranked);
        let rest = &mut self.tokens[self.ranked..];
        if more < rest.len() {
            rest.select_nth_unstable_by(more, better_first);
        }
        rest[..more].sort_unstable_by(better_first);
        self.ranked += more;
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

    fn candidates(logits: &[f32]) -> Candidates {
        Candidates::new((0..).zip(logits.iter().copied()).collect(), 1.0)
    }

    /// The ids kept, in order.
    fn ids(mut candidates: Candidates) -> Vec<u32> {
        candidates.rank(usize::MAX);
        candidates.tokens.iter().map(|&(id, _)| id).collect()
    }

    #[test]
    fn the_order_does_not_depend_on_how_far_was_looked_before() {
        let logits: Vec<f32> = (0..1000).map(|i| (i * 7919 % 101) as f32).collect();
        let whole = ids(candidates(&logits));
        assert!(whole.is_sorted_by_key(|&id| (-(logits[id as usize] as i32), id)));
        let mut some = candidates(&logits);
        for count in [3, 3, 70, 65, 400] {
            some.rank(count);
            assert_eq!(some.tokens[..count].iter().map(|t| t.0).collect::<Vec<_>>(), whole[..count]);
        }
        assert_eq!(ids(some), whole);
    }

    #[test]
    fn each_cut_keeps_the_best() {
        // Probabilities 8/16, 4/16, 2/16, 1/16, 1/16.
        let logits: Vec<f32> = [1.0f32, 4.0, 2.0, 8.0, 1.0].map(f32::ln).to_vec();
        let after = |cut: fn(&mut Candidates)| {
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
