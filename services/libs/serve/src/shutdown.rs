//! Ending a process: the first signal asks for a graceful end, the second ends it at once.

use futures::{Stream, StreamExt, stream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A signal that ends a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT: Ctrl-C.
    Interrupt,
    /// SIGTERM: what service managers send.
    Terminate,
}

impl Signal {
    /// The exit status that shells give a process ended by this signal: 128 + its number.
    pub fn exit_status(self) -> i32 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

/// The process's SIGINTs and SIGTERMs, from now on.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn signals() -> std::io::Result<impl Stream<Item = Signal> + Send + Unpin + 'static> {
    let each = |kind, name| {
        let signals = signal(kind)?;
        let stream = stream::unfold(signals, move |mut s| async move { s.recv().await.map(|()| (name, s)) });
        std::io::Result::Ok(stream.boxed())
    };
    let interrupt = each(SignalKind::interrupt(), Signal::Interrupt)?;
    let terminate = each(SignalKind::terminate(), Signal::Terminate)?;
    Ok(stream::select(interrupt, terminate))
}

/// Ends the process without any cleaning up: the `exit` of [`on`] outside tests.
pub fn exit(signal: Signal) {
    std::process::exit(signal.exit_status());
}

/// Watches `signals` in a task: the first cancels the returned token, the second calls `exit`. The token may also be
/// cancelled from within (a background task that cannot go on); a signal after that is still the first.
pub fn on(
    signals: impl Stream<Item = Signal> + Send + Unpin + 'static,
    exit: impl FnOnce(Signal) + Send + 'static,
) -> CancellationToken {
    let graceful = CancellationToken::new();
    tokio::spawn(watch(signals, graceful.clone(), exit));
    graceful
}

async fn watch(
    mut signals: impl Stream<Item = Signal> + Unpin,
    graceful: CancellationToken,
    exit: impl FnOnce(Signal),
) {
    let Some(first) = signals.next().await else { return };
    tracing::info!(signal = ?first, "shutting down; a second signal ends the process at once");
    graceful.cancel();
    if let Some(second) = signals.next().await {
        tracing::warn!(signal = ?second, "ended at once");
        exit(second);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::{mpsc, oneshot};
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    #[tokio::test]
    async fn the_first_signal_cancels_and_the_second_exits() {
        let (send, receive) = mpsc::channel(2);
        let (exited, mut status) = oneshot::channel();
        let token = on(ReceiverStream::new(receive), move |signal| {
            exited.send(signal.exit_status()).expect("the test waits");
        });
        assert!(!token.is_cancelled(), "nothing came yet");

        send.send(Signal::Interrupt).await.expect("watched");
        tokio::time::timeout(Duration::from_secs(5), token.cancelled()).await.expect("the first signal cancels");
        assert!(status.try_recv().is_err(), "one signal does not exit");

        send.send(Signal::Terminate).await.expect("watched");
        let status = tokio::time::timeout(Duration::from_secs(5), status).await.expect("the second signal exits");
        assert_eq!(status, Ok(143));
    }

    #[tokio::test]
    async fn no_more_signals_is_no_signal() {
        let token = on(stream::empty(), |_| panic!("no signal came"));
        tokio::task::yield_now().await;
        assert!(!token.is_cancelled());
    }
}
