//! L1: which token comes next. Pure: the same logits, parameters, memory and coin give the same token.

mod adjust;
mod candidates;
mod counts;
mod weights;

use crate::types::Sampling;
use candidates::Candidates;

pub use counts::Counts;

/// Why no token could be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing a client can ask for leads here; the model's arithmetic has broken down.
    #[error("every logit is NaN or -inf")]
    NoToken,
}

/// Chooses the next token from `logits` (one for each id of the vocabulary; spoiled by the call).
///
/// In this order:
/// 1. `logit_bias`: added; at -100 or less the token is banned (unless nothing else is possible), at 100 or more only
///    such tokens are possible (unless they are not). Ids beyond the vocabulary are passed over, here and below.
/// 2. `repetition_penalty`, once for each id that occurs in `tail`: the last ids of the sequence, prompt included.
/// 3. `presence_penalty` and `frequency_penalty` by the `counts` of the response so far.
/// 4. `temperature`. At 0 the most likely token is the result, the lowest id of several.
/// 5. `top_k`, then `top_p` of what is left, then `min_p`.
/// 6. The draw: the tokens that are left lie from 0 to 1 by descending probability, equal ones by ascending id, each as
///    wide as its probability; `coin`, in `0.0..1.0`, points at the result.
///
/// A logit of NaN counts as -inf, which is never chosen; +inf beats all others.
pub fn sample(logits: &mut [f32], params: &Sampling, counts: &Counts, tail: &[u32], coin: f64) -> Result<u32, Error> {
    debug_assert!((0.0..1.0).contains(&coin), "a coin of {coin}");
    adjust::bias(logits, &params.logit_bias);
    adjust::penalise_repetition(logits, params.repetition_penalty, tail);
    adjust::penalise_occurrence(logits, params, counts);

    if params.temperature == 0.0 {
        return candidates::best(logits).ok_or(Error::NoToken);
    }
    let mut candidates = Candidates::new(logits, params.temperature, params.top_k).ok_or(Error::NoToken)?;
    candidates.top_p(params.top_p);
    candidates.min_p(params.min_p);
    Ok(candidates.draw(coin))
}
