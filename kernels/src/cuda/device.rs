//! The CUDA device: operations as launches of kernels on any driver.

use std::sync::{
    Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use super::{
    CudaError, Driver,
    attention::{self, Attention, CudaCache, Queries},
    batch::CudaBatch,
    buffers::{CudaBuffer, Growing},
    expanded::{self, Expanded},
    experts::Experts,
    link::CudaLink,
    operand::Operand,
    plain::{Add, AddTwo, EmbedBf16, EmbedF32, GateLogits, MOST_LOGITS, RmsNorm},
    products::{self, Block},
    shared::{Board, CudaShared},
    sm90, tokens,
    weights::{CudaMatrix, CudaRotary},
};
use crate::{
    Device, Dtype, ExpertRows, Ffn, FoundToken, Fp8Weights, GroupedSums, KernelError, LatentWrite, Mla, MlaShape,
    Published, RotaryTable, StepRows, TokenAsk, Wanted, Weight,
    link::{Link, LinkEnd, Until},
};

/// A GPU, or the shim, as a device.
///
/// Activations are bf16, weights too or, where the checkpoint has them so, FP8: rows are then rounded to FP8 as well before they
/// are multiplied. Launches are queued; the first error is kept, and what comes after it does nothing.
///
/// On a chip of sm_90a, weights and caches of sizes that its kernels take are served by these, all others by the plain ones:
/// by shape, never by the number of rows, so that bits do not depend on what comes together.
pub struct Cuda<D: Driver> {
    driver: D,
    failure: OnceLock<String>,
    /// Of operations on the rows of a step. Held while an operation is queued: the queue keeps the order. Taken before the
    /// lock of any buffer.
    scratch: Mutex<Scratch<D::Memory>>,
    experts: Mutex<Experts<D::Memory>>,
    /// Of expanded spans.
    expanded: Mutex<expanded::Working<D::Memory>>,
    /// Tables of tokens to be found, and those found.
    tokens: Mutex<Growing<D::Memory>>,
    /// Heads of the cache made last that the kernels for sm_90a attend over; 0: none was made. A step's work for so many comes
    /// with its rows.
    heads: AtomicUsize,
    relaxed: AtomicBool,
    board: Mutex<Option<Board<D::Memory>>>,
}

/// What a dispatch point needs, on its way to the host.
pub struct CudaFetched<C> {
    /// Of the rows.
    bytes: usize,
    /// Gate logits.
    values: usize,
    copy: Result<C, KernelError>,
}

/// Working memory of an operation.
struct Scratch<M> {
    memory: Growing<M>,
    operand: Operand<M>,
}

type Buffer<D> = CudaBuffer<<D as Driver>::Memory>;
type Matrix<D> = CudaMatrix<<D as Driver>::Memory>;

impl<D: Driver> Cuda<D> {
    /// A device on this driver.
    pub fn new(driver: D) -> Self {
        let scratch = Scratch { memory: Growing::default(), operand: Operand::default() };
        let (scratch, heads) = (Mutex::new(scratch), AtomicUsize::new(0));
        let (experts, expanded, tokens) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self {
            driver,
            failure: OnceLock::new(),
            scratch,
            experts,
            expanded,
            tokens,
            heads,
            relaxed: AtomicBool::new(false),
            board: Mutex::default(),
        }
    }

    fn board(&self) -> MutexGuard<'_, Option<Board<D::Memory>>> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether bits must not depend on how rows come together.
    fn exact(&self) -> bool {
        !self.relaxed.load(Ordering::Relaxed)
    }

    /// What it runs on.
    pub fn driver(&self) -> &D {
        &self.driver
    }

    /// Does something on the device unless it has failed before.
    fn attempt<T>(&self, work: impl FnOnce(&D) -> Result<T, CudaError>) -> Result<T, KernelError> {
        if self.failure.get().is_none() {
            match work(&self.driver) {
                Ok(done) => return Ok(done),
                Err(error) => drop(self.failure.set(error.to_string())),
            }
        }
        Err(KernelError::Failed(self.failure.get().cloned().unwrap_or_default()))
    }

    /// Queues work. An error is met again by who reads results.
    fn queue(&self, work: impl FnOnce(&D) -> Result<(), CudaError>) {
        if let Err(error) = self.attempt(work) {
            tracing::debug!(%error, "operation not queued");
        }
    }

    /// As [`Self::queue`], with working memory.
    fn queue_with(&self, work: impl FnOnce(&D, &mut Scratch<D::Memory>) -> Result<(), CudaError>) {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        self.queue(|driver| work(driver, &mut scratch));
    }
}

/// Rows of `x [T, cols]`.
fn rows<M>(x: &CudaBuffer<M>, cols: usize) -> usize {
    assert!(x.length.is_multiple_of(cols), "{} values in rows of {cols}", x.length);
    x.length / cols
}

impl<D: Driver> Device for Cuda<D> {
    type Matrix = Matrix<D>;
    type Heads = Matrix<D>;
    type Table = Matrix<D>;
    type Rotary = CudaRotary<D::Memory>;
    type Cache = CudaCache<D::Memory>;
    type Buffer = Buffer<D>;
    type Batch = CudaBatch<D::Memory>;
    type Fetched = CudaFetched<D::Copy>;
    type Shared = CudaShared<D::Memory>;

    const QUEUES: bool = true;

    fn activation(&self) -> Dtype {
        Dtype::Bf16
    }

    fn numerics(&self) -> String {
        let name = self.driver.name().to_lowercase();
        let words: Vec<&str> =
            name.split(|letter: char| !letter.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
        let kernels = if self.driver.chip() == sm90::CHIP { "sm90" } else { "plain" };
        format!("cuda-{kernels}-2-{}", words.join("-"))
    }

    fn fp8_weights(&self) -> Fp8Weights {
        Fp8Weights::Multiplied
    }

    fn load_matrix(&self, weight: Weight<'_>) -> Result<Matrix<D>, KernelError> {
        CudaMatrix::load_as_it_is(&self.driver, weight)
    }

    fn load_heads(&self, heads: &[Weight<'_>]) -> Result<Matrix<D>, KernelError> {
        CudaMatrix::load(&self.driver, heads)
    }

    fn load_table(&self, weight: Weight<'_>) -> Result<Matrix<D>, KernelError> {
        CudaMatrix::load(&self.driver, &[weight])
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<Buffer<D>, KernelError> {
        let mut buffer = CudaBuffer::default();
        buffer.fill(&self.driver, &values)?;
        Ok(buffer)
    }

    fn load_rotary(&self, table: RotaryTable) -> Result<Self::Rotary, KernelError> {
        Ok(CudaRotary::load(&self.driver, &table)?)
    }

    fn new_cache(&self, layers: usize, blocks: usize, shape: &MlaShape) -> Result<Self::Cache, KernelError> {
        let cache = CudaCache::new(&self.driver, (layers, blocks), shape)?;
        if cache.fast() {
            self.heads.store(shape.heads, Ordering::Relaxed);
        }
        Ok(cache)
    }

    fn matrix_bytes(&self, matrix: &Matrix<D>) -> usize {
        matrix.bytes()
    }

    fn matrix_shape(&self, matrix: &Matrix<D>) -> (usize, usize) {
        (matrix.rows, matrix.cols)
    }

    fn length(&self, buffer: &Buffer<D>) -> usize {
        buffer.length
    }

    fn load_batch(&self, rows: StepRows, batch: &mut Self::Batch) {
        let heads = Some(self.heads.load(Ordering::Relaxed)).filter(|heads| *heads > 0);
        self.queue(|driver| batch.load(driver, &rows, heads));
    }

    fn read(&self, x: &mut Buffer<D>, values: &mut Vec<f32>) -> Result<(), KernelError> {
        self.attempt(|driver| x.download(driver, values))
    }

    fn fetch(&self, x: &Buffer<D>, y: &mut Buffer<D>) -> Self::Fetched {
        CudaFetched {
            bytes: x.length * Dtype::Bf16.size(),
            values: y.length,
            copy: self.attempt(|driver| x.fetch_with(driver, y)),
        }
    }

    fn take(&self, fetched: Self::Fetched) -> Result<(Vec<u8>, Vec<f32>), KernelError> {
        let (mut bytes, mut values) = (vec![0; fetched.bytes], vec![0.0; fetched.values]);
        let (copy, parts) = (fetched.copy?, &mut [&mut bytes[..], bytemuck::cast_slice_mut(&mut values)]);
        self.attempt(|driver| driver.take(copy, parts))?;
        Ok((bytes, values))
    }

    fn submit(&self, piece: u32) {
        self.queue(|driver| driver.submit(piece));
    }

    fn decode(&self, x: &[u8], out: &mut Buffer<D>) {
        self.queue(|driver| out.fill_bf16(driver, x));
    }

    fn gather(&self, parts: &[(&Buffer<D>, &[u32])], width: usize, out: &mut Buffer<D>) {
        self.queue_with(|driver, scratch| {
            let rows: Vec<&[u8]> = parts.iter().map(|(_, rows)| bytemuck::cast_slice(rows)).collect();
            let bytes: usize = rows.iter().map(|rows| rows.len()).sum();
            let memory = scratch.memory.fit(driver, bytes)?;
            driver.upload_parts(memory, 0, &rows)?;
            let out = out.fit(driver, bytes / size_of::<u32>() * width)?;
            let mut done = 0;
            for (x, rows) in parts {
                assert!(rows.iter().all(|row| (*row as usize) < x.length / width), "rows of {} values", x.length);
                let (tokens, out) = (driver.address(memory) + done * 4, out + done * 4 * width as u64);
                let (table, hidden, count) = (x.f32(driver)?, width as u32, rows.len() as u32);
                EmbedF32 { table, tokens, out, hidden, rows: count }.launch(driver)?;
                done += rows.len() as u64;
            }
            Ok(())
        });
    }

    fn add(&self, x: &mut Buffer<D>, delta: &Buffer<D>) {
        self.queue(|driver| {
            assert_eq!(x.length, delta.length, "values to be added");
            let n = x.length as u64;
            Add { x: x.change(driver)?, delta: delta.f32(driver)?, n }.launch(driver)
        });
    }

    fn add_two(&self, x: &mut Buffer<D>, a: &Buffer<D>, b: &Buffer<D>) {
        self.queue(|driver| {
            assert_eq!((x.length, x.length), (a.length, b.length), "values to be added");
            let n = x.length as u64;
            AddTwo { x: x.change(driver)?, a: a.f32(driver)?, b: b.f32(driver)?, n }.launch(driver)
        });
    }

    fn embed(&self, table: &Matrix<D>, batch: &Self::Batch, out: &mut Buffer<D>) {
        self.queue(|driver| {
            let (hidden, rows) = (table.cols as u32, batch.rows() as u32);
            let out = out.fit(driver, batch.rows() * table.cols)?;
            EmbedBf16 { table: table.address, tokens: batch.tokens, out, hidden, rows }.launch(driver)
        });
    }

    fn rms_norm(&self, x: &Buffer<D>, gain: &Buffer<D>, eps: f32, out: &mut Buffer<D>) {
        self.queue(|driver| {
            let (hidden, rows) = (gain.length as u32, rows(x, gain.length) as u32);
            let (out, rounded) = out.fit_both(driver, x.length)?;
            let (x, gain) = (x.f32(driver)?, gain.f32(driver)?);
            RmsNorm { x, gain, out, rounded, hidden, eps, rows }.launch(driver)
        });
    }

    fn linear(&self, x: &Buffer<D>, w: &Matrix<D>, y: &mut Buffer<D>) {
        self.queue(|driver| {
            let rows = rows(x, w.cols);
            let y = y.fit(driver, rows * w.rows)?;
            products::linear(driver, self.exact(), &mut x.bf16(driver)?.bf16, rows, w, y)
        });
    }

    fn gate_logits(&self, x: &Buffer<D>, w: &Matrix<D>, y: &mut Buffer<D>) {
        self.queue(|driver| {
            let what = "gate logits";
            if w.scales.is_some() {
                return Err(CudaError::Device { what, detail: "found a matrix in FP8, expected one in bf16".into() });
            }
            let count = rows(x, w.cols);
            let (y, rows, inner, outputs) =
                (y.fit(driver, count * w.rows)?, count as u32, w.cols as u32, w.rows as u32);
            GateLogits { x: x.f32(driver)?, w: w.address, y, rows, inner, outputs }.launch(driver)
        });
    }

    fn ffn(&self, x: &Buffer<D>, ffn: &Ffn<Matrix<D>>, y: &mut Buffer<D>) {
        self.queue_with(|driver, scratch| {
            let rows = rows(x, ffn.gate.cols);
            let block = Block { ffn, rows, y: y.fit(driver, rows * ffn.down.rows)?, exact: self.exact() };
            block.run(driver, &mut x.bf16(driver)?.bf16, &mut scratch.operand, &mut scratch.memory)
        });
    }

    fn grouped_ffn(
        &self,
        x: &[&[u8]],
        experts: &[ExpertRows<'_, Matrix<D>>],
        sums: &mut [f32],
    ) -> Result<(), KernelError> {
        let mut working = self.experts.lock().unwrap_or_else(PoisonError::into_inner);
        self.attempt(|driver| working.run(driver, x, experts, sums))
    }

    fn mla_queries(
        &self,
        mla: &Mla<Self::Rotary>,
        batch: &Self::Batch,
        q: &Buffer<D>,
        uk: &Matrix<D>,
        out: &mut Buffer<D>,
    ) {
        self.queue_with(|driver, scratch| Queries { mla, batch, q, uk }.run(driver, &mut scratch.operand, out));
    }

    fn write_latents(
        &self,
        mla: &Mla<Self::Rotary>,
        batch: &Self::Batch,
        write: &LatentWrite<'_, Buffer<D>>,
        cache: &mut Self::Cache,
    ) {
        self.queue(|driver| attention::write_latents(driver, mla, batch, write, cache));
    }

    fn mla_attention(
        &self,
        mla: &Mla<Self::Rotary>,
        batch: &Self::Batch,
        (cache, layer): (&Self::Cache, usize),
        q: &Buffer<D>,
        out: &mut Buffer<D>,
    ) {
        self.queue_with(|driver, scratch| {
            Attention { mla, batch, cache, layer, q }.run(driver, &mut scratch.memory, out)
        });
    }

    fn mla_values(
        &self,
        mla: &Mla<Self::Rotary>,
        batch: &Self::Batch,
        o_lat: &Buffer<D>,
        uv: &Matrix<D>,
        out: &mut Buffer<D>,
    ) {
        self.queue(|driver| attention::values(driver, &mla.shape, batch.absorbed(), (o_lat, uv), out));
    }

    fn relax(&self) {
        self.relaxed.store(true, Ordering::Relaxed);
    }

    fn expands(&self) -> bool {
        true
    }

    fn mla_expanded(
        &self,
        mla: &Mla<Self::Rotary>,
        batch: &Self::Batch,
        (cache, layer): (&Self::Cache, usize),
        q: &Buffer<D>,
        kv_b: &Matrix<D>,
        out: &mut Buffer<D>,
    ) {
        let mut working = self.expanded.lock().unwrap_or_else(PoisonError::into_inner);
        self.queue(|driver| Expanded { mla, batch, cache, layer, q, kv_b }.run(driver, &mut working, out));
    }

    fn finds_tokens(&self, vocab: usize) -> bool {
        vocab <= MOST_LOGITS
    }

    fn find_tokens(
        &self,
        logits: &mut Buffer<D>,
        mask: &[u64],
        asks: &[TokenAsk<'_>],
    ) -> Result<Vec<Option<FoundToken>>, KernelError> {
        let mut working = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        self.attempt(|driver| {
            let (vocab, logits) = (logits.length / asks.len().max(1), logits.change(driver)?);
            tokens::find(driver, &mut working, (logits, vocab), mask, asks)
        })
    }

    fn share(&self, bytes: usize) -> Result<(Self::Shared, Vec<u8>), KernelError> {
        Ok(CudaShared::new(&self.driver, bytes)?)
    }

    fn open_shared(&self, handle: &[u8], bytes: usize) -> Result<Self::Shared, KernelError> {
        Ok(CudaShared::open(&self.driver, handle, bytes)?)
    }

    fn read_shared(&self, memory: &Self::Shared, bytes: &mut [u8]) -> Result<(), KernelError> {
        Ok(memory.read(&self.driver, bytes)?)
    }

    fn make_board(&self, bytes: usize) -> Result<Vec<u8>, KernelError> {
        Ok(Board::make(&mut self.board(), bytes, || CudaShared::new(&self.driver, bytes))?.handle()?)
    }

    fn keep_board(&self, bytes: usize) -> Result<(), KernelError> {
        let kept = || Ok((CudaShared::kept(&self.driver, bytes)?, Vec::new()));
        Ok(Board::make(&mut self.board(), bytes, kept).map(drop)?)
    }

    fn keep(&self, bytes: usize) -> Result<Self::Shared, KernelError> {
        Ok(CudaShared::kept(&self.driver, bytes)?)
    }

    fn check_links(&self) -> Result<(), KernelError> {
        Ok(self.driver.check_links()?)
    }

    fn link_id(&self) -> Result<Vec<u8>, KernelError> {
        Ok(self.driver.link_id()?)
    }

    fn link<'d>(
        &'d self,
        id: &[u8],
        end: LinkEnd,
        until: &Until<'_>,
    ) -> Result<Box<dyn Link<Self::Shared> + 'd>, KernelError> {
        let board = |bytes| match &*self.board() {
            Some(board) => board.address(&self.driver, bytes),
            None => {
                Err(CudaError::Device { what: "send rows of the board", detail: "this device has none".to_owned() })
            }
        };
        let link = self.driver.link(id, end, until)?;
        Ok(Box::new(CudaLink { driver: &self.driver, link, index: Growing::default(), board: Box::new(board) }))
    }

    fn publish(&self, x: &Buffer<D>) -> Option<Published> {
        let board = self.board();
        let board = board.as_ref()?;
        // An error is met again by who reads results.
        self.attempt(|driver| board.publish(driver, x)).ok()?
    }

    fn grouped_sums(
        &self,
        work: &GroupedSums<'_, Matrix<D>, Self::Shared>,
        wanted: &mut [Wanted<'_, Self::Shared>],
    ) -> Result<(), KernelError> {
        let mut working = self.experts.lock().unwrap_or_else(PoisonError::into_inner);
        self.attempt(|driver| working.run_sums(driver, work, wanted))
    }
}
