//! The service for callers of the same host: the messages of `Expert.Compute` over a Unix socket.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use conclave_dispatch::stream::{self, Caller, Event, Sender, Welcoming};
use conclave_kernels::Device;
use conclave_proto::v1::{ExpertBatch, ExpertResult, PairOffer, WorkId};
use tokio::net::UnixListener;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::pair::OpenPair;
use crate::reply::{Reply, Waiting};
use crate::service::ExpertService;

/// What one caller waits for.
#[derive(Default)]
struct Works(Mutex<HashMap<WorkId, Waiting>>);

impl Works {
    fn lock(&self) -> MutexGuard<'_, HashMap<WorkId, Waiting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody waits for the sums; whether for an answer all the same, the batch says.
    fn cancel(&self, id: &WorkId) {
        let mut works = self.lock();
        if works.get(id).is_some_and(|waiting| !waiting.cancel()) {
            works.remove(id);
        }
    }
}

/// The way of one answer.
pub(crate) struct StreamReply {
    id: WorkId,
    works: Arc<Works>,
    sender: Sender,
}

impl StreamReply {
    /// Neither cancelled, nor has the caller gone.
    pub(crate) fn is_wanted(&self) -> bool {
        self.works.lock().get(&self.id).is_some_and(|waiting| !waiting.is_cancelled())
    }

    pub(crate) fn send(self, result: ExpertResult) {
        if self.works.lock().remove(&self.id).is_some() {
            self.sender.post(result);
        }
    }
}

impl<D: Device> ExpertService<D> {
    /// Serves callers of the same host, on the lane; ends after `stop` and the answers to what was taken until then.
    pub async fn serve_streams(self: Arc<Self>, listener: UnixListener, stop: CancellationToken) {
        let (instance, fingerprint) = (Some(self.instance().to_owned()), self.fingerprint().to_owned());
        let ended = stop.clone();
        let granting = self.clone();
        let grant = move |offer: &PairOffer| granting.grant(offer);
        let talk = move |caller, pair| talk(self.clone(), caller, pair, ended.clone());
        stream::serve(listener, Welcoming { service: "expert", instance, fingerprint }, stop, grant, talk).await;
    }
}

/// Runs the batches of one caller; what still waits when it goes away is dropped.
async fn talk<D: Device>(
    service: Arc<ExpertService<D>>,
    mut caller: Caller,
    mut pair: Option<OpenPair<D>>,
    stop: CancellationToken,
) {
    let works = Arc::new(Works::default());
    let mut signs = interval(service.sign_every());
    signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !stop.is_cancelled() || !works.lock().is_empty() {
        let busy = !works.lock().is_empty();
        tokio::select! {
            biased;
            event = caller.next(true) => match event {
                Event::Message(batch) => take(&service, batch, pair.as_ref(), &works, &caller.sender),
                Event::Gone => {
                    pair.take().into_iter().for_each(OpenPair::closed);
                    break;
                }
                Event::Nonsense => break,
            },
            _ = signs.tick(), if busy || stop.is_cancelled() => sign(&*service, &works, &caller.sender),
            () = stop.cancelled(), if !stop.is_cancelled() => {}
        }
    }
    works.lock().clear();
    // Of a connection that breaks now nobody is left to be told.
    let _ = caller.sender.flush().await;
}

fn take<D: Device>(
    service: &Arc<ExpertService<D>>,
    batch: ExpertBatch,
    pair: Option<&OpenPair<D>>,
    works: &Arc<Works>,
    sender: &Sender,
) {
    let id = batch.id.unwrap_or_default();
    if batch.cancel {
        works.cancel(&id);
        return;
    }
    works.lock().insert(id, Waiting::begin(&batch));
    let reply = StreamReply { id, works: works.clone(), sender: sender.clone() };
    service.take(batch, pair.map(OpenPair::share), Reply::Stream(reply));
}

/// Tells the caller what is not forgotten.
fn sign<D: Device>(service: &ExpertService<D>, works: &Works, sender: &Sender) {
    if !service.is_working() {
        return;
    }
    let every = service.sign_every();
    for sign in works.lock().values().filter_map(|waiting| waiting.sign(every)) {
        sender.post(sign);
    }
}
