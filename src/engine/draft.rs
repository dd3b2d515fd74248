//! Guessing the next tokens by prompt lookup: what followed when the last few ids stood here before.
//!
//! (Saxena, "Prompt Lookup Decoding", 2023.) Guesses change no output: whoever runs them compares each with the token that is
//! sampled. Pure.

/// How many of the last ids are looked up, the most telling first.
const LENGTHS: [usize; 3] = [5, 3, 2];
/// Places for each length: a bounded memory, in which what collides forgets the older.
const PLACES: usize = 1 << 12;
/// Guesses are trusted by how long the text before them matches: up to these lengths, and longer.
const CLASSES: [usize; 3] = [2, 4, 15];
/// What is left of a guess's weight in the trust after another one.
const FADES: f64 = 0.95;

/// The guesses of one sequence, and how far they can be trusted.
///
/// Every guess is judged when the tokens are there, whether or not somebody ran it as a draft: so nothing has to be risked
/// to learn that drafts became worth while.
#[derive(Clone, Debug)]
pub struct Drafter {
    /// For each of [`LENGTHS`], by a hash of so many ids: the place after them, where they last stood; 0 = nowhere.
    after: Vec<u32>,
    /// How many of the sequence's ids were read.
    read: usize,
    most: usize,
    guess: Vec<u32>,
    class: usize,
    /// (right, judged) guesses of each class, fading.
    judged: [(f64, f64); CLASSES.len() + 1],
}

impl Drafter {
    /// For guesses of at most `most` tokens.
    pub fn new(most: usize) -> Self {
        // As if one of two had been right.
        let judged = [(1.0, 2.0); CLASSES.len() + 1];
        Self { after: Vec::new(), read: 0, most, guess: Vec::new(), class: 0, judged }
    }

    /// Reads the ids that a sequence has now, of which those of earlier calls are the beginning; judges the last guess, and
    /// makes the next. Takes a constant time for each new id.
    pub fn follow(&mut self, ids: &[u32]) {
        if self.after.is_empty() {
            self.after = vec![0; LENGTHS.len() * PLACES];
        }
        self.judge(&ids[self.read.min(ids.len())..]);
        for at in self.read.max(1)..ids.len() {
            for (table, length) in LENGTHS.into_iter().enumerate().filter(|&(_, length)| length <= at) {
                self.after[table * PLACES + place(&ids[at - length..at])] = at as u32;
            }
        }
        self.read = ids.len();
        self.guess(ids);
    }

    /// What may come next; empty where nothing is known.
    pub fn draft(&self) -> &[u32] {
        &self.guess
    }

    /// How likely each token of the guess is right, if those before it are.
    pub fn trust(&self) -> f64 {
        let (right, judged) = self.judged[self.class];
        right / judged
    }

    /// Compares the last guess with the tokens that came.
    fn judge(&mut self, came: &[u32]) {
        for (guess, came) in self.guess.iter().zip(came) {
            let (right, judged) = &mut self.judged[self.class];
            *right *= FADES;
            *judged = *judged * FADES + 1.0;
            if guess != came {
                return;
            }
            *right += 1.0;
        }
    }

    fn guess(&mut self, ids: &[u32]) {
        self.guess.clear();
        let known = |(table, length): (usize, usize)| {
            let last = &ids[ids.len().checked_sub(length)?..];
            let after = self.after[table * PLACES + place(last)] as usize;
            (after > 0 && ids[..after].ends_with(last)).then_some(after)
        };
        let Some(after) = LENGTHS.into_iter().enumerate().find_map(known) else { return };
        let matching = ids[..after].iter().rev().zip(ids.iter().rev()).take(CLASSES[CLASSES.len() - 1] + 1);
        let length = matching.take_while(|(a, b)| a == b).count();
        self.class = CLASSES.iter().position(|&most| length <= most).unwrap_or(CLASSES.len());
        // A repetition shorter than the guess goes on repeating.
        let period = ids.len() - after;
        self.guess.extend((0..self.most).map(|n| ids[after + n % period]));
    }
}

/// The place of some ids in their table.
fn place(ids: &[u32]) -> usize {
    let mix = |hash: u64, &id: &u32| (hash ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    (ids.iter().fold(1, mix) >> 40) as usize % PLACES
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    /// Where `ids`'s last few stood before, the latest place of the longest length, looked for at leisure.
    fn naive(ids: &[u32]) -> Option<usize> {
        LENGTHS.into_iter().find_map(|length| {
            let last = &ids[ids.len().checked_sub(length)?..];
            (length..ids.len()).rev().find(|&after| ids[..after].ends_with(last))
        })
    }

    proptest! {
        #[test]
        fn it_finds_what_a_search_finds(
            // So few that none collide.
            ids in proptest::collection::vec(0u32..2, 0..200), cuts in proptest::collection::vec(0usize..9, 0..60),
        ) {
            let mut drafter = Drafter::new(6);
            let mut end = 0;
            for cut in cuts {
                end = ids.len().min(end + cut);
                let read = &ids[..end];
                drafter.follow(read);
                let expected: Vec<u32> = naive(read).map_or(Vec::new(), |after| {
                    let mut text = read.to_vec();
                    (0..6).for_each(|n| text.push(text[after + n]));
                    text.split_off(end)
                });
                prop_assert_eq!(drafter.draft(), expected);
            }
        }

        #[test]
        fn how_the_ids_arrive_makes_no_difference(
            ids in proptest::collection::vec(0u32..9, 0..300), cut in 0usize..300,
        ) {
            let (mut whole, mut parts) = (Drafter::new(4), Drafter::new(4));
            parts.follow(&ids[..cut.min(ids.len())]);
            parts.follow(&ids);
            whole.follow(&ids);
            prop_assert_eq!(whole.draft(), parts.draft());
        }
    }

    #[test]
    fn it_goes_on_as_the_text_did_before() {
        let mut drafter = Drafter::new(4);
        drafter.follow(&[7, 1, 2, 3, 4, 5, 6, 9, 1, 2]);
        assert_eq!(drafter.draft(), [3, 4, 5, 6]);
        drafter.follow(&[7, 1, 2, 3, 4, 5, 6, 9, 1, 2, 8]);
        assert!(drafter.draft().is_empty());
        // A repetition goes on, for longer than it is.
        drafter = Drafter::new(5);
        drafter.follow(&[1, 2, 1, 2]);
        assert_eq!(drafter.draft(), [1, 2, 1, 2, 1]);
        drafter.follow(&[1, 2, 1, 2, 3, 3, 3]);
        assert_eq!(drafter.draft(), [3; 5]);
        assert!(Drafter::new(3).draft().is_empty());
    }

    #[test]
    fn trust_follows_what_was_right() {
        let mut drafter = Drafter::new(4);
        let mut ids: Vec<u32> = (0..40).flat_map(|n| [1, 2, 100 + n]).collect();
        (1..ids.len()).for_each(|end| drafter.follow(&ids[..end]));
        drafter.follow(&ids);
        ids.extend([1, 2]);
        drafter.follow(&ids);
        assert!(!drafter.draft().is_empty() && drafter.trust() < 0.3, "what follows is always another");
        let mut drafter = Drafter::new(4);
        let ids: Vec<u32> = (0..200).map(|n| n % 20).collect();
        (1..ids.len()).for_each(|end| drafter.follow(&ids[..end]));
        assert!(drafter.trust() > 0.9, "what follows is always the same");
    }
}
