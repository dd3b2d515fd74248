//! What a configuration can get wrong though every value is of its type.

use std::collections::BTreeSet;

use super::{Config, Drafts, Engine, Error, InitialState, Model, States};

/// A hundred years: sums of times cannot overflow.
const LONGEST_S: u64 = 100 * 365 * 24 * 3600;

impl Config {
    /// Refuses values that cannot work, or not together.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.check_sizes()?;
        self.check_times()?;
        if self.server.host.parse::<std::net::IpAddr>().is_err() && self.server.host != "localhost" {
            let why = format!("is `{}`, and must be an address such as 127.0.0.1 or ::", self.server.host);
            return wrong("server.host", &why);
        }
        self.states.check()?;
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
        if self.prefix_cache.disk_bytes > 0 && self.states.dir == ":memory:" {
            let why = "is for states that are kept in `states.dir`, and that is `:memory:`";
            return wrong("prefix_cache.disk_bytes", why);
        }
        let mut names = BTreeSet::new();
        self.model.iter().enumerate().try_for_each(|(n, model)| model.check(n, &mut names))
    }

    fn check_sizes(&self) -> Result<(), Error> {
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
        Ok(())
    }

    fn check_times(&self) -> Result<(), Error> {
        for (key, seconds) in [
            ("server.drain_s", self.server.drain_s),
            ("states.default_ttl_s", self.states.default_ttl_s),
            ("states.grace_s", self.states.grace_s),
            ("streams.resume_window_s", self.streams.resume_window_s),
        ] {
            if seconds > LONGEST_S {
                return wrong(key, &format!("is {seconds}, and must be at most {LONGEST_S}, which is a hundred years"));
            }
        }
        Ok(())
    }
}

impl States {
    fn check(&self) -> Result<(), Error> {
        let Self { url, endpoint, dir, disk_bytes, .. } = self;
        if !url.is_empty() && !["s3://", "gs://", "az://"].iter().any(|scheme| url.starts_with(scheme)) {
            return wrong("states.url", &format!("is `{url}`, and must begin with s3://, gs:// or az://"));
        }
        if !endpoint.is_empty() && !url.starts_with("s3://") {
            return wrong("states.endpoint", "is the address of a server for s3://, and `states.url` is not");
        }
        if *disk_bytes > 0 && (url.is_empty() || dir == ":memory:") {
            return wrong("states.disk_bytes", "is for states that are in a bucket, and needs `states.dir`");
        }
        Ok(())
    }
}

impl Model {
    /// Checks the `n`th model; `names` are those of the models before it.
    fn check(&self, n: usize, names: &mut BTreeSet<String>) -> Result<(), Error> {
        for name in std::iter::once(self.served_name()).chain(self.aliases.iter().cloned()) {
            if name.is_empty() || name.chars().any(char::is_whitespace) {
                return wrong(&format!("model.{n}"), &format!("has the name `{name}`; names are words"));
            }
            if !names.insert(name.clone()) {
                return wrong(&format!("model.{n}"), &format!("has the name `{name}`, which another model has"));
            }
        }
        if self.lora.is_none() && self.lora_alpha.is_some() {
            return wrong(&format!("model.{n}.lora_alpha"), "is the alpha of an adapter, and `lora` names none");
        }
        for (i, InitialState { name, .. }) in self.initial_state.iter().enumerate() {
            if self.initial_state[..i].iter().any(|other| other.name == *name) {
                let why = format!("has the name `{name}`, which another initial state of this model has");
                return wrong(&format!("model.{n}.initial_state.{i}"), &why);
            }
        }
        Ok(())
    }
}

fn wrong(key: &str, why: &str) -> Result<(), Error> {
    Err(Error::Value { key: key.into(), why: why.into() })
}
