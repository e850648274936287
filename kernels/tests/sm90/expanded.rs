//! Attention over expanded keys and values.

use conclave_kernels::cuda::{
    CudaError, Element,
    sm90::{MlaExpanded, maps::TILE_ROWS},
};

use crate::{
    each::on_each,
    expanded_case::{Filled, SCALE, Sizes},
    maps,
    support::Rig,
};

const PAGE: usize = 64;
const SIZES: Sizes = Sizes { heads: 2, nope: 128, rope: 64, value: 128, latent: 512, position: 0, rows: 1 };

/// Sums `[R, n, 2 + dv]` over chunks of so many keys.
fn sums(rig: &Rig, case: &Filled, chunk: usize) -> Result<Vec<f32>, CudaError> {
    let Sizes { heads, nope, rope, value, latent, position, rows } = case.sizes;
    let width = heads * (nope + value);
    let [q, cache] = [&case.q, &case.cache].map(|values| rig.upload_bf16(values));
    let slots = case.cache.len() / (latent + rope);
    let q_map = maps::rows(rig, rig.at(&q), Element::Bf16, (heads * rows, nope + rope), TILE_ROWS);
    let cache_map = maps::rows(rig, rig.at(&cache), Element::Bf16, (slots, latent + rope), TILE_ROWS);
    let (blocks, length) = (rig.upload(&case.blocks), rows * heads * (2 + value));
    let sums = rig.poisoned::<f32>(length);
    for first in (0..case.sizes.keys()).step_by(chunk) {
        let count = chunk.min(case.sizes.keys() - first);
        let mut kv = case.kv[first * width..(first + count) * width].to_vec();
        kv.resize(count.next_multiple_of(PAGE) * width, 0.0);
        let kv_memory = rig.upload_bf16(&kv);
        let kv_map = maps::rows(rig, rig.at(&kv_memory), Element::Bf16, (kv.len() / width, width), TILE_ROWS);
        MlaExpanded {
            q: rig.at(&q_map),
            kv: rig.at(&kv_map),
            cache: rig.at(&cache_map),
            blocks: rig.at(&blocks) + (first / PAGE * 4) as u64,
            sums: rig.at(&sums),
            position: position as u32,
            first: first as u32,
            count: count as u32,
            rows: rows as u32,
            heads: heads as u32,
            fresh: u32::from(first == 0),
            scale: SCALE,
        }
        .launch(&rig.driver)?;
        // The map goes when this turn ends: what reads it has to be done.
        rig.download::<f32>(&sums, 1);
    }
    Ok(rig.download(&sums, length))
}

/// One row; a tile that is not whole, after a prefix; two tiles over chunks of which the first rows see nothing, and more pages
/// than are loaded at once.
#[test]
fn rows_attend_to_what_is_before_them_in_any_chunks() {
    for (sizes, chunk) in [
        (SIZES, 64),
        (Sizes { position: 70, rows: 67, ..SIZES }, 192),
        (Sizes { position: 300, rows: 131, heads: 1, ..SIZES }, 384),
    ] {
        let case = sizes.fill(4);
        for (_, found) in on_each(|rig| sums(rig, &case, chunk)) {
            case.check(&found, 6e-3);
        }
    }
}
