//! The CUDA device: on the shim, and on a GPU where there is one.

use std::{
    collections::BTreeSet,
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use conclave_kernels::{
    Device, Dtype, Ffn, Pool, Reference, Weight, activation,
    cuda::{Cuda, CudaError, Driver, EncodedMap, Launch, LibraryProduct, Shim, ShimMemory, TensorMap, plain::Linear},
};

use crate::{
    agreement::{self, Moves},
    exactness::{BatchSizes, Batches, Chunks, Poison},
    expanded::Long,
    support::{Case, Check, buffer, encode, output},
};

/// Runs a check on the shim, whose schedule is another one each time, and on a GPU.
pub(crate) fn on_cuda(check: &mut impl Check) {
    check.on(&Cuda::new(Shim::new(seed())));
    on_gpu(check);
}

/// The same, the shim taking the place of a chip that has the kernels for sm_90a.
pub(crate) fn on_sm90(check: &mut impl Check) {
    check.on(&Cuda::new(Shim::sm90(seed())));
    on_gpu(check);
}

fn seed() -> u64 {
    static SEED: AtomicUsize = AtomicUsize::new(1);
    SEED.fetch_add(1000, Ordering::Relaxed) as u64
}

#[cfg(not(feature = "cuda"))]
fn on_gpu(_check: &mut impl Check) {}

#[cfg(feature = "cuda")]
fn on_gpu(check: &mut impl Check) {
    if let Some(gpu) = gpu() {
        check.on(&Cuda::new(gpu));
    }
}

/// The GPU, or a word that there is none.
#[cfg(feature = "cuda")]
pub(crate) fn gpu() -> Option<conclave_kernels::cuda::Gpu> {
    use std::io::{self, Write};
    match conclave_kernels::cuda::Gpu::new(&Default::default()) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            assert!(std::env::var("REQUIRE_GPU").as_deref() != Ok("1"), "REQUIRE_GPU=1: {error}");
            let _ = writeln!(io::stderr(), "SKIP the CUDA device on a GPU: {error}");
            None
        }
    }
}

/// Sizes, and lengths of sequences.
struct Near(Case, &'static [usize]);

impl Check for Near {
    fn on<D: Device>(&mut self, device: &D) {
        assert_eq!(device.activation(), Dtype::Bf16);
        let reference = Reference::new(Pool::new(2).unwrap());
        let Self(case, lengths) = self;
        agreement::compare(&agreement::run(device, case, lengths), &agreement::run(&reference, case, lengths), 8e-3);
    }
}

#[test]
fn cuda_is_near_the_reference() {
    on_cuda(&mut Near(Case::odd(), &[5, 520]));
}

#[test]
fn values_are_moved_and_added_exactly() {
    on_cuda(&mut Moves);
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    on_cuda(&mut Batches(Case::odd()));
    on_cuda(&mut BatchSizes(Case::odd(), 18));
}

#[test]
fn a_position_does_not_depend_on_how_its_sequence_is_cut() {
    on_cuda(&mut Chunks(Case::odd(), &[1, 65], &[&[1], &[16]]));
    on_cuda(&mut Chunks(Case::odd(), &[530], &[&[300, 211, 16]]));
}

#[test]
fn unused_slots_are_not_read() {
    on_cuda(&mut Poison(Case::odd(), &[(1, 1), (70, 70), (70, 30)]));
}

#[test]
fn sm90_is_near_the_reference() {
    on_sm90(&mut Near(Case::tiled(), &[5, 150]));
    // Some of these sizes fit, others do not.
    on_sm90(&mut Near(Case::odd(), &[5]));
}

/// A device that may choose among products.
struct Relaxed(Near);

impl Check for Relaxed {
    fn on<D: Device>(&mut self, device: &D) {
        device.relax();
        self.0.on(device);
    }
}

#[test]
fn sm90_is_near_the_reference_by_other_products_too() {
    on_sm90(&mut Relaxed(Near(Case::tiled(), &[5])));
}

#[test]
fn on_sm90_a_row_does_not_depend_on_the_rows_beside_it() {
    on_sm90(&mut Batches(Case::tiled()));
    on_sm90(&mut BatchSizes(Case::tiled(), 18));
}

#[test]
fn on_sm90_a_position_does_not_depend_on_how_its_sequence_is_cut() {
    on_sm90(&mut Chunks(Case::tiled(), &[67], &[&[64, 2, 1]]));
    on_sm90(&mut Chunks(Case::tiled(), &[514], &[&[500, 13, 1]]));
}

#[test]
fn on_sm90_unused_slots_are_not_read() {
    on_sm90(&mut Poison(Case::tiled(), &[(1, 1), (70, 70), (70, 30)]));
}

/// Spans that are just expanded, after a prefix, with all other slots NaN.
struct Expands(Case, Long);

impl Check for Expands {
    fn on<D: Device>(&mut self, device: &D) {
        assert!(device.expands());
        self.1.check(device, &self.0, true);
    }
}

#[test]
fn expanded_attention_is_near_the_absorbed_one() {
    on_cuda(&mut Expands(Case::odd(), Long { before: 90, rows: 171 }));
    on_sm90(&mut Expands(Case::tiled(), Long { before: 0, rows: 171 }));
    on_sm90(&mut Expands(Case::expanding(), Long { before: 70, rows: 171 }));
}

/// A shim that notes the kernels it launches, and refuses every launch after some. Its library of products is the plain kernel.
struct Watched {
    shim: Shim,
    left: AtomicUsize,
    launched: Mutex<BTreeSet<String>>,
    by_library: AtomicUsize,
}

impl Watched {
    fn new(shim: Shim, left: usize) -> Self {
        Self { shim, left: AtomicUsize::new(left), launched: Mutex::default(), by_library: AtomicUsize::new(0) }
    }
}

impl Driver for &'static Watched {
    type Memory = ShimMemory;
    type Mark = <Shim as Driver>::Mark;
    type Copy = <Shim as Driver>::Copy;

    fn name(&self) -> String {
        "Watched GPU (1)".to_owned()
    }

    fn chip(&self) -> &'static str {
        self.shim.chip()
    }

    fn multiprocessors(&self) -> usize {
        1
    }

    fn allocate(&self, bytes: usize) -> Result<ShimMemory, CudaError> {
        self.shim.allocate(bytes)
    }

    fn zero(&self, memory: &ShimMemory, range: Range<usize>) -> Result<(), CudaError> {
        self.shim.zero(memory, range)
    }

    fn upload_parts(&self, memory: &ShimMemory, offset: usize, parts: &[&[u8]]) -> Result<(), CudaError> {
        self.shim.upload_parts(memory, offset, parts)
    }

    fn fetch(&self, parts: &[(&ShimMemory, Range<usize>)]) -> Result<Self::Copy, CudaError> {
        self.shim.fetch(parts)
    }

    fn take(&self, copy: Self::Copy, parts: &mut [&mut [u8]]) -> Result<(), CudaError> {
        self.shim.take(copy, parts)
    }

    fn address(&self, memory: &ShimMemory) -> u64 {
        self.shim.address(memory)
    }

    fn tensor_map(&self, map: &TensorMap<'_>) -> Result<EncodedMap, CudaError> {
        self.shim.tensor_map(map)
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), CudaError> {
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        let failed = |_| CudaError::Launch { kernel: launch.kernel.to_owned(), detail: "a bit has flipped".to_owned() };
        left.map_err(failed)?;
        self.launched.lock().unwrap().insert(launch.kernel.to_owned());
        self.shim.launch(launch)
    }

    fn has_library(&self) -> bool {
        true
    }

    fn library_product(&self, product: &LibraryProduct) -> Result<(), CudaError> {
        let &LibraryProduct { x, w, y, rows, inner, outputs } = product;
        self.by_library.fetch_add(1, Ordering::Relaxed);
        let (rows, inner, outputs) = (rows as u32, inner as u32, outputs as u32);
        Linear { x, w, y, rows, inner, outputs }.launch(&self.shim)
    }

    fn mark(&self) -> Result<Self::Mark, CudaError> {
        self.shim.mark()
    }

    fn seconds(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64, CudaError> {
        self.shim.seconds(from, to)
    }
}

#[test]
fn a_device_that_has_failed_says_so_whenever_something_is_read() {
    let device = Cuda::new(watched(Shim::new(1), 1));
    assert_eq!(device.numerics(), "cuda-plain-2-watched-gpu-1");
    let (two, three) = (buffer(&device, &[2.0; 4]), buffer(&device, &[3.0; 4]));
    let sum = output(&device, 4, |out| {
        *out = buffer(&device, &[1.0; 4]);
        device.add(out, &two);
    });
    assert_eq!(sum, [3.0; 4]);
    let mut x = buffer(&device, &[1.0; 4]);
    device.add(&mut x, &two);
    device.add_two(&mut x, &two, &three);
    device.gather(&[(&three, &[0])], 2, &mut x);
    let mut values = Vec::new();
    let message = "the device has failed: kernel add: a bit has flipped";
    assert_eq!(encode(&device, &x).unwrap_err().to_string(), message);
    assert_eq!(device.read(&mut x, &mut values).unwrap_err().to_string(), message);
    assert_eq!(device.grouped_ffn(&[], &[], &mut []).unwrap_err().to_string(), message);
}

fn watched(shim: Shim, left: usize) -> &'static Watched {
    Box::leak(Box::new(Watched::new(shim, left)))
}

/// The kernels of products and attention that a model of these sizes takes.
pub(crate) fn kernels_of(shim: Shim, case: &Case, relaxed: bool) -> Vec<String> {
    let driver = watched(shim, usize::MAX);
    let device = Cuda::new(driver);
    if relaxed {
        device.relax();
    }
    agreement::run(&device, case, &[5]);
    let mut launched = std::mem::take(&mut *driver.launched.lock().unwrap());
    launched.retain(|kernel| ["sm90", "linear", "mla", "swiglu", "quantize"].iter().any(|word| kernel.contains(word)));
    launched.into_iter().collect()
}

#[test]
fn the_chip_and_the_sizes_decide_which_kernels_serve() {
    let plain = ["grouped_linear", "linear", "mla_queries", "mla_splits", "mla_values", "swiglu"];
    assert_eq!(kernels_of(Shim::new(1), &Case::tiled(), false), plain);
    let sm90 = ["sm90_grouped_gated_128", "sm90_grouped_heads_128", "sm90_grouped_linear_128", "sm90_mla_splits"];
    assert_eq!(kernels_of(Shim::sm90(1), &Case::tiled(), false), sm90);
    // Of these, the hidden size alone fits: not that between gate and down, nor those of heads.
    let mut some = [&plain[..], &["sm90_grouped_linear_128"]].concat();
    some.sort_unstable();
    assert_eq!(kernels_of(Shim::sm90(1), &Case::odd(), false), some);
    // Eight rows of the trunk by small tiles; routed experts stay as they are.
    let mut relaxed = [&sm90[..], &["sm90_grouped_gated_16", "sm90_grouped_linear_16"]].concat();
    relaxed.sort_unstable();
    assert_eq!(kernels_of(Shim::sm90(1), &Case::tiled(), true), relaxed);
    assert_eq!(Cuda::new(Shim::sm90(1)).numerics(), "cuda-sm90-2-shim");
}

/// What a product and a SwiGLU block make of so many rows, and how many products the library computed.
fn by_library(shim: Shim, rows: usize, relaxed: bool) -> (Vec<f32>, usize) {
    const HIDDEN: usize = 64;
    let driver = watched(shim, usize::MAX);
    let device = Cuda::new(driver);
    if relaxed {
        device.relax();
    }
    let numbers = |count: usize| (0..count).map(|at| (at * 7919 % 1009) as f32 / 4036.0 - 0.125).collect::<Vec<_>>();
    let weights = activation::encode(Dtype::Bf16, &numbers(HIDDEN * HIDDEN));
    let load = || device.load_matrix(Weight::new(Dtype::Bf16, &weights, HIDDEN, HIDDEN).unwrap()).unwrap();
    let (ffn, x) = (Ffn { gate: load(), up: load(), down: load() }, buffer(&device, &numbers(rows * HIDDEN)));
    let mut values = output(&device, rows * HIDDEN, |y| device.linear(&x, &ffn.down, y));
    values.extend(output(&device, rows * HIDDEN, |y| device.ffn(&x, &ffn, y)));
    (values, driver.by_library.load(Ordering::Relaxed))
}

#[test]
fn products_of_many_rows_that_need_not_be_exact_are_the_librarys() {
    for shim in [Shim::new, Shim::sm90] {
        let (expected, none) = by_library(shim(1), 128, false);
        let (found, products) = by_library(shim(1), 128, true);
        assert_eq!((none, products), (0, 4));
        let far = expected.iter().zip(&found).map(|(expected, found)| (expected - found).abs()).fold(0.0, f32::max);
        let most = expected.iter().copied().map(f32::abs).fold(0.0, f32::max);
        assert!(far <= 1e-2 * most, "{far} of {most}");
        assert_eq!(by_library(shim(1), 127, true).1, 0, "too few rows");
    }
}
