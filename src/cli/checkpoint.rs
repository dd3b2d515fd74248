//! Which checkpoint a command is about, how it is opened, and files that appear whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use crate::app::{self, Opened};
use crate::config;
use crate::model::{Checkpoint, Kind};
use crate::text::Tokenizer;

/// A checkpoint and what is added to it.
#[derive(Debug, Default, clap::Args)]
pub struct Which {
    /// Checkpoint file or folder, of any format that `serve` takes [default: the embedded demonstration model]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// `world`, `bytes`, a tokenizer.json or a vocabulary file [default: what the checkpoint says]
    #[arg(long, value_name = "NAME|FILE")]
    tokenizer: Option<String>,
    /// State-tuned file that every text begins from
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Type that the large matrices get as they are loaded, as `convert --type` would make them [default: as they are]
    #[arg(long, value_name = "TYPE", value_parser = config::parse_kind)]
    quantize: Option<Kind>,
    /// LoRA adapter to merge
    #[arg(long, value_name = "FILE")]
    lora: Option<PathBuf>,
    /// The alpha that adapter was trained with [default: as the adapter_config.json beside it says]
    #[arg(long, value_name = "A", requires = "lora")]
    lora_alpha: Option<f32>,
}

impl Which {
    /// A checkpoint as it is stored.
    pub fn of(file: &Path) -> Self {
        Self { file: Some(file.to_owned()), ..Self::default() }
    }

    /// The same as a model of the configuration.
    pub fn config(&self) -> config::Model {
        config::Model {
            file: self.file.clone(),
            tokenizer: self.tokenizer.clone(),
            state: self.state.clone(),
            lora: self.lora.clone(),
            lora_alpha: self.lora_alpha,
            quantize: self.quantize,
            ..config::Model::default()
        }
    }

    /// Loads the model, with a bar.
    pub fn open(&self) -> anyhow::Result<Opened> {
        let bar = progress("loading", "bytes");
        let opened = app::open(&self.config(), &|done, all| show(&bar, done, all));
        bar.finish_and_clear();
        opened
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self, opened: &Opened) -> anyhow::Result<Arc<dyn Tokenizer>> {
        app::tokenizer(&self.config(), &opened.checkpoint).context("the tokenizer")
    }

    /// Whether somebody said which tokenizer it is, rather than leaving it to the checkpoint.
    pub fn names_tokenizer(&self) -> bool {
        self.tokenizer.is_some()
    }
}

/// A bar on a terminal, nothing elsewhere.
pub fn progress(doing: &str, unit: &str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let count = match unit {
        "bytes" => "{bytes}/{total_bytes}".into(),
        unit => format!("{{pos}}/{{len}} {unit}"),
    };
    let template = format!("{doing} {{msg}} {{bar:40}} {count} {{elapsed}}");
    ProgressBar::new(1)
        .with_style(ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Shows that `done` of `all` is done.
pub fn show(bar: &ProgressBar, done: usize, all: usize) {
    bar.set_length(all as u64);
    bar.set_position(done as u64);
}

/// A file that a command writes, and which has its name only when it is complete: a kill leaves nothing under it. Until
/// then it is called `NAME.….part`.
pub struct Target {
    /// As it was given.
    shown: PathBuf,
    /// Links followed: what they lead to is written, and they stay.
    path: PathBuf,
}

impl Target {
    /// A place for a result of `inputs`.
    ///
    /// # Errors
    /// When it is one of them, or there and no regular file: a device would be replaced, not written to.
    pub fn new(path: &Path, inputs: &[PathBuf]) -> anyhow::Result<Self> {
        let cannot = || format!("cannot write {}", path.display());
        let shown = path.to_owned();
        if fs::symlink_metadata(path).is_err() {
            return Ok(Self { path: shown.clone(), shown });
        }
        let path = path.canonicalize().with_context(cannot)?;
        let metadata = fs::metadata(&path).with_context(cannot)?;
        ensure!(!metadata.is_dir(), "{}: it is a directory", cannot());
        ensure!(metadata.is_file(), "{}: it is no regular file", cannot());
        let own = inputs.iter().any(|input| input.canonicalize().is_ok_and(|input| input == path));
        ensure!(!own, "{} is what is read; write to another name", shown.display());
        Ok(Self { shown, path })
    }

    /// Writes it.
    ///
    /// # Errors
    /// Those of `write` as they are; what the disk says, with the path.
    pub fn write(self, write: impl FnOnce(&mut BufWriter<File>) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let Self { shown, path } = self;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let cannot = || format!("cannot write {}", shown.display());
        ensure!(folder.is_dir(), "{}: there is no folder {}", cannot(), folder.display());
        let prefix = path.file_name().map(|name| format!("{}.", name.to_string_lossy())).unwrap_or_default();
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".part");
        #[cfg(unix)]
        // As any new file: readable by whom the user's umask says.
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let (file, part) = builder.tempfile_in(folder).map_err(without_path).with_context(cannot)?.into_parts();
        let mut file = BufWriter::with_capacity(1 << 20, file);
        write(&mut file).map_err(|e| if e.is::<io::Error>() { e.context(cannot()) } else { e })?;
        let file = file.into_inner().map_err(io::IntoInnerError::into_error).with_context(cannot)?;
        file.sync_all().with_context(cannot)?;
        part.persist(&path).map_err(|e| e.error).with_context(cannot)?;
        // The name is durable when the folder is.
        File::open(folder).and_then(|folder| folder.sync_all()).with_context(cannot)
    }
}

/// What the system said, without the path of a temporary file, which is nobody's business.
fn without_path(error: io::Error) -> io::Error {
    let cause = error.get_ref().and_then(|error| error.source()?.downcast_ref::<io::Error>()?.raw_os_error());
    cause.map_or(error, io::Error::from_raw_os_error)
}

/// The files that a model is read from.
pub fn inputs(model: &config::Model, checkpoint: &Checkpoint) -> Vec<PathBuf> {
    let tokenizer = model.tokenizer.as_ref().map(PathBuf::from);
    let named = [&model.file, &model.lora, &model.state, &tokenizer].into_iter().flatten().cloned();
    checkpoint.files().map(Path::to_owned).chain(named).collect()
}

/// All of a file that a command was told to read; a device would never end.
///
/// # Errors
/// When it is no regular file, or has more than [`LARGEST`] bytes.
pub fn read_file(path: &Path) -> anyhow::Result<Vec<u8>> {
    let cannot = || format!("cannot read {}", path.display());
    let metadata = fs::metadata(path).with_context(cannot)?;
    ensure!(metadata.is_file(), "{}: it is no regular file", cannot());
    ensure!(metadata.len() <= LARGEST, "{}: it has more than {LARGEST} bytes", cannot());
    fs::read(path).with_context(cannot)
}

/// The same as text.
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    String::from_utf8(read_file(path)?).with_context(|| format!("cannot read {}: it is not UTF-8", path.display()))
}

/// Bytes of a file of text or of token ids.
const LARGEST: u64 = 1 << 30;

/// Prints to standard output; somebody who closed it has seen enough.
pub fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("cannot write to the standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("out");
        let target = |path: &Path| Target::new(path, &[]).expect("a target");
        target(&path).write(|file| Ok(file.write_all(b"old")?)).expect("a file");
        let failed = target(&path).write(|file| {
            file.write_all(&[0; 1 << 21])?;
            anyhow::bail!("no more")
        });
        assert_eq!(failed.expect_err("it failed").to_string(), "no more");
        assert_eq!(fs::read(&path).expect("the old file"), b"old");
        assert_eq!(fs::read_dir(folder.path()).expect("the folder").count(), 1);
        let error = target(&folder.path().join("none/out")).write(|_| Ok(())).expect_err("no such folder");
        let error = error.to_string();
        assert!(error.contains("there is no folder"), "{error}");
    }
}
