//! `rewake inspect`: what a checkpoint is.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::checkpoint::{Which, print};
use crate::app;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: Which,
    /// Print JSON, for programs
    #[arg(long)]
    json: bool,
    /// List every tensor too, under its original name, with type and shape
    #[arg(long)]
    tensors: bool,
}

/// Loads the model, so that what is printed is what would be served.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let opened = args.which.open()?;
    let (config, d) = (args.which.config(), opened.model.description());
    // A model can be looked at though nobody knows its tokenizer; serving it would need one.
    let text = match args.which.tokenizer(&opened) {
        Err(e) if args.which.names_tokenizer() => return Err(e),
        text => text,
    };
    let profile = text.as_ref().ok().map(|text| app::profile(&config, &**text)).transpose()?;
    let tensors = opened.checkpoint.tensors();
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
    for tensor in tensors.values() {
        *kinds.entry(tensor.kind.name()).or_default() += tensor.shape.iter().product::<usize>() as u64;
    }
    let about = [
        ("generation", json!(d.generation)),
        ("layers", json!(d.layers)),
        ("width", json!(d.width)),
        ("vocabulary", json!(d.vocabulary)),
        ("context", json!(d.context)),
        ("parameters", json!(d.parameters)),
        ("format", json!(opened.checkpoint.format())),
        ("types", json!(kinds)),
        ("weight_bytes", json!(d.weight_bytes)),
        ("state_bytes", json!(d.state_bytes)),
        ("state_bytes_per_token", json!(d.state_bytes_per_token)),
        ("tokenizer", json!(text.as_ref().map_or_else(|e| e.root_cause().to_string(), |text| text.name().into()))),
        ("template", json!(profile.as_ref().map(|p| &p.name))),
        ("stop", json!(profile.as_ref().map(|p| &p.stop))),
        ("stop_tokens", json!(profile.as_ref().map(|p| &p.stop_tokens))),
        ("fingerprint", json!(d.fingerprint)),
        ("arithmetic", json!(d.arithmetic)),
    ];
    let tensors = tensors.iter().filter(|_| args.tensors);
    if args.json {
        let mut object: Map<_, _> = about.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        if args.tensors {
            let list = tensors.map(|(name, t)| json!({"name": name, "type": t.kind.name(), "shape": t.shape}));
            object.insert("tensors".into(), list.collect());
        }
        return print(&format!("{:#}\n", Value::Object(object)));
    }
    let mut lines = String::new();
    for (key, value) in about.iter().filter(|(key, value)| !value.is_null() && *key != "state_bytes_per_token") {
        let mut shown = shown(key, value);
        if *key == "state_bytes" && d.state_bytes_per_token > 0 {
            write!(shown, ", and {} for each token", d.state_bytes_per_token)?;
        }
        writeln!(lines, "{:<13}{shown}", key.replace('_', " "))?;
    }
    for (name, tensor) in tensors {
        writeln!(lines, "  {name} {} {:?}", tensor.kind, tensor.shape)?;
    }
    print(&lines)
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
