//! Dispatch hosted by a router, as attention uses it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use conclave_cluster::{ClusterView, Member, MemberState, Membership, Role};
use conclave_proto::v1::dispatch_client::DispatchClient;
use conclave_proto::v1::{Hello, MoeInput, MoeOutput};
use conclave_proto::{FINGERPRINT_HEADER, InstanceId, MAX_MESSAGE_BYTES};
use conclave_serve::{Error, ErrorKind, telemetry};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::AsciiMetadataValue;
use tonic::{Code, Request};

use super::answers;
use super::channel::{self, QUEUE};
use super::outgoing::Outgoing;
use super::pending::Pending;
use crate::error;
use crate::link::MoeLink;
use crate::stream::OpenError;

const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// How attention reaches a router.
#[derive(Debug, Clone)]
pub struct RemoteConfig {
    /// Fingerprint of the checkpoint.
    pub fingerprint: String,
    /// Incarnation of the caller: decides which of several routers it prefers.
    pub caller: u64,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest wait for a router that hosts dispatch.
    pub no_router_timeout: Duration,
    /// Longest layer call where the caller sets no budget.
    pub call_timeout: Duration,
    /// Name of this host, for the short way to routers on it; `None`: TCP only.
    pub host: Option<String>,
}

impl RemoteConfig {
    /// The defaults.
    pub fn new(fingerprint: impl Into<String>, caller: u64) -> Self {
        Self {
            fingerprint: fingerprint.into(),
            caller,
            connect_timeout: Duration::from_secs(2),
            no_router_timeout: Duration::from_secs(30),
            call_timeout: Duration::from_secs(180),
            host: None,
        }
    }
}

/// Sends layers to one router of the cluster, and to another when that one fails.
pub struct RemoteDispatch {
    config: RemoteConfig,
    view: watch::Receiver<Arc<ClusterView>>,
    stream: Mutex<Option<Arc<RouterStream>>>,
}

/// Step, layer, attempt.
type Key = (u64, u32, u32);

struct RouterStream {
    router: InstanceId,
    outgoing: Outgoing<MoeInput>,
    pending: Arc<Pending<Key, MoeOutput>>,
}

impl RemoteDispatch {
    /// Finds routers in the membership's view.
    pub fn new(config: RemoteConfig, membership: &dyn Membership) -> Arc<Self> {
        Arc::new(Self { config, view: membership.watch(), stream: Mutex::new(None) })
    }

    /// Repeats the layer until a router answers or the time is over.
    async fn call(&self, mut input: MoeInput, deadline: Instant) -> Result<MoeOutput, Error> {
        let mut failed: Vec<InstanceId> = Vec::new();
        let mut since: Option<Instant> = None;
        let mut last = "none is registered".to_owned();
        let mut pause = SHORTEST_PAUSE;
        let mut changes = self.view.clone();
        loop {
            changes.mark_unchanged();
            match self.router_stream(&failed).await {
                Ok(Some(stream)) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    input.budget_us = (left.as_micros() as u64).max(1);
                    match stream.layer(input.clone()).await {
                        Ok(output) => return finish(output),
                        Err(message) => last = message,
                    }
                    tracing::warn!(router = %stream.router, layer = input.layer, reason = last, "layer is repeated");
                    self.forget(&stream).await;
                    failed.push(stream.router.clone());
                    input.attempt += 1;
                }
                Ok(None) => {
                    let waited = since.get_or_insert_with(Instant::now).elapsed();
                    if waited >= self.config.no_router_timeout {
                        let message = format!("no router that hosts dispatch within {} ms: {last}", waited.as_millis());
                        return Err(Error::new(ErrorKind::Unavailable, message));
                    }
                    tokio::select! {
                        _ = changes.changed() => {}
                        () = sleep(pause) => {}
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    failed.clear();
                }
                Err((router, message)) => {
                    tracing::warn!(%router, reason = message, "router cannot be reached");
                    failed.push(router);
                    last = message;
                }
            }
            since.get_or_insert_with(Instant::now);
        }
    }

    /// The open stream, or a new one to the router that comes first for this caller among those not failed.
    async fn router_stream(&self, failed: &[InstanceId]) -> Result<Option<Arc<RouterStream>>, (InstanceId, String)> {
        let mut slot = self.stream.lock().await;
        let view = self.view.borrow().clone();
        if let Some(stream) = slot.as_ref() {
            if stream.pending.closed().is_none() && !failed.contains(&stream.router) && !replaced(&view, &stream.router)
            {
                return Ok(Some(stream.clone()));
            }
            *slot = None;
        }
        let Some(member) = choose(&view, self.config.caller, failed) else { return Ok(None) };
        let stream = Arc::new(self.connect(member).await.map_err(|message| (member.instance.clone(), message))?);
        *slot = Some(stream.clone());
        Ok(Some(stream))
    }

    async fn connect(&self, member: &Member) -> Result<RouterStream, String> {
        let deadline = Instant::now() + self.config.connect_timeout;
        let opened = timeout_at(deadline, async {
            if let Some(socket) = member.socket_on(self.config.host.as_deref()) {
                match self.open(member, socket).await {
                    Ok(stream) => return Ok(stream),
                    Err(reason) => {
                        tracing::info!(router = %member.instance, reason, "not reached as a member of this host");
                    }
                }
            }
            self.dial(member).await
        });
        let stream = opened.await.map_err(|_| format!("{}: no answer in time", member.address))??;
        tracing::info!(router = %member.instance, transport = stream.outgoing.transport().name(), "connected");
        Ok(stream)
    }

    /// Over gRPC.
    async fn dial(&self, member: &Member) -> Result<RouterStream, String> {
        let channel = channel::connect(&member.address, self.config.connect_timeout).await?;
        let mut client = DispatchClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let mut request = Request::new(ReceiverStream::new(queue));
        let fingerprint = AsciiMetadataValue::try_from(self.config.fingerprint.as_str())
            .map_err(|_| format!("{FINGERPRINT_HEADER}: cannot be sent as metadata"))?;
        request.metadata_mut().insert(FINGERPRINT_HEADER, fingerprint);
        let answers = client.moe(request).await.map_err(|status| match status.code() {
            Code::FailedPrecondition => format!("refused: {}", status.message()),
            _ => status.message().to_owned(),
        })?;
        let pending = Pending::new();
        tokio::spawn(answers::demultiplex(answers.into_inner(), "the router", pending.clone(), settle));
        Ok(RouterStream { router: member.instance.clone(), outgoing: Outgoing::Grpc(outgoing), pending })
    }

    /// Over the socket of a member of this host.
    async fn open(&self, member: &Member, socket: &str) -> Result<RouterStream, String> {
        let pending = Pending::new();
        let (instance, fingerprint) = (member.instance.0.clone(), self.config.fingerprint.clone());
        let hello = Hello { service: "dispatch".to_owned(), instance, fingerprint, pair: None };
        match answers::open(socket, hello, pending.clone(), settle).await {
            Ok((outgoing, _)) => Ok(RouterStream { router: member.instance.clone(), outgoing, pending }),
            Err(OpenError::Lost(reason)) => Err(reason),
            Err(OpenError::Refused(reason)) => Err(format!("refused: {reason}")),
        }
    }

    async fn forget(&self, stream: &Arc<RouterStream>) {
        let mut slot = self.stream.lock().await;
        if slot.as_ref().is_some_and(|open| Arc::ptr_eq(open, stream)) {
            *slot = None;
        }
    }
}

impl RouterStream {
    /// One layer over this stream. The error says why no answer will come.
    async fn layer(&self, input: MoeInput) -> Result<MoeOutput, String> {
        let mut ticket = self.pending.register((input.step, input.layer, input.attempt))?;
        if !self.outgoing.send(input).await {
            return Err(self.pending.closed().unwrap_or_else(|| "the stream is closed".to_owned()));
        }
        ticket.wait().await
    }
}

fn settle(pending: &Pending<Key, MoeOutput>, output: MoeOutput) {
    pending.answer(&(output.step, output.layer, output.attempt), output);
}

fn finish(mut output: MoeOutput) -> Result<MoeOutput, Error> {
    match output.error.take() {
        Some(failed) => Err(error::from_wire(failed)),
        None => Ok(output),
    }
}

/// Of the routers that host dispatch, the one with the highest hash for this caller: callers spread over the routers, and
/// each keeps its own while the others come and go. One that is leaving comes last: it serves until its own requests are
/// done.
fn choose<'a>(view: &'a ClusterView, caller: u64, failed: &[InstanceId]) -> Option<&'a Member> {
    let able = hosts(view).filter(|m| m.state != MemberState::Loading && !failed.contains(&m.instance));
    able.max_by_key(|m| (m.state == MemberState::Ready, rendezvous(caller, &m.instance.0), &m.instance.0))
}

/// Whether a router is on its way out and another one is there.
fn replaced(view: &ClusterView, router: &InstanceId) -> bool {
    hosts(view).any(|m| m.instance == *router && m.state == MemberState::Leaving)
        && hosts(view).any(|m| m.state == MemberState::Ready)
}

fn hosts(view: &ClusterView) -> impl Iterator<Item = &Member> {
    view.members.iter().filter(|m| m.role == Role::Router && m.hosts_dispatch)
}

/// FNV-1a over the caller and the name.
fn rendezvous(caller: u64, name: &str) -> u64 {
    let bytes = caller.to_le_bytes().into_iter().chain(name.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[async_trait]
impl MoeLink for RemoteDispatch {
    async fn moe(&self, mut input: MoeInput) -> Result<MoeOutput, Error> {
        if input.traceparent.is_empty() {
            input.traceparent = telemetry::traceparent();
        }
        let budget = match input.budget_us {
            0 => self.config.call_timeout,
            us => Duration::from_micros(us),
        };
        let (layer, attempt) = (input.layer, input.attempt);
        let deadline = Instant::now() + budget;
        match timeout_at(deadline, self.call(input, deadline)).await {
            Ok(result) => result.map(|output| MoeOutput { attempt, ..output }),
            Err(_) => {
                let message = format!("layer {layer}: budget of {} ms spent", budget.as_millis());
                Err(Error::new(ErrorKind::DeadlineExceeded, message))
            }
        }
    }
}
