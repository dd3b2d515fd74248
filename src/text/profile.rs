//! How a model wants its conversations written, and what ends its answers: per-model data.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value, context};
use serde::{Deserialize, Serialize};

use super::Error;
use crate::types::{Message, Role, Sampling};

/// The built-in profiles, by name.
const BUILT_IN: [(&str, &str); 4] = [
    ("stories", include_str!("../../assets/profiles/stories.json")),
    ("world", include_str!("../../assets/profiles/world.json")),
    ("g1", include_str!("../../assets/profiles/g1.json")),
    ("pile", include_str!("../../assets/profiles/pile.json")),
];

/// A model's chat templates, stop rules and sampling defaults.
///
/// The templates are Jinja (`minijinja`); an unknown variable is an error, and nothing is escaped or trimmed. A message
/// is a head and a body, which are tokenised apart, so that a token never spans the border between what the server
/// wrote and what somebody said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    pub name: String,
    /// What stands before a message's content. Variables: `role` (`system`, `user`, `assistant`, `tool`), `name` (none
    /// if the message has none) and `first` (no text stands before it).
    pub head: String,
    /// The content as it is written. Variables: `content`, `role`.
    pub body: String,
    /// What stands before an answer. Variable: `first`. For a transcript to read like the conversation it records, it
    /// must be the head of an assistant's message.
    pub prompt: String,
    /// Strings that end a chat answer.
    #[serde(default)]
    pub stop: Vec<String>,
    /// Token ids that end a response.
    #[serde(default)]
    pub stop_tokens: Vec<u32>,
    /// Whether token 0 stands before a prompt that begins a sequence.
    #[serde(default)]
    pub bos: bool,
    /// Whether text is cleaned as in BlinkDL's templates: CRLF becomes LF, blank lines are taken out, white space is
    /// stripped at both ends. An assistant's text keeps its blank lines.
    #[serde(default)]
    pub clean: bool,
    /// Sampling parameters of requests that do not give their own.
    #[serde(default)]
    pub sampling: SamplingDefaults,
}

/// Sampling parameters a profile sets; what it leaves out stays as OpenAI has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingDefaults {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<usize>,
    pub min_p: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub penalty_decay: Option<f32>,
}

impl SamplingDefaults {
    /// Complete sampling parameters.
    pub fn sampling(&self) -> Sampling {
        let usual = Sampling::default();
        Sampling {
            temperature: self.temperature.unwrap_or(usual.temperature),
            top_p: self.top_p.unwrap_or(usual.top_p),
            top_k: self.top_k.unwrap_or(usual.top_k),
            min_p: self.min_p.unwrap_or(usual.min_p),
            presence_penalty: self.presence_penalty.unwrap_or(usual.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(usual.frequency_penalty),
            repetition_penalty: self.repetition_penalty.unwrap_or(usual.repetition_penalty),
            penalty_decay: self.penalty_decay.unwrap_or(usual.penalty_decay),
            ..usual
        }
    }

    /// The ranges the OpenAI routes allow.
    fn check(&self) -> Result<(), String> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 2.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE, f32::MAX),
            ("penalty_decay", self.penalty_decay, 0.0, 1.0),
        ];
        for (name, value, low, high) in ranges {
            if let Some(value) = value
                && !(low..=high).contains(&value)
            {
                return Err(format!("sampling.{name} is {value}, not in {low}..={high}"));
            }
        }
        Ok(())
    }
}

/// The built-in profile of this name.
pub fn builtin(name: &str) -> Option<Profile> {
    let (_, json) = BUILT_IN.iter().find(|(known, _)| *known == name)?;
    Some(serde_json::from_str(json).expect("built-in profiles are tested"))
}

/// The names of the built-in profiles.
pub fn builtin_names() -> impl Iterator<Item = &'static str> {
    BUILT_IN.iter().map(|(name, _)| *name)
}

impl Profile {
    /// Writes a conversation, or the next part of one, as pieces to be tokenised one by one; none is empty.
    ///
    /// `continues`: earlier text stands before it. `generate`: an answer is to follow. The pieces of a conversation do
    /// not depend on the parts in which it is rendered.
    pub fn render(&self, messages: &[Message], continues: bool, generate: bool) -> Result<Vec<String>, Error> {
        let mut pieces = Vec::with_capacity(2 * messages.len() + 1);
        for (index, message) in messages.iter().enumerate() {
            let role = role_name(message.role);
            let first = !continues && index == 0;
            pieces.push(self.write(
                "head",
                &self.head,
                context! { role, name => message.name.as_deref(), first },
                0,
            )?);
            let content = self.cleaned(message);
            let size = content.len();
            pieces.push(self.write("body", &self.body, context! { role, content => content }, size)?);
        }
        if generate {
            let first = !continues && messages.is_empty();
            pieces.push(self.write("prompt", &self.prompt, context! { first }, 0)?);
        }
        pieces.retain(|piece| !piece.is_empty());
        Ok(pieces)
    }

    /// Whether the profile can be used: templates work for every role, stop strings and sampling make sense.
    pub fn check(&self) -> Result<(), Error> {
        const CONTENT: &str = "content";
        for role in [Role::System, Role::User, Role::Assistant, Role::Tool] {
            for (name, continues) in [(None, false), (Some("name"), true)] {
                let message = Message { role, content: CONTENT.into(), name: name.map(String::from) };
                let pieces = self.render(&[message], continues, true)?;
                if !pieces.iter().any(|piece| piece.contains(CONTENT)) {
                    return Err(self.error(format!("body leaves out the content of a {} message", role_name(role))));
                }
            }
        }
        self.render(&[], false, true)?;
        if self.stop.iter().any(String::is_empty) {
            return Err(self.error("a stop string is empty".into()));
        }
        self.sampling.check().map_err(|reason| self.error(reason))
    }

    /// Renders one template, with work and memory bounded by the size of what it is given.
    fn write(&self, part: &str, template: &str, values: Value, size: usize) -> Result<String, Error> {
        // Fuel: about one for each instruction and for each 64 bytes written.
        const FUEL: u64 = 10_000;
        let mut jinja = Environment::new();
        jinja.set_fuel(Some(FUEL + size as u64));
        jinja.set_undefined_behavior(UndefinedBehavior::Strict);
        jinja.set_syntax(literal_syntax());
        jinja.render_named_str(part, template, values).map_err(|error| self.error(error.to_string()))
    }

    fn cleaned(&self, message: &Message) -> String {
        let text = &message.content;
        match (self.clean, message.role) {
            (false, _) => text.clone(),
            (true, Role::Assistant) => text.trim().to_string(),
            (true, _) => {
                let text = text.trim().replace("\r\n", "\n");
                let mut cleaned = String::with_capacity(text.len());
                for character in text.chars() {
                    if character != '\n' || !cleaned.ends_with('\n') {
                        cleaned.push(character);
                    }
                }
                cleaned
            }
        }
    }

    fn error(&self, reason: String) -> Error {
        Error::Profile { profile: self.name.clone(), reason }
    }
}

/// Jinja, except that the template's last newline counts.
fn literal_syntax() -> SyntaxConfig {
    SyntaxConfig::builder().keep_trailing_newline(true).build().expect("the default delimiters are valid")
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(role: Role, content: &str) -> Message {
        Message { role, content: content.into(), name: None }
    }

    #[test]
    fn built_in_profiles_are_sound() {
        for name in builtin_names() {
            let profile = builtin(name).expect("it is listed");
            assert_eq!(profile.name, name);
            profile.check().expect("sound");
            assert_eq!(profile.stop_tokens, [0]);
            for continues in [false, true] {
                let prompt = profile.render(&[], continues, true).expect("sound");
                let history = profile.render(&[message(Role::Assistant, "")], continues, false).expect("sound");
                assert_eq!(prompt, history, "a transcript must read like the conversation");
            }
        }
        assert_eq!(builtin("nobody"), None);
    }

    #[test]
    fn conversations_are_written_as_the_models_know_them() {
        let conversation = [
            message(Role::System, "Be brief."),
            message(Role::User, " Hi\r\n\r\n\nthere "),
            message(Role::Assistant, " Hello!\n\nWell? "),
            message(Role::User, "Bye"),
        ];
        let world = [
            "System:",
            " Be brief.",
            "\n\nUser:",
            " Hi\nthere",
            "\n\nAssistant:",
            " Hello!\n\nWell?",
            "\n\nUser:",
            " Bye",
            "\n\nAssistant:",
        ];
        for name in ["world", "stories", "g1"] {
            let profile = builtin(name).expect("built in");
            assert_eq!(profile.render(&conversation, false, true).expect("sound"), world);
            let user = [message(Role::User, "Hi")];
            assert_eq!(profile.render(&user, false, true).expect("sound"), ["User:", " Hi", "\n\nAssistant:"]);
            assert_eq!(profile.render(&user, true, true).expect("sound"), ["\n\nUser:", " Hi", "\n\nAssistant:"]);
        }
        let tool = [message(Role::Tool, "{}")];
        let g1 = builtin("g1").expect("built in").render(&tool, false, false).expect("sound");
        assert_eq!(g1, ["User:", " Function output:\n{}"]);
        let pile = builtin("pile").expect("built in").render(&conversation, false, true).expect("sound");
        assert_eq!(pile.concat(), "Be brief.\n\nBob: Hi\nthere\n\nAlice: Hello!\n\nWell?\n\nBob: Bye\n\nAlice:");
    }

    #[test]
    fn sampling_defaults_are_openais_unless_set() {
        let stories = builtin("stories").expect("built in").sampling.sampling();
        assert_eq!(stories, Sampling { temperature: 0.7, top_p: 0.9, ..Sampling::default() });
        assert_eq!(builtin("world").expect("built in").sampling.sampling(), Sampling::default());
    }

    #[test]
    fn bad_profiles_are_refused() {
        let sound = builtin("world").expect("built in");
        let with = |change: &dyn Fn(&mut Profile)| {
            let mut profile = sound.clone();
            change(&mut profile);
            profile.check().expect_err("must be refused").to_string()
        };
        assert!(with(&|p| p.head = "{% if %}".into()).contains("profile `world`: "));
        assert!(with(&|p| p.head = "{{ rolle }}".into()).contains("undefined"));
        assert!(with(&|p| p.body = "{{ role }}".into()).contains("leaves out"));
        assert!(with(&|p| p.prompt = "{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}".into())
            .contains("fuel"));
        assert!(with(&|p| p.prompt = "{{ 'x' * 1000000000 }}".into()).contains("fuel"));
        assert!(with(&|p| p.stop.push(String::new())).contains("stop"));
        assert!(with(&|p| p.sampling.temperature = Some(f32::NAN)).contains("temperature"));
        assert!(with(&|p| p.sampling.top_p = Some(1.5)).contains("top_p"));
        let json = r#"{"name": "x", "head": "", "body": "{{ content }}", "prompt": "", "stops": []}"#;
        assert!(serde_json::from_str::<Profile>(json).is_err_and(|e| e.to_string().contains("stops")));
    }

    #[test]
    fn templates_are_literal() {
        let mut profile = builtin("world").expect("built in");
        profile.head = "<{{ name or role }}>\n".into();
        profile.body = "{{ content }}\n".into();
        profile.prompt = "\n".into();
        profile.clean = false;
        let named = Message { name: Some("Ann".into()), ..message(Role::User, "<b> {{ x }}\r\n\r\n") };
        let pieces = profile.render(&[named, message(Role::Tool, "1")], true, true).expect("sound");
        assert_eq!(pieces, ["<Ann>\n", "<b> {{ x }}\r\n\r\n\n", "<tool>\n", "1\n", "\n"]);
        let long = message(Role::User, &"é ".repeat(1_000_000));
        assert_eq!(profile.render(&[long], true, false).expect("long text is no reason to fail")[1].len(), 3_000_001);
    }

    proptest! {
        #[test]
        fn rendering_in_parts_changes_nothing(
            messages in prop::collection::vec(
                (prop::sample::select(vec![Role::System, Role::User, Role::Assistant, Role::Tool]), "[ab \r\n{]{0,8}"),
                1..6,
            ),
            cut in any::<prop::sample::Index>(),
        ) {
            let messages: Vec<Message> = messages.into_iter().map(|(role, text)| message(role, &text)).collect();
            let (early, late) = messages.split_at(1 + cut.index(messages.len()));
            for profile in builtin_names().filter_map(builtin) {
                let mut parts = profile.render(early, false, false).expect("sound");
                parts.extend(profile.render(late, true, true).expect("sound"));
                let whole = profile.render(&messages, false, true).expect("sound");
                prop_assert!(whole.iter().all(|piece| !piece.is_empty()));
                prop_assert_eq!(parts, whole);
            }
        }

        #[test]
        fn cleaning_is_what_the_reference_does(text in "[a \r\n\t]{0,16}") {
            let profile = builtin("g1").expect("built in");
            let mut expected = text.replace("\r\n", "\n");
            while expected.contains("\n\n") {
                expected = expected.replace("\n\n", "\n");
            }
            prop_assert_eq!(profile.cleaned(&message(Role::User, &text)), expected.trim());
        }
    }
}
