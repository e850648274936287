//! Notes of how long operations take, step by step.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use super::limits::Work;

/// An operation, and the shape `[out, in]` of its matrix where it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Operation {
    /// As the device calls it.
    pub name: &'static str,
    /// Of its matrix.
    pub shape: Option<(usize, usize)>,
}

impl Operation {
    /// One without a matrix.
    pub fn plain(name: &'static str) -> Self {
        Self { name, shape: None }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shape {
            Some((outputs, inputs)) => write!(f, "{} {outputs}x{inputs}", self.name),
            None => f.write_str(self.name),
        }
    }
}

/// What the calls of one operation took together.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Taken {
    /// How many.
    pub calls: u64,
    /// Time.
    pub seconds: f64,
    /// What they had to do at least.
    pub work: Work,
}

/// One step of the engine: from its embedding to the next one's.
#[derive(Debug, Clone)]
pub struct Step {
    /// Rows.
    pub rows: usize,
    /// How long it took.
    pub seconds: f64,
    /// What its operations took.
    pub operations: BTreeMap<Operation, Taken>,
    begun: Instant,
}

/// Takes the notes of a [`Profiled`](super::profiled::Profiled) device, when it is told to.
#[derive(Debug, Default)]
pub struct Recorder {
    on: AtomicBool,
    steps: Mutex<Vec<Step>>,
}

impl Recorder {
    /// From now on notes are taken, beginning with none.
    pub fn start(&self) {
        self.lock().clear();
        self.on.store(true, Ordering::Relaxed);
    }

    /// No more notes; the steps noted. The last one ends here.
    pub fn stop(&self) -> Vec<Step> {
        self.on.store(false, Ordering::Relaxed);
        let mut steps = self.lock();
        close(&mut steps);
        std::mem::take(&mut *steps)
    }

    /// Whether notes are taken.
    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Step>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A step of `rows` rows begins.
    pub(super) fn begin(&self, rows: usize) {
        if self.is_on() {
            let mut steps = self.lock();
            close(&mut steps);
            steps.push(Step { rows, seconds: 0.0, operations: BTreeMap::new(), begun: Instant::now() });
        }
    }

    /// Runs an operation; `note` says what it was, given its result. While notes are taken one runs at a time, so that the time
    /// of each is its own: the trunk's and the experts' would otherwise wait for each other's threads.
    pub(super) fn time<R>(&self, note: impl FnOnce(&R) -> (Operation, Work), run: impl FnOnce() -> R) -> R {
        if !self.is_on() {
            return run();
        }
        let mut steps = self.lock();
        let started = Instant::now();
        let result = run();
        let seconds = started.elapsed().as_secs_f64();
        if let Some(step) = steps.last_mut() {
            let (operation, work) = note(&result);
            let taken = step.operations.entry(operation).or_default();
            taken.calls += 1;
            taken.seconds += seconds;
            taken.work.bytes += work.bytes;
            taken.work.flops += work.flops;
        }
        result
    }
}

/// The last step ends now.
fn close(steps: &mut [Step]) {
    if let Some(step) = steps.last_mut() {
        step.seconds = step.begun.elapsed().as_secs_f64();
    }
}
