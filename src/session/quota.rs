//! How many states a tenant may have, and how large.
//!
//! Nothing stored says how much there is. It is counted when a tenant with a quota first stores something, kept up to
//! date from then on, and counted again from time to time: other servers may use the same store.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Error;
use crate::state::{Archive, Stored};
use crate::telemetry::clock;
use crate::types::Tenant;

/// The most that a tenant may have stored; 0 = as much as there is room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quota {
    pub states: u64,
    /// Of all their files.
    pub bytes: u64,
}

/// How long a count is believed.
const FRESH: Duration = Duration::from_secs(600);

/// The quotas of all tenants, and what they have used of them.
#[derive(Default)]
pub struct Quotas {
    of_all: Quota,
    of: BTreeMap<Tenant, Quota>,
    used: tokio::sync::Mutex<BTreeMap<Tenant, Used>>,
}

struct Used {
    stored: Stored,
    counted: Instant,
}

impl Quotas {
    /// `of_all` is for tenants that are not named.
    pub fn new(of_all: Quota, of: BTreeMap<Tenant, Quota>) -> Self {
        Self { of_all, of, used: Default::default() }
    }

    fn quota(&self, tenant: &Tenant) -> Option<Quota> {
        let quota = *self.of.get(tenant).unwrap_or(&self.of_all);
        Some(quota).filter(|quota| *quota != Quota::default())
    }

    /// Refuses a state of `bytes` that would be too much; otherwise, if `take`, counts it.
    pub(super) async fn admit(&self, archive: &Archive, tenant: &Tenant, bytes: u64, take: bool) -> Result<(), Error> {
        let Some(Quota { states, bytes: most }) = self.quota(tenant) else { return Ok(()) };
        let now = clock::now();
        let mut all = self.used.lock().await;
        let fresh = all.get(tenant).is_some_and(|used| now - used.counted < FRESH);
        if !fresh {
            let stored = archive.stored(tenant).await?;
            all.insert(tenant.clone(), Used { stored, counted: now });
        }
        let used = &mut all.get_mut(tenant).expect("it is there or was put there").stored;
        let exceeded = |what: &str, have: u64, most: u64| Error::QuotaExceeded {
            message: format!(
                "of {most} {what} that stored states may have, {have} are in use; delete states or sessions to make room"
            ),
        };
        if states > 0 && used.states >= states {
            return Err(exceeded("files", used.states, states));
        }
        if most > 0 && used.bytes.saturating_add(bytes) > most {
            return Err(exceeded("bytes", used.bytes, most));
        }
        if take {
            used.states += 1;
            used.bytes += bytes;
        }
        Ok(())
    }

    /// Something of a tenant was removed, or came to nothing.
    pub(super) async fn give_back(&self, tenant: &Tenant, bytes: u64) {
        if self.quota(tenant).is_none() {
            return;
        }
        if let Some(used) = self.used.lock().await.get_mut(tenant) {
            used.stored.states = used.stored.states.saturating_sub(1);
            used.stored.bytes = used.stored.bytes.saturating_sub(bytes);
        }
    }

    /// Nobody knows how much of a tenant was removed: it is counted again when that matters.
    pub(super) async fn count_again(&self, tenant: &Tenant) {
        self.used.lock().await.remove(tenant);
    }
}
