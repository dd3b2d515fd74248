//! PyTorch's zip format (`torch.save` of a state dict) under the original names.

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::{Conversion, Error, Kind, Out, Target};

/// Writes the archive: the pickled state dict, then a file for each tensor.
pub fn write(conversion: &Conversion, out: &mut impl Out) -> Result<(), Error> {
    let targets = conversion.originals()?;
    let mut archive = ZipWriter::new(out);
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, content) in
        [("data.pkl", state_dict(&targets)), ("byteorder", b"little".to_vec()), ("version", b"3\n".to_vec())]
    {
        archive.start_file(format!("archive/{name}"), stored).map_err(broken)?;
        std::io::Write::write_all(&mut archive, &content)?;
    }
    conversion.each(&targets, |n, bytes| {
        let large = stored.large_file(bytes.len() > u32::MAX as usize);
        archive.start_file(format!("archive/data/{n}"), large).map_err(broken)?;
        Ok(std::io::Write::write_all(&mut archive, bytes)?)
    })?;
    archive.finish().map_err(broken)?;
    Ok(())
}

fn broken(error: zip::result::ZipError) -> Error {
    Error::Write(std::io::Error::other(error))
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
