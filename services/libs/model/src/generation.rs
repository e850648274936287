//! `generation_config.json`: the settings that the model's authors recommend.

use std::path::Path;

use serde_json::{Map, Value};

use crate::checkpoint::Checkpoint;
use crate::config::TokenIds;
use crate::json::{self, Fields, JsonError};
use crate::{ModelConfig, ModelError, files};

pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";

/// Recommended sampling settings; what the file does not say is `None`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationDefaults {
    /// At least 0; 0 is greedy.
    pub temperature: Option<f32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// At least 1; `None` where the file says 0, which switches it off.
    pub top_k: Option<u32>,
    /// Above 0.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a sequence, the configuration's where this file names none.
    pub eos: Vec<u32>,
    /// `false`: greedy, whatever the temperature.
    pub do_sample: Option<bool>,
}

impl Checkpoint {
    /// The recommended settings; without a `generation_config.json`, only the ends of sequence of `config.json`.
    ///
    /// # Errors
    /// Names the field, what was found and what was expected.
    pub fn generation(&self) -> Result<GenerationDefaults, ModelError> {
        GenerationDefaults::read(self.dir(), self.config())
    }
}

impl GenerationDefaults {
    /// Reads the settings of a checkpoint directory.
    ///
    /// # Errors
    /// As for [`Checkpoint::generation`].
    pub fn read(dir: &Path, config: &ModelConfig) -> Result<Self, ModelError> {
        Self::read_with(dir, &config.tokens())
    }

    pub(crate) fn read_with(dir: &Path, tokens: &TokenIds) -> Result<Self, ModelError> {
        let path = dir.join(GENERATION_CONFIG);
        let Some(text) = files::read_optional(&path)? else {
            return Ok(Self { eos: tokens.eos.clone(), ..Self::default() });
        };
        let document = json::object(&text).map_err(ModelError::json(&path))?;
        Self::parse(&document, tokens).map_err(ModelError::json(&path))
    }

    fn parse(document: &Map<String, Value>, tokens: &TokenIds) -> Result<Self, JsonError> {
        let fields = Fields::root(document);
        let eos = json::token_ids(&fields, "eos_token_id")?;
        if let Some(id) = eos.iter().find(|id| **id as usize >= tokens.vocab) {
            let expected = format!("less than vocab_size = {}", tokens.vocab);
            return Err(fields.out_of_range("eos_token_id", id, &expected));
        }
        let top_k = fields.integer("top_k", 0..=u64::from(u32::MAX))?.filter(|top_k| *top_k > 0);
        Ok(Self {
            temperature: number(&fields, "temperature", "at least 0", |t| t >= 0.0)?,
            top_p: number(&fields, "top_p", "above 0, at most 1", |p| p > 0.0 && p <= 1.0)?,
            top_k: top_k.map(|top_k| top_k as u32),
            repetition_penalty: number(&fields, "repetition_penalty", "above 0", |p| p > 0.0)?,
            eos: if eos.is_empty() { tokens.eos.clone() } else { eos },
            do_sample: fields.flag("do_sample")?,
        })
    }
}

fn number(
    fields: &Fields<'_>,
    key: &str,
    expected: &str,
    holds: impl Fn(f32) -> bool,
) -> Result<Option<f32>, JsonError> {
    let Some(number) = fields.number(key)? else { return Ok(None) };
    let single = number as f32;
    if single.is_finite() && holds(single) { Ok(Some(single)) } else { Err(fields.out_of_range(key, number, expected)) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::presets;

    fn parse(document: Value) -> Result<GenerationDefaults, JsonError> {
        GenerationDefaults::parse(document.as_object().unwrap(), &presets::tiny().tokens())
    }

    #[test]
    fn settings_are_read() {
        let found = parse(json!({"do_sample": true, "temperature": 0.3, "top_p": 0.95, "top_k": 50,
            "repetition_penalty": 1.1, "eos_token_id": [1, 2]}))
        .unwrap();
        assert_eq!((found.temperature, found.top_p, found.top_k), (Some(0.3), Some(0.95), Some(50)));
        assert_eq!((found.eos, found.do_sample, found.repetition_penalty), (vec![1, 2], Some(true), Some(1.1)));
    }

    #[test]
    fn what_is_not_said_is_left_open() {
        let found = parse(json!({"top_k": 0})).unwrap();
        assert_eq!(found, GenerationDefaults { eos: vec![1], ..GenerationDefaults::default() });
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(GenerationDefaults::read(dir.path(), &presets::tiny()).unwrap(), found);
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        for (field, value) in [
            ("temperature", json!(-1)),
            ("temperature", json!(1e300)),
            ("top_p", json!(0)),
            ("top_p", json!(1.5)),
            ("top_k", json!(-1)),
            ("repetition_penalty", json!(0)),
            ("eos_token_id", json!(512)),
            ("eos_token_id", json!([-1])),
            ("do_sample", json!("yes")),
        ] {
            let message = parse(json!({field: value})).unwrap_err().to_string();
            assert!(message.starts_with(&format!("{field}: found")), "{message}");
        }
    }
}
