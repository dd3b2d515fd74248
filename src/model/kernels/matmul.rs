//! `x · Wᵀ` with weights packed in panels that vectorise over outputs.
//!
//! A panel holds [`PANEL`] outputs: for each input, in order, that many weights side by side. One output element is one
//! accumulator that walks the inputs from first to last, whatever the number of rows, so a row's result never depends on
//! the rows beside it. Few rows read a panel as it is stored, from first to last; more rows unpack a stretch of it to f32 once for
//! all of them. Both add the same products in the same order. Quantised weights have kernels of their own, see [`super::dots`].

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::ops::Range;

use half::{bf16, f16};

use super::activations::Activations;
use super::elementwise::Activation;
use super::kind::Kind;
use super::pages::Pages;
use super::quants::Quants;
use super::weight::Stored;
use super::{Shared, Weight, dots, parallel, parallel_chunks, tile};

/// Outputs side by side in a panel.
pub const PANEL: usize = 32;
/// Inputs that are unpacked at a time: 16 KB of f32, which stay in the first cache. Whole runs of every kind.
pub const STRETCH: usize = 128;

/// A packed matrix of `outputs × inputs`.
#[derive(Debug)]
pub struct Panels {
    inputs: usize,
    outputs: usize,
    data: Data,
}

/// `[⌈outputs / PANEL⌉, inputs, PANEL]` values, zero where the last panel is not full, or integers and scales.
#[derive(Debug)]
enum Data {
    F32(Pages<f32>),
    F16(Pages<f16>),
    BF16(Pages<bf16>),
    Quants(Quants),
}

impl Panels {
    /// Packs `source`, where `at(output, input)` is the index of a weight.
    ///
    /// # Panics
    /// If the source is in blocks, whose values stand in rows: see [`Panels::pack_rows`].
    pub fn pack(source: &Weight, outputs: usize, inputs: usize, at: impl Fn(usize, usize) -> usize + Sync) -> Self {
        let (shape, bytes) = ((outputs, inputs), source.bytes());
        let word = |at| f32::from_le(&bytes[4 * at..]);
        let whole = |exact: &dyn Fn(f32) -> bool| (0..source.len()).all(|at| exact(word(at)));
        let data = match source.kind() {
            // Where each is a narrower value, that is what a pass over them reads, and computes the same.
            Kind::F32 if whole(&|value| bf16::from_f32(value).to_f32() == value) => {
                Data::BF16(pack(shape, |o, i| bf16::from_f32(word(at(o, i)))))
            }
            Kind::F32 if whole(&|value| f16::from_f32(value).to_f32() == value) => {
                Data::F16(pack(shape, |o, i| f16::from_f32(word(at(o, i)))))
            }
            Kind::F32 => Data::F32(pack(shape, |o, i| word(at(o, i)))),
            Kind::F16 => Data::F16(pack(shape, |o, i| f16::from_le(&bytes[2 * at(o, i)..]))),
            Kind::BF16 => Data::BF16(pack(shape, |o, i| bf16::from_le(&bytes[2 * at(o, i)..]))),
            kind => panic!("{kind} can only be packed in rows"),
        };
        Self { inputs, outputs, data }
    }

    /// Packs `source [outputs, inputs]`, of any kind.
    pub fn pack_rows(source: &Weight, outputs: usize, inputs: usize) -> Self {
        let kind = source.kind();
        if kind.block() == 1 {
            return Self::pack(source, outputs, inputs, |o, i| o * inputs + i);
        }
        let quants = Quants::pack(kind, (outputs, inputs), source.bytes());
        Self { inputs, outputs, data: Data::Quants(quants) }
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    #[cfg(test)]
    pub fn quants(&self) -> Option<&Quants> {
        if let Data::Quants(quants) = &self.data { Some(quants) } else { None }
    }
}

fn pack<T: Stored>((outputs, inputs): (usize, usize), value: impl Fn(usize, usize) -> T + Sync) -> Pages<T> {
    let mut data = Pages::zeroed(outputs.div_ceil(PANEL) * inputs * PANEL);
    parallel_chunks(&mut data, (inputs * PANEL).max(1), |panel, data| {
        for (input, data) in data.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            let outputs = panel * PANEL..outputs.min((panel + 1) * PANEL);
            data.iter_mut().zip(outputs).for_each(|(to, output)| *to = value(output, input));
        }
    });
    data
}

/// A product to be computed: `out [rows, outputs] = f(x [rows, inputs] · wᵀ)`.
pub struct Product<'a> {
    w: &'a Panels,
    x: &'a [f32],
    out: Shared,
    then: Option<Activation>,
    life: PhantomData<&'a mut [f32]>,
}

impl<'a> Product<'a> {
    /// # Panics
    /// If x does not hold whole rows, or `out` not one for each.
    pub fn new(w: &'a Panels, x: &'a [f32], out: &'a mut [f32], then: Option<Activation>) -> Self {
        let rows = x.len() / w.inputs;
        assert_eq!(x.len(), rows * w.inputs, "x holds whole rows");
        assert_eq!(out.len(), rows * w.outputs, "one output row for each row of x");
        Self { w, x, out: Shared::new(out), then, life: PhantomData }
    }

    fn rows(&self) -> usize {
        self.x.len() / self.w.inputs
    }

    fn work(&self) -> usize {
        self.x.len() * self.w.outputs
    }

    /// Panels that can be computed each by itself, in one pass with those of other products. Many rows of single values need passes of
    /// their own.
    fn panels(&self) -> usize {
        let single = self.rows() <= tile::few() || matches!(self.w.data, Data::Quants(_));
        if single { self.w.panels() } else { 0 }
    }

    /// Computes one of those; where weights are quantised, from `rounded`.
    fn panel(&self, panel: usize, rounded: &Activations) {
        let inputs = self.w.inputs;
        let of = panel * inputs * PANEL..(panel + 1) * inputs * PANEL;
        self.put(panel, |sums| match &self.w.data {
            Data::F32(data) => tile::few_rows(&data[of], (self.x, inputs), sums),
            Data::F16(data) => tile::few_rows(&data[of], (self.x, inputs), sums),
            Data::BF16(data) => tile::few_rows(&data[of], (self.x, inputs), sums),
            Data::Quants(quants) => quants.with_form(dots::Panel { panel, x: rounded, sums }),
        });
    }

    /// Writes what `compute` makes of the sums of a panel, `[rows, PANEL]`, which are 0 at first.
    fn put(&self, panel: usize, compute: impl FnOnce(&mut [[f32; PANEL]])) {
        thread_local! {
            static SUMS: RefCell<Vec<[f32; PANEL]>> = const { RefCell::new(Vec::new()) };
        }
        let (first, outputs) = (panel * PANEL, self.w.outputs);
        let width = PANEL.min(outputs - first);
        SUMS.with_borrow_mut(|sums| {
            sums.clear();
            sums.resize(self.rows(), [0.0; PANEL]);
            compute(sums);
            for (row, sums) in sums.iter().enumerate() {
                // SAFETY: each (row, panel) pair is written by one task only.
                let out = unsafe { self.out.part(row * outputs + first, width) };
                out.copy_from_slice(&sums[..width]);
                if let Some(f) = self.then {
                    f.apply(out);
                }
            }
        });
    }

    /// Computes the whole from many rows of single values.
    fn many<T: Stored>(&self, data: &[T]) {
        let (inputs, rows) = (self.w.inputs, self.rows());
        let part = |panel: usize, of: Range<usize>| {
            &data[(panel * inputs + of.start) * PANEL..(panel * inputs + of.end) * PANEL]
        };
        let many = |x: &[f32], apart: bool| {
            parallel(self.w.panels(), self.work(), |panel| {
                self.put(panel, |sums| {
                    let mut unpacked = [0f32; STRETCH * PANEL];
                    for first in (0..inputs).step_by(STRETCH) {
                        let of = first..inputs.min(first + STRETCH);
                        let unpacked = &mut unpacked[..of.len() * PANEL];
                        tile::unpack(part(panel, of.clone()), unpacked);
                        // While these are at work, memory gives the next ones.
                        let next = bytes(part(panel, of.end..inputs.min(of.end + STRETCH)));
                        let x = if apart { (&x[first * rows..], of.len()) } else { (&x[first..], inputs) };
                        tile::many_rows(unpacked, x, sums, next);
                    }
                });
            });
        };
        // Rows whose distance is a multiple of half a page would share few places of the cache.
        if inputs.is_multiple_of(512) { stretched(inputs, self.x, |x| many(x, true)) } else { many(self.x, false) }
    }
}

/// Computes products that do not depend on each other, of few rows in a single pass.
pub fn multiply_all<'a>(products: impl Iterator<Item = &'a Product<'a>> + Clone + Sync) {
    thread_local! {
        static ROUNDED: Cell<Vec<Activations>> = const { Cell::new(Vec::new()) };
    }
    let mut rounded = ROUNDED.take();
    rounded.resize_with(rounded.len().max(products.clone().count()), Activations::default);
    let (mut panels, mut work) = (0, 0);
    for (product, rounded) in products.clone().zip(&mut rounded) {
        match &product.w.data {
            Data::Quants(quants) => rounded.set(product.x, product.w.inputs, quants.rounding()),
            _ if product.panels() > 0 => {}
            Data::F32(data) => product.many(data),
            Data::F16(data) => product.many(data),
            Data::BF16(data) => product.many(data),
        }
        panels += product.panels();
        work += product.work();
    }
    parallel(panels, work, |mut n| {
        for (product, rounded) in products.clone().zip(&rounded) {
            if n < product.panels() {
                return product.panel(n, rounded);
            }
            n -= product.panels();
        }
    });
    ROUNDED.set(rounded);
}

/// `out [rows, outputs] = x [rows, inputs] · wᵀ`.
pub fn matmul(w: &Panels, x: &[f32], out: &mut [f32]) {
    multiply_all([Product::new(w, x, out, None)].iter());
}

/// Values as they are stored.
fn bytes<T: Stored>(values: &[T]) -> &[u8] {
    // SAFETY: stored values are plain bytes, all of them initialised.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Lends `x [rows, inputs]` stretch by stretch, `[rows, STRETCH]` each.
fn stretched(inputs: usize, x: &[f32], then: impl FnOnce(&[f32])) {
    thread_local! {
        static STRETCHED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    }
    let (mut buffer, rows) = (STRETCHED.take(), x.len() / inputs);
    buffer.resize(x.len(), 0.0);
    let shared = Shared::new(&mut buffer);
    parallel(inputs.div_ceil(STRETCH), x.len(), |stretch| {
        let first = stretch * STRETCH;
        let width = STRETCH.min(inputs - first);
        // SAFETY: one task a stretch.
        let part = unsafe { shared.part(first * rows, width * rows) };
        for (part, x) in part.chunks_exact_mut(width).zip(x.chunks_exact(inputs)) {
            part.copy_from_slice(&x[first..first + width]);
        }
    });
    then(&buffer);
    STRETCHED.set(buffer);
}

#[cfg(test)]
mod tests {
    use super::super::Team;
    use super::super::random::{values, weights};
    use super::*;
    use proptest::prelude::*;

    fn check(w: &Panels, values: impl Fn(usize, usize) -> f32, x: &[f32]) {
        let (inputs, outputs) = (w.inputs(), w.outputs());
        let mut out = vec![f32::NAN; x.len() / inputs * outputs];
        matmul(w, x, &mut out);
        for (x, out) in x.chunks_exact(inputs).zip(out.chunks_exact(outputs)) {
            for (o, got) in out.iter().enumerate() {
                let exact: f64 = (0..inputs).map(|i| f64::from(x[i]) * f64::from(values(o, i))).sum();
                assert!((f64::from(*got) - exact).abs() < 1e-5 * inputs as f64, "{got}, not {exact}");
            }
            let mut alone = vec![f32::NAN; outputs];
            matmul(w, x, &mut alone);
            assert_eq!(alone, out, "a row alone");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn equals_an_f64_reference_and_no_row_depends_on_another(
            kind in 0usize..3, rows in 1usize..9, inputs in 1usize..70, outputs in 1usize..100, in_out: bool, seed: u32,
        ) {
            let shape = if in_out { [inputs, outputs] } else { [outputs, inputs] };
            let source = weights(Kind::ALL[kind], shape, seed);
            let all = source.to_f32();
            let at = |o: usize, i: usize| if in_out { i * outputs + o } else { o * inputs + i };
            let w = Panels::pack(&source, outputs, inputs, at);
            check(&w, |o, i| all[at(o, i)], &values(rows * inputs, seed ^ 77));
        }

        #[test]
        fn every_width_of_registers_adds_the_same(
            kind in 0usize..3, rows in 1usize..4, inputs in 1usize..200, seed: u32,
        ) {
            let source = weights(Kind::ALL[kind], [PANEL, inputs], seed);
            let x = values(rows * inputs, seed ^ 5);
            let w = Panels::pack_rows(&source, PANEL, inputs);
            let all = match &w.data {
                Data::F32(data) => widths(data, &x, inputs),
                Data::F16(data) => widths(data, &x, inputs),
                Data::BF16(data) => widths(data, &x, inputs),
                Data::Quants(_) => unreachable!("of single values"),
            };
            let all_values = source.to_f32();
            for sums in all {
                for (row, sums) in sums.iter().enumerate() {
                    for (o, got) in sums.iter().enumerate() {
                        let fused = |sum: f32, i: usize| x[row * inputs + i].mul_add(all_values[o * inputs + i], sum);
                        prop_assert_eq!(*got, (0..inputs).fold(0f32, fused), "{} output {}", source.kind(), o);
                    }
                }
            }
        }
    }

    /// What every width there is makes of few rows, and of values that are unpacked first.
    fn widths<T: Stored>(weights: &[T], x: &[f32], inputs: usize) -> Vec<Vec<[f32; PANEL]>> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            use super::super::{fused, simd, wide};
            let rows = x.len() / inputs;
            macro_rules! width {
                ($width:ty) => {{
                    let mut unpacked = vec![f32::NAN; weights.len()];
                    // SAFETY: the processor has the features.
                    unsafe { tile::unpack_of::<$width, T>(weights, &mut unpacked) };
                    let mut sums = vec![[0f32; PANEL]; 2 * rows];
                    let (few, many) = sums.split_at_mut(rows);
                    // SAFETY: as above.
                    unsafe {
                        match rows {
                            1 => tile::few_of::<$width, T, 1>(weights, (x, inputs), few),
                            2 => tile::few_of::<$width, T, 2>(weights, (x, inputs), few),
                            _ => tile::few_of::<$width, T, 3>(weights, (x, inputs), few),
                        }
                    }
                    tile::many_rows(&unpacked, (x, inputs), many, &[]);
                    assert_eq!(few, many);
                    sums.truncate(rows);
                    all.push(sums);
                }};
            }
            if fused() {
                width!(simd::Narrow);
            }
            if wide() {
                width!(simd::Wide);
            }
        }
        let _ = (weights, x, inputs);
        all
    }

    #[test]
    fn values_that_fit_half_the_bits_are_packed_in_those_and_multiply_the_same() {
        let (inputs, outputs) = (70, 40);
        let x = values(5 * inputs, 9);
        for kind in [Kind::F16, Kind::BF16] {
            let narrow = weights(kind, [outputs, inputs], 8);
            let wide = Weight::from_f32(narrow.shape(), &narrow.to_f32());
            let [narrow, wide] = [narrow, wide].map(|weight| Panels::pack_rows(&weight, outputs, inputs));
            assert_eq!(std::mem::discriminant(&narrow.data), std::mem::discriminant(&wide.data));
            for x in [&x[..inputs], &x[..]] {
                let [narrow, wide] = [&narrow, &wide].map(|w| {
                    let mut out = vec![f32::NAN; x.len() / inputs * outputs];
                    matmul(w, x, &mut out);
                    out
                });
                assert_eq!(narrow, wide);
            }
        }
        let whole = Panels::pack_rows(&weights(Kind::F32, [outputs, inputs], 8), outputs, inputs);
        assert!(matches!(whole.data, Data::F32(_)));
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (inputs, outputs) = (256, 1000);
        for kind in [Kind::F16, Kind::Q8_0, Kind::Q4_0, Kind::Q6K] {
            let w = Panels::pack_rows(&weights(kind, [outputs, inputs], 3), outputs, inputs);
            for rows in [5, 50] {
                let x = values(rows * inputs, 4);
                let run = |threads| {
                    let mut out = vec![0f32; rows * outputs];
                    Team::new(threads).expect("threads").install(|| matmul(&w, &x, &mut out));
                    out
                };
                assert_eq!(run(1), run(2));
                assert_eq!(run(1), run(7));
            }
        }
    }
}
