//! What the CUDA device needs of the machine below it: memory, and a queue of launches.

use std::ops::Range;

use super::{AnyLink, EncodedMap, TensorMap};
use crate::link::{LinkEnd, Until};

/// Bytes that are downloaded at a time.
const DOWNLOAD: usize = 16 << 20;

/// A device's memory and its queue of work. Calls on one driver run in order.
pub trait Driver: Send + Sync + 'static {
    /// Memory of the device, freed on drop after all that was queued before.
    type Memory: Send + Sync + 'static;
    /// A place in the queue.
    type Mark: Send + Sync + 'static;
    /// Bytes on their way to the host.
    type Copy: Send + 'static;

    /// The chip, for the numerics id.
    fn name(&self) -> String;
    /// The kind of chip, as code is built for it: `sm_80`, `sm_90a`. It decides which kernels are used.
    fn chip(&self) -> &'static str;
    /// Multiprocessors of the chip.
    fn multiprocessors(&self) -> usize;
    /// Memory of `bytes` bytes, at a multiple of 256, with anything in it.
    ///
    /// # Errors
    /// When the device has not as much.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory, CudaError>;
    /// Writes zeros.
    ///
    /// # Errors
    /// When the device fails. Ranges past the end of `memory` are a bug of the caller and panic, here and below.
    fn zero(&self, memory: &Self::Memory, range: Range<usize>) -> Result<(), CudaError>;
    /// Queues one copy of `parts`, one behind the other, to `offset`; they may be used again when it returns.
    ///
    /// # Errors
    /// When the device fails.
    fn upload_parts(&self, memory: &Self::Memory, offset: usize, parts: &[&[u8]]) -> Result<(), CudaError>;
    /// The same of one part.
    ///
    /// # Errors
    /// When the device fails.
    fn upload(&self, memory: &Self::Memory, offset: usize, bytes: &[u8]) -> Result<(), CudaError> {
        self.upload_parts(memory, offset, &[bytes])
    }
    /// Queues copies to the host, of these bytes of memories.
    ///
    /// # Errors
    /// When the device fails.
    fn fetch(&self, parts: &[(&Self::Memory, Range<usize>)]) -> Result<Self::Copy, CudaError>;
    /// Waits for copies, and for what was queued before them: `parts` as many and as long as were fetched.
    ///
    /// # Errors
    /// When the device fails, or a launch before failed.
    fn take(&self, copy: Self::Copy, parts: &mut [&mut [u8]]) -> Result<(), CudaError>;
    /// Waits for what was queued before, then reads from `offset`.
    ///
    /// # Errors
    /// When the device fails, or a launch before failed.
    fn download(&self, memory: &Self::Memory, offset: usize, bytes: &mut [u8]) -> Result<(), CudaError> {
        let read = |at: usize, part: &mut [u8]| {
            let copy = self.fetch(&[(memory, at..at + part.len())])?;
            self.take(copy, &mut [part])
        };
        if bytes.is_empty() {
            return read(offset, bytes);
        }
        (offset..).step_by(DOWNLOAD).zip(bytes.chunks_mut(DOWNLOAD)).try_for_each(|(at, part)| read(at, part))
    }
    /// Where the memory begins on the device.
    fn address(&self, memory: &Self::Memory) -> u64;
    /// The form of a tensor map that kernels read.
    ///
    /// # Errors
    /// When the tensor cannot be described so.
    fn tensor_map(&self, map: &TensorMap<'_>) -> Result<EncodedMap, CudaError>;
    /// Queues a kernel. Every address among its arguments must lie in memory that is alive now. A driver that gathers launches
    /// says what is wrong with one only when it is submitted.
    ///
    /// # Errors
    /// When there is no such kernel, or it cannot be launched so.
    fn launch(&self, launch: &Launch<'_>) -> Result<(), CudaError>;
    /// Starts launches that were gathered, where the driver does that. `piece` names what was queued since it was last called:
    /// it is worth most where the same kernels come again under the same name.
    ///
    /// # Errors
    /// As for [`Driver::launch`].
    fn submit(&self, piece: u32) -> Result<(), CudaError> {
        let _ = piece;
        Ok(())
    }
    /// Whether the machine has a library for [`Driver::library_product`].
    fn has_library(&self) -> bool {
        false
    }
    /// Queues a product by the machine's own library, which adds up as it likes: in another order for every size.
    ///
    /// # Errors
    /// When there is none, or it fails.
    fn library_product(&self, product: &LibraryProduct) -> Result<(), CudaError> {
        let _ = product;
        Err(CudaError::Missing { missing: "a library of products", detail: format!("{} has none", self.name()) })
    }
    /// Marks the place in the queue behind all that was queued before.
    ///
    /// # Errors
    /// When the device fails.
    fn mark(&self) -> Result<Self::Mark, CudaError>;
    /// Seconds of the device's own clock from when it came to one mark to when it came to a later one. Waits for both.
    ///
    /// # Errors
    /// When the device fails, or a launch before failed.
    fn seconds(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64, CudaError>;

    /// Memory of `bytes` zeros that other processes can open: an allocation of its own, and the handle for [`Driver::import`].
    ///
    /// # Errors
    /// When there is not as much, or it cannot be shared.
    fn export(&self, bytes: usize) -> Result<(Self::Memory, Vec<u8>), CudaError> {
        let _ = bytes;
        Err(unshared(&self.name()))
    }
    /// Memory that another process exported, and its bytes. That process has to keep it until this has been dropped.
    ///
    /// # Errors
    /// When the handle is none of this kind of driver, or the memory cannot be reached from here.
    fn import(&self, handle: &[u8]) -> Result<(Self::Memory, usize), CudaError> {
        let _ = handle;
        Err(unshared(&self.name()))
    }
    /// As [`Driver::download`], but not behind what was queued.
    ///
    /// # Errors
    /// When the device fails.
    fn download_beside(&self, memory: &Self::Memory, offset: usize, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.download(memory, offset, bytes)
    }

    /// Whether there are links to devices of other processes.
    ///
    /// # Errors
    /// When there are none, or something that they need is missing.
    fn check_links(&self) -> Result<(), CudaError> {
        Err(unlinked(&self.name()))
    }
    /// A fresh id, for a link of this device with one other. The driver may wait for who joins by it until the process ends.
    ///
    /// # Errors
    /// As for [`Driver::check_links`].
    fn link_id(&self) -> Result<Vec<u8>, CudaError> {
        Err(unlinked(&self.name()))
    }
    /// Joins the link of this id; waits for the other end.
    ///
    /// # Errors
    /// As for [`Driver::check_links`], when the id is none of this kind of driver, or the other end does not join in time.
    fn link<'d>(&'d self, id: &[u8], end: LinkEnd, until: &Until<'_>) -> Result<AnyLink<'d, Self>, CudaError>
    where
        Self: Sized,
    {
        let _ = (id, end, until);
        Err(unlinked(&self.name()))
    }
}

fn unlinked(name: &str) -> CudaError {
    CudaError::Missing { missing: "a link between processes", detail: format!("{name} has none") }
}

fn unshared(name: &str) -> CudaError {
    CudaError::Missing { missing: "memory that processes share", detail: format!("{name} has none") }
}

/// `y [rows, outputs] = x [rows, inner] · wᵀ`, where `w [outputs, inner]`: bf16 times bf16, sums and `y` in f32.
#[derive(Debug, Clone, Copy)]
pub struct LibraryProduct {
    /// Address of the inputs.
    pub x: u64,
    /// Address of the weights.
    pub w: u64,
    /// Address of the outputs.
    pub y: u64,
    /// At least one, here and below.
    pub rows: usize,
    /// Elements of a row of `x`.
    pub inner: usize,
    /// Elements of a row of `y`.
    pub outputs: usize,
}

/// A kernel to run, on how many threads.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// Its name.
    pub kernel: &'static str,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
    /// Its arguments.
    pub arguments: &'a [Arg<'a>],
}

/// One argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub enum Arg<'a> {
    /// A pointer to memory of the device.
    Address(u64),
    /// `u32`
    U32(u32),
    /// `int32_t`
    I32(i32),
    /// `u64`
    U64(u64),
    /// `float`
    F32(f32),
    /// A struct passed by value, as it lies in memory.
    Bytes(&'a [u8]),
}

impl Arg<'_> {
    /// The argument as it lies in memory.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Address(value) | Self::U64(value) => bytemuck::bytes_of(value),
            Self::U32(value) => bytemuck::bytes_of(value),
            Self::I32(value) => bytemuck::bytes_of(value),
            Self::F32(value) => bytemuck::bytes_of(value),
            Self::Bytes(bytes) => bytes,
        }
    }
}

impl From<u32> for Arg<'_> {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<u64> for Arg<'_> {
    fn from(value: u64) -> Self {
        Self::U64(value)
    }
}

impl From<f32> for Arg<'_> {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

/// What can go wrong on a CUDA device.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The machine lacks the driver's library or a GPU.
    #[error("CUDA: {missing} is missing: {detail}")]
    Missing { missing: &'static str, detail: String },
    /// A kernel that there is no code for.
    #[error("kernel {kernel}: not found in {searched}")]
    NoKernel { kernel: String, searched: String },
    /// A launch that was refused or failed.
    #[error("kernel {kernel}: {detail}")]
    Launch { kernel: String, detail: String },
    /// The device has not as much memory.
    #[error("device memory: asked for {bytes} bytes: {detail}")]
    Memory { bytes: usize, detail: String },
    /// Another call of the driver failed.
    #[error("{what}: {detail}")]
    Device { what: &'static str, detail: String },
    /// A kernel's code on disk cannot be read.
    #[error("kernel code {path}: {source}")]
    Code { path: String, source: std::io::Error },
}
