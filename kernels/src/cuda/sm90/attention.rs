//! `sm90_mla_splits.cu`: its launch, and the list of work that it goes by.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::{Address, Shape, kernel};

/// Elements of a value, and of the roped rest of a key: the only sizes that the kernel has.
pub const LATENT: usize = 512;
/// See [`LATENT`].
pub const ROPE: usize = 64;
/// Rows of queries (of a row of the step and a head) that an item has at most.
pub const QUERIES: usize = 64;
/// Positions of a split.
const SPLIT: usize = 512;

/// One item of work: some queries and one split of their keys. `MlaItem` of `mla_tiles.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct MlaItem {
    /// First row of queries `[T · n, r + dr]`.
    pub first: u32,
    /// Rows of queries, of one sequence, positions ascending; at most [`QUERIES`].
    pub rows: u32,
    /// Which sequence.
    pub sequence: u32,
    /// Which 512 of its positions.
    pub split: u32,
}

/// Rows of one sequence that an item has room for.
pub fn rows_together(heads: usize) -> usize {
    (QUERIES / heads).max(1)
}

/// Items of some rows of one sequence, `seen[row]` being the positions that a row sees: of [`rows_together`] rows at most, or
/// of some heads of one row. No result depends on how many rows these are.
pub fn items(rows: Range<usize>, sequence: usize, heads: usize, seen: &[u32]) -> Vec<MlaItem> {
    let splits = rows.clone().last().map_or(0, |last| (seen[last] as usize).div_ceil(SPLIT));
    let firsts = move |split| (0..heads).step_by(QUERIES).map(move |head| (split, head));
    let item = |(split, head): (usize, usize)| MlaItem {
        first: (rows.start * heads + head) as u32,
        rows: (rows.len() * heads - head).min(QUERIES) as u32,
        sequence: sequence as u32,
        split: split as u32,
    };
    (0..splits).flat_map(firsts).map(item).collect()
}

kernel! {
    /// Reduces the keys of each split of 512 positions to `[max, sum, latents..]`, as the plain kernel of this name does: the
    /// weights are rounded to bf16, and it is the rounded ones that are summed.
    MlaSplits("sm90_mla_splits") {
        /// Map of bf16 `[T · n, 576]`, tiles of 64 rows
        q: Address,
        /// Map of bf16 `[slots, 576]`, tiles of 64 rows: one layer of the cache
        cache: Address,
        /// [`MlaItem`] `[items]`
        items: Address,
        /// u32 `[T]`: the positions that each row sees, its own included
        keys: Address,
        /// u32 `[sequences]`: where in `blocks` a sequence's begin
        first_block: Address,
        /// u32: cache blocks of 64 positions, in order of position within a sequence
        blocks: Address,
        /// f32 `[T, n, splits, r + 2]`
        out: Address,
        /// Items, each with at least one key.
        count: u32,
        /// `n`
        heads: u32,
        /// `ceil(most keys / 512)`
        splits: u32,
        /// Multiplies scores.
        scale: f32,
    } over {
        /// Blocks, which take items in turn; one a multiprocessor.
        running: u32,
    }
    => |it| Shape::new([it.running, 1, 1], 384).with_bytes(229_760)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(items: &[MlaItem]) -> Vec<[u32; 4]> {
        items.iter().map(|item| [item.first, item.rows, item.sequence, item.split]).collect()
    }

    #[test]
    fn an_item_has_several_rows_or_some_heads_of_one() {
        let seen = [0, 510, 511, 512, 513, 514, 515];
        assert_eq!([16, 20, 64, 128].map(rows_together), [4, 3, 1, 1]);
        assert_eq!(of(&items(1..4, 3, 20, &seen)), [[20, 60, 3, 0]]);
        assert_eq!(of(&items(4..5, 3, 20, &seen)), [[80, 20, 3, 0], [80, 20, 3, 1]]);
        assert_eq!(of(&items(1..2, 0, 128, &seen)), [[128, 64, 0, 0], [192, 64, 0, 0]]);
        assert_eq!(of(&items(6..7, 0, 100, &seen))[1..], [[664, 36, 0, 0], [600, 64, 0, 1], [664, 36, 0, 1]]);
    }
}
