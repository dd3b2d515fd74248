//! What a request and the text so far do to the logits before anything is chosen.

use crate::types::Sampling;

use super::Counts;

/// A bias that bans (negative) or forces (positive) a token, as the OpenAI API has it.
const ABSOLUTE: f32 = 100.0;

/// Whether a token can be chosen at all; NaN counts as impossible.
pub(super) fn possible(logit: f32) -> bool {
    logit > f32::NEG_INFINITY
}

/// Adds the biases. Of the possible tokens that are forced, if any, nothing else stays possible; what is banned is
/// impossible, unless nothing else is possible.
pub(super) fn bias(logits: &mut [f32], biases: &[(u32, f32)]) {
    for &(id, bias) in biases {
        if let Some(logit) = logits.get_mut(id as usize).filter(|_| bias.abs() < ABSOLUTE) {
            *logit += bias;
        }
    }
    let forced = possible_where(logits, biases, |bias| bias >= ABSOLUTE);
    if !forced.is_empty() {
        logits.fill(f32::NEG_INFINITY);
        restore(logits, &forced);
    }
    let banned = possible_where(logits, biases, |bias| bias <= -ABSOLUTE);
    if !banned.is_empty() {
        banned.iter().for_each(|&(id, _)| logits[id] = f32::NEG_INFINITY);
        if !logits.iter().copied().any(possible) {
            restore(logits, &banned);
        }
    }
}

/// The possible tokens whose bias is `wanted`, with their logits.
fn possible_where(logits: &[f32], biases: &[(u32, f32)], wanted: fn(f32) -> bool) -> Vec<(usize, f32)> {
    let wanted = biases.iter().filter(|(_, bias)| wanted(*bias)).map(|&(id, _)| id as usize);
    wanted.filter_map(|id| Some((id, *logits.get(id)?))).filter(|&(_, logit)| possible(logit)).collect()
}

fn restore(logits: &mut [f32], kept: &[(usize, f32)]) {
    kept.iter().for_each(|&(id, logit)| logits[id] = logit);
}

/// Makes the tokens of `tail` less likely, each once however often it occurs: positive logits are divided by the
/// penalty, negative ones multiplied. (Keskar et al. 2019, CTRL, §4.1.)
pub(super) fn penalise_repetition(logits: &mut [f32], penalty: f32, tail: &[u32]) {
    if penalty == 1.0 {
        return;
    }
    let mut ids = tail.to_vec();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
}

/// `logit -= presence + frequency × count` for every token with a count above zero.
pub(super) fn penalise_occurrence(logits: &mut [f32], params: &Sampling, counts: &Counts) {
    let Sampling { presence_penalty, frequency_penalty, .. } = *params;
    if presence_penalty == 0.0 && frequency_penalty == 0.0 {
        return;
    }
    for (id, count) in counts.iter().filter(|&(_, count)| count > 0.0) {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit -= presence_penalty + frequency_penalty * count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO: f32 = f32::NEG_INFINITY;

    fn biased(mut logits: Vec<f32>, biases: &[(u32, f32)]) -> Vec<f32> {
        bias(&mut logits, biases);
        logits
    }

    #[test]
    fn a_bias_adds_bans_or_forces() {
        let logits = || vec![1.0, 2.0, 3.0, NO];
        assert_eq!(biased(logits(), &[(0, 0.5), (2, -99.0), (9, 1.0)]), [1.5, 2.0, -96.0, NO]);
        assert_eq!(biased(logits(), &[(2, -100.0)]), [1.0, 2.0, NO, NO]);
        assert_eq!(biased(logits(), &[(0, 100.0), (1, 100.0), (2, 5.0)]), [1.0, 2.0, NO, NO]);
    }

    #[test]
    fn what_would_leave_nothing_is_void() {
        assert_eq!(biased(vec![1.0], &[(0, -100.0)]), [1.0]);
        assert_eq!(biased(vec![1.0, NO, 3.0], &[(0, -100.0), (2, -100.0)]), [1.0, NO, 3.0]);
        assert_eq!(biased(vec![1.0, NO, 3.0], &[(1, 100.0)]), [1.0, NO, 3.0]);
    }

    #[test]
    fn repetition_counts_once() {
        let mut logits = vec![1.0, -1.0, 4.0];
        penalise_repetition(&mut logits, 2.0, &[1, 0, 0, 1, 7]);
        assert_eq!(logits, [0.5, -2.0, 4.0]);
    }

    #[test]
    fn presence_and_frequency_follow_the_counts() {
        let params = Sampling { presence_penalty: 0.5, frequency_penalty: 2.0, ..Sampling::default() };
        let mut logits = vec![1.0, 1.0, 1.0];
        penalise_occurrence(&mut logits, &params, &Counts::import(&[(0, 0.25), (2, 0.0), (9, 1.0)]));
        assert_eq!(logits, [0.0, 1.0, 1.0]);
    }
}
