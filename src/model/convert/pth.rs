//! PyTorch's zip format (`torch.save` of a state dict) under the original names.

use std::io::{self, Seek, SeekFrom, Write};

use zip::result::ZipError;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::{Conversion, Error, Kind, Out, Target};

/// Writes the archive: the pickled state dict, then a file for each tensor.
pub fn write(conversion: &Conversion, out: &mut impl Out) -> Result<(), Error> {
    let targets = conversion.originals()?;
    let mut archive = ZipWriter::new(Failing { out, at: 0, end: 0, failed: false });
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, content) in
        [("data.pkl", state_dict(&targets)), ("byteorder", b"little".to_vec()), ("version", b"3\n".to_vec())]
    {
        archive.start_file(format!("archive/{name}"), stored).map_err(broken)?;
        archive.write_all(&content)?;
    }
    conversion.each(&targets, |n, bytes| {
        let large = stored.large_file(bytes.len() > u32::MAX as usize);
        archive.start_file(format!("archive/data/{n}"), large).map_err(broken)?;
        Ok(archive.write_all(bytes)?)
    })?;
    archive.finish().map_err(broken)?;
    Ok(())
}

fn broken(error: ZipError) -> Error {
    match error {
        ZipError::Io(error) => Error::Write(error),
        other => Error::Write(io::Error::other(other)),
    }
}

/// An output that takes anything once it has failed: an archive that is given up still tries to finish itself, and would
/// complain on the standard error.
struct Failing<'a, W> {
    out: &'a mut W,
    /// Where it is, and how far it got: from the failure on, in imagination.
    at: u64,
    end: u64,
    failed: bool,
}

impl<W> Failing<'_, W> {
    fn tell<T>(&mut self, given_up: T, done: impl FnOnce(&mut W) -> io::Result<T>) -> io::Result<T> {
        if self.failed {
            return Ok(given_up);
        }
        let done = done(self.out);
        // Whoever is interrupted tries again.
        self.failed = done.as_ref().is_err_and(|e| e.kind() != io::ErrorKind::Interrupted);
        done
    }
}

impl<W: Write> Write for Failing<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.tell(bytes.len(), |out| out.write(bytes))?;
        self.at += written as u64;
        self.end = self.end.max(self.at);
        Ok(written)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.tell((), Write::flush)
    }
}

impl<W: Seek> Seek for Failing<'_, W> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let place = match to {
            SeekFrom::Start(place) => Some(place),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.end.checked_add_signed(by),
        };
        self.at = self.tell(place.ok_or(io::ErrorKind::InvalidInput)?, |out| out.seek(to))?;
        Ok(self.at)
    }
}

/// The pickle of a dict of tensors, whose n-th is in the storage `n`.
fn state_dict(targets: &[Target]) -> Vec<u8> {
    let mut pickle = Pickle(vec![0x80, 2, b'}', b'(']);
    for (n, target) in targets.iter().enumerate() {
        let numel: usize = target.shape.iter().product();
        pickle.text(&target.name);
        pickle.global("torch._utils", "_rebuild_tensor_v2");
        pickle.mark();
        // The storage, by a persistent id.
        pickle.mark();
        pickle.text("storage");
        let class = match target.kind {
            Kind::F16 => "HalfStorage",
            Kind::BF16 => "BFloat16Storage",
            _ => "FloatStorage",
        };
        pickle.global("torch", class);
        pickle.text(&n.to_string());
        pickle.text("cpu");
        pickle.int(numel);
        pickle.op(b't');
        pickle.op(b'Q');
        // Its offset, shape and strides, no gradient, no hooks.
        pickle.int(0);
        pickle.ints(&target.shape);
        let strides: Vec<usize> = (0..target.shape.len()).map(|d| target.shape[d + 1..].iter().product()).collect();
        pickle.ints(&strides);
        pickle.op(0x89);
        pickle.global("collections", "OrderedDict");
        pickle.op(b')');
        pickle.op(b'R');
        pickle.op(b't');
        pickle.op(b'R');
    }
    pickle.op(b'u');
    pickle.op(b'.');
    pickle.0
}

/// A pickle of protocol 2 in the making.
struct Pickle(Vec<u8>);

impl Pickle {
    fn op(&mut self, op: u8) {
        self.0.push(op);
    }
    fn mark(&mut self) {
        self.op(b'(');
    }
    fn text(&mut self, text: &str) {
        self.op(b'X');
        self.0.extend((text.len() as u32).to_le_bytes());
        self.0.extend(text.as_bytes());
    }
    fn global(&mut self, module: &str, name: &str) {
        self.0.extend(format!("c{module}\n{name}\n").as_bytes());
    }
    /// BININT, or LONG1 for what is larger. No tensor has 2⁶³ values.
    fn int(&mut self, value: usize) {
        match i32::try_from(value) {
            Ok(small) => {
                self.op(b'J');
                self.0.extend(small.to_le_bytes());
            }
            Err(_) => {
                self.0.extend([0x8a, 8]);
                self.0.extend((value as u64).to_le_bytes());
            }
        }
    }
    fn ints(&mut self, values: &[usize]) {
        self.mark();
        values.iter().for_each(|&value| self.int(value));
        self.op(b't');
    }
}
