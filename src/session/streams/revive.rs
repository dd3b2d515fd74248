//! Going on with what another process has begun.

use std::collections::BTreeSet;
use std::time::Duration;

use super::record::{Answer, Begun, Entry, Told};
use super::{Facts, Found, Hub};
use crate::engine::{Job, Replay};
use crate::session::origin::Origin;
use crate::session::plan::Placed;
use crate::session::run;
use crate::session::{Error, Event, Model, Sessions, Start, Turn};
use crate::state::{self, Archive, Damaged, Journal, Put, Salvaged};
use crate::telemetry::clock;
use crate::types::{StateId, Tenant};

/// A journal without an entry for so long has lost its writer, where several servers share a store.
const ORPHANED: Duration = Duration::from_secs(20);

/// A response of which a part was sent.
pub(in crate::session) struct Resumed {
    pub facts: Facts,
    pub parent: Option<StateId>,
    pub told: Vec<Told>,
    pub journal: Journal,
    /// Number of the journal's next entry.
    pub next: u64,
}

impl Resumed {
    /// Whether it can go on here, from where it began.
    pub fn check(&self, model: &Model, origin: &Origin) -> Result<(), Error> {
        if self.facts.fingerprint != model.card.fingerprint {
            let state_model = self.facts.model.clone();
            return Err(Error::StateModelMismatch { state_model, model: model.card.id.clone() });
        }
        origin.check_parent(self.parent.as_ref())
    }

    /// What was sent.
    pub fn events(&self) -> Vec<Event> {
        self.told.iter().cloned().map(Told::event).collect()
    }

    /// Choices that are complete.
    pub fn done(&self) -> usize {
        self.told.iter().filter(|told| matches!(told, Told::Done { .. })).count()
    }

    /// Whether its last event was sent.
    pub fn is_over(&self) -> bool {
        let failed = self.told.iter().any(|told| matches!(told, Told::Failed { .. } | Told::Cancelled));
        failed || self.done() >= self.facts.choices
    }

    /// The text of a choice that was sent.
    pub fn text(&self, wanted: usize) -> String {
        let text = |told: &Told| match told {
            Told::Text { choice, text, .. } if *choice == wanted => Some(text.clone()),
            _ => None,
        };
        self.told.iter().filter_map(text).collect()
    }

    /// One job for each choice that is not complete, each with what was sent of it.
    pub fn jobs(&self, jobs: Vec<Placed>) -> Vec<Placed> {
        let alone = |(job, first): Placed| -> Vec<Placed> {
            let choice = |n| (Job { choices: 1, first_choice: job.first_choice + n, ..job.clone() }, first + n);
            (0..job.choices).map(choice).collect()
        };
        let mut all: Vec<Placed> = jobs.into_iter().flat_map(alone).collect();
        all.retain(|(_, place)| {
            !self.told.iter().any(|told| matches!(told, Told::Done { choice, .. } if choice == place))
        });
        for (job, place) in &mut all {
            let mut replay = Replay::default();
            for told in &self.told {
                if let Told::Text { choice, ids, .. } = told
                    && choice == place
                {
                    replay.ids.extend(ids);
                    replay.events += 1;
                }
            }
            job.replay = replay;
        }
        all
    }
}

impl Sessions {
    /// Takes up every response that another process has left behind unfinished. A server that shares its store does so again
    /// and again, with those that nobody has been at for a while.
    pub async fn recover(&self) {
        let mut told = BTreeSet::new();
        if !self.hub.rules.shared {
            return self.recover_once(&mut told).await;
        }
        loop {
            tokio::time::sleep(ORPHANED).await;
            self.recover_once(&mut told).await;
        }
    }

    /// Of a response that cannot go on, the log says so once: those are in `told`.
    async fn recover_once(&self, told: &mut BTreeSet<String>) {
        let marked = match self.archive.running().await {
            Ok(marked) => marked,
            Err(error) => return tracing::error!(%error, "unfinished responses could not be listed"),
        };
        for (tenant, id) in marked {
            let revived = loop {
                match self.revive(&tenant, &id, false).await {
                    Err(Error::Full { retry_after }) => tokio::time::sleep(retry_after).await,
                    revived => break revived,
                }
            };
            match revived {
                Ok(Some(Found::Stream(_))) => tracing::info!(response = id, "a response goes on after a restart"),
                Ok(_) => {}
                Err(error) if told.insert(id.clone()) => {
                    tracing::error!(%error, response = id, "a response could not go on after a restart");
                }
                Err(_) => {}
            }
        }
    }

    /// Takes up one response, if it has a journal and is not here already. One that another server is at is taken from it only
    /// with `take`.
    pub(super) async fn revive(&self, tenant: &Tenant, id: &str, take: bool) -> Result<Option<Found>, Error> {
        let _one = self.hub.reviving.lock().await;
        if let Some(stream) = self.hub.find(tenant, id) {
            return Ok(Some(Found::Stream(stream)));
        }
        let journal = Journal::stream(tenant, id);
        if let Some(answer) = self.answer(tenant, id).await? {
            self.hub.clear(&self.archive, &journal, (tenant, id), answer.kept).await?;
            let over = answer.is_over(self.hub.rules.limits.resume_window_s);
            return Ok((!over).then(|| Found::Answer(Box::new(answer))));
        }
        let Salvaged { entries, damage, behind } = self.archive.salvage::<Entry>(&journal).await?;
        let next = entries.len() as u64;
        let last = entries.iter().chain(&behind).map(Entry::at).max().unwrap_or(0);
        let age = clock::unix_seconds().saturating_sub(last);
        // Who still writes does not see that a damaged journal was taken from it: its next entry is behind the damage.
        let written = self.hub.rules.shared && age < ORPHANED.as_secs();
        let elsewhere = written && (!take || damage.is_some());
        let mut entries = entries.into_iter();
        let begun = match (entries.next(), &damage) {
            (Some(Entry::Begun(begun)), _) => *begun,
            (_, Some(Damaged(why))) => return Err(Error::ResponseDamaged(id.into(), why.clone())),
            (Some(_), None) => {
                return Err(Error::ResponseDamaged(id.into(), "it does not begin with a request".into()));
            }
            (None, None) => {
                // The process was lost before it had begun, or after the answer was removed; another one may be about to begin.
                if !self.hub.rules.shared {
                    self.archive.unmark_running(tenant, id).await?;
                }
                return Ok(None);
            }
        };
        let Begun { facts, turn, parent } = begun;
        facts.check(id)?;
        let told: Vec<Told> = entries.flat_map(Entry::events).collect();
        if elsewhere {
            return Ok(Some(Found::Elsewhere(facts, told)));
        }
        let resumed = Resumed { facts, parent, told, journal, next: next + 1 };
        self.check_weights(&turn, &resumed).await?;
        if let Some(Damaged(why)) = damage {
            // What was told behind it is told again, to the same bits: it is computed from the same request and seed.
            tracing::warn!(
                response = id,
                entry = next,
                why,
                "a journal is damaged; what it said from there on is computed again"
            );
            self.archive.cut_stream(tenant, id, next).await?;
        }
        if self.archive.append(&resumed.journal, next, &Entry::told(Vec::new())).await? == Put::Exists {
            return Ok(None);
        }
        self.go_on(turn, resumed).await.map(Some)
    }

    /// Refuses a response that is not complete and whose weights are not served here, and leaves it to a server that has them.
    async fn check_weights(&self, turn: &Turn, resumed: &Resumed) -> Result<(), Error> {
        let Facts { response_id: id, fingerprint, model, .. } = &resumed.facts;
        if resumed.is_over()
            || self.with_weights(fingerprint, model)?.is_some()
            || self.committed(turn, resumed).await?.is_some()
        {
            return Ok(());
        }
        Err(Error::ResponseWaits { id: id.clone(), model: model.clone() })
    }

    /// Removes the journal of a response that nobody can go on with, as what it began with is damaged, and says why. One that
    /// another server may be writing is left alone.
    pub(in crate::session) async fn sweep_stream(&self, tenant: &Tenant, id: &str) -> Result<Option<String>, Error> {
        let _one = self.hub.reviving.lock().await;
        if self.hub.find(tenant, id).is_some() {
            return Ok(None);
        }
        let journal = Journal::stream(tenant, id);
        // As good as always it is whole; the rest need not be read.
        match self.archive.read_entry::<Entry>(&journal, 0).await {
            Ok(None) | Err(state::Error::Damaged { .. }) => {}
            other => return other.map(|_| None).map_err(Error::from),
        }
        let Salvaged { entries, damage, behind } = self.archive.salvage::<Entry>(&journal).await?;
        let Some(Damaged(why)) = damage.filter(|_| entries.is_empty()) else { return Ok(None) };
        let last = behind.iter().map(Entry::at).max().unwrap_or(0);
        if self.hub.rules.shared && clock::unix_seconds().saturating_sub(last) < ORPHANED.as_secs() {
            return Ok(None);
        }
        self.archive.cut_stream(tenant, id, 0).await?;
        self.archive.unmark_running(tenant, id).await?;
        Ok(Some(why))
    }

    async fn go_on(&self, mut turn: Turn, resumed: Resumed) -> Result<Found, Error> {
        // The name may be another model's by now.
        let Facts { fingerprint, model, .. } = &resumed.facts;
        let served = self.with_weights(fingerprint, model).ok().flatten();
        turn.model = Some(served.map_or(model, |served| &served.card.id).clone());
        let (tenant, id) = (turn.tenant.clone(), resumed.facts.response_id.clone());
        let (keep, journal) = (turn.delivery.keep, resumed.journal.clone());
        let mut answer = Answer {
            facts: resumed.facts.clone(),
            ended: clock::unix_seconds(),
            events: resumed.told.clone(),
            kept: keep,
        };
        if !resumed.is_over() {
            match self.committed(&turn, &resumed).await? {
                Some(rest) => answer.events.extend(rest),
                None => match self.begin(turn, Some(resumed)).await {
                    Ok(_) => {
                        let stream = self.hub.find(&tenant, &id);
                        return stream.map(Found::Stream).ok_or(Error::ResponseNotFound(id));
                    }
                    // They come again when there is room, or a server that does not stop.
                    Err(
                        error @ (Error::Full { .. }
                        | Error::Draining
                        | Error::Loading
                        | Error::Store(_)
                        | Error::NotStored { .. }),
                    ) => return Err(error),
                    Err(error) => {
                        tracing::error!(%error, response = id, "a response cannot go on");
                        answer.events.push(Told::new(&Event::Failed(error), &[]));
                    }
                },
            }
        }
        self.archive.put_answer(&tenant, &id, &answer).await?;
        self.hub.clear(&self.archive, &journal, (&tenant, &id), keep).await?;
        Ok(Found::Answer(Box::new(answer)))
    }

    /// What follows for the client of a turn that was committed to its session just before the process was lost.
    async fn committed(&self, turn: &Turn, resumed: &Resumed) -> Result<Option<Vec<Told>>, Error> {
        let Start::Session { id: session, .. } = &turn.start else { return Ok(None) };
        let Some(entry) = self.archive.head(&turn.tenant, session).await?.live else { return Ok(None) };
        if entry.record.response_id != resumed.facts.response_id {
            return Ok(None);
        }
        let rest = run::committed(&entry, session, resumed.text(0).len());
        Ok(rest.map(|rest| rest.iter().map(|event| Told::new(event, &[])).collect()))
    }
}

impl Hub {
    /// Removes the journal of a response whose answer is stored; after the window also an answer that is not `kept`.
    pub(super) async fn clear(
        &self,
        archive: &Archive,
        journal: &Journal,
        (tenant, id): (&Tenant, &str),
        kept: bool,
    ) -> Result<(), state::Error> {
        archive.erase(journal).await?;
        if kept {
            return archive.unmark_running(tenant, id).await;
        }
        let (archive, tenant, id) = (archive.clone(), tenant.clone(), id.to_owned());
        let window = self.rules.limits.window();
        tokio::spawn(async move {
            tokio::time::sleep(window).await;
            let removed = archive.remove_answer(&tenant, &id).await.map(drop);
            if let Err(error) = removed.and(archive.unmark_running(&tenant, &id).await) {
                tracing::warn!(%error, response = id, "an old response could not be removed");
            }
        });
        Ok(())
    }
}
