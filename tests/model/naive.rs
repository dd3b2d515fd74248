//! Layers written down once more, in f64 and as plainly as the formulas, for what no golden vector covers.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use rewake::model::{Checkpoint, Error, LoadOptions, Model, load};

use super::vectors::{self, Case};

/// The tensors of a model.
pub struct Naive(pub HashMap<String, Tensor>);

/// A tensor whose values lie in ±`size`, without order.
pub fn noise(shape: &[usize], seed: usize, size: f32) -> Tensor {
    let count: usize = shape.iter().product();
    let value = |i: usize| (((i * 7919 + seed * 104_729 + 17) % 10_007) as f32 / 5003.5 - 1.0) * size;
    Tensor::from_vec((0..count).map(value).collect(), shape, &Device::Cpu).expect("a tensor")
}

impl Naive {
    pub fn of(case: &Case) -> Self {
        Self(candle_core::safetensors::load(case.folder.join("model.safetensors"), &Device::Cpu).expect("tensors"))
    }

    /// Replaces every tensor whose name ends like this by zeros.
    pub fn silence(&mut self, ends: &[&str]) {
        for (_, tensor) in self.0.iter_mut().filter(|(name, _)| ends.iter().any(|end| name.ends_with(end))) {
            *tensor = tensor.zeros_like().expect("zeros");
        }
    }

    pub fn model(&self) -> Result<Model, Error> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("model.safetensors");
        candle_core::safetensors::save(&self.0, &path).expect("a file");
        load(&Checkpoint::open(&path)?, &LoadOptions::default())
    }

    pub fn values(&self, name: &str) -> Vec<f64> {
        let tensor = self.0.get(name).unwrap_or_else(|| panic!("a tensor {name}"));
        vectors::flat(&tensor.to_dtype(DType::F32).expect("values")).into_iter().map(f64::from).collect()
    }

    /// Row `id` of a table `width` wide.
    pub fn row(&self, name: &str, id: u32, width: usize) -> Vec<f64> {
        self.values(name)[id as usize * width..][..width].to_vec()
    }

    /// `W · x`, W being `[outputs, inputs]`.
    pub fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        self.values(name).chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }

    /// `x · W`, W being `[inputs, outputs]`.
    pub fn factor(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let weights = self.values(name);
        let outputs = weights.len() / x.len();
        (0..outputs).map(|o| x.iter().enumerate().map(|(i, x)| x * weights[i * outputs + o]).sum()).collect()
    }

    /// The layer norm `{name}.weight`, `{name}.bias`.
    pub fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let scale = 1.0 / (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + 1e-5).sqrt();
        let (weight, bias) = (self.values(&format!("{name}.weight")), self.values(&format!("{name}.bias")));
        x.iter().zip(weight).zip(bias).map(|((x, w), b)| (x - mean) * scale * w + b).collect()
    }
}

/// For each token the mean of the `values` so far, weighted by e^score(token, earlier token).
pub fn attention(values: &[Vec<f64>], score: impl Fn(usize, usize) -> f64) -> Vec<Vec<f64>> {
    let mean = |t: usize| {
        let scores: Vec<f64> = (0..=t).map(|u| score(t, u)).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
        let total: f64 = weights.iter().sum();
        let channel = |c: usize| weights.iter().zip(values).map(|(w, v)| w * v[c]).sum::<f64>() / total;
        (0..values[0].len()).map(channel).collect()
    };
    (0..values.len()).map(mean).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// Fails unless `got` is `want` but for 1e-4 of its root mean square.
pub fn assert_close(got: &[Vec<f32>], want: &[Vec<f64>], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let all: Vec<f64> = want.iter().flatten().copied().collect();
    let rms = (all.iter().map(|v| v * v).sum::<f64>() / all.len() as f64).sqrt();
    let worst = got.iter().flatten().zip(&all).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, f64::max);
    assert!(worst <= 1e-4 * rms, "{what}: {worst} of {rms}");
}
