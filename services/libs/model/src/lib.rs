//! Checkpoints: config, tensors, tokenizer, chat template, fingerprint.

mod checkpoint;
mod config;
mod error;
mod files;
mod fingerprint;
mod json;
mod location;
mod memory;
pub mod names;
mod rotary;
pub mod sizes;
mod sys;
mod tensors;
#[cfg(test)]
mod testing;

pub use checkpoint::{Checkpoint, TensorInfo};
pub use config::{BlockQuantization, ConfigError, GateMethod, ModelConfig, ModelKind, RopeScaling, Scoring};
pub use error::ModelError;
pub use json::JsonError;
pub use rotary::{Rotary, rotary};
pub use tensors::TensorError;
