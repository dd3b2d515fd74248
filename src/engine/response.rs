//! One response while it is generated: which tokens it has, what of their text the client has, when it ends.

use std::collections::VecDeque;

use crate::sample::{self, Counts};
use crate::text::{Output, Tokenizer};
use crate::types::{Finish, Memory, Pending, Sampling, TAIL};

use super::Job;
use super::coin::coin;

/// A response and all that sampling its next token depends on.
///
/// Its tokens are numbered from 0 at `start`, the absolute position where it began in this job. A response that goes on
/// begins with the tokens an earlier job sampled and no state has read yet (`replayed`).
#[derive(Clone)]
pub struct Response {
    sampling: Sampling,
    stop_tokens: Vec<u32>,
    choice: usize,
    start: u64,
    /// Up to [`TAIL`] ids before the response, then its tokens, without an end token: all that grows with it.
    ids: Vec<u32>,
    /// How many of them are before it.
    first: usize,
    replayed: usize,
    /// How many the request asks for.
    wanted: u64,
    ends: Ends,
    /// Bytes of replayed tokens that the client already has, before those `output` has seen.
    before: u64,
    output: Output,
    begun: bool,
    /// What this job's rules let the client have of the text an earlier job held back.
    primed: String,
    counts: Counts,
    /// The end token that ended it.
    ended_by: Option<u32>,
    /// The most tokens a state had read, at any time so far, of which none turned out to be held back then: what a stop
    /// string may take out of the response is never in a state of so many.
    anchor: usize,
    /// What an earlier process sampled: taken instead of sampling.
    forced: Vec<u32>,
    /// How many of its tokens, an end token included, were told of beside text.
    reported: usize,
}

/// How many bytes a response has with each of its tokens, of the last ones: of those before, the client has all.
#[derive(Clone, Debug, Default, PartialEq)]
struct Ends {
    /// How many tokens are before, and the bytes with them.
    before: usize,
    at: u64,
    /// With each token after them.
    after: VecDeque<u64>,
}

impl Ends {
    /// One more token, of so many bytes.
    fn push(&mut self, bytes: usize) {
        self.after.push_back(self.last() + bytes as u64);
    }

    /// The client has so many bytes, and never fewer again.
    fn forget(&mut self, delivered: u64) {
        while let Some(end) = self.after.pop_front_if(|end| *end <= delivered) {
            (self.before, self.at) = (self.before + 1, end);
        }
    }

    /// Bytes with all tokens.
    fn last(&self) -> u64 {
        *self.after.back().unwrap_or(&self.at)
    }

    /// How many tokens have all their bytes among so many, which are not fewer than those forgotten; and the bytes with them.
    fn within(&self, delivered: u64) -> (usize, u64) {
        let whole = self.after.partition_point(|&end| end <= delivered);
        (self.before + whole, whole.checked_sub(1).map_or(self.at, |last| self.after[last]))
    }
}

/// What one more token means.
pub struct Accepted {
    /// To be sent now; may be empty.
    pub text: String,
    pub finish: Option<Finish>,
}

impl Response {
    /// The response of `job`'s first choice, before its first new token.
    pub fn new(job: &Job, text: &dyn Tokenizer) -> Self {
        let none = Memory::default();
        let memory = job.memory.as_deref().unwrap_or(&none);
        let mut ids = memory.tail.clone();
        ids.extend(&job.ids);
        let (replayed, mut before) = (if job.goes_on { job.ids.len() } else { 0 }, 0);
        let first = (ids.len() - replayed).min(TAIL);
        ids.drain(..ids.len() - replayed - first);
        let mut ends = Ends::default();
        let (mut trim, mut unseen) = (job.trim, Vec::new());
        if job.goes_on {
            let bytes = text.decode(&job.ids);
            before = bytes.len() as u64 - u64::from(memory.pending.unseen).min(bytes.len() as u64);
            unseen = bytes[before as usize..].to_vec();
            job.ids.iter().for_each(|&id| ends.push(text.token_bytes(id).len()));
            trim.start &= !memory.pending.begun;
        }
        let mut output = Output::new(&job.stop, trim);
        // By the same rules as before it is held back again; with other stop strings it may be free now.
        let primed = output.push(&unseen).text;
        Self {
            sampling: job.sampling.clone(),
            stop_tokens: job.stop_tokens.clone(),
            choice: job.first_choice,
            start: job.at() + if job.goes_on { 0 } else { job.ids.len() as u64 },
            ids,
            first,
            replayed,
            wanted: job.max_tokens,
            ends,
            before,
            output,
            begun: job.goes_on && memory.pending.begun,
            primed,
            counts: if job.goes_on { Counts::import(&memory.counts) } else { Counts::new() },
            ended_by: None,
            anchor: 0,
            forced: job.replay.ids.clone(),
            reported: replayed,
        }
    }

    /// Its tokens, without an end token.
    fn own(&self) -> &[u32] {
        &self.ids[self.first..]
    }

    /// Whether a stop string ended it. So it is at once when it goes on from a text that ended with one.
    pub fn over(&self) -> bool {
        self.output.stopped()
    }

    /// Text to be sent before the first token; empty after it was taken once.
    pub fn take_primed(&mut self) -> String {
        std::mem::take(&mut self.primed)
    }

    /// The same for another choice.
    pub fn for_choice(&self, choice: usize) -> Self {
        Self { choice, ..self.clone() }
    }

    /// How many tokens it has, replayed ones included, an end token not.
    pub fn tokens(&self) -> usize {
        self.ids.len() - self.first
    }

    /// Tokens that are new in this job, the end token included.
    pub fn sampled(&self) -> u64 {
        (self.tokens() - self.replayed) as u64 + u64::from(self.ended_by.is_some())
    }

    /// The tokens sampled since this was last asked, an end token included.
    pub fn take_unreported(&mut self) -> Vec<u32> {
        let all = self.tokens();
        let from = std::mem::replace(&mut self.reported, all + usize::from(self.ended_by.is_some()));
        let mut ids = self.own().get(from..).unwrap_or_default().to_vec();
        ids.extend(self.ended_by.filter(|_| from <= all));
        ids
    }

    /// All tokens it has are known to whoever listens.
    pub fn mark_reported(&mut self) {
        self.reported = self.tokens();
    }

    /// Chooses the next token.
    pub fn sample(&self, logits: &mut [f32]) -> Result<u32, sample::Error> {
        if let Some(&id) = self.forced.get(self.tokens() - self.replayed) {
            return Ok(id);
        }
        let tail = &self.ids[self.ids.len().saturating_sub(TAIL)..];
        let coin = coin(self.sampling.seed, self.choice, self.start + self.tokens() as u64);
        sample::sample(logits, &self.sampling, &self.counts, tail, coin)
    }

    /// Takes the token that was chosen.
    pub fn accept(&mut self, token: u32, text: &dyn Tokenizer) -> Accepted {
        if self.stop_tokens.contains(&token) {
            self.ended_by = Some(token);
            return Accepted { text: self.output.finish(), finish: Some(Finish::Stop) };
        }
        let bytes = text.token_bytes(token);
        self.ids.push(token);
        self.ends.push(bytes.len());
        self.counts.add(token, self.sampling.penalty_decay);
        let piece = self.output.push(bytes);
        self.ends.forget(self.delivered());
        // The state from which this token was sampled has not read it.
        if self.tokens() - 1 <= self.delivered_tokens() {
            self.anchor = self.tokens() - 1;
        }
        let finish =
            if piece.stopped { Some(Finish::Stop) } else { (self.sampled() >= self.wanted).then_some(Finish::Length) };
        Accepted { text: piece.text, finish }
    }

    /// What is still held back, for a response that nobody can continue.
    pub fn flush(&mut self) -> String {
        self.output.finish()
    }

    /// Bytes of the response that the client has.
    fn delivered(&self) -> u64 {
        self.before + self.output.delivered()
    }

    /// How many tokens' text the client has to the last byte: a state to be kept must not have read more.
    pub fn delivered_tokens(&self) -> usize {
        self.ends.within(self.delivered()).0
    }

    /// The ids the sequence has beyond a state that has read `fed` tokens of the response.
    ///
    /// `fed` is at most [`delivered_tokens`](Self::delivered_tokens).
    pub fn pending(&self, fed: usize, text: &dyn Tokenizer) -> Pending {
        let delivered = self.delivered();
        let (whole, from) = self.ends.within(delivered);
        let mut ends = self.own()[fed..whole].to_vec();
        if let Some(&cut) = self.own().get(whole) {
            // The client has only the beginning of this token's text.
            let seen = &text.token_bytes(cut)[..(delivered - from) as usize];
            ends.extend(text.encode(&String::from_utf8_lossy(seen)));
        }
        let mut goes_on = self.unread(fed).to_vec();
        goes_on.extend(self.ended_by);
        let unseen = self.ends.last().saturating_sub(delivered) as u32;
        Pending { ends, goes_on, unseen, begun: self.begun || self.output.begun() }
    }

    /// The last ids that a state which has read `fed` tokens of the response has read.
    pub fn tail(&self, fed: usize) -> Vec<u32> {
        let read = self.first + fed;
        self.ids[read.saturating_sub(TAIL)..read].to_vec()
    }

    /// Absolute position after `fed` tokens of the response.
    pub fn position(&self, fed: usize) -> u64 {
        self.start + fed as u64
    }

    /// The tokens that a state which has read `fed` of them has not read.
    pub fn unread(&self, fed: usize) -> &[u32] {
        &self.own()[fed..]
    }

    /// The first `fed` tokens.
    pub fn fed(&self, fed: usize) -> &[u32] {
        &self.own()[..fed]
    }

    /// How many tokens the state to be kept of an ended response has read.
    pub fn keeps(&self) -> usize {
        // After an end token everything was read.
        let all = self.tokens();
        if self.ended_by.is_some() && all <= self.delivered_tokens() { all } else { self.anchor }
    }

    /// How many tokens it may still get.
    pub fn left(&self) -> u64 {
        self.wanted.saturating_sub(self.sampled())
    }

    /// Up to [`TAIL`] ids before the response, then its tokens; it only ever grows.
    pub fn recent(&self) -> &[u32] {
        &self.ids
    }

    pub fn counts(&self) -> Vec<(u32, f32)> {
        self.counts.export()
    }
}
