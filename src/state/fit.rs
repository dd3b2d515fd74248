//! Whether a snapshot that somebody brings can be one of a model's: its checksum says only that it is whole.

use super::Damaged;
use crate::types::{Memory, Segment, SegmentData};

/// Checks that `memory` is laid out as the states of a model with these segments and `vocabulary` ids are, so that going on
/// from it can at worst give useless text.
///
/// # Errors
/// Says what does not fit.
pub fn fits(memory: &Memory, layout: &[Segment], vocabulary: usize) -> Result<(), Damaged> {
    if memory.segments.len() != layout.len() {
        let (found, expected) = (memory.segments.len(), layout.len());
        return Err(Damaged(format!("it has {found} segments, and states of this model have {expected}")));
    }
    for (data, segment) in memory.segments.iter().zip(layout) {
        segment_fits(data, segment, memory.consumed, vocabulary)?;
    }
    if memory.tail.len() as u64 > memory.consumed {
        return Err(Damaged(format!("its tail has {} ids of {} that were read", memory.tail.len(), memory.consumed)));
    }
    let counted = memory.counts.iter().map(|(id, _)| id);
    let pending = memory.pending.ends.iter().chain(&memory.pending.goes_on);
    for (what, id) in counted.map(|id| ("counts", id)).chain(pending.map(|id| ("pending", id))) {
        check_id(what, *id, vocabulary)?;
    }
    memory.tail.iter().try_for_each(|id| check_id("tail", *id, vocabulary))
}

/// Bytes of the recurrent state of a sequence of so many tokens, at the most: what claims to have more is refused before it
/// is unpacked.
pub fn most_bytes(layout: &[Segment], tokens: u64) -> u64 {
    let values = |segment: &Segment| match segment {
        Segment::Fixed { .. } => segment.values() as u64,
        Segment::Log { width, cap, .. } => {
            let entries = cap.map_or(tokens, |cap| tokens.min(cap as u64));
            entries.saturating_mul(*width as u64)
        }
    };
    layout.iter().map(values).fold(0, u64::saturating_add).saturating_mul(4)
}

fn check_id(what: &str, id: u32, vocabulary: usize) -> Result<(), Damaged> {
    if (id as usize) < vocabulary {
        return Ok(());
    }
    Err(Damaged(format!("its {what} has the token id {id}, and ids of this model are below {vocabulary}")))
}

fn segment_fits(data: &SegmentData, segment: &Segment, consumed: u64, vocabulary: usize) -> Result<(), Damaged> {
    let SegmentData { name, shape, data } = data;
    if name != segment.name() {
        return Err(Damaged(format!("segment `{name}` stands where this model has `{}`", segment.name())));
    }
    let wrong = |expected: String| Err(Damaged(format!("segment `{name}` has shape {shape:?}, expected {expected}")));
    match segment {
        Segment::Fixed { shape: expected, .. } if shape != expected => wrong(format!("{expected:?}")),
        Segment::Fixed { .. } => Ok(()),
        Segment::Log { width, cap, ids, .. } => {
            let &[entries, found] = &shape[..] else { return wrong(format!("[entries, {width}]")) };
            // With a cap nothing is ever forgotten; without, as much as no later token looks back to.
            let believable = match cap {
                Some(cap) => entries as u64 == consumed && entries <= *cap,
                None => entries as u64 <= consumed,
            };
            if found != *width || !believable {
                return wrong(format!("[entries, {width}] that belong to {consumed} tokens"));
            }
            let Some(at) = *ids else { return Ok(()) };
            let is_id = |value: f32| (0.0..vocabulary as f32).contains(&value) && value.fract() == 0.0;
            match data.chunks_exact(*width).position(|entry| !is_id(entry[at])) {
                Some(entry) => Err(Damaged(format!("segment `{name}` has no token id of this model in entry {entry}"))),
                None => Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Pending;

    fn layout() -> Vec<Segment> {
        vec![
            Segment::Fixed { name: "shift".into(), shape: vec![2], init: 0.0 },
            Segment::Log { name: "text".into(), width: 3, cap: Some(4), ids: Some(0) },
            Segment::Log { name: "window".into(), width: 1, cap: None, ids: None },
        ]
    }

    fn sound() -> Memory {
        let segment = |name: &str, shape: &[usize], data: &[f32]| SegmentData {
            name: name.into(),
            shape: shape.into(),
            data: data.into(),
        };
        Memory {
            segments: vec![
                segment("shift", &[2], &[0.5, -9.0]),
                segment("text", &[2, 3], &[9.0, 0.1, 0.2, 0.0, 0.3, 0.4]),
                segment("window", &[1, 1], &[7.5]),
            ],
            consumed: 2,
            pending: Pending { ends: vec![9], goes_on: vec![0], ..Pending::default() },
            tail: vec![9, 0],
            counts: vec![(9, 1.0)],
        }
    }

    #[test]
    fn what_a_model_made_fits_it() {
        assert_eq!(fits(&sound(), &layout(), 10), Ok(()));
    }

    #[test]
    fn no_state_of_so_many_tokens_is_larger() {
        assert_eq!(most_bytes(&layout(), 2), sound().bytes() + 4, "but for a window that forgets");
        assert_eq!(most_bytes(&layout(), 9), 4 * (2 + 3 * 4 + 9));
        assert_eq!(most_bytes(&layout(), u64::MAX), u64::MAX);
    }

    #[test]
    fn whatever_does_not_fit_is_named() {
        let refuse = |change: &dyn Fn(&mut Memory), says: &str| {
            let mut memory = sound();
            change(&mut memory);
            let Damaged(why) = fits(&memory, &layout(), 10).expect_err(says);
            assert!(why.contains(says), "{why}\nshould say {says}");
        };
        refuse(&|m| drop(m.segments.pop()), "2 segments");
        refuse(&|m| m.segments.swap(0, 1), "`text` stands where this model has `shift`");
        refuse(&|m| m.segments[0].shape = vec![1, 2], "[1, 2]");
        refuse(&|m| m.segments[1].shape = vec![3, 2], "[entries, 3]");
        refuse(&|m| m.segments[1].shape = vec![6], "[entries, 3]");
        refuse(&|m| m.consumed = 3, "belong to 3 tokens");
        refuse(
            &|m| m.segments[2] = SegmentData { shape: vec![3, 1], data: vec![0.0; 3], ..m.segments[2].clone() },
            "window",
        );
        for id in [10.0, -1.0, 0.5, 1e30] {
            refuse(&|m| m.segments[1].data[3] = id, "entry 1");
        }
        refuse(&|m| m.pending.ends = vec![10], "pending has the token id 10");
        refuse(&|m| m.pending.goes_on = vec![u32::MAX], "pending");
        refuse(&|m| m.tail = vec![10], "tail");
        refuse(&|m| m.tail = vec![1, 2, 3], "3 ids of 2");
        refuse(&|m| m.counts = vec![(10, 1.0)], "counts");
        let longer = SegmentData { shape: vec![5, 3], data: vec![0.0; 15], ..sound().segments[1].clone() };
        refuse(&|m| (m.segments[1], m.consumed) = (longer.clone(), 5), "text");
    }
}
