//! Links of the CUDA device.

use super::{
    CudaError, Driver, buffers::Growing, driver_link::AnyLink, kernel::Address, plain::GatherBf16, shared::CudaShared,
};
use crate::{
    Dtype, KernelError,
    link::{Link, Until},
};

/// Bytes for numbers of rows at least.
const INDEX: usize = 4096;

/// One end of a link.
pub(super) struct CudaLink<'d, D: Driver> {
    pub(super) driver: &'d D,
    pub(super) link: AnyLink<'d, D>,
    /// Numbers of rows.
    pub(super) index: Growing<D::Memory>,
    /// Where the board's first `bytes` bytes lie, if it has as many.
    pub(super) board: Box<dyn Fn(usize) -> Result<Address, CudaError> + 'd>,
}

impl<D: Driver> CudaLink<'_, D> {
    /// Lays rows of the board together. `bytes`: of all of them.
    fn gather(&mut self, rows: &[u32], hidden: usize, through: &CudaShared<D::Memory>) -> Result<usize, CudaError> {
        let row_bytes = hidden * Dtype::Bf16.size();
        let bytes = rows.len() * row_bytes;
        let x = (self.board)(rows.iter().max().map_or(0, |last| *last as usize + 1) * row_bytes)?;
        let out = through.address(self.driver, bytes)?;
        let index = self.index.fit(self.driver, size_of_val(rows).next_power_of_two().max(INDEX))?;
        self.link.upload(index, 0, bytemuck::cast_slice(rows))?;
        let rows_at = self.driver.address(index);
        let gather = GatherBf16 { x, rows: rows_at, out, hidden: hidden as u32, pairs: rows.len() as u32 };
        gather.with(|launch| self.link.launch(launch))?;
        Ok(bytes)
    }
}

impl<D: Driver> Link<CudaShared<D::Memory>> for CudaLink<'_, D> {
    fn send_rows(
        &mut self,
        rows: &[u32],
        hidden: usize,
        through: &CudaShared<D::Memory>,
        until: &Until<'_>,
    ) -> Result<(), KernelError> {
        let bytes = self.gather(rows, hidden, through)?;
        self.send(through, bytes, until)
    }

    fn send(&mut self, memory: &CudaShared<D::Memory>, bytes: usize, until: &Until<'_>) -> Result<(), KernelError> {
        Ok(self.link.send(memory.beginning(bytes)?, 0..bytes, until)?)
    }

    fn receive(&mut self, memory: &CudaShared<D::Memory>, bytes: usize, until: &Until<'_>) -> Result<(), KernelError> {
        Ok(self.link.receive(memory.beginning(bytes)?, 0..bytes, until)?)
    }
}
