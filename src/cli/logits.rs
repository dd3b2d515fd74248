//! `rewake logits`: the logits after every token, to compare with any other implementation.

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde_json::json;

use super::checkpoint::{Target, Which, inputs, print, progress, read_file, show};
use crate::types::{Row, SegmentData, SeqId, SlotId, Want};

const EXAMPLES: &str = "\
Example:
  rewake logits model.pth --tokens 510,444,1 --out logits.safetensors

In Python: safetensors.numpy.load_file(\"logits.safetensors\")[\"logits\"]; row t foretells the token after the t-th.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, group = clap::ArgGroup::new("input").args(["tokens", "text"]).required(true))]
pub struct Args {
    #[command(flatten)]
    which: Which,
    /// Tokens to read: ids, `1,2,3`, or a JSON file with a list of them (or an object whose `tokens` is one)
    #[arg(long, value_name = "IDS|FILE")]
    tokens: Option<String>,
    /// Text to read instead, through the tokenizer
    #[arg(long, value_name = "TEXT")]
    text: Option<String>,
    /// Tokens read in one step: a matter of speed, the logits are the same bit for bit
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    chunk: u32,
    /// Safetensors file to write, all float32: `logits [T, V]`, and the state after the last token as `state.*`
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Room for the header, which is written last: the shapes of a state that grows with the text are known only then.
const HEADER: usize = 1 << 20;

/// Runs the server's own step and writes what it gives.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut opened = args.which.open()?;
    let mut read = inputs(&args.which.config(), &opened.checkpoint);
    read.extend(args.tokens.as_ref().map(PathBuf::from));
    let target = Target::new(&args.out, &read)?;
    let ids = match (&args.tokens, &args.text) {
        (Some(tokens), _) => ids(tokens)?,
        (None, text) => {
            let tokenizer = args.which.tokenizer(&opened)?;
            tokenizer.encode_special(text.as_deref().unwrap_or_default())
        }
    };
    ensure!(!ids.is_empty(), "there are no tokens to read");
    let mut pool = opened.model.pool(1)?;
    let slot = SlotId(0);
    pool.reset(slot);
    let vocabulary = opened.model.description().vocabulary;
    let bar = progress("reading", "tokens");
    target.write(|file| {
        file.write_all(&[b' '; HEADER])?;
        let mut logits = Vec::new();
        let mut at = 0;
        for chunk in ids.chunks(args.chunk as usize) {
            let row = Row { seq: SeqId(0), from: slot, into: slot, at, tokens: 0..chunk.len(), want: Want::All };
            opened.model.step(&mut pool, chunk, &[row], &mut logits)?;
            write_values(file, &logits)?;
            at += chunk.len() as u64;
            show(&bar, at as usize, ids.len());
        }
        let state = pool.snapshot(slot);
        state.iter().try_for_each(|segment| write_values(file, &segment.data))?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&header(&[ids.len(), vocabulary], &state)?)?;
        Ok(())
    })?;
    bar.finish_and_clear();
    print(&format!("{}: logits [{}, {vocabulary}] and the state\n", args.out.display(), ids.len()))
}

fn ids(tokens: &str) -> anyhow::Result<Vec<u32>> {
    let number = |id: &str| id.trim().parse::<u32>();
    if let Ok(ids) = tokens.split(',').map(number).collect() {
        return Ok(ids);
    }
    let text = read_file(Path::new(tokens))
        .with_context(|| format!("`{tokens}` is neither token ids, such as 1,2,3, nor a file"))?;
    let mut json: serde_json::Value = serde_json::from_slice(&text).with_context(|| format!("{tokens} is not JSON"))?;
    if json.is_object() {
        json = json["tokens"].take();
    }
    serde_json::from_value(json).with_context(|| format!("{tokens} holds no list of token ids"))
}

fn write_values(file: &mut impl Write, values: &[f32]) -> std::io::Result<()> {
    values.iter().try_for_each(|value| file.write_all(&value.to_le_bytes()))
}

/// The header of a safetensors file with these tensors one after the other, [`HEADER`] bytes long.
fn header(logits: &[usize; 2], state: &[SegmentData]) -> anyhow::Result<Vec<u8>> {
    let mut tensors = serde_json::Map::new();
    let mut end = 0;
    let named = state.iter().map(|segment| (format!("state.{}", segment.name), segment.shape.as_slice()));
    for (name, shape) in std::iter::once(("logits".to_owned(), logits.as_slice())).chain(named) {
        let begin = end;
        end += 4 * shape.iter().product::<usize>();
        tensors.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}));
    }
    let json = serde_json::to_vec(&tensors)?;
    ensure!(json.len() + 8 <= HEADER, "the state has too many segments for one file");
    let mut header = ((HEADER - 8) as u64).to_le_bytes().to_vec();
    header.extend(json);
    header.resize(HEADER, b' ');
    Ok(header)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn token_ids_come_from_the_line_or_from_a_file() {
        assert_eq!(ids("1, 2,3").expect("ids"), [1, 2, 3]);
        let folder = tempfile::tempdir().expect("a folder");
        for (text, expected) in [("[4, 5]", Some([4, 5])), ("{\"tokens\": [4, 5]}", Some([4, 5])), ("[-1]", None)] {
            let file = folder.path().join("ids.json");
            fs::write(&file, text).expect("a file");
            assert_eq!(ids(&file.display().to_string()).ok(), expected.map(Vec::from), "{text}");
        }
        let error = ids("1,x").expect_err("no ids").to_string();
        assert!(error.contains("`1,x` is neither token ids"), "{error}");
    }

    #[test]
    fn the_header_is_what_safetensors_reads() {
        let state = SegmentData { name: "a".into(), shape: vec![2], data: vec![1.0, 2.0] };
        let mut file = header(&[3, 5], &[state]).expect("a header");
        write_values(&mut file, &[0.5; 17]).expect("values");
        let read = safetensors::SafeTensors::deserialize(&file).expect("a safetensors file");
        assert_eq!(read.tensor("logits").expect("logits").shape(), [3, 5]);
        assert_eq!(read.tensor("state.a").expect("a state").shape(), [2]);
    }
}
