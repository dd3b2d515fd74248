//! Where in a text states are kept, so that another text which shares its beginning finds one close to where they part.

use std::collections::BTreeSet;

/// Tokens between two regular checkpoints at the beginning of a text, unless memory is short: two texts that share 700
/// tokens then share a state of at least 672.
const FINEST: usize = 48;

/// How many regular checkpoints lie in front of the one where the space between them doubles.
const OCTAVE: usize = 16;

/// Texts with less than this to read have no regular checkpoints: each one parts a step in two, and here that would cost
/// more than it may save.
const LONG: usize = 192;

/// Texts with less than this to read are not parted at all.
const SHORT: usize = 64;

/// Of texts with less than this to read nothing is kept: reading them again is one step.
pub(super) const LEAST: usize = 16;

/// What a kept state takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// Bytes whatever the length of the text.
    pub fixed: u64,
    /// Bytes more for each token of it.
    pub per_token: u64,
}

impl Cost {
    fn at(self, depth: usize) -> u64 {
        self.fixed.saturating_add(self.per_token.saturating_mul(depth as u64))
    }
}

/// A text that is to be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text<'a> {
    /// How many of its tokens a state has read already.
    pub from: usize,
    pub len: usize,
    /// Where it is known to part from other texts.
    pub forks: &'a [usize],
    /// Where its messages end.
    pub boundaries: &'a [usize],
}

/// Where states of a text are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stops {
    /// Ascending; behind `from`, up to `len`.
    pub at: Vec<usize>,
    /// Tokens between regular ones at the text's beginning.
    pub spacing: usize,
}

/// Chooses where states of `text` are kept, in at most `room` bytes.
///
/// At its end, unless there is next to nothing to read. In a text long enough also where it is known to part from others; at regular places, whose
/// distance is a sixteenth of what lies before them, so that their number grows with the logarithm of the length; at ends
/// of messages; and 16, 32, 64, … tokens before the end, where texts that are nearly the same part. When that is more than
/// there is room for, the distances are doubled until it is not.
pub(super) fn stops(text: Text, cost: Cost, room: u64) -> Stops {
    let mut spacing = FINEST;
    loop {
        let at = chosen(text, spacing);
        let bytes = at.iter().fold(0u64, |sum, &depth| sum.saturating_add(cost.at(depth)));
        if bytes <= room {
            return Stops { at, spacing };
        }
        if spacing >= text.len {
            let end = (cost.at(text.len) <= room).then_some(text.len);
            return Stops { at: end.into_iter().collect(), spacing };
        }
        spacing *= 2;
    }
}

fn chosen(Text { from, len, forks, boundaries }: Text, spacing: usize) -> Vec<usize> {
    let unread = len - from;
    if unread < SHORT {
        return if unread < LEAST { Vec::new() } else { vec![len] };
    }
    let long = unread >= LONG;
    // A state that close behind another one saves less than it costs to stop there.
    let apart = if long { spacing / 3 } else { SHORT / 2 };
    let mut at = BTreeSet::from([from]);
    let add = |at: &mut BTreeSet<usize>, depth: usize, until: usize| {
        let inside = from < depth && depth < len;
        if inside && at.range((depth + 1).saturating_sub(apart)..=until).next().is_none() {
            at.insert(depth);
        }
    };
    forks.iter().for_each(|&depth| add(&mut at, depth, depth));
    if long {
        // A regular place counts even when another state is near: the next regular one is far.
        at.extend(regular(spacing, from + apart, len.saturating_sub(apart)));
    }
    boundaries.iter().for_each(|&depth| add(&mut at, depth, depth));
    let before_end = (0..if long { usize::BITS / 2 } else { 1 }).map(|n| (spacing / 3) << n);
    for depth in before_end.take_while(|&n| n < unread).map(|n| len - n) {
        add(&mut at, depth, depth + apart);
    }
    at.insert(len);
    at.remove(&from);
    at.into_iter().collect()
}

/// The regular places from `first` to before `end`: the same ones in every text.
fn regular(spacing: usize, first: usize, end: usize) -> impl Iterator<Item = usize> {
    let step = move |depth: usize| {
        let octaves = (depth / (OCTAVE * spacing)).checked_ilog2().unwrap_or(0);
        let wide = if depth < OCTAVE * spacing { spacing } else { spacing << octaves };
        (depth / wide + 1) * wide
    };
    // The first one that is not before `first`.
    std::iter::successors(Some(step(first.saturating_sub(1))), move |&depth| Some(step(depth)))
        .take_while(move |&depth| depth < end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SMALL: Cost = Cost { fixed: 1, per_token: 0 };

    fn whole(len: usize) -> Text<'static> {
        Text { from: 0, len, forks: &[], boundaries: &[] }
    }

    #[test]
    fn two_texts_that_share_700_of_1400_tokens_share_a_state_of_650() {
        let Stops { at, spacing } = stops(whole(1400), SMALL, 1 << 20);
        assert!(at.iter().any(|depth| (650..=700).contains(depth)), "{at:?}");
        assert_eq!((spacing, at.last()), (FINEST, Some(&1400)));
    }

    #[test]
    fn short_texts_are_read_in_few_steps() {
        assert_eq!(stops(whole(60), SMALL, 99).at, [60]);
        let chat = Text { boundaries: &[2, 20, 23, 96, 100], ..whole(100) };
        assert_eq!(stops(chat, SMALL, 99).at, [96, 100]);
        assert_eq!(stops(whole(100), SMALL, 99).at, [84, 100]);
        assert_eq!(stops(Text { from: 50, ..chat }, SMALL, 99).at, [100]);
        assert_eq!(stops(Text { from: 90, ..chat }, SMALL, 99).at, [0; 0]);
    }

    #[test]
    fn where_texts_part_and_where_messages_end_is_kept() {
        let text = Text { forks: &[333], boundaries: &[5, 317, 320, 345, 900, 903, 1000, 1396], ..whole(1400) };
        let at = stops(text, SMALL, 99).at;
        for depth in [317, 333, 900, 1000, 1396, 1400] {
            assert!(at.contains(&depth), "{depth} of {at:?}");
        }
        for close in [5, 320, 345, 903, 1384] {
            assert!(!at.contains(&close), "{close} of {at:?}");
        }
    }

    #[test]
    fn their_number_grows_with_the_logarithm_of_the_length() {
        let count = |len| stops(whole(len), SMALL, 1 << 20).at.len();
        assert!(count(10_000) < 100 && count(1_000_000) < 240, "{} {}", count(10_000), count(1_000_000));
    }

    proptest! {
        #[test]
        fn they_fit_and_are_never_far(
            len in 1usize..50_000, from in 0usize..50_000, room in 0u64..400, per_token in 0u64..2,
            mut forks in prop::collection::vec(0usize..50_000, 0..4),
            mut boundaries in prop::collection::vec(0usize..50_000, 0..40),
        ) {
            let from = from % len;
            forks.sort_unstable();
            boundaries.sort_unstable();
            let text = Text { from, len, forks: &forks, boundaries: &boundaries };
            let cost = Cost { fixed: 2, per_token };
            let Stops { at, spacing } = stops(text, cost, room);
            prop_assert!(at.windows(2).all(|two| two[0] < two[1]));
            prop_assert!(at.iter().all(|&depth| depth > from && depth <= len));
            prop_assert!(at.iter().map(|&depth| cost.at(depth)).sum::<u64>() <= room);
            if let Some(&end) = at.last() {
                prop_assert_eq!(end, len);
            }
            // Wherever another text parts from this one, a state is near: at the spacing, or a sixteenth.
            if spacing == FINEST && len - from >= LONG {
                let places: Vec<usize> = std::iter::once(from).chain(at).collect();
                for two in places.windows(2) {
                    let most = (two[1] / OCTAVE).max(FINEST) + FINEST / 3;
                    prop_assert!(two[1] - two[0] <= most, "{:?}", two);
                }
            }
        }

        #[test]
        fn regular_places_are_the_same_wherever_one_begins(first in 0usize..20_000, coarser in 0u32..4) {
            let all: Vec<usize> = regular(FINEST, 1, 40_000).collect();
            let some: Vec<usize> = regular(FINEST, first, 40_000).collect();
            let expected: Vec<usize> = all.iter().copied().filter(|&depth| depth >= first.max(1)).collect();
            prop_assert_eq!(some, expected);
            let wide: Vec<usize> = regular(FINEST << coarser, 1, 40_000).collect();
            prop_assert!(wide.iter().all(|depth| all.contains(depth)));
        }
    }
}
