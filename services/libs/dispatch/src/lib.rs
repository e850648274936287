//! Gate selection, plan, scatter and combine of one MoE layer.
//!
//! A [`Dispatcher`] takes the gate logits and inputs of one layer, chooses experts ([`gate`]), picks one replica per
//! cell ([`plan`]), sends each shard the rows it needs, and adds the partial sums over the cell tree ([`combine`]).

mod answer;
mod attempt;
mod call;
pub mod combine;
mod condition;
mod config;
mod dispatcher;
mod error;
pub mod gate;
mod input;
mod link;
mod metrics;
pub mod pair;
pub mod plan;
mod predict;
mod remote;
mod shape;
mod shards;
pub mod stream;
mod work;

pub use config::DispatchConfig;
pub use dispatcher::Dispatcher;
pub use error::MoeError;
pub use link::{LinkError, MoeLink, ShardConnector, ShardLink, Transport};
pub use remote::{DispatchService, RemoteConfig, RemoteDispatch, RemoteShards, serve_dispatch, serve_dispatch_streams};
pub use shape::{GateConfig, ModelShape, WeightRule};
