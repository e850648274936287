//! What NVIDIA's own code reaches on the card: copies by the driver, with memory of the host that it may reach itself, and
//! products by cuBLASLt, where its library is there.
#![allow(unsafe_code, reason = "memory that is not written yet, and calls of a library in C")]

use std::{
    cell::OnceCell,
    panic::{self, AssertUnwindSafe},
    sync::Arc,
    time::Instant,
};

use conclave_kernels::cuda::Gpu;
use cudarc::{
    cublaslt::{CudaBlasLT, Matmul, MatmulConfig, result::CublasError, sys},
    driver::{
        CudaContext, CudaEvent, CudaSlice, CudaStream, DeviceRepr, DriverError, PinnedHostSlice, sys::CUevent_flags,
    },
};
use half::bf16;

use crate::{
    card::Yardstick,
    numbers::Number,
    runner::{Found, Runner, Stop, Work},
};

/// Bytes of a copy on the card; to the host and back; and to keep the card busy while the next launch is on its way.
const COPIED: usize = 2 << 30;
const PINNED: usize = 256 << 20;
const BUSY: usize = 16 << 20;
/// Elements of weights, by whose windows runs take turns, so that none is in the second-level cache, and of activations.
const WEIGHTS: usize = 600 << 20;
const ACTIVATIONS: usize = 128 << 20;
/// Elements that go to the card at once.
const CHUNK: usize = 8_388_593;

/// A number that the library multiplies.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Element(bf16);

// SAFETY: two bytes.
unsafe impl DeviceRepr for Element {}

/// In bf16, with sums in f32.
impl Matmul<Element> for CudaBlasLT {
    fn matrix_type() -> sys::cudaDataType {
        sys::cudaDataType_t::CUDA_R_16BF
    }

    fn compute_type() -> sys::cublasComputeType_t {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
    }
}

struct Library {
    stream: Arc<CudaStream>,
    blas: Option<CudaBlasLT>,
    operands: OnceCell<(CudaSlice<Element>, CudaSlice<Element>)>,
    runs: usize,
    warm_up: usize,
}

impl From<DriverError> for Stop {
    fn from(error: DriverError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<CublasError> for Stop {
    fn from(error: CublasError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Lends it to the measuring; says where there is none.
pub(crate) fn attach(runner: &mut Runner<Gpu>) {
    // What the library lacks ends in a panic.
    match panic::catch_unwind(AssertUnwindSafe(|| Library::new(runner.sizes.runs, runner.sizes.warm_up))) {
        Ok(Ok(library)) => runner.yardstick = Some(Box::new(library)),
        Ok(Err(stop)) => eprintln!("nothing to compare with: {stop:?}"),
        Err(_) => eprintln!("nothing to compare with"),
    }
}

impl Library {
    fn new(runs: usize, warm_up: usize) -> Result<Self, Stop> {
        let context = CudaContext::new(0)?;
        // SAFETY: all is on one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        // SAFETY: only opens and closes the library.
        let blas = if unsafe { sys::is_culib_present() } { Some(CudaBlasLT::new(stream.clone())?) } else { None };
        Ok(Self { stream, blas, operands: OnceCell::new(), runs, warm_up })
    }

    fn mark(&self) -> Result<CudaEvent, DriverError> {
        self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
    }

    fn pinned(&self, bytes: usize) -> Result<PinnedHostSlice<u8>, DriverError> {
        // SAFETY: bytes are copied, whatever they are. No flags: the host reads it as any memory.
        unsafe { self.stream.context().alloc_pinned_with_flags(bytes, 0) }
    }

    fn memory<T: DeviceRepr>(&self, length: usize) -> Result<CudaSlice<T>, DriverError> {
        // SAFETY: numbers, whatever they are.
        unsafe { self.stream.alloc(length) }
    }

    /// Seconds of each of several runs, numbered from 0; `busy` is queued before each.
    fn time(
        &self,
        mut busy: impl FnMut() -> Result<(), Stop>,
        mut run: impl FnMut(usize) -> Result<(), Stop>,
    ) -> Result<Vec<f64>, Stop> {
        let mut marks = Vec::new();
        for number in 0..self.warm_up + self.runs {
            busy()?;
            let from = self.mark()?;
            run(number)?;
            marks.push((from, self.mark()?));
        }
        let seconds = |(from, to): &(CudaEvent, CudaEvent)| Ok(f64::from(from.elapsed_ms(to)?) / 1e3);
        marks[self.warm_up..].iter().map(seconds).collect()
    }

    fn copied(&self, bytes: usize, times: usize, run: impl FnMut(usize) -> Result<(), Stop>) -> Result<Found, Stop> {
        let work = Work { bytes: (times * bytes) as f64, ..Work::default() };
        Ok(Found { samples: self.time(|| Ok(()), run)?, work, error: None })
    }

    fn within(&self) -> Result<Found, Stop> {
        let (from, mut to) = (self.memory::<u8>(COPIED)?, self.memory::<u8>(COPIED)?);
        self.copied(COPIED, 2, |_| Ok(self.stream.memcpy_dtod(&from, &mut to)?))
    }

    fn upload(&self) -> Result<Found, Stop> {
        let (host, mut memory) = (self.pinned(PINNED)?, self.memory::<u8>(PINNED)?);
        self.copied(PINNED, 1, |_| Ok(self.stream.memcpy_htod(&host, &mut memory)?))
    }

    fn download(&self) -> Result<Found, Stop> {
        let (mut host, memory) = (self.pinned(PINNED)?, self.memory::<u8>(PINNED)?);
        self.copied(PINNED, 1, |_| Ok(self.stream.memcpy_dtoh(&memory, &mut host)?))
    }

    /// By the host's clock: memory is asked for and given back.
    fn memory_calls(&self) -> Result<Found, Stop> {
        let call = || {
            let started = Instant::now();
            drop(self.memory::<u8>(PINNED)?);
            self.stream.synchronize()?;
            Ok::<_, Stop>(started.elapsed().as_secs_f64())
        };
        let samples = (0..self.runs).map(|_| call()).collect::<Result<_, _>>()?;
        Ok(Found { samples, work: Work::default(), error: None })
    }

    /// Weights and activations.
    fn operands(&self) -> Result<&(CudaSlice<Element>, CudaSlice<Element>), Stop> {
        if self.operands.get().is_none() {
            let (mut weights, mut x) = (self.memory(WEIGHTS)?, self.memory(ACTIVATIONS)?);
            let number = |at: u32| Element(bf16::draw((at + 1).wrapping_mul(0x9e37_79b9)));
            let chunk: Vec<Element> = (0..CHUNK as u32).map(number).collect();
            for memory in [&mut weights, &mut x] {
                for first in (0..memory.len()).step_by(CHUNK) {
                    let length = CHUNK.min(memory.len() - first);
                    self.stream.memcpy_htod(&chunk[..length], &mut memory.slice_mut(first..first + length))?;
                }
            }
            self.stream.synchronize()?;
            let _ = self.operands.set((weights, x));
        }
        self.operands.get().ok_or_else(|| Stop::Failed("no operands".to_owned()))
    }
}

impl Yardstick for Library {
    fn name(&self) -> &'static str {
        "cuBLASLt"
    }

    fn multiplies(&self) -> bool {
        self.blas.is_some()
    }

    fn product(&self, rows: usize, outputs: usize, inner: usize) -> Result<Vec<f64>, Stop> {
        let Some(blas) = &self.blas else { return Err(Stop::Skip("its library was not found".to_owned())) };
        let (weights, x) = self.operands()?;
        let length = outputs * inner;
        if length > WEIGHTS || rows * inner > ACTIVATIONS {
            return Err(Stop::Skip(format!("{outputs} x {inner} for {rows} rows is more than was prepared")));
        }
        let (mut y, x) = (self.memory::<Element>(rows * outputs)?, x.slice(0..rows * inner));
        let (busy, mut host) = (self.memory::<u8>(BUSY)?, self.pinned(BUSY)?);
        // Column by column, as the library counts: y [outputs, rows] = weights [inner, outputs]ᵀ · x [inner, rows].
        let config = MatmulConfig {
            transa: true,
            transb: false,
            transc: false,
            m: outputs as u64,
            n: rows as u64,
            k: inner as u64,
            alpha: 1.0,
            lda: inner as i64,
            ldb: inner as i64,
            beta: 0.0,
            ldc: outputs as i64,
            stride_a: None,
            stride_b: None,
            stride_c: None,
            stride_bias: None,
            batch_size: None,
        };
        self.time(
            || Ok(self.stream.memcpy_dtoh(&busy, &mut host)?),
            |run| {
                let first = run % (WEIGHTS / length) * length;
                let window = weights.slice(first..first + length);
                // SAFETY: as large as the sizes above say.
                Ok(unsafe { blas.matmul(config, &window, &x, &mut y, None, None) }?)
            },
        )
    }

    fn copies(&self) -> Vec<(&'static str, Result<Found, Stop>)> {
        vec![
            ("copy on the card (read and written)", self.within()),
            ("from pinned memory", self.upload()),
            ("to pinned memory", self.download()),
            ("memory asked for and given back", self.memory_calls()),
        ]
    }
}
