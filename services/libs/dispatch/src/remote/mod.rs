//! Dispatch between processes: towards shards, and between attention and a router. Over gRPC, or over the streams of
//! members of the same host where both sides are on it.

mod answers;
mod channel;
mod outgoing;
mod pending;
mod router;
mod serve;
mod shards;

pub use router::{RemoteConfig, RemoteDispatch};
pub use serve::{DispatchService, serve_dispatch, serve_dispatch_streams};
pub use shards::RemoteShards;
