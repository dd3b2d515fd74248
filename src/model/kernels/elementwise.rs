//! Passes over whole activations.

use super::{Shared, exp, kernel, parallel, sigmoid};

/// A function applied to every element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Tanh,
    Sigmoid,
    /// `max(x, 0)²`, the squared ReLU of RWKV's channel mix.
    ReluSquared,
    /// `x · tanh(ln(1 + eˣ))`, of v1's channel mix.
    Mish,
}

/// Elements that one task of an elementwise pass takes; a multiple of every vector width.
const BLOCK: usize = 4096;

/// `x = f(x)`.
pub fn activate(kind: Activation, x: &mut [f32]) {
    let len = x.len();
    let shared = Shared::new(x);
    parallel(len.div_ceil(BLOCK), len * 8, |block| {
        let at = block * BLOCK;
        // SAFETY: one task a block.
        kind.apply(unsafe { shared.part(at, BLOCK.min(len - at)) });
    });
}

impl Activation {
    /// The same on one thread.
    pub(super) fn apply(self, x: &mut [f32]) {
        match self {
            Activation::Tanh => x.iter_mut().for_each(|x| *x = x.tanh()),
            Activation::Sigmoid => sigmoid_all(x),
            Activation::ReluSquared => relu_squared(x),
            Activation::Mish => mish(x),
        }
    }
}

kernel! {
    fn sigmoid_all(x: &mut [f32]) {
        for x in x {
            *x = sigmoid::<A>(*x);
        }
    }
}

kernel! {
    fn relu_squared(x: &mut [f32]) {
        for x in x {
            let positive = x.max(0.0);
            *x = positive * positive;
        }
    }
}

kernel! {
    /// With n = eˣ(eˣ + 2), `tanh(ln(1 + eˣ))` is n / (n + 2), which is 1 from 20 on.
    fn mish(x: &mut [f32]) {
        for x in x {
            let e = exp::<A>(x.min(20.0));
            let n = e * (e + 2.0);
            *x *= n / (n + 2.0);
        }
    }
}

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    let (len, shared) = (x.len(), Shared::new(x));
    parallel(len.div_ceil(BLOCK), len, |block| {
        let at = block * BLOCK;
        // SAFETY: one task a block.
        let x = unsafe { shared.part(at, BLOCK.min(len - at)) };
        x.iter_mut().zip(&y[at..]).for_each(|(x, y)| *x += y);
    });
}

/// `x *= y`.
pub fn multiply(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    for (x, y) in x.iter_mut().zip(y) {
        *x *= y;
    }
}

/// What a row's sequence had one token before: another row of `x`, or what its state kept.
type Previous<'a, 'p> = &'p (dyn Fn(usize) -> &'a [f32] + Sync);

/// RWKV's token shift for several mixes at once: `out [mixes, rows, width] = x + (previous - x) · mix`.
pub fn token_shift(x: &[f32], mixes: &[f32], width: usize, previous: Previous, out: &mut [f32]) {
    shift(x, mixes, width, previous, out, shift_row);
}

/// The same with mixes of each row's own: `out = x + (previous - x) · (mix + out)`.
pub fn token_shift_added(x: &[f32], mixes: &[f32], width: usize, previous: Previous, out: &mut [f32]) {
    shift(x, mixes, width, previous, out, shift_row_added);
}

type ShiftRow = fn(&[f32], &[f32], &[f32], &mut [f32]);

fn shift(x: &[f32], mixes: &[f32], width: usize, previous: Previous, out: &mut [f32], shift_row: ShiftRow) {
    let (rows, kinds) = (x.len() / width, mixes.len() / width);
    assert!(out.len() == kinds * rows * width);
    let shared = Shared::new(out);
    parallel(rows, rows * kinds * width, |row| {
        let (x, previous) = (&x[row * width..][..width], previous(row));
        for (kind, mix) in mixes.chunks_exact(width).enumerate() {
            // SAFETY: one task a row, which writes its own row of each mix.
            let out = unsafe { shared.part((kind * rows + row) * width, width) };
            shift_row(x, previous, mix, out);
        }
    });
}

kernel! {
    fn shift_row(x: &[f32], previous: &[f32], mix: &[f32], out: &mut [f32]) {
        for (((out, x), p), m) in out.iter_mut().zip(x).zip(previous).zip(mix) {
            *out = A::fma(p - x, *m, *x);
        }
    }
}

kernel! {
    fn shift_row_added(x: &[f32], previous: &[f32], mix: &[f32], out: &mut [f32]) {
        for (((out, x), p), m) in out.iter_mut().zip(x).zip(previous).zip(mix) {
            *out = A::fma(p - x, m + *out, *x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_equal_their_definitions() {
        let x: Vec<f32> = (-5000..5000).map(|i| i as f32 / 300.0).collect();
        for kind in [Activation::Tanh, Activation::Sigmoid, Activation::ReluSquared, Activation::Mish] {
            let mut got = x.clone();
            activate(kind, &mut got);
            for (x, got) in x.iter().zip(got) {
                let exact = f64::from(*x);
                let want = match kind {
                    Activation::Tanh => exact.tanh(),
                    Activation::Sigmoid => 1.0 / (1.0 + (-exact).exp()),
                    Activation::ReluSquared => exact.max(0.0).powi(2),
                    Activation::Mish => exact * exact.exp().ln_1p().tanh(),
                };
                assert!((f64::from(got) - want).abs() <= 1e-6 * want.abs().max(1.0), "{kind:?}({x}) = {got}");
            }
        }
    }
}
