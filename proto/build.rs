//! Compiles the `.proto` files with the protobuf compiler of a build dependency: no system protoc is needed.

use std::{env, path::PathBuf};

const FILES: [&str; 5] = [
    "conclave/v1/inference.proto",
    "conclave/v1/attention.proto",
    "conclave/v1/dispatch.proto",
    "conclave/v1/expert.proto",
    "conclave/v1/stream.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("conclave.v1.bin");
    let mut config = tonic_prost_build::Config::new();
    config.protoc_executable(protoc_bin_vendored::protoc_bin_path()?);
    tonic_prost_build::configure().bytes(".").file_descriptor_set_path(descriptors).compile_with_config(
        config,
        &FILES,
        &["."],
    )?;
    Ok(())
}
