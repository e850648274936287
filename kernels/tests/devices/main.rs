//! All devices of this machine against each other and against themselves.

mod agreement;
#[cfg(feature = "cuda-shim")]
mod cuda;
#[cfg(feature = "cuda-shim")]
mod cuda_fp8;
mod exactness;
mod expanded;
mod fp8;
#[cfg(feature = "cuda-shim")]
mod links;
#[cfg(feature = "cuda")]
mod links_gpu;
#[path = "../cuda/numbers.rs"]
#[allow(dead_code, reason = "shared with the tests of the CUDA kernels")]
mod numbers;
#[cfg(feature = "cuda-shim")]
mod shared;
mod support;
