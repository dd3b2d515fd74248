//! `x · Wᵀ` with quantised weights: dot products of small integers.
//!
//! Activations are rounded to eight bits in the runs of inputs that share the weights' scales. The products of a run are added
//! up as integers, so exactly, whatever the instructions; then one multiply-add for each run, and one more for kinds that add something,
//! brings the sum to f32, run by run from the first to the last. So there is one order of additions for each output
//! element, whatever the number of rows and the width of registers. ggml computes the same (`ggml_vec_dot_*` in `ggml-cpu/quants.c`) in
//! another order.

use std::cell::RefCell;
use std::marker::PhantomData;

use super::activations::Activations;
use super::matmul::PANEL;
#[cfg(target_arch = "x86_64")]
use super::quants::QUAD;
use super::quants::{Form, GROUP, Of, Part, WithForm};
#[cfg(target_arch = "x86_64")]
use super::simd::{Dot, Narrow, Place, Wide};
#[cfg(target_arch = "x86_64")]
use super::tile::{AHEAD, fetch};
use super::{Arith, Plain};

/// Groups that are unpacked at a time: 256 inputs, whole blocks of every kind, 8 KB of integers and up to 4 KB of scales.
const STRETCH: usize = 8;
/// Up to so many rows read weights as they are stored; more share what is unpacked once.
#[cfg(target_arch = "x86_64")]
const FEW: usize = 12;

/// Adds to `sums [rows, PANEL]` what the rows of x make with a panel.
pub struct Panel<'a> {
    pub panel: usize,
    pub x: &'a Activations,
    pub sums: &'a mut [[f32; PANEL]],
}

impl WithForm<()> for Panel<'_> {
    fn call<F: Form>(self, quants: &Of<F>) {
        let groups = quants.inputs() / GROUP;
        for first in (0..groups).step_by(STRETCH) {
            let end = groups.min(first + STRETCH);
            let part = quants.part(self.panel, first..end);
            let next = quants.part(self.panel, end..groups.min(end + STRETCH));
            add(&part, end - first, (self.x, first * GROUP), self.sums, next.bytes());
        }
    }
}

/// Adds to `sums [rows, PANEL]` what the rows of x make, from an input on, with as many groups of a panel; meanwhile memory is
/// asked for `next`.
fn add<F: Form>(part: &Part<F>, groups: usize, x: (&Activations, usize), sums: &mut [[f32; PANEL]], next: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    if super::fused() {
        if sums.len() <= FEW {
            return rows(part, groups, x, sums);
        }
        return UNPACKED.with_borrow_mut(|unpacked| {
            unpacked.fill(part, groups);
            next.chunks(64).for_each(|line| fetch(line.as_ptr()));
            rows(&(&**unpacked, PhantomData::<F>), groups, x, sums);
        });
    }
    let _ = next;
    plain::<Plain, F>(part, groups, x, sums);
}

/// [`add`] for any processor.
fn plain<A: Arith, F: Form>(
    part: &Part<F>,
    groups: usize,
    (x, input): (&Activations, usize),
    sums: &mut [[f32; PANEL]],
) {
    let run = F::SHAPE.run;
    for n in 0..groups * GROUP / run {
        let (group, within) = (n * run / GROUP, n * run % GROUP);
        for output in 0..PANEL {
            let weights: [u8; GROUP] =
                std::array::from_fn(|i| if i < run { part.plain_integer(group, (within + i, output)) } else { 0 });
            let (d, m) = part.plain_scales((group, within / run), output);
            for (row, sums) in sums.iter_mut().enumerate() {
                let (codes, runs) = x.row(row, input + n * run);
                let products = codes[..run].iter().zip(weights).map(|(&x, weight)| i32::from(x) * i32::from(weight));
                let integer = runs[0].start + products.sum::<i32>();
                let sum = &mut sums[output];
                *sum = A::fma(integer as f32, d * runs[0].scale, *sum);
                if F::SHAPE.added {
                    *sum = A::fma(m, runs[0].sum, *sum);
                }
            }
        }
    }
}

/// Repeats a body for n = 0 to 7, each time compiled for that n.
#[cfg(target_arch = "x86_64")]
macro_rules! unroll {
    ($n:ident => $body:block) => {
        unroll!(@ $n $body 0 1 2 3 4 5 6 7)
    };
    (@ $n:ident $body:block $($value:literal)*) => {
        $({
            const $n: usize = $value;
            $body
        })*
    };
}

/// Where a kernel reads weights.
#[cfg(target_arch = "x86_64")]
trait Source {
    type Form: Form;

    /// The integers of a quad of a group at the outputs from `output` on.
    ///
    /// # Safety
    /// As [`Part::quad`].
    unsafe fn quad<V: Dot>(&self, group: usize, n: usize, output: usize) -> V::Bytes;

    /// `d` and `m` of a run of a group.
    ///
    /// # Safety
    /// As [`Part::scales`].
    unsafe fn scales<V: Dot>(&self, run: (usize, usize), output: usize) -> (V, V);
}

#[cfg(target_arch = "x86_64")]
impl<F: Form> Source for Part<'_, F> {
    type Form = F;

    #[inline(always)]
    unsafe fn quad<V: Dot>(&self, group: usize, n: usize, output: usize) -> V::Bytes {
        // SAFETY: the caller's promise.
        unsafe {
            // Of what will be read soon, two lines for integers of eight bits and one for others.
            let ahead = self.stored(group).wrapping_add(AHEAD + n * QUAD * F::SHAPE.bits / 8);
            if output == 0 {
                (0..F::SHAPE.bits / 4).for_each(|line| fetch(ahead.wrapping_add(line * 64)));
                if n == 0 && group.is_multiple_of(F::GROUPS) {
                    // And of its scales, which stand before it.
                    (0..F::SCALES / 64).for_each(|line| fetch(ahead.wrapping_sub((line + 1) * 64)));
                }
            }
            Part::quad::<V>(self, group, n, output)
        }
    }

    #[inline(always)]
    unsafe fn scales<V: Dot>(&self, run: (usize, usize), output: usize) -> (V, V) {
        // SAFETY: the caller's promise.
        unsafe { Part::scales::<V>(self, run, output) }
    }
}

/// Groups of a panel that are unpacked once for many rows.
#[cfg(target_arch = "x86_64")]
#[repr(align(64))]
struct Unpacked {
    /// `[STRETCH, 8]` quads.
    integers: [[[u8; QUAD]; 8]; STRETCH],
    /// d and m of the runs of a group, of which there are one or two.
    scales: [[[[f32; PANEL]; 2]; 2]; STRETCH],
}

#[cfg(target_arch = "x86_64")]
thread_local! {
    static UNPACKED: RefCell<Box<Unpacked>> = RefCell::new(Box::new(Unpacked {
        integers: [[[0; QUAD]; 8]; STRETCH],
        scales: [[[[0.0; PANEL]; 2]; 2]; STRETCH],
    }));
}

#[cfg(target_arch = "x86_64")]
impl Unpacked {
    /// Takes so many groups of a part, no more than `STRETCH`.
    fn fill<F: Form>(&mut self, part: &Part<F>, groups: usize) {
        #[target_feature(enable = "avx512f,avx2,fma,f16c")]
        fn wide<F: Form>(to: &mut Unpacked, part: &Part<F>, groups: usize) {
            // SAFETY: the features are there, and so are the groups.
            unsafe { to.fill_of::<Wide, F>(part, groups) }
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn narrow<F: Form>(to: &mut Unpacked, part: &Part<F>, groups: usize) {
            // SAFETY: as above.
            unsafe { to.fill_of::<Narrow, F>(part, groups) }
        }
        // SAFETY: the processor has the features.
        unsafe { if super::dots() { wide(self, part, groups) } else { narrow(self, part, groups) } }
    }

    /// # Safety
    /// As [`Dot`]; the part has so many groups, no more than `STRETCH`.
    #[inline(always)]
    unsafe fn fill_of<V: Dot, F: Form>(&mut self, part: &Part<F>, groups: usize) {
        for group in 0..groups {
            for output in (0..PANEL).step_by(V::LANES) {
                // SAFETY: the caller's promise; every place is inside its array.
                unsafe {
                    let quads = &mut self.integers[group];
                    unroll!(N => {
                        let to = quads[N].as_mut_ptr().add(4 * output);
                        V::put(Part::quad::<V>(part, group, N, output), to);
                    });
                    for run in 0..GROUP / F::SHAPE.run {
                        let (d, m) = Part::scales::<V>(part, (group, run), output);
                        d.store(self.scales[group][run][0].as_mut_ptr().add(output));
                        m.store(self.scales[group][run][1].as_mut_ptr().add(output));
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl<F: Form> Source for (&Unpacked, PhantomData<F>) {
    type Form = F;

    #[inline(always)]
    unsafe fn quad<V: Dot>(&self, group: usize, n: usize, output: usize) -> V::Bytes {
        // SAFETY: the caller's promise.
        unsafe { V::bytes(self.0.integers.get_unchecked(group)[n].as_ptr().add(4 * output)) }
    }

    #[inline(always)]
    unsafe fn scales<V: Dot>(&self, (group, run): (usize, usize), output: usize) -> (V, V) {
        // SAFETY: the caller's promise.
        unsafe {
            let [d, m] = &self.0.scales.get_unchecked(group)[run];
            (V::load(d.as_ptr().add(output)), V::load(m.as_ptr().add(output)))
        }
    }
}

/// Adds to the sums of R rows, from the output `first` on, at most G vectors of what some groups make with those rows of x, from
/// a row and an input on.
///
/// # Safety
/// As [`Dot`]; `source` has those groups.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn tile<V: Dot, S: Source, const R: usize, const G: usize>(
    source: &S,
    groups: usize,
    (x, row, input): (&Activations, usize, usize),
    (sums, first): (&mut [[f32; PANEL]], usize),
) {
    let run = S::Form::SHAPE.run;
    let mut rows = [(std::ptr::null(), std::ptr::null(), std::ptr::null()); R];
    for (r, place) in rows.iter_mut().enumerate() {
        let ((codes, runs), halves) = (x.row(row + r, input), x.halves(row + r, input));
        assert!(codes.len() >= groups * GROUP && runs.len() >= groups * (GROUP / run));
        assert!(!V::HALVES || S::Form::SHAPE.bits < 8 || halves.len() >= groups * GROUP / 4);
        *place = (codes.as_ptr(), halves.as_ptr(), runs.as_ptr());
    }
    assert!(first + G * V::LANES <= PANEL && sums.len() == R);
    // SAFETY: the caller has looked for the features; the rows of `sums` hold that many vectors, and those of x that many
    // groups.
    unsafe {
        let mut acc = [[V::splat(0.0); G]; R];
        for (acc, sums) in acc.iter_mut().zip(&*sums) {
            for (v, acc) in acc.iter_mut().enumerate() {
                *acc = V::load(sums.as_ptr().add(first + v * V::LANES));
            }
        }
        for group in 0..groups {
            let mut integers = [[V::start(0); G]; R];
            unroll!(N => {
                let place = Place { n: N % (run / 4), count: run / 4, width: S::Form::SHAPE.bits };
                let of_run = N * 4 / run;
                if place.n == 0 {
                    for (integers, (.., runs)) in integers.iter_mut().zip(rows) {
                        *integers = [V::start((*runs.add(group * (GROUP / run) + of_run)).start); G];
                    }
                }
                // Closures would be compiled without the features.
                let mut weights = [source.quad::<V>(group, N, first); G];
                for (v, weights) in weights.iter_mut().enumerate().skip(1) {
                    *weights = source.quad::<V>(group, N, first + v * V::LANES);
                }
                for (integers, (codes, halves, _)) in integers.iter_mut().zip(rows) {
                    let (codes, halves) = (codes.add(group * GROUP + 4 * N), halves.wrapping_add(group * 8 + N));
                    let x = V::quad(codes.cast(), halves, S::Form::SHAPE.bits);
                    for (integers, weights) in integers.iter_mut().zip(weights) {
                        *integers = V::dot(*integers, weights, x, place);
                    }
                }
                if place.n + 1 == place.count {
                    for v in 0..G {
                        let (d, m) = source.scales::<V>((group, of_run), first + v * V::LANES);
                        for r in 0..R {
                            let of_x = &*rows[r].2.add(group * (GROUP / run) + of_run);
                            let sum = &mut acc[r][v];
                            *sum = V::end(integers[r][v]).fma(d.times(V::splat(of_x.scale)), *sum);
                            if S::Form::SHAPE.added {
                                *sum = m.fma(V::splat(of_x.sum), *sum);
                            }
                        }
                    }
                }
            });
        }
        for (acc, sums) in acc.iter().zip(sums) {
            for (v, acc) in acc.iter().enumerate() {
                acc.store(sums.as_mut_ptr().add(first + v * V::LANES));
            }
        }
    }
}

/// Runs [`tile`] for so many rows, known to the compiler, at a time.
#[cfg(target_arch = "x86_64")]
macro_rules! tiles {
    ($width:ty, $outputs:expr, ($source:expr, $groups:expr, $x:expr, $sums:expr), $most:literal: $($rows:literal)*) => {
        for (n, sums) in $sums.chunks_mut($most).enumerate() {
            let x = ($x.0, n * $most, $x.1);
            for first in $outputs {
                match sums.len() {
                    // SAFETY: the features are there; the caller's groups are too.
                    $($rows => unsafe { tile::<$width, _, $rows, 2>($source, $groups, x, (sums, first)) },)*
                    _ => unreachable!("no more rows than {}", $most),
                }
            }
        }
    };
}

/// Adds to `sums [rows, PANEL]` what some groups make with the rows of x from an input on.
#[cfg(target_arch = "x86_64")]
fn rows<S: Source>(source: &S, groups: usize, x: (&Activations, usize), sums: &mut [[f32; PANEL]]) {
    /// Six rows and two vectors fill the 32 registers of AVX-512: sums as integers and as f32.
    #[target_feature(enable = "avx512f,avx512vnni,avx2,fma,f16c")]
    fn wide<S: Source>(source: &S, groups: usize, x: (&Activations, usize), sums: &mut [[f32; PANEL]]) {
        tiles!(Wide, [0], (source, groups, x, sums), 6: 1 2 3 4 5 6);
    }
    /// Four rows and two vectors are the most for the 16 registers of AVX2.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn narrow<S: Source>(source: &S, groups: usize, x: (&Activations, usize), sums: &mut [[f32; PANEL]]) {
        tiles!(Narrow, [0, PANEL / 2], (source, groups, x, sums), 4: 1 2 3 4);
    }
    // SAFETY: the processor has the features.
    unsafe { if super::dots() { wide(source, groups, x, sums) } else { narrow(source, groups, x, sums) } }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::activations::Rounding;
    use super::super::random::{values, weights};
    use half::f16;

    use super::super::{Fused, Kind, Panels, Shape, Weight, blocks, matmul};
    use super::*;

    fn quantised() -> impl Strategy<Value = Kind> {
        proptest::sample::select(Kind::ALL.into_iter().filter(|kind| kind.quantised()).collect::<Vec<_>>())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn equals_an_f64_reference_and_no_row_depends_on_another(
            kind in quantised(), rows in 1usize..30, blocks in 1usize..10, outputs in 1usize..70, seed: u32,
        ) {
            let inputs = blocks * kind.block();
            let source = weights(kind, [outputs, inputs], seed);
            let (w, all) = (Panels::pack_rows(&source, Shape::new(outputs, inputs)), source.to_f32());
            let x = values(rows * inputs, seed ^ 77);
            let mut out = vec![f32::NAN; rows * outputs];
            matmul(&w, &x, &mut out);
            // What the integers of the activations stand for.
            let run = if kind == Kind::Q6K { 16 } else { 32 };
            let rounded = |run: &[f32]| {
                let largest = run.iter().fold(0f64, |most, &x| most.max(f64::from(x.abs())));
                run.iter().map(|&x| (f64::from(x) * 127.0 / largest).round_ties_even() * largest / 127.0).collect::<Vec<_>>()
            };
            for (x, out) in x.chunks_exact(inputs).zip(out.chunks_exact(outputs)) {
                let near: Vec<f64> = x.chunks_exact(run).flat_map(rounded).collect();
                for (o, got) in out.iter().enumerate() {
                    let weights = &all[o * inputs..][..inputs];
                    let exact: f64 = near.iter().zip(weights).map(|(x, w)| x * f64::from(*w)).sum();
                    // One integer may be rounded the other way where it is as near.
                    let step = 1.0 / 127.0 * weights.iter().fold(0f64, |most, &w| most.max(f64::from(w.abs())));
                    prop_assert!((f64::from(*got) - exact).abs() < 1e-5 * inputs as f64 + step, "{}, not {}", got, exact);
                }
                let mut alone = vec![f32::NAN; outputs];
                matmul(&w, x, &mut alone);
                prop_assert_eq!(&alone[..], out, "a row alone");
            }
        }

        #[test]
        fn every_width_of_registers_adds_the_same(
            kind in quantised(), rows in 1usize..4, groups in 1usize..=STRETCH, seed: u32,
        ) {
            let inputs = (groups * GROUP).next_multiple_of(kind.block());
            let source = weights(kind, [PANEL, inputs], seed);
            let x = values(rows * inputs, seed ^ 5);
            let w = Panels::pack_rows(&source, Shape::new(PANEL, inputs));
            let all = w.quants().expect("of quants").with_form(Widths(&x, inputs));
            for sums in &all[1..] {
                prop_assert_eq!(sums, &all[0], "{}", kind);
            }
        }
    }

    /// The sums of a panel by every way there is.
    struct Widths<'a>(&'a [f32], usize);

    impl WithForm<Vec<Vec<[f32; PANEL]>>> for Widths<'_> {
        fn call<F: Form>(self, quants: &Of<F>) -> Vec<Vec<[f32; PANEL]>> {
            let (x, inputs) = (self.0, self.1);
            let (rows, groups) = (x.len() / inputs, inputs / GROUP);
            let mut rounded = Activations::default();
            rounded.set(x, inputs, Rounding { run: F::SHAPE.run, offset: F::SHAPE.offset, halves: true });
            let part = quants.part(0, 0..groups);
            let mut all = vec![vec![[0f32; PANEL]; rows]];
            plain::<Fused, F>(&part, groups, (&rounded, 0), &mut all[0]);
            #[cfg(target_arch = "x86_64")]
            {
                use super::super::{dots, fused};
                let x = (&rounded, 0, 0);
                macro_rules! width {
                    ($width:ty, $outputs:expr) => {
                        UNPACKED.with_borrow_mut(|unpacked| {
                            // SAFETY: the processor has the features.
                            unsafe { unpacked.fill_of::<$width, F>(&part, groups) };
                            let unpacked = (&**unpacked, PhantomData::<F>);
                            let mut sums = vec![vec![[0f32; PANEL]; rows]; 2];
                            for first in $outputs {
                                // SAFETY: as above.
                                unsafe {
                                    match rows {
                                        1 => tile::<$width, _, 1, 2>(&part, groups, x, (&mut sums[0], first)),
                                        2 => tile::<$width, _, 2, 2>(&part, groups, x, (&mut sums[0], first)),
                                        _ => tile::<$width, _, 3, 2>(&part, groups, x, (&mut sums[0], first)),
                                    }
                                    match rows {
                                        1 => tile::<$width, _, 1, 2>(&unpacked, groups, x, (&mut sums[1], first)),
                                        2 => tile::<$width, _, 2, 2>(&unpacked, groups, x, (&mut sums[1], first)),
                                        _ => tile::<$width, _, 3, 2>(&unpacked, groups, x, (&mut sums[1], first)),
                                    }
                                }
                            }
                            all.extend(sums);
                        })
                    };
                }
                if fused() {
                    width!(Narrow, [0, PANEL / 2]);
                }
                if dots() {
                    width!(Wide, [0]);
                }
            }
            all
        }
    }

    #[test]
    fn the_largest_integers_do_not_overflow() {
        // Every weight the largest, every activation too, of either sign.
        for kind in Kind::ALL.into_iter().filter(|kind| kind.quantised()) {
            for byte in [0x00u8, 0xff, 0x7f, 0x80] {
                let mut bytes = vec![byte; kind.bytes(PANEL * 256).expect("whole blocks")];
                blocks::set_scales(kind, &mut bytes, f16::from_f32(0.01));
                let source = Weight::new(kind, &[PANEL, 256], bytes).expect("as many as the shape has");
                let w = Panels::pack_rows(&source, Shape::new(PANEL, 256));
                for x in [1f32, -1.0] {
                    let sums = w.quants().expect("of quants").with_form(Widths(&[x; 256], 256));
                    assert!(sums.iter().all(|other| other == &sums[0]), "{kind} of {byte:#x} times {x}");
                }
            }
        }
    }
}
