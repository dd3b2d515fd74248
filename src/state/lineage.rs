//! The turns of a session, through every fork and rewind they came by.

use futures::stream::{self, StreamExt, TryStreamExt};

use super::archive::AT_ONCE;
use super::sessions::Head;
use super::{Archive, Back, Entry, Error, Listed, Place};
use crate::types::{SessionId, StateId, Tenant};

/// A turn and where it is: what a fork or a rewind goes back to.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    pub entry: Entry,
    pub place: Place,
    /// The turn before it; `None` = it is the first.
    pub before: Option<Place>,
}

/// How a turn is asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum At {
    /// By its number, from 1.
    Number(u64),
    /// By the state it reached; it may be one that was taken back.
    State(StateId),
}

/// Records that follow one another, and are turns that do.
#[derive(Clone, Debug, PartialEq)]
struct Run {
    /// Its last record.
    last: Place,
    /// Number of that record's turn.
    depth: u64,
}

impl Run {
    /// Number of the first record's turn.
    fn first_depth(&self) -> u64 {
        self.depth.saturating_sub(self.last.number.saturating_sub(self.last.run))
    }

    /// The record of a turn in it.
    fn place(&self, depth: u64) -> Place {
        Place { number: self.last.number - (self.depth - depth), ..self.last.clone() }
    }
}

impl Turn {
    fn new(session: SessionId, entry: Entry) -> Self {
        let place = Place { session, number: entry.turn, run: entry.run };
        let before = if entry.turn > entry.run {
            Some(Place { number: entry.turn - 1, ..place.clone() })
        } else {
            entry.back.as_ref().and_then(|back| back.before.clone())
        };
        Self { entry, place, before }
    }
}

impl Archive {
    /// The turns of a session after its turn number `after` (0 = from its first), or `None` if there is no such session.
    /// A damaged one is left out and reported in the log.
    pub async fn turns(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        after: u64,
        limit: usize,
    ) -> Result<Option<Listed<Entry>>, Error> {
        let numbered = self.numbered_turns(tenant, session, after, limit).await?;
        Ok(numbered.map(|Listed { data, has_more }| Listed {
            data: data.into_iter().filter_map(|(_, entry)| entry).collect(),
            has_more,
        }))
    }

    /// The same with each turn's number; `None` in the place of one that is damaged or lost.
    pub async fn numbered_turns(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        after: u64,
        limit: usize,
    ) -> Result<Option<Listed<(u64, Option<Entry>)>>, Error> {
        let Some(head) = self.head(tenant, session).await?.live else { return Ok(None) };
        let to = after.saturating_add(limit as u64);
        let from = after.saturating_add(1);
        let runs = &self.runs(tenant, session, &head, from).await?;
        let entries = stream::iter(from..=to.min(head.depth)).map(|depth| async move {
            let entry = match place(runs, depth) {
                Some(place) => self.readable(tenant, place).await?.filter(|entry| entry.depth == depth),
                None => None,
            };
            Ok((depth, entry))
        });
        let data = entries.buffered(AT_ONCE).try_collect().await?;
        Ok(Some(Listed { data, has_more: head.depth > to }))
    }

    /// One turn of a session whose head is `head`, or `None` if it has no such turn.
    ///
    /// # Errors
    /// [`Error::Damaged`] if its record cannot be read.
    pub async fn turn(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        head: &Entry,
        at: &At,
    ) -> Result<Option<Turn>, Error> {
        match at {
            At::Number(depth) => self.turn_by_number(tenant, session, head, *depth).await,
            At::State(state) => self.turn_by_state(tenant, session, head, state).await,
        }
    }

    /// The turn before `turn`, or `None` if there is none or its record is lost.
    pub async fn turn_before(&self, tenant: &Tenant, turn: &Turn) -> Result<Option<Turn>, Error> {
        let Some(before) = turn.before.clone() else { return Ok(None) };
        let session = before.session.clone();
        let entry = self.readable(tenant, before).await?;
        Ok(entry.filter(|entry| entry.depth + 1 == turn.entry.depth).map(|entry| Turn::new(session, entry)))
    }

    /// The turn that a record of a session is, whatever became of the session.
    pub async fn turn_at(&self, tenant: &Tenant, session: &SessionId, number: u64) -> Result<Option<Turn>, Error> {
        let entry = self.entry(tenant, session, number).await?.filter(|entry| entry.record.state.is_some());
        Ok(entry.map(|entry| Turn::new(session.clone(), entry)))
    }

    async fn turn_by_number(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        head: &Entry,
        depth: u64,
    ) -> Result<Option<Turn>, Error> {
        if !(1..=head.depth).contains(&depth) {
            return Ok(None);
        }
        let runs = self.runs(tenant, session, head, depth).await?;
        match place(&runs, depth) {
            Some(place) => self.turn_at(tenant, &place.session, place.number).await,
            None => Ok(None),
        }
    }

    async fn turn_by_state(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        head: &Entry,
        state: &StateId,
    ) -> Result<Option<Turn>, Error> {
        let names = |turn: &Turn| turn.entry.record.state.as_ref() == Some(state);
        // The state itself mostly knows; where it is lost, or a copy of its record is meant, all are looked through.
        if let Some(origin) = self.origin_of(tenant, state).await? {
            let found = self.turn_by_number(tenant, session, head, origin.turn).await;
            if let Some(turn) = skip_damaged(found)?.filter(names) {
                return Ok(Some(turn));
            }
            if origin.session == *session && origin.record >= head.first {
                let found = skip_damaged(self.turn_at(tenant, session, origin.record).await)?;
                if let Some(turn) = found.filter(names) {
                    return Ok(Some(turn));
                }
            }
        }
        let mut next = Some(Turn::new(session.clone(), head.clone()));
        while let Some(turn) = next {
            if names(&turn) {
                return Ok(Some(turn));
            }
            next = self.turn_before(tenant, &turn).await?;
        }
        for number in (head.first..=head.turn).rev() {
            let found = skip_damaged(self.turn_at(tenant, session, number).await)?;
            if let Some(turn) = found.filter(names) {
                return Ok(Some(turn));
            }
        }
        Ok(None)
    }

    /// The head of a session or, where that is damaged, the last turn before it that can be read.
    pub async fn readable_head(&self, tenant: &Tenant, session: &SessionId) -> Result<Head, Error> {
        match self.head(tenant, session).await {
            Err(Error::Damaged { .. }) => {}
            other => return other,
        }
        let numbers = self.numbers(tenant, session, 0).await?;
        let last = numbers.last().copied().unwrap_or_default();
        for number in numbers.into_iter().rev() {
            match self.entry(tenant, session, number).await {
                Err(Error::Damaged { .. }) | Ok(None) => {}
                Ok(Some(entry)) => return Ok(Head { last, live: Some(entry).filter(|e| e.record.state.is_some()) }),
                Err(e) => return Err(e),
            }
        }
        Ok(Head { last, live: None })
    }

    /// The runs of a lineage, the last first, down to the one with turn number `down_to`. They end early where the
    /// record that tells the one before is lost.
    async fn runs(&self, tenant: &Tenant, session: &SessionId, head: &Entry, down_to: u64) -> Result<Vec<Run>, Error> {
        let last = Place { session: session.clone(), number: head.turn, run: head.run };
        let mut runs = vec![Run { last, depth: head.depth }];
        while let Some(run) = runs.last().filter(|run| run.first_depth() > down_to.max(1)) {
            let depth = run.first_depth();
            let start = Place { number: run.last.run, ..run.last.clone() };
            let start = self.readable(tenant, start).await?.filter(|start| start.depth == depth);
            let Some(Back { before: Some(before), .. }) = start.and_then(|start| start.back) else { break };
            runs.push(Run { last: before, depth: depth - 1 });
        }
        Ok(runs)
    }

    /// The entry at a place, unless it is lost.
    async fn readable(&self, tenant: &Tenant, place: Place) -> Result<Option<Entry>, Error> {
        let found = skip_damaged(self.entry(tenant, &place.session, place.number).await)?;
        if found.is_none() {
            tracing::warn!(session = %place.session, record = place.number, "a turn of a session is lost");
        }
        Ok(found)
    }
}

/// Where the turn of that number is.
fn place(runs: &[Run], depth: u64) -> Option<Place> {
    runs.iter().find(|run| (run.first_depth()..=run.depth).contains(&depth)).map(|run| run.place(depth))
}

/// Takes what is damaged for absent, and reports it.
pub(super) fn skip_damaged<T>(found: Result<Option<T>, Error>) -> Result<Option<T>, Error> {
    match found {
        Err(Error::Damaged { key, why }) => {
            tracing::warn!(key, why, "a record of a session is damaged");
            Ok(None)
        }
        other => other,
    }
}
