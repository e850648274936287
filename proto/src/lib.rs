//! The wire contracts: messages and services generated from `conclave/v1/*.proto`, and the newtypes that
//! the rest of the workspace uses for ids once they have crossed the wire.

mod ids;

pub use ids::{CellId, ExpertId, GroupId, InstanceId, LayerId};

/// Generated messages, clients and servers of package `conclave.v1`.
pub mod v1 {
    #![allow(unreachable_pub, clippy::doc_markdown)]
    tonic::include_proto!("conclave.v1");
}

/// The encoded `FileDescriptorSet` of all services, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("conclave.v1");

/// Request metadata: id of the member that the caller means to talk to.
pub const INSTANCE_HEADER: &str = "conclave-instance";
/// Request metadata: fingerprint of the caller's checkpoint.
pub const FINGERPRINT_HEADER: &str = "conclave-fingerprint";
/// Request and response metadata: offer and grant of a pair.
pub const PAIR_HEADER: &str = "conclave-pair-bin";
/// Largest encoded message that any service accepts, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 256 << 20;
