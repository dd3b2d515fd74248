//! Words out of a file in a message.

/// Bytes of a message that are shown.
const SHOWN: usize = 1000;

/// A text in which something out of a file may stand, as it may be shown: short, on one line, and without what would
/// steer a terminal.
pub fn readable(text: &str) -> String {
    let mut shown = String::new();
    for c in text.chars() {
        if shown.len() > SHOWN {
            return shown + "…";
        }
        if c.is_control() { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_of_a_file_is_short_and_harmless() {
        assert_eq!(readable("`é` is\tno \u{1b}[2J\0"), r"`é` is\tno \u{1b}[2J\u{0}");
        let long = readable(&"\n".repeat(1 << 20));
        assert!(long.len() < SHOWN + 10 && long.ends_with('…'));
    }
}
