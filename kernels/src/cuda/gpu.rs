//! The driver on a GPU.

use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    ops::Range,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, DriverError, result,
    sys::{self, CUdevice_attribute, CUevent_flags, CUfunction, CUfunction_attribute},
};

use super::{
    AnyLink, CudaError, Driver, Element, EncodedMap, Launch, LibraryProduct, MOST_DIMENSIONS, TensorMap,
    gpu_code::{self, Module},
    ipc,
    library::Library,
    nccl::{self, NcclLink},
    pinned::{Download, Downloads, Uploads},
};
use crate::link::{LinkEnd, Until};

/// Dynamic shared memory that every kernel may have; more must be asked for.
const SHARED: u32 = 48 << 10;

/// Which GPU, and where its code comes from.
#[derive(Debug, Clone, Default)]
pub struct GpuOptions {
    /// Index among the GPUs that this process sees.
    pub ordinal: usize,
    /// A directory whose cubins take the place of those built in, by file name (`linear.sm_90a.cubin`). The services take
    /// it from `KERNEL_DIR`.
    pub kernel_dir: Option<PathBuf>,
}

/// One GPU with one queue.
pub struct Gpu {
    uploads: Mutex<Uploads>,
    downloads: Mutex<Downloads>,
    /// On a stream of their own.
    beside: Mutex<Downloads>,
    pub(super) device: Arc<Device>,
    modules: Vec<Module>,
    functions: Mutex<HashMap<String, Function>>,
    /// Opened when it is first asked for, if there is one.
    library: OnceLock<Option<Library>>,
    name: String,
    chip: &'static str,
    multiprocessors: usize,
}

/// What memory needs to live.
pub(super) struct Device {
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
}

impl Device {
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(|error| device("bind the CUDA context", &error))
    }
}

#[derive(Clone, Copy)]
struct Function {
    handle: CUfunction,
    /// Dynamic shared memory that it may have.
    shared: u32,
}

// SAFETY: a handle that the CUDA driver lets any thread use.
unsafe impl Send for Function {}

/// Memory of a GPU.
pub struct GpuMemory {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
    /// Another process's, and only mapped here.
    imported: bool,
}

impl GpuMemory {
    pub(super) fn at(&self, range: Range<usize>) -> u64 {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        self.address + range.start as u64
    }
}

impl Drop for GpuMemory {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let freed = self.device.context.bind_to_thread().and_then(|()| match self.imported {
            true => ipc::close(self.address),
            // SAFETY: from malloc_sync, and not used any more; the call waits for kernels under way.
            false => unsafe { result::free_sync(self.address) },
        });
        if let Err(error) = freed {
            tracing::warn!(%error, bytes = self.bytes, "cannot free device memory");
        }
    }
}

pub(super) fn device(what: &'static str, error: &DriverError) -> CudaError {
    CudaError::Device { what, detail: error.to_string() }
}

impl Gpu {
    /// Opens a GPU and loads the code of all kernels for its chip.
    ///
    /// # Errors
    /// Names what is missing: the driver's library, a GPU, or code for its chip.
    pub fn new(options: &GpuOptions) -> Result<Self, CudaError> {
        // SAFETY: only opens and closes the library.
        if !unsafe { sys::is_culib_present() } {
            let detail = "the library of NVIDIA's driver was not found".to_owned();
            return Err(CudaError::Missing { missing: "libcuda", detail });
        }
        let gpu = |error: DriverError| CudaError::Missing { missing: "a GPU", detail: error.to_string() };
        let context = CudaContext::new(options.ordinal).map_err(gpu)?;
        let new_stream = || context.new_stream().map_err(|error| device("make a CUDA stream", &error));
        let (stream, beside) = (new_stream()?, new_stream()?);
        let name = context.name().map_err(|error| device("ask for the GPU's name", &error))?;
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(attribute).map_err(|error| device("count multiprocessors", &error))?;
        let capability = context.compute_capability().map_err(|error| device("ask for the GPU's kind", &error))?;
        let chip = gpu_code::chip(capability)?;
        let modules = gpu_code::load(chip, options.kernel_dir.as_deref())?;
        let pinned = |error: DriverError| device("allocate pinned memory", &error);
        Ok(Self {
            uploads: Mutex::new(Uploads::new(&context, &stream).map_err(pinned)?),
            downloads: Mutex::new(Downloads::new(&context, &stream)),
            beside: Mutex::new(Downloads::new(&context, &beside)),
            device: Arc::new(Device { context, stream }),
            modules,
            functions: Mutex::default(),
            library: OnceLock::new(),
            name,
            chip,
            multiprocessors: multiprocessors as usize,
        })
    }

    pub(super) fn function(&self, launch: &Launch<'_>) -> Result<CUfunction, CudaError> {
        let mut functions = lock(&self.functions);
        if !functions.contains_key(launch.kernel) {
            let handle = self.find(launch.kernel)?;
            functions.insert(launch.kernel.to_owned(), Function { handle, shared: SHARED });
        }
        let function = functions.get_mut(launch.kernel).expect("put in above");
        if launch.shared > function.shared {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a module that lives as long as this.
            unsafe { result::function::set_function_attribute(function.handle, attribute, launch.shared as i32) }
                .map_err(|error| failed(launch.kernel, &error))?;
            function.shared = launch.shared;
        }
        Ok(function.handle)
    }

    fn library(&self) -> Option<&Library> {
        self.library.get_or_init(|| Library::open(&self.device)).as_ref()
    }

    /// Queues a kernel on a stream of this GPU.
    pub(super) fn launch_on(&self, stream: &CudaStream, launch: &Launch<'_>) -> Result<(), CudaError> {
        self.device.bind()?;
        let function = self.function(launch)?;
        let mut arguments = pointers(launch);
        let ([x, y, z], [tx, ty, tz]) = (launch.grid, launch.block);
        let stream = stream.cu_stream();
        // SAFETY: the driver copies the arguments before it returns; addresses among them are the caller's to keep right.
        unsafe { result::launch_kernel(function, (x, y, z), (tx, ty, tz), launch.shared, stream, &mut arguments) }
            .map_err(|error| failed(launch.kernel, &error))
    }

    fn find(&self, kernel: &str) -> Result<CUfunction, CudaError> {
        let missing =
            || CudaError::NoKernel { kernel: kernel.to_owned(), searched: format!("the code for {}", self.chip) };
        let name = CString::new(kernel).map_err(|_| missing())?;
        // SAFETY: modules that live as long as this.
        let of = |module: &Module| unsafe { result::module::get_function(module.0, name.clone()) }.ok();
        self.modules.iter().find_map(of).ok_or_else(missing)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A checked map in the form of the hardware.
fn encode(map: &TensorMap<'_>) -> Result<EncodedMap, DriverError> {
    let element = match map.element {
        Element::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        Element::E4m3 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        Element::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    };
    let swizzle = match map.swizzle {
        true => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        false => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
    };
    let every = [1; MOST_DIMENSIONS];
    let mut encoded = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: the lists are as long as the rank says, which `check` saw to; the address is only stored.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut encoded,
            element,
            map.dims.len() as u32,
            map.address as *mut c_void,
            map.dims.as_ptr(),
            map.strides.as_ptr(),
            map.tile.as_ptr(),
            every.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()?;
    Ok(bytemuck::cast(encoded.opaque))
}

/// Where the arguments of a launch lie.
pub(super) fn pointers(launch: &Launch<'_>) -> Vec<*mut c_void> {
    launch.arguments.iter().map(|argument| argument.bytes().as_ptr().cast_mut().cast()).collect()
}

pub(super) fn failed(kernel: &str, error: &DriverError) -> CudaError {
    CudaError::Launch { kernel: kernel.to_owned(), detail: error.to_string() }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.device.context.bind_to_thread().is_err() || self.device.stream.synchronize().is_err() {
            return;
        }
        for module in &self.modules {
            // SAFETY: no kernel of it runs any more. What cannot be unloaded goes with the context.
            let _ = unsafe { result::module::unload(module.0) };
        }
    }
}

impl Driver for Gpu {
    type Memory = GpuMemory;
    type Mark = CudaEvent;
    type Copy = Download;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn chip(&self) -> &'static str {
        self.chip
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn allocate(&self, bytes: usize) -> Result<GpuMemory, CudaError> {
        self.device.bind()?;
        let address = match bytes {
            0 => 0,
            // SAFETY: owned by what is returned; nothing reads it as any type before it is written.
            _ => unsafe { result::malloc_sync(bytes) }
                .map_err(|error| CudaError::Memory { bytes, detail: error.to_string() })?,
        };
        Ok(GpuMemory { device: self.device.clone(), address, bytes, imported: false })
    }

    fn zero(&self, memory: &GpuMemory, range: Range<usize>) -> Result<(), CudaError> {
        if range.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        let stream = self.device.stream.cu_stream();
        // SAFETY: inside the memory, as checked by `at`.
        unsafe { result::memset_d8_async(memory.at(range.clone()), 0, range.len(), stream) }
            .map_err(|error| device("clear device memory", &error))
    }

    fn upload_parts(&self, memory: &GpuMemory, offset: usize, parts: &[&[u8]]) -> Result<(), CudaError> {
        let to = memory.at(offset..offset + parts.iter().map(|part| part.len()).sum::<usize>());
        self.device.bind()?;
        // SAFETY: inside the memory, which when it goes waits for what was queued before.
        unsafe { lock(&self.uploads).copy(to, parts) }.map_err(|error| device("copy to the GPU", &error))
    }

    fn fetch(&self, parts: &[(&GpuMemory, Range<usize>)]) -> Result<Download, CudaError> {
        let parts: Vec<_> = parts.iter().map(|(memory, range)| (memory.at(range.clone()), range.len())).collect();
        self.device.bind()?;
        // SAFETY: inside the memories, which when they go wait for what was queued before.
        unsafe { lock(&self.downloads).fetch(&parts) }.map_err(|error| device("copy from the GPU", &error))
    }

    fn take(&self, copy: Download, parts: &mut [&mut [u8]]) -> Result<(), CudaError> {
        self.device.bind()?;
        let memory = copy.take(parts).map_err(|error| device("wait for the GPU", &error))?;
        memory.into_iter().for_each(|memory| lock(&self.downloads).reuse(memory));
        Ok(())
    }

    fn address(&self, memory: &GpuMemory) -> u64 {
        memory.address
    }

    fn tensor_map(&self, map: &TensorMap<'_>) -> Result<EncodedMap, CudaError> {
        map.check().map_err(|detail| CudaError::Device { what: "describe a tensor", detail })?;
        self.device.bind()?;
        encode(map).map_err(|error| device("describe a tensor", &error))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), CudaError> {
        self.launch_on(&self.device.stream, launch)
    }

    fn has_library(&self) -> bool {
        self.library().is_some()
    }

    fn library_product(&self, product: &LibraryProduct) -> Result<(), CudaError> {
        match self.library() {
            Some(library) => library.product(product),
            None => Err(Library::missing()),
        }
    }

    fn mark(&self) -> Result<CudaEvent, CudaError> {
        let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
        self.device.stream.record_event(timed).map_err(|error| device("mark a place in the GPU's queue", &error))
    }

    fn seconds(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f64, CudaError> {
        let milliseconds =
            from.elapsed_ms(to).map_err(|error| device("wait for a place in the GPU's queue", &error))?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    fn export(&self, bytes: usize) -> Result<(GpuMemory, Vec<u8>), CudaError> {
        let mut memory = self.allocate(ipc::whole(bytes))?;
        memory.bytes = bytes;
        self.zero(&memory, 0..bytes)?;
        self.device.stream.synchronize().map_err(|error| device("wait for the GPU", &error))?;
        let handle = ipc::handle(memory.address, bytes).map_err(|error| device("share device memory", &error))?;
        Ok((memory, handle))
    }

    fn import(&self, handle: &[u8]) -> Result<(GpuMemory, usize), CudaError> {
        self.device.bind()?;
        let (address, bytes) = ipc::open(handle)?;
        Ok((GpuMemory { device: self.device.clone(), address, bytes, imported: true }, bytes))
    }

    fn download_beside(&self, memory: &GpuMemory, offset: usize, bytes: &mut [u8]) -> Result<(), CudaError> {
        let part = (memory.at(offset..offset + bytes.len()), bytes.len());
        self.device.bind()?;
        let failed = |error: DriverError| device("copy from another process", &error);
        // SAFETY: inside the memory, which stays until the copy has ended, below.
        let copy = unsafe { lock(&self.beside).fetch(&[part]) }.map_err(failed)?;
        let through = copy.take(&mut [bytes]).map_err(failed)?;
        through.into_iter().for_each(|through| lock(&self.beside).reuse(through));
        Ok(())
    }

    fn check_links(&self) -> Result<(), CudaError> {
        nccl::check_present()
    }

    fn link_id(&self) -> Result<Vec<u8>, CudaError> {
        nccl::fresh_id()
    }

    fn link<'d>(&'d self, id: &[u8], end: LinkEnd, until: &Until<'_>) -> Result<AnyLink<'d, Self>, CudaError> {
        Ok(Box::new(NcclLink::join(self, id, end, until)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        match Gpu::new(&GpuOptions { ordinal: 4096, kernel_dir: None }) {
            Err(error @ CudaError::Missing { missing: "libcuda" | "a GPU", .. }) => {
                assert!(error.to_string().starts_with("CUDA: "), "{error}");
            }
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("a machine with 4097 GPUs"),
        }
    }
}
