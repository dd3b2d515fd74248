//! The configuration: defaults ← file ← environment ← flags. Each section is owned by the room it configures.

mod check;
mod load;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use load::{Error, Flags};

use crate::api::{ApiLimits, Key};
use crate::model::Kind;
use crate::session::{PrefixLimits, Quota, StreamLimits, TurnLimits};
use crate::state::Precision;
use crate::telemetry::LogConfig;
use crate::text::Profile;
use crate::types::{InitialName, Tenant};

/// Everything that can be configured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub server: Server,
    pub states: States,
    pub engine: Engine,
    pub requests: ApiLimits,
    pub turns: TurnLimits,
    pub streams: StreamLimits,
    pub prefix_cache: PrefixLimits,
    pub log: LogConfig,
    /// Served models, the default first; none = the embedded one.
    pub model: Vec<Model>,
    /// API keys; none = everybody may do everything.
    pub key: Vec<Key>,
    /// Quotas of single tenants; others have that of `[states]`.
    pub tenant: Vec<TenantQuota>,
}

/// How much one tenant may have stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantQuota {
    pub name: Tenant,
    pub quota: Quota,
}

/// Where the server listens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    pub host: String,
    pub port: u16,
    /// Seconds that running answers have to finish when the server is told to stop.
    pub drain_s: u64,
    /// Refuse unknown request fields.
    pub strict: bool,
}

impl Default for Server {
    fn default() -> Self {
        Self { host: "127.0.0.1".into(), port: 8080, drain_s: 30, strict: false }
    }
}

/// Where states are kept, and which.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct States {
    /// A bucket that servers share, `s3://bucket/prefix` (or gs, az); empty = `dir`.
    pub url: String,
    /// Address of a server that speaks S3's language; empty = AWS.
    pub endpoint: String,
    /// With `url`: bytes of states that are also kept in memory.
    pub memory_bytes: u64,
    /// With `url`: bytes of states that are also kept in `dir`; 0 = none.
    pub disk_bytes: u64,
    /// A folder; empty = the platform's data folder; `:memory:` = nothing outlives the process.
    pub dir: String,
    /// Seconds that a state is kept when the request does not say; 0 = until it is deleted.
    pub default_ttl_s: u64,
    /// In how many bits values are stored: all but f32 lose something.
    pub precision: Precision,
    /// Whether what is stored is compressed.
    pub compress: bool,
    /// States that each session keeps, its head included; 0 = all. Older turns are read again when they are asked for.
    pub session_snapshots: u64,
    /// Seconds before what a crash or a deletion left is removed: longer than any turn runs.
    pub grace_s: u64,
    /// The most that each tenant may have stored; 0 = as much as there is room for.
    pub quota: Quota,
}

impl Default for States {
    fn default() -> Self {
        Self {
            url: String::new(),
            endpoint: String::new(),
            memory_bytes: 256 << 20,
            disk_bytes: 0,
            dir: String::new(),
            default_ttl_s: 0,
            precision: Precision::default(),
            compress: false,
            session_snapshots: 32,
            grace_s: 6 * 3600,
            quota: Quota::default(),
        }
    }
}

/// How much runs at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Engine {
    /// Answers that are generated at once, for each model.
    pub seats: usize,
    /// Requests that wait for a seat; more are refused with 429.
    pub queue: usize,
    /// Prompt tokens in one step when no answer is being generated.
    pub budget: usize,
    /// Prompt tokens in one step at most while answers are being generated, which wait for it; the engine's pace allows fewer.
    pub busy_budget: usize,
    /// Threads that compute; 0 = one for each processor.
    pub threads: usize,
    /// Whether tokens are drafted, and how many at most in one step.
    pub speculation: Drafts,
}

impl Default for Engine {
    fn default() -> Self {
        Self { seats: 64, queue: 256, budget: 512, busy_budget: 512, threads: 0, speculation: Drafts::Whether(true) }
    }
}

/// `true`, `false`, or the most tokens of a draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false, or the most tokens of a draft")]
pub enum Drafts {
    Whether(bool),
    Most(usize),
}

impl Drafts {
    /// Longer drafts are rarely right to their end, and the step that reads them is longer.
    const USUAL: usize = 7;
    /// Each position takes a vocabulary of logits.
    const LONGEST: usize = 32;

    /// Tokens in the longest draft; 0 = there are none.
    pub fn most(self) -> usize {
        match self {
            Self::Whether(true) => Self::USUAL,
            Self::Whether(false) => 0,
            Self::Most(most) => most,
        }
    }
}

/// One served model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// Served name; empty = the file's name, or `stories` for the embedded model.
    pub name: String,
    pub aliases: Vec<String>,
    /// A checkpoint file of any format, or a folder as at Hugging Face; none = the embedded model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// A LoRA adapter to merge.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<PathBuf>,
    /// The alpha it was trained with; none = as its `adapter_config.json` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f32>,
    /// What large matrices become as they are loaded; none = they stay as they are stored.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "weight_type",
        serialize_with = "weight_type_name"
    )]
    pub quantize: Option<Kind>,
    /// A state-tuned file that fresh sequences start from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<PathBuf>,
    /// Further state-tuned files, which requests begin from by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub initial_state: Vec<InitialState>,
    /// `world`, `bytes`, or a `tokenizer.json` or vocabulary file; none = beside the model, or by its vocabulary's size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// A built-in profile's name, or a whole profile; none = by the tokenizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<ProfileChoice>,
}

/// The type of a name such as `q8_0`, for the command line too.
pub fn parse_kind(name: &str) -> Result<Kind, String> {
    Kind::parse(name).ok_or_else(|| format!("there is no type `{name}`; there are {}", Kind::names()))
}

fn weight_type<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Kind>, D::Error> {
    let name = String::deserialize(from)?;
    parse_kind(&name).map(Some).map_err(serde::de::Error::custom)
}

fn weight_type_name<S: serde::Serializer>(kind: &Option<Kind>, to: S) -> Result<S::Ok, S::Error> {
    kind.map(Kind::name).serialize(to)
}

/// A state-tuned file and the name that requests give in `initial_state`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitialState {
    pub name: InitialName,
    pub file: PathBuf,
}

/// How a model talks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected the name of a profile, or a table with all of one")]
pub enum ProfileChoice {
    Named(String),
    Own(Box<Profile>),
}

impl Config {
    /// Whether only this machine can reach the server.
    pub fn is_loopback(&self) -> bool {
        self.server.host == "localhost" || self.server.host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

impl Model {
    /// The name clients use.
    pub fn served_name(&self) -> String {
        if !self.name.is_empty() {
            return self.name.clone();
        }
        let Some(file) = &self.file else { return "stories".into() };
        let name = file.file_name().map_or("model".into(), |name| name.to_string_lossy());
        // Only what is the ending of a checkpoint goes: a folder may be called rwkv7-1.5B.
        let endings = [".safetensors.index.json", ".safetensors", ".pth", ".gguf", ".bin", ".st"];
        let stem = endings.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(&name);
        stem.replace(char::is_whitespace, "-")
    }
}
