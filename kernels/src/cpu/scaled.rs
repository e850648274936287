//! Products with panels of which some are in FP8: what [`SCALED`] steps add up to is multiplied by their scale, then added.

use std::ops::Range;

use super::{
    inputs::PackedRows,
    kernels::TILE_ROWS,
    matrix::{GROUP, Panel, SCALED},
};
use crate::{panels::WIDTH, scratch::Scratch};

/// As [`super::products::add`].
pub(super) fn add(x: PackedRows<'_>, tiles: Range<usize>, panels: &[Panel<'_>], sums: &mut [[f32; WIDTH]]) {
    let mut parts = Scratch::take(TILE_ROWS * panels.len() * WIDTH);
    let mut adding = Adding { x, tiles, sums, parts: parts.as_chunks_mut().0 };
    match all_bytes(panels).filter(|_| x.tiles().takes_bytes(x.rows())) {
        Some(bytes) => adding.bytes(panels, &bytes[..panels.len()]),
        None => adding.widened(panels),
    }
}

/// The bytes of panels that are all in FP8.
fn all_bytes<'a>(panels: &[Panel<'a>]) -> Option<[&'a [u8]; GROUP]> {
    let mut all: [&[u8]; GROUP] = [&[]; GROUP];
    for (to, panel) in all.iter_mut().zip(panels) {
        let Panel::Fp8 { bytes, .. } = panel else { return None };
        *to = bytes;
    }
    Some(all)
}

/// Steps that have one scale, one piece after the other: the strips of the rows.
fn pieces(x: PackedRows<'_>) -> impl Iterator<Item = (usize, Range<usize>)> {
    x.strips()
        .inspect(|steps| assert!(steps.start.is_multiple_of(SCALED) && steps.len() <= SCALED, "{steps:?}"))
        .enumerate()
}

/// Sums that products of the rows of some tiles are added to.
struct Adding<'a, 's> {
    x: PackedRows<'a>,
    tiles: Range<usize>,
    /// `[tiles][panels][rows of the tile][16]`
    sums: &'s mut [[f32; WIDTH]],
    /// Room for those of one tile.
    parts: &'s mut [[f32; WIDTH]],
}

impl Adding<'_, '_> {
    /// By tiles of bytes.
    fn bytes(&mut self, panels: &[Panel<'_>], bytes: &[&[u8]]) {
        let tiles = self.x.tiles();
        for (piece, steps) in pieces(self.x) {
            let mut strips: [&[u8]; GROUP] = [&[]; GROUP];
            strips.iter_mut().zip(bytes).for_each(|(to, bytes)| *to = &bytes[steps.start * WIDTH..steps.end * WIDTH]);
            let strips = &strips[..panels.len()];
            self.add(piece, steps, panels, |x, parts| tiles.tile_bytes(x, strips, parts));
        }
    }

    /// By tiles of bf16, which a piece is brought to, in the nearest cache, for the tiles of all rows.
    fn widened(&mut self, panels: &[Panel<'_>]) {
        let tiles = self.x.tiles();
        let mut wide = Scratch::take(panels.len() * SCALED * WIDTH / 2);
        for (piece, steps) in pieces(self.x) {
            let mut strips: [&[u16]; GROUP] = [&[]; GROUP];
            let places = bytemuck::cast_slice_mut(&mut wide).chunks_exact_mut(SCALED * WIDTH);
            for ((to, panel), place) in strips.iter_mut().zip(panels).zip(places) {
                *to = panel.in_bf16(steps.start * WIDTH..steps.end * WIDTH, place);
            }
            let strips = &strips[..panels.len()];
            self.add(piece, steps, panels, |x, parts| tiles.tile(x, strips, parts));
        }
    }

    /// Adds a piece: `multiply(inputs of a tile, parts)` adds products of all panels to parts from zero.
    fn add(
        &mut self,
        piece: usize,
        steps: Range<usize>,
        panels: &[Panel<'_>],
        multiply: impl Fn(&[f32], &mut [[f32; WIDTH]]),
    ) {
        let mut rest = &mut *self.sums;
        for tile in self.tiles.clone() {
            let rows = self.x.tile(tile).len();
            let sums = rest.split_off_mut(..rows * panels.len()).expect("sums of every tile");
            let parts = &mut self.parts[..sums.len()];
            parts.fill([0.0; WIDTH]);
            multiply(self.x.strip(tile, steps.clone()), parts);
            for ((sums, parts), panel) in sums.chunks_exact_mut(rows).zip(parts.chunks_exact(rows)).zip(panels) {
                let scale = panel.scale(piece);
                let (sums, parts) = (sums.as_flattened_mut(), parts.as_flattened());
                sums.iter_mut().zip(parts).for_each(|(sum, part)| *sum += scale * part);
            }
        }
    }
}
