//! A link with a thread of its own, which does one transfer after the other.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    time::Duration,
};

use super::{Link, LinkEnd, Until};
use crate::{Device, KernelError};

/// Longest wait for the other end to join in.
const JOINING: Duration = Duration::from_secs(10);
/// Longest transfer: so long, and as long as a slow network takes.
const SHORTEST: Duration = Duration::from_secs(1);
const SLOWEST_BYTES_A_SECOND: f64 = 50e6;

/// Something to send or receive. The memory is left alone by both sides until it has ended.
#[derive(Debug)]
pub enum Transfer<S> {
    /// Send rows of the board, `[R, hidden]`, by way of memory.
    SendRows { rows: Vec<u32>, hidden: usize, through: Arc<S>, bytes: usize },
    /// Send the beginning of memory.
    Send { memory: Arc<S>, bytes: usize },
    /// Receive into the beginning of memory.
    Receive { memory: Arc<S>, bytes: usize },
}

impl<S> Transfer<S> {
    fn limit(&self) -> Duration {
        let (Self::SendRows { bytes, .. } | Self::Send { bytes, .. } | Self::Receive { bytes, .. }) = self;
        SHORTEST + Duration::from_secs_f64(*bytes as f64 / SLOWEST_BYTES_A_SECOND)
    }

    fn run(&self, link: &mut dyn Link<S>, broken: &AtomicBool) -> Result<(), KernelError> {
        let until = Until::new(self.limit(), broken);
        match self {
            Self::SendRows { rows, hidden, through, .. } => link.send_rows(rows, *hidden, through, &until),
            Self::Send { memory, bytes } => link.send(memory, *bytes, &until),
            Self::Receive { memory, bytes } => link.receive(memory, *bytes, &until),
        }
    }
}

/// Told how a transfer has ended, once, on the thread of the link or, where that has ended, on any.
pub type Ended = Box<dyn FnOnce(Result<(), KernelError>) + Send>;

struct Job<S> {
    transfer: Transfer<S>,
    ended: Option<Ended>,
    state: Arc<State>,
}

impl<S> Job<S> {
    fn end(&mut self, result: Result<(), KernelError>) {
        if let Some(ended) = self.ended.take() {
            ended(result);
        }
    }
}

impl<S> Drop for Job<S> {
    fn drop(&mut self) {
        if self.ended.is_some() {
            let why = self.state.why.get().cloned().unwrap_or_else(|| "it was broken off".to_owned());
            self.end(Err(KernelError::LinkEnded(why)));
        }
    }
}

#[derive(Debug, Default)]
struct State {
    open: AtomicBool,
    broken: AtomicBool,
    /// The first error.
    why: OnceLock<String>,
}

enum Command<S> {
    Run(Job<S>),
    End,
}

/// One end of a link, and the thread that it belongs to. Dropped, it is broken off.
pub struct Linked<D: Device> {
    commands: Sender<Command<D::Shared>>,
    state: Arc<State>,
}

impl<D: Device> Linked<D> {
    /// Joins the link of this id, on a thread of its own. What is to be transferred meanwhile waits.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start(device: Arc<D>, id: Vec<u8>, end: LinkEnd) -> Result<Self, KernelError> {
        let (commands, queue) = mpsc::channel();
        let state = Arc::new(State::default());
        let of_thread = state.clone();
        let run = move || {
            if let Err(error) = run(&*device, &id, end, &of_thread, &queue) {
                of_thread.end(&error);
            }
        };
        let os = |source| KernelError::Os { what: "thread of a link", source };
        std::thread::Builder::new().name("link".to_owned()).spawn(run).map_err(os)?;
        Ok(Self { commands, state })
    }

    /// Whether the other end has joined in, and nothing has gone wrong since.
    pub fn is_open(&self) -> bool {
        self.state.open.load(Ordering::Acquire) && !self.state.broken.load(Ordering::Acquire)
    }

    /// Does a transfer behind those before it.
    pub fn transfer(&self, transfer: Transfer<D::Shared>, ended: Ended) {
        let job = Job { transfer, ended: Some(ended), state: self.state.clone() };
        // Where the thread has ended, the job comes back, and says so when it is dropped.
        drop(self.commands.send(Command::Run(job)));
    }

    /// Ends it, whatever is under way.
    pub fn break_off(&self) {
        self.state.broken.store(true, Ordering::Release);
        drop(self.commands.send(Command::End));
    }
}

impl<D: Device> Drop for Linked<D> {
    fn drop(&mut self) {
        self.break_off();
    }
}

impl State {
    fn end(&self, error: &KernelError) {
        let broken = self.broken.swap(true, Ordering::AcqRel);
        if self.why.set(error.to_string()).is_ok() && !broken {
            tracing::warn!(%error, "a link has ended");
        }
    }
}

/// Joins, then does what is asked for, until the first error or the end.
fn run<D: Device>(
    device: &D,
    id: &[u8],
    end: LinkEnd,
    state: &State,
    queue: &Receiver<Command<D::Shared>>,
) -> Result<(), KernelError> {
    let mut link = device.link(id, end, &Until::new(JOINING, &state.broken))?;
    state.open.store(true, Ordering::Release);
    while let Ok(Command::Run(mut job)) = queue.recv() {
        if let Err(error) = job.transfer.run(&mut *link, &state.broken) {
            // Before anybody asks whether it is open.
            state.end(&error);
            job.end(Err(error));
            break;
        }
        job.end(Ok(()));
    }
    Ok(())
}
