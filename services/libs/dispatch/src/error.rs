//! How a layer call ends when it does not end well.

use conclave_proto::CellId;
use conclave_proto::v1::{DispatchError, DispatchErrorKind};
use conclave_serve::{Error, ErrorKind};

/// Why a layer call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MoeError {
    /// The input is malformed; it will stay so.
    #[error("moe input: {0}")]
    Invalid(String),
    /// A cell has no live replica and none came in time.
    #[error("cell {cell}: no live replica within {waited_ms} ms: {last}")]
    NoReplica { cell: CellId, waited_ms: u128, last: String },
    /// The budget is spent.
    #[error("layer {layer}: budget of {budget_ms} ms spent")]
    Expired { layer: u32, budget_ms: u128 },
    /// Shards disagree with this dispatcher about what a batch is.
    #[error("{0}")]
    Internal(String),
}

impl MoeError {
    /// The error as a message.
    pub fn to_wire(&self) -> DispatchError {
        let kind = match self {
            Self::Invalid(_) => DispatchErrorKind::Invalid,
            Self::NoReplica { .. } => DispatchErrorKind::NoReplica,
            Self::Expired { .. } => DispatchErrorKind::Expired,
            Self::Internal(_) => DispatchErrorKind::Internal,
        };
        DispatchError { kind: kind.into(), message: self.to_string() }
    }
}

impl From<MoeError> for Error {
    fn from(error: MoeError) -> Self {
        from_wire(error.to_wire())
    }
}

/// A message's error as the caller of a layer sees it.
pub(crate) fn from_wire(error: DispatchError) -> Error {
    let kind = match error.kind() {
        DispatchErrorKind::Invalid => ErrorKind::InvalidArgument,
        DispatchErrorKind::NoReplica => ErrorKind::Unavailable,
        DispatchErrorKind::Expired => ErrorKind::DeadlineExceeded,
        DispatchErrorKind::Internal | DispatchErrorKind::Unspecified => ErrorKind::Internal,
    };
    Error::new(kind, error.message)
}
