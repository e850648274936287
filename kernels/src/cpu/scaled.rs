//! Products with panels of which some are in FP8: what [`SCALED`] steps add up to is multiplied by their scale, then added.

use std::ops::Range;

use super::{
    inputs::PackedRows,
    kernels::Fetch,
    matrix::{GROUP, Panel, SCALED},
    strips::{add_strip, behind, by_tile},
};
use crate::{panels::WIDTH, scratch::Scratch};

/// As [`super::strips::add`]; `next` as in [`behind`].
pub(super) fn add(
    x: PackedRows<'_>,
    tiles: Range<usize>,
    panels: &[Panel<'_>],
    next: Option<usize>,
    sums: &mut [[f32; WIDTH]],
) {
    match all_bytes(panels).filter(|_| x.tiles().takes_bytes(x.rows())) {
        Some(bytes) => add_bytes(x, tiles, panels, &bytes[..panels.len()], next, sums),
        None => add_widened(x, tiles, panels, sums),
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

/// By tiles of bytes.
fn add_bytes(
    x: PackedRows<'_>,
    tiles: Range<usize>,
    panels: &[Panel<'_>],
    bytes: &[&[u8]],
    next: Option<usize>,
    sums: &mut [[f32; WIDTH]],
) {
    for (piece, steps) in pieces(x) {
        let mut strips: [&[u8]; GROUP] = [&[]; GROUP];
        strips.iter_mut().zip(bytes).for_each(|(to, bytes)| *to = &bytes[steps.start * WIDTH..steps.end * WIDTH]);
        let scales = scales(panels, piece);
        let strip = (&strips[..panels.len()], Some(&scales[..panels.len()]));
        let fetch = [Fetch::Next, behind(&steps, x.depth(), next)];
        by_tile(x, tiles.clone(), steps, strip, fetch, sums, |rows, strip, sums| {
            x.tiles().tile_bytes(rows, strip, sums)
        });
    }
}

/// By tiles of bf16, which a piece is brought to, in the nearest cache, for the tiles of all rows.
fn add_widened(x: PackedRows<'_>, tiles: Range<usize>, panels: &[Panel<'_>], sums: &mut [[f32; WIDTH]]) {
    let mut wide = Scratch::take(panels.len() * SCALED * WIDTH / 2);
    for (piece, steps) in pieces(x) {
        let mut strips: [&[u16]; GROUP] = [&[]; GROUP];
        let places = bytemuck::cast_slice_mut(&mut wide).chunks_exact_mut(SCALED * WIDTH);
        for ((to, panel), place) in strips.iter_mut().zip(panels).zip(places) {
            *to = panel.in_bf16(steps.start * WIDTH..steps.end * WIDTH, place);
        }
        let scales = scales(panels, piece);
        let strip = (&strips[..panels.len()], Some(&scales[..panels.len()]));
        add_strip(x, tiles.clone(), steps, strip, [Fetch::Nothing; 2], sums);
    }
}

/// Those of a piece.
fn scales(panels: &[Panel<'_>], piece: usize) -> [f32; GROUP] {
    let mut scales = [1.0; GROUP];
    scales.iter_mut().zip(panels).for_each(|(to, panel)| *to = panel.scale(piece));
    scales
}
