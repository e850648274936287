//! How near the CPU device comes to this machine: plain reading of memory, the one-token linear layer, which should read
//! its weights as fast, and the 512-token one in operations a second. Run by hand on a quiet machine:
//! `cargo run --release -p conclave-kernels --example rates [threads] [isa] [experts]`.

use std::time::Instant;

use conclave_kernels::{
    BlockScales, Cpu, CpuRates, Device, Dtype, ExpertRows, Ffn, KernelError, LatentWrite, Mla, MlaShape, Pool,
};
use conclave_kernels::{RateProbe, RotaryTable, StepRows, Weight, activation};

/// Sizes of V2-Lite.
const HIDDEN: usize = 2048;
const INNER: usize = 1408;
const SHAPE: MlaShape = MlaShape { heads: 16, nope: 128, rope: 64, value: 128, latent: 512 };
const ROUNDS: usize = 7;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let cores = std::thread::available_parallelism()?.get();
    let threads = args.next().map_or(Ok(cores), |threads| threads.parse())?;
    let isa = args.next().map(|isa| isa.parse()).transpose()?;
    let count = args.next().map_or(Ok(24), |count| count.parse())?;
    let pool = Pool::new(threads)?;
    let cpu = Cpu::new(pool.clone(), isa)?;
    println!("{} on {threads} threads; medians of {ROUNDS}", cpu.numerics());

    let rates = CpuRates::new(pool.clone(), cpu.isa(), CpuRates::BYTES)?;
    let read = median(|| rates.read_rate().expect("the processor does not fail")) / 1e9;
    println!("plain reads              {read:7.1} GB/s");
    let rate = median(|| rates.multiply_add_rate().expect("the processor does not fail"));
    println!("multiply-adds            {:7.1} GFLOP/s", 2.0 * rate / 1e9);
    drop(rates);
    for format in Format::ALL {
        linear(&cpu, read, format)?;
        experts(&cpu, read, count, format)?;
    }
    attention(&cpu, read)?;
    Ok(())
}

/// Median seconds of one call.
fn time(mut call: impl FnMut()) -> f64 {
    call();
    median(|| {
        let start = Instant::now();
        call();
        start.elapsed().as_secs_f64()
    })
}

fn median(sample: impl FnMut() -> f64) -> f64 {
    let mut samples: Vec<f64> = std::iter::repeat_with(sample).take(ROUNDS).collect();
    samples.sort_by(f64::total_cmp);
    samples[ROUNDS / 2]
}

fn numbers(length: usize) -> Vec<f32> {
    (0..length).map(|at| ((at * 7919) % 1009) as f32 / 1009.0 - 0.5).collect()
}

/// How weights are stored.
#[derive(Clone, Copy)]
enum Format {
    Bf16,
    Fp8,
}

impl Format {
    const ALL: [(&str, Self); 2] = [("bf16", Self::Bf16), ("fp8", Self::Fp8)];

    fn matrix(self, cpu: &Cpu, outputs: usize, inputs: usize) -> Result<<Cpu as Device>::Matrix, KernelError> {
        let bytes = vec![0x3c; outputs * inputs * 2];
        match self {
            Self::Bf16 => cpu.load_matrix(Weight::new(Dtype::Bf16, &bytes, outputs, inputs)?),
            Self::Fp8 => {
                let scales = vec![0x3c; outputs.div_ceil(128) * inputs.div_ceil(128) * 4];
                let scales = BlockScales::new(&scales, (128, 128));
                cpu.load_matrix(Weight::fp8(&bytes[..outputs * inputs], outputs, inputs, scales)?)
            }
        }
    }
}

/// Many layers one after the other, so that none lies in a cache.
fn linear(cpu: &Cpu, read: f64, (name, format): (&str, Format)) -> Result<(), KernelError> {
    let layers = (0..40).map(|_| format.matrix(cpu, 3072, HIDDEN)).collect::<Result<Vec<_>, _>>()?;
    let bytes: usize = layers.iter().map(|layer| cpu.matrix_bytes(layer)).sum();
    let mut y = Vec::new();
    for rows in [1, 2, 4, 8, 16, 32, 64, 512] {
        let x = numbers(rows * HIDDEN);
        let used = if rows > 8 { &layers[..4] } else { &layers[..] };
        let seconds = time(|| used.iter().for_each(|layer| cpu.linear(&x, layer, &mut y)));
        let seconds = seconds * layers.len() as f64 / used.len() as f64;
        let rate = bytes as f64 / seconds / 1e9;
        let flops = 2.0 * (layers.len() * 3072 * HIDDEN * rows) as f64 / seconds / 1e9;
        println!("{name} linear, {rows:3} tokens  {rate:7.1} GB/s ({:.2} of reads) {flops:8.1} GFLOP/s", rate / read);
    }
    Ok(())
}

fn experts(cpu: &Cpu, read: f64, count: usize, (name, format): (&str, Format)) -> Result<(), KernelError> {
    let experts = (0..count)
        .map(|_| {
            let (gate, up) = (format.matrix(cpu, INNER, HIDDEN)?, format.matrix(cpu, INNER, HIDDEN)?);
            Ok(Ffn { gate, up, down: format.matrix(cpu, HIDDEN, INNER)? })
        })
        .collect::<Result<Vec<_>, KernelError>>()?;
    let of =
        |ffn: &Ffn<_>| [&ffn.gate, &ffn.up, &ffn.down].map(|matrix| cpu.matrix_bytes(matrix)).iter().sum::<usize>();
    let bytes: usize = experts.iter().map(of).sum();
    for rows in [1, 3, 64] {
        let x = activation::encode(Dtype::Bf16, &numbers(rows * HIDDEN));
        let (index, weights): (Vec<u32>, Vec<f32>) = (0..rows as u32).map(|row| (row, 0.5)).unzip();
        let batch: Vec<ExpertRows<'_, _>> =
            experts.iter().map(|ffn| ExpertRows { ffn, rows: &index, weights: &weights, slots: &index }).collect();
        let mut out = vec![0.0; rows * HIDDEN];
        let seconds = time(|| cpu.grouped_ffn(&[&x], &batch, &mut out).expect("the processor does not fail"));
        let rate = bytes as f64 / seconds / 1e9;
        let flops = 2.0 * (count * 3 * INNER * HIDDEN * rows) as f64 / seconds / 1e9;
        println!(
            "{name}, {count} experts, {rows:3} tokens   {rate:7.1} GB/s ({:.2} of reads) {flops:8.1} GFLOP/s",
            rate / read
        );
    }
    Ok(())
}

fn attention(cpu: &Cpu, read: f64) -> Result<(), KernelError> {
    const POSITIONS: usize = 16 << 10;
    let blocks: Vec<u32> = (0..(POSITIONS / Cpu::BLOCK) as u32).collect();
    let mut cache = cpu.new_cache(1, blocks.len(), &SHAPE)?;
    let rotary = cpu.load_rotary(RotaryTable::new(POSITIONS, &[0.01; 32], 1.0))?;
    let mla = Mla { shape: SHAPE, rotary, scale: 0.1 };
    // The last rows of one sequence.
    let last = |rows: usize| {
        let (mut step, mut batch) = (StepRows::default(), StepRows::default());
        step.push(&vec![0; rows], POSITIONS - rows, &blocks, Cpu::BLOCK);
        cpu.load_batch(step, &mut batch);
        batch
    };
    let (kv, gain) = (numbers(POSITIONS * SHAPE.cached()), vec![1.0; 512]);
    let write = LatentWrite { layer: 0, kv: &kv, gain: &gain };
    cpu.write_latents(&mla, &last(POSITIONS), &write, &mut cache);
    for rows in [1, 64] {
        let (q, batch, mut out) = (numbers(rows * SHAPE.heads * SHAPE.cached()), last(rows), Vec::new());
        let seconds = time(|| cpu.mla_attention(&mla, &batch, (&cache, 0), &q, &mut out));
        let rate = (POSITIONS * SHAPE.cached() * 2) as f64 / seconds / 1e9;
        let flops = (2 * rows * POSITIONS * SHAPE.heads * (SHAPE.cached() + SHAPE.latent)) as f64 / seconds / 1e9;
        println!("attention 16k, {rows:3} rows  {rate:7.1} GB/s ({:.2} of reads) {flops:8.1} GFLOP/s", rate / read);
    }
    Ok(())
}
