//! Dispatch over gRPC: towards shards, and between attention and a router.

mod channel;
mod pending;
mod remote;
mod serve;
mod shards;

pub use remote::{RemoteConfig, RemoteDispatch};
pub use serve::{DispatchService, serve_dispatch};
pub use shards::GrpcShards;
