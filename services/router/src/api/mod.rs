//! The public API: gRPC and OpenAI's HTTP.

mod auth;
pub mod grpc;
pub mod openai;

pub use auth::ApiKeys;
