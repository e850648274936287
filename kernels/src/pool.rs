//! A pool of threads that runs one region of independent tasks at a time.
//!
//! The calling thread takes part. Tasks are claimed by an atomic counter. An idle worker spins for a few microseconds,
//! since one operation follows the other, and then parks: an idle pool costs nothing.
#![allow(unsafe_code)]

use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{KernelError, grid::Grid};

/// How long an idle thread spins before it parks.
const SPIN: Duration = Duration::from_micros(5);
/// In `Shared::word`: the region takes workers in.
const OPEN: u64 = 1 << 31;
/// In `Shared::word`: workers inside the region.
const INSIDE: u64 = OPEN - 1;

/// Threads for compute. Several callers may share one pool: their regions run one after the other.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    turn: Mutex<()>,
}

struct Shared {
    /// Number of the region (upper half), `OPEN`, count of workers `INSIDE`.
    word: AtomicU64,
    /// Written only while the region is closed and no worker is inside.
    job: UnsafeCell<Option<Job>>,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    finish: Mutex<()>,
    finished: Condvar,
}

/// The tasks of the open region.
#[derive(Clone, Copy)]
struct Job {
    task: &'static (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: every field but `job` is Sync by itself. `job` is written by the one caller that holds `turn`, only while
// `word` says closed and nobody inside, and read by workers only after they entered through `word`.
unsafe impl Sync for Shared {}
// SAFETY: what `job` refers to is Sync, so that it may be used from any thread.
unsafe impl Send for Shared {}

thread_local! {
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// A pool that computes on `threads` threads, the caller's included (0 counts as 1).
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn new(threads: usize) -> Result<Arc<Self>, KernelError> {
        let shared = Arc::new(Shared {
            word: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            finish: Mutex::new(()),
            finished: Condvar::new(),
        });
        let mut pool = Self { shared, workers: Vec::new(), turn: Mutex::new(()) };
        for index in 1..threads {
            let shared = pool.shared.clone();
            let worker = thread::Builder::new()
                .name(format!("compute-{index}"))
                .spawn(move || work(&shared))
                .map_err(|source| KernelError::Os { what: "start a compute thread", source })?;
            pool.workers.push(worker);
        }
        Ok(Arc::new(pool))
    }

    /// Threads that compute, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(i)` for every `i` in `0..tasks`, in any order and on any thread, and returns when all are done.
    /// Within a task the tasks of a further call run one after the other on the same thread.
    ///
    /// # Panics
    /// With the first panic of a task, after all threads have left; tasks not yet begun are skipped then.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() || IN_TASK.get() {
            (0..tasks).for_each(task);
        } else {
            self.region(tasks, &task);
        }
    }

    /// Runs `task(i, chunk)` for the chunks of `chunk` elements (the last one may be shorter) of `values`.
    pub fn run_chunks<T: Send>(&self, values: &mut [T], chunk: usize, task: impl Fn(usize, &mut [T]) + Sync) {
        let length = values.len();
        let grid = Grid::new(values, length);
        self.run(length.div_ceil(chunk.max(1)), |index| {
            let start = index * chunk;
            // SAFETY: each chunk is taken by one task.
            task(index, unsafe { grid.part(0, start..length.min(start + chunk)) });
        });
    }

    fn region(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: only the lifetime is changed. `close` below returns when no worker is inside any more, and none can
        // enter after it, so the closure is not used past this call.
        let task = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task) };
        let job = Job { task, tasks };
        // SAFETY: the region is closed and empty, and we hold the turn.
        unsafe { *self.shared.job.get() = Some(job) };
        self.shared.next.store(0, Ordering::Relaxed);
        let number = (self.shared.word.load(Ordering::Relaxed) >> 32) + 1;
        self.shared.word.store(number << 32 | OPEN, Ordering::Release);
        self.workers.iter().take(tasks - 1).for_each(|worker| worker.thread().unpark());
        self.shared.work_off(job);
        self.shared.close();
        let panic = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks, so there is no result to look at.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Enters the open region, unless it is `last`, which this worker has been in.
    fn enter(&self, last: u64) -> Option<(u64, Job)> {
        let mut word = self.word.load(Ordering::Acquire);
        while word & OPEN != 0 && word >> 32 != last {
            match self.word.compare_exchange_weak(word, word + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    // SAFETY: we are counted inside, so that the caller does not write to `job`.
                    let job = unsafe { *self.job.get() };
                    return job.map(|job| (word >> 32, job));
                }
                Err(now) => word = now,
            }
        }
        None
    }

    /// Claims tasks until there are none left. Keeps the first panic and skips the rest.
    fn work_off(&self, job: Job) {
        IN_TASK.set(true);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                if index >= job.tasks {
                    break;
                }
                (job.task)(index);
            }
        }));
        IN_TASK.set(false);
        if let Err(panic) = outcome {
            self.next.store(job.tasks, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    fn leave(&self) {
        let before = self.word.fetch_sub(1, Ordering::AcqRel);
        if before & (OPEN | INSIDE) == 1 {
            drop(self.finish.lock().unwrap_or_else(PoisonError::into_inner));
            self.finished.notify_one();
        }
    }

    /// Lets nobody in any more and waits until all have left.
    fn close(&self) {
        self.word.fetch_and(!OPEN, Ordering::AcqRel);
        let empty = || self.word.load(Ordering::Acquire) & INSIDE == 0;
        if spin_until(empty) {
            return;
        }
        let mut guard = self.finish.lock().unwrap_or_else(PoisonError::into_inner);
        while !empty() {
            guard = self.finished.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn work(shared: &Shared) {
    let mut last = 0;
    while !shared.stop.load(Ordering::Acquire) {
        if let Some((number, job)) = shared.enter(last) {
            last = number;
            shared.work_off(job);
            shared.leave();
        } else if !spin_until(|| {
            let word = shared.word.load(Ordering::Acquire);
            word & OPEN != 0 && word >> 32 != last
        }) {
            // A region opened since then has left its token: park returns at once.
            thread::park();
        }
    }
}

/// Spins for a short while; whether `done` came true.
fn spin_until(done: impl Fn() -> bool) -> bool {
    if done() {
        return true;
    }
    let start = Instant::now();
    while start.elapsed() < SPIN {
        for _ in 0..16 {
            std::hint::spin_loop();
            if done() {
                return true;
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_each_task_once() {
        for threads in 0..5 {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads.max(1));
            for tasks in [0, 1, 2, 3, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..200 {
                    pool.run(tasks, |index| {
                        counts[index].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 200), "{threads} threads");
            }
        }
    }

    #[test]
    fn wakes_parked_workers() {
        let pool = Pool::new(3).unwrap();
        let both = std::sync::Barrier::new(3);
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(2));
            // Each task waits for the two others: only three threads at once can finish this.
            pool.run(3, |_| {
                both.wait();
            });
        }
    }

    #[test]
    fn serialises_callers() {
        let pool = Pool::new(3).unwrap();
        let busy: [AtomicUsize; 4] = Default::default();
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for caller in 0..4 {
                let (pool, busy, total) = (&pool, &busy, &total);
                scope.spawn(move || {
                    for _ in 0..300 {
                        pool.run(5, |_| {
                            busy[caller].fetch_add(1, Ordering::SeqCst);
                            let other = (0..4).any(|at| at != caller && busy[at].load(Ordering::SeqCst) > 0);
                            assert!(!other, "two regions at once");
                            busy[caller].fetch_sub(1, Ordering::SeqCst);
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 4 * 300 * 5);
    }

    #[test]
    fn hands_a_panic_to_the_caller_and_goes_on() {
        let pool = Pool::new(3).unwrap();
        for _ in 0..20 {
            let outcome = catch_unwind(AssertUnwindSafe(|| pool.run(50, |index| assert_ne!(index, 30, "thirty"))));
            let message = *outcome.unwrap_err().downcast::<String>().unwrap();
            assert!(message.contains("thirty"), "{message}");
        }
        let sum = AtomicUsize::new(0);
        pool.run(10, |index| {
            sum.fetch_add(index, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn a_task_may_run_tasks() {
        let pool = Pool::new(2).unwrap();
        let count = AtomicUsize::new(0);
        pool.run(4, |_| {
            pool.run(4, |_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(count.into_inner(), 16);
    }

    #[test]
    fn chunks_cover_everything_once() {
        let pool = Pool::new(3).unwrap();
        let mut values = vec![0; 103];
        pool.run_chunks(&mut values, 10, |index, chunk| chunk.iter_mut().for_each(|value| *value += index + 1));
        assert!(values.iter().enumerate().all(|(index, value)| *value == index / 10 + 1));
        pool.run_chunks(&mut values[..0], 10, |_, _| unreachable!());
    }

    #[test]
    fn idle_workers_sleep() {
        let pool = Pool::new(2).unwrap();
        let both = std::sync::Barrier::new(2);
        let ids = Mutex::new(Vec::new());
        pool.run(2, |_| {
            both.wait();
            let path = std::fs::read_link("/proc/thread-self").unwrap();
            ids.lock().unwrap().push(path);
        });
        let ids = ids.into_inner().unwrap();
        let caller = std::fs::read_link("/proc/thread-self").unwrap();
        let worker = ids.iter().find(|id| **id != caller).unwrap();
        let stat = std::path::Path::new("/proc").join(worker).join("stat");
        let fields = || -> Vec<String> {
            let stat = std::fs::read_to_string(&stat).unwrap();
            stat.rsplit(')').next().unwrap().split_whitespace().map(str::to_owned).collect()
        };
        thread::sleep(Duration::from_millis(50));
        let before = fields();
        thread::sleep(Duration::from_millis(200));
        let after = fields();
        // State, then user and system time in ticks.
        assert_eq!((&after[0][..], &after[11..13]), ("S", &before[11..13]));
    }
}
