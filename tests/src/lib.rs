//! What the end-to-end tests share: real processes on free loopback ports, a real etcd, and a client.

mod client;
mod cluster;
mod etcd;
mod process;

pub use client::{Answer, Client, chat, gather, greedy, sampled, tokens};
pub use cluster::{Cluster, ClusterSpec, Serve};
pub use etcd::Etcd;
pub use process::{Process, free_port};

use std::path::PathBuf;

/// The repository's root.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The bundled demo checkpoint.
pub fn demo_model() -> PathBuf {
    root().join("tests/fixtures/demo-model")
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
