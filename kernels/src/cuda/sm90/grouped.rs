//! `sm90_grouped_linear.cu` and `sm90_grouped_heads.cu`: products in bf16.

use super::{Address, Shape, kernel};

/// Most groups of a launch: `GROUPS` of `grouped_tiles.cuh`.
pub const GROUPS: usize = 1024;

/// Tokens of a tile; a kernel each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tokens {
    /// 16
    T16,
    /// 64
    T64,
    /// 128
    T128,
    /// 256
    T256,
}

impl Tokens {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::T16, Self::T64, Self::T128, Self::T256];
    /// Those that there are products in FP8 for.
    pub const FP8: [Self; 3] = [Self::T16, Self::T64, Self::T128];
    /// What serves every number of rows where bits must not depend on it: see `cuda/sm90/README.md`.
    pub const EXACT: Self = Self::T128;

    /// How many.
    pub fn count(self) -> usize {
        match self {
            Self::T16 => 16,
            Self::T64 => 64,
            Self::T128 => 128,
            Self::T256 => 256,
        }
    }

    /// Warpgroups that multiply, each with 64 rows of weights.
    fn warpgroups(self) -> u32 {
        match self {
            Self::T16 | Self::T64 => 1,
            Self::T128 | Self::T256 => 2,
        }
    }

    /// Tiles of one group with so many rows and rows of weights: `[outputs]`, or `[2 · outputs]` of gate and up.
    pub fn tiles(self, rows: usize, weight_rows: usize) -> usize {
        rows.div_ceil(self.count()) * weight_rows.div_ceil(64 * self.warpgroups() as usize)
    }

    /// Blocks that a multiprocessor has room for.
    pub fn blocks_each(self) -> usize {
        match self {
            Self::T16 | Self::T64 => 2,
            Self::T128 | Self::T256 => 1,
        }
    }

    /// What of these takes the least time for one group, where bits may depend on the number of rows: the fewest operations, those of
    /// absent rows and of multiprocessors without a tile included. Of equals the largest, which reads weights least often.
    pub fn fastest(among: &[Self], rows: usize, weight_rows: usize, multiprocessors: usize) -> Self {
        let cycles = |tokens: Self| {
            let turns = tokens.tiles(rows, weight_rows).div_ceil(multiprocessors * tokens.blocks_each());
            turns * tokens.blocks_each() * tokens.cycles()
        };
        among.iter().rev().copied().min_by_key(|tokens| cycles(*tokens)).unwrap_or(Self::EXACT)
    }

    /// Cycles that a tile takes of a multiprocessor for 16 steps of the inner dimension: those of the products, or those in
    /// which shared memory gives their operands.
    fn cycles(self) -> usize {
        let of_one = (self.count() / 2).max((64 + self.count()) / 4);
        self.warpgroups() as usize * of_one
    }

    fn shape(self, blocks: u32) -> Shape {
        let shared = match self {
            Self::T16 => 86_148,
            Self::T64 => 102_500,
            Self::T128 => 200_804,
            Self::T256 => 200_772,
        };
        Shape::new([blocks, 1, 1], 128 * (1 + self.warpgroups())).with_bytes(shared)
    }
}

kernel! {
    /// `y = x · Wᵀ` where each group of rows has a matrix of its own, or `y = round( silu(gate · x) ⊙ (up · x) )`.
    GroupedProduct(|it| match (it.gated, it.tokens) {
        (false, Tokens::T16) => "sm90_grouped_linear_16",
        (false, Tokens::T64) => "sm90_grouped_linear_64",
        (false, Tokens::T128) => "sm90_grouped_linear_128",
        (false, Tokens::T256) => "sm90_grouped_linear_256",
        (true, Tokens::T16) => "sm90_grouped_gated_16",
        (true, Tokens::T64) => "sm90_grouped_gated_64",
        (true, Tokens::T128) => "sm90_grouped_gated_128",
        (true, Tokens::T256) => "sm90_grouped_gated_256",
    }) {
        /// Map of bf16 `[P, inner]`, tiles of 16 rows
        x: Address,
        /// Addresses `[X]` of maps of bf16 `[outputs, inner]`, tiles of 64 rows; where gated, of gate and up, see
        /// [`maps::pair`](super::maps::pair), one added where up comes first
        weights: Address,
        /// u32 `[X]`: group `g` has rows `begin[g]..end[g]`; 0: each has the first `rows` rows
        begin: Address,
        /// u32 `[X]`, or 0 likewise
        end: Address,
        /// f32 `[P, outputs]`; bf16 where gated
        y: Address,
        /// Rows of a group where there is no `begin`.
        rows: u32,
        /// Groups `X`, at most [`GROUPS`].
        groups: u32,
        /// Inputs, a multiple of 8.
        inner: u32,
        /// Outputs; where gated, a multiple of 8.
        outputs: u32,
    } over {
        /// Whether each group has a gate and an up.
        gated: bool,
        /// Tokens of a tile.
        tokens: Tokens,
        /// Blocks, which take tiles in turn.
        blocks: u32,
    }
    => |it| it.tokens.shape(it.blocks)
}

kernel! {
    /// `y[t, h] = round( W[h] · x[t, h] )` with a matrix a head.
    GroupedHeads("sm90_grouped_heads_128") {
        /// Map of bf16 `[T, n, inner]`, see [`maps::heads`](super::maps::heads)
        x: Address,
        /// Addresses `[n]` of maps of bf16 `[outputs, inner]`, tiles of 64 rows
        weights: Address,
        /// bf16 `[T, n, width]`, of which the first `outputs` are written
        y: Address,
        /// `T`
        rows: u32,
        /// `n`, at most [`GROUPS`]
        heads: u32,
        /// Inputs, a multiple of 8.
        inner: u32,
        /// Outputs.
        outputs: u32,
        /// Elements from one head of `y` to the next.
        width: u32,
    } over {
        /// Blocks, which take tiles in turn.
        blocks: u32,
    }
    => |it| Tokens::T128.shape(it.blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_tiles_have_few_absent_rows_and_fill_the_chip() {
        let fastest = |rows, weight_rows| Tokens::fastest(&Tokens::ALL, rows, weight_rows, 132);
        for rows in [1, 16] {
            assert_eq!(fastest(rows, 5120), Tokens::T16, "{rows} rows");
        }
        assert_eq!(fastest(64, 5120), Tokens::T64, "few rows of many weights");
        assert_eq!(fastest(512, 5120), Tokens::T64, "larger tiles would be too few for the chip");
        assert_eq!(fastest(4096, 102_400), Tokens::T256, "enough of any");
        assert_eq!(Tokens::fastest(&Tokens::FP8, 4096, 102_400, 132), Tokens::T128, "the largest that there is");
        assert_eq!(fastest(300, 102_400), Tokens::T64, "a third tile of 128 would be mostly absent");
        // Never slower than the tiles of exact mode.
        for (rows, weight_rows) in [(1, 64), (33, 3072), (100, 576), (129, 5120), (777, 12_288)] {
            let turns = |tokens: Tokens| {
                tokens.tiles(rows, weight_rows).div_ceil(132 * tokens.blocks_each()) * tokens.blocks_each()
            };
            let found = fastest(rows, weight_rows);
            assert!(turns(found) * found.cycles() <= turns(Tokens::EXACT) * Tokens::EXACT.cycles());
        }
    }
}
