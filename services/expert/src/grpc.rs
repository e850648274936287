//! The gRPC adapter of the service.

use std::collections::HashMap;
use std::sync::Arc;

use conclave_kernels::Device;
use conclave_proto::v1::expert_server::{Expert, ExpertServer};
use conclave_proto::v1::{
    DrainRequest, DrainResponse, ExpertBatch, ExpertResult, ExpertStatus, LoadCellsRequest, LoadCellsResponse,
    PairOffer, StatusRequest, UnloadCellsRequest, UnloadCellsResponse, WorkId,
};
use conclave_proto::{FINGERPRINT_HEADER, INSTANCE_HEADER, MAX_MESSAGE_BYTES, PAIR_HEADER};
use conclave_serve::{Error, ErrorKind};
use futures::future::{AbortHandle, Aborted, abortable};
use futures::stream::{FuturesUnordered, StreamExt};
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{BinaryMetadataValue, MetadataMap};
use tonic::{Request, Response, Status, Streaming};

use crate::error::ExpertError;
use crate::pair::OpenPair;
use crate::reply::Waiting;
use crate::service::ExpertService;

/// Batches of one stream under way at once; more wait in the connection.
const BATCHES_AT_ONCE: usize = 256;
/// Answers that wait to be written.
const QUEUE: usize = 64;

/// The Expert service over gRPC.
pub struct ExpertGrpc<D: Device> {
    service: Arc<ExpertService<D>>,
}

impl<D: Device> ExpertService<D> {
    /// A gRPC server for this shard.
    pub fn grpc_server(self: &Arc<Self>) -> ExpertServer<ExpertGrpc<D>> {
        ExpertServer::new(ExpertGrpc { service: self.clone() })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }
}

#[tonic::async_trait]
impl<D: Device> Expert for ExpertGrpc<D> {
    type ComputeStream = ReceiverStream<Result<ExpertResult, Status>>;

    async fn compute(&self, request: Request<Streaming<ExpertBatch>>) -> Result<Response<Self::ComputeStream>, Status> {
        expect(request.metadata(), INSTANCE_HEADER, self.service.instance())?;
        expect(request.metadata(), FINGERPRINT_HEADER, self.service.fingerprint())?;
        let (grant, pair) = offer(request.metadata())?.map(|offer| self.service.grant(&offer)).unzip();
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let (service, pair, handles) = (self.service.clone(), pair.flatten(), HashMap::new());
        tokio::spawn(BatchStream { service, pair, outgoing, handles }.serve(request.into_inner()));
        let mut response = Response::new(ReceiverStream::new(queue));
        if let Some(grant) = grant {
            response.metadata_mut().insert_bin(PAIR_HEADER, BinaryMetadataValue::from_bytes(&grant.encode_to_vec()));
        }
        Ok(response)
    }

    async fn load_cells(&self, request: Request<LoadCellsRequest>) -> Result<Response<LoadCellsResponse>, Status> {
        let cells = request.into_inner().cells.into_iter().map(Into::into).collect();
        let held = self.service.load_cells(cells).await.map_err(status)?;
        Ok(Response::new(LoadCellsResponse { held: held.into_iter().map(Into::into).collect() }))
    }

    async fn unload_cells(
        &self,
        request: Request<UnloadCellsRequest>,
    ) -> Result<Response<UnloadCellsResponse>, Status> {
        let cells: Vec<_> = request.into_inner().cells.into_iter().map(Into::into).collect();
        let held = self.service.unload_cells(&cells).await.map_err(status)?;
        Ok(Response::new(UnloadCellsResponse { held: held.into_iter().map(Into::into).collect() }))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        self.service.drain().await;
        Ok(Response::new(DrainResponse {}))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<ExpertStatus>, Status> {
        Ok(Response::new(self.service.status()))
    }
}

/// Checks a header of the handshake.
fn expect(metadata: &MetadataMap, header: &str, expected: &str) -> Result<(), Status> {
    let found = metadata.get(header).and_then(|value| value.to_str().ok()).unwrap_or("");
    if found == expected {
        return Ok(());
    }
    Err(Status::failed_precondition(format!("{header}: found {found:?}, expected {expected:?}")))
}

/// The pair that a caller offers, if it does.
fn offer(metadata: &MetadataMap) -> Result<Option<PairOffer>, Status> {
    let Some(value) = metadata.get_bin(PAIR_HEADER) else { return Ok(None) };
    let nonsense =
        |error: &dyn std::fmt::Display| Status::invalid_argument(format!("{PAIR_HEADER}: found no offer: {error}"));
    let bytes = value.to_bytes().map_err(|error| nonsense(&error))?;
    PairOffer::decode(bytes).map(Some).map_err(|error| nonsense(&error))
}

fn status(error: ExpertError) -> Status {
    let kind = match &error {
        ExpertError::NoSuchCell { .. } => ErrorKind::InvalidArgument,
        ExpertError::Memory(_) => ErrorKind::ResourceExhausted,
        ExpertError::Leaving => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    Error::new(kind, error.to_string()).into()
}

/// The batches of one caller.
struct BatchStream<D: Device> {
    service: Arc<ExpertService<D>>,
    /// Ends with the stream.
    pair: Option<OpenPair<D>>,
    outgoing: mpsc::Sender<Result<ExpertResult, Status>>,
    /// What runs.
    handles: HashMap<WorkId, (AbortHandle, Waiting)>,
}

impl<D: Device> BatchStream<D> {
    /// Runs them; what still waits when the caller goes away is dropped.
    async fn serve(mut self, mut batches: Streaming<ExpertBatch>) {
        let mut running = FuturesUnordered::new();
        let mut signs = tokio::time::interval(self.service.sign_every());
        signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut open = true;
        while open || !running.is_empty() {
            tokio::select! {
                batch = batches.message(), if open && running.len() < BATCHES_AT_ONCE => match batch {
                    Ok(Some(batch)) if batch.cancel => self.cancel(batch.id),
                    Ok(Some(batch)) => running.push(self.start(batch)),
                    Ok(None) => open = false,
                    Err(_) => return,
                },
                Some((id, result)) = running.next() => {
                    self.handles.remove(&id);
                    if let Ok(result) = result && self.outgoing.send(Ok(result)).await.is_err() {
                        return;
                    }
                }
                _ = signs.tick(), if !running.is_empty() => self.sign(),
                () = self.outgoing.closed() => return,
            }
        }
    }

    fn start(&mut self, batch: ExpertBatch) -> impl Future<Output = (WorkId, Result<ExpertResult, Aborted>)> + use<D> {
        let (id, waiting) = (batch.id.unwrap_or_default(), Waiting::begin(&batch));
        let pair = self.pair.as_ref().map(OpenPair::share);
        let (work, abort) = abortable(self.service.begin(batch, pair, waiting.cancelled()));
        self.handles.insert(id, (abort, waiting));
        async move { (id, work.await) }
    }

    fn cancel(&mut self, id: Option<WorkId>) {
        let id = id.unwrap_or_default();
        // One by pair is answered all the same.
        let over = self.handles.get(&id).is_some_and(|(_, waiting)| !waiting.cancel());
        if over && let Some((abort, _)) = self.handles.remove(&id) {
            abort.abort();
        }
    }

    /// Tells the caller what is not forgotten. One whose queue is full has other news to read.
    fn sign(&self) {
        if !self.service.is_working() {
            return;
        }
        let every = self.service.sign_every();
        for sign in self.handles.values().filter_map(|(_, waiting)| waiting.sign(every)) {
            let _ = self.outgoing.try_send(Ok(sign));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_comes_as_metadata_and_nonsense_is_named() {
        let of = |value: Option<&[u8]>| {
            let mut metadata = MetadataMap::new();
            value.map(|value| metadata.insert_bin(PAIR_HEADER, BinaryMetadataValue::from_bytes(value)));
            offer(&metadata)
        };
        assert_eq!(of(None).unwrap(), None);
        let offered = PairOffer { link: vec![7; 128].into(), board_bytes: 9, ..PairOffer::default() };
        assert_eq!(of(Some(&offered.encode_to_vec())).unwrap(), Some(offered));
        let refused = of(Some(&[0xff; 3])).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        assert!(refused.message().starts_with("conclave-pair-bin: found no offer: "), "{}", refused.message());
    }
}
