//! From the names of a file to the names of the original trainer.
//!
//! Everything behind [`Checkpoint`](super::Checkpoint) speaks BlinkDL's names and layouts. Each file here is one other
//! way of writing the same tensors; it says of each of them which of the original ones it holds, and what has to be
//! done to get those.

pub mod llama;
pub mod peft;
pub mod rwkv_cpp;
pub mod transformers;
pub mod web_rwkv;

use std::collections::BTreeMap;

use super::file::Place;
use super::gguf::Gguf;
use super::{Kind, TensorInfo};
use crate::model::kernels::{self, Weight};

/// What is done to a stored tensor to get an original one.
#[derive(Clone, Debug)]
pub enum Op {
    /// Another shape of the same values.
    Shape(Vec<usize>),
    /// `[1, 1, C]`, as trainers keep vectors.
    Vector,
    /// `[H, N]` of so many values N.
    Heads(usize),
    /// The last two axes change places.
    Transposed,
    /// One of `of` equal parts along the first axis.
    Part { index: usize, of: usize },
    /// Multiplied by a power of two.
    Scaled(f32),
    /// Each value by itself.
    Each(fn(f32) -> f32),
}

impl Op {
    /// What a tensor is afterwards.
    fn describe(&self, TensorInfo { kind, mut shape }: TensorInfo) -> Option<TensorInfo> {
        let unblocked = if kind.block() > 1 { Kind::F32 } else { kind };
        let kind = match self {
            Op::Shape(to) => {
                let product = |shape: &[usize]| shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
                if product(to)? != product(&shape)? {
                    return None;
                }
                shape.clone_from(to);
                kind
            }
            Op::Vector => {
                shape = vec![1, 1, shape.iter().product()];
                kind
            }
            Op::Heads(size) => {
                let all: usize = shape.iter().product();
                shape = vec![all.checked_div(*size)?, *size];
                (shape[0] * size == all).then_some(kind)?
            }
            Op::Transposed => {
                let [.., rows, cols] = shape.as_mut_slice() else { return None };
                std::mem::swap(rows, cols);
                unblocked
            }
            Op::Part { index, of } => {
                let rows = shape.first()?.checked_div(*of).filter(|rows| rows * of == shape[0] && index < of)?;
                if rows == 1 {
                    shape.remove(0);
                } else {
                    shape[0] = rows;
                }
                kind
            }
            Op::Scaled(_) => kind,
            Op::Each(_) => Kind::F32,
        };
        kind.tensor_bytes(&shape)?;
        Some(TensorInfo { kind, shape })
    }

    pub fn apply<'a>(&self, weight: Weight<'a>) -> Option<Weight<'a>> {
        match self {
            Op::Shape(shape) => weight.reshaped(shape),
            Op::Vector | Op::Heads(_) => {
                let info = TensorInfo { kind: weight.kind(), shape: weight.shape().to_vec() };
                let to = self.describe(info)?.shape;
                weight.reshaped(&to)
            }
            Op::Transposed => Some(weight.transposed()),
            Op::Part { index, of } => weight.part(*index, *of),
            Op::Scaled(factor) => {
                let (kind, shape, mut bytes) = (weight.kind(), weight.shape().to_vec(), weight.bytes().to_vec());
                kernels::scale(kind, &mut bytes, *factor);
                Weight::new(kind, &shape, bytes)
            }
            Op::Each(f) => {
                let values: Vec<f32> = weight.to_f32().into_iter().map(f).collect();
                Some(Weight::from_f32(weight.shape(), &values))
            }
        }
    }
}

/// Which of a file's tensors an original one is made of, and how.
#[derive(Clone, Debug)]
pub struct Origin {
    pub place: Place,
    pub file: usize,
    ops: Vec<Op>,
    /// What it is in the end.
    pub info: TensorInfo,
}

impl Origin {
    /// The original tensor of the stored one.
    pub fn apply<'a>(&self, stored: Weight<'a>) -> Option<Weight<'a>> {
        self.ops.iter().try_fold(stored, |weight, op| op.apply(weight))
    }
}

/// A file's own name and shape of a tensor → the original tensors in it.
pub type Reading<'a> = dyn Fn(&Place) -> Result<Vec<(String, Vec<Op>)>, String> + 'a;

/// Bytes of a tensor's name; no trainer comes near it.
const LONGEST_NAME: usize = 256;
/// Axes of a tensor.
const MOST_DIMENSIONS: usize = 8;

/// Refuses what no checkpoint has and no message should hold.
fn check(place: &Place) -> Result<(), String> {
    let name = place.name.as_str();
    if name.len() > LONGEST_NAME || name.chars().any(char::is_control) {
        return Err(format!("a tensor's name is of {} bytes, or has control characters: `{name}`", name.len()));
    }
    if place.shape.len() > MOST_DIMENSIONS {
        return Err(format!("tensor `{name}` has {} axes", place.shape.len()));
    }
    Ok(())
}

/// All original tensors of these files.
pub fn read(places: Vec<(usize, Place)>, reading: &Reading) -> Result<BTreeMap<String, Origin>, String> {
    let mut tensors = BTreeMap::new();
    for (file, place) in places {
        check(&place)?;
        for (name, ops) in reading(&place)? {
            let stored = TensorInfo { kind: place.kind, shape: place.shape.clone() };
            let info = ops.iter().try_fold(stored, |info, op| op.describe(info));
            let info = info.ok_or_else(|| {
                format!("tensor `{}` has shape {:?}, which cannot hold `{name}`", place.name, place.shape)
            })?;
            let origin = Origin { place: place.clone(), file, ops, info };
            if tensors.insert(name.clone(), origin).is_some() {
                return Err(format!("`{name}` is there twice"));
            }
        }
    }
    Ok(tensors)
}

/// What a file says of its tensors beside their names.
#[derive(Clone, Copy)]
pub enum Said<'a> {
    Gguf(&'a Gguf),
    RwkvCpp,
    /// It is called as one of web-rwkv's files.
    WebRwkv,
    Nothing,
}

/// How these tensors are called: told by their names, by what stands beside them in a GGUF file, and by the container.
pub fn reading(places: &[&Place], said: Said) -> Result<Box<Reading<'static>>, String> {
    match said {
        Said::Gguf(gguf) => {
            let dialect = llama::Dialect::of(gguf)?;
            return Ok(Box::new(move |place| dialect.read(place)));
        }
        Said::RwkvCpp => {
            let version = rwkv_cpp::Version::of(places);
            return Ok(Box::new(move |place| version.read(place)));
        }
        Said::WebRwkv | Said::Nothing => {}
    }
    if let Some(kind) = web_rwkv::Kind::of(places, matches!(said, Said::WebRwkv)) {
        return Ok(Box::new(move |place| kind.read(place)));
    }
    if peft::is_peft(places) {
        return Ok(Box::new(peft::read));
    }
    if transformers::is_rwkv(places) {
        return Ok(Box::new(transformers::read_rwkv));
    }
    if transformers::is_fla(places) {
        return Ok(Box::new(transformers::read_fla));
    }
    Ok(Box::new(|place| Ok(vec![(place.name.clone(), Vec::new())])))
}
