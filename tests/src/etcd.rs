//! A single etcd on free loopback ports.

use std::{path::Path, time::Duration};

use anyhow::Result;
use tempfile::TempDir;

use crate::{Process, free_port};

/// A running etcd with its own empty data folder.
pub struct Etcd {
    process: Process,
    /// Client endpoint.
    pub url: String,
    _data: TempDir,
}

impl Etcd {
    /// Starts it and waits until it answers. `make deps` installs the program.
    pub async fn start() -> Result<Self> {
        Self::start_on(free_port()).await
    }

    /// The same, on a loopback port of the caller's choice.
    pub async fn start_on(port: u16) -> Result<Self> {
        let data = TempDir::new()?;
        let url = format!("http://127.0.0.1:{port}");
        let peer = format!("http://127.0.0.1:{}", free_port());
        let args: Vec<String> = [
            "--name=test",
            &format!("--data-dir={}", data.path().join("data").display()),
            &format!("--listen-client-urls={url}"),
            &format!("--advertise-client-urls={url}"),
            &format!("--listen-peer-urls={peer}"),
            &format!("--initial-advertise-peer-urls={peer}"),
            &format!("--initial-cluster=test={peer}"),
        ]
        .iter()
        .map(ToString::to_string)
        .collect();
        let mut process = Process::spawn(data.path(), "etcd", Path::new("etcd"), &args)?;
        process.wait_ready(&format!("{url}/health"), Duration::from_secs(20)).await?;
        Ok(Self { process, url, _data: data })
    }

    /// The process, to stop or kill it.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
