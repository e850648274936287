//! Ids as types, made once where a message is read.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! index_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u32);

        impl $name {
            /// The id as an index.
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

index_id!(
    /// A decoder layer, absolute (0 is the first of the model).
    LayerId
);
index_id!(
    /// A routed expert within a layer.
    ExpertId
);
index_id!(
    /// A group of routed experts: experts `[g·E/G, (g+1)·E/G)` of a layer.
    GroupId
);

/// The unit of placement: one expert group over one span of MoE layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CellId {
    /// Span of MoE layers; 0 where a cell covers all of them.
    pub span: u32,
    /// Expert group.
    pub group: GroupId,
}

impl fmt::Display for CellId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.span == 0 { write!(f, "{}", self.group) } else { write!(f, "{}/{}", self.group, self.span) }
    }
}

impl From<crate::v1::Cell> for CellId {
    fn from(cell: crate::v1::Cell) -> Self {
        Self { span: cell.span, group: GroupId(cell.group) }
    }
}

impl From<CellId> for crate::v1::Cell {
    fn from(cell: CellId) -> Self {
        Self { group: cell.group.0, span: cell.span }
    }
}

/// A member of the cluster: unique among the live ones, chosen by the operator or drawn at start.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstanceId(pub String);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
