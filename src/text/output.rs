//! The text of a response while it is being generated.

use std::collections::VecDeque;
use std::sync::Arc;

use super::stops::Stops;

/// Which white space is not part of a response. White space is Unicode's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trim {
    /// Swallow it until the first other character.
    pub start: bool,
    /// Deliver it only when other text follows.
    pub end: bool,
}

/// What one push makes ready for the client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// To be delivered now; may be empty.
    pub text: String,
    /// A stop string was found: the response is complete.
    pub stopped: bool,
}

/// Turns the bytes of a response into text that can be delivered at once and never has to be taken back.
///
/// Held back is the end of the text while it is an incomplete character, the beginning of a stop string, or (with
/// [`Trim::end`]) white space. Bytes that are not UTF-8 become one U+FFFD for each maximal invalid sequence, as in
/// [`String::from_utf8_lossy`]. The stop string that begins first ends the response, and everything from its beginning
/// is dropped; so when a complete one lies inside what may still become a longer one that begins earlier, the decision
/// waits for that.
///
/// What is delivered depends only on the bytes, never on how they are split into pushes. A fresh `Output` to which the
/// last `received() - delivered()` bytes are pushed again goes on exactly as this one would, if it trims the start
/// only when this one does and has not [begun](Output::begun).
///
/// Memory is bounded by the longest stop string and the longest run of white space. A clone shares the stop strings'
/// automaton.
#[derive(Clone)]
pub struct Output {
    stops: Arc<Stops>,
    trim: Trim,
    /// The beginning of a character, at most 3 bytes.
    partial: Vec<u8>,
    /// Characters that may be in a stop string.
    held: VecDeque<Held>,
    /// White space before `held` that is delivered only when other text follows.
    blank: String,
    /// Where `held` begins and ends, in bytes of text (replaced characters count as their replacement).
    front: u64,
    back: u64,
    /// The automaton's state after the last held character.
    state: u32,
    /// Where a complete stop string begins, while one that begins earlier is still possible.
    candidate: Option<u64>,
    begun: bool,
    stopped: bool,
    received: u64,
    delivered: u64,
}

#[derive(Clone, Copy)]
struct Held {
    character: char,
    /// How many source bytes it stands for.
    source: u8,
}

impl Output {
    /// An output that ends at any of `stops`; empty strings among them are ignored.
    pub fn new(stops: &[String], trim: Trim) -> Self {
        Self {
            stops: Arc::new(Stops::new(stops)),
            trim,
            partial: Vec::new(),
            held: VecDeque::new(),
            blank: String::new(),
            front: 0,
            back: 0,
            state: 0,
            candidate: None,
            begun: false,
            stopped: false,
            received: 0,
            delivered: 0,
        }
    }

    /// Takes the next bytes and returns what may be delivered now. After a stop nothing more is.
    pub fn push(&mut self, bytes: &[u8]) -> Piece {
        self.received += bytes.len() as u64;
        let mut text = String::new();
        if !self.stopped {
            self.partial.extend_from_slice(bytes);
            let source = std::mem::take(&mut self.partial);
            let mut rest = source.as_slice();
            while !rest.is_empty() && !self.stopped {
                let (valid, invalid) = match std::str::from_utf8(rest) {
                    Ok(valid) => (valid, Some(0)),
                    Err(error) => {
                        let (valid, _) = rest.split_at(error.valid_up_to());
                        (std::str::from_utf8(valid).expect("checked just before"), error.error_len())
                    }
                };
                valid.chars().for_each(|character| self.take(character, character.len_utf8(), &mut text));
                rest = &rest[valid.len()..];
                match invalid {
                    Some(0) => {}
                    Some(length) => {
                        self.take(char::REPLACEMENT_CHARACTER, length, &mut text);
                        rest = &rest[length..];
                    }
                    None => {
                        self.partial.extend_from_slice(rest);
                        break;
                    }
                }
            }
        }
        Piece { text, stopped: self.stopped }
    }

    /// The rest of a response that will not go on: what was held back, without white space if the end is trimmed.
    ///
    /// An incomplete character becomes one U+FFFD. If a stop string is complete (see [`stopped`](Output::stopped)),
    /// the text ends before it.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        if !self.stopped && !self.partial.is_empty() {
            let length = std::mem::take(&mut self.partial).len();
            self.take(char::REPLACEMENT_CHARACTER, length, &mut text);
        }
        if !self.stopped {
            match self.candidate {
                Some(start) => self.stop_at(start, &mut text),
                None => self.deliver_to(self.back, &mut text),
            }
        }
        self.drop_rest();
        text
    }

    /// Whether the response ended with a stop string.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Whether any text was delivered, as opposed to white space that was swallowed.
    pub fn begun(&self) -> bool {
        self.begun
    }

    /// How many bytes came in.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// How many of the received bytes the client has, or never will as they are leading white space.
    pub fn delivered(&self) -> u64 {
        self.delivered
    }

    /// Takes one character that stands for `source` bytes and delivers what has become certain.
    fn take(&mut self, character: char, source: usize, text: &mut String) {
        if self.stopped {
            return;
        }
        let mut utf8 = [0; 4];
        for &byte in character.encode_utf8(&mut utf8).as_bytes() {
            self.state = self.stops.step(self.state, byte);
        }
        self.back += character.len_utf8() as u64;
        self.held.push_back(Held { character, source: source as u8 });
        if let Some(length) = self.stops.ending(self.state) {
            let start = self.back - length;
            self.candidate = Some(self.candidate.map_or(start, |earlier| earlier.min(start)));
        }
        // Nothing that begins before this place can become a stop string any more.
        let open = self.back - self.stops.depth(self.state);
        match self.candidate {
            Some(start) if start <= open => self.stop_at(start, text),
            _ => self.deliver_to(open, text),
        }
    }

    fn stop_at(&mut self, start: u64, text: &mut String) {
        self.deliver_to(start, text);
        self.stopped = true;
        self.drop_rest();
    }

    /// Passes on the held characters before `end`.
    fn deliver_to(&mut self, end: u64, text: &mut String) {
        while self.front < end {
            let Some(held) = self.held.pop_front() else { break };
            self.front += held.character.len_utf8() as u64;
            self.pass(held, text);
        }
    }

    /// Delivers a character that is in no stop string, unless it is white space to be trimmed.
    fn pass(&mut self, Held { character, source }: Held, text: &mut String) {
        if character.is_whitespace() {
            if self.trim.start && !self.begun {
                self.delivered += u64::from(source);
                return;
            }
            if self.trim.end {
                self.blank.push(character);
                return;
            }
        }
        text.push_str(&self.blank);
        text.push(character);
        self.delivered += self.blank.len() as u64 + u64::from(source);
        self.blank.clear();
        self.begun = true;
    }

    fn drop_rest(&mut self) {
        self.held.clear();
        self.blank.clear();
        self.front = self.back;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOTH: Trim = Trim { start: true, end: true };

    fn strings(stops: &[&str]) -> Vec<String> {
        stops.iter().map(|stop| stop.to_string()).collect()
    }

    /// What the whole response is, the slow way: text, and whether it was stopped.
    fn oracle(bytes: &[u8], stops: &[String], trim: Trim) -> (String, bool) {
        let text = String::from_utf8_lossy(bytes);
        let stop = stops.iter().filter(|stop| !stop.is_empty()).filter_map(|stop| text.find(stop.as_str())).min();
        let mut text = &text[..stop.unwrap_or(text.len())];
        if trim.start {
            text = text.trim_start();
        }
        if trim.end {
            text = text.trim_end();
        }
        (text.to_string(), stop.is_some())
    }

    #[test]
    fn characters_are_never_broken() {
        let mut output = Output::new(&[], Trim::default());
        let texts: Vec<String> = "é🙂".bytes().map(|byte| output.push(&[byte]).text).collect();
        assert_eq!(texts, ["", "é", "", "", "", "🙂"]);
        assert_eq!(output.push(b"\xf0\x9f\x98").text, "");
        assert_eq!((output.received(), output.delivered()), (9, 6));
        assert_eq!(output.push(b"a").text, "\u{fffd}a");
        assert_eq!(output.push(b"\xff\xe2\x82").text, "\u{fffd}");
        assert_eq!(output.finish(), "\u{fffd}");
        assert_eq!((output.received(), output.delivered()), (13, 13));
    }

    #[test]
    fn stop_strings_are_held_back_and_dropped() {
        let mut output = Output::new(&strings(&["\nUser:", ""]), BOTH);
        assert_eq!(output.push(b" Hello \nUs").text, "Hello");
        assert_eq!((output.received(), output.delivered()), (10, 6));
        assert_eq!(output.push(b"e me. \n").text, " \nUse me.");
        assert_eq!(output.push(b"User").text, "");
        assert_eq!(output.push(b": and more"), Piece { text: String::new(), stopped: true });
        assert_eq!(output.push(b"later"), Piece { text: String::new(), stopped: true });
        assert_eq!(output.finish(), "");
        assert_eq!((output.received(), output.delivered()), (36, 15));
    }

    #[test]
    fn the_stop_that_begins_first_wins() {
        let stops = strings(&["abcd", "c"]);
        let mut output = Output::new(&stops, Trim::default());
        assert_eq!(output.push(b"xabc"), Piece { text: "x".into(), stopped: false });
        let mut other = output.clone();
        assert_eq!(output.push(b"d"), Piece { text: String::new(), stopped: true });
        assert_eq!(other.push(b"e"), Piece { text: "ab".into(), stopped: true });

        let mut ended = Output::new(&stops, Trim::default());
        assert_eq!(ended.push(b"xabc").text, "x");
        assert_eq!(ended.finish(), "ab");
        assert!(ended.stopped());
    }

    #[test]
    fn white_space_is_delivered_only_inside() {
        let mut output = Output::new(&[], BOTH);
        assert_eq!(output.push(b" \n").text, "");
        assert_eq!((output.delivered(), output.begun()), (2, false));
        assert_eq!(output.push("a \u{a0}".as_bytes()).text, "a");
        assert_eq!(output.push(b"b ").text, " \u{a0}b");
        assert_eq!((output.received() - output.delivered(), output.begun()), (1, true));
        assert_eq!(output.finish(), "");
        assert_eq!(output.received() - output.delivered(), 1);
    }

    #[test]
    fn ten_thousand_stop_strings_and_a_long_blank() {
        let stops: Vec<String> = (0..10_000).map(|i| format!("{}{i}", "ab".repeat(50))).collect();
        let mut output = Output::new(&stops, BOTH);
        let text = format!("x{}y{}z", " ".repeat(200_000), "ab".repeat(100_000));
        let mut delivered: String = text.as_bytes().chunks(3).map(|bytes| output.push(bytes).text).collect();
        assert!(output.held.len() <= 104);
        delivered += &output.finish();
        assert!(delivered == text);
    }

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            4 => "[ab\n é🙂]{1,4}".prop_map(String::into_bytes),
            1 => prop::collection::vec(any::<u8>(), 1..4),
            1 => prop::sample::select(vec![&b"\xf0\x9f"[..], b"\xed\xa0\x80", b"\xc3", b"\xef\xbf\xbd", b"\x99"])
                .prop_map(<[u8]>::to_vec),
        ];
        prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
    }

    fn stops() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[ab\n é🙂\u{fffd}]{0,4}", 0..5)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn splitting_and_resuming_change_nothing(
            bytes in bytes(),
            stops in stops(),
            (start, end) in any::<(bool, bool)>(),
            // For each push: how many bytes, and whether the output is lost after it.
            pushes in prop::collection::vec((1usize..6, prop::bool::weighted(0.3)), 1..40),
        ) {
            let trim = Trim { start, end };
            let (expected, stopped) = oracle(&bytes, &stops, trim);
            let mut output = Output::new(&stops, trim);
            let (mut text, mut rest, mut seen) = (String::new(), bytes.as_slice(), 0);
            let mut begun = false;
            for (size, lost) in pushes.into_iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at(size.min(rest.len()));
                let piece = output.push(now);
                rest = later;
                text += &piece.text;
                prop_assert!(expected.starts_with(&text), "{text:?} is no beginning of {expected:?}");
                prop_assert!(!trim.end || !text.ends_with(char::is_whitespace));
                prop_assert!(!stops.iter().any(|stop| !stop.is_empty() && text.contains(stop.as_str())));
                prop_assert!(output.delivered() <= output.received());
                begun |= output.begun();
                prop_assert_eq!(begun, !text.is_empty());
                if piece.stopped {
                    prop_assert!(stopped);
                    prop_assert_eq!(&text, &expected);
                }
                if lost && !piece.stopped {
                    seen += output.delivered();
                    let taken = bytes.len() - rest.len();
                    let unseen = &bytes[seen as usize..taken];
                    prop_assert_eq!(unseen.len() as u64, output.received() - output.delivered());
                    output = Output::new(&stops, Trim { start: start && !begun, end });
                    let again = output.push(unseen);
                    prop_assert_eq!(again, Piece::default());
                }
            }
            text += &output.finish();
            prop_assert_eq!(&text, &expected);
            prop_assert_eq!(output.stopped(), stopped);
            prop_assert_eq!(output.finish(), "");
        }

        #[test]
        fn what_can_be_known_is_not_held(text in "[abc]{0,20}") {
            let mut output = Output::new(&strings(&["aab"]), Trim::default());
            let piece = output.push(text.as_bytes());
            if !piece.stopped {
                let held = ["aa", "a"].into_iter().find(|end| text.ends_with(end)).unwrap_or("");
                prop_assert_eq!(piece.text + held, text);
            }
        }
    }
}
