//! The chunks of a stream.

use std::marker::PhantomData;

use super::reply::{Chunk, Kept, Opening, Shape, Usage};
use crate::api::Error;
use crate::api::sse::{Said, Script};
use crate::session::Event;

/// Writes the chunks of a stream: a pure machine from events to chunks.
pub struct Chunks<S> {
    opening: Opening,
    include_usage: bool,
    completion_tokens: u64,
    /// Choices not complete yet; none is after a failure.
    open: usize,
    shape: PhantomData<fn() -> S>,
}

impl<S: Shape> Chunks<S> {
    pub fn new(opening: Opening, include_usage: bool) -> Self {
        Self { open: opening.choices, opening, include_usage, completion_tokens: 0, shape: PhantomData }
    }

    /// What comes after all choices, when it was asked for.
    fn usage(&self) -> Option<Said> {
        let usage = Usage::new(self.opening.prompt_tokens, self.opening.cached_tokens.get(), self.completion_tokens);
        let chunk = Chunk { usage: Some(Some(usage)), ..self.envelope(Vec::new(), Kept::default()) };
        self.include_usage.then(|| Said::new(&chunk))
    }

    fn chunk(&self, piece: S::Piece, kept: Kept) -> Said {
        Said::new(&self.envelope(vec![piece], kept))
    }

    fn envelope(&self, choices: Vec<S::Piece>, kept: Kept) -> Chunk<S::Piece> {
        Chunk {
            heading: self.opening.heading.clone(),
            object: S::CHUNK,
            choices,
            usage: self.include_usage.then_some(None),
            service_tier: S::SERVICE_TIER,
            kept,
        }
    }
}

impl<S: Shape> Script for Chunks<S> {
    fn response_id(&self) -> &str {
        &self.opening.heading.id
    }

    fn opening(&mut self) -> Vec<Said> {
        (0..self.opening.choices).filter_map(S::opening).map(|piece| self.chunk(piece, Kept::default())).collect()
    }

    fn tell(&mut self, event: Event) -> Vec<Said> {
        match event {
            Event::Text { choice, text } => vec![self.chunk(S::piece(choice, text), Kept::default())],
            Event::Done { choice, finish, completion_tokens, stored } => {
                self.open = self.open.saturating_sub(1);
                self.completion_tokens += completion_tokens;
                let kept = Kept::from(stored);
                let on_top = if self.opening.choices == 1 { kept.clone() } else { Kept::default() };
                let mut said = vec![self.chunk(S::last(choice, finish, kept), on_top)];
                if self.ended() {
                    said.extend(self.usage());
                    said.push(Said { name: None, data: "[DONE]".into() });
                }
                said
            }
            Event::Failed(error) => {
                self.open = 0;
                vec![Said::new(&Error::from(error).body())]
            }
        }
    }

    fn ended(&self) -> bool {
        self.open == 0
    }
}
