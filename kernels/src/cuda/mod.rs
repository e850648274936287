//! CUDA: kernels in `cuda/`, run by a [`Driver`]: on a GPU, or on the shim, which runs the very same code on the processor.
#![allow(unsafe_code)]

mod attention;
mod batch;
mod buffers;
mod device;
mod driver;
mod driver_link;
mod expanded;
mod experts;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
mod gpu_code;
#[cfg(feature = "cuda")]
mod gpu_graph;
mod graphs;
mod grouped;
#[cfg(feature = "cuda")]
mod ipc;
mod kernel;
mod launches;
#[cfg(feature = "cuda")]
mod library;
mod link;
#[cfg(feature = "cuda")]
mod nccl;
mod operand;
#[cfg(feature = "cuda")]
mod pinned;
mod places;
pub mod plain;
mod products;
mod rates;
#[cfg(any(feature = "cuda", test))]
mod ring;
mod scaled;
mod shared;
#[cfg(feature = "cuda-shim")]
mod shared_map;
#[cfg(feature = "cuda-shim")]
mod shim;
#[cfg(feature = "cuda-shim")]
mod shim_link;
pub mod sm90;
mod sums;
mod tensor_map;
mod tokens;
mod weights;

pub use attention::CudaCache;
pub use batch::CudaBatch;
pub use buffers::CudaBuffer;
pub use device::{Cuda, CudaFetched};
pub use driver::{Arg, CudaError, Driver, Launch, LibraryProduct};
pub use driver_link::{AnyLink, DriverLink};
#[cfg(feature = "cuda")]
pub use gpu::{Gpu, GpuMemory, GpuOptions};
#[cfg(feature = "cuda")]
pub use gpu_graph::GpuGraph;
pub use graphs::{GraphCounts, GraphDriver, GraphMemory, Graphs};
pub use launches::Launches;
#[cfg(feature = "cuda")]
pub use pinned::Download;
pub use rates::CudaRates;
pub use shared::CudaShared;
#[cfg(feature = "cuda-shim")]
pub use shim::{Shim, ShimMemory};
pub use tensor_map::{Element, EncodedMap, MOST_DIMENSIONS, TensorMap};
pub use weights::{CudaMatrix, CudaRotary};
