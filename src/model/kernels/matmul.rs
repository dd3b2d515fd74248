//! `x · Wᵀ` with weights packed in panels that vectorise over outputs.
//!
//! A panel holds [`PANEL`] outputs: for each input, in order, that many weights side by side. One output element is one
//! accumulator that walks the inputs from first to last, whatever the number of rows, so a row's result never depends on
//! the rows beside it. Quantised weights keep their integers; see [`quants`].

use std::cell::RefCell;

use half::{bf16, f16};

use super::kind::Kind;
use super::quants::{self, Quants, Scales};
use super::weight::Stored;
use super::{Arith, Shared, Weight, kernel, parallel, parallel_chunks};

/// Outputs side by side in a panel.
pub const PANEL: usize = 32;
/// Rows that one pass over a panel serves: 3 × 32 accumulators fill the 16 AVX2 registers.
const ROWS: usize = 3;

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

/// `out [rows, outputs] = x [rows, inputs] · wᵀ`.
pub fn matmul(w: &Panels, x: &[f32], out: &mut [f32]) {
    let rows = x.len() / w.inputs;
    assert_eq!(x.len(), rows * w.inputs, "x holds whole rows");
    assert_eq!(out.len(), rows * w.outputs, "one output row for each row of x");
    match &w.data {
        Data::F32(data) => run(w, data, x, out),
        Data::F16(data) => run(w, data, x, out),
        Data::BF16(data) => run(w, data, x, out),
        Data::Quants(quants) => run_quants(w, quants, x, out),
    }
}

/// Inputs of single values that are unpacked at a time: 16 KB of f32, which stay in the first cache.
const RUN: usize = 128;

fn run<T: Stored>(w: &Panels, data: &[T], x: &[f32], out: &mut [f32]) {
    let rows = x.len() / w.inputs;
    let size = w.inputs * PANEL;
    let panels = |panel: usize, sums: &mut [[f32; PANEL]]| {
        let weights = &data[panel * size..][..size];
        // Few rows read each weight once as it is; for more, it pays to convert it once for all of them.
        if rows <= ROWS {
            return tile(weights, x, w.inputs, sums);
        }
        let mut unpacked = [0f32; RUN * PANEL];
        for (n, weights) in weights.chunks(RUN * PANEL).enumerate() {
            let unpacked = &mut unpacked[..weights.len()];
            let weights = T::as_f32(weights).unwrap_or_else(|| widen(weights, unpacked));
            tiles(weights, &x[n * RUN..], w.inputs, sums);
        }
    };
    each_panel(w, rows, out, panels);
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

/// Adds to the `sums` of all rows what a part of a panel, in f32, and the rows' parts of `x` make.
fn tiles(weights: &[f32], x: &[f32], stride: usize, sums: &mut [[f32; PANEL]]) {
    #[cfg(target_arch = "x86_64")]
    if super::wide() && sums.len() > ROWS {
        return tiles_avx512(weights, x, stride, sums);
    }
    for (n, sums) in sums.chunks_mut(ROWS).enumerate() {
        tile(weights, &x[n * ROWS * stride..], stride, sums);
    }
}

/// The same for twelve rows at a time, which fill the 32 registers of AVX-512. Each sum is the same chain of fused
/// multiply-adds, so not a bit is different.
#[cfg(target_arch = "x86_64")]
fn tiles_avx512(weights: &[f32], x: &[f32], stride: usize, sums: &mut [[f32; PANEL]]) {
    let inputs = weights.len() / PANEL;
    assert!(weights.len() == inputs * PANEL && x.len() >= (sums.len() - 1) * stride + inputs);
    let (twelves, rest) = sums.as_chunks_mut::<GROUP>();
    let mut row = 0;
    for sums in twelves {
        // SAFETY: `wide` has looked for the features; each of the rows has a value for every input.
        unsafe { tile_avx512(weights, &x[row * stride..], stride, sums) };
        row += GROUP;
    }
    let (fours, rest) = rest.as_chunks_mut::<4>();
    for sums in fours {
        // SAFETY: as above.
        unsafe { tile_avx512(weights, &x[row * stride..], stride, sums) };
        row += 4;
    }
    for sums in rest {
        // SAFETY: as above.
        unsafe { tile_avx512(weights, &x[row * stride..], stride, std::array::from_mut(sums)) };
        row += 1;
    }
}

/// # Safety
/// AVX-512F; `weights` holds whole inputs of PANEL, and each of R rows of `x`, `stride` apart, as many values as inputs.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn tile_avx512<T: Stored, const R: usize>(weights: &[T], x: &[f32], stride: usize, out: &mut [[f32; PANEL]; R]) {
    use std::arch::x86_64::{
        _MM_HINT_T0, _mm_prefetch, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for (sums, out) in sums.iter_mut().zip(&*out) {
        // SAFETY: sixteen values of 32, twice.
        *sums = unsafe { [_mm512_loadu_ps(out.as_ptr()), _mm512_loadu_ps(out.as_ptr().add(16))] };
    }
    for (input, weights) in weights.as_chunks::<PANEL>().0.iter().enumerate() {
        if R < ROWS {
            // What memory gives is the limit, and the processor looks ahead no further than a page.
            _mm_prefetch::<_MM_HINT_T0>(weights.as_ptr().wrapping_byte_add(AHEAD).cast());
        }
        // SAFETY: as above.
        let weights = unsafe { [T::load16(weights.as_ptr()), T::load16(weights.as_ptr().add(16))] };
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: each row has a value for every input.
            let x = _mm512_set1_ps(unsafe { *x.get_unchecked(row * stride + input) });
            sums[0] = _mm512_fmadd_ps(x, weights[0], sums[0]);
            sums[1] = _mm512_fmadd_ps(x, weights[1], sums[1]);
        }
    }
    for (sums, out) in sums.iter().zip(out) {
        // SAFETY: sixteen values of 32, twice.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), sums[0]);
            _mm512_storeu_ps(out.as_mut_ptr().add(16), sums[1]);
        }
    }
}

/// Bytes that are fetched ahead of those that are used.
pub const AHEAD: usize = 2048;

/// `out` = the values of `weights` as f32.
fn widen<'a, T: Stored>(weights: &[T], out: &'a mut [f32]) -> &'a [f32] {
    assert!(weights.len() == out.len() && weights.len().is_multiple_of(8));
    #[cfg(target_arch = "x86_64")]
    if super::fused() {
        // SAFETY: the processor has the features, and the assertion above gives the bounds.
        unsafe { widen_avx2(weights, out) };
        return out;
    }
    out.iter_mut().zip(weights).for_each(|(out, weight)| *out = weight.to_f32());
    out
}

/// # Safety
/// AVX2 and F16C; as many weights as values, and a multiple of eight.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen_avx2<T: Stored>(weights: &[T], out: &mut [f32]) {
    for at in (0..out.len()).step_by(8) {
        // SAFETY: eight values from `at` are inside both.
        unsafe { std::arch::x86_64::_mm256_storeu_ps(out.as_mut_ptr().add(at), T::load8(weights.as_ptr().add(at))) };
    }
}

/// Rows of x that the products of a run are taken of together.
const GROUP: usize = 12;

fn run_quants(w: &Panels, quants: &Quants, x: &[f32], out: &mut [f32]) {
    let rows = x.len() / w.inputs;
    // Σ x over every run of every row, which all panels need.
    let totals: Vec<f32> = x.chunks_exact(quants.run()).map(sum_of).collect();
    each_panel(w, rows, out, |panel, sums| quants_panel(quants, panel, x, &totals, sums));
}

fn sum_of(x: &[f32]) -> f32 {
    super::sum(x)
}

kernel! {
    /// Computes the `sums` of one panel: run by run, for all rows.
    fn quants_panel(w: &Quants, panel: usize, x: &[f32], totals: &[f32], sums: &mut [[f32; PANEL]]) {
        let (run, block, runs) = (w.run(), w.kind.block(), w.inputs / w.run());
        let direct = sums.len() <= ROWS && quants::direct(w.kind);
        let mut scales = Scales::ZERO;
        let mut unpacked = [0f32; quants::RUN * PANEL];
        let unpacked = &mut unpacked[..run * PANEL];
        for (n, block) in w.panel(panel).enumerate().map(|(n, stored)| (n * block / run, stored)) {
            let (stored, q) = w.split(block);
            let minima = scales.read(w.kind, stored);
            for r in 0..w.kind.block() / run {
                if !direct {
                    quants::integers(w.kind, q, r, unpacked);
                }
                for (group, sums) in sums.chunks_mut(GROUP).enumerate() {
                    let x = &x[group * GROUP * w.inputs + (n + r) * run..];
                    let mut products = [[0f32; PANEL]; GROUP];
                    let products = &mut products[..sums.len()];
                    match (direct, sums.len()) {
                        #[cfg(target_arch = "x86_64")]
                        (true, 1) => quants::products::<1>(w.kind, (q, r), (x, w.inputs), products),
                        #[cfg(target_arch = "x86_64")]
                        (true, 2) => quants::products::<2>(w.kind, (q, r), (x, w.inputs), products),
                        #[cfg(target_arch = "x86_64")]
                        (true, _) => quants::products::<3>(w.kind, (q, r), (x, w.inputs), products),
                        _ => tiles(unpacked, x, w.inputs, products),
                    }
                    for (row, (products, sums)) in products.iter().zip(sums).enumerate() {
                        let total = totals[(group * GROUP + row) * runs + n + r];
                        let minima = minima.then_some(&scales.m[r]);
                        quants::combine::<A>(products, (w.offset(), total), (&scales.d[r], minima), sums);
                    }
                }
            }
        }
    }
}

/// Adds to `sums`, of one to [`ROWS`] rows, what those rows of `x`, `stride` apart, times a panel are.
#[inline]
fn tile<T: Stored>(panel: &[T], x: &[f32], stride: usize, sums: &mut [[f32; PANEL]]) {
    match sums.len() {
        1 => tile_of::<T, 1>(panel, x, stride, sums),
        2 => tile_of::<T, 2>(panel, x, stride, sums),
        _ => tile_of::<T, ROWS>(panel, x, stride, sums),
    }
}

#[inline]
fn tile_of<T: Stored, const R: usize>(panel: &[T], x: &[f32], stride: usize, sums: &mut [[f32; PANEL]]) {
    let inputs = panel.len() / PANEL;
    assert!(sums.len() == R && panel.len() == inputs * PANEL && x.len() >= (R - 1) * stride + inputs);
    #[cfg(target_arch = "x86_64")]
    if super::wide() {
        let sums = sums.try_into().expect("R rows");
        // SAFETY: the processor has the features; the assertion above gives the bounds.
        return unsafe { tile_avx512::<T, R>(panel, x, stride, sums) };
    }
    #[cfg(target_arch = "x86_64")]
    if super::fused() {
        // SAFETY: the processor has the features; the assertion above gives the bounds.
        return unsafe { tile_avx2::<T, R>(panel, x, stride, sums) };
    }
    for (input, weights) in panel.as_chunks::<PANEL>().0.iter().enumerate() {
        let weights = weights.map(T::to_f32);
        for (r, sums) in sums.iter_mut().enumerate() {
            let x = x[r * stride + input];
            for (sum, w) in sums.iter_mut().zip(weights) {
                *sum = super::Plain::fma(x, w, *sum);
            }
        }
    }
}

/// # Safety
/// AVX2, FMA and F16C; `panel` holds whole inputs of PANEL weights, `sums` R rows, and each of R rows of `x`, `stride`
/// apart, as many values as there are inputs.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(clippy::needless_range_loop, reason = "rows and vectors index several arrays at once")]
unsafe fn tile_avx2<T: Stored, const R: usize>(panel: &[T], x: &[f32], stride: usize, out: &mut [[f32; PANEL]]) {
    use std::arch::x86_64::{
        _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };
    const VECTORS: usize = PANEL / 8;
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; R];
    for r in 0..R {
        for v in 0..VECTORS {
            // SAFETY: eight floats from 8 v are inside the row of PANEL.
            sums[r][v] = unsafe { _mm256_loadu_ps(out[r].as_ptr().add(8 * v)) };
        }
    }
    let (mut w, x) = (panel.as_ptr(), x.as_ptr());
    for input in 0..panel.len() / PANEL {
        // SAFETY: `w` walks over the panel PANEL weights at a time; each row of x has a value for every input.
        unsafe {
            let weights: [_; VECTORS] = [T::load8(w), T::load8(w.add(8)), T::load8(w.add(16)), T::load8(w.add(24))];
            for r in 0..R {
                let x = _mm256_broadcast_ss(&*x.add(r * stride + input));
                for v in 0..VECTORS {
                    sums[r][v] = _mm256_fmadd_ps(x, weights[v], sums[r][v]);
                }
            }
            w = w.add(PANEL);
        }
    }
    for r in 0..R {
        for v in 0..VECTORS {
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(out[r].as_mut_ptr().add(8 * v), sums[r][v]) };
        }
    }
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
        fn the_portable_tile_is_close_to_the_fast_one(inputs in 1usize..200, seed: u32) {
            let source = weights(Kind::F16, [inputs, PANEL], seed);
            let panel: Vec<f16> = source.bytes().chunks_exact(2).map(f16::from_le).collect();
            let x = values(inputs, seed ^ 5);
            let mut sums = [[0f32; PANEL]];
            tile(&panel, &x, inputs, &mut sums);
            for (o, got) in sums[0].iter().enumerate() {
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
