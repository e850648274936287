//! Membership, claims, placement, the cell map and the health of shards.

mod choice;
mod etcd;
mod health;
mod local;
mod map;
mod member;
mod membership;
mod placement;
mod roster;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use choice::{CellChoice, GroupRange};
pub use etcd::{EtcdConfig, EtcdMembership};
pub use health::{Health, HealthPolicy, Use};
pub use local::LocalMembership;
pub use map::{CellMap, Replica};
pub use member::{ClusterView, Member, MemberState, Role, SameHost};
pub use membership::{ClusterError, MakeMember, Membership, Registration};
pub use placement::{CellShape, Loads, choose};
