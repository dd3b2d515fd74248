//! Finding the last of numbers that follow one another, without looking at all of them.

/// How many numbers are asked about at once: a store far away takes as long for all of them as for one.
pub(super) const AT_ONCE: u64 = 16;

/// A search for the last number that is in use, where those above one that is are in use up to it: as many rounds of
/// [`AT_ONCE`] questions as the logarithm of how many these are.
pub(super) struct Gallop {
    /// In use, or 0.
    low: u64,
    /// Not in use.
    high: Option<u64>,
    /// The logarithm of how far ahead it has looked.
    far: u64,
}

/// What a search has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Last {
    Is(u64),
    /// One is in use above one that is not, as where a file was lost: which is the last is not to be found so.
    Unclear,
}

impl Gallop {
    /// Above a number that is in use, or 0.
    pub fn above(known: u64) -> Self {
        Self { low: known, high: None, far: 0 }
    }

    /// Of which numbers it has to be told next whether they are in use.
    pub fn asks(&self) -> Vec<u64> {
        let Self { low, high, far } = *self;
        let ahead = |of: u64, far: u64| (far..far + AT_ONCE).map(move |n| of.saturating_add(1 << n.min(63))).collect();
        match high {
            None => ahead(low, far),
            Some(high) if high - low > 1 => {
                let step = (high - low).div_ceil(AT_ONCE + 1);
                (1..=AT_ONCE).map(|n| low + n * step).take_while(|number| *number < high).collect()
            }
            // If `high` was lost and is not the end, one of these is likely there.
            Some(high) => ahead(high, 0),
        }
    }

    /// Takes the answers. Numbers put meanwhile may be told of or not.
    pub fn hear(&mut self, asked: &[u64], in_use: &[bool]) -> Option<Last> {
        let many = in_use.iter().take_while(|in_use| **in_use).count();
        let is_over = self.high == Some(self.low + 1);
        if in_use[many..].contains(&true) || is_over && many > 0 {
            return Some(Last::Unclear);
        }
        if is_over {
            return Some(Last::Is(self.low));
        }
        self.low = asked[..many].last().copied().unwrap_or(self.low);
        self.high = asked.get(many).copied().or(self.high);
        self.far += AT_ONCE;
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// What is found, and how many numbers were asked about.
    fn find(known: u64, in_use: impl Fn(u64) -> bool) -> (Last, usize) {
        let (mut search, mut questions) = (Gallop::above(known), 0);
        loop {
            let asked = search.asks();
            questions += asked.len();
            let answers: Vec<bool> = asked.iter().map(|number| in_use(*number)).collect();
            if let Some(last) = search.hear(&asked, &answers) {
                return (last, questions);
            }
        }
    }

    #[test]
    fn what_it_asks_grows_with_the_logarithm() {
        for (last, most) in
            [(0, 32), (1, 32), (20, 48), (1_000, 64), (10_000, 96), (1_000_000, 144), (10u64.pow(12), 256)]
        {
            let (found, asked) = find(0, |number| number <= last);
            assert_eq!(found, Last::Is(last));
            assert!(asked <= most, "{asked} for {last}");
        }
    }

    proptest! {
        #[test]
        fn the_last_one_is_found(known in 0u64..3_000, more in prop_oneof![0u64..40, 0u64..200_000]) {
            prop_assert_eq!(find(known, |number| number <= known + more).0, Last::Is(known + more));
        }

        /// A lost record must not make a session forget what comes after it.
        #[test]
        fn one_that_is_lost_is_not_taken_for_the_end(last in 3u64..20_000, at in 0u64..20_000) {
            let lost = 1 + at % (last - 1);
            let (found, _) = find(0, |number| number != lost && number <= last);
            prop_assert!(found == Last::Unclear || found == Last::Is(last), "{found:?} of {last} without {lost}");
        }

        #[test]
        fn it_never_names_one_that_is_not_there(there in prop::collection::btree_set(1u64..300, 0..200)) {
            let there: BTreeSet<u64> = there;
            if let (Last::Is(found), _) = find(0, |number| there.contains(&number)) {
                prop_assert!((found == 0 || there.contains(&found)) && !there.contains(&(found + 1)));
            }
        }
    }
}
