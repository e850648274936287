//! A device that notes how long each of its operations takes, around any other device.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use conclave_kernels::{
    Device, Dtype, ExpertRows, Ffn, KernelError, LatentWrite, MlaShape, RotaryTable, SequenceRows, Weight,
};

use super::limits::Work;

/// An operation, and the shape `[out, in]` of its matrix where it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Operation {
    name: &'static str,
    shape: Option<(usize, usize)>,
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

/// Takes the notes of a [`Profiled`] device, when it is told to.
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

    fn lock(&self) -> MutexGuard<'_, Vec<Step>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A step of `rows` rows begins.
    fn begin(&self, rows: usize) {
        if self.on.load(Ordering::Relaxed) {
            let mut steps = self.lock();
            close(&mut steps);
            steps.push(Step { rows, seconds: 0.0, operations: BTreeMap::new(), begun: Instant::now() });
        }
    }

    /// Runs an operation. While notes are taken one runs at a time, so that the time of each is its own: the trunk's
    /// and the experts' would otherwise wait for each other's threads.
    fn time<R>(&self, note: impl FnOnce() -> (Operation, Work), run: impl FnOnce() -> R) -> R {
        if !self.on.load(Ordering::Relaxed) {
            return run();
        }
        let mut steps = self.lock();
        let started = Instant::now();
        let result = run();
        let seconds = started.elapsed().as_secs_f64();
        if let Some(step) = steps.last_mut() {
            let (operation, work) = note();
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

/// A device whose operations are noted by a [`Recorder`]: the bytes of weights, latents and embedding rows that each has
/// to read, the operations of its matrices, and its time.
pub struct Profiled<D> {
    device: Arc<D>,
    recorder: Arc<Recorder>,
    /// Bytes of a position in one layer of the cache.
    position_bytes: AtomicUsize,
}

impl<D: Device> Profiled<D> {
    /// Around a device.
    pub fn new(device: Arc<D>, recorder: Arc<Recorder>) -> Self {
        Self { device, recorder, position_bytes: AtomicUsize::new(0) }
    }

    /// `rows` rows through matrices; the first one's shape names the operation.
    fn product<'a>(
        &self,
        name: &'static str,
        rows: usize,
        matrices: impl IntoIterator<Item = &'a D::Matrix>,
    ) -> (Operation, Work) {
        let (mut operation, mut work) = (Operation { name, shape: None }, Work::default());
        for matrix in matrices {
            let (outputs, inputs) = self.device.matrix_shape(matrix);
            operation.shape = operation.shape.or(Some((outputs, inputs)));
            work.bytes += self.device.matrix_bytes(matrix) as f64;
            work.flops += 2.0 * (rows * outputs * inputs) as f64;
        }
        (operation, work)
    }

    /// Rows of `x [T, in]`.
    fn rows(&self, x: &[f32], matrix: &D::Matrix) -> usize {
        x.len() / self.device.matrix_shape(matrix).1.max(1)
    }

    fn grouped(&self, experts: &[ExpertRows<'_, D::Matrix>]) -> (Operation, Work) {
        let (mut operation, mut work) = (Operation { name: "grouped_ffn", shape: None }, Work::default());
        for ExpertRows { ffn, rows, .. } in experts.iter().filter(|expert| !expert.rows.is_empty()) {
            let (of_one, one) = self.product(operation.name, rows.len(), [&ffn.gate, &ffn.up, &ffn.down]);
            operation.shape = of_one.shape;
            work.bytes += one.bytes;
            work.flops += one.flops;
        }
        (operation, work)
    }

    /// Each sequence's latents once; every pair of a row and a position that is not after it.
    fn attention(&self, sequences: &[SequenceRows<'_>], q: &[f32], out: &[f32]) -> (Operation, Work) {
        let (mut all, mut positions, mut pairs) = (0, 0, 0);
        for SequenceRows { rows, first_position, .. } in sequences {
            all += rows;
            positions += first_position + rows;
            pairs += rows * first_position + rows * (rows + 1) / 2;
        }
        // A pair costs each head its query's elements for the score and its output's for the sum.
        let of_pair = (q.len() + out.len()) / all.max(1);
        let bytes = positions * self.position_bytes.load(Ordering::Relaxed);
        (plain("mla_attention"), Work { bytes: bytes as f64, flops: 2.0 * (pairs * of_pair) as f64 })
    }
}

/// An operation without a matrix.
fn plain(name: &'static str) -> Operation {
    Operation { name, shape: None }
}

impl<D: Device> Device for Profiled<D> {
    type Matrix = D::Matrix;
    type Table = D::Table;
    type Cache = D::Cache;

    const BLOCK: usize = D::BLOCK;
    const SPLIT: usize = D::SPLIT;

    fn activation(&self) -> Dtype {
        self.device.activation()
    }

    fn numerics(&self) -> String {
        self.device.numerics()
    }

    fn load_matrix(&self, weight: Weight<'_>) -> Result<D::Matrix, KernelError> {
        self.device.load_matrix(weight)
    }

    fn load_table(&self, weight: Weight<'_>) -> Result<D::Table, KernelError> {
        self.device.load_table(weight)
    }

    fn matrix_bytes(&self, matrix: &D::Matrix) -> usize {
        self.device.matrix_bytes(matrix)
    }

    fn matrix_shape(&self, matrix: &D::Matrix) -> (usize, usize) {
        self.device.matrix_shape(matrix)
    }

    fn new_cache(&self, layers: usize, blocks: usize, shape: &MlaShape) -> Result<D::Cache, KernelError> {
        self.position_bytes.store(shape.cached() * self.activation().size(), Ordering::Relaxed);
        self.device.new_cache(layers, blocks, shape)
    }

    fn embed(&self, table: &D::Table, tokens: &[u32], out: &mut [f32]) {
        self.recorder.begin(tokens.len());
        let bytes = (out.len() * self.activation().size()) as f64;
        let note = || (plain("embed"), Work { bytes, flops: 0.0 });
        self.recorder.time(note, || self.device.embed(table, tokens, out));
    }

    fn rms_norm(&self, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
        let note = || (plain("rms_norm"), Work::default());
        self.recorder.time(note, || self.device.rms_norm(x, gain, eps, out));
    }

    fn linear(&self, x: &[f32], w: &D::Matrix, y: &mut [f32]) {
        let note = || self.product("linear", self.rows(x, w), [w]);
        self.recorder.time(note, || self.device.linear(x, w, y));
    }

    fn gate_logits(&self, x: &[f32], w: &D::Matrix, y: &mut [f32]) {
        let note = || self.product("gate_logits", self.rows(x, w), [w]);
        self.recorder.time(note, || self.device.gate_logits(x, w, y));
    }

    fn ffn(&self, x: &[f32], ffn: &Ffn<D::Matrix>, y: &mut [f32]) {
        let note = || self.product("ffn", self.rows(x, &ffn.gate), [&ffn.gate, &ffn.up, &ffn.down]);
        self.recorder.time(note, || self.device.ffn(x, ffn, y));
    }

    fn grouped_ffn(&self, x: &[f32], experts: &[ExpertRows<'_, D::Matrix>], out: &mut [f32]) {
        self.recorder.time(|| self.grouped(experts), || self.device.grouped_ffn(x, experts, out));
    }

    fn mla_queries(
        &self,
        shape: &MlaShape,
        q: &[f32],
        uk: &[D::Matrix],
        rotary: &RotaryTable,
        positions: &[u32],
        out: &mut [f32],
    ) {
        let note = || self.product("mla_queries", positions.len(), uk);
        self.recorder.time(note, || self.device.mla_queries(shape, q, uk, rotary, positions, out));
    }

    fn write_latents(&self, cache: &mut D::Cache, layer: usize, write: &LatentWrite<'_>) {
        let bytes = (write.positions.len() * self.position_bytes.load(Ordering::Relaxed)) as f64;
        let note = || (plain("write_latents"), Work { bytes, flops: 0.0 });
        self.recorder.time(note, || self.device.write_latents(cache, layer, write));
    }

    fn mla_attention(
        &self,
        cache: &D::Cache,
        layer: usize,
        q: &[f32],
        sequences: &[SequenceRows<'_>],
        scale: f32,
        out: &mut [f32],
    ) {
        let (operation, work) = self.attention(sequences, q, out);
        let note = || (operation, work);
        self.recorder.time(note, || self.device.mla_attention(cache, layer, q, sequences, scale, out));
    }

    fn mla_values(&self, shape: &MlaShape, o_lat: &[f32], uv: &[D::Matrix], out: &mut [f32]) {
        let rows = out.len() / (shape.heads * shape.value).max(1);
        let note = || self.product("mla_values", rows, uv);
        self.recorder.time(note, || self.device.mla_values(shape, o_lat, uv, out));
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

    /// Begins a step, as the engine does.
    fn embed<D: Device>(device: &D, rows: usize) {
        let table = device.load_table(Weight::new(Dtype::F32, &[0; 32], 2, 4).unwrap()).unwrap();
        device.embed(&table, &vec![1; rows], &mut vec![0.0; rows * 4]);
    }

    #[test]
    fn operations_are_noted_step_by_step_when_asked_for() {
        let (device, recorder) = device();
        let w = matrix(&device, 32, 32);
        device.linear(&[1.0; 64], &w, &mut [0.0; 64]);
        recorder.start();
        embed(&device, 2);
        device.linear(&[1.0; 64], &w, &mut [0.0; 64]);
        device.linear(&[1.0; 32], &w, &mut [0.0; 32]);
        embed(&device, 1);
        let steps = recorder.stop();
        device.linear(&[1.0; 32], &w, &mut [0.0; 32]);
        assert!(recorder.stop().is_empty());

        assert_eq!(steps.iter().map(|step| step.rows).collect::<Vec<_>>(), [2, 1]);
        let names: Vec<String> = steps[0].operations.keys().map(Operation::to_string).collect();
        assert_eq!((names, steps[1].operations.len()), (vec!["embed".into(), "linear 32x32".into()], 1));
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
        let sequence = |rows, first_position| SequenceRows { first_row: 0, rows, first_position, blocks: &[0] };
        let (q, out) = (vec![0.0; 4 * 2 * 10], vec![0.0; 4 * 2 * 8]);
        let (_, work) = device.attention(&[sequence(1, 9), sequence(3, 4)], &q, &out);
        let pairs = 10.0 + (5.0 + 6.0 + 7.0);
        assert_eq!(work, Work { bytes: (10.0 + 7.0) * 10.0 * 4.0, flops: pairs * 2.0 * 2.0 * (10.0 + 8.0) });
    }
}
