//! `x · Wᵀ` with weights packed in panels that vectorise over outputs.
//!
//! A panel holds [`PANEL`] outputs: for each input, in order, that many weights side by side. One output element is one
//! accumulator that walks the inputs from first to last, whatever the number of rows, so a row's result never depends on
//! the rows beside it.

use super::weight::Stored;
use super::{Arith, Shared, Weight, parallel};
use half::{bf16, f16};

/// Outputs side by side in a panel.
const PANEL: usize = 32;
/// Rows that one pass over a panel serves: 3 × 32 accumulators fill the 16 AVX2 registers.
const ROWS: usize = 3;

/// A packed matrix of `outputs × inputs`.
#[derive(Debug)]
pub struct Panels {
    inputs: usize,
    outputs: usize,
    /// `[⌈outputs / PANEL⌉, inputs, PANEL]`, zero where the last panel is not full.
    data: Weight,
}

impl Panels {
    /// Packs `source`, where `at(output, input)` is the index of a weight.
    pub fn pack(source: &Weight, outputs: usize, inputs: usize, at: impl Fn(usize, usize) -> usize) -> Self {
        let data = match source {
            Weight::F32(v) => Weight::F32(pack(v, outputs, inputs, at)),
            Weight::F16(v) => Weight::F16(pack(v, outputs, inputs, at)),
            Weight::BF16(v) => Weight::BF16(pack(v, outputs, inputs, at)),
        };
        Self { inputs, outputs, data }
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }
}

fn pack<T: Stored>(source: &[T], outputs: usize, inputs: usize, at: impl Fn(usize, usize) -> usize) -> Vec<T> {
    let panels = outputs.div_ceil(PANEL);
    let mut data = Vec::with_capacity(panels * inputs * PANEL);
    for panel in 0..panels {
        for input in 0..inputs {
            for output in panel * PANEL..(panel + 1) * PANEL {
                data.push(if output < outputs { source[at(output, input)] } else { T::zero() });
            }
        }
    }
    data
}

/// `out [rows, outputs] = x [rows, inputs] · wᵀ`.
pub fn matmul(w: &Panels, x: &[f32], out: &mut [f32]) {
    let rows = x.len() / w.inputs;
    assert_eq!(x.len(), rows * w.inputs, "x holds whole rows");
    assert_eq!(out.len(), rows * w.outputs, "one output row for each row of x");
    match &w.data {
        Weight::F32(data) => run(w, data, x, out),
        Weight::F16(data) => run::<f16>(w, data, x, out),
        Weight::BF16(data) => run::<bf16>(w, data, x, out),
    }
}

fn run<T: Stored>(w: &Panels, data: &[T], x: &[f32], out: &mut [f32]) {
    let rows = x.len() / w.inputs;
    let shared = Shared::new(out);
    let size = w.inputs * PANEL;
    parallel(w.outputs.div_ceil(PANEL), rows * w.inputs * w.outputs, |panel| {
        let weights = &data[panel * size..][..size];
        let first = panel * PANEL;
        let width = PANEL.min(w.outputs - first);
        let mut row = 0;
        while row < rows {
            let x = &x[row * w.inputs..];
            let mut acc = [[0f32; PANEL]; ROWS];
            let count = match rows - row {
                1 => tile::<T, 1>(weights, w.inputs, x, &mut acc),
                2 => tile::<T, 2>(weights, w.inputs, x, &mut acc),
                _ => tile::<T, 3>(weights, w.inputs, x, &mut acc),
            };
            for (r, acc) in acc[..count].iter().enumerate() {
                // SAFETY: each (row, panel) pair is written by one task only.
                let out = unsafe { shared.part((row + r) * w.outputs + first, width) };
                out.copy_from_slice(&acc[..width]);
            }
            row += count;
        }
    });
}

/// `R` rows times one panel; returns `R`.
#[inline]
fn tile<T: Stored, const R: usize>(panel: &[T], inputs: usize, x: &[f32], acc: &mut [[f32; PANEL]; ROWS]) -> usize {
    assert!(panel.len() == inputs * PANEL && x.len() >= R * inputs && R <= ROWS);
    #[cfg(target_arch = "x86_64")]
    if super::fused() {
        // SAFETY: the processor has the features; the assertion above gives the bounds.
        unsafe { tile_avx2::<T, R>(panel, inputs, x, acc) };
        return R;
    }
    for (input, weights) in panel.as_chunks::<PANEL>().0.iter().enumerate() {
        let weights = weights.map(T::to_f32);
        for r in 0..R {
            let x = x[r * inputs + input];
            for (acc, w) in acc[r].iter_mut().zip(weights) {
                *acc = super::Plain::fma(x, w, *acc);
            }
        }
    }
    R
}

/// # Safety
/// AVX2, FMA and F16C; `panel` holds `inputs × PANEL` weights and `x` at least `R × inputs` values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(clippy::needless_range_loop, reason = "rows and vectors index several arrays at once")]
unsafe fn tile_avx2<T: Stored, const R: usize>(panel: &[T], inputs: usize, x: &[f32], acc: &mut [[f32; PANEL]; ROWS]) {
    use std::arch::x86_64::{_mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_setzero_ps, _mm256_storeu_ps};
    const VECTORS: usize = PANEL / 8;
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; R];
    let (mut w, x) = (panel.as_ptr(), x.as_ptr());
    for input in 0..inputs {
        // SAFETY: `w` walks over the panel PANEL weights at a time, `inputs` times; x has R rows of `inputs`.
        unsafe {
            let weights: [_; VECTORS] = [T::load8(w), T::load8(w.add(8)), T::load8(w.add(16)), T::load8(w.add(24))];
            for r in 0..R {
                let x = _mm256_broadcast_ss(&*x.add(r * inputs + input));
                for v in 0..VECTORS {
                    sums[r][v] = _mm256_fmadd_ps(x, weights[v], sums[r][v]);
                }
            }
            w = w.add(PANEL);
        }
    }
    for r in 0..R {
        for v in 0..VECTORS {
            // SAFETY: eight floats from 8 v are inside the row of PANEL.
            unsafe { _mm256_storeu_ps(acc[r].as_mut_ptr().add(8 * v), sums[r][v]) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A small fixed sequence of values in -1..1, different for each seed.
    fn values(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    fn weights(kind: usize, n: usize, seed: u32) -> Weight {
        let v = values(n, seed);
        match kind {
            0 => Weight::F32(v),
            1 => Weight::F16(v.into_iter().map(f16::from_f32).collect()),
            _ => Weight::BF16(v.into_iter().map(bf16::from_f32).collect()),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn equals_an_f64_reference_and_no_row_depends_on_another(
            kind in 0usize..3, rows in 1usize..9, inputs in 1usize..70, outputs in 1usize..100, in_out: bool, seed: u32,
        ) {
            let source = weights(kind, inputs * outputs, seed);
            let x = values(rows * inputs, seed ^ 77);
            let at = |o: usize, i: usize| if in_out { i * outputs + o } else { o * inputs + i };
            let w = Panels::pack(&source, outputs, inputs, at);
            let mut out = vec![f32::NAN; rows * outputs];
            matmul(&w, &x, &mut out);
            for r in 0..rows {
                for o in 0..outputs {
                    let exact: f64 =
                        (0..inputs).map(|i| f64::from(x[r * inputs + i]) * f64::from(source.get(at(o, i)))).sum();
                    prop_assert!((f64::from(out[r * outputs + o]) - exact).abs() < 1e-5 * inputs as f64);
                }
                let mut alone = vec![f32::NAN; outputs];
                matmul(&w, &x[r * inputs..(r + 1) * inputs], &mut alone);
                prop_assert_eq!(&alone[..], &out[r * outputs..(r + 1) * outputs]);
            }
        }

        #[test]
        fn the_portable_tile_is_close_to_the_fast_one(inputs in 1usize..200, seed: u32) {
            let source = weights(1, inputs * PANEL, seed);
            let Weight::F16(panel) = &source else { unreachable!() };
            let x = values(inputs, seed ^ 5);
            let mut acc = [[0f32; PANEL]; ROWS];
            tile::<f16, 1>(panel, inputs, &x, &mut acc);
            for (o, got) in acc[0].iter().enumerate() {
                let mut sum = 0f32;
                for i in 0..inputs {
                    sum = super::super::Plain::fma(x[i], panel[i * PANEL + o].to_f32(), sum);
                }
                prop_assert!((got - sum).abs() < 1e-4, "{got} {sum}");
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (inputs, outputs, rows) = (257, 1000, 5);
        let w = Panels::pack(&weights(1, inputs * outputs, 3), outputs, inputs, |o, i| o * inputs + i);
        let x = values(rows * inputs, 4);
        let run = |threads| {
            let mut out = vec![0f32; rows * outputs];
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
            pool.install(|| matmul(&w, &x, &mut out));
            out
        };
        assert_eq!(run(1), run(2));
        assert_eq!(run(1), run(7));
    }
}
