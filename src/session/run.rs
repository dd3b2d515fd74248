//! Running a turn: resume, read what is new, stream, keep.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::FutureExt;
use futures::stream::{self, SelectAll, StreamExt};
use tokio_util::sync::CancellationToken;

use super::conversations::conversation_of;
use super::keep::{Keeper, NotKept, said};
use super::origin::Origin;
use super::plan::{Placed, Plan, invalid};
use super::prefix::{self, Reader};
use super::streams::{Facts, NewStream, Resumed, Source, Stream, Why, Writer};
use super::{Cached, Error, Event, Model, Running, Sessions, Start, StateReceipt, Turn};
use crate::engine::{self, Job, Permit};
use crate::state::{self, Entry};
use crate::types::SessionId;

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
            Some(resumed) => resumed.check(&model, &origin)?,
            None => {
                if let Some(replayed) = self.replay(&turn, &model, &origin).await? {
                    return Ok(replayed);
                }
                origin.check(&turn.start)?;
            }
        }
        let mut plan = self.plan(turn, model, origin).await?;
        let jobs = match &resumed {
            Some(resumed) => resumed.jobs(plan.jobs()),
            None => plan.jobs(),
        };
        let permits = match &resumed {
            // They were let in before, by a server that may have had more places: those that find none wait for one.
            Some(_) => self.hub.admit(&plan.model).map(|()| jobs.iter().map(|_| None).collect())?,
            None => self.reserve(&plan, jobs.len()).await?.into_iter().map(Some).collect::<Vec<_>>(),
        };
        // The first that is written: nothing about the request can be wrong any more.
        self.begin_anew(&mut plan.turn).await?;
        self.launch(plan, jobs.into_iter().zip(permits).collect(), resumed).await
    }

    /// Takes places for the turn's jobs, if there are ever so many, and if its tenant may store what comes of it.
    async fn reserve(&self, plan: &Plan, jobs: usize) -> Result<Vec<Permit>, Error> {
        let Plan { model, turn, .. } = plan;
        let most = model.engine.capacity();
        if jobs > most {
            let why = format!("this asks for more answers at once than the {most} the server has room for");
            return invalid("n", &why);
        }
        if turn.store {
            // Better than to find out when the answer is there.
            let bytes = model.card.state_bytes;
            self.policy.quotas.admit(&self.archive, &turn.tenant, bytes, false).await?;
        }
        self.hub.admit(model)?;
        Ok(model.engine.reserve(jobs)?)
    }

    /// Hands the turn's jobs to the engine; from here on it can only fail in its stream.
    async fn launch(&self, plan: Plan, jobs: Vec<Seated>, resumed: Option<Resumed>) -> Result<Running, Error> {
        let (model, parent) = (plan.model.clone(), plan.origin.parent.as_ref().map(|parent| parent.id.clone()));
        let cached_tokens = Cached::from(plan.cached());
        let reader = self.prefix.as_ref().map(|cache| plan.reader(cache, &cached_tokens));
        let facts = match &resumed {
            Some(resumed) => resumed.facts.clone(),
            None => plan.facts(cached_tokens.clone()),
        };
        let created = facts.created;
        let events = resumed.as_ref().map(Resumed::events).unwrap_or_default();
        let stream = self.hub.open(NewStream { turn: &plan.turn, facts: facts.clone(), model: model.clone(), events });
        let running = Running::new(facts, Source::Stream(stream.listen()));
        let mut writer = Writer::new(stream.clone(), self.hub.clone(), self.archive.clone());
        let mut texts = BTreeMap::new();
        if let Some(resumed) = resumed {
            texts.extend((0..stream.facts.choices).map(|choice| (choice, resumed.text(choice))));
            writer.resume(resumed);
        } else if plan.turn.delivery.detach
            && let Err(error) = writer.begin(&plan.turn, parent).await
        {
            // Of one that was only to be stored, nobody waits for the text.
            if plan.turn.delivery.keep {
                return Err(error.into());
            }
            writer.attach(&error);
        }
        let keeper = self.keeper(plan, created, cached_tokens);
        let run = Run { model, jobs, reader, keeper, writer, texts };
        self.turns.spawn(run.drive(stream, self.stop.clone()));
        Ok(running)
    }

    /// What keeps the turn's states.
    fn keeper(&self, plan: Plan, created: u64, cached_tokens: Cached) -> Keeper {
        let (prompt_tokens, waits) = (plan.prompt_tokens(), plan.waits());
        let Plan { model, turn, origin, fresh, .. } = plan;
        Keeper {
            archive: self.archive.clone(),
            policy: self.policy.clone(),
            model,
            parent: origin.parent,
            session: origin.session,
            beginning: fresh.map(|fresh| fresh.beginning),
            created,
            expires_at: turn.ttl_s.or(self.default_ttl_s).map(|s| created.saturating_add(s)),
            waits,
            prompt_tokens,
            cached_tokens,
            turn,
        }
    }

    /// The committed turn that a retried request already ran.
    async fn replay(&self, turn: &Turn, model: &Model, origin: &Origin) -> Result<Option<Running>, Error> {
        let (Some(key), Some(session)) = (&turn.idempotency_key, &origin.session) else { return Ok(None) };
        let Some(head) = &session.head.live else { return Ok(None) };
        // The last turn tells its key itself, whatever became of the key's mark.
        let keyed = if head.record.idempotency_key.as_ref() == Some(key) {
            Some(head.clone())
        } else {
            let keyed = self.archive.keyed(&turn.tenant, &session.id, key, head.first).await;
            keyed.map_err(|error| match error {
                state::Error::Damaged { key, why } => {
                    tracing::error!(key, why, "what tells of a turn by its key is damaged");
                    Error::KeyDamaged(session.id.clone())
                }
                other => other.into(),
            })?
        };
        let Some(entry) = keyed else { return Ok(None) };
        let record = &entry.record;
        let begun_from = record.beginning.as_ref().and_then(|beginning| beginning.name.as_ref());
        let (messages, text) = said(model, &turn.input);
        // A conversation's turn reads what waited there as well, which does not wait any more.
        let again = conversation_of(&session.id).is_some() && !messages.is_empty();
        let same = record.messages == messages || again && record.messages.ends_with(&messages);
        if !same || record.text != text || turn.initial_state.as_ref() != begun_from {
            let why = "this key was used for another request of the session; a new request needs a new key";
            return invalid("idempotency-key", why);
        }
        Ok(replayed(entry, &session.id, model))
    }
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

/// A job with its place in the engine; `None` = it waits for one.
type Seated = (Placed, Option<Permit>);

/// The events of all jobs, each with the index of its job's first choice.
type Outputs = SelectAll<stream::BoxStream<'static, (usize, engine::Event)>>;

/// A turn under way.
struct Run {
    model: Arc<Model>,
    jobs: Vec<Seated>,
    reader: Option<Reader>,
    keeper: Keeper,
    writer: Writer,
    /// What was sent of each choice before.
    texts: BTreeMap<usize, String>,
}

impl Run {
    async fn drive(self, stream: Arc<Stream>, stop: CancellationToken) {
        let Self { model, jobs, reader, mut keeper, mut writer, texts } = self;
        let outputs = submit(&model, jobs, &stream.pause, reader.as_ref());
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
    }
}

fn submit(model: &Arc<Model>, jobs: Vec<Seated>, pause: &engine::Pause, reader: Option<&Reader>) -> Outputs {
    let submit = |((job, first), permit): Seated| {
        let (job, model, reader) = (Job { pause: pause.clone(), ..job }, model.clone(), reader.cloned());
        let events = async move {
            let permit = match permit {
                Some(permit) => permit,
                None => model.engine.place().await,
            };
            match reader {
                Some(reader) => reader.run(model, job, permit).boxed(),
                None => prefix::events(&model, job, permit).boxed(),
            }
        };
        stream::once(events).flatten().map(move |event| (first, event)).boxed()
    };
    jobs.into_iter().map(submit).collect()
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
                writer.hold(Event::Failed(keeper.blame(why)), Vec::new());
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
