//! The gRPC adapter of the service.

use std::collections::HashMap;
use std::sync::Arc;

use conclave_kernels::Device;
use conclave_proto::v1::expert_server::{Expert, ExpertServer};
use conclave_proto::v1::{
    DrainRequest, DrainResponse, ExpertBatch, ExpertResult, ExpertStatus, LoadCellsRequest, LoadCellsResponse,
    StatusRequest, UnloadCellsRequest, UnloadCellsResponse, WorkId,
};
use conclave_proto::{FINGERPRINT_HEADER, INSTANCE_HEADER, MAX_MESSAGE_BYTES};
use conclave_serve::{Error, ErrorKind};
use futures::future::{AbortHandle, Aborted, abortable};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::error::ExpertError;
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
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let stream = BatchStream { service: self.service.clone(), outgoing, handles: HashMap::new() };
        tokio::spawn(stream.serve(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(queue)))
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
        let service = self.service.clone();
        let (work, abort) = abortable(async move { service.run(batch).await });
        self.handles.insert(id, (abort, waiting));
        async move { (id, work.await) }
    }

    fn cancel(&mut self, id: Option<WorkId>) {
        if let Some((abort, _)) = self.handles.remove(&id.unwrap_or_default()) {
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
