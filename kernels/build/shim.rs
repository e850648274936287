//! The kernels and the shim as one static library.

use std::path::Path;

use crate::sources::files;

/// Where `.cu` files are looked for; those of the tests are deliberately wrong ones.
const KERNELS: [&str; 3] = ["cuda", "cuda/sm90", "tests/cuda/kernels"];

pub(crate) fn build() {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").include("cuda").define("NDEBUG", None).opt_level(2).debug(true);
    build.flag("-ffp-contract=off").flag("-Wno-unknown-pragmas");
    // The tests run where they are built.
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("fma") {
        build.flag("-mfma");
    }
    for directory in KERNELS {
        println!("cargo::rerun-if-changed={directory}");
        let kernels = files(Path::new(directory), "cu");
        build.files(kernels.iter().map(|path| path.as_path()));
    }
    build.files(files(Path::new("cuda/shim"), "cpp"));
    // nvcc's suffix, and whole: kernels register themselves, nothing refers to them.
    build.flag("-xc++").link_lib_modifier("+whole-archive").compile("conclave_cuda_shim");
}
