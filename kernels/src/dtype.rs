//! Element types of stored weights and of activations on the wire.

use std::fmt;

use conclave_proto::v1::Activation;

use crate::KernelError;

/// An element type. Values are little-endian in memory and on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// The upper half of an IEEE single.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// As messages spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<Dtype> for Activation {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

impl TryFrom<Activation> for Dtype {
    type Error = KernelError;

    fn try_from(activation: Activation) -> Result<Self, KernelError> {
        match activation {
            Activation::F32 => Ok(Self::F32),
            Activation::Bf16 => Ok(Self::Bf16),
            Activation::Unspecified => Err(KernelError::NoActivation),
        }
    }
}
