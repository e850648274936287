//! Streams that decode for as long as something is measured.

use anyhow::{Result, bail};
use conclave_proto::v1::GenerateRequest;
use futures::future::join_all;
use tokio::{
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
    time::{Instant, timeout_at},
};

use super::{measure::each_arrival, target::Target, timing::Arrivals};

/// The tokens of the streams, as they arrive.
pub struct Tokens {
    arriving: UnboundedReceiver<(usize, f64)>,
    /// Seconds after the start, of each stream.
    pub times: Arrivals,
}

impl Tokens {
    /// Takes in arrivals until it is enough.
    pub async fn until(&mut self, enough: impl Fn(&Arrivals) -> bool) {
        while !enough(&self.times) {
            let Some((stream, seconds)) = self.arriving.recv().await else { return };
            self.times[stream].push(seconds);
        }
    }
}

/// Sends `requests` and gives them up as soon as `measured` is done. `None`: it was not until `deadline`.
///
/// # Errors
/// When a request fails, or all of them have ended before.
pub async fn during<T>(
    target: &Target,
    requests: Vec<GenerateRequest>,
    start: Instant,
    deadline: Instant,
    measured: impl AsyncFnOnce(&mut Tokens) -> Result<T>,
) -> Result<Option<T>> {
    let (token, arriving) = unbounded_channel();
    let mut tokens = Tokens { arriving, times: vec![Vec::new(); requests.len()] };
    let streams = requests.into_iter().enumerate().map(|(stream, request)| {
        let token = token.clone();
        let arrived = move |seconds| {
            // The receiver goes when all is measured.
            let _ = token.send((stream, seconds));
        };
        each_arrival(target, request, start, deadline, arrived)
    });
    tokio::select! {
        measured = timeout_at(deadline, measured(&mut tokens)) => measured.ok().transpose(),
        ended = join_all(streams) => match ended.into_iter().find_map(Result::err) {
            Some(error) => Err(error),
            None if Instant::now() < deadline => bail!("the streams ended before all was measured"),
            None => Ok(None),
        },
    }
}
