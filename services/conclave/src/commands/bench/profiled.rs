//! A device that notes how long each of its operations takes, around any other device.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use conclave_kernels::{
    Device, Dtype, ExpertRows, Ffn, FoundToken, Fp8Weights, KernelError, LatentWrite, Mla, MlaShape, NotShared, Pool,
    RotaryTable, RowSpan, StepRows, TokenAsk, Weight,
};

use super::{
    limits::Work,
    recorder::{Operation, Recorder},
};

/// A device whose operations are noted by a [`Recorder`]: the bytes of weights, latents and embedding rows that each has
/// to read, the operations of its matrices, and its time, until it is done: a device may only queue it.
pub struct Profiled<D: Device> {
    device: Arc<D>,
    recorder: Arc<Recorder>,
    /// Read to wait for what is queued.
    last: Mutex<D::Buffer>,
    /// Bytes of a position in one layer of the cache.
    position_bytes: AtomicUsize,
}

impl<D: Device> Profiled<D> {
    /// Around a device.
    pub fn new(device: Arc<D>, recorder: Arc<Recorder>) -> Self {
        let last = Mutex::new(device.load_vector(vec![0.0]).unwrap_or_default());
        Self { device, recorder, last, position_bytes: AtomicUsize::new(0) }
    }

    /// Runs an operation; while notes are taken, until the device has done it.
    fn time<R>(&self, note: impl FnOnce(&R) -> (Operation, Work), run: impl FnOnce() -> R) -> R {
        self.recorder.time(note, || {
            let result = run();
            if self.recorder.is_on() {
                self.wait();
            }
            result
        })
    }

    /// Waits for all that was queued. A device that has failed tells who reads results.
    fn wait(&self) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.device.read(&mut last, &mut Vec::new());
    }

    /// `rows` rows through matrices; the first one's shape names the operation.
    fn product<'a>(
        &self,
        name: &'static str,
        rows: usize,
        matrices: impl IntoIterator<Item = &'a D::Matrix>,
    ) -> (Operation, Work) {
        let (mut operation, mut work) = (Operation::plain(name), Work::default());
        for matrix in matrices {
            let (outputs, inputs) = self.device.matrix_shape(matrix);
            operation.shape = operation.shape.or(Some((outputs, inputs)));
            work.bytes += self.device.matrix_bytes(matrix) as f64;
            work.flops += 2.0 * (rows * outputs * inputs) as f64;
        }
        (operation, work)
    }

    /// Rows of `x [T, in]`.
    fn rows(&self, x: &D::Buffer, matrix: &D::Matrix) -> usize {
        self.device.length(x) / self.device.matrix_shape(matrix).1.max(1)
    }

    fn grouped(&self, experts: &[ExpertRows<'_, D::Matrix>]) -> (Operation, Work) {
        let (mut operation, mut work) = (Operation::plain("grouped_ffn"), Work::default());
        for ExpertRows { ffn, rows, .. } in experts.iter().filter(|expert| !expert.rows.is_empty()) {
            let (of_one, one) = self.product(operation.name, rows.len(), [&ffn.gate, &ffn.up, &ffn.down]);
            operation.shape = of_one.shape;
            work.bytes += one.bytes;
            work.flops += one.flops;
        }
        (operation, work)
    }

    /// Each sequence's latents once; for every pair of a row and a position that is not after it, each head's query for the
    /// score and its output for the sum.
    fn attention(&self, shape: &MlaShape, rows: &Rows) -> (Operation, Work) {
        let bytes = rows.absorbed.positions * self.position_bytes.load(Ordering::Relaxed);
        let of_pair = shape.heads * (shape.cached() + shape.latent);
        (
            Operation::plain("mla_attention"),
            Work { bytes: bytes as f64, flops: 2.0 * (rows.absorbed.pairs * of_pair) as f64 },
        )
    }

    /// Each expanded sequence's latents once, its keys and values, and the same for every pair.
    fn expanded(&self, shape: &MlaShape, rows: &Rows) -> (Operation, Work) {
        let bytes = rows.expanded.positions * self.position_bytes.load(Ordering::Relaxed);
        let of_pair = shape.heads * (shape.nope + shape.rope + shape.value);
        let of_position = shape.heads * (shape.nope + shape.value) * shape.latent;
        let flops = 2.0 * (rows.expanded.pairs * of_pair + rows.expanded.positions * of_position) as f64;
        (Operation::plain("mla_expanded"), Work { bytes: bytes as f64, flops })
    }
}

/// What is noted of a step's rows.
#[derive(Debug, Default)]
struct Rows {
    count: usize,
    absorbed: Attended,
    expanded: Attended,
}

/// What rows attend to.
#[derive(Debug, Default)]
struct Attended {
    rows: usize,
    /// Positions that any row attends to.
    positions: usize,
    /// Pairs of a row and a position that it attends to.
    pairs: usize,
}

impl Rows {
    fn of(rows: &StepRows) -> Self {
        let mut all = Self { count: rows.len(), ..Self::default() };
        for RowSpan { rows, first_position, expanded, .. } in &rows.spans {
            let attended = if *expanded { &mut all.expanded } else { &mut all.absorbed };
            attended.rows += rows;
            attended.positions += first_position + rows;
            attended.pairs += rows * first_position + rows * (rows + 1) / 2;
        }
        all
    }
}

/// The rows of a step on the device, with a note of them.
#[derive(Default)]
pub struct NotedBatch<B> {
    rows: Rows,
    batch: B,
}

/// The matrices of some heads, with a note of them.
pub struct NotedHeads<H> {
    shape: (usize, usize),
    count: usize,
    heads: H,
}

impl<H> NotedHeads<H> {
    /// `rows` rows through all of them.
    fn product(&self, name: &'static str, rows: usize, element: usize) -> (Operation, Work) {
        let elements = self.count * self.shape.0 * self.shape.1;
        let work = Work { bytes: (elements * element) as f64, flops: 2.0 * (rows * elements) as f64 };
        (Operation { name, shape: Some(self.shape) }, work)
    }
}

impl<D: Device> Device for Profiled<D> {
    type Matrix = D::Matrix;
    type Heads = NotedHeads<D::Heads>;
    type Table = D::Table;
    type Rotary = D::Rotary;
    type Cache = D::Cache;
    type Buffer = D::Buffer;
    type Batch = NotedBatch<D::Batch>;
    type Fetched = D::Fetched;
    type Shared = NotShared;

    const BLOCK: usize = D::BLOCK;
    const SPLIT: usize = D::SPLIT;

    fn activation(&self) -> Dtype {
        self.device.activation()
    }

    fn numerics(&self) -> String {
        self.device.numerics()
    }

    fn fp8_weights(&self) -> Fp8Weights {
        self.device.fp8_weights()
    }

    fn load_matrix(&self, weight: Weight<'_>) -> Result<D::Matrix, KernelError> {
        self.device.load_matrix(weight)
    }

    fn load_heads(&self, heads: &[Weight<'_>]) -> Result<Self::Heads, KernelError> {
        let shape = heads.first().map_or((0, 0), Weight::shape);
        Ok(NotedHeads { shape, count: heads.len(), heads: self.device.load_heads(heads)? })
    }

    fn load_table(&self, weight: Weight<'_>) -> Result<D::Table, KernelError> {
        self.device.load_table(weight)
    }

    fn load_vector(&self, values: Vec<f32>) -> Result<D::Buffer, KernelError> {
        self.device.load_vector(values)
    }

    fn load_rotary(&self, table: RotaryTable) -> Result<D::Rotary, KernelError> {
        self.device.load_rotary(table)
    }

    fn new_cache(&self, layers: usize, blocks: usize, shape: &MlaShape) -> Result<D::Cache, KernelError> {
        self.position_bytes.store(shape.cached() * self.activation().size(), Ordering::Relaxed);
        self.device.new_cache(layers, blocks, shape)
    }

    fn matrix_bytes(&self, matrix: &D::Matrix) -> usize {
        self.device.matrix_bytes(matrix)
    }

    fn matrix_shape(&self, matrix: &D::Matrix) -> (usize, usize) {
        self.device.matrix_shape(matrix)
    }

    fn length(&self, buffer: &D::Buffer) -> usize {
        self.device.length(buffer)
    }

    fn load_batch(&self, rows: StepRows, batch: &mut Self::Batch) {
        self.recorder.begin(rows.len());
        batch.rows = Rows::of(&rows);
        self.device.load_batch(rows, &mut batch.batch);
    }

    fn read(&self, x: &mut D::Buffer, values: &mut Vec<f32>) -> Result<(), KernelError> {
        self.device.read(x, values)
    }

    fn fetch(&self, x: &D::Buffer, y: &mut D::Buffer) -> D::Fetched {
        self.device.fetch(x, y)
    }

    fn take(&self, fetched: D::Fetched) -> Result<(Vec<u8>, Vec<f32>), KernelError> {
        self.device.take(fetched)
    }

    fn decode(&self, x: &[u8], out: &mut D::Buffer) {
        self.device.decode(x, out);
    }

    fn gather(&self, parts: &[(&D::Buffer, &[u32])], width: usize, out: &mut D::Buffer) {
        self.device.gather(parts, width, out);
    }

    fn add(&self, x: &mut D::Buffer, delta: &D::Buffer) {
        self.device.add(x, delta);
    }

    fn add_two(&self, x: &mut D::Buffer, a: &D::Buffer, b: &D::Buffer) {
        self.device.add_two(x, a, b);
    }

    fn embed(&self, table: &D::Table, batch: &Self::Batch, out: &mut D::Buffer) {
        let embed = || {
            self.device.embed(table, &batch.batch, out);
            (self.device.length(out) * self.activation().size()) as f64
        };
        self.time(|bytes| (Operation::plain("embed"), Work { bytes: *bytes, flops: 0.0 }), embed);
    }

    fn rms_norm(&self, x: &D::Buffer, gain: &D::Buffer, eps: f32, out: &mut D::Buffer) {
        let note = |_: &_| (Operation::plain("rms_norm"), Work::default());
        self.time(note, || self.device.rms_norm(x, gain, eps, out));
    }

    fn linear(&self, x: &D::Buffer, w: &D::Matrix, y: &mut D::Buffer) {
        let note = |_: &_| self.product("linear", self.rows(x, w), [w]);
        self.time(note, || self.device.linear(x, w, y));
    }

    fn gate_logits(&self, x: &D::Buffer, w: &D::Matrix, y: &mut D::Buffer) {
        let note = |_: &_| self.product("gate_logits", self.rows(x, w), [w]);
        self.time(note, || self.device.gate_logits(x, w, y));
    }

    fn ffn(&self, x: &D::Buffer, ffn: &Ffn<D::Matrix>, y: &mut D::Buffer) {
        let note = |_: &_| self.product("ffn", self.rows(x, &ffn.gate), [&ffn.gate, &ffn.up, &ffn.down]);
        self.time(note, || self.device.ffn(x, ffn, y));
    }

    fn grouped_ffn(
        &self,
        x: &[&[u8]],
        experts: &[ExpertRows<'_, D::Matrix>],
        sums: &mut [f32],
    ) -> Result<(), KernelError> {
        self.time(|_| self.grouped(experts), || self.device.grouped_ffn(x, experts, sums))
    }

    fn mla_queries(
        &self,
        mla: &Mla<D::Rotary>,
        batch: &Self::Batch,
        q: &D::Buffer,
        uk: &Self::Heads,
        out: &mut D::Buffer,
    ) {
        let note = |_: &_| uk.product("mla_queries", batch.rows.absorbed.rows, self.activation().size());
        self.time(note, || self.device.mla_queries(mla, &batch.batch, q, &uk.heads, out));
    }

    fn write_latents(
        &self,
        mla: &Mla<D::Rotary>,
        batch: &Self::Batch,
        write: &LatentWrite<'_, D::Buffer>,
        cache: &mut D::Cache,
    ) {
        let bytes = (batch.rows.count * self.position_bytes.load(Ordering::Relaxed)) as f64;
        let note = |_: &_| (Operation::plain("write_latents"), Work { bytes, flops: 0.0 });
        self.time(note, || self.device.write_latents(mla, &batch.batch, write, cache));
    }

    fn mla_attention(
        &self,
        mla: &Mla<D::Rotary>,
        batch: &Self::Batch,
        cache: (&D::Cache, usize),
        q: &D::Buffer,
        out: &mut D::Buffer,
    ) {
        let note = |_: &_| self.attention(&mla.shape, &batch.rows);
        self.time(note, || self.device.mla_attention(mla, &batch.batch, cache, q, out));
    }

    fn mla_values(
        &self,
        mla: &Mla<D::Rotary>,
        batch: &Self::Batch,
        o_lat: &D::Buffer,
        uv: &Self::Heads,
        out: &mut D::Buffer,
    ) {
        let note = |_: &_| uv.product("mla_values", batch.rows.absorbed.rows, self.activation().size());
        self.time(note, || self.device.mla_values(mla, &batch.batch, o_lat, &uv.heads, out));
    }

    fn relax(&self) {
        self.device.relax();
    }

    fn expands(&self) -> bool {
        self.device.expands()
    }

    fn mla_expanded(
        &self,
        mla: &Mla<D::Rotary>,
        batch: &Self::Batch,
        cache: (&D::Cache, usize),
        q: &D::Buffer,
        kv_b: &D::Matrix,
        out: &mut D::Buffer,
    ) {
        let note = |_: &_| self.expanded(&mla.shape, &batch.rows);
        self.time(note, || self.device.mla_expanded(mla, &batch.batch, cache, q, kv_b, out));
    }

    fn pool(&self) -> Option<&Pool> {
        self.device.pool()
    }

    fn finds_tokens(&self, vocab: usize) -> bool {
        self.device.finds_tokens(vocab)
    }

    fn find_tokens(
        &self,
        logits: &mut D::Buffer,
        mask: &[u64],
        asks: &[TokenAsk<'_>],
    ) -> Result<Vec<Option<FoundToken>>, KernelError> {
        let bytes = (self.device.length(logits) * size_of::<f32>()) as f64;
        let note = |_: &_| (Operation::plain("find_tokens"), Work { bytes, flops: 0.0 });
        self.time(note, || self.device.find_tokens(logits, mask, asks))
    }
}

#[cfg(test)]
mod tests {
    use conclave_kernels::{Pool, Reference};

    use super::*;

    fn device() -> (Profiled<Reference>, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        let device = Arc::new(Reference::new(Pool::new(1).unwrap()));
        (Profiled::new(device, recorder.clone()), recorder)
    }

    fn matrix<D: Device>(device: &D, outputs: usize, inputs: usize) -> D::Matrix {
        let bytes = vec![0; outputs * inputs * 4];
        device.load_matrix(Weight::new(Dtype::F32, &bytes, outputs, inputs).unwrap()).unwrap()
    }

    /// Rows of one sequence.
    fn span(rows: usize, first_position: usize) -> StepRows {
        let mut step = StepRows::default();
        step.push(&vec![1; rows], first_position, &[0], 64);
        step
    }

    /// Begins a step, as the engine does.
    fn embed<D: Device>(device: &D, rows: usize) {
        let table = device.load_table(Weight::new(Dtype::F32, &[0; 32], 2, 4).unwrap()).unwrap();
        let mut batch = D::Batch::default();
        device.load_batch(span(rows, 0), &mut batch);
        device.embed(&table, &batch, &mut D::Buffer::default());
    }

    #[test]
    fn operations_are_noted_step_by_step_when_asked_for() {
        let (device, recorder) = device();
        let w = matrix(&device, 32, 32);
        let linear = |rows: usize| device.linear(&vec![1.0; rows * 32], &w, &mut Vec::new());
        linear(2);
        recorder.start();
        embed(&device, 2);
        linear(2);
        linear(1);
        embed(&device, 1);
        let steps = recorder.stop();
        linear(1);
        assert!(recorder.stop().is_empty());

        assert_eq!(steps.iter().map(|step| step.rows).collect::<Vec<_>>(), [2, 1]);
        let names: Vec<String> = steps[0].operations.keys().map(Operation::to_string).collect();
        assert_eq!((names, steps[1].operations.len()), (vec!["embed".into(), "linear 32x32".into()], 1));
        let (_, embedded) = steps[0].operations.first_key_value().unwrap();
        assert_eq!(embedded.work, Work { bytes: 2.0 * 4.0 * 4.0, flops: 0.0 });
        let (_, linear) = steps[0].operations.last_key_value().unwrap();
        assert_eq!(linear.calls, 2);
        assert_eq!(linear.work, Work { bytes: 2.0 * 32.0 * 32.0 * 4.0, flops: 2.0 * 3.0 * 32.0 * 32.0 });
        assert!(linear.seconds > 0.0 && linear.seconds < steps[0].seconds);
    }

    #[test]
    fn only_experts_with_rows_are_read() {
        let (device, _) = device();
        let ffn = || Ffn { gate: matrix(&device, 64, 32), up: matrix(&device, 64, 32), down: matrix(&device, 32, 64) };
        let (used, idle) = (ffn(), ffn());
        let rows = |ffn, rows, weights| ExpertRows { ffn, rows, weights, slots: rows };
        let (operation, work) = device.grouped(&[rows(&used, &[0, 1], &[1.0; 2]), rows(&idle, &[], &[])]);
        assert_eq!(operation.to_string(), "grouped_ffn 64x32");
        let elements = 3.0 * 64.0 * 32.0;
        assert_eq!(work, Work { bytes: elements * 4.0, flops: 2.0 * 2.0 * elements });
    }

    #[test]
    fn attention_reads_a_sequence_once_and_works_for_every_pair() {
        let (device, _) = device();
        let shape = MlaShape { heads: 2, nope: 4, rope: 2, value: 4, latent: 8 };
        device.new_cache(1, 1, &shape).unwrap();
        let mut rows = span(1, 9);
        rows.push(&[1; 3], 4, &[0], 64);
        let (_, work) = device.attention(&shape, &Rows::of(&rows));
        let pairs = 10.0 + (5.0 + 6.0 + 7.0);
        assert_eq!(work, Work { bytes: (10.0 + 7.0) * 10.0 * 4.0, flops: pairs * 2.0 * 2.0 * (10.0 + 8.0) });
    }

    #[test]
    fn expanded_rows_are_counted_apart() {
        let (device, _) = device();
        let shape = MlaShape { heads: 2, nope: 4, rope: 2, value: 4, latent: 8 };
        device.new_cache(1, 1, &shape).unwrap();
        let mut rows = span(1, 9);
        rows.push(&[1; 3], 4, &[0], 64);
        rows.spans[1].expanded = true;
        let rows = Rows::of(&rows);
        assert_eq!((rows.count, rows.absorbed.rows, rows.expanded.rows), (4, 1, 3));
        let (_, absorbed) = device.attention(&shape, &rows);
        assert_eq!(absorbed, Work { bytes: 10.0 * 10.0 * 4.0, flops: 10.0 * 2.0 * 2.0 * (10.0 + 8.0) });
        let (_, expanded) = device.expanded(&shape, &rows);
        let (pairs, of_position) = (5.0 + 6.0 + 7.0, 2.0 * 2.0 * (4.0 + 4.0) * 8.0);
        let flops = pairs * 2.0 * 2.0 * (6.0 + 4.0) + 7.0 * of_position;
        assert_eq!(expanded, Work { bytes: 7.0 * 10.0 * 4.0, flops });
    }
}
