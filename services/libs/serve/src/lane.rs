//! A runtime that is driven by the thread that waits for it.
//!
//! A thread that computes and calls (the engine, a shard's compute thread) waits for messages most of the time. Were they
//! read by a thread of an async runtime, each would cost two wake-ups, of tens of microseconds each: the socket's and this
//! thread's. In a lane the waiting thread runs the connections itself ([`Lane::block_on`]). Before it sleeps, it looks for
//! what comes for some microseconds more ([`SPIN`]), leaving the core to whoever else can use it.
//!
//! While the thread is away, computing, a stand-in runs the lane: after [`PATIENCE`], or at once when it is told to
//! ([`Lane::hand_over`]). So connections are kept alive and large messages go on during long computations, and short
//! computations are not disturbed. A lane that nobody blocks on is run by its stand-in alone.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, yield_now};

/// How long a lane looks for messages after it was stirred, before its thread sleeps.
pub const SPIN: Duration = Duration::from_micros(50);
/// How long the thread of a lane may be away until the stand-in runs it.
pub const PATIENCE: Duration = Duration::from_millis(5);

/// A current-thread runtime, and who runs it.
#[derive(Debug)]
pub struct Lane {
    inner: Arc<Inner>,
    stirrer: Stirrer,
}

/// Keeps a lane awake; does not keep it alive.
#[derive(Debug, Clone)]
pub struct Stirrer(Arc<Spinner>);

#[derive(Debug)]
struct Inner {
    /// Taken out when it ends.
    runtime: Option<Runtime>,
    /// Threads in `block_on`.
    inside: AtomicUsize,
    /// How many times one has left.
    left: AtomicU64,
    stand_in: AtomicU8,
    thread: OnceLock<Thread>,
    at_once: AtomicBool,
    closed: AtomicBool,
    /// Tells the stand-in to give the runtime back.
    kick: Notify,
}

/// What the stand-in does: it looks from time to time whether it is needed...
const WATCHES: u8 = 0;
/// ...it sleeps, since the lane's thread is there...
const SLEEPS: u8 = 1;
/// ...or it runs the lane.
const DRIVES: u8 = 2;

/// Keeps the runtime from sleeping for a while.
#[derive(Debug)]
struct Spinner {
    start: Instant,
    /// Nanoseconds after `start`.
    until: AtomicU64,
    stirred: Notify,
}

impl Lane {
    /// A lane whose stand-in thread has this name.
    ///
    /// # Errors
    /// When there is no thread, or the operating system has nothing to wait on.
    pub fn start(name: &str) -> io::Result<Arc<Self>> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let spinner = Arc::new(Spinner { start: Instant::now(), until: AtomicU64::new(0), stirred: Notify::new() });
        let stirrer = Stirrer(spinner.clone());
        runtime.spawn(spin(spinner));
        let inner = Arc::new(Inner {
            runtime: Some(runtime),
            inside: AtomicUsize::new(0),
            left: AtomicU64::new(0),
            stand_in: AtomicU8::new(WATCHES),
            thread: OnceLock::new(),
            at_once: AtomicBool::new(true),
            closed: AtomicBool::new(false),
            kick: Notify::new(),
        });
        let stand_in = inner.clone();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || stand_in.stand_in())?;
        // Set once, here.
        let _ = inner.thread.set(thread.thread().clone());
        Ok(Arc::new(Self { inner, stirrer }))
    }

    /// To spawn on it, and to register what its connections need.
    pub fn handle(&self) -> &Handle {
        self.inner.runtime().handle()
    }

    /// Runs the lane on this thread until `future` is done. Not to be called from an async task.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let _inside = Inside::enter(&self.inner);
        self.inner.runtime().block_on(future)
    }

    /// Spawns a task and runs the lane until all that can go on now has: until a short message is sent.
    pub fn spawn_and_turn<T, F>(&self, future: F) -> JoinHandle<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        #[expect(clippy::async_yields_async, reason = "the task is to be waited for later")]
        self.block_on(async {
            let task = tokio::spawn(future);
            turn().await;
            task
        })
    }

    /// The lane's thread is about to leave while there is work: the stand-in runs it at once.
    pub fn hand_over(&self) {
        self.inner.at_once.store(true, Ordering::SeqCst);
        self.inner.wake_stand_in();
    }

    /// To keep it awake when something is about to come.
    pub fn stirrer(&self) -> &Stirrer {
        &self.stirrer
    }
}

impl Stirrer {
    /// Something is about to come: the lane does not sleep for [`SPIN`].
    pub fn stir(&self) {
        self.0.until.store(self.0.now() + SPIN.as_nanos() as u64, Ordering::Relaxed);
        self.0.stirred.notify_one();
    }
}

/// Lets all other tasks of the lane go on, with what has come for them.
pub async fn turn() {
    yield_now().await;
    yield_now().await;
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.inner.closed.store(true, Ordering::SeqCst);
        self.inner.kick.notify_one();
        self.inner.wake_stand_in();
    }
}

impl Inner {
    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("taken out only when the lane ends")
    }

    fn wake_stand_in(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// The life of the stand-in.
    fn stand_in(&self) {
        let mut seen = self.left.load(Ordering::SeqCst);
        while !self.is_closed() {
            let left = self.left.load(Ordering::SeqCst);
            let occupied = self.inside.load(Ordering::SeqCst) > 0;
            match needed(left != seen, occupied, self.at_once.swap(false, Ordering::SeqCst)) {
                Need::Drive => self.drive(),
                Need::Sleep => self.sleep(left),
                Need::Watch => thread::park_timeout(PATIENCE),
            }
            seen = left;
        }
    }

    /// Runs the lane until its thread comes back.
    fn drive(&self) {
        self.stand_in.store(DRIVES, Ordering::SeqCst);
        if self.inside.load(Ordering::SeqCst) == 0 && !self.is_closed() {
            self.runtime().block_on(async {
                self.kick.notified().await;
                turn().await;
            });
        }
        self.stand_in.store(WATCHES, Ordering::SeqCst);
        thread::park_timeout(PATIENCE);
    }

    /// Sleeps until the lane's thread, which is inside, leaves.
    fn sleep(&self, left: u64) {
        self.stand_in.store(SLEEPS, Ordering::SeqCst);
        if self.left.load(Ordering::SeqCst) == left && !self.is_closed() {
            thread::park();
        }
        self.stand_in.store(WATCHES, Ordering::SeqCst);
        thread::park_timeout(PATIENCE);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Not to be waited for: this may be an async thread.
            runtime.shutdown_background();
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Drive,
    Sleep,
    Watch,
}

/// What a stand-in has to do that looks at a lane again: whether the lane's thread has come or gone since it last did, is
/// inside, or asked for it.
fn needed(moved: bool, occupied: bool, at_once: bool) -> Need {
    match (moved, occupied) {
        (_, false) if at_once => Need::Drive,
        (true, _) => Need::Watch,
        (false, true) => Need::Sleep,
        (false, false) => Need::Drive,
    }
}

/// A thread in `block_on`.
struct Inside<'a>(&'a Inner);

impl<'a> Inside<'a> {
    fn enter(inner: &'a Inner) -> Self {
        inner.inside.fetch_add(1, Ordering::SeqCst);
        if inner.stand_in.load(Ordering::SeqCst) == DRIVES {
            inner.kick.notify_one();
        }
        Self(inner)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.left.fetch_add(1, Ordering::SeqCst);
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
        if self.0.stand_in.load(Ordering::SeqCst) == SLEEPS {
            self.0.wake_stand_in();
        }
    }
}

impl Spinner {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A task that is always ready to go on is what keeps a runtime from sleeping.
async fn spin(spinner: Arc<Spinner>) {
    loop {
        spinner.stirred.notified().await;
        while spinner.now() < spinner.until.load(Ordering::Relaxed) {
            thread::yield_now();
            yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests;
