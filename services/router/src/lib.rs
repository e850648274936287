//! The router service: public API, front and dispatch host.

pub mod api;
mod entrance;
pub mod front;
mod host;
mod trace;

pub use api::ApiKeys;
pub use entrance::Entrance;
pub use front::{
    AttentionConnector, AttentionLink, ClusterLoad, Defaults, Front, FrontConfig, FrontError, GrpcAttention, NoLoad,
    RequestContext, ServedModel, TextCodec,
};
pub use host::{Role, RouterService, dispatch_routes, follow_readiness, serve_grpc, serve_http, serve_members};
