//! A small random model of chosen sizes, loaded into any device.

use std::{
    io::{self, Write},
    sync::Once,
};

use conclave_kernels::{
    BlockScales, Cpu, Device, Dtype, Ffn, Isa, KernelError, LatentWrite, Mla, MlaShape, Pool, Reference, RotaryTable,
    StepRows, Weight, activation,
};

use crate::fp8;
pub(crate) use crate::numbers::Numbers;

/// Sizes of a model.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
    pub(crate) vocab: usize,
    pub(crate) shape: MlaShape,
    /// Type of the stored weights.
    pub(crate) dtype: Dtype,
    /// Instead, of matrices that may be so: FP8 in blocks of so many rows and columns.
    pub(crate) fp8: Option<(usize, usize)>,
}

/// Which of gate, up and down of the experts in FP8 are so: all kinds of mixtures.
const IN_FP8: [[bool; 3]; 4] = [[true; 3], [true, true, false], [true, false, true], [false, false, true]];

impl Case {
    /// Sizes that are multiples of nothing.
    pub(crate) fn odd() -> Self {
        let shape = MlaShape { heads: 3, nope: 20, rope: 6, value: 12, latent: 37 };
        Self { hidden: 72, inner: 53, vocab: 161, shape, dtype: Dtype::F32, fp8: None }
    }

    /// Sizes as models have them.
    pub(crate) fn even() -> Self {
        let shape = MlaShape { heads: 16, nope: 32, rope: 16, value: 32, latent: 128 };
        Self { hidden: 256, inner: 192, vocab: 512, shape, dtype: Dtype::Bf16, fp8: None }
    }

    /// As many heads as attend in place, not all sixteen, and latents that fill no whole pair of panels.
    pub(crate) fn in_place() -> Self {
        let shape = MlaShape { heads: 11, nope: 8, rope: 6, value: 12, latent: 40 };
        Self { hidden: 16, inner: 16, vocab: 16, shape, dtype: Dtype::F32, fp8: None }
    }

    /// Sizes that the kernels for sm_90a take, some of which fill no whole tile.
    pub(crate) fn tiled() -> Self {
        let shape = MlaShape { heads: 3, nope: 40, rope: 64, value: 24, latent: 512 };
        Self { hidden: 136, inner: 72, vocab: 161, shape, dtype: Dtype::Bf16, fp8: None }
    }

    /// Sizes that the kernel for sm_90a over expanded keys and values takes.
    pub(crate) fn expanding() -> Self {
        let shape = MlaShape { heads: 2, nope: 128, rope: 64, value: 128, latent: 512 };
        Self { hidden: 8, inner: 8, vocab: 8, shape, dtype: Dtype::Bf16, fp8: None }
    }

    /// Sizes as models have them, in FP8: in blocks that the CPU keeps, and in others.
    pub(crate) fn all_fp8() -> [Self; 3] {
        [(128, 128), (16, 256), (64, 96)].map(|block| Self::even().in_fp8(block))
    }

    /// The same sizes and values, in FP8.
    pub(crate) fn in_fp8(self, block: (usize, usize)) -> Self {
        Self { fp8: Some(block), ..self }
    }

    /// The same sizes, in bf16 or f32.
    fn wide(&self) -> Self {
        Self { fp8: None, ..self.clone() }
    }

    pub(crate) fn matrix<D: Device>(
        &self,
        device: &D,
        numbers: &mut Numbers,
        outputs: usize,
        inputs: usize,
    ) -> D::Matrix {
        let values = numbers.vector(outputs * inputs, (3.0 / inputs as f32).sqrt());
        device.load_matrix(Stored::new(self, &values, inputs).weight()).unwrap()
    }

    fn ffn<D: Device>(&self, device: &D, numbers: &mut Numbers, fp8: [bool; 3]) -> Ffn<D::Matrix> {
        let [gate, up, down] = fp8.map(|fp8| if fp8 { self.clone() } else { self.wide() });
        Ffn {
            gate: gate.matrix(device, numbers, self.inner, self.hidden),
            up: up.matrix(device, numbers, self.inner, self.hidden),
            down: down.matrix(device, numbers, self.hidden, self.inner),
        }
    }

    /// The same weights on any device.
    pub(crate) fn load<D: Device>(&self, device: &D) -> Model<D> {
        let mut numbers = Numbers::new(77);
        let shape = self.shape;
        let table = activation::encode(self.dtype, &numbers.vector(self.vocab * self.hidden, 1.0));
        let table = Weight::new(self.dtype, &table, self.vocab, self.hidden).unwrap();
        let lm_head = self.matrix(device, &mut numbers, self.vocab, self.hidden);
        let experts = IN_FP8.iter().map(|fp8| self.ffn(device, &mut numbers, *fp8)).collect();
        let keys = self.heads(&mut numbers, 0.2, shape.nope);
        let values = self.heads(&mut numbers, (3.0 / shape.latent as f32).sqrt(), shape.value);
        let kv_b: Vec<f32> = keys.iter().zip(&values).flat_map(|(keys, values)| [&keys[..], values].concat()).collect();
        let kv_b = Stored::new(self, &kv_b, shape.latent);
        let head = |head: usize| head * (shape.nope + shape.value);
        // Stored [dn, r].
        let uk = |at| kv_b.weight().slice(head(at), shape.nope).transpose();
        let uk: Vec<Weight<'_>> = (0..shape.heads).map(uk).collect();
        let uv = |at| kv_b.weight().slice(head(at) + shape.nope, shape.value);
        let uv: Vec<Weight<'_>> = (0..shape.heads).map(uv).collect();
        let omega: Vec<f64> = (0..shape.rope / 2).map(|at| 100f64.powf(-2.0 * at as f64 / shape.rope as f64)).collect();
        let rotary = device.load_rotary(RotaryTable::new(1200, &omega, 1.0)).unwrap();
        Model {
            table: device.load_table(table).unwrap(),
            lm_head,
            experts,
            uk: device.load_heads(&uk).unwrap(),
            uv: device.load_heads(&uv).unwrap(),
            kv_b: device.load_matrix(kv_b.weight()).unwrap(),
            gain: buffer(device, &numbers.vector(self.hidden, 1.5)),
            latent_gain: buffer(device, &numbers.vector(shape.latent, 1.5)),
            mla: Mla { shape, rotary, scale: 0.3 },
            gate: self.wide().matrix(device, &mut numbers, self.vocab, self.hidden),
        }
    }

    /// A matrix `[rows, r]` for each head.
    fn heads(&self, numbers: &mut Numbers, scale: f32, rows: usize) -> Vec<Vec<f32>> {
        (0..self.shape.heads).map(|_| numbers.vector(rows * self.shape.latent, scale)).collect()
    }
}

/// A matrix as a checkpoint holds it.
pub(crate) struct Stored {
    dtype: Dtype,
    data: Vec<u8>,
    cols: usize,
    /// Of FP8: the block, and the scales' bytes.
    scales: Option<((usize, usize), Vec<u8>)>,
}

impl Stored {
    pub(crate) fn new(case: &Case, values: &[f32], cols: usize) -> Self {
        let Some(block) = case.fp8 else {
            return Self { dtype: case.dtype, data: activation::encode(case.dtype, values), cols, scales: None };
        };
        let (data, scales) = fp8::blocks(values, cols, block);
        Self { dtype: Dtype::F32, data, cols, scales: Some((block, activation::encode(Dtype::F32, &scales))) }
    }

    pub(crate) fn weight(&self) -> Weight<'_> {
        match &self.scales {
            None => Weight::new(self.dtype, &self.data, self.data.len() / self.dtype.size() / self.cols, self.cols),
            Some((block, scales)) => {
                let scales = BlockScales::new(scales, *block);
                Weight::fp8(&self.data, self.data.len() / self.cols, self.cols, scales)
            }
        }
        .unwrap()
    }
}

/// Weights of a [`Case`] on a device.
pub(crate) struct Model<D: Device> {
    pub(crate) table: D::Table,
    pub(crate) lm_head: D::Matrix,
    pub(crate) experts: Vec<Ffn<D::Matrix>>,
    pub(crate) uk: D::Heads,
    pub(crate) uv: D::Heads,
    pub(crate) kv_b: D::Matrix,
    /// `[vocab, H]`, never in FP8.
    pub(crate) gate: D::Matrix,
    pub(crate) gain: D::Buffer,
    pub(crate) latent_gain: D::Buffer,
    pub(crate) mla: Mla<D::Rotary>,
}

/// Values in the device's memory.
pub(crate) fn buffer<D: Device>(device: &D, values: &[f32]) -> D::Buffer {
    device.load_vector(values.to_vec()).unwrap()
}

/// The bytes of a buffer, rounded to the activation type.
pub(crate) fn encode<D: Device>(device: &D, x: &D::Buffer) -> Result<Vec<u8>, KernelError> {
    device.take(device.fetch(x, &mut D::Buffer::default())).map(|(bytes, _)| bytes)
}

/// Rows of a step in the device's memory.
pub(crate) fn batch<D: Device>(device: &D, rows: StepRows) -> D::Batch {
    let mut batch = D::Batch::default();
    device.load_batch(rows, &mut batch);
    batch
}

/// What an operation leaves in a buffer: `length` values, each of which it has to write.
pub(crate) fn output<D: Device>(device: &D, length: usize, op: impl FnOnce(&mut D::Buffer)) -> Vec<f32> {
    let mut out = buffer(device, &vec![f32::NAN; length]);
    op(&mut out);
    let mut values = Vec::new();
    device.read(&mut out, &mut values).unwrap();
    assert_eq!(values.len(), length, "length of an output");
    values
}

/// Positions of a sequence with blocks in descending order, so that no two neighbours are neighbours.
pub(crate) fn rows<D: Device>(positions: std::ops::Range<usize>, blocks: &[u32]) -> StepRows {
    let mut rows = StepRows::default();
    rows.push(&vec![0; positions.len()], positions.start, blocks, D::BLOCK);
    rows
}

/// Attention over a sequence of `length` positions that comes in chunks (`cut`, the last one repeated as often as
/// needed), each beside rows of another sequence. Gives the bits of all outputs `[length, n, r]`.
/// With `poison`, every slot that does not hold a position yet is NaN.
pub(crate) fn attend<D: Device>(device: &D, case: &Case, length: usize, cut: &[usize], poison: bool) -> Vec<u32> {
    let shape = case.shape;
    let (model, mut numbers) = (case.load(device), Numbers::new(5));
    let kv = numbers.vector(length * shape.cached(), 2.0);
    let q = numbers.vector(length * shape.heads * shape.cached(), 1.0);
    let count = length.div_ceil(D::BLOCK) as u32;
    let blocks: Vec<u32> = (0..count).rev().collect();
    // The other sequence: seven positions in a block of its own, of which the last three are asked for.
    let (other, other_kv) = ([count], Numbers::new(6).vector(7 * shape.cached(), 1.0));
    let other_q = Numbers::new(7).vector(3 * shape.heads * shape.cached(), 1.0);
    let mut cache = device.new_cache(2, count as usize + 1, &shape).unwrap();
    let write = |cache: &mut D::Cache, kv: &[f32], positions: std::ops::Range<usize>, blocks: &[u32]| {
        let (batch, kv) = (batch(device, rows::<D>(positions, blocks)), buffer(device, kv));
        device.write_latents(&model.mla, &batch, &LatentWrite { layer: 1, kv: &kv, gain: &model.latent_gain }, cache);
    };
    if poison {
        let all: Vec<u32> = (0..=count).collect();
        let slots = all.len() * D::BLOCK;
        let nan = vec![f32::NAN; slots * shape.cached()];
        write(&mut cache, &nan, 0..slots, &all);
    }
    write(&mut cache, &other_kv, 0..7, &other);
    let mut found = Vec::new();
    let mut first = 0;
    let mut cuts = cut.iter().chain(std::iter::repeat(cut.last().unwrap()));
    while first < length {
        let chunk = (*cuts.next().unwrap()).min(length - first);
        let width = shape.cached();
        write(&mut cache, &kv[first * width..(first + chunk) * width], first..first + chunk, &blocks);
        let width = shape.heads * width;
        let both = buffer(device, &[&other_q[..], &q[first * width..(first + chunk) * width]].concat());
        let mut step = rows::<D>(4..7, &other);
        step.push(&vec![0; chunk], first, &blocks, D::BLOCK);
        let step = batch(device, step);
        let out = output(device, (3 + chunk) * shape.heads * shape.latent, |out| {
            device.mla_attention(&model.mla, &step, (&cache, 1), &both, out);
        });
        assert!(out.iter().all(|value| value.is_finite()), "attention from {first} on, {chunk} rows");
        found.extend(bits(&out[3 * shape.heads * shape.latent..]));
        first += chunk;
    }
    found
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Something to check on a device of any kind.
pub(crate) trait Check {
    fn on<D: Device>(&mut self, device: &D);
}

/// The instruction sets of this machine. Says once which others are not tested.
pub(crate) fn instruction_sets() -> Vec<Isa> {
    static SAID: Once = Once::new();
    let available = Isa::available();
    SAID.call_once(|| {
        for isa in Isa::ALL.iter().filter(|isa| !available.contains(isa)) {
            // Not by `println`, which the test harness shows of failing tests only.
            let _ = writeln!(io::stderr(), "SKIP {isa}: this machine lacks it");
        }
    });
    available
}

/// Runs a check on the reference and on the CPU with each instruction set of this machine, on `threads` threads.
pub(crate) fn on_each_device(threads: usize, check: &mut impl Check) {
    check.on(&Reference::new(Pool::new(threads).unwrap()));
    for isa in instruction_sets() {
        check.on(&Cpu::new(Pool::new(threads).unwrap(), Some(isa)).unwrap());
    }
}
