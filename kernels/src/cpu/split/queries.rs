//! Queries, packed for their products with keys.

use crate::{
    Dtype, activation,
    cpu::{
        inputs::{Inputs, Packed},
        kernels::{InPlace, Kernels},
    },
    panels::{STEPS, WIDTH, pack_rows},
    pool::Pool,
    scratch::Scratch,
};

/// Some queries in bf16, zeros behind.
pub(in crate::cpu) enum Queries<'k> {
    /// As rows of tiles: keys will be packed into panels.
    Rows(Packed<'k>),
    /// As one panel `[depth / 2][16][2]`, so few that packing keys and values would take longer than it saves.
    Panel { panel: Scratch, count: usize, in_place: &'k dyn InPlace },
}

impl<'k> Queries<'k> {
    /// Packs them as is best for so many. Half a panel would do half its products in vain.
    pub(in crate::cpu) fn new(pool: &Pool, kernels: &'k dyn Kernels, queries: Inputs<'_>) -> Self {
        match kernels.in_place() {
            Some(in_place) if (WIDTH / 2 + 1..=WIDTH).contains(&queries.rows) => {
                Self::Panel { panel: panel(queries), count: queries.rows, in_place }
            }
            _ => {
                let tiles = kernels.tiles(Dtype::Bf16);
                Self::Rows(Packed::new(pool, tiles, tiles.strip(), &[queries]))
            }
        }
    }

    pub(super) fn count(&self) -> usize {
        match self {
            Self::Rows(packed) => packed.of(0).rows(),
            Self::Panel { count, .. } => *count,
        }
    }
}

fn panel(queries: Inputs<'_>) -> Scratch {
    let depth = queries.width.next_multiple_of(STEPS);
    let mut rounded = Scratch::take(WIDTH * depth / 2);
    let rows: &mut [u16] = bytemuck::cast_slice_mut(&mut rounded);
    rows.fill(0);
    for (index, to) in rows.chunks_exact_mut(depth).enumerate().take(queries.rows) {
        to.iter_mut().zip(queries.row(index)).for_each(|(to, x)| *to = activation::to_bf16(*x));
    }
    let mut panel = Scratch::take(WIDTH * depth / 2);
    pack_rows(rows, bytemuck::cast_slice_mut(&mut panel));
    panel
}
