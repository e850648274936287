//! Builds the CUDA kernels: under the feature `cuda-shim` as C++ for this machine, under `cuda` as code for GPUs. Without
//! these, nothing.

#[cfg(feature = "cuda")]
#[path = "build/gpu.rs"]
mod gpu;
#[cfg(feature = "cuda")]
#[path = "build/nvcc.rs"]
mod nvcc;
#[cfg(feature = "cuda-shim")]
#[path = "build/shim.rs"]
mod shim;
#[cfg(any(feature = "cuda", feature = "cuda-shim"))]
#[path = "build/sources.rs"]
mod sources;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    #[cfg(feature = "cuda-shim")]
    shim::build();
    #[cfg(feature = "cuda")]
    gpu::build();
}
