//! The command line: one file a command; progress bars live here and nowhere else.

mod bench;
mod checkpoint;
mod convert;
mod eval;
mod health;
mod inspect;
mod logits;
mod serve;
mod storage;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::model::Team;

/// An inference server for RWKV language models with the OpenAI API, whose every state can be kept and resumed.
#[derive(Debug, Parser)]
#[command(version, about, after_help = EXAMPLES, disable_help_subcommand = true, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// What `serve` takes, when no command is given.
    #[command(flatten)]
    serve: serve::Args,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve models over HTTP (the default).
    Serve(serve::Args),
    /// Show what a checkpoint is: generation, sizes, types, tokenizer, template, fingerprint.
    Inspect(inspect::Args),
    /// Write the logits after every token of a sequence, and the final state, to a safetensors file.
    Logits(logits::Args),
    /// Write a checkpoint in another format or type.
    Convert(convert::Args),
    /// Measure perplexity on a text, or accuracy on LAMBADA.
    Eval(eval::Args),
    /// Measure how fast a model runs here, against what the machine can do.
    Bench(bench::Args),
    /// Ask a running server whether it is alive; the exit status tells.
    Health(health::Args),
}

const EXAMPLES: &str = "\
Examples:
  rewake                                       serve the embedded demonstration model on http://127.0.0.1:8080
  rewake serve --model rwkv7-g1-0.4b.pth       serve a checkpoint: .pth, .safetensors, .gguf, a folder, …
  rewake inspect rwkv7-g1-0.4b.pth             what a checkpoint is
  rewake convert in.pth out.gguf --type q8_0   the same for llama.cpp, quantised
  rewake serve --host 0.0.0.0 --config my.toml serve other machines, with keys from a configuration file

  curl http://127.0.0.1:8080/v1/completions -H 'content-type: application/json' \\
       -d '{\"prompt\": \"Once upon a time\", \"max_tokens\": 60}'

Configuration: flags override environment variables (REWAKE_SERVER__PORT=9000), which override the file given with
--config; config/rewake.toml of the source explains every key. API documentation: http://127.0.0.1:8080/docs";

/// Runs a command that computes by itself on all processors.
fn together(command: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    Team::new(0)?.install(command)
}

/// Parses the command line and runs what it says.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Some(Command::Serve(args)) => serve::run(args),
        Some(Command::Inspect(args)) => together(|| inspect::run(&args)),
        Some(Command::Logits(args)) => together(|| logits::run(&args)),
        Some(Command::Convert(args)) => together(|| convert::run(&args)),
        Some(Command::Bench(args)) => bench::run(&args),
        Some(Command::Eval(args)) => together(|| eval::run(&args)),
        Some(Command::Health(args)) => health::run(&args),
        None => serve::run(cli.serve),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("rewake: {e:#}");
            ExitCode::FAILURE
        }
    }
}
