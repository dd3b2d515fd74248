//! `rewake convert`: a checkpoint in another format.

use std::path::PathBuf;

use anyhow::Context;

use super::checkpoint::{Target, inputs, print, progress, show};
use crate::config;
use crate::model::{Checkpoint, Conversion, Error, Format, Kind};
use crate::{app, text};

const EXAMPLES: &str = "\
Examples:
  rewake convert model.pth model.gguf --type q8_0      for llama.cpp, quantised
  rewake convert model.gguf model.safetensors --type bf16   back to RWKV's own names
  rewake convert model.pth merged.pth --lora tuned.pth --lora-alpha 32

OUT appears when it is complete, not before; what was there is then replaced.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Checkpoint file or folder to read, of any format that `serve` takes
    #[arg(value_name = "IN")]
    from: PathBuf,
    /// File to write, whose ending says the format: .pth, .safetensors, or .gguf for llama.cpp (v6 and v7)
    #[arg(value_name = "OUT")]
    to: PathBuf,
    /// Type of the large matrices: f32, f16, bf16; in GGUF also q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k. All else
    /// is small and keeps its type (f32 in GGUF) [default: as they are]
    #[arg(long = "type", value_name = "TYPE", value_parser = config::parse_kind)]
    kind: Option<Kind>,
    /// LoRA adapter to merge; merged matrices get the type of the base, or the one of --type
    #[arg(long, value_name = "FILE")]
    lora: Option<PathBuf>,
    /// The alpha that adapter was trained with [default: as the adapter_config.json beside it says]
    #[arg(long, value_name = "A", requires = "lora")]
    lora_alpha: Option<f32>,
    /// The tokenizer a GGUF file gets: `world`, `bytes` or a vocabulary file [default: what the checkpoint says]
    #[arg(long, value_name = "NAME|FILE")]
    tokenizer: Option<String>,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let format = Format::of(&args.to)
        .with_context(|| format!("{} says no format; end it with .pth, .safetensors or .gguf", args.to.display()))?;
    let model = config::Model {
        file: Some(args.from.clone()),
        lora: args.lora.clone(),
        lora_alpha: args.lora_alpha,
        tokenizer: args.tokenizer.clone(),
        ..config::Model::default()
    };
    let checkpoint = app::checkpoint(&model)?;
    let target = Target::new(&args.to, &inputs(&model, &checkpoint))?;
    let vocabulary = if format == Format::Gguf { vocabulary(&model, &checkpoint)? } else { None };
    let speechless = format == Format::Gguf && vocabulary.is_none();
    let left = format != Format::Gguf && left_behind(&checkpoint);
    let bar = progress("converting", "tensors");
    let conversion = Conversion {
        checkpoint: &checkpoint,
        format,
        kind: args.kind,
        vocabulary,
        name: model.served_name(),
        progress: &|done, all| show(&bar, done, all),
    };
    let write = |file: &mut _| match conversion.write(file) {
        Err(Error::Write(e)) => Err(e.into()),
        written => written.with_context(|| app::files(&model)),
    };
    target.write(write)?;
    bar.finish_and_clear();
    if let (Some(kind), n @ 1..) = (args.kind, conversion.unfit()) {
        eprintln!("{n} of the large matrices have no rows of whole blocks of {kind}; they became q8_0, or f16");
    }
    if left {
        eprintln!(
            "the vocabulary stays behind, for such a file holds tensors only: put its tokenizer.json or vocabulary file \
             beside the new one, or name it with --tokenizer"
        );
    }
    if speechless {
        eprintln!(
            "no vocabulary is in the file: llama.cpp has RWKV's own kind of tokenizer, and this model has another, or \
             none that is known (--tokenizer)"
        );
    }
    print(&format!("{}\n", args.to.display()))
}

/// Whether the checkpoint holds a vocabulary that is not known by its size.
fn left_behind(checkpoint: &Checkpoint) -> bool {
    let Ok(Some(literals)) = checkpoint.vocabulary() else { return false };
    text::from_literals(&literals).map_or(true, |text| !text::is_world(&*text) && text.name() != text::bytes().name())
}

/// Every id's token, if the model's vocabulary is one of byte strings of which text takes the longest.
fn vocabulary(model: &config::Model, checkpoint: &Checkpoint) -> anyhow::Result<Option<Vec<Vec<u8>>>> {
    // What is wrong with such a checkpoint is told by the conversion.
    if checkpoint.vocabulary_size().is_none() {
        return Ok(None);
    }
    let tokenizer = match app::tokenizer(model, checkpoint) {
        Ok(tokenizer) => tokenizer,
        // llama.cpp can do without; what is there and broken is another matter.
        Err(e) if e.is::<app::UnknownTokenizer>() || matches!(e.downcast_ref(), Some(Error::Vocabulary(_))) => {
            return Ok(None);
        }
        Err(e) => return Err(e).context("the tokenizer"),
    };
    if !tokenizer.is_greedy() {
        return Ok(None);
    }
    Ok(Some((0..tokenizer.vocab_size() as u32).map(|id| text::to_literal(tokenizer.token_bytes(id))).collect()))
}
