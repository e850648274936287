//! Checkpoints: config, tensors, tokenizer, chat template, fingerprint.

mod config;

pub use config::{GateMethod, ModelConfig, ModelKind, RopeScaling, Scoring};
