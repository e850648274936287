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
        let layers =
            Layers { dispatcher: self.dispatcher.clone(), stop: self.stop.clone(), stirrer: self.stirrer.clone() };
        let peer = GrpcPeer { inputs: request.into_inner(), outgoing };
        tokio::spawn(async move { layers.serve(peer).await });
        Ok(Response::new(ReceiverStream::new(queue)))
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
    let layers = Layers { dispatcher, stop: stop.clone(), stirrer };
    let talk = move |caller, _| {
        let layers = layers.clone();
        async move { layers.serve(caller).await }
    };
    stream::serve(listener, welcoming, stop, stream::without_pairs, talk).await;
}

/// The caller at the other end of a stream of layers.
trait Peer {
    /// Its next layer, if `take`; meanwhile answers are written. Cancel-safe.
    fn next(&mut self, take: bool) -> impl Future<Output = Heard> + Send;
    /// Sends an answer. False: nobody is left to be told.
    fn answer(&mut self, output: MoeOutput) -> impl Future<Output = bool> + Send;
    /// Writes the answers that are not written yet.
    fn flush(&mut self) -> impl Future<Output = ()> + Send;
}

/// What comes from a caller.
enum Heard {
    /// A layer.
    Layer(MoeInput),
    /// It sends no more, and waits for answers.
    End,
    /// It has gone.
    Gone,
}

struct GrpcPeer {
    inputs: Streaming<MoeInput>,
    outgoing: mpsc::Sender<Result<MoeOutput, Status>>,
}

impl Peer for GrpcPeer {
    async fn next(&mut self, take: bool) -> Heard {
        tokio::select! {
            biased;
            input = self.inputs.message(), if take => match input {
                Ok(Some(input)) => Heard::Layer(input),
                Ok(None) => Heard::End,
                Err(_) => Heard::Gone,
            },
            () = self.outgoing.closed() => Heard::Gone,
        }
    }

    async fn answer(&mut self, output: MoeOutput) -> bool {
        self.outgoing.send(Ok(output)).await.is_ok()
    }

    /// The task of the connection does.
    async fn flush(&mut self) {}
}

impl Peer for Caller {
    async fn next(&mut self, take: bool) -> Heard {
        match Self::next(self, take).await {
            Event::Message(input) => Heard::Layer(input),
            Event::Gone | Event::Nonsense => Heard::Gone,
        }
    }

    /// Of a connection that is closed its next message tells.
    async fn answer(&mut self, output: MoeOutput) -> bool {
        self.sender.post(output);
        true
    }

    async fn flush(&mut self) {
        // Of a connection that breaks now nobody is left to be told.
        let _ = self.sender.flush().await;
    }
}

/// What runs the layers of callers.
#[derive(Clone)]
struct Layers {
    dispatcher: Arc<Dispatcher>,
    stop: CancellationToken,
    stirrer: Option<Stirrer>,
}

impl Layers {
    /// Runs the layers of one caller side by side. What is under way when it goes away is dropped.
    async fn serve(&self, mut peer: impl Peer) {
        let mut layers = FuturesUnordered::new();
        let (mut open, mut ended) = (true, false);
        while open || !layers.is_empty() {
            tokio::select! {
                biased;
                heard = peer.next(!ended && layers.len() < LAYERS_AT_ONCE) => match heard {
                    Heard::Layer(input) if open => {
                        // Its shards will answer.
                        self.stir();
                        layers.push(answer(&self.dispatcher, input));
                    }
                    // The caller repeats it elsewhere when this stream ends.
                    Heard::Layer(_) => {}
                    Heard::End => (open, ended) = (false, true),
                    Heard::Gone => return,
                },
                Some(output) = layers.next() => {
                    if !peer.answer(output).await {
                        return;
                    }
                    // The next layer may follow.
                    self.stir();
                }
                () = self.stop.cancelled(), if open => open = false,
            }
        }
        peer.flush().await;
    }

    fn stir(&self) {
        self.stirrer.iter().for_each(Stirrer::stir);
    }
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
