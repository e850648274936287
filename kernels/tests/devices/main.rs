//! All devices of this machine against each other and against themselves.

mod agreement;
#[cfg(feature = "cuda-shim")]
mod cuda;
mod exactness;
mod expanded;
mod support;
