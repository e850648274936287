//! Checkpoints: config, tensors, tokenizer, chat template, fingerprint.

mod checkpoint;
mod config;
mod error;
mod files;
mod fingerprint;
mod generation;
mod json;
mod loading;
mod location;
mod memory;
pub mod names;
mod progress;
mod rotary;
pub mod sizes;
mod sources;
mod stored;
mod survey;
pub mod synth;
mod sys;
mod tensors;
#[cfg(test)]
mod testing;
mod text;

pub use checkpoint::{Checkpoint, TensorInfo};
pub use config::{BlockQuantization, ConfigError, GateMethod, ModelConfig, ModelKind, RopeScaling, Scoring};
pub use error::ModelError;
pub use generation::GenerationDefaults;
pub use json::JsonError;
pub use loading::Loading;
pub use memory::{AvailableMemory, available_memory};
pub use progress::Progress;
pub use rotary::{Rotary, rotary};
pub use stored::StoredSizes;
pub use survey::{FileUse, Survey, SurveyedFile};
pub use tensors::TensorError;
pub use text::{ChatMessage, Text, TextError};
