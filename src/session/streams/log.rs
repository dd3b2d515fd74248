//! What was sent of a response, in order.

use crate::session::Event;

/// Events by number. Those that carry text take sixteen bytes and their text.
#[derive(Debug, Default)]
pub(super) struct Log {
    text: String,
    entries: Vec<Entry>,
}

#[derive(Debug)]
enum Entry {
    /// Text of a choice, from where the entry before ends.
    Text {
        choice: u32,
        end: usize,
    },
    Other(Box<Event>),
}

impl Log {
    pub fn push(&mut self, event: Event) {
        self.entries.push(match event {
            Event::Text { choice, text } => {
                self.text.push_str(&text);
                Entry::Text { choice: choice as u32, end: self.text.len() }
            }
            other => Entry::Other(Box::new(other)),
        });
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes of memory, about.
    pub fn bytes(&self) -> usize {
        self.text.len() + size_of::<Entry>() * self.entries.len()
    }

    pub fn get(&self, n: usize) -> Option<Event> {
        Some(match self.entries.get(n)? {
            Entry::Text { choice, end } => {
                let ends = self.entries[..n].iter().rev().find_map(|entry| match entry {
                    Entry::Text { end, .. } => Some(*end),
                    Entry::Other(_) => None,
                });
                let text = self.text[ends.unwrap_or(0)..*end].to_owned();
                Event::Text { choice: *choice as usize, text }
            }
            Entry::Other(event) => (**event).clone(),
        })
    }

    pub fn iter(&self) -> impl Iterator<Item = Event> {
        (0..self.len()).filter_map(|n| self.get(n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Finish;

    #[test]
    fn events_come_back_as_they_were() {
        let text = |choice, text: &str| Event::Text { choice, text: text.into() };
        let done = |choice| Event::Done { choice, finish: Finish::Stop, completion_tokens: 3, stored: None };
        let events = [text(0, "a"), text(1, "é"), done(0), text(1, "bc"), done(1)];
        let mut log = Log::default();
        events.iter().for_each(|event| log.push(event.clone()));
        assert_eq!((log.len(), format!("{:?}", log.iter().collect::<Vec<_>>())), (5, format!("{events:?}")));
        assert!(log.get(5).is_none() && log.bytes() >= 4);
    }
}
