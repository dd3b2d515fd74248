//! `rewake eval`: perplexity of a text, accuracy on LAMBADA.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use serde_json::json;

use super::checkpoint::{Which, print, progress, read_text, show};
use super::storage;
use crate::model::{Model, Pool};
use crate::text::Tokenizer;
use crate::types::{Row, SeqId, SlotId, Want};

const EXAMPLES: &str = "\
Examples:
  rewake eval model.pth --text book.txt --limit 10000
  rewake eval model.pth --text book.txt --limit 10000 --states
  rewake eval model.pth --lambada lambada_test.jsonl --json";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, group = clap::ArgGroup::new("what").args(["text", "lambada"]).required(true))]
pub struct Args {
    #[command(flatten)]
    which: Which,
    /// Text file whose perplexity is measured; an end of text that is written out begins a new document
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// LAMBADA: a JSON object with a `text` in each line, whose last word is to be guessed
    #[arg(long, value_name = "FILE")]
    lambada: Option<PathBuf>,
    /// Instead of the text's perplexity: what storing states less exactly costs while it is read
    #[arg(long, requires = "text", conflicts_with = "lambada")]
    states: bool,
    /// Use only the first N tokens of the text, or the first N passages of LAMBADA
    #[arg(long, value_name = "N")]
    limit: Option<NonZeroUsize>,
    /// Print JSON, for programs
    #[arg(long)]
    json: bool,
}

/// Sequences that are read at once, and tokens of all of them in one step.
const SEQUENCES: usize = 16;
const STEP: usize = 256;

/// Ids to read; those from `scored` on are judged.
struct Passage {
    ids: Vec<u32>,
    scored: usize,
}

/// A model that reads passages.
struct Reader {
    model: Model,
    text: Arc<dyn Tokenizer>,
}

/// How well a passage was foretold.
#[derive(Clone, Copy, Debug, Default)]
struct Score {
    /// Sum of the judged tokens' -ln p.
    nats: f64,
    tokens: usize,
    /// Tokens that were not the likeliest.
    missed: usize,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let opened = args.which.open()?;
    let text = args.which.tokenizer(&opened)?;
    let mut reader = Reader { model: opened.model, text };
    let limit = args.limit.map_or(usize::MAX, NonZeroUsize::get);
    let result = match (&args.text, &args.lambada) {
        (Some(file), _) if args.states => reader.storage(file, limit)?,
        (Some(file), _) => reader.perplexity(file, limit)?,
        (_, Some(file)) => reader.lambada(file, limit)?,
        _ => bail!("nothing to evaluate: give --text or --lambada"),
    };
    if args.json {
        return print(&format!("{result:#}\n"));
    }
    if let Some(stored) = result["stored"].as_array() {
        return print(&table(stored));
    }
    let lines = result.as_object().into_iter().flatten();
    let shown = |value: &serde_json::Value| match value.as_f64().filter(|_| value.is_f64()) {
        Some(number) => format!("{number:.4}"),
        None => value.to_string(),
    };
    print(&lines.map(|(key, value)| format!("{:<16}{}\n", key.replace('_', " "), shown(value))).collect::<String>())
}

/// What was stored in each precision, as a table.
fn table(stored: &[serde_json::Value]) -> String {
    const COLUMNS: [&str; 6] =
        ["precision", "bytes", "bytes_compressed", "kl_divergence", "kl_divergence_worst", "top1_agreement"];
    let cell = |value: &serde_json::Value| match (value.as_str(), value.as_f64().filter(|_| value.is_f64())) {
        (Some(text), _) => text.to_owned(),
        (_, Some(number)) if number < 0.01 => format!("{number:.2e}"),
        (_, Some(number)) => format!("{number:.5}"),
        _ => value.to_string(),
    };
    let titles = COLUMNS.map(|column| column.replace('_', " "));
    let lines = stored.iter().map(|line| COLUMNS.map(|column| cell(&line[column])));
    let line = |cells: [String; 6]| cells.map(|cell| format!("{cell:<21}")).concat().trim_end().to_owned() + "\n";
    std::iter::once(titles).chain(lines).map(line).collect()
}

impl Reader {
    /// The text is one sequence, as long as the model takes.
    fn storage(&mut self, file: &Path, limit: usize) -> anyhow::Result<serde_json::Value> {
        let mut ids = self.text.encode_special(&read_text(file)?);
        ids.truncate(limit);
        storage::compare(&mut self.model, &ids)
    }

    /// Every token of the text given all before it; the end of a document stands before the first.
    fn perplexity(&mut self, file: &Path, limit: usize) -> anyhow::Result<serde_json::Value> {
        let text = read_text(file)?;
        let mut ids = self.text.encode_special(&text);
        ids.truncate(limit);
        // A model with a limited context reads the text in pieces that fit.
        let piece = self.model.description().context.map_or(usize::MAX, |context| context.saturating_sub(1).max(1));
        let passages: Vec<_> = ids.chunks(piece).map(|ids| self.passage(&[], ids)).collect();
        let bytes: usize = passages.iter().map(|p| self.text.decode(&p.ids[p.scored..]).len()).sum();
        let scores = self.scores(&passages)?;
        let total = scores.iter().fold(Score::default(), |a, b| Score {
            nats: a.nats + b.nats,
            tokens: a.tokens + b.tokens,
            missed: a.missed + b.missed,
        });
        ensure!(total.tokens > 0, "{} holds too little to judge", file.display());
        let mean = total.nats / total.tokens as f64;
        Ok(json!({
            "tokens": total.tokens,
            "bytes": bytes,
            "nats_per_token": mean,
            "perplexity": mean.exp(),
            "bits_per_byte": total.nats / std::f64::consts::LN_2 / bytes.max(1) as f64,
            "top1_agreement": 1.0 - total.missed as f64 / total.tokens as f64,
        }))
    }

    /// The last word of each text, with the space before it, given what stands before, as the original evaluations do it.
    fn lambada(&mut self, file: &Path, limit: usize) -> anyhow::Result<serde_json::Value> {
        let lines = read_text(file)?;
        let lines = lines.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty()).take(limit);
        let most = self.model.description().context.unwrap_or(usize::MAX);
        let passage = |(line, n): (&str, usize)| {
            let wrong = || format!("{}, line {n}: not an object with a `text` of two words", file.display());
            let json: serde_json::Value = serde_json::from_str(line).with_context(wrong)?;
            let text = json["text"].as_str().with_context(wrong)?.trim_end();
            let at = text.rfind(' ').filter(|&at| at > 0).with_context(wrong)?;
            let ids = |text| self.text.encode(text);
            let passage = self.passage(&ids(&text[..at]), &ids(&text[at..]));
            let read = passage.ids.len() - 1;
            ensure!(read <= most, "{}, line {n}: {read} tokens are read, and the model has {most}", file.display());
            Ok(passage)
        };
        let passages = lines.map(passage).collect::<anyhow::Result<Vec<_>>>()?;
        ensure!(!passages.is_empty(), "{} holds no passages", file.display());
        let scores = self.scores(&passages)?;
        let all = scores.len() as f64;
        let right = scores.iter().filter(|score| score.missed == 0).count();
        Ok(json!({
            "passages": scores.len(),
            "accuracy": right as f64 / all,
            "perplexity": (scores.iter().map(|score| score.nats).sum::<f64>() / all).exp(),
        }))
    }

    /// `ids` to be judged after `context`, behind the end of a document where the vocabulary has one.
    fn passage(&self, context: &[u32], ids: &[u32]) -> Passage {
        let mut all: Vec<u32> = self.text.end_of_text().into_iter().chain(context.iter().copied()).collect();
        // Nothing foretells the very first token.
        let scored = all.len().max(1);
        all.extend(ids);
        Passage { ids: all, scored }
    }

    /// Judges every passage, some of them at once. Which ones are together makes no difference.
    fn scores(&mut self, passages: &[Passage]) -> anyhow::Result<Vec<Score>> {
        let mut pool = self.model.pool(SEQUENCES.min(passages.len()))?;
        let bar = progress("reading", "passages");
        let mut scores = Vec::with_capacity(passages.len());
        for group in passages.chunks(SEQUENCES) {
            scores.extend(self.group_scores(&mut pool, group)?);
            show(&bar, scores.len(), passages.len());
        }
        bar.finish_and_clear();
        Ok(scores)
    }

    fn group_scores(&mut self, pool: &mut Pool, group: &[Passage]) -> anyhow::Result<Vec<Score>> {
        let vocabulary = self.model.description().vocabulary;
        let mut scores = vec![Score::default(); group.len()];
        (0..group.len()).for_each(|slot| pool.reset(SlotId(slot as u32)));
        let each = STEP / group.len();
        let (mut ids, mut rows, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        for at in (0..).step_by(each) {
            ids.clear();
            rows.clear();
            logits.clear();
            for (n, passage) in group.iter().enumerate() {
                // The last token is only foretold.
                let end = (passage.ids.len() - 1).min(at + each);
                if at >= end {
                    continue;
                }
                let slot = SlotId(n as u32);
                let tokens = ids.len()..ids.len() + end - at;
                let want = if end < passage.scored { Want::Nothing } else { Want::All };
                ids.extend(&passage.ids[at..end]);
                rows.push(Row { seq: SeqId(n as u64), from: slot, into: slot, at: at as u64, tokens, want });
            }
            if rows.is_empty() {
                return Ok(scores);
            }
            self.model.step(pool, &ids, &rows, &mut logits)?;
            let mut given = logits.chunks_exact(vocabulary);
            for row in rows.iter().filter(|row| row.want == Want::All) {
                let n = row.seq.0 as usize;
                for (next, logits) in (at + 1..).zip(given.by_ref().take(row.tokens.len())) {
                    if next >= group[n].scored {
                        scores[n].add(logits, group[n].ids[next] as usize);
                    }
                }
            }
        }
        unreachable!("the loop ends when no row is left")
    }
}

impl Score {
    /// Judges that `token` followed.
    fn add(&mut self, logits: &[f32], token: usize) {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&l| f64::from(l - most).exp()).sum();
        self.nats += sum.ln() - f64::from(logits[token] - most);
        self.tokens += 1;
        self.missed += usize::from(logits[token] < most);
    }
}
