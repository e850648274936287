//! The gRPC adapter of a dispatcher: what a router hosts.

use std::sync::Arc;

use conclave_proto::v1::dispatch_server::{Dispatch, DispatchServer};
use conclave_proto::v1::{MoeInput, MoeOutput};
use conclave_proto::{FINGERPRINT_HEADER, MAX_MESSAGE_BYTES};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::channel::QUEUE;
use crate::dispatcher::Dispatcher;

/// Layers of one stream under way at once; more wait in the connection.
const LAYERS_AT_ONCE: usize = 32;

/// The Dispatch service over one dispatcher.
pub struct DispatchService {
    dispatcher: Arc<Dispatcher>,
    stop: CancellationToken,
}

/// A gRPC server for `dispatcher`. Once `stop` is cancelled its streams take no more layers and end after the answers to
/// those that are under way; callers then repeat what was not answered on another router.
pub fn serve_dispatch(dispatcher: Arc<Dispatcher>, stop: CancellationToken) -> DispatchServer<DispatchService> {
    DispatchServer::new(DispatchService { dispatcher, stop })
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
        tokio::spawn(serve_stream(self.dispatcher.clone(), request.into_inner(), outgoing, self.stop.clone()));
        Ok(Response::new(ReceiverStream::new(queue)))
    }
}

/// Runs the layers of one stream side by side. What is under way when the caller goes away is dropped.
async fn serve_stream(
    dispatcher: Arc<Dispatcher>,
    mut inputs: Streaming<MoeInput>,
    outgoing: mpsc::Sender<Result<MoeOutput, Status>>,
    stop: CancellationToken,
) {
    let mut layers = FuturesUnordered::new();
    let mut open = true;
    while open || !layers.is_empty() {
        tokio::select! {
            input = inputs.message(), if open && layers.len() < LAYERS_AT_ONCE => match input {
                Ok(Some(input)) => layers.push(answer(&dispatcher, input)),
                Ok(None) => open = false,
                Err(_) => return,
            },
            Some(output) = layers.next() => {
                if outgoing.send(Ok(output)).await.is_err() {
                    return;
                }
            }
            () = stop.cancelled(), if open => open = false,
            () = outgoing.closed() => return,
        }
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
