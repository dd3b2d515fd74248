//! What a turn will do, before anything of it is done: what it reads, from where, and the jobs that makes.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::initial::Fresh;
use super::origin::{Origin, Parent};
use super::prefix::{PrefixCache, Reader};
use super::prompt::{self, Reading};
use super::streams::Facts;
use super::{Cached, Error, Input, Model, Sessions, Turn};
use crate::engine::{self, Job};
use crate::telemetry::clock;
use crate::text::Trim;
use crate::types::Memory;

/// Bytes from which on a text is long.
const LONG_TEXT: usize = 256 << 10;

/// Lets long texts be tokenised one after another: while it is at it, a tokenizer may take a hundred times a text's bytes.
pub(super) struct LongTexts(Arc<Semaphore>);

impl Default for LongTexts {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl LongTexts {
    /// Waits for the turn of a text, if it is long; what this gives is to be kept until it is read.
    async fn enter(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        if bytes < LONG_TEXT {
            return None;
        }
        Some(self.0.clone().acquire_owned().await.expect("it is never closed"))
    }
}

/// A turn that can be run.
pub(super) struct Plan {
    pub model: Arc<Model>,
    pub turn: Turn,
    pub origin: Origin,
    /// What it begins from, if not from a parent.
    pub fresh: Option<Fresh>,
    /// Of each prompt.
    readings: Vec<Reading>,
    max_tokens: u64,
}

/// A job and the index of its first choice among the turn's.
pub(super) type Placed = (Job, usize);

impl Sessions {
    /// Reads what a turn says and checks it against the limits.
    pub(super) async fn plan(&self, turn: Turn, model: Arc<Model>, origin: Origin) -> Result<Plan, Error> {
        let fresh = fresh(&turn, &model, &origin)?;
        let (reader, memory) = (model.clone(), origin.parent.as_ref().map(|parent| parent.memory.clone()));
        let alone = self.long_texts.enter(turn.input.text_bytes()).await;
        // A long text takes a while: not on a thread that serves other requests.
        let reading = tokio::task::spawn_blocking(move || {
            let _alone = alone;
            let readings = prompt::read(&reader, &turn, memory.as_deref());
            (turn, readings)
        });
        let (turn, readings) = reading.await.map_err(|e| Error::Engine(format!("tokenising failed: {e}")))?;
        let readings = readings?;
        let consumed = origin.parent.as_ref().map_or(0, |parent| parent.memory.consumed);
        let max_tokens = self.limit(&turn, &model, consumed, &readings)?;
        Ok(Plan { model, turn, origin, fresh, readings, max_tokens })
    }

    /// Checks a turn against the limits; gives its number of new tokens.
    fn limit(&self, turn: &Turn, model: &Model, consumed: u64, readings: &[Reading]) -> Result<u64, Error> {
        let max_tokens = turn.max_tokens.unwrap_or(self.limits.default_max_tokens.min(self.limits.max_tokens));
        if max_tokens > self.limits.max_tokens {
            let most = self.limits.max_tokens;
            return invalid("max_tokens", &format!("at most {most} new tokens can be asked for, not {max_tokens}"));
        }
        let longest = readings.iter().map(|r| r.ids.len()).max().unwrap_or(0);
        let too_long = |message| Error::Invalid {
            param: if matches!(turn.input, Input::Chat(_)) { "messages" } else { "prompt" },
            code: Some("context_length_exceeded"),
            message,
        };
        if longest > self.limits.prompt_tokens {
            let most = self.limits.prompt_tokens;
            return Err(too_long(format!("the prompt has {longest} tokens and at most {most} are read at once")));
        }
        if let Some(context) = model.card.context {
            let position = consumed + longest as u64;
            // The last token is sampled without having to be read.
            let room = (context as u64 + 1).saturating_sub(position);
            if room == 0 {
                return Err(too_long(format!(
                    "the text would have {position} tokens, and this model's sequences have at most {context}"
                )));
            }
            return Ok(max_tokens.min(room));
        }
        Ok(max_tokens)
    }
}

impl Plan {
    /// How many tokens were read before.
    fn consumed(&self) -> u64 {
        self.origin.parent.as_ref().map_or(0, |parent| parent.memory.consumed)
    }

    /// How many tokens of all prompts are not computed again.
    pub fn cached(&self) -> u64 {
        self.origin.parent.as_ref().map_or(0, Parent::cached) * self.readings.len() as u64
    }

    /// Tokens of the first prompt, with all before it.
    pub fn prompt_tokens(&self) -> u64 {
        self.consumed() + self.readings.first().map_or(0, |reading| reading.ids.len() as u64)
    }

    /// The last id of what is only read.
    pub fn waits(&self) -> Option<u32> {
        self.readings.first().filter(|_| self.max_tokens == 0)?.ids.last().copied()
    }

    /// Where its sequences begin; `None` = as every fresh one.
    fn memory(&self) -> Option<Arc<Memory>> {
        let parent = self.origin.parent.as_ref().map(|parent| parent.memory.clone());
        parent.or_else(|| self.fresh.as_ref()?.memory.clone())
    }

    /// What is known of the response now that it begins.
    pub fn facts(&self, cached_tokens: Cached) -> Facts {
        let Self { model, turn, readings, .. } = self;
        Facts {
            response_id: turn.response_id.clone(),
            model: model.card.id.clone(),
            fingerprint: model.card.fingerprint.clone(),
            created: clock::unix_seconds(),
            seed: turn.sampling.seed,
            prompt_tokens: readings.iter().map(|reading| self.consumed() + reading.ids.len() as u64).sum(),
            cached_tokens,
            choices: readings.len() * turn.choices,
            form: turn.delivery.form.clone(),
        }
    }

    /// What finds for its jobs what was read before.
    pub fn reader(&self, cache: &Arc<PrefixCache>, cached: &Cached) -> Reader {
        let boundaries = self.readings.first().map_or(&[][..], |reading| &reading.boundaries);
        let origin = (self.origin.parent.as_ref(), self.fresh.as_ref());
        Reader::new(cache, &self.turn.tenant, &self.model, origin, boundaries, cached)
    }

    /// The turn's jobs: one for each prompt, but as many as needed where its choices cannot run in one.
    pub fn jobs(&self) -> Vec<Placed> {
        let Self { model, turn, readings, max_tokens, .. } = self;
        let memory = self.memory();
        let chat = matches!(turn.input, Input::Chat(_));
        let mut stop = turn.stop.clone();
        if chat {
            stop.extend(model.profile.stop.iter().cloned());
        }
        let mut jobs = Vec::new();
        for (prompt, reading) in readings.iter().enumerate() {
            // An answer that is read again from the log goes on where it was: not at the start of one.
            let middle = turn.input == Input::Chat(Vec::new()) && !reading.goes_on;
            // A response that goes on may still have to be taken back, each choice's by itself.
            let together = if reading.goes_on { 1 } else { turn.choices.min(model.seats) };
            for first_choice in (0..turn.choices).step_by(together) {
                let job = Job {
                    tenant: turn.tenant.clone(),
                    // Without segments it begins as every fresh sequence of the model.
                    memory: memory.clone().filter(|m| !m.segments.is_empty()),
                    ids: reading.ids.clone(),
                    goes_on: reading.goes_on,
                    choices: together.min(turn.choices - first_choice),
                    first_choice,
                    sampling: turn.sampling.clone(),
                    stop: stop.clone(),
                    stop_tokens: model.profile.stop_tokens.clone(),
                    trim: Trim { start: chat && !middle, end: chat },
                    max_tokens: *max_tokens,
                    keep: turn.store,
                    pause: engine::Pause::default(),
                    replay: engine::Replay::default(),
                    checkpoints: None,
                };
                let job = if *max_tokens == 0 { only_read(job, model) } else { job };
                jobs.push((job, prompt * turn.choices + first_choice));
            }
        }
        jobs
    }
}

/// What a turn without a parent begins from; `None` for a turn that has one.
fn fresh(turn: &Turn, model: &Model, origin: &Origin) -> Result<Option<Fresh>, Error> {
    if origin.parent.is_none() {
        if turn.input == Input::Chat(Vec::new()) {
            let why = "there is nothing to answer: messages may be empty only when a conversation goes on";
            return invalid("messages", why);
        }
        return model.initial.begin(turn.initial_state.as_deref()).map(Some);
    }
    if turn.initial_state.is_some() {
        let why = "a state or session that exists has its own beginning; leave `initial_state` out";
        return invalid("initial_state", why);
    }
    Ok(None)
}

/// Leaves the last id of what is only read to whoever goes on from there. It is then no job for an empty state.
fn only_read(mut job: Job, model: &Model) -> Job {
    job.ids.pop();
    if job.ids.is_empty() && job.memory.is_none() {
        job.memory = Some(model.initial.own());
    }
    job
}

pub(super) fn invalid<T>(param: &'static str, message: &str) -> Result<T, Error> {
    Err(Error::Invalid { param, code: None, message: message.into() })
}

#[cfg(test)]
mod tests {
    use futures::poll;

    use super::*;

    #[tokio::test]
    async fn long_texts_wait_for_each_other_and_short_ones_for_none() {
        let texts = LongTexts::default();
        let first = texts.enter(LONG_TEXT).await;
        let mut second = std::pin::pin!(texts.enter(usize::MAX));
        assert!(poll!(&mut second).is_pending());
        assert!(texts.enter(LONG_TEXT - 1).await.is_none());
        drop(first);
        assert!(poll!(&mut second).is_ready());
    }
}
