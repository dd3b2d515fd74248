//! Layer normalisation, and the group norm of one head.

use super::{Arith, Shared, kernel, parallel, square_deviations, sum};

/// `out [rows, width] = (x - mean) / sqrt(var + eps) · weight + bias`, row by row.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(bias.len() == width && x.len() == out.len() && x.len().is_multiple_of(width));
    let shared = Shared::new(out);
    parallel(x.len() / width, x.len() * 4, |row| {
        // SAFETY: one task a row.
        let out = unsafe { shared.part(row * width, width) };
        norm_row(&x[row * width..][..width], weight, bias, eps, out);
    });
}

kernel! {
    fn norm_row(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        let n = x.len() as f32;
        let mean = sum(x) / n;
        let scale = 1.0 / (square_deviations::<A>(x, mean) / n + eps).sqrt();
        for (((out, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = A::fma((x - mean) * scale, *w, *b);
        }
    }
}

/// `x = (x - mean) / sqrt(var + eps) · weight + bias` of one head `[N]`: a group of RWKV's `ln_x`.
#[inline(always)]
pub(super) fn head_norm<A: Arith>(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let n = x.len() as f32;
    let mean = sum(x) / n;
    let scale = 1.0 / (square_deviations::<A>(x, mean) / n + eps).sqrt();
    for ((x, w), b) in x.iter_mut().zip(weight).zip(bias) {
        *x = A::fma((*x - mean) * scale, *w, *b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_an_f64_reference() {
        for width in [1, 7, 8, 64, 129] {
            let x: Vec<f32> = (0..2 * width).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
            let w: Vec<f32> = (0..width).map(|i| 0.5 + i as f32 / 100.0).collect();
            let b: Vec<f32> = (0..width).map(|i| i as f32 / 50.0 - 1.0).collect();
            let mut out = vec![f32::NAN; x.len()];
            layer_norm(&x, &w, &b, 1e-5, &mut out);
            for (r, row) in x.chunks(width).enumerate() {
                let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / width as f64;
                let var = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / width as f64;
                for c in 0..width {
                    let want = (f64::from(row[c]) - mean) / (var + 1e-5).sqrt() * f64::from(w[c]) + f64::from(b[c]);
                    assert!((f64::from(out[r * width + c]) - want).abs() < 1e-4, "width {width} column {c}");
                }
            }
        }
    }
}
