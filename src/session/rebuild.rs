//! A state that is not stored any more, from the token log: to the same bits.
//!
//! The log has every id of a sequence, and each turn's record has what the ids do not tell ([`Resume`]). So a lost state
//! is the nearest kept one before it, or the beginning, which then reads what it has not read.

use std::sync::Arc;

use super::origin::Parent;
use super::{Error, Model, Sessions};
use crate::engine::{Event, Job, arithmetic};
use crate::state::{self, Origin};
use crate::telemetry::{clock, metrics};
use crate::text::Trim;
use crate::types::{Memory, Pending, Resume, Sampling, SessionId, Snapshot, SnapshotHead, StateId, TAIL, Tenant};

impl Sessions {
    /// The head of a session whose snapshot is gone.
    pub(super) async fn reread(
        &self,
        tenant: &Tenant,
        id: &SessionId,
        head: &state::Head,
        model: &Model,
    ) -> Result<Parent, Error> {
        let entry = head.live.as_ref().ok_or_else(|| Error::SessionNotFound(id.clone()))?;
        let turn = self.archive.turn_at(tenant, id, entry.turn).await?;
        let turn = turn.ok_or_else(|| Error::SessionNotFound(id.clone()))?;
        let state = entry.record.state.as_ref().ok_or_else(|| Error::SessionNotFound(id.clone()))?;
        let made_by = self.archive.origin_of(tenant, state).await?;
        self.rebuild(tenant, id, (turn, made_by), model).await
    }

    /// A state that was evicted, is damaged or was lost, if a record made it. It is then stored again.
    pub(super) async fn restore(&self, tenant: &Tenant, id: &StateId, model: &Model) -> Result<Option<Parent>, Error> {
        match self.record_of(tenant, id).await? {
            Some((origin, turn)) => {
                self.rebuild(tenant, &origin.session.clone(), (turn, Some(origin)), model).await.map(Some)
            }
            None => Ok(None),
        }
    }

    /// The record that rebuilds a state, if it has not expired: the one that is known to, or else one that is searched for.
    pub(super) async fn record_of(
        &self,
        tenant: &Tenant,
        id: &StateId,
    ) -> Result<Option<(Origin, state::Turn)>, Error> {
        let origin = match self.archive.origin_of(tenant, id).await? {
            Some(origin) => Some(origin),
            None => self.archive.search(tenant, id, clock::unix_seconds()).await?,
        };
        let Some(origin) = origin else { return Ok(None) };
        let turn = self.archive.turn_at(tenant, &origin.session, origin.record).await?;
        let is_it = |turn: &state::Turn| {
            let record = &turn.entry.record;
            record.state.as_ref() == Some(id) && record.expires_at.is_none_or(|at| at > clock::unix_seconds())
        };
        Ok(turn.filter(is_it).map(|turn| (origin, turn)))
    }

    async fn rebuild(
        &self,
        tenant: &Tenant,
        session: &SessionId,
        (turn, made_by): (state::Turn, Option<Origin>),
        model: &Model,
    ) -> Result<Parent, Error> {
        let record = &turn.entry.record;
        let state = record.state.clone().ok_or_else(|| Error::SessionNotFound(session.clone()))?;
        if record.fingerprint != model.card.fingerprint {
            let state_model = record.model.clone();
            return Err(Error::StateModelMismatch { state_model, model: model.card.id.clone() });
        }
        let lost = || Error::StateNotFound(state.clone());
        let (base, turns) = self.unread(tenant, turn.clone(), model).await?;
        let base = match base {
            Some(memory) => memory,
            None => {
                let first = turns.last().filter(|turn| turn.entry.depth == 1).ok_or_else(lost)?;
                let segments = model.initial.again(first.entry.record.beginning.as_ref());
                let mismatch = |began_from| Error::InitialStateMismatch { session: session.clone(), began_from };
                Memory { segments: segments.map_err(mismatch)?.to_vec(), ..Memory::default() }
            }
        };
        let mut ids = base.pending.ends.clone();
        for turn in turns.iter().rev() {
            ids.truncate(ids.len().saturating_sub(turn.entry.record.takes_back));
            ids.extend(&turn.entry.record.ids);
        }
        if base.consumed + ids.len() as u64 != record.tokens {
            return Err(lost());
        }
        tracing::warn!(%session, %state, tokens = ids.len(), "reading a state again: its snapshot is gone");
        metrics::state_rebuilt();
        let turn_number = turn.entry.depth;
        let Some(resume) = &record.resume else {
            // As far as the client had it: new text can follow.
            let memory = Memory { pending: Pending { ends: ids, ..Pending::default() }, counts: Vec::new(), ..base };
            return Ok(Parent { id: state, turn: turn_number, session: None, read_again: 0, memory: Arc::new(memory) });
        };
        let unread = ids.len().checked_sub(resume.pending.ends.len()).ok_or_else(lost)?;
        ids.truncate(unread);
        let read_again = ids.len() as u64;
        let memory = Arc::new(self.read_again(tenant, model, base, (ids, resume)).await?);
        if let Some(origin) = made_by.clone().filter(|_| record.expires_at.is_none_or(|at| at > clock::unix_seconds()))
        {
            self.store_again(tenant, &turn, origin, memory.clone()).await;
        }
        let session = made_by.map(|origin| origin.session);
        Ok(Parent { id: state, turn: turn_number, session, read_again, memory })
    }

    /// The nearest state before a turn that is still kept, and the turns since, the last first.
    async fn unread(
        &self,
        tenant: &Tenant,
        turn: state::Turn,
        model: &Model,
    ) -> Result<(Option<Memory>, Vec<state::Turn>), Error> {
        let mut turns = vec![turn];
        while let Some(before) = self.archive.turn_before(tenant, turns.last().expect("one at least")).await? {
            let kept = match &before.entry.record.state {
                Some(state) => self.archive.load(tenant, state, clock::unix_seconds()).await,
                None => Ok(None),
            };
            match kept {
                Ok(Some(kept)) if kept.head.fingerprint == model.card.fingerprint => {
                    return Ok((Some(kept.memory), turns));
                }
                Ok(_) | Err(state::Error::Damaged { .. }) => turns.push(before),
                Err(e) => return Err(e.into()),
            }
        }
        Ok((None, turns))
    }

    /// `base` when it has read `ids`, with what a record says of the state then.
    async fn read_again(
        &self,
        tenant: &Tenant,
        model: &Model,
        base: Memory,
        (ids, resume): (Vec<u32>, &Resume),
    ) -> Result<Memory, Error> {
        let mut tail = base.tail.clone();
        tail.extend(&ids);
        tail.drain(..tail.len().saturating_sub(TAIL));
        let consumed = base.consumed + ids.len() as u64;
        let segments = if ids.is_empty() { base.segments } else { self.read_ids(tenant, model, base, ids).await? };
        Ok(Memory { segments, consumed, pending: resume.pending.clone(), tail, counts: resume.counts() })
    }

    async fn read_ids(
        &self,
        tenant: &Tenant,
        model: &Model,
        base: Memory,
        ids: Vec<u32>,
    ) -> Result<Vec<crate::types::SegmentData>, Error> {
        let permit = model.engine.reserve(1)?;
        let job = Job {
            tenant: tenant.clone(),
            memory: Some(base).filter(|memory| !memory.segments.is_empty()).map(Arc::new),
            ids,
            goes_on: false,
            choices: 1,
            first_choice: 0,
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            trim: Trim::default(),
            // The token is sampled and never read: the state is that after the ids.
            max_tokens: 1,
            keep: true,
            pause: crate::engine::Pause::default(),
            replay: crate::engine::Replay::default(),
            checkpoints: None,
        };
        let mut events = model.engine.submit(job, permit.into_iter().next().expect("one was asked for"));
        while let Some(event) = events.recv().await {
            match event {
                Event::Done { kept: Some(kept), .. } => return Ok(kept.memory.segments),
                Event::Failed(why) => return Err(Error::Engine(why.to_string())),
                _ => {}
            }
        }
        Err(Error::Engine("the engine has stopped".into()))
    }

    /// Puts a rebuilt state where it was, if its tenant may have it. That it is not stored costs only the time to rebuild it
    /// once more.
    async fn store_again(&self, tenant: &Tenant, turn: &state::Turn, origin: Origin, memory: Arc<Memory>) {
        let record = &turn.entry.record;
        let Some(id) = record.state.clone() else { return };
        let head = SnapshotHead {
            id: id.clone(),
            parent: record.parent.clone(),
            owner: tenant.clone(),
            model: record.model.clone(),
            fingerprint: record.fingerprint.clone(),
            arithmetic: arithmetic().into(),
            session: Some(origin.session),
            record: Some(origin.record),
            turn: origin.turn,
            created: record.created,
            expires_at: record.expires_at,
            metadata: turn.entry.metadata.clone(),
        };
        let bytes = memory.bytes();
        let snapshot = Arc::new(Snapshot { head, memory: Memory::clone(&memory) });
        let stored = async {
            // What is there is damaged, and is counted already.
            if !self.archive.remove(tenant, &id).await? {
                self.policy.quotas.admit(&self.archive, tenant, bytes, true).await?;
            }
            if let Err(error) = self.archive.keep(snapshot).await {
                self.policy.quotas.give_back(tenant, bytes).await;
                return Err(error.into());
            }
            Ok::<_, Error>(())
        };
        if let Err(error) = stored.await {
            tracing::warn!(state = %id, %error, "a rebuilt state was not stored");
        }
    }
}
