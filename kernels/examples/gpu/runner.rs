//! Runs and times one kernel after the other, within a budget of time.

use std::{
    cell::OnceCell,
    panic::{self, AssertUnwindSafe},
    path::PathBuf,
    time::{Duration, Instant},
};

use bytemuck::Pod;
use conclave_kernels::{
    KernelError, RateProbe,
    cuda::{CudaError, CudaRates, Driver},
};
use half::bf16;

use crate::{
    Part,
    card::Yardstick,
    numbers::{E4m3, Number, Numbers, largest},
    report::{Answer, Report, Row},
    sizes::Sizes,
};

/// Why there is no figure.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It was left out.
    Skip(String),
    /// It went wrong.
    Failed(String),
}

impl From<CudaError> for Stop {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::Memory { .. } | CudaError::NoKernel { .. } => Self::Skip(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

impl From<KernelError> for Stop {
    fn from(error: KernelError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// The least that a run has to do.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Work {
    /// Read and written, what is read again not counted.
    pub(crate) bytes: f64,
    /// A multiply-add is two.
    pub(crate) flops: f64,
    /// Whether operands are FP8: twice the rate is assumed.
    pub(crate) fp8: bool,
}

/// How far a result is from its definition: the norm of the error by that of the definition.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Error {
    pub(crate) found: f64,
    pub(crate) limit: f64,
}

/// What was found of one case.
#[derive(Debug)]
pub(crate) struct Found {
    /// Seconds of each run.
    pub(crate) samples: Vec<f64>,
    pub(crate) work: Work,
    pub(crate) error: Option<Error>,
}

/// What a runner is told.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    /// Longest time.
    pub(crate) budget: Duration,
    /// Where all that was found is written.
    pub(crate) json: Option<PathBuf>,
    /// Operations a second that products are measured against, instead of what the device gives.
    pub(crate) peak: Option<f64>,
}

/// A device, what it gives at most, and what was found so far.
pub(crate) struct Runner<D: Driver> {
    rates: CudaRates<D>,
    pub(crate) sizes: Sizes,
    pub(crate) yardstick: Option<Box<dyn Yardstick>>,
    pub(crate) report: Report,
    /// Whether the rate of products was given, and not measured.
    pub(crate) peak_given: bool,
    part: Part,
    deadline: Instant,
    json: Option<PathBuf>,
    bf16: OnceCell<Numbers<D, bf16>>,
    e4m3: OnceCell<Numbers<D, E4m3>>,
    f32: OnceCell<Numbers<D, f32>>,
    out: OnceCell<Out<D::Memory>>,
}

/// Memory for results.
pub(crate) struct Out<M> {
    memory: M,
    pub(crate) address: u64,
    bytes: usize,
}

impl<D: Driver> Runner<D> {
    /// Measures the rates of the device; with a `peak` of operations a second, products are not among them.
    pub(crate) fn new(driver: D, sizes: Sizes, options: Options) -> Result<Self, Stop> {
        let Options { budget, json, peak } = options;
        let rates = CudaRates::new(driver, sizes.read, sizes.rounds)?;
        let mut report = Report::of(rates.about());
        for _ in 0..3 {
            report.read = report.read.max(rates.read_rate()?);
            let flops = peak.map_or_else(|| rates.multiply_add_rate().map(|rate| 2.0 * rate), Ok);
            report.flops = report.flops.max(flops?);
        }
        Ok(Self {
            rates,
            sizes,
            yardstick: None,
            report,
            peak_given: peak.is_some(),
            part: Part::Card,
            deadline: Instant::now() + budget,
            json,
            bf16: OnceCell::new(),
            e4m3: OnceCell::new(),
            f32: OnceCell::new(),
            out: OnceCell::new(),
        })
    }

    pub(crate) fn rates(&self) -> &CudaRates<D> {
        &self.rates
    }

    pub(crate) fn driver(&self) -> &D {
        self.rates.driver()
    }

    pub(crate) fn begin(&mut self, part: Part) {
        self.part = part;
        Report::title(part);
    }

    /// One line: runs `work` unless the time is over.
    pub(crate) fn case(&mut self, name: &str, work: impl FnOnce(&Self) -> Result<Found, Stop>) {
        let found = self.unless_over(work);
        let row = Row::of(self.part, name, found, &self.report);
        self.report.row(row);
        self.report.write(self.json.as_deref());
    }

    /// One question and its answer.
    pub(crate) fn question(&mut self, question: &str, work: impl FnOnce(&Self) -> Result<bool, Stop>) {
        let answer = Answer::of(question, self.unless_over(work));
        self.report.answer(answer);
        self.report.write(self.json.as_deref());
    }

    fn unless_over<T>(&self, work: impl FnOnce(&Self) -> Result<T, Stop>) -> Result<T, Stop> {
        if Instant::now() >= self.deadline {
            return Err(Stop::Skip("the time is over".to_owned()));
        }
        // A library may lack what is called of it, which ends in a panic.
        let ended = panic::catch_unwind(AssertUnwindSafe(|| work(self)));
        ended.unwrap_or_else(|_| Err(Stop::Failed("a panic, see above".to_owned())))
    }

    /// Seconds of each of several runs by the device's clock, after some that do not count. Before each of them more is read
    /// than fits into the second-level cache.
    pub(crate) fn time(&self, launch: impl Fn() -> Result<(), CudaError>) -> Result<Vec<f64>, Stop> {
        let driver = self.driver();
        let run = |_| {
            self.rates.read()?;
            let from = driver.mark()?;
            launch()?;
            Ok((from, driver.mark()?))
        };
        let marks = (0..self.sizes.warm_up + self.sizes.runs).map(run).collect::<Result<Vec<_>, CudaError>>()?;
        let counted = marks[self.sizes.warm_up..].iter();
        Ok(counted.map(|(from, to)| driver.seconds(from, to)).collect::<Result<_, _>>()?)
    }

    pub(crate) fn bf16(&self) -> Result<&Numbers<D, bf16>, Stop> {
        self.numbers(&self.bf16, self.sizes.bf16)
    }

    pub(crate) fn e4m3(&self) -> Result<&Numbers<D, E4m3>, Stop> {
        self.numbers(&self.e4m3, self.sizes.e4m3)
    }

    pub(crate) fn f32(&self) -> Result<&Numbers<D, f32>, Stop> {
        self.numbers(&self.f32, self.sizes.f32)
    }

    fn numbers<'a, T: Number>(
        &self,
        cell: &'a OnceCell<Numbers<D, T>>,
        bytes: usize,
    ) -> Result<&'a Numbers<D, T>, Stop> {
        if cell.get().is_none() {
            let _ = cell.set(Numbers::new(self.driver(), bytes, self.sizes.period)?);
        }
        cell.get().ok_or_else(|| Stop::Failed("no numbers".to_owned()))
    }

    /// Memory for `bytes` of results, with zeros in it.
    pub(crate) fn out(&self, bytes: usize) -> Result<&Out<D::Memory>, Stop> {
        if self.out.get().is_none() {
            let (memory, bytes) = largest(self.driver(), self.sizes.out)?;
            let address = self.driver().address(&memory);
            let _ = self.out.set(Out { memory, address, bytes });
        }
        let out = self.out.get().ok_or_else(|| Stop::Failed("no memory for results".to_owned()))?;
        if bytes > out.bytes {
            let gb = |bytes: usize| bytes as f64 / 1e9;
            return Err(Stop::Skip(format!("takes {:.1} of {:.1} GB for results", gb(bytes), gb(out.bytes))));
        }
        self.driver().zero(&out.memory, 0..bytes)?;
        Ok(out)
    }

    /// `length` results from `first` on.
    pub(crate) fn results<T: Pod>(&self, first: usize, length: usize) -> Result<Vec<T>, Stop> {
        let out = self.out.get().ok_or_else(|| Stop::Failed("no memory for results".to_owned()))?;
        let mut values = vec![T::zeroed(); length];
        self.driver().download(&out.memory, first * size_of::<T>(), bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// Memory that holds `values`.
    pub(crate) fn upload<T: Pod>(&self, values: &[T]) -> Result<D::Memory, CudaError> {
        let memory = self.driver().allocate(size_of_val(values))?;
        self.driver().upload(&memory, 0, bytemuck::cast_slice(values))?;
        Ok(memory)
    }

    pub(crate) fn at(&self, memory: &D::Memory) -> u64 {
        self.driver().address(memory)
    }
}

/// Compares results with their definition.
#[derive(Debug, Default)]
pub(crate) struct Distance {
    error: f64,
    norm: f64,
}

impl Distance {
    pub(crate) fn add(&mut self, found: f64, expected: f64) {
        // What is not finite is as wrong as can be.
        let error = found - expected;
        self.error += if error.is_finite() { error * error } else { f64::INFINITY };
        self.norm += expected * expected;
    }

    pub(crate) fn within(&self, limit: f64) -> Option<Error> {
        let found = if self.error == 0.0 { 0.0 } else { (self.error / self.norm).sqrt() };
        Some(Error { found, limit })
    }
}
