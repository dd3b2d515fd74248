//! Running a turn: resume, read what is new, stream, keep.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::initial::Fresh;
use super::keep::{Keeper, NotKept, said};
use super::origin::{Origin, Parent};
use super::prefix;
use super::prefix::Reader;
use super::prompt::{self, Reading};
use super::streams::{Facts, NewStream, Resumed, Source, Why, Writer};
use super::{Cached, Error, Event, Input, Model, Running, Sessions, Start, StateReceipt, Turn};
use crate::engine::{self, Job, Permit};
use crate::state::Entry;
use crate::telemetry::clock;
use crate::text::Trim;
use crate::types::{Memory, SessionId};
use futures::FutureExt;
use futures::stream::{self, SelectAll, StreamExt};

impl Sessions {
    /// Runs a turn. Everything that can be refused is refused here, before the first event.
    pub async fn start(&self, turn: Turn) -> Result<Running, Error> {
        if let Start::Session { id, .. } = &turn.start {
            self.hub.supersede(&turn.tenant, id).await;
        }
        self.begin(turn, None).await
    }

    /// Runs a turn, from where an earlier process was lost in it.
    pub(super) async fn begin(&self, turn: Turn, resumed: Option<Resumed>) -> Result<Running, Error> {
        let model = self.find(turn.model.as_deref())?.clone();
        let origin = self.origin(&turn, &model).await?;
        match &resumed {
            Some(resumed) if resumed.facts.fingerprint != model.card.fingerprint => {
                let state_model = resumed.facts.model.clone();
                return Err(Error::StateModelMismatch { state_model, model: model.card.id.clone() });
            }
            Some(resumed) => origin.check_parent(resumed.parent.as_ref())?,
            None => {
                if let Some(replayed) = self.replay(&turn, &model, &origin).await? {
                    return Ok(replayed);
                }
                origin.check(&turn.start)?;
            }
        }
        let fresh = fresh(&turn, &model, &origin)?;
        let memory = origin.parent.as_ref().map(|p| p.memory.clone());
        let (turn, readings) = {
            let (model, memory) = (model.clone(), memory.clone());
            // A long text takes a while: not on a thread that serves other requests.
            tokio::task::spawn_blocking(move || {
                let readings = prompt::read(&model, &turn, memory.as_deref());
                (turn, readings)
            })
            .await
            .map_err(|e| Error::Engine(format!("tokenising failed: {e}")))?
        };
        let readings = readings?;
        let consumed = origin.parent.as_ref().map_or(0, |p| p.memory.consumed);
        let cached = origin.parent.as_ref().map_or(0, Parent::cached);
        let max_tokens = self.check(&turn, &model, consumed, &readings)?;

        let memory = memory.or_else(|| fresh.as_ref().and_then(|fresh| fresh.memory.clone()));
        let mut jobs = jobs(&turn, &model, &readings, memory, max_tokens);
        if max_tokens == 0 {
            jobs.iter_mut().for_each(|(job, _)| only_read(job, &model));
        }
        if let Some(resumed) = &resumed {
            jobs = resumed.jobs(jobs);
        }
        if jobs.len() > model.engine.capacity() {
            let most = model.engine.capacity();
            return invalid(
                "n",
                &format!("this asks for more answers at once than the {most} the server has room for"),
            );
        }
        if turn.store {
            // Better than to find out when the answer is there.
            let bytes = model.card.state_bytes;
            self.policy.quotas.admit(&self.archive, &turn.tenant, bytes, false).await?;
        }
        let permits = model.engine.reserve(jobs.len()).map_err(|full| Error::Full { retry_after: full.retry_after })?;

        let cached_tokens = Cached::from(cached * readings.len() as u64);
        let reader = self.prefix.as_ref().map(|cache| {
            let boundaries = readings.first().map_or(&[][..], |reading| &reading.boundaries);
            let (parent, fresh) = (origin.parent.as_ref(), fresh.as_ref());
            Reader::new(cache, &turn.tenant, &model, (parent, fresh), boundaries, &cached_tokens)
        });
        let created = resumed.as_ref().map_or_else(clock::unix_seconds, |resumed| resumed.facts.created);
        let facts = Facts {
            response_id: turn.response_id.clone(),
            model: model.card.id.clone(),
            fingerprint: model.card.fingerprint.clone(),
            created,
            seed: turn.sampling.seed,
            prompt_tokens: readings.iter().map(|r| consumed + r.ids.len() as u64).sum(),
            cached_tokens: cached_tokens.clone(),
            choices: readings.len() * turn.choices,
            form: turn.delivery.form.clone(),
        };
        let facts = resumed.as_ref().map_or(facts, |resumed| resumed.facts.clone());
        let events = resumed.as_ref().map(Resumed::events).unwrap_or_default();
        let stream = self.hub.open(NewStream { turn: &turn, facts: facts.clone(), model: model.clone(), events });
        let running = Running::new(facts, Source::Stream(stream.listen()));
        let mut writer = Writer::new(stream.clone(), self.hub.clone(), self.archive.clone());
        let mut texts = BTreeMap::new();
        if let Some(resumed) = resumed {
            texts.extend((0..stream.facts.choices).map(|choice| (choice, resumed.text(choice))));
            writer.resume(resumed);
        } else if turn.delivery.detach {
            writer.begin(&turn, origin.parent.as_ref().map(|parent| parent.id.clone())).await?;
        }
        jobs.iter_mut().for_each(|(job, _)| job.pause = stream.pause.clone());
        let mut keeper = Keeper {
            archive: self.archive.clone(),
            policy: self.policy.clone(),
            model: model.clone(),
            parent: origin.parent,
            session: origin.session,
            beginning: fresh.map(|fresh| fresh.beginning),
            created,
            expires_at: turn.ttl_s.or(self.default_ttl_s).map(|s| created.saturating_add(s)),
            waits: readings.first().filter(|_| max_tokens == 0).and_then(|reading| reading.ids.last().copied()),
            prompt_tokens: consumed + readings.first().map_or(0, |r| r.ids.len() as u64),
            cached_tokens,
            turn,
        };
        let stop = self.stop.clone();
        self.turns.spawn(async move {
            let outputs = submit(&model, jobs, permits, reader.as_ref());
            let why = tokio::select! {
                () = forward(outputs, &mut keeper, &mut writer, texts) => None,
                () = stop.cancelled() => Some(Why::Interrupted),
                () = stream.cancel.cancelled() => Some(stream.why()),
            };
            // Before anybody hears of the end: the session may be waited for.
            drop(keeper);
            match why {
                None => {}
                Some(Why::Interrupted) => writer.interrupted(),
                Some(Why::Cancelled) => writer.cancelled().await,
            }
            // Receivers were dropped, which an engine that has nothing to do does not see by itself.
            model.engine.look();
        });
        Ok(running)
    }

    /// Checks a turn against the limits; gives its number of new tokens.
    fn check(&self, turn: &Turn, model: &Model, consumed: u64, readings: &[Reading]) -> Result<u64, Error> {
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

    /// The committed turn that a retried request already ran.
    async fn replay(&self, turn: &Turn, model: &Model, origin: &Origin) -> Result<Option<Running>, Error> {
        let (Some(key), Some(session)) = (&turn.idempotency_key, &origin.session) else { return Ok(None) };
        let Some(head) = &session.head.live else { return Ok(None) };
        let Some(entry) = self.archive.keyed(&turn.tenant, &session.id, key, head.first).await? else {
            return Ok(None);
        };
        let record = &entry.record;
        let begun_from = record.beginning.as_ref().and_then(|beginning| beginning.name.as_ref());
        let said_then = (record.messages.clone(), record.text.clone());
        if said(model, &turn.input) != said_then || turn.initial_state.as_ref() != begun_from {
            let why = "this key was used for another request of the session; a new request needs a new key";
            return invalid("idempotency-key", why);
        }
        Ok(replayed(entry, &session.id, model))
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

/// What a client hears of a committed turn, but for the first `sent` bytes of its text.
pub(super) fn committed(entry: &Entry, session: &SessionId, sent: usize) -> Option<Vec<Event>> {
    let record = &entry.record;
    let receipt = StateReceipt {
        id: record.state.clone()?,
        parent: record.parent.clone(),
        session_id: Some(session.clone()),
        turn: entry.depth,
        tokens: record.tokens,
        bytes: record.bytes,
        expires_at: record.expires_at,
    };
    let text = record.answer.get(sent..).filter(|text| !text.is_empty());
    let text = text.map(|text| Event::Text { choice: 0, text: text.into() });
    let done = Event::Done {
        choice: 0,
        finish: record.finish?,
        completion_tokens: record.usage.completion_tokens,
        stored: Some(Ok(receipt)),
    };
    Some(text.into_iter().chain([done]).collect())
}

/// A committed turn as a running one.
fn replayed(entry: Entry, session: &SessionId, model: &Model) -> Option<Running> {
    let events = committed(&entry, session, 0)?;
    let record = entry.record;
    let facts = Facts {
        response_id: record.response_id,
        model: record.model,
        fingerprint: model.card.fingerprint.clone(),
        created: record.created,
        seed: record.seed,
        prompt_tokens: record.usage.prompt_tokens,
        cached_tokens: record.usage.cached_tokens.into(),
        choices: 1,
        form: String::new(),
    };
    Some(Running::new(facts, Source::Told(events.into())))
}

fn invalid<T>(param: &'static str, message: &str) -> Result<T, Error> {
    Err(Error::Invalid { param, code: None, message: message.into() })
}

/// A job and the index of its first choice among the turn's.
pub(super) type Placed = (Job, usize);

/// The turn's jobs: one for each prompt, but as many as needed where its choices cannot run in one.
fn jobs(turn: &Turn, model: &Model, readings: &[Reading], memory: Option<Arc<Memory>>, max_tokens: u64) -> Vec<Placed> {
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
                max_tokens,
                keep: turn.store,
                pause: engine::Pause::default(),
                replay: engine::Replay::default(),
                checkpoints: None,
            };
            jobs.push((job, prompt * turn.choices + first_choice));
        }
    }
    jobs
}

/// Leaves the last id of what is only read to whoever goes on from there. It is then no job for an empty state.
fn only_read(job: &mut Job, model: &Model) {
    job.ids.pop();
    if job.ids.is_empty() && job.memory.is_none() {
        job.memory = Some(model.initial.own());
    }
}

/// The events of all jobs, each with the index of its job's first choice.
type Outputs = SelectAll<stream::BoxStream<'static, (usize, engine::Event)>>;

fn submit(model: &Arc<Model>, jobs: Vec<Placed>, permits: Vec<Permit>, reader: Option<&Reader>) -> Outputs {
    let submit = |((job, first), permit): (Placed, Permit)| {
        let events = match reader {
            Some(reader) => reader.clone().run(model.clone(), job, permit).boxed(),
            None => prefix::events(model, job, permit).boxed(),
        };
        events.map(move |event| (first, event)).boxed()
    };
    jobs.into_iter().zip(permits).map(submit).collect()
}

/// Passes the jobs' events on, keeping what is to be kept before it is announced, until all are done. `texts` is what was
/// sent of each choice before.
async fn forward(mut outputs: Outputs, keeper: &mut Keeper, writer: &mut Writer, mut texts: BTreeMap<usize, String>) {
    let mut next = writer.wait(&mut outputs).await;
    // A response that another server took is over here, whatever the engine still has to say.
    while let Some((first, output)) = next.filter(|_| !writer.is_over()) {
        match output {
            engine::Event::Text { choice, text, ids } => {
                if keeper.turn.store {
                    texts.entry(first + choice).or_default().push_str(&text);
                }
                writer.hold(Event::Text { choice: first + choice, text }, ids);
            }
            engine::Event::Done { choice, finish, sampled, kept } => {
                let choice = first + choice;
                let stored = match kept {
                    Some(kept) => {
                        // Text does not wait for the state.
                        writer.flush().await;
                        let answer = texts.remove(&choice).unwrap_or_default();
                        match keeper.keep(*kept, answer, finish, sampled).await {
                            Ok(receipt) => Some(Ok(receipt)),
                            Err(NotKept::Lost(error)) => Some(Err(error)),
                            Err(NotKept::Conflict(error)) => {
                                keeper.session = None;
                                writer.hold(Event::Failed(error), Vec::new());
                                return writer.flush().await;
                            }
                        }
                    }
                    None => None,
                };
                // Its reader may send the next turn as soon as it has read of this one's end.
                keeper.session = None;
                writer.hold(Event::Done { choice, finish, completion_tokens: sampled, stored }, Vec::new());
            }
            engine::Event::Failed(why) => {
                keeper.session = None;
                writer.hold(Event::Failed(Error::Engine(why)), Vec::new());
                return writer.flush().await;
            }
        }
        next = match writer.has_room().then(|| outputs.next().now_or_never()).flatten() {
            Some(ready) => ready,
            None if writer.may_wait() => writer.wait(&mut outputs).await,
            None => {
                writer.flush().await;
                writer.wait(&mut outputs).await
            }
        };
    }
    writer.flush().await;
}
