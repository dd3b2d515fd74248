//! A response that goes on after the process that began it was lost.

use super::Job;
use super::response::Response;
use crate::text::Tokenizer;

/// What is known of a response that an earlier process had begun: its tokens are taken, never sampled again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// The tokens behind the text that was sent, an end token included.
    pub ids: Vec<u32>,
    /// In how many events that text was sent: as many of the first ones are not sent again.
    pub events: usize,
}

/// Puts a response where its replay ends. Tokens whose text was sent to the last byte become a part of what is read, as
/// if they were the prompt's; those after them are taken one by one when they would be sampled, because text that is held
/// back needs the states between them. Says how many tokens became a part of what is read.
pub(super) fn begin(job: &mut Job, response: &mut Response, text: &dyn Tokenizer) -> usize {
    let mut whole = response.clone();
    let mut read = 0;
    for (n, &id) in job.replay.ids.iter().enumerate() {
        if whole.accept(id, text).finish.is_some() {
            break;
        }
        if whole.delivered_tokens() == whole.tokens() {
            read = n + 1;
        }
    }
    for &id in &job.replay.ids[..read] {
        let sent = !response.accept(id, text).text.is_empty();
        job.replay.events = job.replay.events.saturating_sub(usize::from(sent));
    }
    response.mark_reported();
    let (ids, replay) = (&mut job.ids, &job.replay);
    ids.extend_from_slice(&replay.ids[..read]);
    read
}
