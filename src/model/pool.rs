//! The states of all live sequences of one model.

use super::Error;
use super::kernels::Shared;
use crate::types::{Segment, SegmentData, SlotId};

/// Slots of state, one buffer `[slots, …]` of f32 for each segment.
///
/// Memory of slots that were never written is never touched, so the operating system does not provide it.
#[derive(Debug)]
pub struct Pool {
    slots: usize,
    segments: Vec<Values>,
}

#[derive(Debug)]
struct Values {
    name: String,
    shape: Vec<usize>,
    /// What a fresh sequence starts from, `[width]`.
    initial: Vec<f32>,
    /// `[slots, width]`.
    data: Vec<f32>,
}

impl Pool {
    /// A pool of `slots` states whose fresh sequences start from `initial` (in the order of `segments`).
    ///
    /// # Errors
    /// [`Error::Memory`] when that many states cannot be addressed.
    pub fn new(segments: &[Segment], initial: &[SegmentData], slots: usize) -> Result<Self, Error> {
        let widths = segments.iter().map(|Segment::Fixed { shape, .. }| shape.iter().product::<usize>());
        let bytes = 4 * widths.sum::<usize>() as u64;
        let mut values = Vec::new();
        for Segment::Fixed { name, shape, init } in segments {
            let width: usize = shape.iter().product();
            let given = initial.iter().find(|s| s.name == *name);
            let initial = given.map_or_else(|| vec![*init; width], |s| s.data.clone());
            let len = slots.checked_mul(width).filter(|&n| n < isize::MAX as usize / 4);
            let len = len.ok_or(Error::Memory { slots, bytes })?;
            // `vec![0.0; n]` asks for zeroed pages, which stay unbacked until a slot is used.
            values.push(Values { name: name.clone(), shape: shape.clone(), initial, data: vec![0.0; len] });
        }
        Ok(Self { slots, segments: values })
    }

    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Makes `slot` a fresh sequence.
    pub fn reset(&mut self, slot: SlotId) {
        for s in &mut self.segments {
            let width = s.initial.len();
            s.data[slot.0 as usize * width..][..width].copy_from_slice(&s.initial);
        }
    }

    /// Makes `into` equal to `from`.
    pub fn copy(&mut self, from: SlotId, into: SlotId) {
        for s in &mut self.segments {
            let width = s.initial.len();
            s.data.copy_within(from.0 as usize * width..(from.0 as usize + 1) * width, into.0 as usize * width);
        }
    }

    /// A copy of `slot`.
    pub fn snapshot(&self, slot: SlotId) -> Vec<SegmentData> {
        let copy = |s: &Values| {
            let width = s.initial.len();
            let data = s.data[slot.0 as usize * width..][..width].to_vec();
            SegmentData { name: s.name.clone(), shape: s.shape.clone(), data }
        };
        self.segments.iter().map(copy).collect()
    }

    /// Puts a copy back, exactly.
    ///
    /// # Errors
    /// [`Error::State`] when names or shapes are not this model's; the slot is then unchanged.
    pub fn restore(&mut self, slot: SlotId, state: &[SegmentData]) -> Result<(), Error> {
        check(self.segments.iter().map(|s| (s.name.as_str(), s.shape.as_slice())), state)?;
        for (s, from) in self.segments.iter_mut().zip(state) {
            let width = s.initial.len();
            s.data[slot.0 as usize * width..][..width].copy_from_slice(&from.data);
        }
        Ok(())
    }

    /// All slots of one segment, for kernels that write disjoint parts of it; and the width of a slot.
    pub(super) fn shared(&mut self, segment: usize) -> (Shared, usize) {
        let s = &mut self.segments[segment];
        (Shared::new(&mut s.data), s.initial.len())
    }
}

/// Whether `state` has exactly these segments, in this order.
fn check<'a>(want: impl ExactSizeIterator<Item = (&'a str, &'a [usize])>, state: &[SegmentData]) -> Result<(), Error> {
    if want.len() != state.len() {
        return Err(Error::State("*".into(), format!("{} segments, expected {}", state.len(), want.len())));
    }
    for ((name, shape), s) in want.zip(state) {
        if s.name != name {
            return Err(Error::State(s.name.clone(), format!("`{name}` is expected here")));
        }
        if s.shape != shape || s.data.len() != shape.iter().product::<usize>() {
            return Err(Error::State(name.into(), format!("shape {:?}, expected {shape:?}", s.shape)));
        }
    }
    Ok(())
}
