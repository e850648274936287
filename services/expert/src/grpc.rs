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
use futures::future::{AbortHandle, abortable};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::error::ExpertError;
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
        tokio::spawn(serve_stream(self.service.clone(), request.into_inner(), outgoing));
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

/// Runs the batches of one stream; what still waits when the caller goes away is dropped.
async fn serve_stream<D: Device>(
    service: Arc<ExpertService<D>>,
    mut batches: Streaming<ExpertBatch>,
    outgoing: mpsc::Sender<Result<ExpertResult, Status>>,
) {
    let mut running = FuturesUnordered::new();
    let mut handles: HashMap<WorkKey, AbortHandle> = HashMap::new();
    let mut open = true;
    while open || !running.is_empty() {
        tokio::select! {
            batch = batches.message(), if open && running.len() < BATCHES_AT_ONCE => match batch {
                Ok(Some(batch)) if batch.cancel => {
                    if let Some(handle) = handles.remove(&work_key(batch.id)) {
                        handle.abort();
                    }
                }
                Ok(Some(batch)) => {
                    let key = work_key(batch.id);
                    let (work, handle) = abortable(service.run(batch));
                    handles.insert(key, handle);
                    running.push(async move { (key, work.await) });
                }
                Ok(None) => open = false,
                Err(_) => return,
            },
            Some((key, result)) = running.next() => {
                handles.remove(&key);
                if let Ok(result) = result && outgoing.send(Ok(result)).await.is_err() {
                    return;
                }
            }
            () = outgoing.closed() => return,
        }
    }
}

type WorkKey = (u64, u64, u32, u32, u32);

fn work_key(id: Option<WorkId>) -> WorkKey {
    let id = id.unwrap_or_default();
    (id.caller, id.step, id.layer, id.attempt, id.part)
}
