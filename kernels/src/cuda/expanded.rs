//! Attention over keys and values that are expanded from the latents (MODEL §3.2), on the CUDA device. For many rows of a
//! sequence this takes fewer operations than absorbing their queries, and gives other bits.

use std::ops::Range;

use super::{
    CudaError, Driver,
    attention::CudaCache,
    batch::{CudaBatch, ExpandedSpan},
    buffers::{CudaBuffer, Growing},
    kernel::Address,
    operand::{Operand, View},
    plain::{FinishExpanded, GatherLatents, MlaExpanded, RopeQueries, RoundBf16},
    products, sm90,
    weights::{CudaMatrix, CudaRotary},
};
use crate::{Dtype, Mla, MlaShape};

/// Positions of a cache block.
const BLOCK: usize = 64;
/// Bytes of expanded keys and values at a time; more where a block of positions takes more.
const CHUNK_BYTES: usize = 128 << 20;

/// Working memory, for one span at a time.
#[derive(Debug)]
pub(super) struct Working<M> {
    /// bf16 `[n, R, dn + dr]`
    queries: Operand<M>,
    /// bf16 `[C, r]`
    latents: Operand<M>,
    /// `[C, n, dn + dv]` of a chunk of keys: bf16; f32 for the plain kernel, and of products in FP8
    kv: Operand<M>,
    plain_kv: Growing<M>,
    /// f32 `[R, n, 2 + dv]`
    sums: Growing<M>,
}

impl<M> Default for Working<M> {
    fn default() -> Self {
        Self {
            queries: Operand::default(),
            latents: Operand::default(),
            kv: Operand::default(),
            plain_kv: Growing::default(),
            sums: Growing::default(),
        }
    }
}

/// What attention of a step's expanded spans reads.
pub(super) struct Expanded<'a, M> {
    pub(super) mla: &'a Mla<CudaRotary<M>>,
    pub(super) batch: &'a CudaBatch<M>,
    pub(super) cache: &'a CudaCache<M>,
    pub(super) layer: usize,
    /// `[T, n, dn + dr]`, as projected
    pub(super) q: &'a CudaBuffer<M>,
    /// `[n · (dn + dv), r]`
    pub(super) kv_b: &'a CudaMatrix<M>,
}

/// Cuts the keys of a sequence into chunks of whole blocks, of which `key_bytes` a key come to at most `most`.
fn chunks(keys: usize, key_bytes: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let length = (most / key_bytes / BLOCK).max(1) * BLOCK;
    (0..keys).step_by(length).map(move |first| first..keys.min(first + length))
}

impl<M: Send + Sync + 'static> Expanded<'_, M> {
    /// The rows of expanded spans of `out [T, n · dv]`, in the form in which the others are there.
    pub(super) fn run<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        working: &mut Working<M>,
        out: &mut CudaBuffer<M>,
    ) -> Result<(), CudaError> {
        let MlaShape { heads, value, .. } = self.mla.shape;
        assert_eq!(out.length, self.batch.rows() * heads * value, "rows of attention");
        if self.batch.expanded().is_empty() {
            return Ok(());
        }
        let (out, dtype) = out.change_as_it_is(driver)?;
        self.batch.expanded().iter().try_for_each(|span| {
            self.queries(driver, span, &mut working.queries)?;
            let key_bytes = heads * (self.mla.shape.nope + value) * Dtype::F32.size();
            for keys in chunks(span.position + span.rows.len(), key_bytes, CHUNK_BYTES) {
                self.chunk(driver, span, keys, working)?;
            }
            let sums = driver.address(working.sums.fit(driver, 0)?);
            let out = out + (span.rows.start * heads * value * dtype.size()) as u64;
            let (rows, heads, value) = (span.rows.len() as u32, heads as u32, value as u32);
            FinishExpanded { sums, out, value, dtype, rows, heads }.launch(driver)
        })
    }

    /// The cache's map, if the kernel for sm_90a serves these sizes.
    fn fast(&self) -> Option<Address> {
        let product = self.kv_b.tiles.is_some() || self.kv_b.scales.is_some();
        self.cache.map(self.layer).filter(|_| product && sm90::expands(&self.mla.shape))
    }

    fn queries<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        span: &ExpandedSpan,
        queries: &mut Operand<M>,
    ) -> Result<(), CudaError> {
        let MlaShape { heads, nope, rope, .. } = self.mla.shape;
        let width = heads * (nope + rope);
        RopeQueries {
            q: self.q.f32(driver)? + (span.rows.start * width * Dtype::F32.size()) as u64,
            cos: self.mla.rotary.cos,
            sin: self.mla.rotary.sin,
            positions: self.batch.positions + (span.rows.start * size_of::<u32>()) as u64,
            out: queries.fit(driver, span.rows.len() * width)?,
            nope: nope as u32,
            rope: rope as u32,
            rows: span.rows.len() as u32,
            heads: heads as u32,
        }
        .launch(driver)
    }

    /// Expands some keys of a span's sequence and adds them to the sums of its rows.
    fn chunk<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        span: &ExpandedSpan,
        keys: Range<usize>,
        working: &mut Working<M>,
    ) -> Result<(), CudaError> {
        let MlaShape { heads, value, latent, .. } = self.mla.shape;
        // Whole blocks, so that what is multiplied by no weight is finite.
        let rows = keys.len().next_multiple_of(BLOCK);
        GatherLatents {
            cache: self.cache.layer(self.layer),
            blocks: span.blocks,
            out: working.latents.fit(driver, rows * latent)?,
            first: keys.start as u32,
            count: keys.len() as u32,
            latent: latent as u32,
            width: self.mla.shape.cached() as u32,
            rows: rows as u32,
        }
        .launch(driver)?;
        working.sums.fit(driver, span.rows.len() * heads * (2 + value) * Dtype::F32.size())?;
        match self.fast() {
            Some(fast) => self.sm90(driver, span, (keys, rows), fast, working),
            None => self.plain(driver, span, keys, working),
        }
    }

    fn sm90<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        span: &ExpandedSpan,
        (keys, rows): (Range<usize>, usize),
        cache: Address,
        working: &mut Working<M>,
    ) -> Result<(), CudaError> {
        let width = self.kv_b.rows;
        self.expand(driver, rows, working)?;
        sm90::MlaExpanded {
            q: working.queries.map(driver, View::Queries(self.mla.shape.nope + self.mla.shape.rope))?,
            kv: working.kv.map(driver, View::Queries(width))?,
            cache,
            blocks: span.blocks + (keys.start / BLOCK * size_of::<u32>()) as u64,
            sums: driver.address(working.sums.fit(driver, 0)?),
            position: span.position as u32,
            first: keys.start as u32,
            count: keys.len() as u32,
            rows: span.rows.len() as u32,
            heads: self.mla.shape.heads as u32,
            fresh: u32::from(keys.start == 0),
            scale: self.mla.scale,
        }
        .launch(driver)
    }

    /// Keys and values of some latents, in bf16: of a matrix in FP8, which has no product that leaves bf16, by way of f32.
    fn expand<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        rows: usize,
        working: &mut Working<M>,
    ) -> Result<(), CudaError> {
        let n = rows * self.kv_b.rows;
        let out = working.kv.fit(driver, n)?;
        match self.kv_b.tiles {
            Some(tiles) if self.kv_b.scales.is_none() => {
                products::heads(driver, &mut working.latents, rows, (self.kv_b, tiles), (out, self.kv_b.rows))
            }
            _ => {
                let x = driver.address(working.plain_kv.fit(driver, n * Dtype::F32.size())?);
                products::linear(driver, true, &mut working.latents, rows, self.kv_b, x)?;
                RoundBf16 { x, out, n: n as u64 }.launch(driver)
            }
        }
    }

    fn plain<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        span: &ExpandedSpan,
        keys: Range<usize>,
        working: &mut Working<M>,
    ) -> Result<(), CudaError> {
        let MlaShape { heads, nope, rope, value, latent } = self.mla.shape;
        let bytes = keys.len() * self.kv_b.rows * Dtype::F32.size();
        let kv = driver.address(working.plain_kv.fit(driver, bytes)?);
        products::linear(driver, true, &mut working.latents, keys.len(), self.kv_b, kv)?;
        MlaExpanded {
            q: working.queries.address(driver)?,
            kv,
            cache: self.cache.layer(self.layer),
            blocks: span.blocks,
            sums: driver.address(working.sums.fit(driver, 0)?),
            position: span.position as u32,
            first: keys.start as u32,
            count: keys.len() as u32,
            fresh: u32::from(keys.start == 0),
            nope: nope as u32,
            rope: rope as u32,
            value: value as u32,
            latent: latent as u32,
            scale: self.mla.scale,
            rows: span.rows.len() as u32,
            heads: heads as u32,
        }
        .launch(driver)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_whole_blocks_within_the_bytes() {
        let of = |keys, key_bytes, most| chunks(keys, key_bytes, most).collect::<Vec<_>>();
        assert_eq!(of(300, 1000, 150_000), [0..128, 128..256, 256..300]);
        assert_eq!(of(192, 1000, 150_000), [0..128, 128..192]);
        assert_eq!(of(70, 1000, 10), [0..64, 64..70], "a block at least");
        // 128 heads of V2, 16 of V2-Lite.
        assert_eq!(of(10_000, 128 * 256 * 4, CHUNK_BYTES)[0], 0..1024);
        assert_eq!(of(10_000, 16 * 256 * 4, CHUNK_BYTES)[0], 0..8192);
    }
}
