//! Rows that go on from one another within a step: what may be written where, and what must come after what.
//!
//! The linear layers do not care: they see tokens. A recurrence walks all rows that begin sequences' spans, then all that go
//! on from those, and so on; so a long span costs no second reading of the weights for a state that is wanted of its middle.

use crate::types::{Row, SlotId};

/// Rows in groups: none depends on another of its group, and each on none of a later group.
pub fn waves(rows: &[Row]) -> Vec<Vec<Row>> {
    let mut waves: Vec<Vec<Row>> = Vec::new();
    for (row, link) in rows.iter().zip(links(rows)) {
        if waves.len() == link {
            waves.push(Vec::new());
        }
        waves[link].push(row.clone());
    }
    waves
}

/// Whether any row goes on from another.
pub fn any(rows: &[Row]) -> bool {
    rows.windows(2).any(|two| two[1].goes_on(&two[0]))
}

/// Whether no slot is written twice, or written by one chain and read by another.
pub fn disjoint(rows: &[Row]) -> bool {
    let chains: Vec<usize> = links(rows)
        .scan(0, |chain, link| {
            *chain += usize::from(link == 0);
            Some(*chain)
        })
        .collect();
    let mut written: Vec<(SlotId, usize)> = rows.iter().map(|row| row.into).zip(chains.iter().copied()).collect();
    written.sort_unstable();
    let twice = written.windows(2).any(|two| two[0].0 == two[1].0);
    let by = |slot: SlotId| written.binary_search_by_key(&slot, |&(slot, _)| slot).ok().map(|at| written[at].1);
    !twice && rows.iter().zip(&chains).all(|(row, &chain)| by(row.from).is_none_or(|other| other == chain))
}

/// The place of each row in its chain, from 0.
fn links(rows: &[Row]) -> impl Iterator<Item = usize> {
    let goes_on = |at: usize| at > 0 && rows[at].goes_on(&rows[at - 1]);
    (0..rows.len()).scan(0, move |link, at| {
        *link = if goes_on(at) { *link + 1 } else { 0 };
        Some(*link)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{SeqId, Want};

    /// (sequence, from, into, position, tokens), laid end to end.
    fn rows(of: &[(u64, u32, u32, u64, usize)]) -> Vec<Row> {
        let mut end = 0;
        let mut row = |&(seq, from, into, at, tokens): &(u64, u32, u32, u64, usize)| {
            end += tokens;
            let (seq, from, into) = (SeqId(seq), SlotId(from), SlotId(into));
            Row { seq, from, into, at, tokens: end - tokens..end, want: Want::Nothing }
        };
        of.iter().map(&mut row).collect()
    }

    #[test]
    fn a_chain_comes_one_after_the_other_and_chains_beside_each_other() {
        let rows = rows(&[
            (1, 0, 9, 5, 2),
            (1, 9, 8, 7, 3),
            (1, 8, 0, 10, 1),
            (2, 1, 1, 0, 4),
            (3, 2, 7, 0, 1),
            (3, 7, 2, 1, 1),
        ]);
        let tokens: Vec<Vec<usize>> =
            waves(&rows).iter().map(|wave| wave.iter().map(|row| row.tokens.start).collect()).collect();
        assert_eq!(tokens, [vec![0, 6, 10], vec![2, 11], vec![5]]);
        assert!(disjoint(&rows) && any(&rows));
        assert!(waves(&[]).is_empty() && !any(&rows[2..4]));
    }

    #[test]
    fn no_chain_touches_what_another_writes() {
        for (good, of) in [
            (true, vec![(1, 0, 5, 0, 1), (2, 0, 6, 0, 1)]),
            (true, vec![(1, 0, 0, 0, 1), (1, 0, 5, 1, 1)]),
            (false, vec![(1, 0, 5, 0, 1), (1, 5, 5, 1, 1)]),
            (false, vec![(1, 0, 0, 0, 1), (1, 0, 5, 0, 1)]),
            (false, vec![(1, 0, 5, 0, 1), (1, 5, 0, 1, 1), (2, 0, 6, 0, 1)]),
            (false, vec![(1, 0, 5, 0, 1), (1, 5, 0, 1, 1), (2, 6, 5, 0, 1)]),
            (false, vec![(1, 0, 5, 0, 1), (1, 5, 0, 2, 1)]),
        ] {
            assert_eq!(disjoint(&rows(&of)), good, "{of:?}");
        }
    }
}
