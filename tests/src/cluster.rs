//! Conclave as a person starts it: `serve` in one process, or a cluster of processes with etcd.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::{Client, Etcd, Process, binary, demo_model, free_port};

const START_LIMIT: Duration = Duration::from_secs(60);

/// What a cluster is made of.
#[derive(Clone)]
pub struct ClusterSpec {
    /// Checkpoint folder.
    pub model: PathBuf,
    /// `reference` or `cpu`.
    pub device: &'static str,
    /// One entry an expert process: its placement flag, as `--cells=0-3`, and what else it is told.
    pub experts: Vec<String>,
    /// `router` or `embedded`.
    pub dispatch: &'static str,
    /// Attention replicas.
    pub attentions: usize,
    /// Further flags of every attention process.
    pub attention_flags: Vec<String>,
    /// Further flags of every process.
    pub flags: Vec<String>,
}

impl Default for ClusterSpec {
    fn default() -> Self {
        Self {
            model: demo_model(),
            device: "cpu",
            experts: vec!["--shard=1/1".into()],
            dispatch: "router",
            attentions: 1,
            attention_flags: Vec::new(),
            flags: Vec::new(),
        }
    }
}

impl ClusterSpec {
    /// `n` expert processes with equal parts of the cells.
    pub fn even(n: usize) -> Self {
        Self { experts: (1..=n).map(|i| format!("--shard={i}/{n}")).collect(), ..Self::default() }
    }
}

/// A running cluster.
pub struct Cluster {
    /// Expert processes in the order of the spec, then late ones.
    pub experts: Vec<Process>,
    /// Attention processes.
    pub attentions: Vec<Process>,
    /// The router.
    pub router: Process,
    /// Its HTTP base URL.
    pub http: String,
    /// Its gRPC URL.
    pub grpc: String,
    /// The coordinator.
    pub etcd: Etcd,
    /// Logs.
    pub dir: TempDir,
    spec: ClusterSpec,
}

impl Cluster {
    /// Starts etcd and all processes, and waits until the router is ready.
    pub async fn start(spec: ClusterSpec) -> Result<Self> {
        let dir = TempDir::new()?;
        let etcd = Etcd::start().await?;
        let experts = spec
            .experts
            .iter()
            .enumerate()
            .map(|(i, placement)| spawn_expert(&dir, &spec, &etcd.url, i, placement))
            .collect::<Result<Vec<_>>>()?;
        let attentions =
            (0..spec.attentions).map(|i| spawn_attention(&dir, &spec, &etcd.url, i)).collect::<Result<Vec<_>>>()?;
        let (http, grpc) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        let mut args = vec![
            "router".into(),
            format!("--model={}", spec.model.display()),
            format!("--etcd={}", etcd.url),
            format!("--http={http}"),
            format!("--grpc={grpc}"),
        ];
        args.extend(spec.flags.iter().cloned());
        let router = Process::spawn(dir.path(), "router", &binary(), &args)?;
        let (http, grpc) = (format!("http://{http}"), format!("http://{grpc}"));
        let mut cluster = Self { experts, attentions, router, http, grpc, etcd, dir, spec };
        cluster.wait_ready().await?;
        Ok(cluster)
    }

    async fn wait_ready(&mut self) -> Result<()> {
        let url = format!("{}/readyz", self.http);
        if let Err(error) = self.router.wait_ready(&url, START_LIMIT).await {
            let logs =
                self.experts.iter().chain(&self.attentions).map(Process::log).collect::<Vec<_>>().join("\n---\n");
            return Err(error.context(logs));
        }
        Ok(())
    }

    /// Starts one more expert process.
    pub fn add_expert(&mut self, placement: &str) -> Result<()> {
        let process = spawn_expert(&self.dir, &self.spec, &self.etcd.url, self.experts.len(), placement)?;
        self.experts.push(process);
        Ok(())
    }

    /// Starts a process of the spec that has ended again, under the same name.
    pub fn start_expert_again(&mut self, i: usize) -> Result<()> {
        self.experts[i] = spawn_expert(&self.dir, &self.spec, &self.etcd.url, i, &self.spec.experts[i])?;
        Ok(())
    }

    /// A client of its router.
    pub async fn client(&self) -> Result<Client> {
        Client::connect(&self.grpc).await
    }

    /// The router's metrics.
    pub async fn metrics(&self) -> Result<String> {
        Ok(reqwest::get(format!("{}/metrics", self.http)).await?.text().await?)
    }

    /// Waits until `n` members of a role are ready, or says who was there.
    pub async fn wait_members(&self, role: &str, n: usize) -> Result<()> {
        let client = self.client().await?;
        for _ in 0..600 {
            let members = client.cluster().await?.members;
            if members.iter().filter(|m| m.role == role && m.state == "ready").count() == n {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        anyhow::bail!("{n} ready members of role {role} expected; found {:#?}", client.cluster().await?.members)
    }
}

fn common(spec: &ClusterSpec, etcd: &str, role: &str, id: String) -> Vec<String> {
    let mut args = vec![
        role.into(),
        format!("--model={}", spec.model.display()),
        format!("--etcd={etcd}"),
        format!("--device={}", spec.device),
        "--threads=1".into(),
        "--lease-ttl=3".into(),
        "--grpc=127.0.0.1:0".into(),
        "--admin=127.0.0.1:0".into(),
        format!("--id={id}"),
    ];
    args.extend(spec.flags.iter().cloned());
    args
}

fn spawn_expert(dir: &TempDir, spec: &ClusterSpec, etcd: &str, i: usize, placement: &str) -> Result<Process> {
    let name = format!("expert-{i}");
    let mut args = common(spec, etcd, "expert", name.clone());
    args.extend(placement.split_whitespace().map(str::to_owned));
    Process::spawn(dir.path(), &name, &binary(), &args)
}

fn spawn_attention(dir: &TempDir, spec: &ClusterSpec, etcd: &str, i: usize) -> Result<Process> {
    let name = format!("attention-{i}");
    let mut args = common(spec, etcd, "attention", name.clone());
    args.push(format!("--dispatch={}", spec.dispatch));
    args.extend(spec.attention_flags.iter().cloned());
    Process::spawn(dir.path(), &name, &binary(), &args)
}

/// `conclave serve`: everything in one process.
pub struct Serve {
    /// The process.
    pub process: Process,
    /// HTTP base URL.
    pub http: String,
    /// gRPC URL.
    pub grpc: String,
    /// How long it took to be ready.
    pub ready_after: Duration,
    args: Vec<String>,
    dir: TempDir,
}

impl Serve {
    /// Starts it with further flags and waits until it is ready.
    pub async fn start(flags: &[&str]) -> Result<Self> {
        let dir = TempDir::new()?;
        let (http, grpc) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
        let mut args = vec!["serve".to_owned(), format!("--http={http}"), format!("--grpc={grpc}")];
        args.extend(flags.iter().map(ToString::to_string));
        let mut process = Process::spawn(dir.path(), "serve", &binary(), &args)?;
        let (http, grpc) = (format!("http://{http}"), format!("http://{grpc}"));
        let ready_after = process.wait_ready(&format!("{http}/readyz"), START_LIMIT).await.context("serve")?;
        Ok(Self { process, http, grpc, ready_after, args, dir })
    }

    /// Kills it, starts it again on the same ports, with further flags, and waits until it is ready.
    pub async fn kill_and_start_again(&mut self, flags: &[&str]) -> Result<()> {
        self.process.kill()?;
        let args: Vec<String> = self.args.iter().cloned().chain(flags.iter().map(ToString::to_string)).collect();
        self.process = Process::spawn(self.dir.path(), "serve-again", &binary(), &args)?;
        self.process.wait_ready(&format!("{}/readyz", self.http), START_LIMIT).await.context("serve again")?;
        Ok(())
    }

    /// A client of it.
    pub async fn client(&self) -> Result<Client> {
        Client::connect(&self.grpc).await
    }
}
