//! Attention over the whole text with DeepEmbed keys and values, of v7b and the v8 hybrid.
//!
//! What a sequence keeps of a token is its id and two short vectors, of which the token's key and value are made whenever
//! a later token looks back: the state stays small, and each token costs work in proportion to the text before it.
//!
//! The state grows by 4 (1 + r + r') bytes for each token and layer, r and r' being the lengths of the short vectors: with
//! 12 layers and vectors of 32 these are 3,120 bytes a token. A text has at most [`CONTEXT`] tokens, at that rate 204 MB.

use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};

use super::Error;
use super::block::{Carry, Mixer, Step, token_shift};
use super::deep_embed::DeepEmbed;
use super::kernels::{self, Queries, Stretch};
use super::linear::{self, LayerNorm, Linear, floats_mut};
use super::v7::TimeMix;
use super::workspace::Workspace;
use crate::types::{Row, Segment};

/// Tokens that a sequence can have. The files name no limit; they were trained on 4096 at once.
const CONTEXT: usize = 1 << 16;

/// Tokens of a text whose keys and values are made at a time.
const STRETCH: usize = 256;

/// v7's attention, and attention over the text beside it: their results are added.
pub struct Beside {
    pub time_mix: TimeMix,
    pub attention: EmbedAttention,
}

impl Mixer for Beside {
    fn segments(&self) -> Vec<Segment> {
        let mut segments = self.time_mix.segments();
        segments.extend(self.attention.segments());
        segments
    }

    fn forward(&self, x: &Tensor, step: &mut Step, carry: &mut Carry) -> Result<Tensor, Error> {
        let out = self.time_mix.forward(x, step, carry)?;
        let first = self.time_mix.segments().len();
        linear::add(&out, &self.attention.forward(step, first)?)?;
        Ok(out)
    }
}

/// `softmax(cap · tanh(q · k / (16 cap))) · v`, of one head.
pub struct EmbedAttention {
    /// What the names of its segments begin with.
    pub prefix: String,
    /// `C → D`.
    pub query: Linear,
    /// `[D]`: of the token shift of queries; empty without.
    pub query_mix: Vec<f32>,
    pub query_norm: LayerNorm,
    pub key: Side,
    pub value: Side,
    pub cap: f32,
    pub vocabulary: usize,
}

/// How keys or values, W wide, are kept and made: `ln(shift(f(x · down · up) · table[id]))`.
pub struct Side {
    /// `C → r`: what is kept.
    pub down: Linear,
    /// `r → W`.
    pub up: Linear,
    /// Whether f is tanh, or nothing.
    pub tanh: bool,
    /// `[V, W]`.
    pub table: DeepEmbed,
    /// `[W]`: of the token shift; zeros without.
    pub mix: Vec<f32>,
    pub norm: LayerNorm,
}

impl EmbedAttention {
    fn segments(&self) -> Vec<Segment> {
        let (prefix, size) = (&self.prefix, self.query.outputs());
        let shift = Segment::Fixed { name: format!("{prefix}.shift"), shape: vec![size], init: 0.0 };
        let text = Segment::Log { name: self.log_name(), width: self.entry(), cap: Some(CONTEXT), ids: Some(0) };
        if self.query_mix.is_empty() { vec![text] } else { vec![shift, text] }
    }

    fn log_name(&self) -> String {
        format!("{}.text", self.prefix)
    }

    /// f32 values that are kept of a token: its id (exact, as ids are below 2²⁴), of its key, of its value.
    fn entry(&self) -> usize {
        1 + self.key.down.outputs() + self.value.down.outputs()
    }

    /// The residual stream → what is added to it, `[N, C]`; its segments are the mixer's from the `first` on.
    fn forward(&self, step: &mut Step, first: usize) -> Result<Tensor, Error> {
        let (x, rows) = (step.residual, step.rows);
        let (tokens, width) = x.dims2()?;
        // 1. q
        let mut raw = step.work.scratch((tokens, self.query.outputs()))?;
        self.query.forward(x, &raw)?;
        if !self.query_mix.is_empty() {
            raw = token_shift(&raw, &self.query_mix, first, step)?.get(0)?;
        }
        let queries = step.work.scratch(raw.shape())?;
        self.query_norm.forward(&raw, &queries)?;
        // 2. what is kept of each token
        let log = first + self.segments().len() - 1;
        self.remember(x, step, log)?;
        // 3. each row looks back over its text
        let sums = step.work.scratch((tokens, 1 + width))?;
        write(&sums, |sums| {
            sums.fill(0.0);
            Ok(())
        })?;
        let keys = Buffers::take(&self.key, step.work)?;
        let values = Buffers::take(&self.value, step.work)?;
        let logs = step.logs(log);
        for row in rows {
            let (queries, sums) = (narrow(&queries, row)?, narrow(&sums, row)?);
            self.look_back(&logs[row.into.0 as usize], row.at as usize, (&queries, &sums), (&keys, &values))?;
        }
        // 4. the mean
        let out = step.work.scratch((tokens, width))?;
        write(&out, |out| linear::read(&sums, |sums| kernels::mean_of(sums, out, width)))?;
        Ok(out)
    }

    /// Adds the entries of the step's tokens to the rows' logs, which hold one for each token before.
    fn remember(&self, x: &Tensor, step: &mut Step, log: usize) -> Result<(), Error> {
        let (rows, ids, entry) = (step.rows, step.ids, self.entry());
        let (key, value) = (self.key.down.outputs(), self.value.down.outputs());
        let keys = step.work.scratch((ids.len(), key))?;
        self.key.down.forward(x, &keys)?;
        let values = step.work.scratch((ids.len(), value))?;
        self.value.down.forward(x, &values)?;
        let logs = step.logs(log);
        let vocabulary = self.vocabulary as f32;
        for row in rows {
            let log = &mut logs[row.into.0 as usize];
            let wrong = |why: String| Err(Error::State(self.log_name(), why));
            let entries = log.len() / entry;
            if entries as u64 != row.at {
                return wrong(format!("{entries} tokens do not go on at position {}", row.at));
            }
            // What a file held must not become a bad index.
            if !log.chunks_exact(entry).all(|entry| (0.0..vocabulary).contains(&entry[0])) {
                return wrong("it holds a token outside the vocabulary".into());
            }
            let mut append = |keys: &[f32], values: &[f32]| {
                for token in row.tokens.clone() {
                    log.push(ids[token] as f32);
                    log.extend_from_slice(&keys[token * key..][..key]);
                    log.extend_from_slice(&values[token * value..][..value]);
                }
            };
            linear::read(&keys, |keys| linear::read(&values, |values| append(keys, values)))??;
        }
        Ok(())
    }

    /// Adds what successive queries, the first at the position `at`, see in the `log` to their sums.
    fn look_back(
        &self,
        log: &[f32],
        at: usize,
        (queries, sums): (&Tensor, &Tensor),
        (keys, values): (&Buffers, &Buffers),
    ) -> Result<(), Error> {
        let (entry, key, width) = (self.entry(), self.key.down.outputs(), self.value.up.outputs());
        for (n, entries) in log.chunks(STRETCH * entry).enumerate() {
            let ids: Vec<u32> = entries.chunks_exact(entry).map(|entry| entry[0] as u32).collect();
            let kept = |range: std::ops::Range<usize>| -> Vec<f32> {
                entries.chunks_exact(entry).flat_map(|entry| &entry[range.clone()]).copied().collect()
            };
            let keys = self.key.make(&kept(1..1 + key), &ids, keys, n == 0)?;
            let values = self.value.make(&kept(1 + key..entry), &ids, values, n == 0)?;
            write(sums, |sums| {
                linear::read(queries, |queries| {
                    let queries = Queries { at, values: queries, cap: self.cap };
                    linear::read(&keys, |keys| {
                        linear::read(&values, |values| {
                            let text = Stretch { at: n * STRETCH, keys, values };
                            kernels::attend(&queries, &text, sums, width);
                        })
                    })
                })??
            })?;
        }
        Ok(())
    }
}

/// Where keys or values of a stretch are made.
struct Buffers {
    /// `[STRETCH, r]`.
    kept: Tensor,
    /// `[1 + STRETCH, W]`: what the token shift mixes; first the last token of the stretch before.
    raw: Tensor,
    /// `[STRETCH, W]` each.
    mixed: Tensor,
    made: Tensor,
}

impl Buffers {
    fn take(side: &Side, work: &mut Workspace) -> Result<Self, Error> {
        let width = side.up.outputs();
        Ok(Self {
            kept: work.scratch((STRETCH, side.down.outputs()))?,
            raw: work.scratch((1 + STRETCH, width))?,
            mixed: work.scratch((STRETCH, width))?,
            made: work.scratch((STRETCH, width))?,
        })
    }
}

impl Side {
    /// Makes the keys or values `[n, W]` of what was `kept [n, r]` of the tokens `ids [n]`, which go on where the last call
    /// ended, or at the `start` of a text.
    fn make(&self, kept: &[f32], ids: &[u32], buffers: &Buffers, start: bool) -> Result<Tensor, Error> {
        let (count, width) = (ids.len(), self.up.outputs());
        let first = |tensor: &Tensor| tensor.narrow(0, 0, count);
        let (input, mixed, made) = (first(&buffers.kept)?, first(&buffers.mixed)?, first(&buffers.made)?);
        write(&input, |input| {
            input.copy_from_slice(kept);
            Ok(())
        })?;
        write(&buffers.raw, |raw| {
            if start {
                raw[..width].fill(0.0)
            } else {
                raw.copy_within(STRETCH * width.., 0)
            }
            Ok(())
        })?;
        let raw = buffers.raw.narrow(0, 1, count)?;
        self.up.forward(&input, &raw)?;
        if self.tanh {
            write(&raw, |raw| {
                kernels::tanh_all(raw);
                Ok(())
            })?;
        }
        self.table.scale(&raw, ids)?;
        write(&mixed, |mixed| {
            linear::read(&buffers.raw, |raw| {
                let before = |token: usize| &raw[token * width..][..width];
                kernels::token_shift(&raw[width..][..count * width], &self.mix, width, &before, mixed);
            })
        })?;
        self.norm.forward(&mixed, &made)?;
        Ok(made)
    }
}

/// The row's part of `x [N, …]`.
fn narrow(x: &Tensor, row: &Row) -> candle_core::Result<Tensor> {
    x.narrow(0, row.tokens.start, row.tokens.len())
}

struct Write<F>(F);

impl<F: Fn(&mut [f32]) -> candle_core::Result<()>> InplaceOp1 for Write<F> {
    fn name(&self) -> &'static str {
        "write"
    }
    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        (self.0)(floats_mut(x, layout)?)
    }
}

/// Lets `f` write the values of a contiguous tensor.
fn write(x: &Tensor, f: impl Fn(&mut [f32]) -> candle_core::Result<()>) -> candle_core::Result<()> {
    x.inplace_op1(&Write(f))
}
