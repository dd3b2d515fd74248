//! Texts by what they share: radix trees over token ids, one for each beginning.

use std::collections::BTreeMap;

/// Where something stands in a forest. A place that holds a value stays the same until that is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place(u64);

/// A map from sequences of ids to values that finds the longest known beginning of a sequence.
///
/// Every node but a root has a value, or two and more nodes below it: what two texts share is held once.
#[derive(Debug)]
pub(super) struct Forest<K, V> {
    roots: BTreeMap<K, Place>,
    nodes: BTreeMap<Place, Node<K, V>>,
    next: u64,
    /// Ids in all labels.
    ids: usize,
}

#[derive(Debug)]
struct Node<K, V> {
    above: Above<K>,
    /// The ids from there to here; none at a root.
    label: Vec<u32>,
    /// By the first id of their labels.
    below: BTreeMap<u32, Place>,
    /// How many ids lead here.
    depth: usize,
    value: Option<V>,
}

#[derive(Clone, Debug)]
enum Above<K> {
    Nothing(K),
    Node(Place),
}

/// What is known of a sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// The deepest value on its way.
    pub hit: Option<Place>,
    /// How many ids lead to it.
    pub depth: usize,
    /// Depths behind the hit where known texts part and nothing is held, ascending.
    pub forks: Vec<usize>,
    /// How many of its ids some known text begins with.
    pub known: usize,
}

/// How many ids two sequences share at their beginning.
pub(super) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl<K: Ord + Clone, V> Forest<K, V> {
    pub fn new() -> Self {
        Self { roots: BTreeMap::new(), nodes: BTreeMap::new(), next: 0, ids: 0 }
    }

    /// What is known of `ids`; values deeper than `most` are passed over.
    pub fn find(&self, root: &K, ids: &[u32], most: usize) -> Found {
        let mut found = Found::default();
        let mut next = self.roots.get(root);
        while let Some(place) = next {
            let node = &self.nodes[place];
            let shared = common(&node.label, &ids[found.known..]);
            found.known += shared;
            if shared < node.label.len() {
                break;
            }
            match node.value {
                Some(_) if node.depth <= most => {
                    found = Found { hit: Some(*place), depth: node.depth, forks: Vec::new(), known: found.known };
                }
                None if node.depth > 0 => found.forks.push(node.depth),
                _ => {}
            }
            next = ids.get(found.known).and_then(|id| node.below.get(id));
        }
        found
    }

    pub fn get(&self, place: Place) -> Option<&V> {
        self.nodes.get(&place)?.value.as_ref()
    }

    pub fn get_mut(&mut self, place: Place) -> Option<&mut V> {
        self.nodes.get_mut(&place)?.value.as_mut()
    }

    /// The places of all values of a root.
    pub fn all(&self, root: &K) -> Vec<Place> {
        let (mut all, mut next) = (Vec::new(), Vec::from_iter(self.roots.get(root).copied()));
        while let Some(place) = next.pop() {
            let node = &self.nodes[&place];
            all.extend(node.value.as_ref().map(|_| place));
            next.extend(node.below.values());
        }
        all
    }

    /// Puts a value at the end of `ids`, which are not none; gives the one that was there.
    pub fn insert(&mut self, root: &K, ids: &[u32], value: V) -> (Place, Option<V>) {
        let mut place = match self.roots.get(root) {
            Some(&place) => place,
            None => {
                let place = self.add(Above::Nothing(root.clone()), Vec::new(), 0);
                self.roots.insert(root.clone(), place);
                place
            }
        };
        let mut known = 0;
        while known < ids.len() {
            let node = &self.nodes[&place];
            let Some(&next) = node.below.get(&ids[known]) else {
                let leaf = self.add(Above::Node(place), ids[known..].to_vec(), ids.len());
                self.node(place).below.insert(ids[known], leaf);
                place = leaf;
                break;
            };
            let shared = common(&self.nodes[&next].label, &ids[known..]);
            known += shared;
            place = if shared < self.nodes[&next].label.len() { self.split(next, shared) } else { next };
        }
        (place, self.node(place).value.replace(value))
    }

    /// Takes a value out.
    pub fn remove(&mut self, place: Place) -> Option<V> {
        let value = self.nodes.get_mut(&place)?.value.take()?;
        self.tidy(place);
        Some(value)
    }

    /// How many ids lead here, and how many of them to the nearest value above.
    pub fn depths(&self, place: Place) -> (usize, usize) {
        let Some(node) = self.nodes.get(&place) else { return (0, 0) };
        let (depth, mut above) = (node.depth, &node.above);
        while let Above::Node(place) = above {
            let node = &self.nodes[place];
            if node.value.is_some() {
                return (depth, node.depth);
            }
            above = &node.above;
        }
        (depth, 0)
    }

    /// The root above a place, and the ids from there to it.
    pub fn path(&self, place: Place) -> Option<(K, Vec<u32>)> {
        let (mut labels, mut at) = (Vec::new(), place);
        loop {
            let node = self.nodes.get(&at)?;
            match &node.above {
                Above::Nothing(root) => {
                    return Some((root.clone(), labels.into_iter().rev().flatten().copied().collect()));
                }
                Above::Node(above) => {
                    labels.push(&node.label);
                    at = *above;
                }
            }
        }
    }

    /// How many known texts go on from here, each another way.
    pub fn ways(&self, place: Place) -> usize {
        self.nodes.get(&place).map_or(0, |node| node.below.len())
    }

    /// Bytes that the texts take, without their values.
    pub fn bytes(&self) -> u64 {
        /// About what a node takes besides its label.
        const NODE: u64 = 160;
        4 * self.ids as u64 + NODE * self.nodes.len() as u64
    }

    fn node(&mut self, place: Place) -> &mut Node<K, V> {
        self.nodes.get_mut(&place).expect("nodes name only nodes that are there")
    }

    fn add(&mut self, above: Above<K>, label: Vec<u32>, depth: usize) -> Place {
        let place = Place(self.next);
        self.next += 1;
        self.ids += label.len();
        self.nodes.insert(place, Node { above, label, below: BTreeMap::new(), depth, value: None });
        place
    }

    /// Makes a node in the middle of the way to `lower`, `at` ids down.
    fn split(&mut self, lower: Place, at: usize) -> Place {
        let node = self.node(lower);
        let rest = node.label.split_off(at);
        let label = std::mem::replace(&mut node.label, rest);
        let (depth, above, first) = (node.depth - node.label.len(), node.above.clone(), node.label[0]);
        let Above::Node(upper) = above else { unreachable!("a root has no label to split") };
        let entrance = label[0];
        self.ids -= label.len();
        let middle = self.add(Above::Node(upper), label, depth);
        self.node(middle).below.insert(first, lower);
        self.node(lower).above = Above::Node(middle);
        self.node(upper).below.insert(entrance, middle);
        middle
    }

    /// Takes nodes out that hold nothing and part nothing, from `place` upwards.
    fn tidy(&mut self, place: Place) {
        let node = &self.nodes[&place];
        if node.value.is_some() {
            return;
        }
        match (node.above.clone(), node.below.len()) {
            (Above::Nothing(root), 0) => {
                self.roots.remove(&root);
                self.nodes.remove(&place);
            }
            (Above::Node(upper), 0) => {
                let leaf = self.nodes.remove(&place).expect("it was just there");
                self.ids -= leaf.label.len();
                self.node(upper).below.remove(&leaf.label[0]);
                self.tidy(upper);
            }
            (Above::Node(upper), 1) => {
                let mut middle = self.nodes.remove(&place).expect("it was just there");
                let lower = *middle.below.values().next().expect("there is one");
                let entrance = middle.label[0];
                let node = self.node(lower);
                middle.label.append(&mut node.label);
                (node.label, node.above) = (middle.label, Above::Node(upper));
                self.node(upper).below.insert(entrance, lower);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl<K: Ord + Clone, V> Forest<K, V> {
        pub fn is_empty(&self) -> bool {
            self.nodes.is_empty()
        }

        /// Holds the shape to what its documentation says.
        fn audit(&self) {
            let mut ids = 0;
            for (place, node) in &self.nodes {
                ids += node.label.len();
                let depth = match &node.above {
                    Above::Nothing(root) => {
                        assert!(node.label.is_empty() && self.roots[root] == *place && !node.below.is_empty());
                        0
                    }
                    Above::Node(upper) => {
                        assert!(node.value.is_some() || node.below.len() > 1, "a node without use");
                        assert_eq!(self.nodes[upper].below[&node.label[0]], *place);
                        self.nodes[upper].depth + node.label.len()
                    }
                };
                assert_eq!(node.depth, depth);
            }
            assert_eq!(ids, self.ids);
        }
    }

    type Known = BTreeMap<(u8, Vec<u32>), usize>;

    /// The same by looking at everything.
    fn naive(known: &Known, root: u8, ids: &[u32], most: usize) -> (Option<usize>, Found) {
        let texts: Vec<&Vec<u32>> = known.keys().filter(|(r, _)| *r == root).map(|(_, text)| text).collect();
        let hit = texts.iter().filter(|t| t.len() <= most && ids.starts_with(t)).max_by_key(|t| t.len());
        let depth = hit.map_or(0, |t| t.len());
        let parts = |at: &usize| {
            let through = texts.iter().filter(|t| t.len() > *at && t[..*at] == ids[..*at]);
            let held = texts.iter().any(|t| t[..] == ids[..*at]);
            !held && through.map(|t| t[*at]).collect::<std::collections::BTreeSet<_>>().len() > 1
        };
        let known_ids = texts.iter().map(|t| common(t, ids)).max().unwrap_or(0);
        let forks = (depth.max(1)..=known_ids).filter(parts).collect();
        let value = hit.map(|text| known[&(root, (*text).clone())]);
        (value, Found { hit: None, depth, forks, known: known_ids })
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u8, Vec<u32>),
        Remove(prop::sample::Index),
        Find(u8, Vec<u32>, usize),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let text = || prop::collection::vec(0u32..3, 1..9);
        let op = prop_oneof![
            3 => (0u8..2, text()).prop_map(|(root, ids)| Op::Insert(root, ids)),
            2 => any::<prop::sample::Index>().prop_map(Op::Remove),
            3 => (0u8..2, text(), 0usize..9).prop_map(|(root, ids, most)| Op::Find(root, ids, most)),
        ];
        prop::collection::vec(op, 1..80)
    }

    proptest! {
        #[test]
        fn it_is_a_map_that_finds_the_longest_beginning(ops in ops()) {
            let (mut forest, mut known, mut places) = (Forest::new(), Known::new(), BTreeMap::new());
            for (n, op) in ops.into_iter().enumerate() {
                match op {
                    Op::Insert(root, ids) => {
                        let (place, old) = forest.insert(&root, &ids, n);
                        prop_assert_eq!(old, known.insert((root, ids.clone()), n));
                        if let Some(before) = places.insert((root, ids), place) {
                            prop_assert_eq!(before, place, "places stay");
                        }
                    }
                    Op::Remove(index) if !known.is_empty() => {
                        let key = known.keys().nth(index.index(known.len())).expect("one of them").clone();
                        let place = places.remove(&key).expect("it has one");
                        prop_assert_eq!(forest.remove(place), known.remove(&key));
                        prop_assert_eq!(forest.remove(place), None);
                    }
                    Op::Remove(_) => prop_assert!(forest.is_empty()),
                    Op::Find(root, ids, most) => {
                        let (value, expected) = naive(&known, root, &ids, most);
                        let found = forest.find(&root, &ids, most);
                        prop_assert_eq!(found.hit.and_then(|hit| forest.get(hit)).copied(), value);
                        prop_assert_eq!(Found { hit: None, ..found }, expected);
                    }
                }
                forest.audit();
                for root in 0..2 {
                    let all: BTreeMap<Place, ()> = forest.all(&root).into_iter().map(|place| (place, ())).collect();
                    let expected = places.iter().filter(|((r, _), _)| *r == root).map(|(_, place)| (*place, ())).collect();
                    prop_assert_eq!(all, expected);
                }
                for ((root, ids), place) in &places {
                    let above = known.keys().filter(|(r, t)| r == root && t.len() < ids.len() && ids.starts_with(t));
                    let above = above.map(|(_, t)| t.len()).max().unwrap_or(0);
                    prop_assert_eq!(forest.depths(*place), (ids.len(), above));
                }
            }
        }
    }
}
