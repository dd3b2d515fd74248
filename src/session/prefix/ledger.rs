//! Which states are on disk, and which of them go when there are too many: names and numbers only.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::shelf::{From, Root, worth};
use crate::types::Tenant;

/// Which text a file's state has read, without its words: what the text continues, how long it is, and what it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Label {
    pub root: Mark,
    pub depth: usize,
    pub text: Mark,
}

/// A BLAKE3 hash, written in hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mark([u8; 32]);

impl Mark {
    /// Of what texts continue, and of the arithmetic that reads them.
    pub fn of_root(root: &Root, arithmetic: &str) -> Self {
        let (kind, from) = match &root.from {
            From::Beginning(fingerprint) => ("beginning", fingerprint.clone()),
            From::State(id) => ("state", id.to_string()),
        };
        // No part can hold the byte between them.
        let whole = [&root.fingerprint, arithmetic, kind, &from].join("\0");
        Self(*blake3::hash(whole.as_bytes()).as_bytes())
    }

    pub fn parse(digits: &str) -> Option<Self> {
        let hash = blake3::Hash::from_hex(digits).ok()?;
        // One mark has one name.
        (hash.to_hex().as_str() == digits).then(|| Self(*hash.as_bytes()))
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

/// Hashes of the beginnings of a text.
pub(super) struct Beginnings<'a> {
    ids: &'a [u32],
    hashed: usize,
    hasher: blake3::Hasher,
}

impl<'a> Beginnings<'a> {
    pub fn new(ids: &'a [u32]) -> Self {
        Self { ids, hashed: 0, hasher: blake3::Hasher::new() }
    }

    /// Of the first `depth` ids, which are no fewer than the last time and no more than there are.
    pub fn mark(&mut self, depth: usize) -> Mark {
        for id in &self.ids[self.hashed..depth] {
            self.hasher.update(&id.to_le_bytes());
        }
        self.hashed = depth;
        Mark(*self.hasher.finalize().as_bytes())
    }
}

/// The files of all tenants, by the same policy as the states in memory: when there are too many bytes, the tenant with the
/// most gives up what is worth least.
#[derive(Debug)]
pub(super) struct Ledger {
    room: u64,
    bytes: u64,
    tenants: BTreeMap<Tenant, Share>,
}

#[derive(Debug, Default)]
struct Share {
    bytes: u64,
    files: BTreeMap<Label, Filed>,
    /// By rank: the first goes first.
    queue: BTreeSet<(u64, Label)>,
    /// The rank of what was given up last.
    floor: u64,
}

#[derive(Debug)]
struct Filed {
    /// How many tokens it saved reading when it was filed.
    saves: usize,
    bytes: u64,
    uses: u64,
    rank: u64,
}

impl Share {
    fn touch(&mut self, label: &Label) {
        let Some(filed) = self.files.get_mut(label) else { return };
        self.queue.remove(&(filed.rank, label.clone()));
        filed.uses += 1;
        filed.rank = self.floor.saturating_add(worth(filed.uses, filed.saves, filed.bytes));
        self.queue.insert((filed.rank, label.clone()));
    }

    fn remove(&mut self, label: &Label) -> Option<Filed> {
        let filed = self.files.remove(label)?;
        self.queue.remove(&(filed.rank, label.clone()));
        self.bytes -= filed.bytes;
        Some(filed)
    }
}

impl Ledger {
    pub fn new(room: u64) -> Self {
        Self { room, bytes: 0, tenants: BTreeMap::new() }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn files(&self) -> usize {
        self.tenants.values().map(|share| share.files.len()).sum()
    }

    /// Whether there could be a file of so many bytes.
    pub fn fits(&self, bytes: u64) -> bool {
        bytes <= self.room
    }

    pub fn has(&self, tenant: &Tenant, label: &Label) -> bool {
        self.tenants.get(tenant).is_some_and(|share| share.files.contains_key(label))
    }

    /// The file that has read most of a text, of those with more than `known` and at most `most` ids; and how many tokens it
    /// saved when it was filed.
    pub fn find(
        &self,
        tenant: &Tenant,
        root: Mark,
        ids: &[u32],
        (known, most): (usize, usize),
    ) -> Option<(Label, usize)> {
        let share = self.tenants.get(tenant)?;
        let (mut beginnings, mut found, mut depth) = (Beginnings::new(ids), None, known + 1);
        let first = |depth: usize| Label { root, depth, text: Mark([0; 32]) };
        while let Some((label, _)) = share.files.range(first(depth)..).next() {
            if label.root != root || label.depth > most {
                break;
            }
            let label = Label { text: beginnings.mark(label.depth), ..label.clone() };
            depth = label.depth + 1;
            if let Some(filed) = share.files.get(&label) {
                found = Some((label, filed.saves));
            }
        }
        found
    }

    /// Notes a use.
    pub fn touch(&mut self, tenant: &Tenant, label: &Label) {
        if let Some(share) = self.tenants.get_mut(tenant) {
            share.touch(label);
        }
    }

    /// Notes a file. Gives those that have to go for it, with what they saved.
    pub fn add(&mut self, tenant: &Tenant, label: &Label, (saves, bytes): (usize, u64)) -> Vec<(Tenant, Label, usize)> {
        self.remove(tenant, label);
        let share = self.tenants.entry(tenant.clone()).or_default();
        share.bytes += bytes;
        self.bytes += bytes;
        share.files.insert(label.clone(), Filed { saves, bytes, uses: 0, rank: 0 });
        share.touch(label);
        let mut gone = Vec::new();
        while self.bytes > self.room {
            let Some((tenant, share)) = self.tenants.iter_mut().max_by_key(|(_, share)| share.bytes) else { break };
            let Some((rank, label)) = share.queue.first().cloned() else { break };
            share.floor = share.floor.max(rank);
            let tenant = tenant.clone();
            let saves = self.remove(&tenant, &label).map_or(0, |filed| filed.saves);
            gone.push((tenant, label, saves));
        }
        gone
    }

    /// All files of a root, with what each saved.
    pub fn all(&self, tenant: &Tenant, root: Mark) -> Vec<(Label, usize)> {
        let first = Label { root, depth: 0, text: Mark([0; 32]) };
        let files = self.tenants.get(tenant).into_iter().flat_map(|share| share.files.range(first.clone()..));
        files.take_while(|(label, _)| label.root == root).map(|(label, filed)| (label.clone(), filed.saves)).collect()
    }

    /// Forgets a file.
    pub fn forget(&mut self, tenant: &Tenant, label: &Label) {
        self.remove(tenant, label);
    }

    fn remove(&mut self, tenant: &Tenant, label: &Label) -> Option<Filed> {
        let share = self.tenants.get_mut(tenant)?;
        let filed = share.remove(label)?;
        self.bytes -= filed.bytes;
        if share.files.is_empty() {
            self.tenants.remove(tenant);
        }
        Some(filed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tenant(name: &str) -> Tenant {
        Tenant::parse(name).expect("a tenant")
    }

    fn root(from: &str) -> Mark {
        Mark::of_root(&Root { fingerprint: "weights".into(), from: From::Beginning(from.into()) }, "arithmetic")
    }

    fn label(root: Mark, ids: &[u32]) -> Label {
        Label { root, depth: ids.len(), text: Beginnings::new(ids).mark(ids.len()) }
    }

    #[test]
    fn a_mark_is_read_as_it_is_written_and_tells_what_it_is_of() {
        let mark = root("zeros");
        assert_eq!(Mark::parse(&mark.to_string()), Some(mark));
        assert_eq!(Mark::parse(&mark.to_string().to_uppercase()), None);
        assert_eq!(Mark::parse("00"), None);
        assert_ne!(mark, root("ones"));
        let other = Root { fingerprint: "weights".into(), from: From::Beginning("zeros".into()) };
        assert_ne!(mark, Mark::of_root(&other, "another"));
    }

    #[test]
    fn the_tenant_with_the_most_gives_up_what_is_worth_least() {
        let mut ledger = Ledger::new(100);
        let text = |n: u32| vec![n; 10];
        for n in 0..5 {
            assert!(ledger.add(&tenant("large"), &label(root("z"), &text(n)), (10, 15)).is_empty());
        }
        ledger.touch(&tenant("large"), &label(root("z"), &text(0)));
        let gone = ledger.add(&tenant("small"), &label(root("z"), &text(9)), (10, 30));
        assert_eq!(gone.len(), 1);
        assert_eq!(gone[0].0, tenant("large"));
        assert_ne!(gone[0].1, label(root("z"), &text(0)), "it was used");
        assert!(!ledger.fits(101) && ledger.bytes() == 90 && ledger.files() == 5);
    }

    proptest! {
        #[test]
        fn it_finds_the_longest_beginning_of_the_same_tenant_and_root(
            files in prop::collection::vec((0u8..2, 0u8..2, prop::collection::vec(0u32..2, 1..9)), 0..30),
            ids in prop::collection::vec(0u32..2, 0..10), known in 0usize..4, most in 0usize..10, room in 0u64..400,
        ) {
            let (mut ledger, mut there) = (Ledger::new(room), BTreeSet::new());
            let owner = |n: u8| tenant(["a", "b"][usize::from(n)]);
            let beginning = |n: u8| root(["x", "y"][usize::from(n)]);
            for (who, from, text) in files {
                let label = label(beginning(from), &text);
                there.insert((owner(who), label.clone()));
                for (owner, label, _) in ledger.add(&owner(who), &label, (text.len(), 20)) {
                    prop_assert!(there.remove(&(owner, label)));
                }
                prop_assert!(ledger.bytes() <= room && ledger.bytes() == 20 * there.len() as u64);
                prop_assert_eq!(ledger.files(), there.len());
            }
            let most = most.min(ids.len());
            let found = ledger.find(&owner(0), beginning(0), &ids, (known, most)).map(|(label, _)| label.depth);
            let mut depths = (known + 1..=most).rev();
            let wanted = depths.find(|&depth| there.contains(&(owner(0), label(beginning(0), &ids[..depth]))));
            prop_assert_eq!(found, wanted);
        }
    }
}
