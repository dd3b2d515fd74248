//! How likely tokens are, as whole numbers: their sums are the same in any order, so that any way to a result is the same one.
//!
//! A token is so many sixteenths of a halving less likely than the best one: its depth, which is split into the nearest whole
//! number, its step, and a rest of at most one half either way. Its weight is a product: of a number for the step, and of one for
//! the rest, the latter a short polynomial without a branch or a table. So the tokens of a step are summed by
//! one addition each and one multiplication for all. There is no fused multiply-add in it: on every processor the bits are the same.

use std::f64::consts::{LN_2, LOG2_E};

/// Of a halving.
const STEPS_EACH: usize = 16;
/// The last one, 64 halvings down, is for all below, and of what is impossible: it weighs nothing.
pub const STEPS: usize = 64 * STEPS_EACH;
const LAST: f64 = (STEPS - 1) as f64;

/// The weight of a rest of nothing. So many of it, and some more, fit 64 bits as one vocabulary has tokens.
const PART: f64 = (1u64 << 40) as f64;

/// A number to which whole ones are added in its last bits, and others rounded to the nearest.
const ROUND: f64 = (3u64 << 51) as f64;
const ROUNDED: u64 = (1 << 51) - 1;

/// From logits to depths.
#[derive(Clone, Copy, Debug)]
pub struct Depths {
    best: f64,
    scale: f64,
}

impl Depths {
    /// Below a best logit; `temperature` is above 0.
    pub fn new(best: f32, temperature: f32) -> Self {
        // Below an infinite one everything finite is far down, and it itself, infinitely above this number, at the top.
        let best = f64::from(best).min(2.0 * f64::from(f32::MAX));
        Self { best, scale: STEPS_EACH as f64 * LOG2_E / f64::from(temperature) }
    }

    /// The depth of a logit; that of NaN is the last.
    #[inline(always)]
    pub fn of(self, logit: f32) -> f64 {
        let depth = (self.best - f64::from(logit)) * self.scale;
        let depth = if depth < LAST { depth } else { LAST };
        if depth > 0.0 { depth } else { 0.0 }
    }

    /// The least and the greatest logit there may be in a step, and a little more.
    pub fn range(self, step: usize) -> (f32, f32) {
        let logit = |depth: f64| (self.best - depth / self.scale) as f32;
        (logit(step as f64 + 0.501).next_down(), logit(step as f64 - 0.501).next_up())
    }

    /// The depth at which tokens are `fraction` as likely as the best one, if that is at most 1.
    pub fn at(fraction: f32) -> f64 {
        (-f64::from(fraction).log2() * STEPS_EACH as f64).clamp(0.0, LAST)
    }
}

/// The step of a depth, and the part of the weight that is for the rest.
#[inline(always)]
pub fn split(depth: f64) -> (usize, u64) {
    const UNIT: f64 = LN_2 / STEPS_EACH as f64;
    let rounded = depth + ROUND;
    let rest = (rounded - ROUND) - depth;
    // The Taylor series of 2^(rest / 16), of which what is left out is below 2e-13.
    const C: [f64; 6] = [
        PART,
        PART * UNIT,
        PART * UNIT * UNIT / 2.0,
        PART * UNIT * UNIT * UNIT / 6.0,
        PART * UNIT * UNIT * UNIT * UNIT / 24.0,
        PART * UNIT * UNIT * UNIT * UNIT * UNIT / 120.0,
    ];
    let part = C[0] + rest * (C[1] + rest * (C[2] + rest * (C[3] + rest * (C[4] + rest * C[5]))));
    ((rounded.to_bits() & (STEPS as u64 - 1)) as usize, (part + ROUND).to_bits() & ROUNDED)
}

/// The part of the weight that is for the step.
pub fn of_step(step: usize) -> u64 {
    /// 2^(63 - n / 16).
    const FIRST: [u64; STEPS_EACH] = [
        9_223_372_036_854_775_808,
        8_832_331_321_595_618_838,
        8_457_869_449_776_733_335,
        8_099_283_532_826_439_817,
        7_755_900_482_342_532_474,
        7_427_075_746_662_858_866,
        7_112_192_101_001_162_095,
        6_810_658_488_877_194_079,
        6_521_908_912_666_391_106,
        6_245_401_371_186_603_363,
        5_980_616_842_327_661_685,
        5_727_058_308_814_112_983,
        5_484_249_825_272_419_512,
        5_251_735_624_851_448_219,
        5_029_079_263_719_320_435,
        4_815_862_801_830_788_490,
    ];
    FIRST[step % STEPS_EACH] >> (step / STEPS_EACH)
}

/// The sums of the parts of each step's tokens: for a whole vocabulary, by the widest registers there are.
pub fn sums(logits: &[f32], depths: Depths) -> Vec<u64> {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
        fn of_512_bits(logits: &[f32], depths: Depths) -> Vec<u64> {
            sums_by(logits, depths)
        }
        #[target_feature(enable = "avx2")]
        fn of_256_bits(logits: &[f32], depths: Depths) -> Vec<u64> {
            sums_by(logits, depths)
        }
        let foundation = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq");
        if foundation && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl") {
            // SAFETY: the processor has these features.
            return unsafe { of_512_bits(logits, depths) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { of_256_bits(logits, depths) };
        }
    }
    sums_by(logits, depths)
}

#[inline(always)]
fn sums_by(logits: &[f32], depths: Depths) -> Vec<u64> {
    const STRETCH: usize = 64;
    // Two of each, so that an addition does not wait for the one before it where many tokens are of one step.
    let mut sums = [[0u64; STEPS]; 2];
    let mut add = |stretch: &[f32; STRETCH]| {
        let (mut steps, mut parts) = ([0; STRETCH], [0; STRETCH]);
        for n in 0..STRETCH {
            (steps[n], parts[n]) = split(depths.of(stretch[n]));
        }
        for n in 0..STRETCH {
            sums[n % 2][steps[n] % STEPS] += parts[n];
        }
    };
    let (stretches, rest) = logits.as_chunks();
    stretches.iter().for_each(&mut add);
    let mut last = [f32::NEG_INFINITY; STRETCH];
    last[..rest.len()].copy_from_slice(rest);
    add(&last);
    sums[0].iter().zip(&sums[1]).map(|(a, b)| a + b).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a token, with 103 bits for that of the best one.
    fn weight(depth: f64) -> u128 {
        let (step, part) = split(depth);
        u128::from(of_step(step)) * u128::from(part)
    }

    #[test]
    fn a_weight_is_a_power_of_two_to_eleven_digits() {
        assert_eq!(weight(0.0), 1 << 103);
        for n in 0..=200_000 {
            let depth = f64::from(n) * 320.0 / 200_000.0;
            let exact = (103.0 - depth / 16.0).exp2();
            let found = weight(depth) as f64;
            assert!((found / exact - 1.0).abs() < 2e-12, "{depth}: {found}, not {exact}");
        }
        // Far below fewer bits are left; of the last step nothing.
        assert!((weight(960.25) as f64 / (103f64 - 960.25 / 16.0).exp2() - 1.0).abs() < 0.1);
        assert_eq!(weight(LAST), 0);
    }

    #[test]
    fn what_is_possible_is_at_some_depth_and_all_else_is_the_last() {
        let depths = Depths::new(3.0, 0.5);
        assert_eq!(depths.of(3.0), 0.0);
        assert!((depths.of(2.0) - 32.0 * LOG2_E).abs() < 1e-9);
        assert_eq!([f32::NAN, f32::NEG_INFINITY, -1e30].map(|logit| depths.of(logit)), [LAST; 3]);
        let infinite = Depths::new(f32::INFINITY, 1.0);
        assert_eq!([f32::INFINITY, f32::MAX, 0.0].map(|logit| infinite.of(logit)), [0.0, LAST, LAST]);
    }

    #[test]
    fn sums_are_those_of_one_token_after_the_other() {
        let logits: Vec<f32> = (0..1000).map(|n| (n * 7919 % 1013) as f32 / 20.0).chain([f32::NAN; 3]).collect();
        for (count, temperature) in [(0, 1.0), (63, 1.0), (64, 0.1), (1003, 0.7), (1003, 100.0)] {
            let (logits, depths) = (&logits[..count], Depths::new(50.6, temperature));
            let mut expected = vec![0; STEPS];
            for &logit in logits {
                let (step, part) = split(depths.of(logit));
                expected[step] += part;
            }
            for found in [sums(logits, depths), sums_by(logits, depths)] {
                // Of the last step, which weighs nothing, there may be more.
                assert_eq!(found[..STEPS - 1], expected[..STEPS - 1]);
            }
        }
    }

    #[test]
    fn a_step_is_within_its_range() {
        for (best, temperature) in [(12.5, 1.0), (1e-30, 0.7), (-3e5, 2.0), (40.0, 1e-3), (f32::INFINITY, 1.0)] {
            let depths = Depths::new(best, temperature);
            for n in 0..20_000u32 {
                let logit = best - n as f32 * temperature / 450.0;
                let (step, _) = split(depths.of(logit));
                let (least, greatest) = depths.range(step);
                assert!(step == STEPS - 1 || (least <= logit && logit <= greatest), "{logit} of step {step}");
            }
        }
    }
}
