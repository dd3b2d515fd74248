//! What fresh sequences of a model begin from: its own initial state, or a configured one that a request names.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Error;
use crate::types::{Beginning, InitialName, Memory, SegmentData};

/// The initial states of one model.
pub struct InitialStates {
    /// Fingerprint of the model's own, which the engine has.
    own: String,
    named: BTreeMap<InitialName, Named>,
}

struct Named {
    fingerprint: String,
    /// Has read nothing.
    memory: Arc<Memory>,
}

/// A beginning: where the engine starts, and what the record says of it.
pub(super) struct Fresh {
    /// `None` = the model's own initial state.
    pub memory: Option<Arc<Memory>>,
    pub beginning: Beginning,
}

impl InitialStates {
    /// None but the model's own: the state of a fresh sequence.
    pub fn new(own: &[SegmentData]) -> Self {
        Self { own: fingerprint(own), named: BTreeMap::new() }
    }

    /// Gives `name` to the state of a fresh sequence that begins otherwise.
    pub fn add(&mut self, name: InitialName, segments: Vec<SegmentData>) {
        let fingerprint = fingerprint(&segments);
        let memory = Arc::new(Memory { segments, ..Memory::default() });
        self.named.insert(name, Named { fingerprint, memory });
    }

    /// Of the state whose segments these are; none are the model's own.
    pub(super) fn fingerprint(&self, segments: &[SegmentData]) -> String {
        if segments.is_empty() { self.own.clone() } else { fingerprint(segments) }
    }

    pub fn names(&self) -> Vec<String> {
        self.named.keys().map(InitialName::to_string).collect()
    }

    /// What a request that names `name`, or none, begins from.
    pub(super) fn begin(&self, name: Option<&str>) -> Result<Fresh, Error> {
        let Some(wanted) = name else {
            let beginning = Beginning { name: None, fingerprint: self.own.clone() };
            return Ok(Fresh { memory: None, beginning });
        };
        let found = self.named.iter().find(|(name, _)| name.as_str() == wanted);
        let Some((name, Named { fingerprint, memory })) = found else { return Err(self.unknown(wanted)) };
        let beginning = Beginning { name: Some(name.to_string()), fingerprint: fingerprint.clone() };
        Ok(Fresh { memory: Some(memory.clone()), beginning })
    }

    fn unknown(&self, name: &str) -> Error {
        // The known ones first: the end of a long message is cut off.
        let message = match &self.names()[..] {
            [] => "this model has no initial states; the server's configuration names them, each a state-tuned file: \
                   [[model.initial_state]] name = \"…\" file = \"…\""
                .into(),
            known => format!("`initial_state` must be one of `{}`; there is no `{name}`", known.join("`, `")),
        };
        Error::Invalid { param: "initial_state", code: None, message }
    }

    /// The state that a recorded sequence began from, to read it again; empty = the model's own. Whatever it is called by
    /// now: the values decide. `None` is a record that does not say.
    ///
    /// # Errors
    /// Says why, when no state here is that one.
    pub(super) fn again(&self, beginning: Option<&Beginning>) -> Result<&[SegmentData], String> {
        let Some(Beginning { name, fingerprint }) = beginning else { return Ok(&[]) };
        if *fingerprint == self.own {
            return Ok(&[]);
        }
        if let Some(same) = self.named.values().find(|state| state.fingerprint == *fingerprint) {
            return Ok(&same.memory.segments);
        }
        Err(match name {
            None => "the model's own initial state, which is another one now".into(),
            Some(name) if self.named.keys().any(|known| known.as_str() == name) => {
                format!("the initial state `{name}`, which has other contents now")
            }
            Some(name) => format!("the initial state `{name}`, which is not configured any more"),
        })
    }
}

/// BLAKE3 over names, shapes and values.
fn fingerprint(segments: &[SegmentData]) -> String {
    let mut hash = blake3::Hasher::new();
    for SegmentData { name, shape, data } in segments {
        hash.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes());
        hash.update(&(shape.len() as u64).to_le_bytes());
        shape.iter().for_each(|&size| {
            hash.update(&(size as u64).to_le_bytes());
        });
        let bytes: Vec<u8> = data.iter().flat_map(|value| value.to_le_bytes()).collect();
        hash.update(&bytes);
    }
    hash.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(value: f32) -> Vec<SegmentData> {
        vec![SegmentData { name: "wkv".into(), shape: vec![2], data: vec![0.0, value] }]
    }

    fn name(name: &str) -> InitialName {
        InitialName::parse(name).expect("a good name")
    }

    fn beginning(states: &InitialStates, name: &str) -> Beginning {
        states.begin(Some(name)).expect("it is known").beginning
    }

    #[test]
    fn a_sequence_begins_again_from_the_same_values_only() {
        let mut states = InitialStates::new(&state(0.0));
        states.add(name("poet"), state(1.0));
        states.add(name("lawyer"), state(2.0));
        let poet = beginning(&states, "poet");
        assert_eq!(states.again(Some(&poet)), Ok(&state(1.0)[..]));
        assert_eq!(states.again(Some(&states.begin(None).expect("always").beginning)), Ok(&[][..]));
        assert_eq!(states.again(None), Ok(&[][..]));

        let mut changed = InitialStates::new(&state(-0.0));
        changed.add(name("poet"), state(3.0));
        assert!(changed.again(Some(&poet)).is_err_and(|why| why.contains("`poet`") && why.contains("other contents")));
        let lawyer = beginning(&states, "lawyer");
        assert!(changed.again(Some(&lawyer)).is_err_and(|why| why.contains("`lawyer`") && why.contains("configured")));
        let own = states.begin(None).expect("always").beginning;
        assert!(changed.again(Some(&own)).is_err_and(|why| why.contains("own")), "-0.0 has other bits than 0.0");
        // Under another name it is the same state, also when it has become the model's own.
        changed.add(name("bard"), state(1.0));
        assert_eq!(changed.again(Some(&poet)), Ok(&state(1.0)[..]));
        assert_eq!(InitialStates::new(&state(1.0)).again(Some(&poet)), Ok(&[][..]));
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let message = |states: &InitialStates, name: &str| match states.begin(Some(name)) {
            Err(Error::Invalid { param: "initial_state", message, .. }) => message,
            _ => panic!("{name:?} is not known"),
        };
        let mut states = InitialStates::new(&state(0.0));
        assert!(message(&states, "poet").contains("[[model.initial_state]]"));
        states.add(name("poet"), state(1.0));
        states.add(name("lawyer"), state(2.0));
        for unknown in ["", "Poet", "poet "] {
            assert!(message(&states, unknown).contains("`lawyer`, `poet`"));
        }
        assert_eq!(states.names(), ["lawyer", "poet"]);
    }
}
