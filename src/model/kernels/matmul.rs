//! `x · Wᵀ` with weights packed in panels that vectorise over outputs.
//!
//! A panel holds [`PANEL`] outputs: for each input, in order, that many weights side by side. One output element is one
//! accumulator that walks the inputs from first to last, whatever the number of rows, so a row's result never depends on
//! the rows beside it. Few rows read a panel as it is stored, from first to last; more rows unpack a stretch of it to f32 once for
//! all of them. Both add the same products in the same order. Quantised weights have kernels of their own, see [`super::dots`].

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use half::{bf16, f16};

use super::activations::Activations;
use super::elementwise::Activation;
use super::kind::Kind;
use super::pages::Pages;
use super::quants::Quants;
use super::weight::Stored;
use super::{Shared, Weight, dots, parallel, sparse, tile};

/// Outputs side by side in a panel.
pub const PANEL: usize = 32;
/// Inputs that are unpacked at a time: 16 KB of f32, which stay in the first cache. Whole runs of every kind.
pub const STRETCH: usize = 128;

/// How a matrix is laid out.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub outputs: usize,
    pub inputs: usize,
    /// Outputs whose values stand side by side, in a strip of one or more panels.
    strip: usize,
}

impl Shape {
    pub fn new(outputs: usize, inputs: usize) -> Self {
        Self { outputs, inputs, strip: PANEL }
    }

    /// Of a matrix most of whose inputs are zero: where rows are few, the others' weights are not read.
    pub fn sparse(outputs: usize, inputs: usize) -> Self {
        let whole = |strip: &usize| *strip <= sparse::strip() && outputs.is_multiple_of(*strip);
        let strip = [sparse::STRIP, 2 * PANEL].into_iter().find(whole).unwrap_or(PANEL);
        Self { strip, ..Self::new(outputs, inputs) }
    }

    fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    /// Where the values of some inputs of a panel stand, the first of them at the beginning.
    fn part(&self, panel: usize, of: Range<usize>) -> Range<usize> {
        let (strip, within) = (panel * PANEL / self.strip, panel * PANEL % self.strip);
        let at = |input: usize| (strip * self.inputs + input) * self.strip + within;
        if of.is_empty() { 0..0 } else { at(of.start)..at(of.end - 1) + PANEL }
    }
}

/// A packed matrix of `outputs × inputs`.
#[derive(Debug)]
pub struct Panels {
    shape: Shape,
    data: Data,
}

/// `[⌈outputs / strip⌉, inputs, strip]` values, zero where the last panel is not full, or integers and scales in panels.
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
    pub fn pack(source: &Weight, shape: Shape, at: impl Fn(usize, usize) -> usize + Sync) -> Self {
        Self::pack_values(source, shape, 0, at)
    }

    /// The same where an output's values stand in so many bytes of their own, one output after the other.
    fn pack_values(source: &Weight, shape: Shape, row: usize, at: impl Fn(usize, usize) -> usize + Sync) -> Self {
        let bytes = source.bytes();
        let row = (source, row);
        let word = |at| f32::from_le(&bytes[4 * at..]);
        let whole = |exact: &dyn Fn(f32) -> bool| (0..source.len()).all(|at| exact(word(at)));
        let data = match source.kind() {
            // Where each is a narrower value, that is what a pass over them reads, and computes the same.
            Kind::F32 if whole(&|value| bf16::from_f32(value).to_f32() == value) => {
                Data::BF16(pack(shape, row, |o, i| bf16::from_f32(word(at(o, i)))))
            }
            Kind::F32 if whole(&|value| f16::from_f32(value).to_f32() == value) => {
                Data::F16(pack(shape, row, |o, i| f16::from_f32(word(at(o, i)))))
            }
            Kind::F32 => Data::F32(pack(shape, row, |o, i| word(at(o, i)))),
            Kind::F16 => Data::F16(pack(shape, row, |o, i| f16::from_le(&bytes[2 * at(o, i)..]))),
            Kind::BF16 => Data::BF16(pack(shape, row, |o, i| bf16::from_le(&bytes[2 * at(o, i)..]))),
            kind => panic!("{kind} can only be packed in rows"),
        };
        Self { shape, data }
    }

    /// Packs `source [outputs, inputs]`, of any kind.
    pub fn pack_rows(source: &Weight, shape: Shape) -> Self {
        let kind = source.kind();
        if kind.block() == 1 {
            let row = shape.inputs * kind.block_bytes();
            return Self::pack_values(source, shape, row, |o, i| o * shape.inputs + i);
        }
        let quants = Quants::pack(source, (shape.outputs, shape.inputs));
        // Integers of four inputs stand together, hardly ever all for zeros.
        Self { shape: Shape { strip: PANEL, ..shape }, data: Data::Quants(quants) }
    }

    pub fn outputs(&self) -> usize {
        self.shape.outputs
    }

    pub fn inputs(&self) -> usize {
        self.shape.inputs
    }

    #[cfg(test)]
    pub fn quants(&self) -> Option<&Quants> {
        if let Data::Quants(quants) = &self.data { Some(quants) } else { None }
    }
}

fn pack<T: Stored>(
    shape: Shape,
    (source, row): (&Weight, usize),
    value: impl Fn(usize, usize) -> T + Sync,
) -> Pages<T> {
    let Shape { outputs, inputs, strip } = shape;
    let mut data = Pages::zeroed(outputs.div_ceil(strip) * inputs * strip);
    source.pack_into(&mut data, ((inputs * strip).max(1), row * strip), |n, data| {
        for (input, data) in data.chunks_exact_mut(strip).enumerate() {
            let outputs = n * strip..outputs.min((n + 1) * strip);
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
        let rows = x.len() / w.inputs();
        assert_eq!(x.len(), rows * w.inputs(), "x holds whole rows");
        assert_eq!(out.len(), rows * w.outputs(), "one output row for each row of x");
        Self { w, x, out: Shared::new(out), then, life: PhantomData }
    }

    fn rows(&self) -> usize {
        self.x.len() / self.w.inputs()
    }

    fn work(&self) -> usize {
        self.x.len() * self.w.outputs()
    }

    /// Strips that can be computed each by itself, in one pass with those of other products. Many rows of single values need passes of
    /// their own.
    fn strips(&self) -> usize {
        let single = self.rows() <= tile::few() || matches!(self.w.data, Data::Quants(_));
        if single { self.w.outputs().div_ceil(self.w.shape.strip) } else { 0 }
    }

    /// Strips of one task: of thin matrices several, as handing out a task takes as long as some kilobytes.
    fn together(&self) -> usize {
        const WEIGHTS: usize = 1 << 14;
        (WEIGHTS / (self.w.inputs() * self.w.shape.strip).max(1)).max(1)
    }

    /// Tasks of [`Product::strips`].
    fn tasks(&self) -> usize {
        self.strips().div_ceil(self.together())
    }

    /// Gets x ready for [`Product::task`].
    fn prepare(&self, ready: &mut Ready) {
        match &self.w.data {
            Data::Quants(quants) => ready.rounded.set(self.x, self.w.inputs(), quants.rounding()),
            _ if self.w.shape.strip > PANEL => sparse::find_active(self.x, self.w.inputs(), &mut ready.active),
            _ => {}
        }
    }

    /// Computes the strips of a task.
    fn task(&self, task: usize, ready: &Ready) {
        let (first, strips) = (task * self.together(), self.strips());
        (first..strips.min(first + self.together())).for_each(|strip| self.strip(strip, ready));
    }

    fn strip(&self, strip: usize, ready: &Ready) {
        match &self.w.data {
            Data::F32(data) => self.values(data, strip, &ready.active),
            Data::F16(data) => self.values(data, strip, &ready.active),
            Data::BF16(data) => self.values(data, strip, &ready.active),
            Data::Quants(quants) => self.put(strip * PANEL, |sums| {
                quants.with_form(dots::Panel { panel: strip, x: &ready.rounded, sums });
            }),
        }
    }

    fn values<T: Stored>(&self, data: &[T], strip: usize, active: &[u32]) {
        let (inputs, width) = (self.w.inputs(), self.w.shape.strip);
        let weights = &data[strip * inputs * width..][..inputs * width];
        if width == PANEL {
            self.put(strip * PANEL, |sums| tile::few_rows(weights, (self.x, inputs), sums));
        } else {
            self.put(strip * width, |sums| sparse::few_rows((weights, width), (self.x, inputs), active, sums));
        }
    }

    /// Writes what `compute` makes of sums of as many outputs from `first` on, `[rows, N]`, which are 0 at first.
    fn put<const N: usize>(&self, first: usize, compute: impl FnOnce(&mut [[f32; N]])) {
        thread_local! {
            static SUMS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
        }
        let outputs = self.w.outputs();
        let width = self.w.shape.strip.min(N).min(outputs - first);
        let mut buffer = SUMS.take();
        buffer.clear();
        buffer.resize(self.rows() * N, 0.0);
        let sums = buffer.as_chunks_mut().0;
        compute(sums);
        for (row, sums) in sums.iter().enumerate() {
            // SAFETY: each row's outputs are written by one task only.
            let out = unsafe { self.out.part(row * outputs + first, width) };
            out.copy_from_slice(&sums[..width]);
            if self.w.shape.strip > PANEL {
                // A sum of which products with zero were left out may be a zero with the other sign.
                out.iter_mut().for_each(|sum| *sum += 0.0);
            }
            if let Some(f) = self.then {
                f.apply(out);
            }
        }
        SUMS.set(buffer);
    }

    /// Computes the whole from many rows of single values.
    fn many<T: Stored>(&self, data: &[T]) {
        let (shape, inputs, rows) = (self.w.shape, self.w.inputs(), self.rows());
        let many = |x: &[f32], apart: bool| {
            parallel(shape.panels(), self.work(), |panel| {
                self.put(panel * PANEL, |sums| {
                    let mut unpacked = [0f32; STRETCH * PANEL];
                    for first in (0..inputs).step_by(STRETCH) {
                        let of = first..inputs.min(first + STRETCH);
                        let unpacked = &mut unpacked[..of.len() * PANEL];
                        tile::unpack(&data[shape.part(panel, of.clone())], shape.strip, unpacked);
                        // While these are at work, memory gives the next ones.
                        let next = &data[shape.part(panel, of.end..inputs.min(of.end + STRETCH))];
                        let x = if apart { (&x[first * rows..], of.len()) } else { (&x[first..], inputs) };
                        tile::many_rows(unpacked, x, sums, (bytes(next), shape.strip * T::BYTES));
                    }
                });
            });
        };
        // Rows whose distance is a multiple of half a page would share few places of the cache.
        if inputs.is_multiple_of(512) { stretched(inputs, self.x, |x| many(x, true)) } else { many(self.x, false) }
    }
}

/// What a product's strips are computed from, made of x.
#[derive(Default)]
struct Ready {
    /// Where weights are quantised.
    rounded: Activations,
    /// The inputs that are not zero, where they are few.
    active: Vec<u32>,
}

/// Computes products that do not depend on each other, of few rows in a single pass.
pub fn multiply_all<'a>(products: impl Iterator<Item = &'a Product<'a>> + Clone + Sync) {
    thread_local! {
        static READY: Cell<Vec<Ready>> = const { Cell::new(Vec::new()) };
    }
    let mut ready = READY.take();
    ready.resize_with(ready.len().max(products.clone().count()), Ready::default);
    let (mut tasks, mut work) = (0, 0);
    for (product, ready) in products.clone().zip(&mut ready) {
        match &product.w.data {
            _ if product.tasks() > 0 => product.prepare(ready),
            Data::F32(data) => product.many(data),
            Data::F16(data) => product.many(data),
            Data::BF16(data) => product.many(data),
            Data::Quants(_) => {}
        }
        tasks += product.tasks();
        work += product.work();
    }
    parallel(tasks, work, |mut n| {
        for (product, ready) in products.clone().zip(&ready) {
            if n < product.tasks() {
                return product.task(n, ready);
            }
            n -= product.tasks();
        }
    });
    READY.set(ready);
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
            let w = Panels::pack(&source, Shape::new(outputs, inputs), at);
            check(&w, |o, i| all[at(o, i)], &values(rows * inputs, seed ^ 77));
        }

        #[test]
        fn every_width_of_registers_adds_the_same(
            kind in 0usize..3, rows in 1usize..4, inputs in 1usize..200, seed: u32,
        ) {
            let source = weights(Kind::ALL[kind], [PANEL, inputs], seed);
            let x = values(rows * inputs, seed ^ 5);
            let w = Panels::pack_rows(&source, Shape::new(PANEL, inputs));
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn what_is_not_read_for_zeros_changes_no_bit(
            kind in 0usize..3, rows in 1usize..9, inputs in 1usize..300, panels in 1usize..10, zeros in 0u32..100, seed: u32,
        ) {
            let outputs = panels * PANEL;
            let source = weights(Kind::ALL[kind], [outputs, inputs], seed);
            let mut x = values(rows * inputs, seed ^ 3);
            let drop = values(rows * inputs, seed ^ 4);
            x.iter_mut().zip(drop).filter(|(_, drop)| *drop < zeros as f32 / 50.0 - 1.0).for_each(|(x, _)| *x = 0.0);
            let product = |shape, x: &[f32]| {
                let mut out = vec![f32::NAN; x.len() / inputs * outputs];
                matmul(&Panels::pack_rows(&source, shape), x, &mut out);
                out.into_iter().map(|value| (value + 0.0).to_bits()).collect::<Vec<_>>()
            };
            let (dense, sparse) = (Shape::new(outputs, inputs), Shape::sparse(outputs, inputs));
            let all = product(dense, &x);
            prop_assert_eq!(&product(sparse, &x), &all);
            for rows in 1..rows.min(5) {
                prop_assert_eq!(&product(sparse, &x[..rows * inputs]), &all[..rows * outputs], "{} rows", rows);
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
                    unsafe { tile::unpack_of::<$width, T>(weights, PANEL, &mut unpacked) };
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
                    tile::many_rows(&unpacked, (x, inputs), many, (&[], 0));
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
            let [narrow, wide] = [narrow, wide].map(|weight| Panels::pack_rows(&weight, Shape::new(outputs, inputs)));
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
        let whole = Panels::pack_rows(&weights(Kind::F32, [outputs, inputs], 8), Shape::new(outputs, inputs));
        assert!(matches!(whole.data, Data::F32(_)));
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (inputs, outputs) = (256, 1000);
        for kind in [Kind::F16, Kind::Q8_0, Kind::Q4_0, Kind::Q6K] {
            let w = Panels::pack_rows(&weights(kind, [outputs, inputs], 3), Shape::new(outputs, inputs));
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
