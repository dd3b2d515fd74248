//! Safetensors under the original names.

use serde_json::{Map, json};

use super::{Conversion, Error, Kind, Out};

/// Writes the header and then every tensor.
pub fn write(conversion: &Conversion, out: &mut impl Out) -> Result<(), Error> {
    let targets = conversion.originals()?;
    let mut header = Map::new();
    let mut end = 0;
    for target in &targets {
        let begin = end;
        end += target.bytes()?;
        let dtype = match target.kind {
            Kind::F16 => "F16",
            Kind::BF16 => "BF16",
            _ => "F32",
        };
        let tensor = json!({"dtype": dtype, "shape": target.shape, "data_offsets": [begin, end]});
        header.insert(target.name.clone(), tensor);
    }
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut header = serde_json::to_vec(&header).map_err(|e| Error::Convert(e.to_string()))?;
    // Tensors begin at a multiple of eight bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    conversion.each(&targets, |_, bytes| Ok(out.write_all(bytes)?))
}
