//! States that are read into being, taken elsewhere, or brought from there.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::{Error, Event, Model, Running, Sessions, Start, StateError, StateInfo, StateReceipt, Turn};
use crate::state::{self, Damaged};
use crate::telemetry::clock;
use crate::types::{Snapshot, SnapshotHead, StateId, Tenant};

/// What a client may say of a state, as OpenAI allows it.
const METADATA_PAIRS: usize = 16;
const METADATA_KEY: usize = 64;
const METADATA_VALUE: usize = 512;

/// Refuses more metadata than is kept.
pub fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), String> {
    if metadata.len() > METADATA_PAIRS {
        return Err(format!("`metadata` has {} pairs, more than {METADATA_PAIRS}", metadata.len()));
    }
    let too_long =
        |key: &str, value: &str| key.chars().count() > METADATA_KEY || value.chars().count() > METADATA_VALUE;
    match metadata.iter().find(|(key, value)| key.is_empty() || too_long(key, value)) {
        Some(_) => Err(format!(
            "a key of `metadata` must have 1 to {METADATA_KEY} characters and its value at most {METADATA_VALUE}"
        )),
        None => Ok(()),
    }
}

impl Sessions {
    /// Reads what a turn of no new tokens says, and returns when the state it leads to is durable.
    pub async fn read(&self, turn: Turn) -> Result<(Running, StateReceipt), Error> {
        debug_assert!(turn.max_tokens == Some(0) && turn.store && turn.choices == 1, "it only reads, and keeps");
        let begins = match &turn.start {
            Start::State(id) => Some(id.clone()),
            _ => None,
        };
        let mut running = self.start(turn).await?;
        loop {
            match running.next().await {
                Some(Event::Done { stored: Some(Ok(receipt)), .. }) => return Ok((running, receipt)),
                Some(Event::Done { stored: Some(Err(why)), .. }) => return Err(not_kept(why, begins)),
                Some(Event::Failed(error)) => return Err(error),
                Some(_) => {}
                None => return Err(Error::Engine("the text was not read to its end".into())),
            }
        }
    }

    /// The file of a state, which is rebuilt first if it was evicted or lost.
    pub async fn content(&self, tenant: &Tenant, id: &StateId) -> Result<Bytes, Error> {
        let stored = self.stored_content(tenant, id).await;
        let Err(Error::StateNotFound(_) | Error::StateDamaged(..)) = stored else { return stored };
        let Some((_, turn)) = self.record_of(tenant, id).await? else { return stored };
        let model = self.find(Some(&turn.entry.record.model))?.clone();
        match self.restore(tenant, id, &model).await? {
            Some(_) => self.stored_content(tenant, id).await,
            None => stored,
        }
    }

    async fn stored_content(&self, tenant: &Tenant, id: &StateId) -> Result<Bytes, Error> {
        match self.archive.content(tenant, id, clock::unix_seconds()).await {
            Ok(Some(file)) => Ok(file),
            Ok(None) => Err(Error::StateNotFound(id.clone())),
            Err(state::Error::Damaged { why, .. }) => Err(Error::StateDamaged(id.clone(), why)),
            Err(e) => Err(e.into()),
        }
    }

    /// Stores the state in `file` as a new one of `tenant`, with no past. Nothing that the file says is believed but what
    /// was checked here.
    pub async fn import(&self, tenant: &Tenant, file: Bytes, ttl_s: Option<u64>) -> Result<StateInfo, Error> {
        // It says whether models are served at all.
        self.find(None)?;
        let models: Vec<Arc<Model>> = self.models.get().into_iter().flatten().cloned().collect();
        let checked = tokio::task::spawn_blocking(move || checked(&file, &models)).await;
        let (model, brought) = checked.map_err(|e| Error::Engine(format!("the state could not be read: {e}")))??;
        let created = clock::unix_seconds();
        let head = SnapshotHead {
            id: StateId::new(clock::unix_millis(), clock::random_u128()),
            parent: None,
            owner: tenant.clone(),
            model: model.card.id.clone(),
            fingerprint: model.card.fingerprint.clone(),
            arithmetic: brought.head.arithmetic,
            session: None,
            record: None,
            turn: 1,
            created,
            expires_at: ttl_s.or(self.default_ttl_s).map(|s| created.saturating_add(s)),
            metadata: brought.head.metadata,
        };
        let id = head.id.clone();
        let bytes = brought.memory.bytes();
        self.policy.quotas.admit(&self.archive, tenant, bytes, true).await?;
        if let Err(error) = self.archive.keep(Arc::new(Snapshot { head, memory: brought.memory })).await {
            self.policy.quotas.give_back(tenant, bytes).await;
            return Err(error.into());
        }
        self.state(tenant, &id).await
    }
}

/// Why a text that was read left no state; `begins` is the state before it.
fn not_kept(why: StateError, begins: Option<StateId>) -> Error {
    match begins {
        _ if why.code == StateError::QUOTA => Error::QuotaExceeded { message: why.message },
        Some(state) if why.code == StateError::UNFIT => Error::StateUnusable(state),
        _ => Error::NotStored { message: why.message, detail: None },
    }
}

/// The snapshot in a file that somebody brought, and the model whose it is.
fn checked(file: &[u8], models: &[Arc<Model>]) -> Result<(Arc<Model>, Snapshot), Error> {
    let refused = |Damaged(why): Damaged| Error::Invalid {
        param: "body",
        code: Some("invalid_state"),
        message: format!("this is no state that can be used here: {}", crate::types::readable(&why)),
    };
    let state::Info { head, tokens, bytes } = state::inspect(file).map_err(refused)?;
    let SnapshotHead { model: state_model, fingerprint, arithmetic, metadata, .. } = &head;
    let Some(model) = models.iter().find(|model| model.card.fingerprint == *fingerprint) else {
        let served: Vec<&str> = models.iter().map(|model| model.card.id.as_str()).collect();
        let state_model = crate::types::readable(state_model);
        return Err(Error::StateModelMismatch { state_model, model: served.join(", ") });
    };
    let most = state::most_bytes(&model.layout, tokens);
    if bytes > most {
        let why = format!("it has {bytes} bytes, and states of this model after {tokens} tokens at most {most}");
        return Err(refused(Damaged(why)));
    }
    check_metadata(metadata).map_err(|why| refused(Damaged(why)))?;
    if arithmetic.len() > METADATA_KEY {
        return Err(refused(Damaged(format!("the name of its arithmetic has {} bytes", arithmetic.len()))));
    }
    let snapshot = state::decode(file).map_err(refused)?;
    state::fits(&snapshot.memory, &model.layout, model.card.vocabulary).map_err(refused)?;
    Ok((model.clone(), snapshot))
}
