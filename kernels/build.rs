//! Builds the CUDA kernels: under the feature `cuda-shim` as C++ for this machine. Without it, nothing.

#[cfg(feature = "cuda-shim")]
#[path = "build/shim.rs"]
mod shim;
#[cfg(feature = "cuda-shim")]
#[path = "build/sources.rs"]
mod sources;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    #[cfg(feature = "cuda-shim")]
    shim::build();
}
