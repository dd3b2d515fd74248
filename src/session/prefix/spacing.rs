//! Where in a text states are kept, so that another text which shares its beginning finds one close to where they part.

use std::collections::BTreeSet;

/// A long text is parted at regular places, and near its end, before anybody is known to share it. In a shorter one each
/// part would cost more than it may save: a step reads all weights, however few its tokens.
const LONG: usize = 192;

/// Of texts with less than this to read nothing is kept, and nothing is won by two states that are closer: reading so much
/// again is one step.
pub(super) const LEAST: usize = 16;

/// Where the space between regular places begins to grow, it is this part of what lies before them.
const PART: usize = 14;

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
    /// Tokens between the closest regular ones.
    pub spacing: usize,
}

/// Chooses where states of `text` are kept, in at most `room` bytes.
///
/// At its end, unless there is next to nothing to read, and where it is known to part from others. In a long one also at
/// regular places, `spacing` apart where that matters; at ends of messages; and 16, 64, 256, … tokens before the end, where
/// texts that are nearly the same part. When that is more than there is room for, every second of the regular places is
/// left out, and so on, until it is not.
pub(super) fn stops(text: Text, spacing: usize, cost: Cost, room: u64) -> Stops {
    let unread = text.len - text.from;
    if unread < LEAST {
        return Stops { at: Vec::new(), spacing };
    }
    let mut every = 1;
    loop {
        let at = chosen(text, spacing, every);
        let bytes = at.iter().fold(0u64, |sum, &depth| sum.saturating_add(cost.at(depth)));
        let spacing = spacing.saturating_mul(every);
        if bytes <= room {
            return Stops { at, spacing };
        }
        if spacing >= text.len {
            let end = (cost.at(text.len) <= room).then_some(text.len);
            return Stops { at: end.into_iter().collect(), spacing };
        }
        every *= 2;
    }
}

/// With one of `every` so many regular places, and the others as much further apart.
fn chosen(Text { from, len, forks, boundaries }: Text, spacing: usize, every: usize) -> Vec<usize> {
    let apart = LEAST * every;
    let mut at = BTreeSet::from([from]);
    let add = |at: &mut BTreeSet<usize>, depth: usize, nobody: std::ops::RangeInclusive<usize>| {
        if from < depth && depth < len && at.range(nobody).next().is_none() {
            at.insert(depth);
        }
    };
    let behind = |depth: usize| (depth + 1).saturating_sub(apart)..=depth;
    forks.iter().for_each(|&depth| add(&mut at, depth, behind(depth)));
    if len - from >= LONG {
        // A regular place counts even when another state is near: the next regular one is far.
        let regular = regular(spacing).skip(every - 1).step_by(every);
        at.extend(regular.skip_while(|&depth| depth < from + apart).take_while(|depth| depth + apart < len));
        boundaries.iter().for_each(|&depth| add(&mut at, depth, behind(depth)));
        let before_end = std::iter::successors(Some(apart), |n| Some(4 * n)).take_while(|n| 2 * n < len - from);
        // The first of them only when nothing else is that near to the end.
        let until = |n: usize| if n == apart { len - 1 } else { len - n / 2 };
        before_end.for_each(|n| add(&mut at, len - n, len - 2 * n + 1..=until(n)));
    }
    at.insert(len);
    at.remove(&from);
    at.into_iter().collect()
}

/// The regular places, the same ones in every text: far apart at first, where little is lost; then `spacing`, and as soon
/// as that is less, a fourteenth of what lies before. So wherever texts part behind that, at least 13 of 14 shared tokens
/// lie before a regular place, and their number grows with the logarithm of the length only.
fn regular(spacing: usize) -> impl Iterator<Item = usize> {
    let near = PART * spacing;
    let next = move |&depth: &usize| {
        let wide = if depth < near / 2 { spacing.saturating_mul(8) / 3 } else { spacing.max(depth / PART) };
        depth.checked_add(wide.max(1))
    };
    std::iter::successors(Some(0), next).skip(1)
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
        for shared in [650, 680, 700, 710, 1000, 1390] {
            let Stops { at, spacing } = stops(whole(1400), 48, SMALL, 1 << 20);
            let most = at.iter().filter(|&&depth| depth <= shared).max().expect("there are some");
            assert!(14 * most >= 13 * shared, "{most} of {shared}");
            assert_eq!((spacing, at.last()), (48, Some(&1400)));
            assert!(at.len() < 25, "{at:?}");
        }
    }

    #[test]
    fn short_texts_are_parted_only_where_others_are_known_to_part() {
        let chat = Text { boundaries: &[2, 20, 96], ..whole(100) };
        assert_eq!(stops(chat, 48, SMALL, 99).at, [100]);
        assert_eq!(stops(Text { forks: &[8, 40, 50, 99], ..chat }, 48, SMALL, 99).at, [40, 99, 100]);
        assert_eq!(stops(Text { from: 80, forks: &[99], ..chat }, 48, SMALL, 99).at, [99, 100]);
        assert_eq!(stops(Text { from: 90, ..chat }, 48, SMALL, 99).at, [0; 0]);
    }

    #[test]
    fn where_texts_part_and_where_messages_end_is_kept() {
        let text = Text { forks: &[333], boundaries: &[5, 317, 320, 345, 905, 908, 1000, 1396], ..whole(1400) };
        let at = stops(text, 48, SMALL, 99).at;
        for depth in [317, 333, 905, 1000, 1396, 1400] {
            assert!(at.contains(&depth), "{depth} of {at:?}");
        }
        for close in [5, 320, 345, 908, 1384] {
            assert!(!at.contains(&close), "{close} of {at:?}");
        }
    }

    #[test]
    fn their_number_grows_with_the_logarithm_of_the_length() {
        let count = |len| stops(whole(len), 48, SMALL, 1 << 20).at.len();
        assert!(count(10_000) < 70 && count(1_000_000) < 140, "{} {}", count(10_000), count(1_000_000));
    }

    proptest! {
        #[test]
        fn they_fit_and_are_never_far(
            len in 1usize..50_000, from in 0usize..50_000, room in 0u64..400, per_token in 0u64..2, spacing in 16usize..300,
            mut forks in prop::collection::vec(0usize..50_000, 0..4),
            mut boundaries in prop::collection::vec(0usize..50_000, 0..40),
        ) {
            let from = from % len;
            forks.sort_unstable();
            boundaries.sort_unstable();
            let text = Text { from, len, forks: &forks, boundaries: &boundaries };
            let cost = Cost { fixed: 2, per_token };
            let Stops { at, spacing: chosen } = stops(text, spacing, cost, room);
            prop_assert!(at.windows(2).all(|two| two[0] < two[1]));
            prop_assert!(at.iter().all(|&depth| depth > from && depth <= len));
            prop_assert!(at.iter().map(|&depth| cost.at(depth)).sum::<u64>() <= room);
            if let Some(&end) = at.last() {
                prop_assert_eq!(end, len);
            }
            // Wherever another text parts from this one, a state is near.
            if chosen == spacing && len - from >= LONG {
                let places: Vec<usize> = std::iter::once(from).chain(at).collect();
                for two in places.windows(2) {
                    let early = if two[0] < PART * spacing / 2 { 8 * spacing / 3 } else { spacing };
                    let most = early.max(two[1] / PART) + LEAST;
                    prop_assert!(two[1] - two[0] <= most, "{:?}", two);
                }
            }
        }
    }
}
