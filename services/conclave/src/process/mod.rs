//! The commands that are services: everything in one process, or one part of a cluster.

pub mod attention;
mod attention_node;
mod checkpoint;
pub mod connectors;
pub mod device;
pub mod expert;
pub mod expert_node;
mod front;
pub mod host;
pub mod in_process;
pub mod member;
mod metrics;
mod payload;
mod range;
pub mod router;
pub mod serve;

pub use attention_node::AttentionArgs;
pub use checkpoint::{ModelArgs, blocking};
pub use device::{DeviceArgs, DeviceKind};
pub use front::FrontArgs;
pub use range::range;
