//! A shim whose kernels and transfers can be held up, and which can fail, as can its reads of others' memory.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use conclave_kernels::cuda::{AnyLink, CudaError, Driver, DriverLink, EncodedMap, Launch, Shim, ShimMemory, TensorMap};
use conclave_kernels::link::{LinkEnd, Until};

/// What a test does to a [`Gated`] device.
#[derive(Default)]
pub(crate) struct Gate {
    shut: Mutex<bool>,
    opened: Condvar,
    /// Launches that wait, or have waited, at the gate.
    pub(crate) held: AtomicUsize,
    pub(crate) fails: AtomicBool,
    /// The next launch fails, and with it the device.
    pub(crate) breaks: AtomicBool,
    /// Transfers over links stand still while it is set.
    pub(crate) stands_still: AtomicBool,
    /// Those that stand still, or have.
    pub(crate) stood: AtomicUsize,
}

impl Gate {
    pub(crate) fn shut(&self) {
        *self.shut.lock().unwrap() = true;
    }

    pub(crate) fn open(&self) {
        *self.shut.lock().unwrap() = false;
        self.opened.notify_all();
    }

    /// Waits until a transfer may go on.
    fn go_on(&self, until: &Until<'_>) -> Result<(), CudaError> {
        if !self.stands_still.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.stood.fetch_add(1, Ordering::SeqCst);
        let ask = || {
            std::thread::sleep(Duration::from_millis(1));
            Ok((!self.stands_still.load(Ordering::SeqCst)).then_some(()))
        };
        until.wait(ask, |why| CudaError::Device { what: "stand still", detail: why.to_owned() })
    }

    fn pass(&self) {
        let mut shut = self.shut.lock().unwrap();
        if *shut {
            self.held.fetch_add(1, Ordering::SeqCst);
        }
        while *shut {
            shut = self.opened.wait(shut).unwrap();
        }
    }
}

/// The shim behind a gate.
pub(crate) struct Gated {
    pub(crate) shim: Shim,
    pub(crate) gate: Arc<Gate>,
}

impl Driver for Gated {
    type Memory = ShimMemory;
    type Mark = <Shim as Driver>::Mark;
    type Copy = <Shim as Driver>::Copy;

    fn name(&self) -> String {
        self.shim.name()
    }

    fn chip(&self) -> &'static str {
        self.shim.chip()
    }

    fn multiprocessors(&self) -> usize {
        self.shim.multiprocessors()
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
        self.gate.pass();
        if self.gate.breaks.load(Ordering::SeqCst) {
            return Err(CudaError::Launch { kernel: launch.kernel.to_owned(), detail: "a bit has flipped".to_owned() });
        }
        self.shim.launch(launch)
    }

    fn mark(&self) -> Result<Self::Mark, CudaError> {
        self.shim.mark()
    }

    fn seconds(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64, CudaError> {
        self.shim.seconds(from, to)
    }

    fn export(&self, bytes: usize) -> Result<(ShimMemory, Vec<u8>), CudaError> {
        self.shim.export(bytes)
    }

    fn import(&self, handle: &[u8]) -> Result<(ShimMemory, usize), CudaError> {
        self.shim.import(handle)
    }

    fn download_beside(&self, memory: &ShimMemory, offset: usize, bytes: &mut [u8]) -> Result<(), CudaError> {
        if self.gate.fails.load(Ordering::SeqCst) {
            return Err(CudaError::Device { what: "copy from another process", detail: "it is gone".to_owned() });
        }
        self.shim.download_beside(memory, offset, bytes)
    }

    fn check_links(&self) -> Result<(), CudaError> {
        self.shim.check_links()
    }

    fn link_id(&self) -> Result<Vec<u8>, CudaError> {
        self.shim.link_id()
    }

    fn link<'d>(&'d self, id: &[u8], end: LinkEnd, until: &Until<'_>) -> Result<AnyLink<'d, Self>, CudaError> {
        Ok(Box::new(GatedLink { link: self.shim.link(id, end, until)?, gate: &self.gate }))
    }
}

struct GatedLink<'d> {
    link: AnyLink<'d, Shim>,
    gate: &'d Gate,
}

impl DriverLink<ShimMemory> for GatedLink<'_> {
    fn upload(&mut self, memory: &ShimMemory, offset: usize, bytes: &[u8]) -> Result<(), CudaError> {
        self.link.upload(memory, offset, bytes)
    }

    fn launch(&mut self, launch: &Launch<'_>) -> Result<(), CudaError> {
        self.link.launch(launch)
    }

    fn send(&mut self, memory: &ShimMemory, range: Range<usize>, until: &Until<'_>) -> Result<(), CudaError> {
        self.gate.go_on(until)?;
        self.link.send(memory, range, until)
    }

    fn receive(&mut self, memory: &ShimMemory, range: Range<usize>, until: &Until<'_>) -> Result<(), CudaError> {
        self.gate.go_on(until)?;
        self.link.receive(memory, range, until)
    }
}
