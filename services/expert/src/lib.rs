//! The expert service: cells, queue by layer, grouped FFN.
//!
//! A batch is checked ([`validate`]), waits in the queue of its layer, and is merged with whatever else waits there into
//! one grouped FFN by the one compute thread; its answer holds one partial sum per subtree of the cell tree.

mod cells;
mod compute;
mod config;
mod error;
mod grpc;
mod merge;
mod metrics;
mod pair;
mod paired;
mod queue;
mod reply;
mod self_check;
mod service;
mod stream;
#[cfg(test)]
mod testing;
pub mod validate;

pub use config::ExpertConfig;
pub use error::ExpertError;
pub use grpc::ExpertGrpc;
pub use service::ExpertService;
