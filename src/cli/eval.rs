//! `rewake eval`: perplexity of a text, accuracy on LAMBADA, and how far a model is from another.

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
  rewake eval model.pth --quantize q4_0 --text book.txt --against model.pth   what quantising costs
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
    /// Checkpoint, of the same vocabulary, from which the KL divergence of what is foretold is measured; it is taken as it is
    /// stored, without --lora, --state and --quantize
    #[arg(long, value_name = "FILE", conflicts_with = "lambada")]
    against: Option<PathBuf>,
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
    /// What it is held against.
    reference: Option<Model>,
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
    /// Sum of the divergences from the reference, and of its own -ln p; tokens whose likeliest is another than its.
    divergence: f64,
    reference_nats: f64,
    differs: usize,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let opened = args.which.open()?;
    let text = args.which.tokenizer(&opened)?;
    let reference = args.against.as_deref().map(|file| reference(file, &opened.model)).transpose()?;
    let mut reader = Reader { model: opened.model, reference, text };
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

/// Loads what `model` is held against.
fn reference(file: &Path, model: &Model) -> anyhow::Result<Model> {
    let opened = Which::of(file).open()?;
    let (own, other) = (model.description().vocabulary, opened.model.description().vocabulary);
    ensure!(own == other, "{} has a vocabulary of {other} tokens, and the model one of {own}", file.display());
    Ok(opened.model)
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
        let contexts = self.models().filter_map(|model| model.description().context);
        let piece = contexts.min().map_or(usize::MAX, |context| context.saturating_sub(1).max(1));
        let passages: Vec<_> = ids.chunks(piece).map(|ids| self.passage(&[], ids)).collect();
        let bytes: usize = passages.iter().map(|p| self.text.decode(&p.ids[p.scored..]).len()).sum();
        let scores = self.scores(&passages)?;
        let total = scores.iter().fold(Score::default(), |a, b| Score {
            nats: a.nats + b.nats,
            tokens: a.tokens + b.tokens,
            missed: a.missed + b.missed,
            divergence: a.divergence + b.divergence,
            reference_nats: a.reference_nats + b.reference_nats,
            differs: a.differs + b.differs,
        });
        ensure!(total.tokens > 0, "{} holds too little to judge", file.display());
        let mean = total.nats / total.tokens as f64;
        let mut result = json!({
            "tokens": total.tokens,
            "bytes": bytes,
            "nats_per_token": mean,
            "perplexity": mean.exp(),
            "bits_per_byte": total.nats / std::f64::consts::LN_2 / bytes.max(1) as f64,
            "top1_agreement": 1.0 - total.missed as f64 / total.tokens as f64,
        });
        if self.reference.is_some() {
            let tokens = total.tokens as f64;
            result["kl_divergence"] = json!(total.divergence / tokens);
            result["same_top1"] = json!(1.0 - total.differs as f64 / tokens);
            result["reference_perplexity"] = json!((total.reference_nats / tokens).exp());
        }
        Ok(result)
    }

    fn models(&self) -> impl Iterator<Item = &Model> {
        std::iter::once(&self.model).chain(&self.reference)
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
        let pools = self.models().map(|model| model.pool(SEQUENCES.min(passages.len())));
        let mut pools = pools.collect::<Result<Vec<_>, _>>()?;
        let bar = progress("reading", "passages");
        let mut scores = Vec::with_capacity(passages.len());
        for group in passages.chunks(SEQUENCES) {
            scores.extend(self.group_scores(&mut pools, group)?);
            show(&bar, scores.len(), passages.len());
        }
        bar.finish_and_clear();
        Ok(scores)
    }

    /// `pools`: of the model, and of what it is held against.
    fn group_scores(&mut self, pools: &mut [Pool], group: &[Passage]) -> anyhow::Result<Vec<Score>> {
        let vocabulary = self.model.description().vocabulary;
        let mut scores = vec![Score::default(); group.len()];
        pools.iter_mut().for_each(|pool| (0..group.len()).for_each(|slot| pool.reset(SlotId(slot as u32))));
        let each = STEP / group.len();
        let (mut ids, mut rows, mut logits, mut other) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for at in (0..).step_by(each) {
            ids.clear();
            rows.clear();
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
            self.model.step(&mut pools[0], &ids, &rows, &mut logits)?;
            if let Some(reference) = &mut self.reference {
                reference.step(&mut pools[1], &ids, &rows, &mut other)?;
            }
            let mut given = logits.chunks_exact(vocabulary);
            let mut expected = other.chunks_exact(vocabulary);
            for row in rows.iter().filter(|row| row.want == Want::All) {
                let n = row.seq.0 as usize;
                for (next, logits) in (at + 1..).zip(given.by_ref().take(row.tokens.len())) {
                    let expected = expected.next();
                    if next >= group[n].scored {
                        let token = group[n].ids[next] as usize;
                        scores[n].add(logits, token);
                        if let Some(expected) = expected {
                            scores[n].compare(logits, expected, token);
                        }
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

    /// Adds how far this is from what another model gives: Σ p · ln(p / q), p the other's.
    fn compare(&mut self, logits: &[f32], expected: &[f32], token: usize) {
        let (q, p) = (Foretold::of(logits), Foretold::of(expected));
        let divergence = |(id, &e): (usize, &f32)| p.ln(e).exp() * (p.ln(e) - q.ln(logits[id]));
        // By rounding a sum of nothing may be a little less than nothing.
        self.divergence += expected.iter().enumerate().map(divergence).sum::<f64>().max(0.0);
        self.reference_nats -= p.ln(expected[token]);
        self.differs += usize::from(logits[p.first] < q.most);
    }
}

/// What turns a logit into a probability.
struct Foretold {
    first: usize,
    most: f32,
    ln_sum: f64,
}

impl Foretold {
    fn of(logits: &[f32]) -> Self {
        let first = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0);
        let most = logits.get(first).copied().unwrap_or(0.0);
        let ln_sum = logits.iter().map(|&l| f64::from(l - most).exp()).sum::<f64>().ln();
        Self { first, most, ln_sum }
    }

    /// The ln of the probability of the token with this logit.
    fn ln(&self, logit: f32) -> f64 {
        f64::from(logit - self.most) - self.ln_sum
    }
}
