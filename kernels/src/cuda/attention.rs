//! Latent attention on the CUDA device.

use super::{
    CudaError, Driver, Element, EncodedMap,
    batch::{CudaBatch, Pass},
    buffers::{CudaBuffer, Growing},
    kernel::Address,
    operand::{Operand, View},
    plain::{MergeSplits, MlaQueries, MlaSplits, MlaValues, SplitQueries, WriteLatents},
    products,
    sm90::{self, maps},
    weights::{CudaMatrix, CudaRotary},
};
use crate::{Dtype, LatentWrite, Mla, MlaShape};

/// Positions of a cache block.
const BLOCK: usize = 64;
const MAP: usize = size_of::<EncodedMap>();

/// The latent cache: bf16 `[layers, blocks, 64, r + dr]`.
///
/// Which kernels attend over it is decided when it is made, by the chip and by its shape: where `maps` is, those for sm_90a.
#[derive(Debug)]
pub struct CudaCache<M> {
    _memory: M,
    address: Address,
    layer_bytes: usize,
    /// A tensor map of each layer.
    maps: Option<Address>,
}

impl<M> CudaCache<M> {
    pub(super) fn new<D: Driver<Memory = M>>(
        driver: &D,
        (layers, blocks): (usize, usize),
        shape: &MlaShape,
    ) -> Result<Self, CudaError> {
        let width = shape.cached();
        let layer_bytes = blocks * BLOCK * width * Dtype::Bf16.size();
        let fast = driver.chip() == sm90::CHIP
            && (shape.latent, shape.rope) == (sm90::LATENT, sm90::ROPE)
            && layers * blocks > 0;
        let (bytes, at) = (layers * layer_bytes, (layers * layer_bytes).next_multiple_of(MAP));
        let memory = driver.allocate(if fast { at + layers * MAP } else { bytes })?;
        driver.zero(&memory, 0..bytes)?;
        let address = driver.address(&memory);
        if fast {
            let map = |layer| {
                let layer = address + (layer * layer_bytes) as u64;
                maps::rows(driver, layer, Element::Bf16, (blocks * BLOCK, width), maps::TILE_ROWS)
            };
            driver.upload(&memory, at, (0..layers).map(map).collect::<Result<Vec<_>, _>>()?.as_flattened())?;
        }
        Ok(Self { _memory: memory, address, layer_bytes, maps: fast.then_some(address + at as u64) })
    }

    pub(super) fn layer(&self, layer: usize) -> Address {
        self.address + (layer * self.layer_bytes) as u64
    }

    /// The tensor map of a layer, where the kernels for sm_90a attend over it.
    pub(super) fn map(&self, layer: usize) -> Option<Address> {
        self.maps.map(|maps| maps + (layer * MAP) as u64)
    }

    /// Whether the kernels for sm_90a attend over it.
    pub(super) fn fast(&self) -> bool {
        self.maps.is_some()
    }
}

/// Absorbed queries: of a step's rows.
pub(super) struct Queries<'a, M> {
    pub(super) mla: &'a Mla<CudaRotary<M>>,
    pub(super) batch: &'a CudaBatch<M>,
    /// `[T, n, dn + dr]`
    pub(super) q: &'a CudaBuffer<M>,
    /// `n` matrices `[r, dn]`
    pub(super) uk: &'a CudaMatrix<M>,
}

impl<M: Send + Sync + 'static> Queries<'_, M> {
    /// `out [T, n, r + dr]`; `nope` is working memory.
    pub(super) fn run<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        nope: &mut Operand<M>,
        out: &mut CudaBuffer<M>,
    ) -> Result<(), CudaError> {
        let shape = &self.mla.shape;
        let (all, rows) = (self.batch.rows(), self.batch.absorbed());
        assert_eq!((self.q.length, self.uk.count), (all * shape.heads * (shape.nope + shape.rope), shape.heads));
        let length = all * shape.heads * shape.cached();
        let Some(tiles) = self.uk.tiles else {
            return self.plain(driver, out.fit(driver, length)?);
        };
        let out = out.fit_bf16(driver, length)?.address(driver)?;
        self.split(driver, nope.fit(driver, rows * shape.heads * shape.nope)?, out)?;
        products::heads(driver, nope, rows, (self.uk, tiles), (out, shape.cached()))
    }

    fn plain<D: Driver<Memory = M>>(&self, driver: &D, out: Address) -> Result<(), CudaError> {
        let MlaShape { heads, nope, rope, latent, .. } = self.mla.shape;
        MlaQueries {
            q: self.q.f32(driver)?,
            uk: self.uk.address,
            cos: self.mla.rotary.cos,
            sin: self.mla.rotary.sin,
            positions: self.batch.positions,
            out,
            rows: self.batch.absorbed() as u32,
            nope: nope as u32,
            rope: rope as u32,
            latent: latent as u32,
            heads: heads as u32,
        }
        .launch(driver)
    }

    fn split<D: Driver<Memory = M>>(&self, driver: &D, nope_out: Address, absorbed: Address) -> Result<(), CudaError> {
        let MlaShape { heads, nope, rope, latent, .. } = self.mla.shape;
        SplitQueries {
            q: self.q.f32(driver)?,
            cos: self.mla.rotary.cos,
            sin: self.mla.rotary.sin,
            positions: self.batch.positions,
            nope_out,
            absorbed,
            nope: nope as u32,
            rope: rope as u32,
            latent: latent as u32,
            rows: self.batch.absorbed() as u32,
            heads: heads as u32,
        }
        .launch(driver)
    }
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
        kv: write.kv.f32(driver)?,
        gain: write.gain.f32(driver)?,
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

/// What attention reads.
pub(super) struct Attention<'a, M> {
    pub(super) mla: &'a Mla<CudaRotary<M>>,
    pub(super) batch: &'a CudaBatch<M>,
    pub(super) cache: &'a CudaCache<M>,
    pub(super) layer: usize,
    /// `[T, n, r + dr]`
    pub(super) q: &'a CudaBuffer<M>,
}

impl<M: Send + Sync + 'static> Attention<'_, M> {
    /// `out [T, n, r]`, some rows after the other, as many as reduced splits are held of.
    pub(super) fn run<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        partials: &mut Growing<M>,
        out: &mut CudaBuffer<M>,
    ) -> Result<(), CudaError> {
        let MlaShape { heads, latent, .. } = self.mla.shape;
        let rows = self.batch.rows();
        assert_eq!(self.q.length, rows * heads * self.mla.shape.cached(), "rows of attention");
        let Some(cache) = self.cache.map(self.layer) else {
            let out = out.fit(driver, rows * heads * latent)?;
            let mut passes = self.batch.passes(heads, latent).into_iter();
            return passes.try_for_each(|pass| self.plain(driver, &pass, partials, out));
        };
        let out = out.fit_bf16(driver, rows * heads * latent)?.address(driver)?;
        if self.batch.absorbed() == 0 {
            return Ok(());
        }
        let mut q = self.q.bf16(driver)?;
        let q = q.bf16.map(driver, View::Queries(self.mla.shape.cached()))?;
        let work = self.batch.work(driver, heads)?;
        work.passes.iter().try_for_each(|pass| {
            let parts = self.parts(driver, pass, partials)?;
            self.sm90(driver, pass, (q, cache, work.items), parts)?;
            self.merge(driver, pass, parts, (out, Dtype::Bf16))
        })
    }

    /// Memory for the reduced splits of a pass.
    fn parts<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        pass: &Pass,
        partials: &mut Growing<M>,
    ) -> Result<Address, CudaError> {
        let MlaShape { heads, latent, .. } = self.mla.shape;
        let values = pass.rows.len() * pass.splits * heads * (latent + 2);
        Ok(driver.address(partials.fit(driver, values * Dtype::F32.size())?))
    }

    fn plain<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        pass: &Pass,
        partials: &mut Growing<M>,
        out: Address,
    ) -> Result<(), CudaError> {
        let Self { mla, batch, .. } = self;
        let MlaShape { heads, latent, rope, .. } = mla.shape;
        let parts = self.parts(driver, pass, partials)?;
        let from = |address: Address, row: usize| skip(address, pass, row * Dtype::F32.size());
        MlaSplits {
            q: from(self.q.f32(driver)?, heads * mla.shape.cached()),
            cache: self.cache.layer(self.layer),
            sequences: from(batch.sequences, 1),
            keys: from(batch.keys, 1),
            first_block: batch.first_block,
            blocks: batch.blocks,
            out: parts,
            heads: heads as u32,
            latent: latent as u32,
            rope: rope as u32,
            scale: mla.scale,
            rows: pass.rows.len() as u32,
            splits: pass.splits as u32,
        }
        .launch(driver)?;
        self.merge(driver, pass, parts, (out, Dtype::F32))
    }

    /// Items name rows of the whole step: `parts` is taken to have begun with the first of these.
    fn sm90<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        pass: &Pass,
        (q, cache, items): (Address, Address, Address),
        parts: Address,
    ) -> Result<(), CudaError> {
        let MlaShape { heads, latent, .. } = self.mla.shape;
        let before = pass.rows.start * pass.splits * heads * (latent + 2) * Dtype::F32.size();
        sm90::MlaSplits {
            q,
            cache,
            items: items + (pass.items.start * size_of::<sm90::MlaItem>()) as u64,
            keys: self.batch.keys,
            first_block: self.batch.first_block,
            blocks: self.batch.blocks,
            out: parts.wrapping_sub(before as u64),
            count: pass.items.len() as u32,
            heads: heads as u32,
            splits: pass.splits as u32,
            scale: self.mla.scale,
            running: pass.items.len().min(driver.multiprocessors()) as u32,
        }
        .launch(driver)
    }

    /// Merges the splits of a pass; `out` is where those of the whole step go.
    fn merge<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        pass: &Pass,
        parts: Address,
        (out, dtype): (Address, Dtype),
    ) -> Result<(), CudaError> {
        let MlaShape { heads, latent, .. } = self.mla.shape;
        MergeSplits {
            parts,
            keys: skip(self.batch.keys, pass, size_of::<u32>()),
            out: skip(out, pass, heads * latent * dtype.size()),
            splits: pass.splits as u32,
            latent: latent as u32,
            rounded: dtype == Dtype::Bf16,
            rows: pass.rows.len() as u32,
            heads: heads as u32,
        }
        .launch(driver)
    }
}

/// Where the rows of a pass begin among those of the step.
fn skip(address: Address, pass: &Pass, row_bytes: usize) -> Address {
    address + (pass.rows.start * row_bytes) as u64
}

pub(super) fn values<D: Driver>(
    driver: &D,
    shape: &MlaShape,
    absorbed: usize,
    (o_lat, uv): (&CudaBuffer<D::Memory>, &CudaMatrix<D::Memory>),
    out: &mut CudaBuffer<D::Memory>,
) -> Result<(), CudaError> {
    let &MlaShape { heads, latent, value, .. } = shape;
    let rows = o_lat.length / (heads * latent);
    assert_eq!((o_lat.length, uv.count), (rows * heads * latent, heads), "weighted latents");
    let length = rows * heads * value;
    if let Some(tiles) = uv.tiles {
        let out = out.fit_bf16(driver, length)?.address(driver)?;
        let mut o_lat = o_lat.bf16(driver)?;
        return products::heads(driver, &mut o_lat.bf16, absorbed, (uv, tiles), (out, value));
    }
    MlaValues {
        o_lat: o_lat.f32(driver)?,
        uv: uv.address,
        out: out.fit(driver, length)?,
        rows: absorbed as u32,
        latent: latent as u32,
        value: value as u32,
        heads: heads as u32,
    }
    .launch(driver)
}
