//! Which checkpoint a command is about, how it is opened, and files that appear whole or not at all.

use std::fs;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use tempfile::NamedTempFile;

use crate::app::{self, Opened};
use crate::config;

/// A checkpoint and what is added to it.
#[derive(Debug, Default, clap::Args)]
pub struct Which {
    /// Checkpoint file or folder [default: the embedded demonstration model]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// `world`, `bytes`, a tokenizer.json or a vocabulary file [default: what the checkpoint says]
    #[arg(long, value_name = "NAME|FILE")]
    tokenizer: Option<String>,
    /// State-tuned file that sequences start from
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// LoRA adapter to merge
    #[arg(long, value_name = "FILE")]
    lora: Option<PathBuf>,
    /// The alpha the adapter was trained with, which its file does not hold
    #[arg(long, value_name = "A", requires = "lora")]
    lora_alpha: Option<f32>,
}

impl Which {
    /// The same as a model of the configuration.
    pub fn config(&self) -> config::Model {
        config::Model {
            file: self.file.clone(),
            tokenizer: self.tokenizer.clone(),
            state: self.state.clone(),
            lora: self.lora.clone(),
            lora_alpha: self.lora_alpha,
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

/// Writes a file that has its name only when it is complete: a kill leaves nothing under it.
pub fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<NamedTempFile>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let cannot = || format!("cannot write {}", path.display());
    let mut builder = tempfile::Builder::new();
    builder.prefix(".rewake-").suffix(".part");
    #[cfg(unix)]
    // As any new file: readable by whom the user's umask says.
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = BufWriter::with_capacity(1 << 20, builder.tempfile_in(folder).with_context(cannot)?);
    write(&mut file).with_context(cannot)?;
    let file = file.into_inner().map_err(io::IntoInnerError::into_error).with_context(cannot)?;
    file.as_file().sync_all().with_context(cannot)?;
    file.persist(path).with_context(cannot)?;
    // The name is durable when the folder is.
    fs::File::open(folder).and_then(|folder| folder.sync_all()).with_context(cannot)
}

/// Prints to standard output; somebody who closed it has seen enough.
pub fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("out");
        write_whole(&path, |file| Ok(file.write_all(b"old")?)).expect("a file");
        let failed = write_whole(&path, |file| {
            file.write_all(&[0; 1 << 21])?;
            anyhow::bail!("no more")
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).expect("the old file"), b"old");
        assert_eq!(fs::read_dir(folder.path()).expect("the folder").count(), 1);
        assert!(write_whole(Path::new("/nowhere/out"), |_| Ok(())).is_err());
    }
}
