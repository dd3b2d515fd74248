//! From the file, the environment and the command line to a configuration.

use std::path::PathBuf;

use super::{Config, Model, ProfileChoice};
use crate::model::Kind;
use crate::types::readable;

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
}

#[cfg(test)]
mod tests {
    use super::super::{Drafts, InitialState};
    use super::*;
    use crate::types::InitialName;

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
        let documented = load(include_str!("../../config/rewake.toml"), &[], Flags::default()).expect("it is valid");
        let defaults = Config::load(&Flags::default(), std::iter::empty()).expect("defaults are valid");
        assert_eq!(documented, defaults);
        // And it names every key there is: each is set in it, not only left at its default.
        let given: serde_json::Value = config::Config::builder()
            .add_source(config::File::from_str(include_str!("../../config/rewake.toml"), config::FileFormat::Toml))
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
        let cluster = load(include_str!("../../config/cluster.toml"), &[], Flags::default()).expect("it is valid");
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
    fn what_can_be_one_of_several_says_which() {
        for (toml, said) in [
            ("[states]\nprecision = \"f8\"", "a precision is f32, f16 or int8, not `f8`"),
            ("[engine]\nspeculation = \"x\"", "expected true, false, or the most tokens of a draft"),
            ("[[model]]\nprofile = 5", "expected the name of a profile, or a table with all of one"),
        ] {
            let error = load(toml, &[], Flags::default()).expect_err(toml).to_string();
            assert!(error.contains(said), "{error}");
        }
        let loaded = load("[states]\nprecision = \"int8\"", &[], Flags::default()).expect("valid");
        assert_eq!(loaded.states.precision, crate::state::Precision::Int8);
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
            ("[states]\ngrace_s = 9223372036854775807\n", "states.grace_s"),
            ("[streams]\nresume_window_s = 9223372036854775807\n", "streams.resume_window_s"),
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
