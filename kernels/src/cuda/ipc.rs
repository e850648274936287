//! Memory of a GPU in several processes of one host: the calls of CUDA IPC. The context is bound wherever they are called.

use std::mem::MaybeUninit;

use cudarc::driver::{DriverError, sys};

use super::CudaError;

/// Allocations of whole blocks of the driver's share theirs with nobody.
const BLOCK: usize = 2 << 20;
/// A handle: CUDA's own, then how many bytes there are.
const HANDLE: usize = size_of::<sys::CUipcMemHandle>() + size_of::<u64>();

/// What to allocate for memory of `bytes` bytes that is to be shared.
pub(super) fn whole(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(BLOCK)
}

/// The handle of an allocation.
pub(super) fn handle(address: u64, bytes: usize) -> Result<Vec<u8>, DriverError> {
    let mut handle = MaybeUninit::<sys::CUipcMemHandle>::uninit();
    // SAFETY: writes the handle, which is read only if that went well.
    let handle = unsafe {
        sys::cuIpcGetMemHandle(handle.as_mut_ptr(), address).result()?;
        handle.assume_init()
    };
    let own: Vec<u8> = handle.reserved.iter().map(|byte| *byte as u8).collect();
    Ok([&own[..], &(bytes as u64).to_le_bytes()].concat())
}

/// Where another process's memory lies here, and its bytes.
pub(super) fn open(handle: &[u8]) -> Result<(u64, usize), CudaError> {
    let refused = |detail: String| CudaError::Device { what: "open another process's device memory", detail };
    let failed = |error: DriverError| refused(error.to_string());
    let Some((own, bytes)) = handle.split_last_chunk::<8>().filter(|_| handle.len() == HANDLE) else {
        return Err(refused(format!("found a handle of {} bytes, expected {HANDLE}", handle.len())));
    };
    let mut known = sys::CUipcMemHandle { reserved: [0; 64] };
    known.reserved.iter_mut().zip(own).for_each(|(to, byte)| *to = *byte as _);
    let bytes = u64::from_le_bytes(*bytes) as usize;
    let (mut address, mut found) = (0, 0);
    let peers = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
    // SAFETY: writes where the memory lies; a handle that is none is refused.
    unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, known, peers) }.result().map_err(failed)?;
    // SAFETY: writes the size of what was opened.
    let measured = unsafe { sys::cuMemGetAddressRange_v2(std::ptr::null_mut(), &mut found, address) }.result();
    if measured.is_ok() && found >= bytes {
        return Ok((address, bytes));
    }
    // What was refused is as good as closed.
    let _ = close(address);
    Err(measured.err().map_or_else(|| refused(format!("found {found} bytes, expected at least {bytes}")), failed))
}

/// Forgets another process's memory.
pub(super) fn close(address: u64) -> Result<(), DriverError> {
    // SAFETY: opened above, and not used any more.
    unsafe { sys::cuIpcCloseMemHandle(address) }.result()
}
