//! `rewake serve`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args as Arguments;
use indicatif::HumanBytes;
use tokio::net::TcpListener;

use super::checkpoint::{print, progress, show};
use crate::app::{self, App};
use crate::config::{Config, Flags, parse_kind};
use crate::model::Kind;
use crate::session::ModelCard;
use crate::telemetry;

#[derive(Debug, Default, Arguments)]
pub struct Args {
    /// Checkpoint file or folder to serve: .pth, .safetensors, .st, .gguf, .bin [default: the embedded demonstration model]
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// LoRA adapter to merge into the checkpoint as it is loaded (.safetensors or .pth)
    #[arg(long, value_name = "FILE")]
    lora: Option<PathBuf>,
    /// The alpha that adapter was trained with [default: as the adapter_config.json beside it says]
    #[arg(long, value_name = "ALPHA")]
    lora_alpha: Option<f32>,
    /// Type that the large matrices get as they are loaded: q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k, or f16, bf16
    /// [default: as they are stored]
    #[arg(long, value_name = "TYPE", value_parser = parse_kind)]
    quantize: Option<Kind>,
    /// State-tuned file that every new text begins from; further ones, by name for a request, stand in the configuration
    /// file ([[model.initial_state]])
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// `world`, `bytes`, a tokenizer.json or a vocabulary file [default: chosen by the checkpoint]
    #[arg(long, value_name = "NAME|FILE")]
    tokenizer: Option<String>,
    /// Chat template and stop rules: g1, world, pile or stories [default: chosen by the tokenizer]
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS")]
    host: Option<String>,
    /// Port to listen on; 0 picks a free one [default: 8080]
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Folder for states and sessions, or `:memory:` [default: the platform's data folder]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<String>,
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// How long after the first signal to stop others are taken for that one.
const SAME_WISH: Duration = Duration::from_millis(500);

/// Serves until the process is told to stop.
pub fn run(args: Args) -> anyhow::Result<()> {
    let Args { model, lora, lora_alpha, quantize, state, tokenizer, profile, host, port, state_dir, config } = args;
    let flags = Flags { config, host, port, state_dir, model, lora, lora_alpha, state, quantize, tokenizer, profile };
    // `vars` panics on a name that is not Unicode; such a variable is none of ours.
    let environment = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
    let config = Config::load(&flags, environment)?;
    app::check(&config)?;
    telemetry::init(&config.log)?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(config))
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let app = App::new(&config).await?;
    let (host, port) = (config.server.host.as_str(), config.server.port);
    let listener = TcpListener::bind((host, port)).await.with_context(|| format!("cannot listen on {host}:{port}"))?;
    let address = listener.local_addr()?;

    let sessions = app.sessions.clone();
    let loading = config.clone();
    let load = tokio::task::spawn_blocking(move || {
        let bar = progress("loading", "bytes");
        let models = app::load_models(&loading, &|name, done, all| {
            bar.set_message(name.to_owned());
            show(&bar, done, all);
        });
        bar.finish_and_clear();
        models
    });
    let server = tokio::spawn(app.run(listener, async {
        stop_signal().await;
        tracing::info!("stopping: no new turns, running ones may finish; a second signal ends them");
        tokio::spawn(async {
            // Programs that start others (`timeout`, `npm run`) pass a signal on that reached the whole group already:
            // what comes at once is the same wish again.
            tokio::time::sleep(SAME_WISH).await;
            stop_signal().await;
            // What a client has seen of a state is durable; a turn under way is lost, as in any crash.
            std::process::exit(1);
        });
    }));

    let models = load.await.context("loading was interrupted")??;
    let cards: Vec<ModelCard> = models.iter().map(|m| m.card.clone()).collect();
    sessions.open(models);
    // Answers that were promised to go on, by this process's predecessor.
    let unfinished = sessions.clone();
    tokio::spawn(async move { unfinished.recover().await });
    print(&format!("{}\n", welcome(&config, &cards, address)?))?;
    server.await.context("the server stopped")??;
    tracing::info!("stopped");
    Ok(())
}

/// What a person who just started the server wants to know.
fn welcome(config: &Config, cards: &[ModelCard], address: std::net::SocketAddr) -> anyhow::Result<String> {
    let mut lines = vec![format!("Rewake {} is serving on http://{address}", env!("CARGO_PKG_VERSION"))];
    for (card, model) in cards.iter().zip(&config.model) {
        let growth = match card.state_bytes_per_token {
            0 => String::new(),
            bytes => format!(", and {} more for each token", HumanBytes(bytes)),
        };
        lines.push(format!(
            "  model   {}: RWKV-{}, {:.1} M parameters in {}, {} of state a conversation{growth}",
            card.id,
            card.generation.trim_start_matches('v'),
            card.parameters as f64 / 1e6,
            HumanBytes(card.weight_bytes),
            HumanBytes(card.state_bytes)
        ));
        if model.file.is_none() {
            lines.push(
                "          a demonstration that writes little stories; serve a real one with --model FILE".into(),
            );
        }
    }
    let states = match config.states.dir.as_str() {
        ":memory:" => "in memory only, gone when the server stops".into(),
        _ => app::state_dir(&config.states)?.display().to_string(),
    };
    lines.push(format!("  states  {states}"));
    lines.push(match (config.key.len(), config.is_loopback()) {
        (0, true) => "  access  open, to this machine only".into(),
        (0, false) => "  access  OPEN TO WHOEVER REACHES THIS ADDRESS: configure a [[key]] to change that".into(),
        (1, _) => "  access  by API key (1 configured)".into(),
        (n, _) => format!("  access  by API key ({n} configured)"),
    });
    lines.push(format!("  docs    http://{address}/docs"));
    let key = if config.key.is_empty() { "" } else { " -H \"authorization: Bearer $KEY\"" };
    lines.push(format!(
        "\nTry:\n  curl http://{address}/v1/completions{key} -H 'content-type: application/json' \\\n       -d '{{\"prompt\": \"Once upon a time\", \"max_tokens\": 60}}'\n"
    ));
    Ok(lines.join("\n"))
}

/// Resolves when the process is asked to stop.
async fn stop_signal() {
    let interrupt = async {
        // Without a handler there is nothing to wait for, and stopping at once would be wrong.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    #[cfg(unix)]
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending::<()>();
    tokio::select! {
        () = interrupt => {}
        () = terminate => {}
    }
}
