//! RWKV-5: v5.0, v5.1, and v5.2 "Eagle".
//!
//! Tensor names and formulas are those of BlinkDL/ChatRWKV: `att_one_v5` and, for v5.1 and v5.2, `att_one_v5_1` in the `rwkv`
//! package (`rwkv_pip_package/src/rwkv/model.py`), and `RWKV_v5_demo.py`. C = width, H = heads, N = head size, T = tokens of the
//! step.
//!
//! | | decay | bonus | gate |
//! |---|---|---|---|
//! | v5.0 | `[H]` | `exp(time_first [H])` | no |
//! | v5.1 | `[H]` | `time_faaaa [H]` | yes |
//! | v5.2 | `[H, N]` | `time_faaaa [H, N]` | yes |

use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};

use super::Error;
use super::block::{Carry, Mixer, Sizes, Step, time_mixes, token_shift};
use super::generation::{BASE, Generation};
use super::kernels::{self, Shared, Wkv5Inputs, Wkv5Params};
use super::linear::{Linear, Orientation, floats, floats_mut, planes};
use super::v4::channel_mix;
use super::weights::{Checkpoint, Loader};
use crate::types::{Row, Segment};

pub const V5_0: Generation = Generation { name: "v5.0", detect: |file| version(file) == Some("v5.0"), ..V5 };
pub const V5_1: Generation = Generation { name: "v5.1", detect: |file| version(file) == Some("v5.1"), ..V5 };
pub const V5_2: Generation = Generation { name: "v5.2", detect: |file| version(file) == Some("v5.2"), ..V5 };

const V5: Generation = Generation {
    mixers: |loader, layer, sizes| {
        let ffn = channel_mix(loader, &format!("blocks.{layer}.ffn"), sizes)?;
        Ok((Box::new(TimeMix::load(loader, layer, sizes)?), ffn))
    },
    ..BASE
};

fn version(checkpoint: &Checkpoint) -> Option<&'static str> {
    let att = |name: &str| checkpoint.shape(&format!("blocks.0.att.{name}"));
    // v4 has no `ln_x`, v6 and v7 no `time_mix_k`.
    let (Some(_), Some(_), Some(decay)) = (att("ln_x.weight"), att("time_mix_k"), att("time_decay")) else {
        return None;
    };
    match (decay, att("gate.weight")) {
        ([_, _], _) => Some("v5.2"),
        (_, Some(_)) => Some("v5.1"),
        (_, None) => Some("v5.0"),
    }
}

/// Attention's place in a block: the matrix-valued state, with a decay that is the same for all tokens.
struct TimeMix {
    heads: Heads,
    /// `[3, C]` or `[4, C]`: time_mix_r, time_mix_k, time_mix_v and, with a gate, time_mix_g.
    mixes: Vec<f32>,
    receptance: Linear,
    key: Linear,
    value: Linear,
    gate: Option<Linear>,
    output: Linear,
    /// `[C]`: exp(-exp(time_decay)).
    decay: Vec<f32>,
}

impl TimeMix {
    fn load(loader: &Loader, layer: usize, sizes: &Sizes) -> Result<Self, Error> {
        let c = sizes.width;
        let prefix = format!("blocks.{layer}.att");
        let att = |name: &str| format!("{prefix}.{name}");
        let square = |name: &str| Linear::load(loader, &att(name), c, c, Orientation::OutIn);
        let expected = format!("[heads] or [heads, head size] of a width of {c}");
        let shape = loader.shape(&att("time_decay"), &expected)?.to_vec();
        let (heads, head_size) = match shape[..] {
            [h] if c.is_multiple_of(h) => (h, c / h),
            [h, n] if h.checked_mul(n) == Some(c) => (h, n),
            _ => return Err(Error::Shape { name: att("time_decay"), found: shape, expected }),
        };
        // One value for each head stands for all channels of it.
        let spread = |values: Vec<f32>| -> Vec<f32> {
            values.iter().flat_map(|&v| std::iter::repeat_n(v, c / values.len())).collect()
        };
        let bonus = if loader.has(&att("time_first")) {
            loader.values(&att("time_first"), &shape)?.into_iter().map(f32::exp).collect()
        } else {
            loader.values(&att("time_faaaa"), &shape)?
        };
        let decay = loader.values(&att("time_decay"), &shape)?.into_iter().map(|w| (-w.exp()).exp()).collect();
        let gated = loader.has(&att("gate.weight"));
        let names = ["time_mix_r", "time_mix_k", "time_mix_v", "time_mix_g"];
        Ok(Self {
            heads: Heads::load(loader, layer, (heads, head_size), spread(bonus))?,
            mixes: time_mixes(loader, &prefix, if gated { &names } else { &names[..3] }, c)?,
            receptance: square("receptance.weight")?,
            key: square("key.weight")?,
            value: square("value.weight")?,
            gate: gated.then(|| square("gate.weight")).transpose()?,
            output: square("output.weight")?,
            decay: spread(decay),
        })
    }
}

impl Mixer for TimeMix {
    fn segments(&self) -> Vec<Segment> {
        self.heads.segments()
    }

    fn forward(&self, x: &Tensor, step: &mut Step, _: &mut Carry) -> Result<Tensor, Error> {
        let (tokens, width) = x.dims2()?;
        // 1. xr, xk, xv, xg = x · mix + x_prev · (1 - mix)
        let mixed = token_shift(x, &self.mixes, 0, step)?;
        let [xr, xk, xv] = planes(&mixed)?;
        // 2. the linear layers, each into its plane
        let inputs = step.work.scratch((4, tokens, width))?;
        let [r, k, v, g] = planes(&inputs)?;
        self.receptance.forward(&xr, &r)?;
        self.key.forward(&xk, &k)?;
        self.value.forward(&xv, &v)?;
        if let Some(gate) = &self.gate {
            gate.forward(&mixed.get(3)?, &g)?;
        }
        // 3. the recurrence
        let y = self.heads.recur(&inputs, self.gate.is_some(), Some(&self.decay), step)?;
        // 4. the output layer
        let out = step.work.scratch((tokens, width))?;
        self.output.forward(&y, &out)?;
        Ok(out)
    }
}

/// The recurrence of v5 and v6: the state of all heads, what reads it and the group norm behind it.
pub struct Heads {
    layer: usize,
    heads: usize,
    head_size: usize,
    /// `[C]`: the weight of the token itself, by key channel.
    bonus: Vec<f32>,
    /// `[C]` each.
    ln_x_weight: Vec<f32>,
    ln_x_bias: Vec<f32>,
}

/// Group norm of the read-out: 1e-5 times the square of the trainer's `head_size_divisor` of 8.
const LN_X_EPS: f32 = 64e-5;

impl Heads {
    pub fn load(
        loader: &Loader,
        layer: usize,
        (heads, head_size): (usize, usize),
        bonus: Vec<f32>,
    ) -> Result<Self, Error> {
        let vector = |name: &str| loader.values(&format!("blocks.{layer}.att.{name}"), &[heads * head_size]);
        let (ln_x_weight, ln_x_bias) = (vector("ln_x.weight")?, vector("ln_x.bias")?);
        Ok(Self { layer, heads, head_size, bonus, ln_x_weight, ln_x_bias })
    }

    /// The token shift of the layer's attention, and the state `[H, K, V]`.
    pub fn segments(&self) -> Vec<Segment> {
        let (layer, h, n) = (self.layer, self.heads, self.head_size);
        vec![
            Segment::Fixed { name: format!("blocks.{layer}.att.shift"), shape: vec![h * n], init: 0.0 },
            Segment::Fixed { name: format!("blocks.{layer}.att.wkv"), shape: vec![h, n, n], init: 0.0 },
        ]
    }

    /// `inputs [P, T, C]` (r, k, v, g if there is a gate, the tokens' decays if `decay [C]` is not given) → `[T, C]`.
    pub fn recur(&self, inputs: &Tensor, gated: bool, decay: Option<&[f32]>, step: &mut Step) -> Result<Tensor, Error> {
        let states = step.segment(1);
        let y = step.work.scratch((step.tokens(), self.heads * self.head_size))?;
        for rows in step.waves {
            y.inplace_op2(inputs, &Wkv { heads: self, gated, decay, rows, states })?;
        }
        Ok(y)
    }
}

struct Wkv<'a> {
    heads: &'a Heads,
    gated: bool,
    decay: Option<&'a [f32]>,
    rows: &'a [Row],
    states: Shared,
}

impl InplaceOp2 for Wkv<'_> {
    fn name(&self) -> &'static str {
        "wkv5"
    }
    fn cpu_fwd(&self, out: &mut CpuStorage, out_l: &Layout, x: &CpuStorage, x_l: &Layout) -> candle_core::Result<()> {
        let (x, out) = (floats(x, x_l)?, floats_mut(out, out_l)?);
        let plane = |p: usize| &x[p * out.len()..][..out.len()];
        let inputs = Wkv5Inputs {
            r: plane(0),
            k: plane(1),
            v: plane(2),
            g: self.gated.then(|| plane(3)),
            decay: self.decay.unwrap_or_else(|| plane(4)),
        };
        let heads = self.heads;
        let params = Wkv5Params {
            bonus: &heads.bonus,
            ln_x_weight: &heads.ln_x_weight,
            ln_x_bias: &heads.ln_x_bias,
            eps: LN_X_EPS,
        };
        kernels::wkv5(&params, heads.head_size, &inputs, self.rows, self.states, out);
        Ok(())
    }
}
