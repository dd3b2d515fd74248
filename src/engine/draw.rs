//! Choosing the next tokens of one choice: one from each position of logits, while its draft goes on to be right.

use super::live::{Choice, Place};
use super::response::Response;
use super::worth::{Ahead, Costs};
use super::{Speculation, draft::Drafter};
use crate::sample;
use crate::scheduler::JobId;
use crate::text::Tokenizer;
use crate::types::{Finish, Row, SlotId, Want};

/// A choice whose next tokens are to be chosen, taken out of its job meanwhile.
pub(super) struct Draw<'a> {
    pub job: JobId,
    pub index: usize,
    pub choice: Choice,
    pub logits: Logits<'a>,
    pub drawn: Drawn,
}

/// One position of logits, and one more for each token of the choice's draft. Sampling spoils them.
pub(super) enum Logits<'a> {
    /// The step's own.
    Own(&'a mut [f32]),
    Copy(Vec<f32>),
}

/// What came of it.
#[derive(Default)]
pub(super) struct Drawn {
    /// What each token that was sampled gave to say.
    pub said: Vec<Said>,
    /// How many of the draft's tokens were sampled indeed.
    pub right: usize,
    pub end: Option<Result<Finish, sample::Error>>,
}

/// What there is to say after a token.
#[derive(Clone, Default)]
pub(super) struct Said {
    /// Often empty.
    pub text: String,
    /// The tokens since the last text; none without text.
    pub ids: Vec<u32>,
}

impl Draw<'_> {
    /// Samples at one position after the other as if each were a step of its own, until a token is not the drafted one: the
    /// logits after that are of another text.
    pub fn run(&mut self, vocabulary: usize, text: &dyn Tokenizer) {
        let (Choice { response, draft, .. }, drawn) = (&mut self.choice, &mut self.drawn);
        let logits = match &mut self.logits {
            Logits::Own(logits) => logits,
            Logits::Copy(copy) => copy.as_mut_slice(),
        };
        for (n, logits) in logits.chunks_exact_mut(vocabulary).enumerate() {
            let token = match response.sample(logits) {
                Ok(token) => token,
                Err(why) => return drawn.end = Some(Err(why)),
            };
            let accepted = response.accept(token, text);
            let ids = if accepted.text.is_empty() { Vec::new() } else { response.take_unreported() };
            drawn.said.push(Said { text: accepted.text, ids });
            drawn.end = accepted.finish.map(Ok);
            let right = draft.get(n) == Some(&token);
            drawn.right += usize::from(right);
            if drawn.end.is_some() || !right {
                return;
            }
        }
    }
}

/// A choice and its draft. While it has one, its state stays where it is and the step's goes to the spare slot.
impl Choice {
    pub fn new(response: Response, place: Place, speculation: Speculation) -> Self {
        let drafter = Drafter::new(speculation.most());
        Self { response, place, drafter, draft: Vec::new(), ahead: None, ending: None }
    }

    /// The tokens that its state has still to read, the draft apart: known to be the response's, or, when that has ended,
    /// what is kept of it.
    pub fn waiting(&self) -> &[u32] {
        let unread = self.response.unread(self.place.fed);
        if self.ending.is_some() { &unread[..self.response.keeps() - self.place.fed] } else { unread }
    }

    /// What its next row wants to know.
    pub fn wants(&self) -> Want {
        match (self.ending, self.draft.is_empty()) {
            (Some(_), _) => Want::Nothing,
            (None, true) => Want::Last,
            (None, false) => Want::From(self.waiting().len() - 1),
        }
    }

    /// Notes what its row does: where its state is now or, if the draft is right, will be.
    pub fn moved(&mut self, row: &Row) {
        self.place.shared = false;
        let fed = self.place.fed + row.tokens.len();
        if self.draft.is_empty() {
            (self.place.current, self.place.fed) = (row.into, fed);
        } else {
            self.ahead = Some((row.into, fed));
        }
    }

    /// Moves on to the state after the draft if all of it was right; if not, the old one will read again what was. `keep`:
    /// the old one stays as the anchor until it is known whether text of the draft is held back.
    pub fn settle(&mut self, drawn: &Drawn, keep: bool) {
        let drafted = std::mem::take(&mut self.draft).len();
        let Some((slot, fed)) = self.ahead.take().filter(|_| drawn.said.len() > drafted) else { return };
        if keep {
            self.place.anchor.get_or_insert((self.place.current, self.place.fed));
        }
        (self.place.current, self.place.fed) = (slot, fed);
    }

    /// Chooses a draft for the next step, in which there are `ahead` so far, this choice's one token among them. Gives
    /// how many tokens more than that it will read.
    pub fn look_ahead(&mut self, own: [SlotId; 2], ahead: Ahead, (costs, speculation): (&Costs, Speculation)) -> usize {
        let waiting = self.waiting().len();
        let most = speculation.most();
        if most > 0 {
            self.drafter.follow(self.response.recent());
            // The last token it may get need not be foretold.
            let room = usize::try_from(self.response.left().saturating_sub(1)).unwrap_or(most);
            let guess = self.drafter.draft();
            let guess = &guess[..guess.len().min(room)];
            let tokens = ahead.tokens + waiting - 1;
            let length = match speculation {
                _ if waiting > most || !self.place.has_spare(own) => 0,
                Speculation::Off => 0,
                Speculation::Always(_) => guess.len(),
                Speculation::UpTo(_) => {
                    costs.best(Ahead { tokens, waiting, trust: self.drafter.trust(), ..ahead }, guess.len())
                }
            };
            self.draft.extend_from_slice(&guess[..length]);
        }
        waiting - 1 + self.draft.len()
    }

    /// Goes back to the last state there is that has read nothing but what is kept of the ended response; how many tokens
    /// it has to read to be the one that is kept.
    pub fn rewind(&mut self) -> usize {
        let (keeps, anchor) = (self.response.keeps(), self.place.anchor.take());
        if self.place.fed > keeps {
            (self.place.current, self.place.fed) =
                anchor.expect("a state that has read text which is held back has an anchor before it");
        }
        keeps - self.place.fed
    }
}
