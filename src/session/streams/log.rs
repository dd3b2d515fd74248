//! What was sent of a response, in order.

use crate::session::Event;

/// Events by number. Those that carry text take that text and a byte or two, as a response may have a million.
#[derive(Debug, Default)]
pub(super) struct Log {
    text: String,
    /// Of each event twice the bytes of its text, and one more where another choice than before follows; of events without text
    /// those are 0.
    entries: Vec<u8>,
    /// Where each [`STRIDE`]th event begins.
    marks: Vec<At>,
    end: At,
    len: usize,
    /// Events without text, by number.
    others: Vec<(usize, Event)>,
}

/// Events between two places that are known.
const STRIDE: usize = 64;

/// Where an event begins.
#[derive(Clone, Copy, Debug, Default)]
struct At {
    text: usize,
    entry: usize,
    /// Of the text before.
    choice: usize,
}

impl Log {
    pub fn push(&mut self, event: Event) {
        if self.len.is_multiple_of(STRIDE) {
            self.marks.push(self.end);
        }
        match event {
            Event::Text { choice, text } if !text.is_empty() => {
                let other = choice != self.end.choice;
                put(&mut self.entries, text.len() << 1 | usize::from(other));
                if other {
                    put(&mut self.entries, choice);
                }
                self.text.push_str(&text);
                self.end.choice = choice;
            }
            event => {
                put(&mut self.entries, 0);
                self.others.push((self.len, event));
            }
        }
        (self.end.text, self.end.entry) = (self.text.len(), self.entries.len());
        self.len += 1;
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of memory, about.
    pub fn bytes(&self) -> usize {
        self.text.len() + self.entries.len() + size_of::<At>() * self.marks.len()
    }

    pub fn get(&self, n: usize) -> Option<Event> {
        let mark = self.marks.get(n / STRIDE).filter(|_| n < self.len)?;
        let mut at = *mark;
        (0..n % STRIDE).for_each(|_| _ = self.pass(&mut at));
        self.event(n, &mut at)
    }

    pub fn iter(&self) -> impl Iterator<Item = Event> {
        let mut at = At::default();
        (0..self.len).filter_map(move |n| self.event(n, &mut at))
    }

    /// The event at a place, which is moved behind it.
    fn event(&self, n: usize, at: &mut At) -> Option<Event> {
        let from = at.text;
        if self.pass(at) {
            return Some(Event::Text { choice: at.choice, text: self.text[from..at.text].to_owned() });
        }
        let other = self.others.binary_search_by_key(&n, |(n, _)| *n).ok()?;
        Some(self.others[other].1.clone())
    }

    /// Moves a place behind its event; whether that carries text.
    fn pass(&self, at: &mut At) -> bool {
        let entry = take(&self.entries, &mut at.entry);
        at.text += entry >> 1;
        if entry & 1 == 1 {
            at.choice = take(&self.entries, &mut at.entry);
        }
        entry > 0
    }
}

/// Writes a number in as many bytes as it needs, seven bits each, the lowest first.
fn put(bytes: &mut Vec<u8>, mut number: usize) {
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// Reads such a number and moves behind it.
fn take(bytes: &[u8], at: &mut usize) -> usize {
    let (mut number, mut shift) = (0, 0);
    loop {
        let byte = bytes[*at];
        *at += 1;
        number |= usize::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return number;
        }
        shift += 7;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Finish;

    use proptest::prelude::*;

    fn text(choice: usize, text: &str) -> Event {
        Event::Text { choice, text: text.into() }
    }

    fn done(choice: usize) -> Event {
        Event::Done { choice, finish: Finish::Stop, completion_tokens: 3, stored: None }
    }

    fn assert_same(events: &[Event]) {
        let mut log = Log::default();
        events.iter().for_each(|event| log.push(event.clone()));
        let same = |found: Vec<Event>| assert_eq!(format!("{found:?}"), format!("{events:?}"));
        same(log.iter().collect());
        same((0..log.len()).filter_map(|n| log.get(n)).collect());
        assert!(log.len() == events.len() && log.get(events.len()).is_none());
    }

    #[test]
    fn events_come_back_as_they_were() {
        assert_same(&[]);
        assert_same(&[text(0, "a"), text(1, "é"), done(0), text(1, "bc"), done(1)]);
        assert_same(&[done(2), text(0, ""), text(300, &"long ".repeat(5000)), text(300, "x")]);
    }

    #[test]
    fn a_word_takes_a_byte_and_itself() {
        let mut log = Log::default();
        (0..64_000).for_each(|_| log.push(text(0, "word")));
        assert!(log.bytes() < 64_000 * 11 / 2, "{} bytes", log.bytes());
    }

    proptest! {
        #[test]
        fn any_events_come_back(
            events in prop::collection::vec((0usize..4, "[a-zé]{1,3}", prop::bool::weighted(0.05)), 0..300),
        ) {
            let event = |(choice, word, ends): (usize, String, bool)| if ends { done(choice) } else { text(choice, &word) };
            assert_same(&events.into_iter().map(event).collect::<Vec<_>>());
        }
    }
}
