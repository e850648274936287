//! The driver on the shim: kernels as C++ on this machine's processor, for tests without a GPU.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    ops::Range,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use super::{
    AnyLink, CudaError, Driver, EncodedMap, GraphDriver, Launch, Launches, TensorMap,
    shared_map::SharedMap,
    shim_link::{self, ShimLink},
    sm90,
};
use crate::link::{LinkEnd, Until};

/// Runs kernels on fibres. Blocks, warps and lanes take turns as the seed decides.
#[derive(Debug)]
pub struct Shim {
    seed: AtomicU64,
    chip: &'static str,
}

impl Shim {
    /// A driver whose schedules come from `seed`, in place of a chip that has the plain kernels alone.
    pub fn new(seed: u64) -> Self {
        Self { seed: AtomicU64::new(seed), chip: "sm_80" }
    }

    /// The same in place of a chip that also has those for sm_90a.
    pub fn sm90(seed: u64) -> Self {
        Self { chip: sm90::CHIP, ..Self::new(seed) }
    }

    /// Sets the seed of the next launch; each launch adds one to it.
    pub fn set_seed(&self, seed: u64) {
        self.seed.store(seed, Ordering::Relaxed);
    }
}

/// Memory of the shim: NaN at first, between two guards that are looked at when it is freed.
#[derive(Debug)]
pub struct ShimMemory {
    start: NonNull<u8>,
    bytes: usize,
    /// Of another allocator: other processes map it too.
    shared: Option<SharedMap>,
}

// SAFETY: the memory is owned; who shares it goes through the driver, as with a GPU's.
unsafe impl Send for ShimMemory {}
// SAFETY: as above.
unsafe impl Sync for ShimMemory {}

impl ShimMemory {
    fn shared(map: SharedMap) -> Self {
        Self { start: map.start(), bytes: map.bytes(), shared: Some(map) }
    }

    fn at(&self, range: Range<usize>) -> *mut u8 {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        // SAFETY: inside, as checked.
        unsafe { self.start.add(range.start).as_ptr() }
    }
}

impl Drop for ShimMemory {
    fn drop(&mut self) {
        if self.shared.is_some() {
            return;
        }
        // SAFETY: from conclave_shim_allocate with this size, and not used any more.
        let whole = unsafe { conclave_shim_free(self.start.as_ptr().cast(), self.bytes) } == 1;
        assert!(whole || std::thread::panicking(), "a kernel wrote outside a buffer of {} bytes", self.bytes);
    }
}

impl Driver for Shim {
    type Memory = ShimMemory;
    type Mark = Instant;
    type Copy = Vec<Vec<u8>>;

    fn name(&self) -> String {
        "shim".to_owned()
    }

    fn chip(&self) -> &'static str {
        self.chip
    }

    fn multiprocessors(&self) -> usize {
        4
    }

    fn allocate(&self, bytes: usize) -> Result<ShimMemory, CudaError> {
        // SAFETY: gives memory of its own, or null.
        let start = NonNull::new(unsafe { conclave_shim_allocate(bytes) }.cast());
        let missing = || CudaError::Memory { bytes, detail: "the system has not as much".to_owned() };
        Ok(ShimMemory { start: start.ok_or_else(missing)?, bytes, shared: None })
    }

    fn zero(&self, memory: &ShimMemory, range: Range<usize>) -> Result<(), CudaError> {
        // SAFETY: inside the memory, as checked by `at`.
        unsafe { memory.at(range.clone()).write_bytes(0, range.len()) };
        Ok(())
    }

    fn upload_parts(&self, memory: &ShimMemory, mut offset: usize, parts: &[&[u8]]) -> Result<(), CudaError> {
        for part in parts {
            let to = memory.at(offset..offset + part.len());
            // SAFETY: inside the memory, as checked by `at`.
            unsafe { to.copy_from(part.as_ptr(), part.len()) };
            offset += part.len();
        }
        Ok(())
    }

    fn fetch(&self, parts: &[(&ShimMemory, Range<usize>)]) -> Result<Vec<Vec<u8>>, CudaError> {
        let copy = |(memory, range): &(&ShimMemory, Range<usize>)| {
            let (from, mut bytes) = (memory.at(range.clone()), vec![0; range.len()]);
            // SAFETY: inside the memory, as checked by `at`.
            unsafe { from.copy_to(bytes.as_mut_ptr(), bytes.len()) };
            bytes
        };
        Ok(parts.iter().map(copy).collect())
    }

    fn take(&self, copy: Vec<Vec<u8>>, parts: &mut [&mut [u8]]) -> Result<(), CudaError> {
        assert_eq!(copy.len(), parts.len(), "parts of a copy");
        parts.iter_mut().zip(copy).for_each(|(part, copy)| part.copy_from_slice(&copy));
        Ok(())
    }

    fn address(&self, memory: &ShimMemory) -> u64 {
        memory.at(0..0) as u64
    }

    fn tensor_map(&self, map: &TensorMap<'_>) -> Result<EncodedMap, CudaError> {
        map.check().map_err(|detail| CudaError::Device { what: "describe a tensor", detail })?;
        Ok(map.plain())
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), CudaError> {
        let failed = |detail: &str| CudaError::Launch { kernel: launch.kernel.to_owned(), detail: detail.to_owned() };
        let kernel = CString::new(launch.kernel).map_err(|_| failed("a name with a zero byte"))?;
        let arguments: Vec<&[u8]> = launch.arguments.iter().map(|argument| argument.bytes()).collect();
        let pointers: Vec<*const c_void> = arguments.iter().map(|bytes| bytes.as_ptr().cast()).collect();
        let sizes: Vec<usize> = arguments.iter().map(|bytes| bytes.len()).collect();
        let host = HostLaunch {
            kernel: kernel.as_ptr(),
            grid: launch.grid,
            block: launch.block,
            shared: launch.shared,
            arguments: pointers.as_ptr(),
            sizes: sizes.as_ptr(),
            count: sizes.len(),
            seed: self.seed.fetch_add(1, Ordering::Relaxed),
        };
        let mut message = [0; 512];
        // SAFETY: all pointers lead to what lives until the call returns; addresses among the arguments are the caller's
        // to keep right, as on a GPU.
        let status = unsafe { conclave_shim_launch(&host, message.as_mut_ptr().cast(), message.len()) };
        let detail = CStr::from_bytes_until_nul(&message).map_or("", |text| text.to_str().unwrap_or(""));
        if status == 0 { Ok(()) } else { Err(failed(detail)) }
    }

    fn mark(&self) -> Result<Instant, CudaError> {
        Ok(Instant::now())
    }

    fn seconds(&self, from: &Instant, to: &Instant) -> Result<f64, CudaError> {
        Ok(to.duration_since(*from).as_secs_f64())
    }

    fn export(&self, bytes: usize) -> Result<(ShimMemory, Vec<u8>), CudaError> {
        let (map, handle) = SharedMap::new(bytes)?;
        Ok((ShimMemory::shared(map), handle))
    }

    fn import(&self, handle: &[u8]) -> Result<(ShimMemory, usize), CudaError> {
        let memory = ShimMemory::shared(SharedMap::open(handle)?);
        let bytes = memory.bytes;
        Ok((memory, bytes))
    }

    fn check_links(&self) -> Result<(), CudaError> {
        Ok(())
    }

    fn link_id(&self) -> Result<Vec<u8>, CudaError> {
        Ok(shim_link::fresh_id())
    }

    fn link<'d>(&'d self, id: &[u8], end: LinkEnd, until: &Until<'_>) -> Result<AnyLink<'d, Self>, CudaError> {
        Ok(Box::new(ShimLink::join(self, id, end, until)?))
    }
}

impl GraphDriver for Shim {
    type Graph = Launches;

    fn graph(&self, launches: &Launches) -> Result<Launches, CudaError> {
        Ok(launches.clone())
    }

    fn change(&self, graph: &mut Launches, index: usize, launch: &Launch<'_>) -> Result<(), CudaError> {
        graph.replace(index, launch);
        Ok(())
    }

    fn replay(&self, graph: &Launches) -> Result<(), CudaError> {
        (0..graph.len()).try_for_each(|index| graph.with(index, |launch| self.launch(launch)))
    }
}

/// `ConclaveShimLaunch` of `cuda/shim/launch.cpp`.
#[repr(C)]
struct HostLaunch {
    kernel: *const c_char,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    arguments: *const *const c_void,
    sizes: *const usize,
    count: usize,
    seed: u64,
}

unsafe extern "C" {
    fn conclave_shim_allocate(bytes: usize) -> *mut c_void;
    fn conclave_shim_free(buffer: *mut c_void, bytes: usize) -> c_int;
    fn conclave_shim_launch(launch: *const HostLaunch, message: *mut c_char, length: usize) -> c_int;
}
