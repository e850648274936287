//! What a router hosts: a dispatcher over gRPC, and over the streams of members of the same host.

use std::sync::Arc;

use conclave_proto::v1::dispatch_server::{Dispatch, DispatchServer};
use conclave_proto::v1::{MoeInput, MoeOutput};
use conclave_proto::{FINGERPRINT_HEADER, MAX_MESSAGE_BYTES};
use conclave_serve::Stirrer;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::channel::QUEUE;
use crate::dispatcher::Dispatcher;
use crate::stream::{self, Caller, Event, Welcoming};

/// Layers of one stream under way at once; more wait in the connection.
const LAYERS_AT_ONCE: usize = 32;

/// The Dispatch service over one dispatcher.
pub struct DispatchService {
    dispatcher: Arc<Dispatcher>,
    stop: CancellationToken,
    stirrer: Option<Stirrer>,
}

/// A gRPC server for `dispatcher`. Once `stop` is cancelled its streams take no more layers and end after the answers to
/// those that are under way; callers then repeat what was not answered on another router. `stirrer`: of the lane that it
/// is served on, to be kept awake while layers come.
pub fn serve_dispatch(
    dispatcher: Arc<Dispatcher>,
    stop: CancellationToken,
    stirrer: Option<Stirrer>,
) -> DispatchServer<DispatchService> {
    DispatchServer::new(DispatchService { dispatcher, stop, stirrer })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

#[tonic::async_trait]
impl Dispatch for DispatchService {
    type MoeStream = ReceiverStream<Result<MoeOutput, Status>>;

    async fn moe(&self, request: Request<Streaming<MoeInput>>) -> Result<Response<Self::MoeStream>, Status> {
        let expected = self.dispatcher.fingerprint();
        let found = request.metadata().get(FINGERPRINT_HEADER).and_then(|value| value.to_str().ok()).unwrap_or("");
        if found != expected {
            let message = format!("{FINGERPRINT_HEADER}: found {found:?}, expected {expected:?}");
            return Err(Status::failed_precondition(message));
        }
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let stream = LayerStream {
            dispatcher: self.dispatcher.clone(),
            outgoing,
            stop: self.stop.clone(),
            stirrer: self.stirrer.clone(),
        };
        tokio::spawn(stream.serve(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(queue)))
    }
}

/// The layers of one caller.
struct LayerStream {
    dispatcher: Arc<Dispatcher>,
    outgoing: mpsc::Sender<Result<MoeOutput, Status>>,
    stop: CancellationToken,
    stirrer: Option<Stirrer>,
}

impl LayerStream {
    /// Runs the layers side by side. What is under way when the caller goes away is dropped.
    async fn serve(self, mut inputs: Streaming<MoeInput>) {
        let mut layers = FuturesUnordered::new();
        let mut open = true;
        while open || !layers.is_empty() {
            tokio::select! {
                input = inputs.message(), if open && layers.len() < LAYERS_AT_ONCE => match input {
                    Ok(Some(input)) => {
                        // Its shards will answer.
                        self.stir();
                        layers.push(answer(&self.dispatcher, input));
                    }
                    Ok(None) => open = false,
                    Err(_) => return,
                },
                Some(output) = layers.next() => {
                    if self.outgoing.send(Ok(output)).await.is_err() {
                        return;
                    }
                    // The next layer may follow.
                    self.stir();
                }
                () = self.stop.cancelled(), if open => open = false,
                () = self.outgoing.closed() => return,
            }
        }
    }

    fn stir(&self) {
        self.stirrer.iter().for_each(Stirrer::stir);
    }
}

/// The same over the socket for members of the same host; ends after `stop` and the answers to what is under way.
pub async fn serve_dispatch_streams(
    dispatcher: Arc<Dispatcher>,
    instance: String,
    listener: UnixListener,
    stop: CancellationToken,
    stirrer: Option<Stirrer>,
) {
    let fingerprint = dispatcher.fingerprint().to_owned();
    let welcoming = Welcoming { service: "dispatch", instance: Some(instance), fingerprint };
    let ended = stop.clone();
    let talk = move |caller| talk(dispatcher.clone(), caller, ended.clone(), stirrer.clone());
    stream::serve(listener, welcoming, stop, talk).await;
}

/// The layers of one caller of the same host, as [`LayerStream::serve`] runs those of others.
async fn talk(dispatcher: Arc<Dispatcher>, mut caller: Caller, stop: CancellationToken, stirrer: Option<Stirrer>) {
    let stir = || stirrer.iter().for_each(Stirrer::stir);
    let answers = caller.sender.clone();
    let mut layers = FuturesUnordered::new();
    let mut open = true;
    while open || !layers.is_empty() {
        tokio::select! {
            biased;
            event = caller.next(layers.len() < LAYERS_AT_ONCE) => match event {
                Event::Message(input) if open => {
                    stir();
                    layers.push(answer(&dispatcher, input));
                }
                // The caller repeats it elsewhere when this stream ends.
                Event::Message(_) => {}
                Event::Gone => return,
            },
            Some(output) = layers.next() => {
                answers.post(output);
                stir();
            }
            () = stop.cancelled(), if open => open = false,
        }
    }
    // Of a connection that breaks now nobody is left to be told.
    let _ = answers.flush().await;
}

async fn answer(dispatcher: &Dispatcher, input: MoeInput) -> MoeOutput {
    let (step, layer, attempt) = (input.step, input.layer, input.attempt);
    dispatcher.call(input).await.unwrap_or_else(|error| MoeOutput {
        step,
        layer,
        attempt,
        error: Some(error.to_wire()),
        ..MoeOutput::default()
    })
}
