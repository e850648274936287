//! What the front knows of the model it serves.

use std::sync::Arc;

use conclave_model::{Checkpoint, GenerationDefaults, ModelConfig, ModelError, ModelKind};
use conclave_proto::v1;

use super::text::TextCodec;

/// The checkpoint's own sampling defaults (generation_config.json); what is `None` is neutral.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Defaults {
    /// 0 where the checkpoint says that it is not to be sampled.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// 0: all.
    pub top_k: Option<u32>,
    /// 1: none.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a sequence.
    pub eos: Vec<u32>,
}

/// The model as the API shows it.
#[derive(Clone)]
pub struct ServedModel {
    /// Under which clients ask for it.
    pub name: String,
    /// Of the checkpoint.
    pub fingerprint: String,
    /// Its architecture.
    pub config: ModelConfig,
    /// Its sampling defaults.
    pub defaults: Defaults,
    /// `None`: the checkpoint has no tokenizer; token ids only.
    pub text: Option<Arc<dyn TextCodec>>,
}

impl From<GenerationDefaults> for Defaults {
    fn from(file: GenerationDefaults) -> Self {
        let greedy = file.do_sample == Some(false);
        Self {
            temperature: if greedy { Some(0.0) } else { file.temperature },
            top_p: file.top_p,
            top_k: file.top_k,
            repetition_penalty: file.repetition_penalty,
            eos: file.eos,
        }
    }
}

impl ServedModel {
    /// The model of a checkpoint, under the checkpoint's own name.
    ///
    /// # Errors
    /// When its tokenizer, chat template or generation config is broken.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        Ok(Self {
            name: checkpoint.name().to_owned(),
            fingerprint: checkpoint.fingerprint().to_owned(),
            config: checkpoint.config().clone(),
            defaults: checkpoint.generation()?.into(),
            text: checkpoint.text()?.map(|text| Arc::new(text) as Arc<dyn TextCodec>),
        })
    }

    /// The fingerprint as responses show it.
    pub fn short_fingerprint(&self) -> String {
        format!("fp_{}", self.fingerprint.chars().take(12).collect::<String>())
    }

    /// The public description, for members of a numerics id.
    pub(crate) fn describe(&self, context_limit: u32, numerics: String) -> v1::Model {
        let config = &self.config;
        let grouped = config.gate_groups > 1;
        let groups = config.cell_groups();
        v1::Model {
            id: self.name.clone(),
            fingerprint: self.fingerprint.clone(),
            architecture: architecture(config.kind).to_owned(),
            layers: count(config.layers),
            hidden: count(config.hidden),
            vocab: count(config.vocab),
            experts: count(config.routed_experts.unwrap_or(0)),
            groups: count(groups),
            experts_per_token: count(config.experts_per_token),
            groups_per_token: count(if grouped {
                config.gate_topk_groups
            } else {
                groups.min(config.experts_per_token)
            }),
            context_limit,
            has_tokenizer: self.text.is_some(),
            numerics,
        }
    }
}

fn architecture(kind: ModelKind) -> &'static str {
    match kind {
        ModelKind::DeepseekV2 => "deepseek_v2",
        ModelKind::DeepseekV3 => "deepseek_v3",
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
