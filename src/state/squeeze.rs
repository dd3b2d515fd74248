//! The compressed body of a snapshot: zstd around the bytes of all its segments, and what it may blow up to.

use std::io::{BufReader, Read, Write};

use super::Damaged;
use super::precision::Packed;

/// How many times as large as its file a state may be, as f32. What compresses better is mostly zeros and small; a file that
/// claims to is refused before anything of it is unpacked.
pub(super) const RATIO: u64 = 16;

/// zstd's own default: beyond it, states take much longer and little less room.
const LEVEL: i32 = 3;

/// How far back in what was unpacked a file may make the decoder look, as a power of two: what [`LEVEL`] uses. It is memory
/// that the decoder takes.
const WINDOW: u32 = 21;

/// The bytes of all segments, compressed; `None` if they are to stay as they are, because the state, of `bytes` bytes as f32,
/// would come out of too small a file.
pub(super) fn compress(segments: &[Packed], bytes: u64) -> Result<Option<Vec<u8>>, Damaged> {
    // Not the whole at once: told the size, zstd would ask its decoder for a window as large.
    let squeeze = || {
        let mut out = zstd::stream::write::Encoder::new(Vec::new(), LEVEL)?;
        segments.iter().try_for_each(|segment| out.write_all(&segment.bytes))?;
        out.finish()
    };
    let body = squeeze().map_err(|e: std::io::Error| Damaged(format!("it cannot be compressed: {e}")))?;
    Ok(Some(body).filter(|body| bytes <= RATIO * body.len() as u64))
}

/// A compressed body, read segment by segment.
pub(super) struct Body<'a>(zstd::stream::read::Decoder<'a, BufReader<&'a [u8]>>);

impl<'a> Body<'a> {
    pub fn open(body: &'a [u8]) -> Result<Self, Damaged> {
        let mut decoder = zstd::stream::read::Decoder::new(body).map_err(broken)?.single_frame();
        decoder.window_log_max(WINDOW).map_err(broken)?;
        Ok(Self(decoder))
    }

    /// The next `len` bytes; the caller has bounded them.
    pub fn next(&mut self, len: usize) -> Result<Vec<u8>, Damaged> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).map_err(broken)?;
        Ok(bytes)
    }

    /// Checks that there is nothing more.
    pub fn end(mut self) -> Result<(), Damaged> {
        if self.0.read(&mut [0]).map_err(broken)? > 0 {
            return Err(Damaged("its compressed body is longer than its segments".into()));
        }
        let mut rest = self.0.finish();
        if rest.read(&mut [0]).map_err(broken)? > 0 {
            return Err(Damaged("its compressed body ends before its tensor does".into()));
        }
        Ok(())
    }
}

fn broken(error: std::io::Error) -> Damaged {
    Damaged(format!("its compressed body cannot be read: {error}"))
}
