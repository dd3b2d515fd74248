//! Activations as integers of eight bits, for the dot products with quantised weights.

use super::{Shared, kernel, parallel};

/// What a run of inputs shares.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Run {
    /// A value is this times its integer.
    pub scale: f32,
    /// What each sum of products begins with, in place of taking an offset off every weight: minus the offset times the sum of the
    /// integers.
    pub start: i32,
    /// The sum of the values.
    pub sum: f32,
}

/// How activations are rounded for a kind of weights.
#[derive(Clone, Copy, Debug)]
pub struct Rounding {
    /// Inputs that share a scale: 16 or 32.
    pub run: usize,
    /// What weights are stored with on top.
    pub offset: i32,
    /// Whether kernels ask for halves too: those for AVX2 and weights of eight bits, as two products of eight bits by eight do
    /// not fit 16.
    pub halves: bool,
}

/// Rows of activations, each value rounded to a 127th of the largest of its run.
#[derive(Debug, Default)]
pub struct Activations {
    inputs: usize,
    run: usize,
    /// `[rows, inputs]`, between -127 and 127.
    codes: Vec<i8>,
    /// The same with 16 bits each, if asked for: of four inputs the first and third, then the second and fourth.
    halves: Vec<[i16; 4]>,
    /// `[rows, inputs / run]`.
    runs: Vec<Run>,
}

impl Activations {
    /// Rounds `x [rows, inputs]`.
    ///
    /// A run with a value that is not finite gives sums that are not.
    pub fn set(&mut self, x: &[f32], inputs: usize, Rounding { run, offset, halves: asked }: Rounding) {
        (self.inputs, self.run) = (inputs, run);
        self.codes.resize(x.len(), 0);
        self.halves.resize(if asked { x.len() / 4 } else { 0 }, [0; 4]);
        self.runs.resize(x.len() / run, Run::default());
        let (codes, halves) = (Shared::new(&mut self.codes), Shared::new(&mut self.halves));
        let runs = Shared::new(&mut self.runs);
        // Whole runs, so many that one row of a small model is a single task.
        let part = 128 * run;
        parallel(x.len().div_ceil(part), 4 * x.len(), |n| {
            let x = &x[n * part..x.len().min((n + 1) * part)];
            // SAFETY: every task has its own part.
            let (codes, runs) = unsafe { (codes.part(n * part, x.len()), runs.part(n * 128, x.len() / run)) };
            match run {
                16 => in_16(x, offset, codes, runs),
                _ => in_32(x, offset, codes, runs),
            }
            if asked {
                // SAFETY: as above.
                split(codes, unsafe { halves.part(n * part / 4, x.len() / 4) });
            }
        });
    }

    /// The integers and the runs of a row, from an input on that begins a run.
    pub fn row(&self, row: usize, input: usize) -> (&[i8], &[Run]) {
        let runs = self.inputs / self.run;
        (&self.codes[row * self.inputs + input..], &self.runs[row * runs + input / self.run..])
    }

    /// The integers of a row as halves, four inputs each; none unless asked for.
    pub fn halves(&self, row: usize, input: usize) -> &[[i16; 4]] {
        self.halves.get((row * self.inputs + input) / 4..).unwrap_or_default()
    }
}

kernel! {
    fn in_16(x: &[f32], offset: i32, codes: &mut [i8], runs: &mut [Run]) {
        rounded::<16>(x, offset, codes, runs);
    }
}

kernel! {
    fn in_32(x: &[f32], offset: i32, codes: &mut [i8], runs: &mut [Run]) {
        rounded::<32>(x, offset, codes, runs);
    }
}

kernel! {
    fn split(codes: &[i8], halves: &mut [[i16; 4]]) {
        for (halves, codes) in halves.iter_mut().zip(codes.as_chunks::<4>().0) {
            *halves = [codes[0], codes[2], codes[1], codes[3]].map(i16::from);
        }
    }
}

#[inline(always)]
fn rounded<const N: usize>(x: &[f32], offset: i32, codes: &mut [i8], runs: &mut [Run]) {
    /// Added to a small number, it leaves that, rounded to even, in the lowest bits: 1.5 · 2²³.
    const ROUND: f32 = 12_582_912.0;
    let (x, codes) = (x.as_chunks::<N>().0, codes.as_chunks_mut::<N>().0);
    for ((x, codes), run) in x.iter().zip(codes).zip(runs) {
        // As integers, absolute values have the same order, and no NaN gets lost.
        let largest = x.iter().fold(0, |most: i32, x| most.max((x.to_bits() & 0x7fff_ffff).cast_signed()));
        let largest = f32::from_bits(largest.cast_unsigned());
        let inverse = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
        let mut sum = 0;
        for (code, x) in codes.iter_mut().zip(x) {
            *code = (x * inverse + ROUND).to_bits() as i8;
            sum += i32::from(*code);
        }
        let scale = largest * (1.0 / 127.0);
        *run = Run { scale, start: -offset * sum, sum: scale * sum as f32 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn values_are_rounded_to_a_127th_of_the_largest(
            x in proptest::collection::vec(-1e3f32..1e3, 64), size in -6i32..6, short: bool,
        ) {
            let x: Vec<f32> = x.iter().map(|x| x * 10f32.powi(size)).collect();
            let run = if short { 16 } else { 32 };
            let mut rounded = Activations::default();
            rounded.set(&x, 32, Rounding { run, offset: 8, halves: true });
            for row in 0..2 {
                let (codes, runs) = rounded.row(row, 0);
                for (n, x) in x[row * 32..][..32].chunks_exact(run).enumerate() {
                    let (codes, shared) = (&codes[n * run..][..run], runs[n]);
                    let largest = x.iter().fold(0f32, |most, x| most.max(x.abs()));
                    prop_assert!((shared.scale * 127.0 - largest).abs() <= largest * 1e-6);
                    for (code, x) in codes.iter().zip(x) {
                        prop_assert!((f32::from(*code) * shared.scale - x).abs() <= shared.scale * 0.501);
                    }
                    let sum: i32 = codes.iter().map(|&code| i32::from(code)).sum();
                    prop_assert_eq!((shared.start, shared.sum), (-8 * sum, shared.scale * sum as f32));
                    let halves = codes.as_chunks::<4>().0.iter().map(|&[a, b, c, d]| [a, c, b, d].map(i16::from));
                    prop_assert!(halves.eq(rounded.halves(row, n * run)[..run / 4].iter().copied()));
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_not_lost() {
        let rounding = Rounding { run: 32, offset: 0, halves: false };
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1f32; 32];
            x[7] = bad;
            let mut rounded = Activations::default();
            rounded.set(&x, 32, rounding);
            assert!(!rounded.row(0, 0).1[0].scale.is_finite(), "{bad}");
        }
        let mut rounded = Activations::default();
        for x in [0f32, -0.0, 1e-40, -1e-38] {
            rounded.set(&[x; 32], 32, Rounding { offset: 3, ..rounding });
            let (codes, runs) = rounded.row(0, 0);
            assert!(codes.iter().all(|&code| code == 0) && runs[0].start == 0 && runs[0].sum == 0.0, "{x}");
        }
    }
}
