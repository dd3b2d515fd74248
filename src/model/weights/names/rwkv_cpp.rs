//! rwkv.cpp's files: the original names, with some values worked out in advance.
//!
//! The facts are those of `python/convert_pytorch_to_ggml.py` of RWKV/rwkv.cpp, which stores decays as factors and low-rank
//! matrices the other way round. Its loader tells versions by the same tensors.

use super::Op;
use crate::model::weights::file::Place;

/// What the converter did depends on the version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V4,
    V5,
    V6,
    V7,
}

impl Version {
    pub fn of(places: &[&Place]) -> Self {
        let has = |name: &str| places.iter().any(|place| place.name == format!("blocks.0.att.{name}"));
        match () {
            () if has("k_k") => Self::V7,
            () if has("time_maa_x") => Self::V6,
            () if has("ln_x.weight") => Self::V5,
            () => Self::V4,
        }
    }

    /// The original tensors in one of the file's.
    pub fn read(self, place: &Place) -> Result<Vec<(String, Vec<Op>)>, String> {
        let name = place.name.as_str();
        if let Some(layer) = name.strip_suffix("att.x_rwkvag") {
            let mixes = ["r", "w", "k", "v", "a", "g"].into_iter().enumerate();
            let part = |(index, mix)| (format!("{layer}att.x_{mix}"), vec![Op::Part { index, of: 6 }, Op::Vector]);
            return Ok(mixes.map(part).collect());
        }
        let ops = match (self, name.rsplit_once('.').map_or(name, |(_, last)| last)) {
            (Self::V4, "time_decay") => vec![Op::Each(|y| finite((-f64::from(y)).ln()))],
            (Self::V5, "time_decay") => vec![Op::Each(|y| finite((-f64::from(y).ln()).ln())), without_last_ones(place)],
            (Self::V5, "time_first") => vec![Op::Each(|y| finite(f64::from(y).ln())), without_last_ones(place)],
            (Self::V5 | Self::V6, "time_faaaa") => vec![without_last_ones(place)],
            (Self::V6, "time_decay") => vec![Op::Vector],
            (Self::V6, "time_maa_w1" | "time_maa_w2" | "time_decay_w1" | "time_decay_w2")
            | (Self::V7, "w1" | "w2" | "a1" | "a2" | "v1" | "v2" | "g1" | "g2") => vec![Op::Transposed],
            _ => Vec::new(),
        };
        Ok(vec![(place.name.clone(), ops)])
    }
}

fn without_last_ones(place: &Place) -> Op {
    let ones = place.shape.iter().rev().take_while(|&&d| d == 1).count();
    Op::Shape(place.shape[..(place.shape.len() - ones).max(1)].to_vec())
}

/// A decay factor of exactly 0 or 1 has an infinite logarithm; these stand for the same factors in f32.
fn finite(x: f64) -> f32 {
    x.clamp(-100.0, 88.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::kernels::Kind;

    #[test]
    fn factors_of_nothing_and_of_everything_have_a_decay() {
        let place = Place {
            name: "blocks.0.att.time_decay".into(),
            shape: vec![3, 1, 1],
            kind: Kind::F32,
            strides: None,
            bytes: 0..12,
        };
        let read = Version::V5.read(&place).expect("a tensor");
        let [(_, ops)] = read.as_slice() else { panic!("one tensor") };
        let [Op::Each(f), Op::Shape(shape)] = ops.as_slice() else { panic!("two operations") };
        assert_eq!(shape, &[3]);
        let factor = |x: f32| (-x.exp()).exp();
        for y in [0.0, 1.0, 0.5, 0.999] {
            assert!((factor(f(y)) - y).abs() < 1e-6, "{y}");
            assert!(f(y).is_finite());
        }
    }
}
