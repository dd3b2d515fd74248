//! The composition root: builds every part from the configuration, and runs the server.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::serve::{Listener, ListenerExt};
use tokio::net::{TcpListener, TcpStream};

use crate::api;
use crate::config::{self, Config, ProfileChoice};
use crate::engine::{Handle, ModelBackend, Speculation};
use crate::model::{self, Checkpoint, LoadOptions, Lora, Team};
use crate::scheduler::Limits;
use crate::session::{InitialStates, Model, ModelCard, Policy, Quotas, Sessions, SweepPace};
use crate::state::{Archive, Bounded, Bucket, BucketUrl, DiskFault, InMemory, Local, Storage, Store, Tiered, is_state};
use crate::telemetry::{clock, metrics};
use crate::text::{self, Profile, Tokenizer};

/// The embedded demonstration model: a small RWKV-7 that tells stories.
mod demo {
    pub const WEIGHTS: &[u8] = include_bytes!("../assets/demo/model.safetensors");
    pub const TOKENIZER: &[u8] = include_bytes!("../assets/demo/tokenizer.json");
    pub const PROFILE: &str = "stories";
}

/// A server whose models are not loaded yet.
pub struct App {
    pub router: axum::Router,
    pub sessions: Arc<Sessions>,
    drain: Duration,
}

impl App {
    /// Opens the state store and builds the routes; `/ready` says "loading" until [`Sessions::open`].
    pub async fn new(config: &Config) -> anyhow::Result<Self> {
        let (store, prefixes) = (store(&config.states).await?, prefixes(config).await?);
        Self::with_stores(config, store, prefixes)
    }

    /// As [`App::new`], over a store of the caller's, and with the prefix cache in memory only.
    pub fn with_store(config: &Config, store: Arc<dyn Store>) -> anyhow::Result<Self> {
        Self::with_stores(config, store, None)
    }

    /// As [`App::new`], over stores of the caller's, of which the second is the prefix cache's.
    pub fn with_stores(
        config: &Config,
        store: Arc<dyn Store>,
        prefixes: Option<Arc<dyn Store>>,
    ) -> anyhow::Result<Self> {
        let ttl = (config.states.default_ttl_s > 0).then_some(config.states.default_ttl_s);
        let storage = Storage { precision: config.states.precision, compress: config.states.compress };
        let archive = Archive::new(store).storing(storage).with_grace(config.states.grace_s);
        let of = config.tenant.iter().map(|tenant| (tenant.name.clone(), tenant.quota)).collect();
        let quotas = Quotas::new(config.states.quota, of);
        let policy = Policy { snapshots: config.states.session_snapshots, quotas };
        let sessions = Arc::new(
            Sessions::new(archive, config.turns.clone(), ttl)
                .with_policy(policy)
                .with_prefix_cache(&config.prefix_cache, prefixes)
                .with_streams(config.streams.clone(), !config.states.url.is_empty()),
        );
        let router = api::router(api::App {
            sessions: sessions.clone(),
            keys: config.key.clone(),
            limits: config.requests.clone(),
            strict: config.server.strict,
            metrics: metrics::install()?,
        });
        Ok(Self { router, sessions, drain: Duration::from_secs(config.server.drain_s) })
    }

    /// Serves until `shutdown`; then refuses new turns, lets running ones finish in the configured time, and returns.
    pub async fn run(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let Self { router, sessions, drain } = self;
        let (drained, wait) = tokio::sync::oneshot::channel();
        let sweeping = sessions.clone();
        let sweep = tokio::spawn(async move {
            sweeping.ready().await;
            sweeping.sweep_always(SweepPace::default()).await;
        });
        let serve = axum::serve(undelayed(listener), router).with_graceful_shutdown(async move {
            shutdown.await;
            sessions.drain();
            // Still accepting, so that `/ready` can tell a load balancer.
            sessions.finish(drain).await;
            let _ = drained.send(());
        });
        // Connections that stay open with nothing running on them do not keep the process.
        let linger = async {
            let _ = wait.await;
            tokio::time::sleep(Duration::from_secs(2)).await;
        };
        let served = tokio::select! {
            served = async { serve.await } => served,
            () = linger => Ok(()),
        };
        // Whatever it was at is done by the next one.
        sweep.abort();
        served
    }
}

/// Every event of a stream leaves at once. A kernel would hold back the second small write of a reply until the client
/// acknowledges the first, which clients put off too: some 40 ms before the first text.
fn undelayed(listener: TcpListener) -> impl Listener<Io = TcpStream, Addr = SocketAddr> {
    listener.tap_io(|tcp| {
        if let Err(why) = tcp.set_nodelay(true) {
            tracing::debug!(%why, "a connection sends its events late");
        }
    })
}

async fn store(states: &config::States) -> anyhow::Result<Arc<dyn Store>> {
    if !states.url.is_empty() {
        return shared_store(states).await;
    }
    if states.dir == ":memory:" {
        return Ok(Arc::new(InMemory::default()));
    }
    Ok(Arc::new(folder(state_dir(states)?).await?))
}

/// Where states of texts go that have no room in memory. They are this machine's own, also where servers share a bucket.
async fn prefixes(config: &Config) -> anyhow::Result<Option<Arc<dyn Store>>> {
    if !config.prefix_cache.enabled || config.prefix_cache.disk_bytes == 0 {
        return Ok(None);
    }
    Ok(Some(Arc::new(folder(state_dir(&config.states)?.join("prefixes")).await?)))
}

async fn folder(path: PathBuf) -> anyhow::Result<Local> {
    let mend = "name a folder that this user may make and write, with --state-dir or `[states] dir`, or `:memory:`";
    Local::open(path).await.map_err(|error| anyhow::anyhow!("{error}; {mend}"))
}

/// Memory before the disk before the bucket.
async fn shared_store(states: &config::States) -> anyhow::Result<Arc<dyn Store>> {
    let bucket = Bucket::open(&BucketUrl { url: states.url.clone(), endpoint: states.endpoint.clone() }).await?;
    let bucket: Arc<dyn Store> = if states.disk_bytes > 0 {
        // Copies of an earlier process, whose use nobody noted: they would never go.
        let dir = state_dir(states)?.join("copies");
        match fs::remove_dir_all(&dir) {
            Err(e) if DiskFault::of(&e).is_some() => {
                tracing::warn!(folder = %dir.display(), error = %e, "no copies of states are kept on disk: old ones cannot be removed");
                Arc::new(bucket)
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("cannot empty {}", dir.display()));
            }
            _ => {
                let disk = Bounded::new(folder(dir).await?, states.disk_bytes);
                Arc::new(Tiered::new(disk, Arc::new(bucket), is_state))
            }
        }
    } else {
        Arc::new(bucket)
    };
    if states.memory_bytes == 0 {
        return Ok(bucket);
    }
    Ok(Arc::new(Tiered::new(Bounded::new(InMemory::default(), states.memory_bytes), bucket, is_state)))
}

/// The folder where states are kept.
pub fn state_dir(states: &config::States) -> anyhow::Result<PathBuf> {
    use etcetera::app_strategy::{AppStrategy, AppStrategyArgs, choose_native_strategy};
    if !states.dir.is_empty() {
        return Ok(PathBuf::from(&states.dir));
    }
    let args = AppStrategyArgs { top_level_domain: "org".into(), author: "rewake".into(), app_name: "rewake".into() };
    let native = choose_native_strategy(args).context("this user has no data folder; name one with --state-dir")?;
    Ok(native.data_dir())
}

/// Finds what can be known to be wrong before anything is started: files that are not there, profiles nobody knows.
pub fn check(config: &Config) -> anyhow::Result<()> {
    for model in &config.model {
        let tokenizer =
            model.tokenizer.as_ref().filter(|t| !["world", "bytes"].contains(&t.as_str())).map(PathBuf::from);
        let given = [&model.file, &model.lora, &model.state, &tokenizer].into_iter().flatten();
        for file in given.chain(model.initial_state.iter().map(|state| &state.file)) {
            let shown = file.display();
            let metadata = fs::metadata(file).with_context(|| format!("cannot open {shown}"))?;
            // A model or an adapter may be a folder, as at Hugging Face.
            let folder = metadata.is_dir() && [&model.file, &model.lora].contains(&&Some(file.clone()));
            anyhow::ensure!(metadata.is_file() || folder, "{shown} is not a regular file");
            fs::File::open(file).with_context(|| format!("cannot open {shown}"))?;
        }
        if let Some(lora) = &model.lora {
            Lora::open(lora, model.lora_alpha)?;
        }
        if let Some(ProfileChoice::Named(name)) = &model.profile {
            builtin_profile(name)?;
        }
        if let Some(ProfileChoice::Own(profile)) = &model.profile {
            profile.check()?;
        }
    }
    Ok(())
}

/// Loads every configured model. `progress` hears (model, bytes of weights loaded, bytes in all).
pub fn load_models(config: &Config, progress: &dyn Fn(&str, usize, usize)) -> anyhow::Result<Vec<Model>> {
    let team = Arc::new(Team::new(config.engine.threads).context("starting the compute threads")?);
    config.model.iter().map(|model| load_model(model, &config.engine, &team, progress)).collect()
}

fn load_model(
    config: &config::Model,
    engine: &config::Engine,
    team: &Arc<Team>,
    progress: &dyn Fn(&str, usize, usize),
) -> anyhow::Result<Model> {
    let name = config.served_name();
    // Where no bar is seen, such as in a container, this is all that is heard of a long load.
    tracing::info!(model = name, files = files(config), "loading");
    let open = || {
        let checkpoint = checkpoint(config)?;
        let text = tokenizer(config, &checkpoint).context("the tokenizer")?;
        let profile = profile(config, &*text)?;
        // Making a tokenizer takes far more memory than it has in the end. That is not there beside the weights.
        model::trim();
        let model = team.install(|| load(config, &checkpoint, &|done, all| progress(&name, done, all)))?;
        let initial = initial_states(config, &model)?;
        Ok((model, text, profile, initial))
    };
    let opened: anyhow::Result<_> = open();
    let (model, text, profile, initial) = opened.with_context(|| format!("loading model `{name}`"))?;
    model::trim();
    let d = model.description().clone();
    tracing::info!(model = name, generation = d.generation, weight_bytes = d.weight_bytes, "loaded");
    let seats = engine.seats;
    let layout = model.segments().to_vec();
    let speculation = match engine.speculation.most() {
        0 => Speculation::Off,
        most => Speculation::UpTo(most),
    };
    let backend = ModelBackend::new(model, seats, team.clone())?.speculating(speculation);
    let limits = Limits { seats, queue: engine.queue, budget: engine.budget, busy_budget: engine.busy_budget };
    let engine = Handle::start(&name, backend, text.clone(), limits).context("starting the engine thread")?;
    let card = ModelCard {
        id: name,
        aliases: config.aliases.clone(),
        created: clock::unix_seconds(),
        generation: d.generation.into(),
        layers: d.layers,
        width: d.width,
        vocabulary: d.vocabulary,
        parameters: d.parameters,
        weight_bytes: d.weight_bytes,
        state_bytes: d.state_bytes,
        state_bytes_per_token: d.state_bytes_per_token,
        context: d.context,
        fingerprint: d.fingerprint,
        tokenizer: text.name().into(),
        template: profile.name.clone(),
        stop: profile.stop.clone(),
        stop_tokens: profile.stop_tokens.clone(),
        sampling: profile.sampling.sampling(),
        initial_states: initial.names(),
    };
    Ok(Model { card, engine, text, profile, initial, layout, seats })
}

/// The states that sequences of `model` can begin from.
fn initial_states(config: &config::Model, model: &model::Model) -> anyhow::Result<InitialStates> {
    let mut states = InitialStates::new(&model.fresh()?);
    for config::InitialState { name, file } in &config.initial_state {
        let state = Checkpoint::open(file).and_then(|file| model.initial_state(&file));
        let state = state.with_context(|| format!("the initial state `{name}` ({})", file.display()))?;
        states.add(name.clone(), state);
    }
    Ok(states)
}

/// A model to compute with, and what it was loaded from.
pub struct Opened {
    pub model: model::Model,
    pub checkpoint: Checkpoint,
}

/// Loads one model. `progress` hears (bytes of weights loaded, bytes in all).
pub fn open(config: &config::Model, progress: &dyn Fn(usize, usize)) -> anyhow::Result<Opened> {
    let checkpoint = checkpoint(config)?;
    let model = load(config, &checkpoint, progress)?;
    Ok(Opened { model, checkpoint })
}

fn load(
    config: &config::Model,
    checkpoint: &Checkpoint,
    progress: &dyn Fn(usize, usize),
) -> anyhow::Result<model::Model> {
    let state = config.state.as_deref().map(Checkpoint::open).transpose()?;
    let options = LoadOptions { initial_state: state.as_ref(), quantise: config.quantize, progress };
    model::load(checkpoint, &options).with_context(|| files(config))
}

/// The files a model is made of, for errors that name a tensor.
pub fn files(config: &config::Model) -> String {
    let name = |file: &Option<PathBuf>| file.as_ref().map(|file| file.display().to_string());
    let base = name(&config.file).unwrap_or_else(|| "the embedded model".into());
    let added = [("LoRA", name(&config.lora)), ("state", name(&config.state))];
    added.into_iter().fold(base, |all, (what, file)| match file {
        Some(file) => format!("{all} with the {what} {file}"),
        None => all,
    })
}

/// Opens a model's checkpoint, with its LoRA adapter if it has one.
pub fn checkpoint(config: &config::Model) -> anyhow::Result<Checkpoint> {
    let checkpoint = match &config.file {
        Some(file) => Checkpoint::open(file)?,
        None => Checkpoint::in_memory("the embedded model", demo::WEIGHTS)?,
    };
    match &config.lora {
        Some(lora) => {
            let adapter = Lora::open(lora, config.lora_alpha)?;
            checkpoint.with_lora(adapter).with_context(|| format!("the LoRA {}", lora.display()))
        }
        None => Ok(checkpoint),
    }
}

/// The tokenizer: as configured, else as the checkpoint says, else from beside it, else by the size of the vocabulary.
pub fn tokenizer(config: &config::Model, checkpoint: &Checkpoint) -> anyhow::Result<Arc<dyn Tokenizer>> {
    let vocabulary = checkpoint.vocabulary_size().context("the checkpoint has no embedding table")?;
    let tokenizer = match (config.tokenizer.as_deref(), &config.file) {
        (Some("world"), _) => text::world(),
        (Some("bytes"), _) => text::bytes(),
        (Some(file), _) => tokenizer_file(Path::new(file))?,
        (None, None) => text::from_json(demo::TOKENIZER)?,
        (None, Some(file)) => match checkpoint.vocabulary()? {
            Some(literals) => text::from_literals(&literals)?,
            None => tokenizer_beside(file, vocabulary)?,
        },
    };
    if tokenizer.vocab_size() > vocabulary {
        let size = tokenizer.vocab_size();
        bail!("`{}` has {size} ids and the model only {vocabulary}: it belongs to another model", tokenizer.name());
    }
    Ok(tokenizer)
}

/// Neither a checkpoint nor what stands beside it says how it reads text.
#[derive(Debug, thiserror::Error)]
#[error(
    "none is known for a vocabulary of {vocabulary} ids; {known}give one with --tokenizer (`world`, `bytes`, a \
     tokenizer.json or a vocabulary file)"
)]
pub struct UnknownTokenizer {
    vocabulary: usize,
    /// What is known of it all the same.
    known: String,
}

/// What stands beside a checkpoint, or is known of a vocabulary of this size.
fn tokenizer_beside(checkpoint: &Path, vocabulary: usize) -> anyhow::Result<Arc<dyn Tokenizer>> {
    let beside = |name: &str| {
        let file = if checkpoint.is_dir() { checkpoint.join(name) } else { checkpoint.with_file_name(name) };
        file.exists().then_some(file)
    };
    let pile = PILE_VOCABULARY.contains(&vocabulary);
    if let Some(file) = beside("tokenizer.json") {
        return tokenizer_file(&file);
    }
    if WORLD_VOCABULARY.contains(&vocabulary) {
        return Ok(text::world());
    }
    if vocabulary == 256 {
        return Ok(text::bytes());
    }
    if let Some(file) = beside(WORLD_FILE).or_else(|| beside(PILE_FILE).filter(|_| pile)) {
        return tokenizer_file(&file);
    }
    let known = if pile {
        format!("GPT-NeoX's has as many: put its `{PILE_FILE}` beside the model, or ")
    } else {
        String::new()
    };
    bail!(UnknownTokenizer { vocabulary, known })
}

/// Sizes that models of the World vocabulary have, and those of the Pile, whose head may be padded.
const WORLD_VOCABULARY: RangeInclusive<usize> = 65_530..=65_536;
const PILE_VOCABULARY: RangeInclusive<usize> = 50_254..=50_432;
/// The names under which repositories of RWKV models carry the two.
const WORLD_FILE: &str = "rwkv_vocab_v20230424.txt";
const PILE_FILE: &str = "20B_tokenizer.json";

fn tokenizer_file(file: &Path) -> anyhow::Result<Arc<dyn Tokenizer>> {
    let shown = file.display();
    let metadata = fs::metadata(file).with_context(|| format!("cannot read {shown}"))?;
    // A pipe or a device beside a model could be read for ever.
    anyhow::ensure!(metadata.is_file(), "{shown} is not a regular file");
    let bytes = fs::read(file).with_context(|| format!("cannot read {shown}"))?;
    let json = bytes.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'{');
    let read = if json { text::from_json(&bytes) } else { text::from_vocabulary(&bytes) };
    read.with_context(|| format!("cannot use {}", file.display()))
}

/// The profile: as configured, else by what the vocabulary is, wherever it was found: a session goes on in another
/// container with the template it began with.
pub fn profile(config: &config::Model, text: &dyn Tokenizer) -> anyhow::Result<Profile> {
    let name = match (&config.profile, &config.file) {
        (Some(ProfileChoice::Own(profile)), _) => {
            profile.check()?;
            return Ok((**profile).clone());
        }
        (Some(ProfileChoice::Named(name)), _) => name.as_str(),
        (None, None) => demo::PROFILE,
        (None, Some(_)) if text::is_world(text) => "g1",
        (None, Some(_)) if PILE_VOCABULARY.contains(&text.vocab_size()) => "pile",
        (None, Some(_)) => "world",
    };
    builtin_profile(name)
}

fn builtin_profile(name: &str) -> anyhow::Result<Profile> {
    text::builtin(name).with_context(|| {
        let known: Vec<_> = text::builtin_names().collect();
        format!("there is no profile `{name}`; there are {}", known.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_small_write_waits_for_an_acknowledgement() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let _client = TcpStream::connect(address).await.unwrap();
        let (accepted, _) = undelayed(listener).accept().await;
        assert!(accepted.nodelay().unwrap());
    }
}
