//! Products by cuBLASLt, where its library is there.

use std::{ffi::c_void, ptr, sync::Arc};

use cudarc::{
    cublaslt::{
        result::{self, CublasError},
        sys,
    },
    driver,
};

use super::{CudaError, LibraryProduct, gpu::Device};

/// Bytes of working memory, as NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;
/// `CUBLAS_OP_T`
const TRANSPOSED: i32 = 1;

/// cuBLASLt, on the queue of a GPU.
pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    description: Description,
    preference: Preference,
    workspace: u64,
    device: Arc<Device>,
}

// SAFETY: handles that any thread may use; what they are made of does not change once this is open.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// The library, or none and a word why.
    pub(super) fn open(device: &Arc<Device>) -> Option<Self> {
        // SAFETY: only opens and closes the library, whose functions panic where it is missing.
        if !unsafe { sys::is_culib_present() } {
            tracing::info!("cuBLASLt was not found: products stay with the kernels that are built in");
            return None;
        }
        match Self::new(device) {
            Ok(library) => {
                tracing::info!("products of many rows by cuBLASLt");
                Some(library)
            }
            Err(error) => {
                tracing::warn!(%error, "cuBLASLt cannot be used: products stay with the kernels that are built in");
                None
            }
        }
    }

    fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        let (description, preference) = (Description::new().map_err(failed)?, Preference::new().map_err(failed)?);
        let handle = result::create_handle().map_err(failed)?;
        let mut library = Self { handle, description, preference, workspace: 0, device: device.clone() };
        // SAFETY: freed with the library; nothing reads it before cuBLASLt has written it.
        library.workspace = unsafe { driver::result::malloc_sync(WORKSPACE) }
            .map_err(|error| CudaError::Memory { bytes: WORKSPACE, detail: error.to_string() })?;
        Ok(library)
    }

    /// What is said to who asks for a product where there is no library.
    pub(super) fn missing() -> CudaError {
        CudaError::Missing { missing: "cuBLASLt", detail: "its library was not found, or cannot be used".to_owned() }
    }

    /// Queues a product.
    pub(super) fn product(&self, product: &LibraryProduct) -> Result<(), CudaError> {
        self.device.bind()?;
        self.queue(product).map_err(failed)
    }

    /// The library counts column by column: `y [outputs, rows] = w [inner, outputs]ᵀ · x [inner, rows]`.
    fn queue(&self, product: &LibraryProduct) -> Result<(), CublasError> {
        let &LibraryProduct { x, w, y, rows, inner, outputs } = product;
        let bf16 = |cols| Layout::new(sys::cudaDataType::CUDA_R_16BF, inner, cols);
        let (a, b, d) = (bf16(outputs)?, bf16(rows)?, Layout::new(sys::cudaDataType::CUDA_R_32F, outputs, rows)?);
        let (one, zero) = (1.0f32, 0.0f32);
        // SAFETY: the descriptions live; the caller vouches for addresses and sizes. The library remembers what it chose for
        // sizes, and copies the numbers before it returns.
        unsafe {
            let chosen = result::get_matmul_algo_heuristic(
                self.handle,
                self.description.0,
                a.0,
                b.0,
                d.0,
                d.0,
                self.preference.0,
            )?;
            result::matmul(
                self.handle,
                self.description.0,
                ptr::from_ref(&one).cast(),
                ptr::from_ref(&zero).cast(),
                w as *const c_void,
                a.0,
                x as *const c_void,
                b.0,
                y as *const c_void,
                d.0,
                y as *mut c_void,
                d.0,
                &chosen.algo,
                self.workspace as *mut c_void,
                WORKSPACE,
                self.device.stream.cu_stream().cast(),
            )
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        if self.device.bind().is_err() {
            return;
        }
        if self.workspace != 0 {
            // SAFETY: from malloc_sync, and not used any more: the call waits for products under way.
            let _ = unsafe { driver::result::free_sync(self.workspace) };
        }
        // SAFETY: not used any more. What cannot be freed goes with the process.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn failed(error: CublasError) -> CudaError {
    CudaError::Device { what: "multiply by cuBLASLt", detail: error.to_string() }
}

/// A product of the transpose of its first matrix, with sums in f32.
struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new() -> Result<Self, CublasError> {
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let description = Self(result::create_matmul_desc(sums, sys::cudaDataType::CUDA_R_32F)?);
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the attribute is a number of this size.
        unsafe {
            let value = ptr::from_ref(&TRANSPOSED).cast();
            result::set_matmul_desc_attribute(description.0, attribute, value, size_of_val(&TRANSPOSED))?;
        }
        Ok(description)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: not used any more.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// Ways that need no more than [`WORKSPACE`].
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, CublasError> {
        let preference = Self(result::create_matmul_pref()?);
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the attribute is a number of this size.
        unsafe {
            let value = ptr::from_ref(&WORKSPACE).cast();
            result::set_matmul_pref_attribute(preference.0, attribute, value, size_of_val(&WORKSPACE))?;
        }
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: not used any more.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// A matrix whose columns lie one behind the other.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(element: sys::cudaDataType, rows: usize, cols: usize) -> Result<Self, CublasError> {
        result::create_matrix_layout(element, rows as u64, cols as u64, rows as i64).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: not used any more.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}
