//! Laws of sampling, against an implementation that sorts everything.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use rewake::sample::{Counts, Error, sample};
use rewake::types::Sampling;

const VOCABULARY: u32 = 200;
/// Further than rounding reaches from any place where the result changes.
const CLEAR: f64 = 1e-9;

/// Logits after biases and penalties, computed as the definitions read; -inf is impossible.
fn adjusted(logits: &[f32], params: &Sampling, counts: &Counts, tail: &[u32]) -> Vec<f32> {
    let mut logits: Vec<f32> = logits.iter().map(|&l| if l.is_nan() { f32::NEG_INFINITY } else { l }).collect();
    let biases: BTreeMap<u32, f32> = params.logit_bias.iter().copied().collect();
    let bias = |id: usize| biases.get(&(id as u32)).copied().unwrap_or(0.0);
    let possible = |logits: &[f32], wanted: &dyn Fn(usize) -> bool| -> BTreeSet<usize> {
        (0..logits.len()).filter(|&id| logits[id] > f32::NEG_INFINITY && wanted(id)).collect()
    };
    let forced = possible(&logits, &|id| bias(id) >= 100.0);
    let allowed = possible(&logits, &|id| bias(id) > -100.0);
    let kept = [forced, allowed].into_iter().find(|set| !set.is_empty()).unwrap_or(possible(&logits, &|_| true));
    let tail: BTreeSet<u32> = tail.iter().copied().collect();
    let counts: BTreeMap<u32, f32> = counts.export().into_iter().collect();
    for (id, logit) in logits.iter_mut().enumerate() {
        if !kept.contains(&id) {
            *logit = f32::NEG_INFINITY;
            continue;
        }
        *logit += if bias(id).abs() < 100.0 { bias(id) } else { 0.0 };
        if tail.contains(&(id as u32)) {
            *logit *= if *logit > 0.0 { 1.0 / params.repetition_penalty } else { params.repetition_penalty };
        }
        if let Some(&count) = counts.get(&(id as u32)).filter(|&&count| count > 0.0) {
            *logit -= params.presence_penalty + params.frequency_penalty * count;
        }
    }
    logits
}

/// The tokens that may be drawn with their probabilities, in the order of the draw; `None` if rounding could decide.
fn distribution(logits: &[f32], params: &Sampling) -> Option<Vec<(u32, f64)>> {
    let mut all: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&logit| f64::from(logit))).collect();
    all.retain(|(_, logit)| *logit > f64::NEG_INFINITY);
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let best = all[0].1;
    if params.top_k > 0 {
        all.truncate(params.top_k);
    }
    for (_, value) in &mut all {
        *value = ((*value - best) / f64::from(params.temperature)).exp();
    }
    let sum: f64 = all.iter().map(|(_, weight)| weight).sum();
    if params.top_p < 1.0 {
        let mut before = 0.0;
        let mut kept = Vec::new();
        for &(id, weight) in &all {
            if !kept.is_empty() && before / sum >= f64::from(params.top_p) {
                break;
            }
            before += weight;
            if (before / sum - f64::from(params.top_p)).abs() < CLEAR {
                return None;
            }
            kept.push((id, weight));
        }
        all = kept;
    }
    all.retain(|(_, weight)| *weight >= f64::from(params.min_p));
    let sum: f64 = all.iter().map(|(_, weight)| weight).sum();
    Some(all.into_iter().map(|(id, weight)| (id, weight / sum)).collect())
}

/// Sweeps the coin through the middle and both ends of every token's part.
fn assert_draws(logits: &[f32], params: &Sampling, counts: &Counts, tail: &[u32], expected: &[(u32, f64)]) {
    let mut start = 0.0;
    for &(id, probability) in expected {
        let margin = CLEAR.max(probability * 1e-3);
        if probability > 4.0 * margin {
            for coin in [start + margin, start + probability / 2.0, start + probability - margin] {
                assert_eq!(sample(&mut logits.to_vec(), params, counts, tail, coin), Ok(id), "coin {coin}");
            }
        }
        start += probability;
    }
    let drawable: BTreeSet<u32> = expected.iter().map(|(id, _)| *id).collect();
    for coin in [0.0, 1.0 - f64::EPSILON / 2.0] {
        let token = sample(&mut logits.to_vec(), params, counts, tail, coin).unwrap();
        assert!(drawable.contains(&token), "coin {coin}");
    }
}

/// Logits of few distinct values (ties) or many, with holes; sometimes infinite.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    let coarse = (-6..7i32).prop_map(|l| l as f32);
    let special = prop_oneof![Just(f32::NAN), Just(f32::NEG_INFINITY), Just(-0.0f32)];
    let logit = prop_oneof![6 => -12.0..12.0f32, 4 => coarse, 1 => special];
    prop::collection::vec(logit, 1..VOCABULARY as usize)
        .prop_filter("something is possible", |logits| logits.iter().any(|&logit| logit > f32::NEG_INFINITY))
}

fn ids() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(0..VOCABULARY + 5, 0..40)
}

prop_compose! {
    fn params()(
        temperature in prop_oneof![Just(1.0f32), 0.05..2.0f32],
        top_p in prop_oneof![Just(1.0f32), Just(0.0f32), 0.0..1.0f32],
        top_k in prop_oneof![Just(0usize), 1..260usize],
        min_p in prop_oneof![Just(0.0f32), 0.0..1.0f32],
        presence_penalty in prop_oneof![Just(0.0f32), -2.0..2.0f32],
        frequency_penalty in prop_oneof![Just(0.0f32), -2.0..2.0f32],
        // Powers of two, so that dividing and multiplying by the inverse round alike.
        repetition_penalty in prop_oneof![Just(1.0f32), Just(2.0f32), Just(0.5f32)],
        penalty_decay in prop_oneof![Just(1.0f32), 0.5..1.0f32],
        logit_bias in prop::collection::btree_map(
            0..VOCABULARY + 5,
            prop_oneof![8 => -20.0..20.0f32, 4 => Just(-100.0f32), 1 => Just(100.0f32)],
            0..30,
        ),
    ) -> Sampling {
        let logit_bias = logit_bias.into_iter().collect();
        Sampling {
            temperature, top_p, top_k, min_p, presence_penalty, frequency_penalty, repetition_penalty, penalty_decay,
            logit_bias, seed: 0,
        }
    }
}

fn counts(response: &[u32], decay: f32) -> Counts {
    let mut counts = Counts::new();
    response.iter().for_each(|&id| counts.add(id, decay));
    counts
}

fn naive_argmax(logits: &[f32]) -> u32 {
    let mut best = None;
    for (id, &logit) in (0..).zip(logits) {
        if logit > best.map_or(f32::NEG_INFINITY, |(_, most)| most) {
            best = Some((id, logit));
        }
    }
    best.unwrap().0
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn what_is_drawn_is_the_distribution(
        logits in logits(), params in params(), response in ids(), tail in ids(),
    ) {
        let counts = counts(&response, params.penalty_decay);
        let expected = distribution(&adjusted(&logits, &params, &counts, &tail), &params);
        prop_assume!(expected.is_some());
        assert_draws(&logits, &params, &counts, &tail, &expected.unwrap());
    }

    #[test]
    fn greedy_is_the_first_of_the_best(
        logits in logits(), params in params(), response in ids(), tail in ids(), coin in 0.0..1.0f64,
    ) {
        let counts = counts(&response, params.penalty_decay);
        let expected = naive_argmax(&adjusted(&logits, &params, &counts, &tail));
        let greedy = Sampling { temperature: 0.0, ..params.clone() };
        prop_assert_eq!(sample(&mut logits.clone(), &greedy, &counts, &tail, coin), Ok(expected));
        let one = Sampling { top_k: 1, ..params.clone() };
        prop_assert_eq!(sample(&mut logits.clone(), &one, &counts, &tail, coin), Ok(expected));
        let none = Sampling { top_p: 0.0, ..params };
        prop_assert_eq!(sample(&mut logits.clone(), &none, &counts, &tail, coin), Ok(expected));
    }

    #[test]
    fn what_is_banned_is_never_drawn(logits in logits(), params in params(), coin in 0.0..1.0f64) {
        let banned = |id: u32| params.logit_bias.iter().any(|&(biased, bias)| biased == id && bias == -100.0);
        let others = (0..).zip(&logits).any(|(id, &logit)| logit > f32::NEG_INFINITY && !banned(id));
        let token = sample(&mut logits.clone(), &params, &Counts::new(), &[], coin).unwrap();
        prop_assert!(!banned(token) || !others);
        prop_assert!(logits[token as usize] > f32::NEG_INFINITY);
    }

    #[test]
    fn nothing_a_model_says_is_a_panic(
        logits in prop::collection::vec(any::<u32>().prop_map(f32::from_bits), 0..100),
        infinite in any::<prop::sample::Index>(),
        params in params(), response in ids(), tail in ids(), coin in 0.0..1.0f64, greedy in any::<bool>(),
    ) {
        let mut logits = logits;
        if !logits.is_empty() {
            let index = infinite.index(logits.len());
            logits[index] = f32::INFINITY;
        }
        let params = Sampling { temperature: if greedy { 0.0 } else { params.temperature }, ..params };
        let token = sample(&mut logits.clone(), &params, &counts(&response, params.penalty_decay), &tail, coin);
        prop_assert_eq!(token.is_err(), logits.is_empty());
    }

    /// A response that is saved and resumed samples exactly as one that is not.
    #[test]
    fn counts_survive_a_snapshot_bit_for_bit(response in ids(), cut in any::<prop::sample::Index>(), decay in 0.5..=1.0f32) {
        let (before, after) = response.split_at(cut.index(response.len() + 1));
        let saved = counts(before, decay).export();
        prop_assert!(saved.is_sorted_by(|a, b| a.0 < b.0));
        let mut resumed = Counts::import(&saved);
        let bits = |counts: &Counts| counts.iter().map(|(id, count)| (id, count.to_bits())).collect::<Vec<_>>();
        prop_assert_eq!(bits(&resumed), bits(&counts(before, decay)));
        after.iter().for_each(|&id| resumed.add(id, decay));
        prop_assert_eq!(bits(&resumed), bits(&counts(&response, decay)));
    }
}

/// Over the whole World vocabulary, where most is never sorted.
#[test]
fn a_large_vocabulary_is_drawn_from_to_its_end() {
    let logits: Vec<f32> = (0..65_536u32).map(|id| (id.wrapping_mul(2_654_435_761) % 9_973) as f32 / 997.3).collect();
    for (top_p, top_k, min_p) in [(1.0, 0, 0.0), (0.9, 0, 0.0), (1.0, 3_000, 0.0), (0.5, 5_000, 0.2), (1.0, 0, 0.01)] {
        let params = Sampling { top_p, top_k, min_p, ..Sampling::default() };
        let expected = distribution(&logits, &params).unwrap();
        let mut start = 0.0;
        let mut checked = 0;
        for (place, &(id, probability)) in expected.iter().enumerate() {
            if place % (expected.len() / 40) == 0 {
                let token = sample(&mut logits.clone(), &params, &Counts::new(), &[], start + probability / 2.0);
                assert_eq!(token, Ok(id), "place {place} of {}", expected.len());
                checked += 1;
            }
            start += probability;
        }
        assert!(checked >= 40);
        let end = sample(&mut logits.clone(), &params, &Counts::new(), &[], 1.0 - f64::EPSILON / 2.0).unwrap();
        assert!(expected[expected.len() - 2..].iter().any(|&(id, _)| id == end));
    }
}

#[test]
fn equal_tokens_are_drawn_by_id() {
    let draw = |coin| sample(&mut [2.0; 4], &Sampling::default(), &Counts::new(), &[], coin);
    assert_eq!([0.0, 0.2499, 0.25, 0.5, 0.75, 0.999].map(draw), [Ok(0), Ok(0), Ok(1), Ok(2), Ok(3), Ok(3)]);
    let kept = Sampling { top_p: 0.5, ..Sampling::default() };
    assert_eq!(sample(&mut [2.0; 4], &kept, &Counts::new(), &[], 0.99), Ok(1));
}

#[test]
fn a_broken_model_is_an_error() {
    for params in [Sampling::default(), Sampling { temperature: 0.0, ..Sampling::default() }] {
        for broken in [&mut [f32::NAN, f32::NEG_INFINITY][..], &mut []] {
            assert_eq!(sample(broken, &params, &Counts::new(), &[], 0.5), Err(Error::NoToken));
        }
    }
}
