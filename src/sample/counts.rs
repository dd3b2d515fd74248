//! How often a response has used each token, as RWKV's decaying penalties count it.

use std::collections::BTreeMap;

/// Occurrences of the response's tokens, each fading as more tokens follow.
///
/// After every sampled token all counts are multiplied by the request's `penalty_decay`, then the token's own grows by
/// one; with a decay of 1 these are OpenAI's plain counts. (ChatRWKV, `API_DEMO_CHAT.py`: `occurrence`.) Counts that are
/// saved and restored go on exactly as if they had not been.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts(BTreeMap<u32, f32>);

impl Counts {
    /// Those of a response without tokens.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts `token`, just sampled, after the others have faded to `decay` of what they were.
    pub fn add(&mut self, token: u32, decay: f32) {
        if decay != 1.0 {
            self.0.values_mut().for_each(|count| *count *= decay);
        }
        *self.0.entry(token).or_default() += 1.0;
    }

    /// The counts by ascending id.
    pub fn iter(&self) -> impl Iterator<Item = (u32, f32)> {
        self.0.iter().map(|(&id, &count)| (id, count))
    }

    /// The counts as a snapshot keeps them, by ascending id.
    pub fn export(&self) -> Vec<(u32, f32)> {
        self.iter().collect()
    }

    /// The counts of a snapshot.
    pub fn import(counts: &[(u32, f32)]) -> Self {
        Self(counts.iter().copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_fade_and_grow() {
        let mut counts = Counts::new();
        for token in [7, 3, 7] {
            counts.add(token, 0.5);
        }
        assert_eq!(counts.export(), [(3, 0.5), (7, 1.25)]);
    }

    #[test]
    fn without_decay_they_are_plain() {
        let mut counts = Counts::new();
        for token in [7, 3, 7] {
            counts.add(token, 1.0);
        }
        assert_eq!(counts.export(), [(3, 1.0), (7, 2.0)]);
    }
}
