//! The attention service: engine, scheduler, latent cache, sampler.
//!
//! A request becomes a sequence ([`AttentionService::generate`]), waits in the engine's queue, gets cache blocks and a
//! share of each step from the scheduler ([`scheduler`]), runs through the trunk ([`trunk`]) segment by segment with the
//! routed experts in between, and has its next token drawn by the sampler ([`sampler`]). Tokens and logprobs depend on
//! the request alone: never on what else is in the batch, on how a prompt was cut into chunks, or on a preemption.

pub mod cache;
mod config;
mod engine;
mod error;
pub mod forward;
mod grpc;
mod metrics;
pub mod prefix;
mod request;
pub mod sampler;
pub mod scheduler;
mod sequence;
mod service;
mod state;
pub mod trunk;

pub use config::{AttentionConfig, CacheSize};
pub use error::AttentionError;
pub use grpc::AttentionGrpc;
pub use service::{AttentionService, TokenStream};
