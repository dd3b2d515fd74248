//! The optional tiny attention of v1, beside its attention: softmax attention over the whole text.
//!
//! Tensor names and formula are those of `RWKV_TinyAttn` in BlinkDL/RWKV-LM, `RWKV-v1/src/model.py`, which has it commented out
//! where it is used. No file with it and no result of the original code was there to compare with. How many heads it has
//! (`rwkv_tiny_head`) is not in a file: it is taken for one, which is what the trainer sets.

use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};

use super::block::Step;
use super::linear::{self, Linear, floats, floats_mut};
use super::weights::Loader;
use super::{Error, kernels};
use crate::types::Segment;

/// `softmax(q · k / √D) · v → out`. N = tokens of the step, D = its width.
pub struct TinyAttention {
    /// Name of its one segment.
    name: String,
    /// `C → 3 D`.
    qkv: Linear,
    /// `D → C`.
    out: Linear,
}

impl TinyAttention {
    /// Reads `{prefix}.tiny_att`, if it is there.
    pub fn load(loader: &Loader, prefix: &str, width: usize) -> Result<Option<Self>, Error> {
        let name = |part: &str| format!("{prefix}.tiny_att.{part}");
        if !loader.has(&name("qkv.weight")) {
            return Ok(None);
        }
        // A lower triangle that is no weight, which trainers with this part had in their files.
        loader.allow(&format!("{prefix}.mask"));
        let (outputs, inputs) = loader.matrix_shape(&name("qkv.weight"))?;
        if !outputs.is_multiple_of(3) {
            let expected = format!("[3 times a width, {width}]");
            return Err(Error::Shape { name: name("qkv.weight"), found: vec![outputs, inputs], expected });
        }
        Ok(Some(Self {
            qkv: Linear::load_biased(loader, &name("qkv"), outputs, width)?,
            out: Linear::load_biased(loader, &name("out"), width, outputs / 3)?,
            name: name("text"),
        }))
    }

    /// Key and value of each token.
    pub fn segment(&self, context: usize) -> Segment {
        Segment::Log { name: self.name.clone(), width: 2 * self.size(), cap: Some(context), ids: None }
    }

    fn size(&self) -> usize {
        self.qkv.outputs() / 3
    }

    /// `x [N, C]` → `[N, C]`; its log is the mixer's `segment`-th segment.
    pub fn forward(&self, x: &Tensor, step: &mut Step, segment: usize) -> Result<Tensor, Error> {
        let (tokens, rows, size) = (step.tokens(), step.rows, self.size());
        let inputs = step.work.scratch((tokens, 3 * size))?;
        self.qkv.forward(x, &inputs)?;
        let y = step.work.scratch((tokens, size))?;
        let out = step.work.scratch(x.shape())?;
        let logs = step.logs(segment);
        let mut texts = Vec::with_capacity(tokens);
        for row in rows {
            let log = &mut logs[row.into.0 as usize];
            let entries = log.len() / (2 * size);
            if entries as u64 != row.at {
                let why = format!("{entries} tokens do not go on at position {}", row.at);
                return Err(Error::State(self.name.clone(), why));
            }
            linear::read(&inputs, |inputs| {
                row.tokens.clone().for_each(|t| log.extend_from_slice(&inputs[(3 * t + 1) * size..][..2 * size]));
            })?;
        }
        for row in rows {
            let log = &logs[row.into.0 as usize];
            texts.extend((1..=row.tokens.len()).map(|n| &log[..(row.at as usize + n) * 2 * size]));
        }
        y.inplace_op2(&inputs, &Attend { texts: &texts })?;
        self.out.forward(&y, &out)?;
        Ok(out)
    }
}

struct Attend<'a> {
    /// For each token its own.
    texts: &'a [&'a [f32]],
}

impl InplaceOp2 for Attend<'_> {
    fn name(&self) -> &'static str {
        "tiny attention"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> candle_core::Result<()> {
        kernels::tiny_attend(floats(x, x_l)?, self.texts, floats_mut(out, out_l)?);
        Ok(())
    }
}
