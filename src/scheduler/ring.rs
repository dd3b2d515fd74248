//! Whose turn it is: tenants in a ring, and first come, first served within a tenant.

use std::collections::VecDeque;

use crate::types::Tenant;

/// A queue for each tenant that has something in it, in the order in which their turns come.
///
/// A tenant that comes anew waits behind all others for its turn, so between two turns of a tenant every other one has
/// at most one.
#[derive(Clone, Debug)]
pub(super) struct Ring<T> {
    turns: VecDeque<(Tenant, VecDeque<T>)>,
}

impl<T> Ring<T> {
    pub fn new() -> Self {
        Self { turns: VecDeque::new() }
    }

    pub fn push(&mut self, tenant: Tenant, item: T) {
        match self.turns.iter_mut().find(|(known, _)| *known == tenant) {
            Some((_, queue)) => queue.push_back(item),
            None => self.turns.push_back((tenant, VecDeque::from([item]))),
        }
    }

    /// The head of the queue whose turn it is.
    pub fn front(&self) -> Option<&T> {
        self.turns.front()?.1.front()
    }

    /// Takes [`front`](Self::front) out; the turn passes on.
    pub fn pop(&mut self) -> Option<(Tenant, T)> {
        let (tenant, mut queue) = self.turns.pop_front()?;
        let item = queue.pop_front()?;
        if !queue.is_empty() {
            self.turns.push_back((tenant.clone(), queue));
        }
        Some((tenant, item))
    }

    /// The turn passes on and nothing is taken.
    pub fn pass(&mut self) {
        if let Some(turn) = self.turns.pop_front() {
            self.turns.push_back(turn);
        }
    }

    /// Drops what `keep` refuses. The turns of the others stay in order.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.turns.retain_mut(|(_, queue)| {
            queue.retain(&mut keep);
            !queue.is_empty()
        });
    }

    /// The queues by turn; none is empty.
    pub fn queues(&self) -> impl Iterator<Item = &VecDeque<T>> {
        self.turns.iter().map(|(_, queue)| queue)
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.queues().flatten()
    }

    pub fn len(&self) -> usize {
        self.queues().map(VecDeque::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(items: &[(&str, u32)]) -> Ring<u32> {
        let mut ring = Ring::new();
        for &(tenant, item) in items {
            ring.push(Tenant::parse(tenant).unwrap(), item);
        }
        ring
    }

    fn drain(mut ring: Ring<u32>) -> Vec<u32> {
        std::iter::from_fn(|| ring.pop().map(|(_, item)| item)).collect()
    }

    #[test]
    fn tenants_take_turns_and_keep_their_own_order() {
        assert_eq!(drain(ring(&[("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)])), [1, 4, 5, 2, 6, 3]);
    }

    #[test]
    fn dropping_items_leaves_the_turns_of_the_others() {
        let mut ring = ring(&[("a", 1), ("b", 2), ("b", 3), ("c", 4)]);
        ring.pass();
        ring.retain(|&item| item != 2 && item != 4);
        assert_eq!((ring.front(), ring.len()), (Some(&3), 2));
        assert_eq!(drain(ring), [3, 1]);
    }
}
