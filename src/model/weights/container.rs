//! What the file formats of ggml's world share: little-endian numbers one after the other.

/// Reads a file from front to back; every error says where.
pub struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(file: &'a [u8]) -> Self {
        Self { file, at: 0 }
    }

    pub fn position(&self) -> usize {
        self.at
    }

    pub fn left(&self) -> usize {
        self.file.len() - self.at
    }

    /// The next `count` bytes; `what` they are goes into the error.
    pub fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8], String> {
        let Some(bytes) = self.file[self.at..].get(..count) else {
            return Err(format!("{what} at byte {} needs {count} bytes, and {} are left", self.at, self.left()));
        };
        self.at += count;
        Ok(bytes)
    }

    pub fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        Ok(self.take(N, what)?.try_into().expect("as many bytes as were asked for"))
    }

    pub fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// `number` as a count of things of at least `smallest` bytes each, all of which must still be to come.
    ///
    /// What is then reserved for them is a small multiple of the file's size, whatever the number says.
    pub fn count(&self, number: u64, smallest: usize, what: &str) -> Result<usize, String> {
        let room = self.left() / smallest;
        usize::try_from(number).ok().filter(|&count| count <= room).ok_or_else(|| {
            format!("{number} {what} are announced before byte {}, and the file has room for {room}", self.at)
        })
    }

    /// The next `length` bytes as UTF-8.
    pub fn text(&mut self, length: u64, what: &str) -> Result<&'a str, String> {
        let length = self.count(length, 1, "bytes of text")?;
        let at = self.at;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|e| format!("{what} at byte {at} is not UTF-8: {e}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_read_past_the_end() {
        let mut cursor = Cursor::new(&[1, 0, 0, 0, 2, 0]);
        assert_eq!(cursor.u32("a number"), Ok(1));
        assert_eq!(cursor.u32("a number"), Err("a number at byte 4 needs 4 bytes, and 2 are left".into()));
        assert_eq!((cursor.position(), cursor.left()), (4, 2));
        assert!(cursor.take(usize::MAX, "all").is_err());
        assert_eq!(cursor.take(2, "the rest"), Ok(&[2, 0][..]));
        assert_eq!(cursor.take(0, "nothing"), Ok(&[][..]));
    }

    #[test]
    fn counts_are_held_against_what_is_left() {
        let cursor = Cursor::new(&[0; 17]);
        assert_eq!(cursor.count(4, 4, "numbers"), Ok(4));
        assert!(cursor.count(5, 4, "numbers").is_err());
        assert!(cursor.count(u64::MAX, 1, "numbers").is_err());
    }

    #[test]
    fn text_is_utf8() {
        assert_eq!(Cursor::new("hé".as_bytes()).text(3, "a name"), Ok("hé"));
        assert!(Cursor::new("hé".as_bytes()).text(2, "a name").is_err());
        assert!(Cursor::new(b"h").text(u64::MAX, "a name").is_err());
    }
}
