//! What was deleted is not kept here either: the states that only its own turns were the reason for.
//!
//! A state on the way of a text is several texts' when they part behind it, and stays; so does, in memory, whatever another
//! text goes on from. On disk nothing tells that, and all of the way goes that is not in memory: what another text needs of it
//! is read again.

use super::PrefixCache;
use super::shelf::{From, Root};
use crate::state::Entry;
use crate::types::{StateId, Tenant};

/// A text, and how many ids of it somebody else needs.
#[derive(Clone, Debug)]
pub(super) struct Way {
    pub root: Root,
    pub ids: Vec<u32>,
    pub shared: usize,
}

/// What is to be forgotten of a tenant's.
#[derive(Clone, Debug, Default)]
pub(in crate::session) struct Forgotten {
    /// All that was read after these states.
    pub(super) roots: Vec<Root>,
    pub(super) ways: Vec<Way>,
}

impl Forgotten {
    /// All that was read after a state of these weights.
    pub fn state(&mut self, fingerprint: &str, id: &StateId) {
        self.roots.push(Root { fingerprint: fingerprint.into(), from: From::State(id.clone()) });
    }

    /// What a turn read, and what was read after it. A turn that others were before read after their state.
    pub fn turn(&mut self, entry: &Entry) {
        let record = &entry.record;
        if let Some(state) = &record.state {
            self.state(&record.fingerprint, state);
        }
        if let (None, Some(beginning)) = (&record.parent, &record.beginning) {
            let root =
                Root { fingerprint: record.fingerprint.clone(), from: From::Beginning(beginning.fingerprint.clone()) };
            self.ways.push(Way { root, ids: record.ids.clone(), shared: 0 });
        }
    }
}

impl PrefixCache {
    /// Forgets what was deleted: in memory now, on disk soon.
    pub fn forget(&self, tenant: &Tenant, mut forgotten: Forgotten) {
        let mut inside = self.lock();
        for root in &forgotten.roots {
            inside.shelf.forget_root(tenant, root);
        }
        for way in &mut forgotten.ways {
            way.shared = inside.shelf.forget_way(tenant, &way.root, &way.ids);
        }
        let (bytes, entries) = (inside.shelf.bytes(), inside.shelf.entries());
        drop(inside);
        crate::telemetry::metrics::prefix_holds(bytes, entries, 0);
        if let Some(disk) = &self.disk {
            disk.forget(tenant.clone(), forgotten);
        }
    }
}
