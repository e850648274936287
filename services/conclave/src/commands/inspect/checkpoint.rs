//! What is reported of a checkpoint. Pure: the survey and the machine's memory go in.

use std::collections::BTreeMap;

use conclave_kernels::Fp8Weights;
use conclave_model::{AvailableMemory, FileUse, GenerationDefaults, ModelConfig, Survey, SurveyedFile, Text};
use serde::{Serialize, Serializer};
use serde_json::Value;

use super::{
    figures::{Figures, Memory, PartSize, parts, stored_parts},
    refusals,
};

/// Everything that is shown of a checkpoint; its JSON is what `--json` prints.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub directory: String,
    pub servable: bool,
    /// Why not; of many problems of one kind only some.
    pub refused: Vec<String>,
    pub problems: usize,
    /// As a `config.json`.
    #[serde(serialize_with = "document")]
    pub config: Option<ModelConfig>,
    pub weights: Weights,
    pub parts: Vec<PartSize>,
    pub figures: Option<Figures>,
    pub memory: Option<Memory>,
    pub tokenizer: Option<Tokenizer>,
    pub generation: Option<Generation>,
    pub files: Vec<FileEntry>,
    pub fingerprint: Option<String>,
}

/// The tensors that are there.
#[derive(Debug, Serialize)]
pub struct Weights {
    pub files: usize,
    pub tensors: usize,
    /// Of all tensors, those that serving does not read included.
    pub bytes: u64,
    pub unused_bytes: u64,
    /// Bytes by element type.
    pub dtypes: BTreeMap<&'static str, u64>,
}

/// A token that has a role.
#[derive(Debug, Serialize)]
pub struct Special {
    pub id: u32,
    pub text: String,
}

/// The tokenizer.
#[derive(Debug, Serialize)]
pub struct Tokenizer {
    /// Ids that have a string.
    pub strings: usize,
    pub bos: Option<Special>,
    pub eos: Option<Special>,
    /// Whether text prompts begin with BOS.
    pub adds_bos: bool,
    pub chat_template: bool,
}

/// Recommended sampling settings.
#[derive(Debug, Serialize)]
pub struct Generation {
    pub do_sample: Option<bool>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub repetition_penalty: Option<f32>,
    pub eos: Vec<u32>,
}

/// A file of the directory.
#[derive(Debug, Serialize)]
pub struct FileEntry {
    pub name: String,
    pub bytes: u64,
    /// `document`, `tensors` or `unused`.
    pub used: &'static str,
}

impl Report {
    /// Reports on a survey, for a machine with so much memory and a device that does this with matrices in FP8.
    pub fn new(survey: &Survey, memory: Option<AvailableMemory>, fp8: Fp8Weights) -> Self {
        let config = survey.config.as_ref();
        let figures = config.map(|config| Figures::new(config, &survey.stored, fp8));
        let memory = figures.as_ref().zip(memory).map(|(figures, memory)| Memory::new(figures, memory));
        Self {
            model: survey.name.clone(),
            directory: survey.dir.display().to_string(),
            servable: survey.problems.is_empty(),
            refused: refusals::lines(&survey.problems, &survey.dir),
            problems: survey.problems.len(),
            config: survey.config.clone(),
            weights: Weights::new(survey),
            parts: config.map_or_else(|| stored_parts(&survey.stored), |config| parts(config, &survey.stored, fp8)),
            figures,
            memory,
            tokenizer: survey.text.as_ref().map(Tokenizer::new),
            generation: survey.generation.as_ref().map(Generation::new),
            files: files(survey),
            fingerprint: survey.fingerprint.clone(),
        }
    }
}

impl Weights {
    fn new(survey: &Survey) -> Self {
        let stored = &survey.stored;
        Self {
            files: survey.files.iter().filter(|file| file.used == FileUse::Tensors).count(),
            tensors: stored.tensors,
            bytes: stored.total_bytes() + stored.other_bytes,
            unused_bytes: stored.other_bytes,
            dtypes: stored.dtypes.clone(),
        }
    }
}

impl Tokenizer {
    fn new(text: &Text) -> Self {
        let special = |id: Option<u32>| id.map(|id| Special { id, text: text.piece(id).unwrap_or_default() });
        Self {
            strings: text.strings(),
            bos: special(text.bos()),
            eos: special(text.eos()),
            adds_bos: text.adds_bos(),
            chat_template: text.has_chat_template(),
        }
    }
}

impl Generation {
    fn new(defaults: &GenerationDefaults) -> Self {
        Self {
            do_sample: defaults.do_sample,
            temperature: defaults.temperature,
            top_p: defaults.top_p,
            top_k: defaults.top_k,
            repetition_penalty: defaults.repetition_penalty,
            eos: defaults.eos.clone(),
        }
    }
}

fn files(survey: &Survey) -> Vec<FileEntry> {
    let used = |used| match used {
        FileUse::Document => "document",
        FileUse::Tensors => "tensors",
        FileUse::Unused => "unused",
    };
    let entry = |file: &SurveyedFile| FileEntry { name: file.name.clone(), bytes: file.bytes, used: used(file.used) };
    survey.files.iter().map(entry).collect()
}

fn document<S: Serializer>(config: &Option<ModelConfig>, serializer: S) -> Result<S::Ok, S::Error> {
    let document = config.as_ref().map(|config| serde_json::from_str::<Value>(&config.to_json()));
    document.transpose().map_err(serde::ser::Error::custom)?.serialize(serializer)
}

#[cfg(test)]
pub mod tests {
    use conclave_model::{StoredSizes, synth::Preset};

    use super::*;

    /// A survey of a configuration without any weights.
    pub fn survey(config: Option<ModelConfig>) -> Survey {
        Survey {
            name: "m".into(),
            dir: "/models/m".into(),
            config,
            stored: StoredSizes::default(),
            files: Vec::new(),
            fingerprint: None,
            text: None,
            generation: None,
            problems: Vec::new(),
        }
    }

    pub fn memory(bytes: u64) -> Option<AvailableMemory> {
        Some(AvailableMemory { bytes, limited_by: "MemAvailable".into() })
    }

    #[test]
    fn without_a_configuration_there_are_no_figures() {
        let report = Report::new(&survey(None), memory(1), Fp8Weights::Widened);
        assert!(report.figures.is_none() && report.memory.is_none() && report.parts.is_empty());
    }

    #[test]
    fn json_has_the_configuration_as_a_document() {
        let json =
            serde_json::to_value(Report::new(&survey(Some(Preset::Tiny.config())), None, Fp8Weights::Widened)).unwrap();
        assert_eq!(json["config"]["n_routed_experts"], 32);
        assert_eq!(json["figures"]["basis"], "bf16");
        assert_eq!(json["memory"], Value::Null);
    }
}
