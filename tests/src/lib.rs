//! What the end-to-end tests share: real processes on free loopback ports, a real etcd, and a client.

mod client;
mod cluster;
mod etcd;
mod process;

pub use client::{Answer, Client, chat, gather, greedy, sampled, tokens};
pub use cluster::{Cluster, ClusterSpec, Serve};
pub use etcd::Etcd;
pub use process::{Process, free_port};

use std::{fs, path::PathBuf};

use tempfile::TempDir;

/// The repository's root.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The bundled demo checkpoint.
pub fn demo_model() -> PathBuf {
    root().join("tests/fixtures/demo-model")
}

/// A copy of the demo checkpoint, to be changed.
///
/// # Panics
/// When a file cannot be copied.
pub fn demo_copy() -> TempDir {
    let dir = TempDir::new().expect("a temporary folder");
    for file in fs::read_dir(demo_model()).expect("the demo checkpoint") {
        let file = file.expect("an entry of it");
        fs::copy(file.path(), dir.path().join(file.file_name())).expect("a copy of a file");
    }
    dir
}

/// The demo checkpoint with other weights under the same headers: one bit of the last tensor differs.
///
/// # Panics
/// As for [`demo_copy`].
pub fn demo_with_other_weights() -> TempDir {
    let dir = demo_copy();
    let weights = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).expect("the weights");
    *bytes.last_mut().expect("some weights") ^= 0x40;
    fs::write(&weights, bytes).expect("other weights");
    dir
}

/// The `conclave` binary that was built with the tests.
///
/// # Panics
/// When it is not there: `cargo build --release` makes it.
pub fn binary() -> PathBuf {
    let mut path = std::env::current_exe().expect("path of the test binary");
    path.pop();
    path.pop();
    path.push("conclave");
    assert!(path.exists(), "{} is not built: run `cargo build --release` first", path.display());
    path
}
