//! The states that are kept of texts, in so many bytes, each tenant's apart.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::forest::{Forest, Found, Place};
use crate::types::{Memory, StateId, Tenant};

/// What a text is the continuation of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Root {
    /// Of the model's weights.
    pub fingerprint: String,
    pub from: From,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum From {
    /// A state that has read nothing, by the fingerprint of its values.
    Beginning(String),
    /// A stored state, whose text is not at hand.
    State(StateId),
}

/// A bounded set of states, by what they have read.
///
/// When it is full, the tenant with the most bytes gives up what is least worth keeping: so no tenant loses anything while
/// it has less than its share, whatever the others do. Worth is what reading it again would take, for each byte and each
/// use, counted from the time of the last use as in GreedyDual-Size-Frequency. A place where texts part counts one use for
/// each of them, so it outlives what lies behind it; and of many states close to each other each is worth little
/// until the others are gone, so a long text is thinned out before it is forgotten.
#[derive(Debug)]
pub(super) struct Shelf {
    room: u64,
    tenants: BTreeMap<Tenant, Share>,
    pub evictions: u64,
}

/// One tenant's.
#[derive(Debug)]
struct Share {
    forest: Forest<Root, Entry>,
    /// By rank: the first goes first.
    queue: BTreeSet<(u64, Place)>,
    /// Of the states alone.
    bytes: u64,
    /// The rank of what was given up last: what is used now has at least this.
    floor: u64,
}

#[derive(Debug)]
struct Entry {
    memory: Arc<Memory>,
    bytes: u64,
    uses: u64,
    /// The floor when it was last used.
    since: u64,
    rank: u64,
}

/// What had no place, or lost it.
#[derive(Debug)]
pub(super) struct Gone {
    pub memory: Arc<Memory>,
    /// `None` when it was never kept.
    pub was: Option<Was>,
}

/// Where a state was kept.
#[derive(Debug)]
pub(super) struct Was {
    pub tenant: Tenant,
    pub root: Root,
    pub ids: Vec<u32>,
    /// How many tokens have to be read again without it.
    pub saves: usize,
}

/// What a state is worth that was used so often, saves reading so many tokens, and takes so many bytes.
pub(super) fn worth(uses: u64, saves: usize, bytes: u64) -> u64 {
    let worth = (u128::from(uses) * saves as u128) << 32;
    u64::try_from(worth / u128::from(bytes.max(1))).unwrap_or(u64::MAX)
}

impl Entry {
    fn ranked(&self, ways: usize, (depth, above): (usize, usize)) -> u64 {
        let uses = self.uses.saturating_add(ways.saturating_sub(1) as u64);
        self.since.saturating_add(worth(uses, depth - above, self.bytes))
    }
}

impl Share {
    fn new() -> Self {
        Self { forest: Forest::new(), queue: BTreeSet::new(), bytes: 0, floor: 0 }
    }

    fn total(&self) -> u64 {
        self.bytes + self.forest.bytes()
    }

    /// Notes one more use.
    fn touch(&mut self, place: Place) {
        let (ways, depths) = (self.forest.ways(place), self.forest.depths(place));
        let floor = self.floor;
        let Some(entry) = self.forest.get_mut(place) else { return };
        self.queue.remove(&(entry.rank, place));
        entry.uses += 1;
        entry.since = floor;
        entry.rank = entry.ranked(ways, depths);
        self.queue.insert((entry.rank, place));
    }

    /// Takes out what is least worth keeping of what `tenant` has here.
    fn give_up(&mut self, tenant: &Tenant) -> Option<Gone> {
        loop {
            let (rank, place) = self.queue.pop_first()?;
            let now = self.rank(place)?;
            // What lay around it has changed since it was ranked. It is ranked anew once at most before it is taken.
            if now > rank {
                self.forest.get_mut(place)?.rank = now;
                self.queue.insert((now, place));
                continue;
            }
            self.floor = self.floor.max(rank);
            let ((depth, above), (root, ids)) = (self.forest.depths(place), self.forest.path(place)?);
            let entry = self.forest.remove(place)?;
            self.bytes -= entry.bytes;
            let was = Was { tenant: tenant.clone(), root, ids, saves: depth - above };
            return Some(Gone { memory: entry.memory, was: Some(was) });
        }
    }

    /// Takes a state out that nobody is to find any more.
    fn forget(&mut self, place: Place) {
        if let Some(entry) = self.forest.remove(place) {
            self.queue.remove(&(entry.rank, place));
            self.bytes -= entry.bytes;
        }
    }

    fn rank(&self, place: Place) -> Option<u64> {
        let entry = self.forest.get(place)?;
        Some(entry.ranked(self.forest.ways(place), self.forest.depths(place)))
    }
}

impl Shelf {
    pub fn new(room: u64) -> Self {
        Self { room, tenants: BTreeMap::new(), evictions: 0 }
    }

    pub fn room(&self) -> u64 {
        self.room
    }

    pub fn bytes(&self) -> u64 {
        self.tenants.values().map(Share::total).sum()
    }

    pub fn entries(&self) -> usize {
        self.tenants.values().map(|share| share.queue.len()).sum()
    }

    /// What is known of a text, whose last token must be read anyhow: its logits are not kept.
    pub fn find(&self, tenant: &Tenant, root: &Root, ids: &[u32]) -> Found {
        let most = ids.len().saturating_sub(1);
        self.tenants.get(tenant).map_or_else(Found::default, |share| share.forest.find(root, ids, most))
    }

    /// The state that was found, which is being used.
    pub fn take(&mut self, tenant: &Tenant, found: &Found) -> Option<Arc<Memory>> {
        let (share, hit) = (self.tenants.get_mut(tenant)?, found.hit?);
        share.touch(hit);
        share.forest.get(hit).map(|entry| entry.memory.clone())
    }

    /// Gives all up, what is worth most first.
    pub fn clear(&mut self) -> Vec<Gone> {
        let mut gone = Vec::new();
        for (tenant, mut share) in std::mem::take(&mut self.tenants) {
            let of_one = std::iter::from_fn(|| share.give_up(&tenant).map(|gone| (share.floor, gone)));
            gone.extend(of_one);
        }
        gone.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
        gone.into_iter().map(|(_, gone)| gone).collect()
    }

    /// Forgets all states of a root.
    pub fn forget_root(&mut self, tenant: &Tenant, root: &Root) {
        let Some(share) = self.tenants.get_mut(tenant) else { return };
        share.forest.all(root).into_iter().for_each(|place| share.forget(place));
        self.tidy(tenant);
    }

    /// Forgets the states on the way of a text, from its end up to where another text goes on; gives how many ids these share.
    pub fn forget_way(&mut self, tenant: &Tenant, root: &Root, ids: &[u32]) -> usize {
        let Some(share) = self.tenants.get_mut(tenant) else { return 0 };
        let shared = loop {
            let found = share.forest.find(root, ids, ids.len());
            match found.hit {
                Some(place) if share.forest.ways(place) == 0 => share.forget(place),
                // Where others part from each other no state of this text alone is left above.
                Some(_) => break found.depth,
                None => break 0,
            }
        };
        self.tidy(tenant);
        shared
    }

    fn tidy(&mut self, tenant: &Tenant) {
        if self.tenants.get(tenant).is_some_and(|share| share.queue.is_empty()) {
            self.tenants.remove(tenant);
        }
    }

    /// Keeps a state that has read `ids`. Gives back what had to go for it, to be dropped where that keeps nobody waiting.
    pub fn put(&mut self, tenant: &Tenant, root: &Root, ids: &[u32], memory: Arc<Memory>) -> Vec<Gone> {
        let bytes = memory.bytes() + 4 * memory.tail.len() as u64;
        if ids.is_empty() || bytes > self.room {
            return vec![Gone { memory, was: None }];
        }
        let share = self.tenants.entry(tenant.clone()).or_insert_with(Share::new);
        let found = share.forest.find(root, ids, ids.len());
        if found.depth == ids.len() {
            // The same text gives the same state.
            return vec![Gone { memory, was: None }];
        }
        let entry = Entry { memory, bytes, uses: 0, since: 0, rank: 0 };
        let (place, _) = share.forest.insert(root, ids, entry);
        share.bytes += bytes;
        share.touch(place);
        let mut gone = Vec::new();
        while self.bytes() > self.room {
            let Some((tenant, share)) = self.tenants.iter_mut().max_by_key(|(_, share)| share.total()) else { break };
            gone.extend(share.give_up(tenant));
            self.evictions += 1;
            if share.queue.is_empty() {
                let tenant = tenant.clone();
                self.tenants.remove(&tenant);
            }
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::SegmentData;

    fn root() -> Root {
        Root { fingerprint: "weights".into(), from: From::Beginning("zeros".into()) }
    }

    fn tenant(name: &str) -> Tenant {
        Tenant::parse(name).expect("a tenant")
    }

    /// A state of a kilobyte and more.
    fn memory(kilobytes: usize) -> Arc<Memory> {
        let segment = SegmentData { name: "s".into(), shape: vec![256 * kilobytes], data: vec![0.0; 256 * kilobytes] };
        Arc::new(Memory { segments: vec![segment], ..Memory::default() })
    }

    fn text(id: u32, len: usize) -> Vec<u32> {
        vec![id; len]
    }

    fn holds(shelf: &Shelf, owner: &str, ids: &[u32]) -> bool {
        let longer: Vec<u32> = ids.iter().copied().chain([u32::MAX]).collect();
        shelf.find(&tenant(owner), &root(), &longer).depth == ids.len()
    }

    fn used(shelf: &mut Shelf, owner: &str, ids: &[u32]) {
        let longer: Vec<u32> = ids.iter().copied().chain([u32::MAX]).collect();
        let found = shelf.find(&tenant(owner), &root(), &longer);
        assert!(shelf.take(&tenant(owner), &found).is_some());
    }

    #[test]
    fn the_oldest_goes_first_and_what_is_used_stays() {
        let mut shelf = Shelf::new(5 * 1024);
        for id in 0..3 {
            shelf.put(&tenant("a"), &root(), &text(id, 100), memory(1));
        }
        used(&mut shelf, "a", &text(0, 100));
        for id in 3..6 {
            shelf.put(&tenant("a"), &root(), &text(id, 100), memory(1));
        }
        let left: Vec<u32> = (0..6).filter(|&id| holds(&shelf, "a", &text(id, 100))).collect();
        assert!(left.contains(&0) && left.contains(&5) && !left.contains(&1), "{left:?}");
    }

    #[test]
    fn where_texts_part_outlives_what_lies_behind_it() {
        let mut shelf = Shelf::new(10 * 1024);
        shelf.put(&tenant("a"), &root(), &text(7, 100), memory(1));
        for id in 0..40 {
            used(&mut shelf, "a", &text(7, 100));
            let ids = [text(7, 100), text(id + 10, 100)].concat();
            shelf.put(&tenant("a"), &root(), &ids, memory(1));
        }
        assert!(holds(&shelf, "a", &text(7, 100)) && shelf.evictions > 30);
    }

    #[test]
    fn a_long_text_is_thinned_out_before_others_are_forgotten() {
        let mut shelf = Shelf::new(30 * 1024);
        shelf.put(&tenant("a"), &root(), &text(1, 100), memory(1));
        for depth in 1..60 {
            shelf.put(&tenant("a"), &root(), &text(2, 20 * depth), memory(1));
        }
        assert!(holds(&shelf, "a", &text(1, 100)));
        let left: Vec<usize> = (1..60).filter(|depth| holds(&shelf, "a", &text(2, 20 * depth))).collect();
        assert!(left.len() > 10 && left.windows(2).all(|two| two[1] - two[0] < 12), "{left:?}");
    }

    #[test]
    fn a_tenant_with_less_than_its_share_loses_nothing() {
        let mut shelf = Shelf::new(20 * 1024);
        for id in 0..6 {
            shelf.put(&tenant("small"), &root(), &text(id, 10), memory(1));
        }
        for id in 0..100 {
            shelf.put(&tenant("large"), &root(), &text(id, 1000), memory(1));
        }
        assert!((0..6).all(|id| holds(&shelf, "small", &text(id, 10))));
        assert!(!holds(&shelf, "small", &text(50, 1000)) && holds(&shelf, "large", &text(99, 1000)));
    }

    #[test]
    fn what_is_larger_than_all_the_room_is_not_kept() {
        let mut shelf = Shelf::new(4 * 1024);
        shelf.put(&tenant("a"), &root(), &text(1, 10), memory(1));
        assert_eq!(shelf.put(&tenant("a"), &root(), &text(2, 10), memory(5)).len(), 1);
        assert!(holds(&shelf, "a", &text(1, 10)) && !holds(&shelf, "a", &text(2, 10)));
    }

    #[test]
    fn what_is_forgotten_takes_nothing_with_it_that_others_share() {
        let mut shelf = Shelf::new(100 * 1024);
        let (a, root) = (tenant("a"), root());
        let other = Root { from: From::State(StateId::new(1, 2)), ..root.clone() };
        let texts = [text(1, 10), [text(1, 10), text(2, 10)].concat(), [text(1, 10), text(3, 10)].concat()];
        for ids in &texts {
            shelf.put(&a, &root, ids, memory(1));
            shelf.put(&a, &other, ids, memory(1));
        }
        shelf.put(&tenant("b"), &root, &texts[1], memory(1));
        assert_eq!(shelf.forget_way(&a, &root, &[&texts[1][..], &[7, 8]].concat()), 10);
        assert_eq!(texts.each_ref().map(|ids| holds(&shelf, "a", ids)), [true, false, true]);
        assert_eq!(shelf.forget_way(&a, &root, &texts[2]), 0);
        assert_eq!((shelf.entries(), holds(&shelf, "b", &texts[1])), (4, true));
        shelf.forget_root(&a, &other);
        assert_eq!((shelf.entries(), shelf.tenants.len()), (1, 1));
        shelf.forget_root(&tenant("b"), &root);
        assert_eq!((shelf.bytes(), shelf.tenants.len()), (0, 0));
    }

    proptest! {
        #[test]
        fn it_never_takes_more_than_its_room(
            room in 0u64..40_000,
            puts in prop::collection::vec((0u32..3, prop::collection::vec(0u32..3, 1..40), 0usize..6, any::<bool>()), 1..80),
        ) {
            let mut shelf = Shelf::new(room);
            for (owner, ids, kilobytes, again) in puts {
                let owner = format!("t{owner}");
                shelf.put(&tenant(&owner), &root(), &ids, memory(kilobytes));
                prop_assert!(shelf.bytes() <= room);
                if again && holds(&shelf, &owner, &ids) {
                    used(&mut shelf, &owner, &ids);
                }
                for share in shelf.tenants.values() {
                    let bytes: u64 = share.queue.iter().map(|(_, place)| share.forest.get(*place).expect("it is kept").bytes).sum();
                    prop_assert_eq!(share.bytes, bytes);
                    prop_assert!(share.queue.iter().all(|(rank, place)| share.forest.get(*place).expect("kept").rank == *rank));
                    prop_assert!(!share.forest.is_empty());
                }
            }
        }
    }
}
