//! Gate selection, plan, scatter and combine of one MoE layer.

mod link;

pub use link::{LinkError, MoeLink, ShardConnector, ShardLink};
