//! Membership, claims, placement and the cell map.

mod member;
mod membership;

pub use member::{ClusterView, Member, MemberState, Role};
pub use membership::{ClusterError, MakeMember, Membership, Registration};
