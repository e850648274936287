//! Products of packed rows with panels, strip by strip.

use std::ops::Range;

use super::{
    inputs::PackedRows,
    kernels::{Fetch, Strip},
    matrix::GROUP,
};
use crate::panels::WIDTH;

/// Adds products of the rows of some tiles with whole panels: `sums [tiles][panels][rows of the tile][16]`. Strip by strip, so
/// that a strip of the panels is read from the nearest cache by all tiles but the first. `fetch`: from the first strip on.
pub(super) fn add(
    x: PackedRows<'_>,
    tiles: Range<usize>,
    panels: &[&[u16]],
    fetch: Fetch<'_>,
    sums: &mut [[f32; WIDTH]],
) {
    for steps in x.strips() {
        let mut strips: [&[u16]; GROUP] = [&[]; GROUP];
        let strips = &mut strips[..panels.len()];
        strips.iter_mut().zip(panels).for_each(|(to, panel)| *to = &panel[steps.start * WIDTH..steps.end * WIDTH]);
        let fetch = match fetch {
            Fetch::Rows(rows) => Fetch::Rows(rows.get(steps.start * WIDTH..).unwrap_or_default()),
            fetch => fetch,
        };
        add_strip(x, tiles.clone(), steps, Strip { panels: strips, scales: None, fetch }, sums);
    }
}

/// The same for one strip.
pub(super) fn add_strip(
    x: PackedRows<'_>,
    tiles: Range<usize>,
    steps: Range<usize>,
    strip: Strip<'_, u16>,
    sums: &mut [[f32; WIDTH]],
) {
    by_tile(x, tiles, steps, strip, sums, |rows, strip, sums| x.tiles().tile(rows, strip, sums));
}

/// `add(packed rows, strip, sums)` of each tile, the first of which fetches what the strip is to fetch.
pub(super) fn by_tile<T>(
    x: PackedRows<'_>,
    tiles: Range<usize>,
    steps: Range<usize>,
    strip: Strip<'_, T>,
    sums: &mut [[f32; WIDTH]],
    add: impl Fn(&[f32], Strip<'_, T>, &mut [[f32; WIDTH]]),
) {
    let (first, mut rest) = (tiles.start, sums);
    for tile in tiles {
        let sums = rest.split_off_mut(..x.tile(tile).len() * strip.panels.len()).expect("sums of every tile");
        let fetch = if tile == first { strip.fetch } else { Fetch::Nothing };
        add(x.strip(tile, steps.clone()), Strip { fetch, ..strip }, sums);
    }
}
