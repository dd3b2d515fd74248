//! The head of v1 to v3, and of some v4: a linear layer, and a copy head that raises the logits of what the text has said before.
//!
//! For each of the last tokens of the text, the current one included, its logit grows by `head_q(x now) · head_k(x then) / D`.
//! Follows BlinkDL/RWKV-LM, `RWKV-v1/src/model.py`, `RWKV-v2-RNN/src/model_run.py`, `RWKV-v3/src/model_run.py` and, for v4, whose
//! inference code has no copy head, `RWKV-v4/src/model.py`.

use candle_core::Tensor;

use super::block::{Head, LinearHead, Sizes, Step, gather};
use super::linear::{self, LayerNorm, Linear, Orientation};
use super::weights::Loader;
use super::{Error, kernels};
use crate::types::{Row, Segment};

/// The state: entries of a key and the id of its token (exact, as ids are below 2²⁴), the last `window` of them.
const SEGMENT: &str = "head.copy";

pub struct CopyHead {
    pub ln_out: LayerNorm,
    pub linear: Linear,
    /// `C → D` each.
    pub query: Linear,
    pub key: Linear,
    /// How many tokens it looks back, the current one included.
    pub window: usize,
    /// By position, what the input of `linear` is scaled with (v1), or empty.
    pub time_out: Vec<f32>,
}

/// The number of tokens a model was trained on at once: the size of `copy_mask`, a lower triangle that is no weight.
pub fn context(loader: &Loader) -> Result<usize, Error> {
    let (rows, cols) = loader.matrix_shape("copy_mask")?;
    if rows != cols {
        let (name, found) = ("copy_mask".to_owned(), vec![rows, cols]);
        return Err(Error::Shape { name, found, expected: "a square".into() });
    }
    loader.allow("copy_mask");
    Ok(rows)
}

/// The head of v3 and v4: a copy head, which a setting of the trainer (`RWKV_HEAD_QK_DIM`, `head_qk`) leaves out.
pub fn optional(loader: &Loader, sizes: &Sizes) -> Result<Box<dyn Head>, Error> {
    if loader.has("head_q.weight") { CopyHead::load(loader, sizes) } else { LinearHead::load(loader, sizes) }
}

impl CopyHead {
    /// That of v2, v3 and v4.
    pub fn load(loader: &Loader, sizes: &Sizes) -> Result<Box<dyn Head>, Error> {
        let c = sizes.width;
        let (size, _) = loader.matrix_shape("head_k.weight")?;
        let linear = |name: &str, outputs| Linear::load(loader, name, outputs, c, Orientation::OutIn);
        Ok(Box::new(Self {
            ln_out: LayerNorm::load(loader, "ln_out", c)?,
            linear: linear("head.weight", sizes.vocabulary)?,
            query: linear("head_q.weight", size)?,
            key: linear("head_k.weight", size)?,
            window: context(loader)?,
            time_out: Vec::new(),
        }))
    }

    /// f32 values of an entry.
    fn entry(&self) -> usize {
        self.key.outputs() + 1
    }

    /// Adds keys and ids of the step's tokens to the rows' logs.
    fn remember(&self, keys: &[f32], step: &mut Step) -> Result<(), Error> {
        let (rows, ids, size) = (step.rows, step.ids, self.key.outputs());
        let vocabulary = self.linear.outputs() as f32;
        let logs = step.logs(0);
        for row in rows {
            let log = &mut logs[row.into.0 as usize];
            // What a file held must not become a bad index.
            if !log.chunks_exact(size + 1).all(|entry| (0.0..vocabulary).contains(&entry[size])) {
                return Err(Error::State(SEGMENT.into(), "it holds a token outside the vocabulary".into()));
            }
            for token in row.tokens.clone() {
                log.extend_from_slice(&keys[token * size..][..size]);
                log.push(ids[token] as f32);
            }
        }
        Ok(())
    }

    /// Lets go of entries that no later token looks back to, so that the state is the same however the text was cut.
    fn forget(&self, step: &mut Step) {
        let (rows, most) = (step.rows, self.window * self.entry());
        let logs = step.logs(0);
        for row in rows {
            let log = &mut logs[row.into.0 as usize];
            log.drain(..log.len().saturating_sub(most));
        }
    }

    /// The entries that the token `offset` of `row` looks back to, of the row's `log`.
    fn text<'a>(&self, log: &'a [f32], row: &Row, offset: usize) -> &'a [f32] {
        let end = log.len() / self.entry() - row.tokens.len() + offset + 1;
        &log[end.saturating_sub(self.window) * self.entry()..end * self.entry()]
    }
}

impl Head for CopyHead {
    fn segments(&self) -> Vec<Segment> {
        vec![Segment::Log { name: SEGMENT.into(), width: self.entry(), cap: None, ids: Some(self.key.outputs()) }]
    }

    fn forward(&self, x: &Tensor, wanted: &[usize], step: &mut Step, logits: &mut [f32]) -> Result<(), Error> {
        let (tokens, width) = x.dims2()?;
        let size = self.key.outputs();
        // 1. every token's key is remembered
        let normed = step.work.scratch((tokens, width))?;
        self.ln_out.forward(x, &normed)?;
        let keys = step.work.scratch((tokens, size))?;
        self.key.forward(&normed, &keys)?;
        linear::read(&keys, |keys| self.remember(keys, step))??;
        // 2. logits and scores, where wanted
        if !wanted.is_empty() {
            let rows = step.rows;
            let place = |&token: &usize| {
                let row = &rows[rows.partition_point(|row| row.tokens.end <= token)];
                (row, token - row.tokens.start)
            };
            let places: Vec<_> = wanted.iter().map(place).collect();
            let input = gather(&normed, wanted, step)?;
            let queries = step.work.scratch((wanted.len(), size))?;
            self.query.forward(&input, &queries)?;
            if !self.time_out.is_empty() {
                let scale = |&(row, offset): &(&Row, usize)| self.time_out[row.at as usize + offset];
                linear::scale_rows(&input, &places.iter().map(scale).collect::<Vec<_>>())?;
            }
            self.linear.forward_to(&input, logits)?;
            let logs = step.logs(0);
            let text = |&(row, offset): &(&Row, usize)| self.text(&logs[row.into.0 as usize], row, offset);
            let texts: Vec<_> = places.iter().map(text).collect();
            linear::read(&queries, |queries| kernels::copy(queries, &texts, logits))?;
        }
        // 3. only the window is kept
        self.forget(step);
        Ok(())
    }
}
