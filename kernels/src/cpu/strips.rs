//! Products of packed rows with panels, strip by strip.

use std::ops::Range;

use super::{
    inputs::PackedRows,
    kernels::{Fetch, Strip},
    matrix::GROUP,
};
use crate::panels::WIDTH;

/// What comes behind a strip: the next one, and behind the last strip the first one of the panels that are `next` panels further on.
pub(super) fn behind(steps: &Range<usize>, depth: usize, next: Option<usize>) -> Fetch<'static> {
    match next {
        _ if steps.end < depth => Fetch::Ahead(steps.len() * WIDTH),
        Some(next) => Fetch::Ahead((next * depth - steps.start) * WIDTH),
        None => Fetch::Nothing,
    }
}

/// Adds products of the rows of some tiles with whole panels: `sums [tiles][panels][rows of the tile][16]`. Strip by strip, so
/// that a strip of the panels is read from a near cache by all tiles but the first. `fetch(steps)`: see [`by_tile`].
pub(super) fn add<'a>(
    x: PackedRows<'_>,
    tiles: Range<usize>,
    panels: &[&[u16]],
    fetch: impl Fn(&Range<usize>) -> [Fetch<'a>; 2],
    sums: &mut [[f32; WIDTH]],
) {
    for steps in x.strips() {
        let mut strips: [&[u16]; GROUP] = [&[]; GROUP];
        let strips = &mut strips[..panels.len()];
        strips.iter_mut().zip(panels).for_each(|(to, panel)| *to = &panel[steps.start * WIDTH..steps.end * WIDTH]);
        add_strip(x, tiles.clone(), steps.clone(), (strips, None), fetch(&steps), sums);
    }
}

/// The same for one strip: panels, and the scales that [`Strip`] has.
pub(super) fn add_strip(
    x: PackedRows<'_>,
    tiles: Range<usize>,
    steps: Range<usize>,
    strip: (&[&[u16]], Option<&[f32]>),
    fetch: [Fetch<'_>; 2],
    sums: &mut [[f32; WIDTH]],
) {
    by_tile(x, tiles, steps, strip, fetch, sums, |rows, strip, sums| x.tiles().tile(rows, strip, sums));
}

/// `add(packed rows, strip, sums)` of each tile; `fetch`: what the first one fetches, and the second.
pub(super) fn by_tile<T>(
    x: PackedRows<'_>,
    tiles: Range<usize>,
    steps: Range<usize>,
    (panels, scales): (&[&[T]], Option<&[f32]>),
    fetch: [Fetch<'_>; 2],
    sums: &mut [[f32; WIDTH]],
    add: impl Fn(&[f32], Strip<'_, T>, &mut [[f32; WIDTH]]),
) {
    let mut fetch = fetch.into_iter();
    let mut rest = sums;
    for tile in tiles {
        let sums = rest.split_off_mut(..x.tile(tile).len() * panels.len()).expect("sums of every tile");
        let strip = Strip { panels, scales, fetch: fetch.next().unwrap_or(Fetch::Nothing) };
        add(x.strip(tile, steps.clone()), strip, sums);
    }
}
