//! `x · Wᵀ` with weights packed in panels that vectorise over outputs.
//!
//! A panel holds [`PANEL`] outputs: for each input, in order, that many weights side by side. One output element is one
//! accumulator that walks the inputs from first to last, whatever the number of rows, so a row's result never depends on
//! the rows beside it. Few rows read a panel as it is stored, from first to last; more rows unpack a stretch of it to f32 once for
//! all of them. Both add the same products in the same order.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use half::{bf16, f16};

use super::kind::Kind;
use super::quants::{Quants, WithPacked};
#[cfg(target_arch = "x86_64")]
use super::simd::Vector;
use super::weight::Stored;
use super::{Shared, Weight, parallel, parallel_chunks, tile};

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
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    Quants(Quants),
}

impl Panels {
    /// Packs `source`, where `at(output, input)` is the index of a weight.
    ///
    /// # Panics
    /// If the source is in blocks, whose values stand in rows: see [`Panels::pack_rows`].
    pub fn pack(source: &Weight, outputs: usize, inputs: usize, at: impl Fn(usize, usize) -> usize + Sync) -> Self {
        let data = match source.kind() {
            Kind::F32 => Data::F32(pack(source, outputs, inputs, at)),
            Kind::F16 => Data::F16(pack(source, outputs, inputs, at)),
            Kind::BF16 => Data::BF16(pack(source, outputs, inputs, at)),
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
}

fn pack<T: Stored>(
    source: &Weight,
    outputs: usize,
    inputs: usize,
    at: impl Fn(usize, usize) -> usize + Sync,
) -> Vec<T> {
    let values = source.bytes();
    let mut data = vec![T::zero(); outputs.div_ceil(PANEL) * inputs * PANEL];
    parallel_chunks(&mut data, (inputs * PANEL).max(1), |panel, data| {
        for (input, data) in data.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            let outputs = panel * PANEL..outputs.min((panel + 1) * PANEL);
            for (to, output) in data.iter_mut().zip(outputs) {
                *to = T::from_le(&values[at(output, input) * T::BYTES..][..T::BYTES]);
            }
        }
    });
    data
}

/// A packed matrix of one kind, panel by panel: what the kernels below need of it.
pub(super) trait Packed: Sync {
    /// Some inputs of a panel as they are stored, to be fetched from memory ahead of their use.
    fn stored(&self, panel: usize, inputs: Range<usize>) -> &[u8];

    /// Writes some inputs of a panel as f32, `[inputs, PANEL]`. They begin and end with a run of scales.
    fn unpack_plain(&self, panel: usize, inputs: Range<usize>, out: &mut [f32]);

    /// The same in registers.
    ///
    /// # Safety
    /// As [`Vector`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn unpack<V: Vector>(&self, panel: usize, inputs: Range<usize>, out: &mut [f32]);

    /// `sums [R, PANEL]` = R rows of `x`, `stride` apart, times a panel, unpacked in registers.
    ///
    /// # Safety
    /// As [`Vector`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn few<V: Vector, const R: usize>(&self, panel: usize, x: (&[f32], usize), sums: &mut [[f32; PANEL]]);
}

/// Single values.
struct Values<'a, T> {
    inputs: usize,
    data: &'a [T],
}

impl<T: Stored> Values<'_, T> {
    fn part(&self, panel: usize, inputs: Range<usize>) -> &[T] {
        let first = panel * self.inputs;
        &self.data[(first + inputs.start) * PANEL..(first + inputs.end) * PANEL]
    }
}

impl<T: Stored> Packed for Values<'_, T> {
    fn stored(&self, panel: usize, inputs: Range<usize>) -> &[u8] {
        let part = self.part(panel, inputs);
        // SAFETY: stored values are plain bytes, all of them initialised.
        unsafe { std::slice::from_raw_parts(part.as_ptr().cast(), size_of_val(part)) }
    }

    fn unpack_plain(&self, panel: usize, inputs: Range<usize>, out: &mut [f32]) {
        out.iter_mut().zip(self.part(panel, inputs)).for_each(|(out, value)| *out = value.to_f32());
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn unpack<V: Vector>(&self, panel: usize, inputs: Range<usize>, out: &mut [f32]) {
        let part = self.part(panel, inputs);
        assert!(part.len() == out.len() && part.len().is_multiple_of(PANEL));
        for at in (0..out.len()).step_by(V::LANES) {
            // SAFETY: the caller has looked for the features; so many values from `at` are inside both.
            unsafe { T::load::<V>(part.as_ptr().add(at)).store(out.as_mut_ptr().add(at)) };
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn few<V: Vector, const R: usize>(
        &self,
        panel: usize,
        (x, stride): (&[f32], usize),
        sums: &mut [[f32; PANEL]],
    ) {
        let weights = self.part(panel, 0..self.inputs);
        // SAFETY: the caller has looked for the features.
        unsafe {
            let ahead = weights.as_ptr().cast::<u8>().wrapping_add(tile::AHEAD);
            match T::BYTES {
                2 => tile::add::<V, T, R, 4, { 2 * PANEL }>(weights, (x, stride), (sums, 0), ahead),
                _ => tile::add::<V, T, R, 4, { 4 * PANEL }>(weights, (x, stride), (sums, 0), ahead),
            }
        }
    }
}

/// `out [rows, outputs] = x [rows, inputs] · wᵀ`.
pub fn matmul(w: &Panels, x: &[f32], out: &mut [f32]) {
    let rows = x.len() / w.inputs;
    assert_eq!(x.len(), rows * w.inputs, "x holds whole rows");
    assert_eq!(out.len(), rows * w.outputs, "one output row for each row of x");
    let inputs = w.inputs;
    match &w.data {
        Data::F32(data) => run(w, &Values { inputs, data }, x, out),
        Data::F16(data) => run(w, &Values { inputs, data }, x, out),
        Data::BF16(data) => run(w, &Values { inputs, data }, x, out),
        Data::Quants(quants) => quants.packed(Run { w, x, out }),
    }
}

/// [`run`], for a kind of quantised weights.
struct Run<'a> {
    w: &'a Panels,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl WithPacked<()> for Run<'_> {
    fn call(self, packed: &impl Packed) {
        run(self.w, packed, self.x, self.out);
    }
}

fn run(w: &Panels, packed: &impl Packed, x: &[f32], out: &mut [f32]) {
    let rows = x.len() / w.inputs;
    if rows <= tile::few() {
        return each_panel(w, rows, out, |panel, sums| tile::few_rows(packed, panel, (x, w.inputs), sums));
    }
    let mut many = |x: &[f32], apart: bool| {
        each_panel(w, rows, out, |panel, sums| {
            let mut unpacked = [0f32; STRETCH * PANEL];
            for first in (0..w.inputs).step_by(STRETCH) {
                let inputs = first..w.inputs.min(first + STRETCH);
                let unpacked = &mut unpacked[..inputs.len() * PANEL];
                tile::unpack(packed, panel, inputs.clone(), unpacked);
                // While these are at work, memory gives the next ones.
                let next = packed.stored(panel, inputs.end..w.inputs.min(inputs.end + STRETCH));
                let x = if apart { (&x[first * rows..], inputs.len()) } else { (&x[first..], w.inputs) };
                tile::many_rows(unpacked, x, sums, next);
            }
        });
    };
    // Rows whose distance is a multiple of half a page would share few places of the cache.
    if w.inputs.is_multiple_of(512) { stretched(w.inputs, x, |x| many(x, true)) } else { many(x, false) }
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

/// Computes the sums of every panel and writes them to `out`.
fn each_panel(w: &Panels, rows: usize, out: &mut [f32], panel: impl Fn(usize, &mut [[f32; PANEL]]) + Sync) {
    thread_local! {
        /// `[rows, PANEL]`.
        static SUMS: RefCell<Vec<[f32; PANEL]>> = const { RefCell::new(Vec::new()) };
    }
    let shared = Shared::new(out);
    parallel(w.outputs.div_ceil(PANEL), rows * w.inputs * w.outputs, |n| {
        SUMS.with_borrow_mut(|sums| {
            sums.clear();
            sums.resize(rows, [0.0; PANEL]);
            panel(n, sums);
            let first = n * PANEL;
            let width = PANEL.min(w.outputs - first);
            for (row, sums) in sums.iter().enumerate() {
                // SAFETY: each (row, panel) pair is written by one task only.
                unsafe { shared.part(row * w.outputs + first, width) }.copy_from_slice(&sums[..width]);
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::super::{Team, blocks};
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

    /// Random weights of a kind; what blocks hold is random bytes with scales that are sane.
    fn weights(kind: Kind, shape: [usize; 2], seed: u32) -> Weight<'static> {
        let n = shape[0] * shape[1];
        let v = values(n, seed);
        let bytes: Vec<u8> = match kind {
            Kind::F32 => v.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Kind::F16 => v.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            Kind::BF16 => v.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            kind => {
                let random = values(kind.bytes(n).expect("whole blocks"), seed ^ 9);
                let mut bytes: Vec<u8> = random.iter().map(|v| (v * 127.0) as i8 as u8).collect();
                blocks::set_scales(kind, &mut bytes, f16::from_f32(0.01));
                bytes
            }
        };
        Weight::new(kind, &shape, bytes).expect("as many bytes as the shape has")
    }

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
        fn blocks_compute_what_their_values_would(
            kind in 3usize..Kind::ALL.len(), rows in 1usize..9, blocks in 1usize..4, outputs in 1usize..70, seed: u32,
        ) {
            let kind = Kind::ALL[kind];
            let inputs = blocks * kind.block();
            let source = weights(kind, [outputs, inputs], seed);
            let all = source.to_f32();
            let w = Panels::pack_rows(&source, outputs, inputs);
            let x = values(rows * inputs, seed ^ 77);
            check(&w, |o, i| all[o * inputs + i], &x);
        }

        #[test]
        fn blocks_compute_what_the_matrix_of_their_values_does(
            kind in 3usize..Kind::ALL.len(), rows in 1usize..30, blocks in 1usize..9, outputs in 1usize..70, seed: u32,
        ) {
            let kind = Kind::ALL[kind];
            let inputs = blocks * kind.block();
            let source = weights(kind, [outputs, inputs], seed);
            let x = values(rows * inputs, seed ^ 77);
            let run = |source: &Weight| {
                let mut out = vec![f32::NAN; rows * outputs];
                matmul(&Panels::pack_rows(source, outputs, inputs), &x, &mut out);
                out
            };
            prop_assert_eq!(run(&Weight::from_f32(&[outputs, inputs], &source.to_f32())), run(&source));
        }

        #[test]
        fn every_width_of_registers_unpacks_the_same(kind in 0usize..Kind::ALL.len(), blocks in 1usize..5, seed: u32) {
            let kind = Kind::ALL[kind];
            let inputs = blocks * kind.block();
            let source = weights(kind, [PANEL, inputs], seed);
            let values = source.to_f32();
            let want: Vec<f32> = (0..inputs * PANEL).map(|at| values[at % PANEL * inputs + at / PANEL]).collect();
            struct Widths(usize);
            impl WithPacked<Vec<Vec<f32>>> for Widths {
                fn call(self, packed: &impl Packed) -> Vec<Vec<f32>> {
                    let inputs = 0..self.0;
                    let mut plain = vec![f32::NAN; self.0 * PANEL];
                    packed.unpack_plain(0, inputs.clone(), &mut plain);
                    let mut all = vec![plain; 3];
                    #[cfg(target_arch = "x86_64")]
                    {
                        use super::super::{fused, simd, wide};
                        if fused() {
                            // SAFETY: the processor has the features.
                            unsafe { packed.unpack::<simd::Narrow>(0, inputs.clone(), &mut all[1]) };
                        }
                        if wide() {
                            // SAFETY: as above.
                            unsafe { packed.unpack::<simd::Wide>(0, inputs, &mut all[2]) };
                        }
                    }
                    all
                }
            }
            let w = Panels::pack_rows(&source, PANEL, inputs);
            let all = match &w.data {
                Data::F32(data) => Widths(inputs).call(&Values { inputs, data }),
                Data::F16(data) => Widths(inputs).call(&Values { inputs, data }),
                Data::BF16(data) => Widths(inputs).call(&Values { inputs, data }),
                Data::Quants(quants) => quants.packed(Widths(inputs)),
            };
            for got in all {
                prop_assert_eq!(&got, &want, "{}", kind);
            }
        }

        #[test]
        fn every_width_of_registers_adds_the_same(
            kind in 0usize..Kind::ALL.len(), rows in 1usize..4, blocks in 1usize..5, seed: u32,
        ) {
            let kind = Kind::ALL[kind];
            let inputs = blocks * kind.block();
            let source = weights(kind, [PANEL, inputs], seed);
            let x = values(rows * inputs, seed ^ 5);
            let w = Panels::pack_rows(&source, PANEL, inputs);
            struct Widths<'a>(usize, &'a [f32]);
            impl WithPacked<Vec<Vec<[f32; PANEL]>>> for Widths<'_> {
                fn call(self, packed: &impl Packed) -> Vec<Vec<[f32; PANEL]>> {
                    let rows = self.1.len() / self.0;
                    let mut all = Vec::new();
                    #[cfg(target_arch = "x86_64")]
                    {
                        use super::super::{fused, simd, wide};
                        let x = (self.1, self.0);
                        macro_rules! width {
                            ($width:ty) => {{
                                let mut sums = vec![[0f32; PANEL]; rows];
                                // SAFETY: the processor has the features.
                                unsafe {
                                    match rows {
                                        1 => packed.few::<$width, 1>(0, x, &mut sums),
                                        2 => packed.few::<$width, 2>(0, x, &mut sums),
                                        _ => packed.few::<$width, 3>(0, x, &mut sums),
                                    }
                                }
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
                    let _ = (packed, rows);
                    all
                }
            }
            let all = match &w.data {
                Data::F32(data) => Widths(inputs, &x).call(&Values { inputs, data }),
                Data::F16(data) => Widths(inputs, &x).call(&Values { inputs, data }),
                Data::BF16(data) => Widths(inputs, &x).call(&Values { inputs, data }),
                Data::Quants(quants) => quants.packed(Widths(inputs, &x)),
            };
            let all_values = source.to_f32();
            for sums in all {
                for (row, sums) in sums.iter().enumerate() {
                    for (o, got) in sums.iter().enumerate() {
                        let fused = |sum: f32, i: usize| x[row * inputs + i].mul_add(all_values[o * inputs + i], sum);
                        prop_assert_eq!(*got, (0..inputs).fold(0f32, fused), "{} output {}", kind, o);
                    }
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (inputs, outputs, rows) = (256, 1000, 5);
        let x = values(rows * inputs, 4);
        for kind in [Kind::F16, Kind::Q8_0] {
            let w = Panels::pack_rows(&weights(kind, [outputs, inputs], 3), outputs, inputs);
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
