//! The configuration: defaults ← file ← environment ← flags. Each section is owned by the room it configures.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::api::{ApiLimits, Key};
use crate::model::Kind;
use crate::session::{PrefixLimits, Quota, StreamLimits, TurnLimits};
use crate::state::Precision;
use crate::telemetry::LogConfig;
use crate::text::Profile;
use crate::types::{InitialName, Tenant, readable};

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
    /// Prompt tokens in one step while answers are being generated, which wait for it.
    pub busy_budget: usize,
    /// Threads that compute; 0 = one for each processor.
    pub threads: usize,
    /// Whether tokens are drafted, and how many at most in one step.
    pub speculation: Drafts,
}

impl Default for Engine {
    fn default() -> Self {
        Self { seats: 64, queue: 256, budget: 512, busy_budget: 64, threads: 0, speculation: Drafts::Whether(true) }
    }
}

/// `true`, `false`, or the most tokens of a draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
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
#[serde(untagged)]
pub enum ProfileChoice {
    Named(String),
    Own(Box<Profile>),
}

/// What the command line sets.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    pub config: Option<PathBuf>,
    pub host: Option<String>,
    pub port: Option<u16>,
    pub state_dir: Option<String>,
    pub model: Option<PathBuf>,
    pub lora: Option<PathBuf>,
    pub lora_alpha: Option<f32>,
    pub state: Option<PathBuf>,
    pub quantize: Option<Kind>,
    pub tokenizer: Option<String>,
    pub profile: Option<String>,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the configuration is wrong: {}", lines(.0))]
    Read(config::ConfigError),
    #[error("the configuration is wrong: `{key}` {}", readable(.why))]
    Value { key: String, why: String },
}

/// Not as a source, which would be printed once more.
impl From<config::ConfigError> for Error {
    fn from(error: config::ConfigError) -> Self {
        Self::Read(error)
    }
}

/// What is wrong, with the line of the file in which it is.
fn lines(error: &config::ConfigError) -> String {
    error.to_string().lines().take(16).map(readable).collect::<Vec<_>>().join("\n")
}

/// Where the environment's variables begin: `REWAKE_SERVER__PORT` sets `server.port`.
const PREFIX: &str = "REWAKE_";

impl Config {
    /// Reads the configuration. `environment` holds all variables of the process.
    ///
    /// # Errors
    /// Names the key and the file or variable that is wrong.
    pub fn load(flags: &Flags, environment: impl Iterator<Item = (String, String)>) -> Result<Self, Error> {
        let mut sources = config::Config::builder();
        if let Some(path) = &flags.config {
            sources = sources.add_source(config::File::from(path.as_path()).format(config::FileFormat::Toml));
        }
        // Only `REWAKE_SECTION__KEY` is configuration; other variables with this prefix mean other things.
        let nested = environment.filter(|(name, _)| name.starts_with(PREFIX) && name.contains("__")).collect();
        let variables = config::Environment::with_prefix("REWAKE")
            .prefix_separator("_")
            .separator("__")
            .try_parsing(true)
            .source(Some(nested));
        let mut config: Config = sources.add_source(variables).build()?.try_deserialize()?;
        config.apply(flags);
        config.check()?;
        Ok(config)
    }

    fn apply(&mut self, flags: &Flags) {
        if let Some(host) = &flags.host {
            self.server.host.clone_from(host);
        }
        if let Some(port) = flags.port {
            self.server.port = port;
        }
        if let Some(dir) = &flags.state_dir {
            self.states.dir.clone_from(dir);
        }
        if let Some(file) = &flags.model {
            self.model = vec![Model { file: Some(file.clone()), ..Model::default() }];
        }
        if self.model.is_empty() {
            self.model.push(Model::default());
        }
        if let Some(lora) = &flags.lora {
            // The alpha that is configured belongs to another adapter.
            (self.model[0].lora, self.model[0].lora_alpha) = (Some(lora.clone()), None);
        }
        if flags.lora_alpha.is_some() {
            self.model[0].lora_alpha = flags.lora_alpha;
        }
        if let Some(state) = &flags.state {
            self.model[0].state = Some(state.clone());
        }
        if flags.quantize.is_some() {
            self.model[0].quantize = flags.quantize;
        }
        if let Some(tokenizer) = &flags.tokenizer {
            self.model[0].tokenizer = Some(tokenizer.clone());
        }
        if let Some(profile) = &flags.profile {
            self.model[0].profile = Some(ProfileChoice::Named(profile.clone()));
        }
    }

    fn check(&self) -> Result<(), Error> {
        let wrong = |key: &str, why: &str| Err(Error::Value { key: key.into(), why: why.into() });
        let Engine { seats, queue, budget, busy_budget, threads, speculation } = self.engine;
        for (key, value, most) in [
            ("engine.seats", seats, 1 << 15),
            ("engine.queue", queue, 1 << 20),
            ("engine.budget", budget, 1 << 15),
            ("engine.busy_budget", busy_budget, 1 << 15),
            ("engine.threads", threads.max(1), 1 << 10),
            ("requests.body_bytes", self.requests.body_bytes, 1 << 40),
            ("requests.state_bytes", self.requests.state_bytes, 1 << 40),
            ("requests.choices", self.requests.choices, 1 << 15),
            ("requests.prompts", self.requests.prompts, 1 << 15),
            ("prefix_cache.spacing", self.prefix_cache.spacing, 1 << 20),
            ("turns.prompt_tokens", self.turns.prompt_tokens, usize::MAX),
            ("turns.max_tokens", self.turns.max_tokens as usize, usize::MAX),
            ("turns.default_max_tokens", self.turns.default_max_tokens as usize, usize::MAX),
        ] {
            if value == 0 || value > most {
                return wrong(key, &format!("is {value}, and must be from 1 to {most}"));
            }
        }
        if speculation.most() > Drafts::LONGEST {
            let most = Drafts::LONGEST;
            return wrong("engine.speculation", &format!("must be true, false or a number of tokens up to {most}"));
        }
        if self.server.host.parse::<std::net::IpAddr>().is_err() && self.server.host != "localhost" {
            return wrong(
                "server.host",
                &format!("is `{}`, and must be an address such as 127.0.0.1 or ::", self.server.host),
            );
        }
        let States { url, endpoint, dir, disk_bytes, .. } = &self.states;
        if !url.is_empty() && !["s3://", "gs://", "az://"].iter().any(|scheme| url.starts_with(scheme)) {
            return wrong("states.url", &format!("is `{url}`, and must begin with s3://, gs:// or az://"));
        }
        if !endpoint.is_empty() && !url.starts_with("s3://") {
            return wrong("states.endpoint", "is the address of a server for s3://, and `states.url` is not");
        }
        if *disk_bytes > 0 && (url.is_empty() || dir == ":memory:") {
            return wrong("states.disk_bytes", "is for states that are in a bucket, and needs `states.dir`");
        }
        if self.prefix_cache.disk_bytes > 0 && dir == ":memory:" {
            return wrong(
                "prefix_cache.disk_bytes",
                "is for states that are kept in `states.dir`, and that is `:memory:`",
            );
        }
        for (n, key) in self.key.iter().enumerate() {
            if self.key[..n].iter().any(|other| other.name == key.name || other.hash == key.hash) {
                return wrong(&format!("key.{n}"), &format!("has a name or a hash that another has: `{}`", key.name));
            }
        }
        for (n, tenant) in self.tenant.iter().enumerate() {
            if self.tenant[..n].iter().any(|other| other.name == tenant.name) {
                return wrong(&format!("tenant.{n}"), &format!("has the name `{}`, which another has", tenant.name));
            }
        }
        let mut names = std::collections::BTreeSet::new();
        for (n, model) in self.model.iter().enumerate() {
            for name in std::iter::once(model.served_name()).chain(model.aliases.iter().cloned()) {
                if name.is_empty() || name.chars().any(char::is_whitespace) {
                    return wrong(&format!("model.{n}"), &format!("has the name `{name}`; names are words"));
                }
                if !names.insert(name.clone()) {
                    return wrong(&format!("model.{n}"), &format!("has the name `{name}`, which another model has"));
                }
            }
            if model.lora.is_none() && model.lora_alpha.is_some() {
                return wrong(&format!("model.{n}.lora_alpha"), "is the alpha of an adapter, and `lora` names none");
            }
            for (i, InitialState { name, .. }) in model.initial_state.iter().enumerate() {
                if model.initial_state[..i].iter().any(|other| other.name == *name) {
                    let why = format!("has the name `{name}`, which another initial state of this model has");
                    return wrong(&format!("model.{n}.initial_state.{i}"), &why);
                }
            }
        }
        Ok(())
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_there_is_named_once() {
        let flags = Flags { config: Some("nowhere.toml".into()), ..Flags::default() };
        let error = anyhow::Error::from(Config::load(&flags, std::iter::empty()).expect_err("no file"));
        assert_eq!(format!("{error:#}").matches("nowhere.toml").count(), 1, "{error:#}");
    }

    fn load(toml: &str, environment: &[(&str, &str)], flags: Flags) -> Result<Config, Error> {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("rewake.toml");
        std::fs::write(&path, toml).expect("a file");
        let environment = environment.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        Config::load(&Flags { config: Some(path), ..flags }, environment)
    }

    #[test]
    fn the_documented_file_is_the_defaults() {
        let documented = load(include_str!("../config/rewake.toml"), &[], Flags::default()).expect("it is valid");
        let defaults = Config::load(&Flags::default(), std::iter::empty()).expect("defaults are valid");
        assert_eq!(documented, defaults);
        // And it names every key there is: each is set in it, not only left at its default.
        let given: serde_json::Value = config::Config::builder()
            .add_source(config::File::from_str(include_str!("../config/rewake.toml"), config::FileFormat::Toml))
            .build()
            .and_then(config::Config::try_deserialize)
            .expect("a table");
        let all = serde_json::to_value(Config::default()).expect("a table");
        for (section, keys) in all.as_object().expect("sections") {
            for key in keys.as_object().into_iter().flat_map(|keys| keys.keys()) {
                assert!(given[section].get(key).is_some(), "config/rewake.toml does not mention {section}.{key}");
            }
        }
    }

    #[test]
    fn a_cluster_s_file_is_valid_and_buckets_are_checked() {
        let cluster = load(include_str!("../config/cluster.toml"), &[], Flags::default()).expect("it is valid");
        assert!(cluster.states.url.starts_with("s3://") && cluster.states.disk_bytes > 0);
        for (states, key) in [
            ("url = \"ftp://a/b\"", "states.url"),
            ("endpoint = \"http://a\"", "states.endpoint"),
            ("url = \"gs://a\"\nendpoint = \"http://a\"", "states.endpoint"),
            ("disk_bytes = 1", "states.disk_bytes"),
            ("url = \"s3://a\"\ndir = \":memory:\"\ndisk_bytes = 1", "states.disk_bytes"),
        ] {
            let error = load(&format!("[states]\n{states}\n"), &[], Flags::default()).expect_err(states).to_string();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn each_source_overrides_the_one_before() {
        let toml = "[server]\nport = 1\nhost = \"0.0.0.0\"\n[engine]\nseats = 3\n";
        let environment = [("REWAKE_SERVER__PORT", "2"), ("REWAKE_ENGINE__QUEUE", "5"), ("REWAKE_LOG", "debug")];
        let flags = Flags { host: Some("127.0.0.2".into()), ..Flags::default() };
        let config = load(toml, &environment, flags).expect("valid");
        assert_eq!((config.server.port, config.engine.seats, config.engine.queue), (2, 3, 5));
        assert_eq!(config.server.host, "127.0.0.2");
        assert!(config.is_loopback());
    }

    #[test]
    fn speculation_is_a_switch_or_a_number() {
        let most = |toml: &str, environment: &[(&str, &str)]| {
            load(toml, environment, Flags::default()).expect("valid").engine.speculation.most()
        };
        assert_eq!(most("", &[]), Drafts::USUAL);
        assert_eq!(most("[engine]\nspeculation = true\n", &[]), Drafts::USUAL);
        for off in ["false", "0"] {
            assert_eq!(most(&format!("[engine]\nspeculation = {off}\n"), &[]), 0);
            assert_eq!(most("", &[("REWAKE_ENGINE__SPECULATION", off)]), 0);
        }
        assert_eq!(most("[engine]\nspeculation = 3\n", &[]), 3);
        assert_eq!(most("", &[("REWAKE_ENGINE__SPECULATION", "3")]), 3);
        assert_eq!(most("[engine]\nspeculation = 3\n", &[("REWAKE_ENGINE__SPECULATION", "true")]), Drafts::USUAL);
    }

    #[test]
    fn flags_say_what_is_added_to_the_first_model() {
        let toml = "[[model]]\nlora = \"a.pth\"\nlora_alpha = 16\nstate = \"s.pth\"\n[[model]]\nname = \"b\"\n\
                    [[model.initial_state]]\nname = \"poet\"\nfile = \"poet.pth\"\n";
        let lora = |flags: Flags| {
            let first = load(toml, &[], flags).expect("valid").model.remove(0);
            (first.lora.expect("one of both"), first.lora_alpha)
        };
        assert_eq!(lora(Flags::default()), ("a.pth".into(), Some(16.0)));
        assert_eq!(lora(Flags { lora_alpha: Some(8.0), ..Flags::default() }), ("a.pth".into(), Some(8.0)));
        // The alpha in the file is another adapter's.
        assert_eq!(lora(Flags { lora: Some("b.pth".into()), ..Flags::default() }), ("b.pth".into(), None));
        let both = Flags { lora: Some("b.pth".into()), lora_alpha: Some(4.0), ..Flags::default() };
        assert_eq!(lora(both), ("b.pth".into(), Some(4.0)));

        let kinds = "[[model]]\nquantize = \"q8_0\"\n[[model]]\nname = \"b\"\n";
        let quantised = |flags: Flags| {
            let models = load(kinds, &[], flags).expect("valid").model;
            (models[0].quantize, models[1].quantize)
        };
        assert_eq!(quantised(Flags::default()), (Some(Kind::Q8_0), None));
        assert_eq!(quantised(Flags { quantize: Some(Kind::Q4K), ..Flags::default() }), (Some(Kind::Q4K), None));

        let models = load(toml, &[], Flags { state: Some("t.pth".into()), ..Flags::default() }).expect("valid").model;
        assert_eq!((models[0].state.clone(), models[1].state.clone()), (Some("t.pth".into()), None));
        let poet = InitialState { name: InitialName::parse("poet").expect("a name"), file: "poet.pth".into() };
        assert_eq!(models[1].initial_state, [poet]);
    }

    #[test]
    fn a_wrong_value_is_named() {
        let hash = "0".repeat(64);
        let poets = format!("[[model]]\n{}", "[[model.initial_state]]\nname = 'poet'\nfile = 'x'\n".repeat(2));
        let twice = format!("[[key]]\nname='a'\nhash='{hash}'\ntenant='t'\n").repeat(2);
        for (toml, names) in [
            ("[server]\nport = \"many\"\n", "server.port"),
            ("[server]\nport = 70000\n", "server.port"),
            ("[server]\nprot = 1\n", "prot"),
            ("[sever]\n", "sever"),
            ("[engine]\nseats = 0\n", "engine.seats"),
            ("[engine]\nspeculation = 33\n", "engine.speculation"),
            ("[engine]\nspeculation = \"often\"\n", "engine.speculation"),
            ("[server]\nhost = \"my house\"\n", "server.host"),
            ("[[model]]\nname = \"a\"\n[[model]]\nname = \"a\"\n", "`a`"),
            ("[[model]]\nlora_alpha = 16\n", "lora_alpha"),
            ("[[model]]\n[[model.initial_state]]\nname = \"a b\"\nfile = \"x\"\n", "initial state must be 1 to 128"),
            ("[[model]]\n[[model.initial_state]]\nname = \"\"\nfile = \"x\"\n", "initial state must be 1 to 128"),
            ("[[model]]\n[[model.initial_state]]\nname = \"a\"\n", "file"),
            ("[[model]]\n[[model.initial_state]]\nname = \"a\"\nfile = \"x\"\nfiel = 1\n", "fiel"),
            (&poets, "model.0.initial_state.1"),
            ("[[model]]\nquantize = \"q9_0\"\n", "there is no type `q9_0`"),
            ("[[model]]\nquantise = \"q8_0\"\n", "quantise"),
            ("[[key]]\nname = \"a\"\nhash = \"xyz\"\ntenant = \"t\"\n", "hash"),
            (&twice, "key.1"),
        ] {
            let error = load(toml, &[], Flags::default()).expect_err(toml).to_string();
            assert!(error.contains(names), "{toml}: {error}");
        }
        let error = load("", &[("REWAKE_SERVER__PORT", "x")], Flags::default()).expect_err("x is no port").to_string();
        assert!(error.contains("port"), "{error}");
        assert!(
            Config::load(&Flags { config: Some("/not/there.toml".into()), ..Flags::default() }, std::iter::empty())
                .is_err()
        );
    }
}
