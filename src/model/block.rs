//! The skeleton all generations share: `emb → ln0 → [ln1 → mixer 1 → residual; ln2 → mixer 2 → residual] × L → head`.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Tensor};

use super::kernels::{self, Shared, Weight};
use super::linear::{self, LayerNorm, Linear, Orientation, floats, floats_mut};
use super::pool::Pool;
use super::weights::{Checkpoint, Loader};
use super::workspace::Workspace;
use super::{Error, arithmetic, chains};
use crate::types::{Row, Segment, SegmentData, SlotId, Want};

/// Half of a block: reads its share of a sequence's state and the tokens before, gives what is added to the residual.
pub trait Mixer: Send {
    /// The state it keeps for each sequence, in the order in which `forward` asks for it.
    fn segments(&self) -> Vec<Segment>;

    /// `x [N, C]` (normalised) → `[N, C]`, in a scratch buffer.
    fn forward(&self, x: &Tensor, step: &mut Step, carry: &mut Carry) -> Result<Tensor, Error>;
}

/// What makes logits of the residual stream: the last norm, the output layer and what a generation adds to them.
pub trait Head: Send {
    /// As [`Mixer::segments`].
    fn segments(&self) -> Vec<Segment> {
        Vec::new()
    }

    /// `x [N, C]`, the residual stream of every token → `logits [M, V]` after the tokens `wanted` (M of them, perhaps none).
    fn forward(&self, x: &Tensor, wanted: &[usize], step: &mut Step, logits: &mut [f32]) -> Result<(), Error>;
}

/// The head of v4 and later: `ln_out` and a linear layer.
pub struct LinearHead {
    pub ln_out: LayerNorm,
    pub linear: Linear,
}

impl LinearHead {
    pub fn load(loader: &Loader, sizes: &Sizes) -> Result<Box<dyn Head>, Error> {
        let linear = Linear::load(loader, "head.weight", sizes.vocabulary, sizes.width, Orientation::OutIn)?;
        Ok(Box::new(Self { ln_out: LayerNorm::load(loader, "ln_out", sizes.width)?, linear }))
    }
}

impl Head for LinearHead {
    fn forward(&self, x: &Tensor, wanted: &[usize], step: &mut Step, logits: &mut [f32]) -> Result<(), Error> {
        let (_, width) = x.dims2()?;
        let rows = gather(x, wanted, step)?;
        let normed = step.work.scratch((wanted.len(), width))?;
        self.ln_out.forward(&rows, &normed)?;
        Ok(self.linear.forward_to(&normed, logits)?)
    }
}

/// The rows `wanted` of `x [N, C]`, in a scratch buffer.
pub fn gather(x: &Tensor, wanted: &[usize], step: &mut Step) -> Result<Tensor, Error> {
    let (_, width) = x.dims2()?;
    let out = step.work.scratch((wanted.len(), width))?;
    if !wanted.is_empty() {
        out.inplace_op2(x, &Gather { rows: wanted, width })?;
    }
    Ok(out)
}

/// Sizes that every generation has.
pub struct Sizes {
    pub layers: usize,
    pub width: usize,
    pub vocabulary: usize,
}

impl Sizes {
    /// The sizes of a checkpoint whose embedding table has this name.
    pub fn of(checkpoint: &Checkpoint, name: &str) -> Result<Self, Error> {
        let Some(&[vocabulary, width]) = checkpoint.shape(name) else {
            return Err(Error::Unknown(format!("it has no matrix `{name}` of vocabulary × width")));
        };
        let number = |name: &String| name.strip_prefix("blocks.")?.split_once('.')?.0.parse::<usize>().ok();
        let layers = checkpoint.tensors().keys().filter_map(number).max().map_or(0, |last| last.saturating_add(1));
        if vocabulary == 0 || width == 0 || layers == 0 || layers > checkpoint.tensors().len() {
            return Err(Error::Unknown(format!("{layers} layers, width {width}, vocabulary {vocabulary}")));
        }
        Ok(Self { layers, width, vocabulary })
    }
}

/// How a mixer's result joins the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// `x = x + f(ln(x))`.
    Plain,
    /// `x = ln(x); x = x + f(x)`: the stream itself is normalised (v2).
    Normed,
}

/// What one layer hands on to later ones within a step.
#[derive(Default)]
pub struct Carry {
    /// The first layer's value, `[N, C]` (v7's value residual).
    pub first_value: Option<Tensor>,
}

/// One step as a mixer sees it.
pub struct Step<'a> {
    pub rows: &'a [Row],
    /// The same rows in the order in which a recurrence must walk them, see [`chains::waves`].
    pub waves: &'a [Vec<Row>],
    /// The ids of the rows' tokens.
    pub ids: &'a [u32],
    /// For each token, the slot to read its predecessor from, when that is no token of the step.
    pub first: &'a [Option<u32>],
    /// The residual stream as it is before the mixer, `[N, C]`.
    pub residual: &'a Tensor,
    pub work: &'a mut Workspace,
    pool: &'a mut Pool,
    /// Index of the mixer's first segment in the pool.
    base: usize,
}

impl Step<'_> {
    /// All slots of the mixer's `n`-th segment, a fixed one.
    pub fn segment(&mut self, n: usize) -> Shared {
        self.pool.shared(self.base + n)
    }

    /// The mixer's `n`-th segment, a log: one buffer for each slot. A row's is already in its `into`.
    pub fn logs(&mut self, n: usize) -> &mut [Vec<f32>] {
        self.pool.logs(self.base + n)
    }

    /// Tokens in the step.
    pub fn tokens(&self) -> usize {
        self.first.len()
    }
}

/// `out [mixes, N, C]` = the token shift of `x [N, C]` with each of the `mixes` (`[mixes, C]`); what the next step needs of
/// `x` goes into the mixer's `segment`-th state segment (`[C]`).
pub fn token_shift(x: &Tensor, mixes: &[f32], segment: usize, step: &mut Step) -> Result<Tensor, Error> {
    let (tokens, width) = x.dims2()?;
    let out = step.work.scratch((mixes.len() / width, tokens, width))?;
    let state = step.segment(segment);
    out.inplace_op2(x, &TokenShift { mixes, added: false, state, first: step.first, keep: step.rows })?;
    Ok(out)
}

/// As [`token_shift`], but the segment stays as it is: for a mixer that shifts the same tokens once more.
pub fn token_shift_ahead(x: &Tensor, mixes: &[f32], segment: usize, step: &mut Step) -> Result<Tensor, Error> {
    let (tokens, width) = x.dims2()?;
    let out = step.work.scratch((mixes.len() / width, tokens, width))?;
    let state = step.segment(segment);
    out.inplace_op2(x, &TokenShift { mixes, added: false, state, first: step.first, keep: &[] })?;
    Ok(out)
}

/// As [`token_shift`] with mixes of each token's own: `out [mixes, N, C]` holds what is added to `mixes`, and then the result.
pub fn token_shift_added(
    x: &Tensor,
    mixes: &[f32],
    out: &Tensor,
    segment: usize,
    step: &mut Step,
) -> Result<(), Error> {
    let state = step.segment(segment);
    Ok(out.inplace_op2(x, &TokenShift { mixes, added: true, state, first: step.first, keep: step.rows })?)
}

/// The mixes `{prefix}.{name}` of v2 to v5, `[names, C]`, as [`token_shift`] takes them: these files store the share of the
/// token itself, not that of the one before.
pub fn time_mixes(loader: &Loader, prefix: &str, names: &[&str], width: usize) -> Result<Vec<f32>, Error> {
    let mut mixes = Vec::with_capacity(names.len() * width);
    for name in names {
        let own = loader.values(&format!("{prefix}.{name}"), &[width])?;
        mixes.extend(own.into_iter().map(|share| 1.0 - share));
    }
    Ok(mixes)
}

struct TokenShift<'a> {
    /// `[mixes, C]`.
    mixes: &'a [f32],
    /// Whether `out` holds what is added to the mixes.
    added: bool,
    state: Shared,
    first: &'a [Option<u32>],
    /// The rows whose last token goes into the state.
    keep: &'a [Row],
}

impl InplaceOp2 for TokenShift<'_> {
    fn name(&self) -> &'static str {
        "token shift"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> candle_core::Result<()> {
        let (x, out) = (floats(x, x_l)?, floats_mut(out, out_l)?);
        let width = x.len() / self.first.len();
        let previous = |token: usize| -> &[f32] {
            match self.first[token] {
                // SAFETY: slots are only read here; they are written below, after all tokens are done.
                Some(slot) => unsafe { self.state.part(slot as usize * width, width) },
                None => &x[(token - 1) * width..][..width],
            }
        };
        let shift = if self.added { kernels::token_shift_added } else { kernels::token_shift };
        shift(x, self.mixes, width, &previous, out);
        for row in self.keep {
            // SAFETY: one row at a time, nothing else is alive.
            let kept = unsafe { self.state.part(row.into.0 as usize * width, width) };
            kept.copy_from_slice(&x[(row.tokens.end - 1) * width..][..width]);
        }
        Ok(())
    }
}

/// Generation, sizes and identity of a loaded model.
#[derive(Clone, Debug)]
pub struct Description {
    /// `v7`, …
    pub generation: &'static str,
    pub layers: usize,
    pub width: usize,
    pub vocabulary: usize,
    pub parameters: u64,
    /// Memory that the weights take, in the types they are served in.
    pub weight_bytes: u64,
    pub fingerprint: String,
    pub arithmetic: &'static str,
    /// Bytes of one sequence's state, what grows with the text not counted.
    pub state_bytes: u64,
    /// Bytes by which it grows with every token, as far as it does.
    pub state_bytes_per_token: u64,
    /// Tokens a sequence can have, where the model has such a limit.
    pub context: Option<usize>,
}

/// One layer.
pub struct Block {
    pub ln1: LayerNorm,
    pub mixer1: Box<dyn Mixer>,
    pub ln2: LayerNorm,
    pub mixer2: Box<dyn Mixer>,
}

/// What a model computes with.
pub struct Parts {
    /// `[V, C]`, in its stored type; ln0 is applied as tokens are looked up, in f32.
    pub embedding: Weight<'static>,
    /// Not in v1 and v2.
    pub ln0: Option<LayerNorm>,
    pub residual: Residual,
    pub blocks: Vec<Block>,
    pub head: Box<dyn Head>,
}

/// A loaded model of any generation.
pub struct Model {
    description: Description,
    parts: Parts,
    segments: Vec<Segment>,
    initial: Vec<SegmentData>,
    work: Workspace,
}

impl Model {
    /// Puts a model together; what follows from the parts is added to the `description`.
    pub(super) fn new(mut description: Description, parts: Parts) -> Self {
        let mut segments = Vec::new();
        for block in &parts.blocks {
            segments.extend(block.mixer1.segments());
            segments.extend(block.mixer2.segments());
        }
        segments.extend(parts.head.segments());
        description.state_bytes = 4 * segments.iter().map(Segment::values).sum::<usize>() as u64;
        let width = |segment: &Segment| if let Segment::Log { width, .. } = segment { *width } else { 0 };
        description.state_bytes_per_token = 4 * segments.iter().map(width).sum::<usize>() as u64;
        description.context =
            segments.iter().filter_map(|s| if let Segment::Log { cap, .. } = s { *cap } else { None }).min();
        description.arithmetic = arithmetic();
        Self { description, parts, segments, initial: Vec::new(), work: Workspace::default() }
    }

    pub fn description(&self) -> &Description {
        &self.description
    }

    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Says what was read: the weights' fingerprint and size, and the state a fresh sequence starts from where it is not the
    /// segments' own `init`.
    pub(super) fn complete(&mut self, fingerprint: String, weight_bytes: u64, initial: Vec<SegmentData>) {
        self.description.fingerprint = fingerprint;
        self.description.weight_bytes = weight_bytes;
        self.initial = initial;
    }

    /// A pool of `slots` states of this model.
    pub fn pool(&self, slots: usize) -> Result<Pool, Error> {
        Pool::new(&self.segments, &self.initial, slots)
    }

    /// The state of a fresh sequence, in segment order.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn fresh(&self) -> Result<Vec<SegmentData>, Error> {
        self.fresh_from(&self.initial)
    }

    /// As [`fresh`](Self::fresh), of a sequence that starts from `initial` instead of the model's own.
    pub(super) fn fresh_from(&self, initial: &[SegmentData]) -> Result<Vec<SegmentData>, Error> {
        let (mut pool, slot) = (Pool::new(&self.segments, initial, 1)?, SlotId(0));
        pool.reset(slot);
        Ok(pool.snapshot(slot))
    }

    /// Runs one step: reads and writes the rows' slots of `pool`; `logits` becomes those that rows want, `[V]` each, in the
    /// order of rows and tokens.
    ///
    /// # Errors
    /// [`Error::TokenRange`], [`Error::Context`], [`Error::Step`] before anything is changed. After any other error the
    /// written slots hold nothing of use.
    pub fn step(&mut self, pool: &mut Pool, ids: &[u32], rows: &[Row], logits: &mut Vec<f32>) -> Result<(), Error> {
        let (first, wanted) = self.check(pool, ids, rows)?;
        let (tokens, width) = (ids.len(), self.description.width);
        self.work.release_all();
        pool.fork_logs(rows);
        let waves = &chains::waves(rows);

        // 1. x = ln0(emb[ids])
        let x = self.work.held((tokens, width))?;
        x.inplace_op1(&Embed { ids, table: &self.parts.embedding, ln0: self.parts.ln0.as_ref(), width })?;
        let normed = self.work.held((tokens, width))?;

        // 2. the blocks
        let mut carry = Carry::default();
        let mut base = 0;
        for block in &self.parts.blocks {
            for (norm, mixer) in [(&block.ln1, &block.mixer1), (&block.ln2, &block.mixer2)] {
                norm.forward(&x, &normed)?;
                if self.parts.residual == Residual::Normed {
                    linear::copy(&x, &normed)?;
                }
                let (first, work) = (&first, &mut self.work);
                let mut step = Step { rows, waves, ids, first, residual: &x, work, pool, base };
                let y = mixer.forward(&normed, &mut step, &mut carry)?;
                linear::add(&x, &y)?;
                self.work.release_scratch();
                base += mixer.segments().len();
            }
        }

        // 3. logits = head(x), where wanted; a head may have a state of its own to keep up
        logits.resize(wanted.len() * self.description.vocabulary, 0.0);
        if wanted.is_empty() && self.parts.head.segments().is_empty() {
            return Ok(());
        }
        let mut step = Step { rows, waves, ids, first: &first, residual: &x, work: &mut self.work, pool, base };
        self.parts.head.forward(&x, &wanted, &mut step, logits)
    }

    /// Checks the contract of a step; gives each token's predecessor slot and the tokens whose logits are wanted.
    #[allow(clippy::type_complexity)]
    fn check(&self, pool: &Pool, ids: &[u32], rows: &[Row]) -> Result<(Vec<Option<u32>>, Vec<usize>), Error> {
        let vocabulary = self.description.vocabulary;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::TokenRange { id, vocabulary });
        }
        let mut first = vec![None; ids.len()];
        let mut wanted = Vec::new();
        let mut at = 0;
        for (n, row) in rows.iter().enumerate() {
            if row.tokens.start != at || row.tokens.is_empty() || row.tokens.end > ids.len() {
                return Err(Error::Step(format!("row {row:?} does not go on at token {at} of {}", ids.len())));
            }
            if row.from.0 as usize >= pool.slots() || row.into.0 as usize >= pool.slots() {
                return Err(Error::Step(format!("row {row:?} names a slot outside the pool of {}", pool.slots())));
            }
            if let Some(most) = self.description.context {
                let position = row.at.saturating_add(row.tokens.len() as u64);
                if position > most as u64 {
                    return Err(Error::Context { position, most });
                }
            }
            at = row.tokens.end;
            let goes_on = n > 0 && row.goes_on(&rows[n - 1]);
            first[row.tokens.start] = (!goes_on).then_some(row.from.0);
            match row.want {
                Want::Nothing => {}
                Want::Last => wanted.push(row.tokens.end - 1),
                Want::All => wanted.extend(row.tokens.clone()),
                Want::From(first) => wanted.extend(row.tokens.clone().skip(first)),
            }
        }
        if at != ids.len() {
            return Err(Error::Step(format!("{} tokens belong to no row", ids.len() - at)));
        }
        if !chains::disjoint(rows) {
            return Err(Error::Step("a slot that one row writes is used by another".into()));
        }
        if self.description.state_bytes_per_token > 0 && chains::any(rows) {
            return Err(Error::Step("a state that grows is not left on the way of a step".into()));
        }
        Ok((first, wanted))
    }
}

struct Embed<'a> {
    ids: &'a [u32],
    table: &'a Weight<'static>,
    ln0: Option<&'a LayerNorm>,
    width: usize,
}

impl InplaceOp1 for Embed<'_> {
    fn name(&self) -> &'static str {
        "embedding"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout) -> candle_core::Result<()> {
        let out = floats_mut(out, out_l)?;
        let mut raw = vec![0f32; self.width];
        for (&id, out) in self.ids.iter().zip(out.chunks_exact_mut(self.width)) {
            match self.ln0 {
                Some(ln0) => {
                    self.table.row(id as usize, &mut raw);
                    ln0.rows(&raw, out);
                }
                None => self.table.row(id as usize, out),
            }
        }
        Ok(())
    }
}

struct Gather<'a> {
    rows: &'a [usize],
    width: usize,
}

impl InplaceOp2 for Gather<'_> {
    fn name(&self) -> &'static str {
        "gather"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> candle_core::Result<()> {
        let (x, out) = (floats(x, x_l)?, floats_mut(out, out_l)?);
        for (&row, out) in self.rows.iter().zip(out.chunks_exact_mut(self.width)) {
            out.copy_from_slice(&x[row * self.width..][..self.width]);
        }
        Ok(())
    }
}
