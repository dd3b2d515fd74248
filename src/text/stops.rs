//! Stop strings as one automaton, fed byte by byte.

/// Aho and Corasick's automaton (Commun. ACM 18, 1975) of the stop strings.
///
/// Our own, because what must be held back is the *depth* of the state (how much of the text's end may be the beginning
/// of a stop string), and the crates that search do not show it. Building is linear in the strings' bytes (after sorting
/// them); a step takes constant time on average over a text.
pub(super) struct Stops {
    /// By depth; node 0 is the root, and the children of a node stand side by side, ordered by their byte.
    nodes: Vec<Node>,
}

/// The beginning of one or more stop strings.
#[derive(Clone, Copy, Default)]
struct Node {
    /// Its last byte.
    byte: u8,
    /// Its length in bytes.
    depth: u32,
    /// The longest proper suffix of it that is also a node.
    fail: u32,
    /// Length of the longest whole stop string it ends with; 0 = none.
    ends: u32,
    /// Its children are the nodes `first..last`.
    first: u32,
    last: u32,
}

impl Stops {
    /// Empty strings are left out: they would match everywhere.
    pub fn new(strings: &[String]) -> Self {
        let mut strings: Vec<&[u8]> = strings.iter().map(String::as_bytes).filter(|bytes| !bytes.is_empty()).collect();
        strings.sort_unstable();
        strings.dedup();
        let mut stops = Self { nodes: vec![Node::default()] };
        // For each node, the strings that begin with it.
        let mut ranges = vec![(0, strings.len())];
        // Breadth first: when a node is reached, all shorter ones are complete.
        let mut index = 0;
        while index < stops.nodes.len() {
            let mut node = stops.nodes[index];
            let (start, end) = ranges[index];
            let mut rest = start..end;
            let depth = node.depth as usize;
            node.ends = stops.nodes[node.fail as usize].ends;
            if strings.get(rest.start).is_some_and(|string| string.len() == depth) {
                node.ends = node.depth;
                rest.start += 1;
            }
            node.first = place(stops.nodes.len());
            while !rest.is_empty() {
                let byte = strings[rest.start][depth];
                let alike = strings[rest.clone()].iter().take_while(|string| string[depth] == byte).count();
                let fail = if index == 0 { 0 } else { stops.step(node.fail, byte) };
                stops.nodes.push(Node { byte, depth: node.depth + 1, fail, ..Node::default() });
                ranges.push((rest.start, rest.start + alike));
                rest.start += alike;
            }
            node.last = place(stops.nodes.len());
            stops.nodes[index] = node;
            index += 1;
        }
        stops
    }

    /// The state after one more byte; 0 is the state before any text.
    pub fn step(&self, mut state: u32, byte: u8) -> u32 {
        loop {
            let node = self.nodes[state as usize];
            let children = &self.nodes[node.first as usize..node.last as usize];
            match children.binary_search_by_key(&byte, |child| child.byte) {
                Ok(child) => return node.first + child as u32,
                Err(_) if state == 0 => return 0,
                Err(_) => state = node.fail,
            }
        }
    }

    /// How many bytes at the end of the text are the beginning of a stop string.
    pub fn depth(&self, state: u32) -> u64 {
        self.nodes[state as usize].depth.into()
    }

    /// The length of the longest stop string the text ends with.
    pub fn ending(&self, state: u32) -> Option<u64> {
        match self.nodes[state as usize].ends {
            0 => None,
            length => Some(length.into()),
        }
    }
}

fn place(index: usize) -> u32 {
    u32::try_from(index).expect("stop strings are bounded by the size of a request")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn depth_and_ending_are_the_longest(
            stops in prop::collection::vec("[abc]{0,5}", 0..8),
            text in "[abcd]{0,40}",
        ) {
            let automaton = Stops::new(&stops);
            let mut state = 0;
            for (i, byte) in text.bytes().enumerate() {
                state = automaton.step(state, byte);
                let seen = &text[..=i];
                let longest = |is: &dyn Fn(&str) -> bool| (1..=seen.len()).rev().find(|&n| is(&seen[seen.len() - n..]));
                let prefix = longest(&|end| stops.iter().any(|stop| stop.starts_with(end)));
                let whole = longest(&|end| stops.iter().any(|stop| stop == end));
                prop_assert_eq!(automaton.depth(state), prefix.unwrap_or(0) as u64);
                prop_assert_eq!(automaton.ending(state), whole.map(|n| n as u64));
            }
        }
    }

    #[test]
    fn the_automaton_is_no_larger_than_its_strings() {
        let stops: Vec<String> = (0..10_000).map(|i| format!("stop number {i}")).collect();
        let automaton = Stops::new(&stops);
        assert!(automaton.nodes.len() <= 1 + stops.iter().map(String::len).sum::<usize>());
        let state = "and stop number 777".bytes().fold(0, |state, byte| automaton.step(state, byte));
        assert_eq!(automaton.ending(state), Some(15));
    }
}
