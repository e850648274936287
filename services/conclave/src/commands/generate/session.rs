//! A request over as many connections as it takes.

use std::{
    error::Error as _,
    io::Write,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use conclave_proto::{
    MAX_MESSAGE_BYTES,
    v1::{GenerateRequest, GetModelRequest, Model, inference_client::InferenceClient},
};
use conclave_serve::args::endpoint;
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use super::{output::Output, progress::Progress, request::milliseconds};
use crate::commands::{EXPECTED_GRPC, Pauses, RetryArgs, cause};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A server that hangs or whose host is gone is noticed after this and as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Whom to ask, and how patiently.
#[derive(Debug, Clone, Args)]
pub struct SessionArgs {
    /// The server's gRPC API, http://host:port.
    #[arg(long, env = "CONCLAVE_GRPC_URL", value_name = "URL", default_value = "http://127.0.0.1:50051", value_parser = endpoint)]
    pub url: String,
    /// API key, where the server asks for one.
    #[arg(long, env = "CONCLAVE_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    #[command(flatten)]
    pub retry: RetryArgs,
}

/// Why an attempt did not bring all of the answer.
enum Failure {
    /// The server may be there again later, and go on.
    Broken(String),
    /// It would be the same every time.
    Final(anyhow::Error),
}

/// Whom the attempts talk to.
struct Server {
    endpoint: Endpoint,
    url: String,
    key: Option<MetadataValue<Ascii>>,
    /// As it was when it first answered.
    model: Option<Model>,
}

/// Sends the request and writes its answer, over one connection after another.
///
/// # Errors
/// When nobody is there at first, the server refuses, or the tries are spent.
pub async fn run<W: Write>(args: &SessionArgs, request: GenerateRequest, output: &mut Output<W>) -> Result<()> {
    let deadline = (request.timeout_ms > 0).then(|| Instant::now() + Duration::from_millis(request.timeout_ms));
    let (mut server, mut progress) = (Server::new(args)?, Progress::new(request));
    let mut pauses = Pauses::new(args.retry.retries);
    loop {
        let before = progress.tokens();
        let failed = server.attempt(&mut progress, deadline, output).await;
        let lost = match failed {
            Ok(()) => break,
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Broken(lost)) if server.model.is_none() => bail!(lost),
            Err(Failure::Broken(lost)) => lost,
        };
        progress.broke();
        if progress.tokens() > before {
            pauses.reset();
        }
        let tokens = progress.tokens();
        let Some((pause, number)) = pauses.next() else {
            bail!("{} tries to go on after {tokens} tokens failed, the last one so: {lost}", args.retry.retries);
        };
        let tries = format!("try {number} of {}", args.retry.retries);
        output.note(&format!("{lost}; going on after {tokens} tokens in {:.1} s ({tries})", pause.as_secs_f64()));
        tokio::time::sleep(pause).await;
    }
    output.end();
    Ok(())
}

impl Server {
    fn new(args: &SessionArgs) -> Result<Self> {
        let endpoint = Endpoint::from_shared(args.url.clone()).with_context(|| format!("--url {}", args.url))?;
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE);
        let key = args.api_key.as_ref().map(|key| format!("Bearer {key}").parse());
        let key = key.transpose().context("--api-key: expected visible ASCII characters")?;
        Ok(Self { endpoint, url: args.url.clone(), key, model: None })
    }

    /// Asks for what is missing and takes in what comes.
    async fn attempt<W: Write>(
        &mut self,
        progress: &mut Progress,
        deadline: Option<Instant>,
        output: &mut Output<W>,
    ) -> Result<(), Failure> {
        let absent = |error| Failure::Broken(format!("no answer from {}: {}", self.url, cause(&error)));
        let channel = self.endpoint.connect().await.map_err(absent)?;
        let mut client = InferenceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        self.identify(&mut client, progress).await?;
        let request = GenerateRequest { timeout_ms: left(deadline)?, ..progress.rest() };
        let refused = |status| refusal(status, progress.tokens() > 0);
        let mut events = client.generate(self.request(request)).await.map_err(refused)?.into_inner();
        while let Some(event) = events.message().await.map_err(failure)? {
            let news = progress.accept(event);
            let news = news.map_err(|wrong| Failure::Final(anyhow!("the answer of {}: {wrong}", self.url)))?;
            news.iter().try_for_each(|event| output.event(event)).map_err(|error| Failure::Final(error.into()))?;
            if progress.complete() {
                return Ok(());
            }
        }
        Err(Failure::Broken("connection lost: the stream ended before the answer".to_owned()))
    }

    /// Makes sure that whoever is there now serves the checkpoint that made the answer so far.
    async fn identify(
        &mut self,
        client: &mut InferenceClient<Channel>,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        let asked = client.get_model(self.request(GetModelRequest {})).await;
        let model = asked.map_err(|status| self.first_failure(status))?.into_inner();
        let known = self.model.get_or_insert_with(|| model.clone());
        if known.fingerprint != model.fingerprint {
            let (found, expected) = (&model.fingerprint, &known.fingerprint);
            let found = format!("found a checkpoint with fingerprint {found}, expected {expected}");
            return Err(Failure::Final(anyhow!("{} serves another model now: {found}", self.url)));
        }
        if !known.numerics.is_empty() && !model.numerics.is_empty() && known.numerics != model.numerics {
            progress.mix();
        }
        Ok(())
    }

    /// Why nobody said what is served. A server of something else answers nonsense, as the HTTP API does.
    fn first_failure(&self, status: Status) -> Failure {
        let nonsense = matches!(status.code(), Code::Unimplemented | Code::Unknown | Code::Internal);
        if self.model.is_none() && nonsense && status.source().is_none() {
            return Failure::Final(anyhow!("{}: {}: {EXPECTED_GRPC}", self.url, status.message()));
        }
        failure(status)
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(key) = &self.key {
            request.metadata_mut().insert("authorization", key.clone());
        }
        request
    }
}

/// Milliseconds up to the deadline; 0 where there is none.
fn left(deadline: Option<Instant>) -> Result<u64, Failure> {
    match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
        None => Ok(0),
        Some(Duration::ZERO) => Err(Failure::Final(anyhow!("--timeout is over"))),
        Some(left) => Ok(milliseconds(left)),
    }
}

/// A status that the transport made (it has a source) is a lost connection, whatever code it was given. A server that
/// cannot serve now may do so later.
fn failure(status: Status) -> Failure {
    if let Some(source) = status.source() {
        return Failure::Broken(format!("connection lost: {}", cause(source)));
    }
    match status.code() {
        Code::Unavailable => Failure::Broken(status.message().to_owned()),
        Code::Unauthenticated => Failure::Final(anyhow!("{}; --api-key gives one", status.message())),
        Code::Unimplemented => Failure::Final(anyhow!("this server does not speak conclave.v1: {}", status.message())),
        _ => Failure::Final(anyhow!("{}", status.message())),
    }
}

/// Why a server did not take a request. One that is full takes the rest of an answer later.
fn refusal(status: Status, going_on: bool) -> Failure {
    match status.code() {
        Code::ResourceExhausted if going_on => Failure::Broken(status.message().to_owned()),
        _ => failure(status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_is_tried_again() {
        assert!(matches!(failure(Status::unavailable("draining")), Failure::Broken(why) if why == "draining"));
        let reset = std::io::Error::new(std::io::ErrorKind::ConnectionReset, "reset");
        assert!(
            matches!(failure(Status::from_error(Box::new(reset))), Failure::Broken(why) if why == "connection lost: reset")
        );
        for status in [Status::invalid_argument("x"), Status::deadline_exceeded("x"), Status::internal("x")] {
            assert!(matches!(failure(status), Failure::Final(_)));
        }
        let full = || Status::resource_exhausted("full");
        assert!(matches!(refusal(full(), false), Failure::Final(_)), "a new request is refused at once");
        assert!(matches!(refusal(full(), true), Failure::Broken(_)));
    }
}
