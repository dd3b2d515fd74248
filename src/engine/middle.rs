//! States in the middle of a prompt's span: a step reads all weights, so it should not end for each state that is wanted.

use std::ops::Range;

use super::run::Engine;
use super::{Backend, Checkpoint, Checkpoints};
use crate::scheduler::Span;
use crate::types::{Row, SlotId, Want};

impl Engine {
    /// The rows of a span: one, or a chain that leaves the states that are wanted on its way in spare slots. The scheduler lets
    /// no more be passed over in a step than there are.
    pub(super) fn rows(&mut self, span: &Span, spare: &mut Range<u32>) -> Vec<Row> {
        let row = self.row(span);
        let stops = match &self.jobs[&span.job].job.checkpoints {
            Some(wanted) if span.choice.is_none() => inside(&wanted.at, &span.tokens),
            _ => &[],
        };
        split(row, stops.iter().map(|stop| stop - span.tokens.start).zip(spare.map(SlotId)))
    }
}

/// The stops within `tokens`; its end is none.
fn inside<'a>(stops: &'a [usize], tokens: &Range<usize>) -> &'a [usize] {
    let until = |end: usize| stops.partition_point(|&stop| stop <= end);
    &stops[until(tokens.start)..until(tokens.end - 1).max(until(tokens.start))]
}

/// A row in parts that go on from one another, the states after so many of its tokens each in these slots.
fn split(row: Row, states: impl Iterator<Item = (usize, SlotId)>) -> Vec<Row> {
    let mut rest = row;
    let (start, mut rows) = (rest.tokens.start, Vec::new());
    for (read, into) in states {
        let end = start + read;
        rows.push(Row { into, tokens: rest.tokens.start..end, want: Want::Nothing, ..rest.clone() });
        let at = rest.at + (end - rest.tokens.start) as u64;
        rest = Row { from: into, at, tokens: end..rest.tokens.end, ..rest };
    }
    rows.push(rest);
    rows
}

/// Gives out the states that are wanted of those that the rows of a prompt's span left.
pub(super) fn hand_out(wanted: &Checkpoints, span: &Span, chain: &[Row], backend: &dyn Backend) {
    let mut read = span.tokens.start;
    for row in chain {
        read += row.tokens.len();
        if wanted.at.binary_search(&read).is_ok() {
            (wanted.to)(Checkpoint { read, answer: Vec::new(), segments: backend.snapshot(row.into) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::SeqId;

    #[test]
    fn a_row_is_parted_where_states_are_wanted_of_its_middle() {
        let stops = [3, 8, 12, 20];
        assert_eq!(inside(&stops, &(3..20)), [8, 12]);
        assert_eq!(inside(&stops, &(3..8)), [0; 0]);
        assert_eq!(inside(&stops, &(20..30)), [0; 0]);
        let (from, into) = (SlotId(0), SlotId(1));
        let row = Row { seq: SeqId(4), from, into, at: 103, tokens: 7..24, want: Want::Last };
        let parts = split(row.clone(), [(5, SlotId(8)), (9, SlotId(9))].into_iter());
        let ways: Vec<_> = parts.iter().map(|row| (row.from.0, row.into.0, row.at, row.tokens.clone())).collect();
        assert_eq!(ways, [(0, 8, 103, 7..12), (8, 9, 108, 12..16), (9, 1, 112, 16..24)]);
        assert!(parts.windows(2).all(|two| two[1].goes_on(&two[0]) && two[0].want == Want::Nothing));
        assert_eq!(parts[2].want, Want::Last);
        assert_eq!(split(row.clone(), std::iter::empty()), [row]);
    }
}
