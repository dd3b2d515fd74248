//! The commands beside `serve`, as a user meets them: the built binary, its files, what it prints, how it ends.

#[path = "cli/convert.rs"]
mod convert;
#[path = "cli/eval.rs"]
mod eval;
#[path = "cli/inspect.rs"]
mod inspect;
#[path = "cli/logits.rs"]
mod logits;
#[allow(dead_code)] // Other test programs use the rest of it.
#[path = "support/vectors.rs"]
mod vectors;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use vectors::{Case, case};

/// What a command printed and how it ended.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn of(command: &mut Command) -> Self {
        let Output { status, stdout, stderr } = command.output().expect("the binary");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        let ran = Self { code: status.code(), out: text(stdout), err: text(stderr) };
        assert!(!ran.err.contains("panicked"), "{ran:?}");
        ran
    }

    /// What it printed; it succeeded and had nothing to complain about.
    fn ok(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{self:?}");
        self.out
    }

    /// The one line of complaint; it failed and printed nothing else.
    fn error(self) -> String {
        assert_eq!((self.code, self.out.as_str()), (Some(1), ""), "{self:?}");
        let line = self.err.strip_prefix("rewake: ").and_then(|e| e.strip_suffix('\n'));
        let line = line.unwrap_or_else(|| panic!("{self:?}"));
        assert!(!line.contains('\n'), "one line: {line}");
        line.to_owned()
    }
}

/// The command line, with a panic's backtrace wanted, so that there would be one to see.
fn command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rewake"));
    command.args(args).env("RUST_BACKTRACE", "1").stdin(Stdio::null());
    command
}

fn rewake<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    Ran::of(&mut command(args))
}

/// Arguments of several kinds in one list.
macro_rules! run {
    ($($arg:expr),* $(,)?) => {
        $crate::rewake([$(std::ffi::OsStr::new(&$arg)),*])
    };
}
use run;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A file of the tests' data.
fn data(name: &str) -> PathBuf {
    root().join("tests/data").join(name)
}

/// All cases that the repository carries.
fn carried() -> Vec<Case> {
    let entries = std::fs::read_dir(root().join("tests/data")).expect("the folder");
    let folders = entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.join("case.json").exists());
    let mut names: Vec<_> =
        folders.map(|path| path.file_name().expect("a name").to_string_lossy().into_owned()).collect();
    names.sort();
    assert!(names.len() >= 18, "{names:?}");
    names.iter().map(|name| case(name)).collect()
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// Names of all that is in a folder.
fn listing(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn every_command_explains_itself() {
    for (name, words) in [
        (
            "inspect",
            &["[FILE]", "--tokenizer", "--state", "--lora", "--lora-alpha", "--json", "--tensors", "type and shape"],
        ),
        (
            "logits",
            &[
                "[FILE]",
                "--tokens",
                "--text",
                "--chunk",
                "--out",
                "case.json".trim_end_matches("case.json"),
                "1,2,3",
                "Example",
            ],
        ),
        (
            "convert",
            &["<IN>", "<OUT>", "--type", "--lora", "--tokenizer", ".pth, .safetensors, or .gguf", "q4_k", "Examples"],
        ),
        ("eval", &["[FILE]", "--text", "--lambada", "--limit", "--json", "perplexity", "whose last word", "Examples"]),
        ("bench", &["[FILE]", "--prompt", "--tokens", "--streams", "--runs", "--threads", "--json", "median"]),
    ] {
        let help = run!(name, "--help").ok();
        // Lines are wrapped at the width of the terminal.
        let flat = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for word in words {
            assert!(flat.contains(word), "{name} --help does not say `{word}`:\n{help}");
        }
        assert!(run!("--help").ok().contains(&format!("\n  {name} ")));
        // A wrong call is told apart from a failure.
        let wrong = run!(name, "--nonsense");
        assert_eq!((wrong.code, wrong.out.as_str()), (Some(2), ""));
        assert!(wrong.err.contains("--nonsense"), "{}", wrong.err);
    }
    for (args, said) in [
        (&["eval"][..], "<--text <FILE>|--lambada <FILE>>"),
        (&["eval", "--text", "a", "--lambada", "b"], "cannot be used with"),
        (&["logits", "--out", "x"], "<--tokens <IDS|FILE>|--text <TEXT>>"),
        (&["logits", "--tokens", "1"], "--out <FILE>"),
        (&["logits", "--tokens", "1", "--out", "x", "--chunk", "0"], "0 is not in 1.."),
        (&["logits", "--tokens", "1", "--out", "x", "--chunk", "4097"], "4097 is not in 1.."),
        (&["convert", "a", "b.gguf", "--type", "q9"], "there are f32, f16, bf16, q8_0"),
        (&["inspect", "--lora-alpha", "1"], "--lora <FILE>"),
    ] {
        let wrong = rewake(args);
        assert!(wrong.code == Some(2) && wrong.err.contains(said), "{args:?}: {}", wrong.err);
    }
}
