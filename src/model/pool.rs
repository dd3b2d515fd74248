//! The states of all live sequences of one model.

use super::Error;
use super::kernels::{Pages, Shared};
use crate::types::{Row, Segment, SegmentData, SlotId};

/// Slots of state: one buffer `[slots, …]` of f32 for each fixed segment, a growable one a slot for each log.
///
/// Memory of slots that were never written is never touched, so the operating system does not provide it.
#[derive(Debug)]
pub struct Pool {
    slots: usize,
    segments: Vec<Values>,
}

#[derive(Debug)]
struct Values {
    segment: Segment,
    /// What a fresh sequence starts from; empty for a log.
    initial: Vec<f32>,
    data: Data,
}

#[derive(Debug)]
enum Data {
    /// `[slots, width]`.
    Fixed(Pages<f32>),
    /// For each slot `[entries, width]`.
    Log(Vec<Vec<f32>>),
}

impl Data {
    /// Makes `slot` hold `values`, which fit.
    fn put(&mut self, slot: SlotId, values: &[f32]) {
        let slot = slot.0 as usize;
        match self {
            Data::Fixed(data) => data[slot * values.len()..][..values.len()].copy_from_slice(values),
            Data::Log(logs) => {
                logs[slot].clear();
                logs[slot].extend_from_slice(values);
            }
        }
    }
}

impl Values {
    fn slot(&self, slot: SlotId) -> &[f32] {
        let (slot, width) = (slot.0 as usize, self.initial.len());
        match &self.data {
            Data::Fixed(data) => &data[slot * width..][..width],
            Data::Log(logs) => &logs[slot],
        }
    }

    /// Whether `state` can be put into a slot.
    fn fits(&self, state: &SegmentData) -> Result<(), Error> {
        let wrong = |why: String| Err(Error::State(state.name.clone(), why));
        if state.name != self.segment.name() {
            return wrong(format!("`{}` is expected here", self.segment.name()));
        }
        let shape_fits = match &self.segment {
            Segment::Fixed { shape, .. } => state.shape == *shape,
            Segment::Log { width, cap, .. } => {
                matches!(*state.shape, [n, w] if w == *width && cap.is_none_or(|cap| n <= cap))
            }
        };
        if !shape_fits || Some(state.data.len()) != state.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) {
            return wrong(format!(
                "{} values of shape {:?} do not fit {:?}",
                state.data.len(),
                state.shape,
                self.segment
            ));
        }
        Ok(())
    }
}

impl Pool {
    /// A pool of `slots` states whose fresh sequences start from `initial`, by name, where it has something.
    ///
    /// # Errors
    /// [`Error::Memory`] when that many states cannot be addressed.
    pub fn new(segments: &[Segment], initial: &[SegmentData], slots: usize) -> Result<Self, Error> {
        let bytes = 4 * segments.iter().map(Segment::values).sum::<usize>() as u64;
        let mut values = Vec::new();
        for segment in segments {
            let width = segment.values();
            let (initial, data) = match segment {
                Segment::Fixed { name, init, .. } => {
                    let given = initial.iter().find(|s| s.name == *name);
                    let len = slots.checked_mul(width).filter(|&n| n < isize::MAX as usize / 4);
                    let len = len.ok_or(Error::Memory { slots, bytes })?;
                    (given.map_or_else(|| vec![*init; width], |s| s.data.clone()), Data::Fixed(Pages::untouched(len)))
                }
                Segment::Log { .. } => (Vec::new(), Data::Log(vec![Vec::new(); slots])),
            };
            values.push(Values { segment: segment.clone(), initial, data });
        }
        Ok(Self { slots, segments: values })
    }

    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Makes `slot` a fresh sequence.
    pub fn reset(&mut self, slot: SlotId) {
        self.segments.iter_mut().for_each(|s| s.data.put(slot, &s.initial));
    }

    /// Makes `into` equal to `from`.
    pub fn copy(&mut self, from: SlotId, into: SlotId) {
        for s in &mut self.segments {
            let values = s.slot(from).to_vec();
            s.data.put(into, &values);
        }
    }

    /// Makes the logs of each row's `into` equal to those of its `from`. (Kernels take over fixed segments themselves.)
    pub(super) fn fork_logs(&mut self, rows: &[Row]) {
        for s in self.segments.iter_mut().filter(|s| matches!(s.data, Data::Log(_))) {
            for row in rows.iter().filter(|row| row.from != row.into) {
                let values = s.slot(row.from).to_vec();
                s.data.put(row.into, &values);
            }
        }
    }

    /// A copy of `slot`.
    pub fn snapshot(&self, slot: SlotId) -> Vec<SegmentData> {
        let copy = |s: &Values| {
            let data = s.slot(slot).to_vec();
            let shape = match &s.segment {
                Segment::Fixed { shape, .. } => shape.clone(),
                Segment::Log { width, .. } => vec![data.len() / width, *width],
            };
            SegmentData { name: s.segment.name().into(), shape, data }
        };
        self.segments.iter().map(copy).collect()
    }

    /// Puts a copy back, exactly.
    ///
    /// # Errors
    /// [`Error::State`] when names or shapes are not this model's; the slot is then unchanged.
    pub fn restore(&mut self, slot: SlotId, state: &[SegmentData]) -> Result<(), Error> {
        if self.segments.len() != state.len() {
            return Err(Error::State(
                "*".into(),
                format!("{} segments, expected {}", state.len(), self.segments.len()),
            ));
        }
        self.segments.iter().zip(state).try_for_each(|(s, state)| s.fits(state))?;
        self.segments.iter_mut().zip(state).for_each(|(s, state)| s.data.put(slot, &state.data));
        Ok(())
    }

    /// All slots of a fixed segment, for kernels that write disjoint parts of it.
    ///
    /// # Panics
    /// If the segment is a log.
    pub(super) fn shared(&mut self, segment: usize) -> Shared {
        match &mut self.segments[segment].data {
            Data::Fixed(data) => Shared::new(data),
            Data::Log(_) => panic!("segment {segment} is a log"),
        }
    }

    /// A log segment, one buffer `[entries, width]` for each slot.
    ///
    /// # Panics
    /// If the segment is not a log.
    pub(super) fn logs(&mut self, segment: usize) -> &mut [Vec<f32>] {
        match &mut self.segments[segment].data {
            Data::Log(logs) => logs,
            Data::Fixed(_) => panic!("segment {segment} is not a log"),
        }
    }
}
