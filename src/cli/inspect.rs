//! `rewake inspect`: what a checkpoint is.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};

use super::checkpoint::{Which, print};
use crate::app;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// List every tensor too
    #[arg(long)]
    tensors: bool,
}

/// Loads the model, so that what is printed is what would be served.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let opened = args.which.open()?;
    let (config, d) = (args.which.config(), opened.model.description());
    // A model can be looked at though nobody knows its tokenizer; serving it would need one.
    let text = app::tokenizer(&config, &opened.checkpoint);
    let profile = text.as_ref().ok().map(|text| app::profile(&config, &**text)).transpose()?;
    let tensors = opened.checkpoint.tensors();
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
    for tensor in tensors.values() {
        *kinds.entry(tensor.kind.name()).or_default() += tensor.shape.iter().product::<usize>() as u64;
    }
    let about = json!({
        "generation": d.generation,
        "layers": d.layers,
        "width": d.width,
        "vocabulary": d.vocabulary,
        "parameters": d.parameters,
        "format": opened.checkpoint.format(),
        "types": kinds,
        "context": d.context,
        "state_bytes": d.state_bytes,
        "tokenizer": text.as_ref().map_or_else(|e| format!("{e:#}"), |text| text.name().into()),
        "template": profile.as_ref().map(|p| &p.name),
        "stop": profile.as_ref().map(|p| &p.stop),
        "stop_tokens": profile.as_ref().map(|p| &p.stop_tokens),
        "fingerprint": d.fingerprint,
        "arithmetic": d.arithmetic,
    });
    let tensors = tensors.iter().filter(|_| args.tensors);
    if args.json {
        let mut about = about;
        if args.tensors {
            let list = tensors.map(|(name, t)| json!({"name": name, "type": t.kind.name(), "shape": t.shape}));
            about["tensors"] = list.collect();
        }
        return print(&format!("{about:#}\n"));
    }
    let mut text = String::new();
    for (key, value) in about.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        writeln!(text, "{:<13}{}", key.replace('_', " "), shown(key, value))?;
    }
    for (name, tensor) in tensors {
        writeln!(text, "  {name} {} {:?}", tensor.kind, tensor.shape)?;
    }
    print(&text)
}

/// A value as people read it.
fn shown(key: &str, value: &Value) -> String {
    match (key, value) {
        ("state_bytes", bytes) => format!("{bytes} for each sequence"),
        (_, Value::String(text)) => text.clone(),
        (_, Value::Object(kinds)) => kinds.iter().map(|(kind, n)| format!("{n} {kind}")).collect::<Vec<_>>().join(", "),
        (_, other) => other.to_string(),
    }
}
