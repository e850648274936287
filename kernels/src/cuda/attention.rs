//! Latent attention on the CUDA device.

use super::{
    CudaError, Driver,
    batch::CudaBatch,
    buffers::{CudaBuffer, Growing},
    plain::{Address, MergeSplits, MlaQueries, MlaSplits, MlaValues, WriteLatents},
    weights::{CudaMatrix, CudaRotary},
};
use crate::{Dtype, LatentWrite, Mla, MlaShape};

/// Positions of a cache block, and of a split.
const BLOCK: usize = 64;
const SPLIT: u32 = 512;
/// Reduced splits held at a time, in f32 values; more where a single row needs them.
const PARTIALS: usize = 64 << 20;

/// The latent cache: bf16 `[layers, blocks, 64, r + dr]`.
#[derive(Debug)]
pub struct CudaCache<M> {
    _memory: M,
    address: Address,
    layer_bytes: usize,
}

impl<M> CudaCache<M> {
    pub(super) fn new<D: Driver<Memory = M>>(
        driver: &D,
        (layers, blocks): (usize, usize),
        shape: &MlaShape,
    ) -> Result<Self, CudaError> {
        let layer_bytes = blocks * BLOCK * shape.cached() * Dtype::Bf16.size();
        let memory = driver.allocate(layers * layer_bytes)?;
        driver.zero(&memory, 0..layers * layer_bytes)?;
        Ok(Self { address: driver.address(&memory), _memory: memory, layer_bytes })
    }

    fn layer(&self, layer: usize) -> Address {
        self.address + (layer * self.layer_bytes) as u64
    }
}

pub(super) fn queries<D: Driver>(
    driver: &D,
    mla: &Mla<CudaRotary<D::Memory>>,
    batch: &CudaBatch<D::Memory>,
    (q, uk): (&CudaBuffer<D::Memory>, &CudaMatrix<D::Memory>),
    out: &mut CudaBuffer<D::Memory>,
) -> Result<(), CudaError> {
    let MlaShape { heads, nope, rope, latent, .. } = mla.shape;
    let rows = batch.rows();
    assert_eq!((q.length, uk.count), (rows * heads * (nope + rope), heads), "queries");
    MlaQueries {
        q: q.address,
        uk: uk.address,
        cos: mla.rotary.cos,
        sin: mla.rotary.sin,
        positions: batch.positions,
        out: out.fit(driver, rows * heads * (latent + rope))?,
        rows: rows as u32,
        nope: nope as u32,
        rope: rope as u32,
        latent: latent as u32,
        heads: heads as u32,
    }
    .launch(driver)
}

pub(super) fn write_latents<D: Driver>(
    driver: &D,
    mla: &Mla<CudaRotary<D::Memory>>,
    batch: &CudaBatch<D::Memory>,
    write: &LatentWrite<'_, CudaBuffer<D::Memory>>,
    cache: &CudaCache<D::Memory>,
) -> Result<(), CudaError> {
    let MlaShape { latent, rope, .. } = mla.shape;
    assert_eq!(write.kv.length, batch.rows() * (latent + rope), "rows of latents");
    WriteLatents {
        kv: write.kv.address,
        gain: write.gain.address,
        cos: mla.rotary.cos,
        sin: mla.rotary.sin,
        positions: batch.positions,
        slots: batch.slots,
        cache: cache.layer(write.layer),
        latent: latent as u32,
        rope: rope as u32,
        rows: batch.rows() as u32,
    }
    .launch(driver)
}

/// What attention reads and writes.
pub(super) struct Attention<'a, M> {
    pub(super) mla: &'a Mla<CudaRotary<M>>,
    pub(super) batch: &'a CudaBatch<M>,
    pub(super) cache: &'a CudaCache<M>,
    pub(super) layer: usize,
    /// `[T, n, r + dr]`
    pub(super) q: &'a CudaBuffer<M>,
    /// `[T, n, r]`
    pub(super) out: Address,
}

impl<M: Send + Sync + 'static> Attention<'_, M> {
    /// Some rows after the other, as many as reduced splits are held of.
    pub(super) fn run<D: Driver<Memory = M>>(&self, driver: &D, partials: &mut Growing<M>) -> Result<(), CudaError> {
        let MlaShape { heads, latent, .. } = self.mla.shape;
        assert_eq!(self.q.length, self.batch.rows() * heads * self.mla.shape.cached(), "rows of attention");
        let most = self.batch.seen.iter().max().map_or(1, |keys| keys.div_ceil(SPLIT));
        let of_row = most as usize * heads * (latent + 2);
        let at_once = (PARTIALS / of_row).max(1);
        for first in (0..self.batch.rows()).step_by(at_once) {
            let rows = at_once.min(self.batch.rows() - first);
            let memory = partials.fit(driver, rows * of_row * size_of::<f32>())?;
            self.some_rows(driver, first..first + rows, driver.address(memory))?;
        }
        Ok(())
    }

    fn some_rows<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        rows: std::ops::Range<usize>,
        parts: Address,
    ) -> Result<(), CudaError> {
        let Self { mla, batch, .. } = self;
        let MlaShape { heads, latent, rope, .. } = mla.shape;
        let splits = batch.seen[rows.clone()].iter().max().map_or(1, |keys| keys.div_ceil(SPLIT));
        let from = |address: Address, row: usize| address + (rows.start * row * size_of::<f32>()) as u64;
        let (count, heads_count) = (rows.len() as u32, heads as u32);
        MlaSplits {
            q: from(self.q.address, heads * mla.shape.cached()),
            cache: self.cache.layer(self.layer),
            sequences: from(batch.sequences, 1),
            keys: from(batch.keys, 1),
            first_block: batch.first_block,
            blocks: batch.blocks,
            out: parts,
            heads: heads_count,
            latent: latent as u32,
            rope: rope as u32,
            scale: mla.scale,
            rows: count,
            splits,
        }
        .launch(driver)?;
        MergeSplits {
            parts,
            keys: from(batch.keys, 1),
            out: from(self.out, heads * latent),
            splits,
            latent: latent as u32,
            rows: count,
            heads: heads_count,
        }
        .launch(driver)
    }
}

pub(super) fn values<D: Driver>(
    driver: &D,
    shape: &MlaShape,
    (o_lat, uv): (&CudaBuffer<D::Memory>, &CudaMatrix<D::Memory>),
    out: &mut CudaBuffer<D::Memory>,
) -> Result<(), CudaError> {
    let &MlaShape { heads, latent, value, .. } = shape;
    let rows = o_lat.length / (heads * latent);
    assert_eq!((o_lat.length, uv.count), (rows * heads * latent, heads), "weighted latents");
    MlaValues {
        o_lat: o_lat.address,
        uv: uv.address,
        out: out.fit(driver, rows * heads * value)?,
        rows: rows as u32,
        latent: latent as u32,
        value: value as u32,
        heads: heads as u32,
    }
    .launch(driver)
}
