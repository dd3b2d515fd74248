//! From what a turn says to the ids that are read.

use super::{Error, Input, Model, Prompt, Turn};
use crate::text::Profile;
use crate::types::Memory;

/// What one sequence of a turn is to read.
#[derive(Debug, PartialEq)]
pub(super) struct Reading {
    /// Begins with what is pending in the parent.
    pub ids: Vec<u32>,
    /// Nothing is new: the same response goes on.
    pub goes_on: bool,
}

/// One [`Reading`] for each prompt; a chat has one. Only what is new is tokenised.
pub(super) fn read(model: &Model, turn: &Turn, parent: Option<&Memory>) -> Result<Vec<Reading>, Error> {
    // Where nothing is to be answered, whose turn it is to speak stays open.
    let answered = turn.max_tokens != Some(0);
    let new = match &turn.input {
        Input::Prompts(prompts) => prompts.iter().map(|p| prompt_ids(model, p)).collect::<Result<Vec<_>, _>>()?,
        Input::Chat(messages) if messages.is_empty() => vec![Vec::new()],
        Input::Chat(messages) => {
            let continues = parent.is_some_and(|m| m.tokens() > 0);
            let pieces = model.profile.render(messages, continues, answered).map_err(|e| Error::Invalid {
                param: "messages",
                code: None,
                message: e.to_string(),
            })?;
            // Piece by piece, never across a boundary: a transcript gives the ids its turns gave.
            vec![pieces.iter().flat_map(|piece| model.text.encode(piece)).collect()]
        }
    };
    Ok(new.into_iter().map(|ids| join(&model.profile, ids, parent)).collect())
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
            Reading { ids: memory.pending.goes_on.clone(), goes_on: true }
        }
        Some(memory) => {
            let mut ids = memory.pending.ends.clone();
            ids.extend(new);
            Reading { ids: or_end_of_text(ids), goes_on: false }
        }
        None => {
            let mut ids = if profile.bos { vec![0] } else { Vec::new() };
            ids.extend(new);
            Reading { ids: or_end_of_text(ids), goes_on: false }
        }
    }
}

/// There is nothing to sample from before anything was read: token 0, the end of a document, begins a new one.
fn or_end_of_text(ids: Vec<u32>) -> Vec<u32> {
    if ids.is_empty() { vec![0] } else { ids }
}
