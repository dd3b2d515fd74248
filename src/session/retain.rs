//! Which states a session keeps: the head and the last ones. What is older is in the token log.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use super::origin::Session;
use super::quota::Quotas;
use crate::state::{self, Archive, Turn};
use crate::types::{SessionId, Tenant};

/// How stored states are kept.
#[derive(Default)]
pub struct Policy {
    /// States that a session keeps, its head included; 0 = all. Older ones are rebuilt when they are asked for.
    pub snapshots: u64,
    pub quotas: Quotas,
}

/// How many states one turn may evict: more than one only where the policy has become stricter.
const AT_ONCE: usize = 8;

impl Policy {
    /// A turn of a session was committed on top of the head it began from. Nobody waits for what follows from that.
    pub(super) fn committed(self: &Arc<Self>, archive: &Archive, tenant: &Tenant, session: &Session) {
        let Some(oldest) = session.head.next().checked_sub(self.snapshots).filter(|_| self.snapshots > 0) else {
            return;
        };
        let first = session.head.live.as_ref().map_or(oldest + 1, |head| head.first);
        let (policy, archive, tenant, id) = (self.clone(), archive.clone(), tenant.clone(), session.id.clone());
        tokio::spawn(async move {
            if let Err(error) = policy.evict(&archive, &tenant, &id, first..=oldest).await {
                tracing::warn!(session = %id, %error, "an old state could not be evicted");
            }
        });
    }

    /// Removes the states of these records, from the last back to one that has none.
    async fn evict(
        &self,
        archive: &Archive,
        tenant: &Tenant,
        id: &SessionId,
        records: RangeInclusive<u64>,
    ) -> Result<(), state::Error> {
        for number in records.rev().take(AT_ONCE) {
            let Some(Turn { entry, .. }) = archive.turn_at(tenant, id, number).await? else { break };
            let Some(state) = entry.record.state.filter(|_| entry.record.resume.is_some()) else { break };
            // A copy names a state that is another record's to keep.
            if entry.back.is_some() {
                continue;
            }
            let Some(bytes) = archive.evict(tenant, &state).await? else { break };
            self.quotas.give_back(tenant, bytes).await;
        }
        Ok(())
    }
}

/// How the background sweep goes about its work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SweepPace {
    /// Objects looked at in one go.
    pub batch: usize,
    /// Rest after each batch.
    pub rest: Duration,
    /// Rest after everything was looked at.
    pub pause: Duration,
}

impl Default for SweepPace {
    fn default() -> Self {
        Self { batch: 32, rest: Duration::from_millis(200), pause: Duration::from_secs(300) }
    }
}
