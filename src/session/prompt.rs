//! From what a turn says to the ids that are read.

use super::{Error, Input, Model, Prompt};
use crate::text::Profile;
use crate::types::Memory;

/// What one sequence of a turn is to read.
#[derive(Debug, PartialEq)]
pub(super) struct Reading {
    /// Begins with what is pending in the parent.
    pub ids: Vec<u32>,
    /// Nothing is new: the same response goes on.
    pub goes_on: bool,
    /// Where in `ids` the pieces of a conversation end, which were tokenised one by one; none in other text.
    pub boundaries: Vec<usize>,
}

/// One [`Reading`] for each prompt; a chat has one. Only what is new is tokenised.
pub(super) fn read(model: &Model, input: &Input, parent: Option<&Memory>) -> Result<Vec<Reading>, Error> {
    let new = match input {
        Input::Prompts(prompts) => {
            let plain = |prompt| Ok((prompt_ids(model, prompt)?, Vec::new()));
            prompts.iter().map(plain).collect::<Result<Vec<_>, Error>>()?
        }
        Input::Chat(messages) if messages.is_empty() => vec![(Vec::new(), Vec::new())],
        Input::Chat(messages) => {
            let continues = parent.is_some_and(|m| m.tokens() > 0);
            let pieces = model.profile.render(messages, continues, true).map_err(|e| Error::Invalid {
                param: "messages",
                code: None,
                message: e.to_string(),
            })?;
            // Piece by piece, never across a boundary: a transcript gives the ids its turns gave.
            let (mut ids, mut ends) = (Vec::new(), Vec::new());
            for piece in &pieces {
                ids.extend(model.text.encode(piece));
                ends.push(ids.len());
            }
            vec![(ids, ends)]
        }
    };
    let join = |(ids, ends): (Vec<u32>, Vec<usize>)| {
        let new = ids.len();
        let reading = join(&model.profile, ids, parent);
        let before = reading.ids.len() - new.min(reading.ids.len());
        Reading { boundaries: ends.into_iter().map(|end| before + end).collect(), ..reading }
    };
    Ok(new.into_iter().map(join).collect())
}

fn prompt_ids(model: &Model, prompt: &Prompt) -> Result<Vec<u32>, Error> {
    match prompt {
        Prompt::Text(text) => Ok(model.text.encode_special(text)),
        Prompt::Ids(ids) => match ids.iter().find(|&&id| id as usize >= model.card.vocabulary) {
            Some(id) => Err(Error::Invalid {
                param: "prompt",
                code: None,
                message: format!("token id {id} is outside the vocabulary of {} ids", model.card.vocabulary),
            }),
            None => Ok(ids.clone()),
        },
    }
}

fn join(profile: &Profile, new: Vec<u32>, parent: Option<&Memory>) -> Reading {
    match parent {
        Some(memory) if new.is_empty() && !memory.pending.goes_on.is_empty() => {
            Reading { ids: memory.pending.goes_on.clone(), goes_on: true, boundaries: Vec::new() }
        }
        Some(memory) => {
            let mut ids = memory.pending.ends.clone();
            ids.extend(new);
            Reading { ids: or_end_of_text(ids), goes_on: false, boundaries: Vec::new() }
        }
        None => {
            let mut ids = if profile.bos { vec![0] } else { Vec::new() };
            ids.extend(new);
            Reading { ids: or_end_of_text(ids), goes_on: false, boundaries: Vec::new() }
        }
    }
}

/// There is nothing to sample from before anything was read: token 0, the end of a document, begins a new one.
fn or_end_of_text(ids: Vec<u32>) -> Vec<u32> {
    if ids.is_empty() { vec![0] } else { ids }
}
