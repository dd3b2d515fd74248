//! How a request says to sample, and to stop.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor, value::SeqAccessDeserializer};
use utoipa::ToSchema;

use super::generation::Generation;
use crate::api::Error;
use crate::session::ModelCard;
use crate::types::Sampling;

/// A seed: any integer of 64 bits. A negative one is as good as its two's complement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seed(pub u64);

impl<'de> Deserialize<'de> for Seed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Integer;
        impl Visitor<'_> for Integer {
            type Value = u64;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an integer of 64 bits")
            }
            fn visit_i64<E: serde::de::Error>(self, seed: i64) -> Result<u64, E> {
                Ok(seed as u64)
            }
            fn visit_u64<E: serde::de::Error>(self, seed: u64) -> Result<u64, E> {
                Ok(seed)
            }
        }
        deserializer.deserialize_any(Integer).map(Self)
    }
}

/// One stop string or several.
#[derive(Clone, Debug, PartialEq, ToSchema)]
#[schema(value_type = StopSchema)]
pub struct Stop(pub Vec<String>);

/// One stop string or several.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum StopSchema {
    One(String),
    Several(Vec<String>),
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrSeveral;
        impl<'de> Visitor<'de> for OneOrSeveral {
            type Value = Vec<String>;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(vec![text.into()])
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq))
            }
        }
        deserializer.deserialize_any(OneOrSeveral).map(Self)
    }
}

impl Generation {
    /// The parameters within their ranges, the model's where there is none.
    pub(super) fn sampling(&self, card: &ModelCard, fresh_seed: u64) -> Result<Sampling, Error> {
        let default = &card.sampling;
        let top_k = match self.top_k {
            None => default.top_k,
            Some(-1) => 0,
            Some(k) => {
                usize::try_from(k).map_err(|_| Error::invalid("top_k", "`top_k` must be 0, -1 (both: all) or more"))?
            }
        };
        if self.repetition_penalty.is_some_and(|penalty| penalty <= 0.0) {
            return Err(Error::invalid("repetition_penalty", "`repetition_penalty` must be greater than 0"));
        }
        Ok(Sampling {
            temperature: within("temperature", self.temperature, 0.0..=2.0, default.temperature)?,
            top_p: within("top_p", self.top_p, 0.0..=1.0, default.top_p)?,
            top_k,
            min_p: within("min_p", self.min_p, 0.0..=1.0, default.min_p)?,
            presence_penalty: within("presence_penalty", self.presence_penalty, -2.0..=2.0, default.presence_penalty)?,
            frequency_penalty: within(
                "frequency_penalty",
                self.frequency_penalty,
                -2.0..=2.0,
                default.frequency_penalty,
            )?,
            repetition_penalty: within(
                "repetition_penalty",
                self.repetition_penalty,
                f64::from(f32::MIN_POSITIVE)..=10.0,
                default.repetition_penalty,
            )?,
            penalty_decay: within("penalty_decay", self.penalty_decay, 0.0..=1.0, default.penalty_decay)?,
            logit_bias: match &self.logit_bias {
                None => default.logit_bias.clone(),
                Some(bias) => logit_bias(bias, card.vocabulary)?,
            },
            seed: self.seed.map_or(fresh_seed, |seed| seed.0),
        })
    }
}

fn within(
    name: &'static str,
    value: Option<f64>,
    range: std::ops::RangeInclusive<f64>,
    default: f32,
) -> Result<f32, Error> {
    match value {
        None => Ok(default),
        Some(value) if range.contains(&value) => Ok(value as f32),
        Some(value) => {
            let (low, high) = (range.start(), range.end());
            Err(Error::invalid(name, format!("`{name}` must be from {low} to {high}, not {value}")))
        }
    }
}

fn logit_bias(bias: &BTreeMap<String, f64>, vocabulary: usize) -> Result<Vec<(u32, f32)>, Error> {
    let mut pairs = Vec::with_capacity(bias.len());
    for (key, &value) in bias {
        let refuse = |what: &str| Error::invalid(format!("logit_bias.{key}"), format!("`logit_bias`: {what}"));
        // Only the plain spelling: "7" and "07" must not be two entries for one token.
        let id = key.parse::<u32>().ok().filter(|id| id.to_string() == *key);
        let id = id.ok_or_else(|| refuse("keys are token ids, such as \"42\""))?;
        if id as usize >= vocabulary {
            return Err(refuse(&format!("token ids are below {vocabulary}")));
        }
        if !(-100.0..=100.0).contains(&value) {
            return Err(refuse("values are from -100 to 100"));
        }
        pairs.push((id, value as f32));
    }
    pairs.sort_unstable_by_key(|&(id, _)| id);
    Ok(pairs)
}
