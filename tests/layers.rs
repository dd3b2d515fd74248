//! The layer rules of the architecture page, read off the sources, so that the picture cannot rot.
//!
//! Comments, strings and characters are skipped; the rest is looked at token by token. A rule that a source breaks is
//! one line of the failure, with file and line.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each room, lowest first, and the rooms it may name; `None` is every one before it.
const ROOMS: [(&str, Option<&[&str]>); 15] = [
    ("types", Some(&[])),
    ("telemetry", Some(&[])),
    ("text", Some(&["types", "telemetry"])),
    ("sample", Some(&["types", "telemetry"])),
    ("scheduler", Some(&["types", "telemetry"])),
    ("model", Some(&["types", "telemetry"])),
    ("state", Some(&["types", "telemetry"])),
    ("engine", Some(&["types", "telemetry", "text", "sample", "scheduler", "model"])),
    ("session", None),
    ("api", Some(&["types", "telemetry", "session"])),
    ("config", None),
    ("app", None),
    ("cli", None),
    ("main", Some(&["cli"])),
    ("lib", Some(&[])),
];

/// Crates, by the beginning of their names, and the one room that names them.
const HOMES: [(&str, &str); 2] = [("candle", "model"), ("indicatif", "cli")];

/// Rooms that are pure, and what they do not name: what waits, draws, tells the time or has an order of its own.
const PURE: [&str; 2] = ["scheduler", "sample"];
const IMPURE: [&str; 10] =
    ["tokio", "candle", "rand", "clock", "Instant", "SystemTime", "HashMap", "HashSet", "RandomState", "thread_rng"];

const CLOCK: &str = "telemetry/clock.rs";

/// Kernels (sampling has one), those who drive them, and the memory map.
const UNSAFE: [&str; 5] =
    ["model/kernels/", "model/block.rs", "model/v7.rs", "model/weights/file.rs", "sample/weights.rs"];

/// Words that say nothing of what a thing does.
const EMPTY_WORDS: [&str; 11] = [
    "manager",
    "managers",
    "helper",
    "helpers",
    "util",
    "utils",
    "utility",
    "utilities",
    "service",
    "services",
    "impl",
];

#[test]
fn the_sources_keep_the_rules() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = sources(&root);
    for (room, _) in ROOMS {
        let there = files.iter().any(|(path, _)| room_of(path) == room);
        assert!(there, "there is no source of `{room}`: the rules are read off the wrong place or out of date");
    }
    let tests: BTreeSet<String> = files.iter().flat_map(|(path, text)| test_modules(path, &tokens(text))).collect();
    let broken: Vec<String> = files.iter().flat_map(|(path, text)| check(path, text, is_test(path, &tests))).collect();
    assert!(broken.is_empty(), "{} rules are broken:\n{}", broken.len(), broken.join("\n"));
}

/// Every source below `root`: its path from there, with `/`, and its text.
fn sources(root: &Path) -> Vec<(String, String)> {
    let mut folders = vec![PathBuf::from(root)];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let parts = path.strip_prefix(root).expect("below the root").iter();
                let name: Vec<_> = parts.map(|part| part.to_string_lossy().into_owned()).collect();
                files.push((name.join("/"), fs::read_to_string(&path).expect("a source")));
            }
        }
    }
    files.sort();
    files
}

/// `scheduler` of `scheduler/ring.rs`, `app` of `app.rs`.
fn room_of(path: &str) -> &str {
    path.split('/').next().expect("a path has a first part").trim_end_matches(".rs")
}

/// The module a file is: `[api, sse]` of `api/sse.rs`, nothing of the crate's root.
fn module_of(path: &str) -> Vec<String> {
    let path = path.trim_end_matches(".rs").trim_end_matches("/mod");
    if matches!(path, "lib" | "main") { Vec::new() } else { path.split('/').map(str::to_owned).collect() }
}

#[derive(Clone, Debug, PartialEq)]
struct Token {
    text: String,
    /// From 0.
    line: usize,
}

/// Words, `::` and single signs; no comments, no strings, no characters, no lifetimes.
fn tokens(source: &str) -> Vec<Token> {
    let text: Vec<char> = source.chars().collect();
    let at = |i: usize| text.get(i).copied().unwrap_or('\0');
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut i, mut line, mut found) = (0, 0, Vec::new());
    while i < text.len() {
        let from = i;
        match at(i) {
            '/' if at(i + 1) == '/' => i += text[i..].iter().take_while(|&&c| c != '\n').count(),
            '/' if at(i + 1) == '*' => {
                let mut depth = 0;
                loop {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        _ => i += 1,
                    }
                    if depth == 0 || i >= text.len() {
                        break;
                    }
                }
            }
            '"' => i = after_string(&text, i + 1),
            // A character, else a lifetime or label.
            '\'' if at(i + 1) == '\\' => i += 4 + text[i + 3..].iter().take_while(|&&c| c != '\'').count(),
            '\'' if at(i + 2) == '\'' => i += 3,
            '\'' => i += 1 + text[i + 1..].iter().take_while(|&&c| word(c)).count(),
            c if word(c) => {
                i += text[i..].iter().take_while(|&&c| word(c)).count();
                let name: String = text[from..i].iter().collect();
                let signs = text[i..].iter().take_while(|&&c| c == '#').count();
                if matches!(name.as_str(), "r" | "br" | "cr") && at(i + signs) == '"' {
                    i += signs + 1;
                    let closes = |i: usize| at(i) == '"' && (1..=signs).all(|n| at(i + n) == '#');
                    while i < text.len() && !closes(i) {
                        i += 1;
                    }
                    i += 1 + signs;
                } else {
                    found.push(Token { text: name, line });
                }
            }
            ':' if at(i + 1) == ':' => {
                i += 2;
                found.push(Token { text: "::".into(), line });
            }
            c => {
                i += 1;
                if !c.is_whitespace() {
                    found.push(Token { text: c.into(), line });
                }
            }
        }
        i = i.min(text.len());
        line += text[from..i].iter().filter(|&&c| c == '\n').count();
    }
    found
}

/// Where a string ends whose content begins at `i`.
fn after_string(text: &[char], mut i: usize) -> usize {
    while i < text.len() && text[i] != '"' {
        i += if text[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// Whether the tokens from `i` on are these, separated by spaces.
fn reads(tokens: &[Token], i: usize, what: &str) -> bool {
    what.split(' ').enumerate().all(|(n, text)| tokens.get(i + n).is_some_and(|t| t.text == text))
}

const CFG_TEST: &str = "# [ cfg ( test ) ]";

/// The end of the item after the `#[cfg(test)]` at `i`.
fn after_test_item(tokens: &[Token], i: usize) -> usize {
    let mut depth = 0;
    for (n, token) in tokens.iter().enumerate().skip(i + CFG_TEST.split(' ').count()) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" => depth -= 1,
            "}" if depth == 1 && tokens.get(n + 1).is_none_or(|t| t.text != ";") => return n + 1,
            "}" => depth -= 1,
            ";" if depth == 0 => return n + 1,
            _ => {}
        }
    }
    tokens.len()
}

/// Modules that are compiled for tests only and stand in files of their own, as `api/fixture`.
fn test_modules(path: &str, tokens: &[Token]) -> Vec<String> {
    let folder = module_of(path);
    let length = CFG_TEST.split(' ').count();
    let named = |i: usize| {
        let name = &tokens.get(i + length + 1)?.text;
        (reads(tokens, i, CFG_TEST) && reads(tokens, i + length, "mod") && reads(tokens, i + length + 2, ";"))
            .then(|| folder.iter().chain([name]).cloned().collect::<Vec<_>>().join("/"))
    };
    (0..tokens.len()).filter_map(named).collect()
}

fn is_test(path: &str, tests: &BTreeSet<String>) -> bool {
    let module = module_of(path);
    (1..=module.len()).any(|n| tests.contains(&module[..n].join("/")))
}

/// The rules that one source breaks.
fn check(path: &str, source: &str, is_test: bool) -> Vec<String> {
    let all = tokens(source);
    let mut broken = Vec::new();
    let mut say = |line: usize, what: String| broken.push(format!("src/{path}:{}: {what}", line + 1));
    let room = room_of(path);
    let place = |name: &str| ROOMS.iter().position(|(room, _)| *room == name);
    let Some(own) = place(room) else {
        say(0, format!("`{room}` is no room of the architecture page"));
        return broken;
    };
    for (line, named) in imports(&all, &module_of(path)) {
        let Some(named) = named else {
            say(line, "names the whole crate, so nobody can see which rooms".into());
            continue;
        };
        match place(&named) {
            None => say(line, format!("`crate::{named}` is no room")),
            Some(other) if other == own => {}
            Some(other) if ROOMS[own].1.map_or(other < own, |seen| seen.contains(&named.as_str())) => {}
            Some(_) => say(line, format!("`{room}` does not see `{named}`")),
        }
    }

    let begins = |name: &str, with: &str| name == with || name.starts_with(&format!("{with}_"));
    for (i, token) in all.iter().enumerate() {
        let name = token.text.as_str();
        let before = |n: usize| i.checked_sub(n).map_or("", |i| all[i].text.as_str());
        for (krate, home) in HOMES {
            if begins(name, krate) && room != home {
                say(token.line, format!("only `{home}` names {name}"));
            }
        }
        if PURE.contains(&room) && IMPURE.iter().any(|impure| begins(name, impure)) {
            say(token.line, format!("`{room}` is pure and does not name {name}"));
        }
        let reads_clock = match name {
            "now" => before(1) == "::" && before(2) != "clock",
            "elapsed" => before(1) == "." || before(1) == "::",
            _ => false,
        };
        if reads_clock && path != CLOCK {
            say(token.line, format!("reads the time with `{name}`: only {CLOCK} does"));
        }
        if name == "unsafe" && !UNSAFE.iter().any(|place| path.starts_with(place)) {
            say(token.line, "`unsafe` outside kernels and memory maps".into());
        }
        let promises = ["{", "impl"].iter().any(|next| reads(&all, i + 1, next));
        if name == "unsafe" && promises && !has_safety(source, token.line) {
            say(token.line, "`unsafe` without a SAFETY comment before it".into());
        }
        if matches!(before(1), "struct" | "enum" | "union" | "trait" | "type" | "mod") && says_nothing(name) {
            say(token.line, format!("the name `{name}` says nothing of what it does"));
        }
    }
    if let Some(part) = path.trim_end_matches(".rs").split('/').find(|part| says_nothing(part)) {
        say(0, format!("the name `{part}` says nothing of what is in it"));
    }

    let mut i = if is_test { all.len() } else { 0 };
    while i < all.len() {
        if reads(&all, i, CFG_TEST) {
            i = after_test_item(&all, i);
            continue;
        }
        if reads(&all, i, ". unwrap") || reads(&all, i, ":: unwrap") {
            say(all[i].line, "`unwrap`: say with `expect` why it cannot happen".into());
        }
        i += 1;
    }
    broken
}

/// What is named right below the crate's root, with its line; `None` is the root itself.
fn imports(tokens: &[Token], file: &[String]) -> Vec<(usize, Option<String>)> {
    let text = |i: usize| tokens.get(i).map_or("", |t| t.text.as_str());
    let mut found = Vec::new();
    // Inline modules that are open, by the depth of their braces.
    let (mut depth, mut inline) = (0, Vec::new());
    let mut i = 0;
    while i < tokens.len() {
        match text(i) {
            "{" => {
                depth += 1;
                if i >= 2 && text(i - 2) == "mod" {
                    inline.push(depth);
                }
            }
            "}" => {
                inline.pop_if(|open| *open == depth);
                depth -= 1;
            }
            _ => {}
        }
        let mut up = 0;
        let begins = i == 0 || text(i - 1) != "::" || text(i.saturating_sub(2)) == "self";
        let root = match text(i) {
            // The binary names the library.
            "rewake" if begins => text(i + 1) == "::",
            // `pub(crate)` names nothing.
            "crate" => text(i + 1) != ")",
            "super" if begins => {
                while text(i) == "super" && text(i + 1) == "::" {
                    up += 1;
                    i += 2;
                }
                i -= usize::from(up > 0);
                up > 0 && up == file.len() + inline.len()
            }
            _ => false,
        };
        if root {
            // After `super::super::` this stands on the last `::`, else on the root's name.
            let next = i + if up > 0 { 0 } else { 1 };
            let named = if text(next) == "::" { below_root(tokens, next + 1) } else { vec![(tokens[i].line, None)] };
            found.extend(named);
        }
        i += 1;
    }
    found
}

/// The first names of the path, or group of paths, at `i`.
fn below_root(tokens: &[Token], i: usize) -> Vec<(usize, Option<String>)> {
    let named = |token: &Token| {
        let room = !matches!(token.text.as_str(), "*" | "self" | "super" | "crate");
        (token.line, room.then(|| token.text.clone()))
    };
    if !reads(tokens, i, "{") {
        return tokens.get(i).map(named).into_iter().collect();
    }
    let (mut depth, mut found) = (0, Vec::new());
    for (n, token) in tokens.iter().enumerate().skip(i) {
        match token.text.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ if depth == 1 && matches!(tokens[n - 1].text.as_str(), "{" | ",") => found.push(named(token)),
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    found
}

/// Whether a comment that says SAFETY stands right before the statement that `line` (from 0) is in.
fn has_safety(source: &str, line: usize) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let goes_on = |line: &&&str| {
        let ended = [";", "{", "}", ","].iter().any(|end| line.ends_with(end));
        line.starts_with("#[") || !(ended || line.is_empty() || line.starts_with("//"))
    };
    let before = lines[..line].iter().rev().skip_while(goes_on);
    before.take_while(|line| line.starts_with("//")).any(|line| line.contains("SAFETY:"))
}

/// Whether a name in `CamelCase` or `snake_case` has a word of [`EMPTY_WORDS`].
fn says_nothing(name: &str) -> bool {
    let mut words = String::new();
    for c in name.chars() {
        if c.is_uppercase() {
            words.push('_');
        }
        words.extend(c.to_lowercase());
    }
    words.split('_').any(|word| EMPTY_WORDS.contains(&word))
}

/// What the rules say of a made-up source.
fn verdict(path: &str, source: &str) -> String {
    check(path, source, false).join("\n")
}

#[test]
fn each_rule_can_be_broken() {
    for (path, source, says) in [
        // Imports.
        ("types/a.rs", "use crate::telemetry::clock;", "src/types/a.rs:1: `types` does not see `telemetry`"),
        ("telemetry/a.rs", "use crate::types::Row;", "`telemetry` does not see `types`"),
        ("text/a.rs", "\n\nfn f() { crate::model::load() }", "src/text/a.rs:3: `text` does not see `model`"),
        ("sample/a.rs", "use crate::{types::Sampling, text::Stops};", "`sample` does not see `text`"),
        ("sample/a.rs", "use crate::{types::{A, B}, state};", "`sample` does not see `state`"),
        ("model/mod.rs", "use super::sample::sample;", "`model` does not see `sample`"),
        ("model/weights/mod.rs", "use super::super::{state::Store};", "`model` does not see `state`"),
        ("model/a.rs", "mod b { use super::super::super::state; }", "`model` does not see `state`"),
        ("model/a.rs", "mod b { } use self::super::super::state;", "`model` does not see `state`"),
        ("engine/run.rs", "use crate::state::Archive;", "`engine` does not see `state`"),
        ("engine/run.rs", "use crate::session;", "`engine` does not see `session`"),
        ("state/a.rs", "use crate::engine::Job;", "`state` does not see `engine`"),
        ("session/a.rs", "use crate::api::Error;", "`session` does not see `api`"),
        ("session/a.rs", "use crate::config::Config;", "`session` does not see `config`"),
        ("api/a.rs", "use crate::engine::Job;", "`api` does not see `engine`"),
        ("api/a.rs", "use crate::text::Stops;", "`api` does not see `text`"),
        ("config.rs", "use crate::app::App;", "`config` does not see `app`"),
        ("app.rs", "use crate::cli;", "`app` does not see `cli`"),
        ("main.rs", "fn main() { rewake::app::run() }", "`main` does not see `app`"),
        ("engine/a.rs", "use crate::*;", "names the whole crate"),
        ("engine/a.rs", "use crate as all;", "names the whole crate"),
        ("engine/mod.rs", "use super::*;", "names the whole crate"),
        ("engine/a.rs", "use crate::{self as all};", "names the whole crate"),
        ("engine/a.rs", "use crate::Archive;", "`crate::Archive` is no room"),
        ("helm/a.rs", "", "`helm` is no room"),
        // Crates, purity, clocks.
        ("engine/a.rs", "use candle_core::Tensor;", "only `model` names candle_core"),
        ("api/a.rs", "use indicatif::ProgressBar;", "only `cli` names indicatif"),
        ("scheduler/a.rs", "use std::collections::HashMap;", "`scheduler` is pure and does not name HashMap"),
        ("scheduler/a.rs", "tokio::spawn(f)", "does not name tokio"),
        ("sample/a.rs", "use rand::Rng;", "does not name rand"),
        ("sample/a.rs", "use rand_chacha::ChaCha8Rng;", "does not name rand_chacha"),
        ("sample/a.rs", "use candle_core::Tensor;", "`sample` is pure and does not name candle_core"),
        ("scheduler/a.rs", "use crate::telemetry::clock;", "does not name clock"),
        ("scheduler/a.rs", "since: std::time::Instant", "does not name Instant"),
        ("engine/a.rs", "let t = Instant::now();", "reads the time with `now`"),
        ("telemetry/log.rs", "let t = std::time::SystemTime::now();", "reads the time with `now`"),
        ("api/a.rs", "std::iter::repeat_with(Instant::now)", "reads the time with `now`"),
        ("api/a.rs", "began.elapsed()", "reads the time with `elapsed`"),
        // Unsafe.
        ("state/a.rs", "// SAFETY: it is.\nunsafe { f() }", "`unsafe` outside kernels"),
        ("model/pool.rs", "unsafe fn f() {}", "`unsafe` outside kernels"),
        ("model/kernels/a.rs", "let x = 1;\nunsafe { f() }", "src/model/kernels/a.rs:2: `unsafe` without a SAFETY"),
        ("model/v7.rs", "// SAFETY: it is.\nlet a = 1;\nlet b = unsafe { f() };", "v7.rs:3: `unsafe` without a SAFETY"),
        ("model/block.rs", "// It is safe.\nunsafe impl Send for A {}", "`unsafe` without a SAFETY"),
        ("model/block.rs", "let it = \"SAFETY: no\";\nunsafe { f() }", "`unsafe` without a SAFETY"),
        // Unwrap and names.
        ("api/a.rs", "let x = y\n    .unwrap();", "src/api/a.rs:2: `unwrap`"),
        ("api/a.rs", "xs.map(Option::unwrap)", "`unwrap`"),
        ("api/a.rs", "#[cfg(test)]\nuse a::{b};\nfn f() { x.unwrap(); }", "src/api/a.rs:3: `unwrap`"),
        ("api/a.rs", "#[cfg(test)]\nmod tests { fn g() {} }\nfn f() { x.unwrap(); }", "src/api/a.rs:3: `unwrap`"),
        ("api/a.rs", "#[cfg(not(test))]\nmod tests { fn g() { x.unwrap() } }", "`unwrap`"),
        ("api/utils.rs", "", "the name `utils` says nothing"),
        ("api/impl/a.rs", "", "the name `impl` says nothing"),
        ("api/a.rs", "struct StateManager;", "the name `StateManager` says nothing"),
        ("api/a.rs", "pub trait TokenService<T> {}", "the name `TokenService` says nothing"),
        ("api/a.rs", "mod path_helpers { }", "the name `path_helpers` says nothing"),
        // Text that is not code does not hide code.
        ("api/a.rs", "let quote = '\"'; x.unwrap(); let other = '\"';", "`unwrap`"),
        ("api/a.rs", "let quote = b'\\''; x.unwrap(); // '", "`unwrap`"),
        ("api/a.rs", "let it = r#\"a\"b\"#; x.unwrap();", "`unwrap`"),
        ("api/a.rs", "let it = \"\\\\\"; x.unwrap(); \"\"", "`unwrap`"),
        ("api/a.rs", "fn f<'a>(x: &'a A) { x.unwrap(); } 'a'", "`unwrap`"),
        ("api/a.rs", "/* /* */ x.unwrap() */ y.unwrap()", "`unwrap`"),
    ] {
        let verdict = verdict(path, source);
        assert!(verdict.contains(says), "{path}: {source}\nshould say: {says}\nsays: {verdict}");
    }
}

#[test]
fn what_keeps_the_rules_is_left_alone() {
    for (path, source) in [
        ("model/a.rs", "use crate::types::Row; use candle_core::Tensor; use super::kernels; use super::super::types;"),
        ("engine/backend.rs", "use crate::model::{self, Model}; use crate::{text, types::{state, Row}};"),
        ("session/a.rs", "use crate::{engine, state::Archive}; pub(crate) fn f() {} pub(super) fn g() {}"),
        ("session/a.rs", "mod tests { use super::*; mod deeper { use super::super::*; } } use super::Turn;"),
        ("scheduler/a.rs", "//! No HashMap, no tokio.\nlet operand = brand; // Instant::now() in crate::state"),
        ("api/a.rs", "let began = clock::now(); let s = \"crate::engine unsafe x.unwrap() Instant::now()\";"),
        ("api/a.rs", "let s = r##\"\"# x.unwrap() \"##; let c = 'x'; x.unwrap_or_default(); let r#type = 1;"),
        ("api/a.rs", "struct Simple; enum Implied {} trait Utilised {} const SERVICE_TIER: u8 = 1; impl Simple {}"),
        ("telemetry/clock.rs", "let t = Instant::now(); t.elapsed()"),
        ("cli/serve.rs", "template(\"{elapsed}\"); use indicatif::ProgressBar;"),
        ("model/kernels/a.rs", "// SAFETY: because\n// of this.\n#[allow(x)]\nunsafe impl Send for A {}"),
        ("model/kernels/a.rs", "{\n    // SAFETY: it is.\n    let x: Long =\n        unsafe { f() };\n}"),
        ("api/a.rs", "#[cfg(test)]\n#[allow(x)]\nmod tests { fn f() { { x.unwrap() } } }\n"),
        ("api/a.rs", "#[cfg(test)]\nuse a::{b, c};\n#[cfg(test)]\nmod tests { fn f() { x.unwrap() } }"),
        ("main.rs", "fn main() { rewake::cli::main() }"),
        ("lib.rs", "pub mod api; pub mod app;"),
    ] {
        assert_eq!(verdict(path, source), "", "{path}: {source}");
    }
}

#[test]
fn files_of_tests_are_known_by_their_declaration() {
    let declared = test_modules("api/mod.rs", &tokens("#[cfg(test)]\nmod fixture;\nmod other;"));
    assert_eq!(declared, ["api/fixture"]);
    let tests = BTreeSet::from_iter(declared);
    for (path, test) in
        [("api/fixture.rs", true), ("api/fixture/a.rs", true), ("api/other.rs", false), ("api.rs", false)]
    {
        assert_eq!(is_test(path, &tests), test, "{path}");
    }
    assert_eq!(check("api/fixture.rs", "x.unwrap()", true), Vec::<String>::new());
    // Every other rule holds in tests too.
    assert_eq!(check("api/fixture.rs", "use crate::engine;", true).len(), 1);
}
