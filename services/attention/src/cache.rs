//! Blocks of the latent cache: which are free, who holds which. The latents themselves live in the device.

use std::fmt;

/// Not enough free blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("latent cache: {needed} blocks needed, {free} free of {total}")]
pub struct OutOfBlocks {
    /// Asked for.
    pub needed: usize,
    /// Free at that moment.
    pub free: usize,
    /// In all.
    pub total: usize,
}

/// Hands out blocks and counts their holders.
pub struct BlockPool {
    free: Vec<u32>,
    holders: Vec<u32>, // [blocks]
}

impl BlockPool {
    /// A pool of `blocks` free blocks, the lowest handed out first.
    pub fn new(blocks: u32) -> Self {
        Self { free: (0..blocks).rev().collect(), holders: vec![0; blocks as usize] }
    }

    /// Blocks nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.holders.len()
    }

    fn take(&mut self, count: usize, blocks: &mut Vec<u32>) -> Result<(), OutOfBlocks> {
        let Some(rest) = self.free.len().checked_sub(count) else {
            return Err(OutOfBlocks { needed: count, free: self.free(), total: self.total() });
        };
        for block in self.free.drain(rest..).rev() {
            self.holders[block as usize] = 1;
            blocks.push(block);
        }
        Ok(())
    }

    fn share(&mut self, block: u32) {
        self.holders[block as usize] += 1;
    }

    fn release(&mut self, block: u32) {
        let holders = &mut self.holders[block as usize];
        *holders -= 1;
        if *holders == 0 {
            self.free.push(block);
        }
    }
}

impl fmt::Debug for BlockPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockPool").field("free", &self.free()).field("total", &self.total()).finish()
    }
}

/// The blocks of one sequence in order of position. Give them back with [`BlockTable::clear`].
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<u32>,
}

impl BlockTable {
    /// The blocks, in order of position.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Takes blocks until `positions` fit in blocks of `block` positions.
    ///
    /// # Errors
    /// When the pool has too few; nothing is taken then.
    pub fn grow(&mut self, pool: &mut BlockPool, positions: usize, block: usize) -> Result<(), OutOfBlocks> {
        let missing = positions.div_ceil(block).saturating_sub(self.blocks.len());
        pool.take(missing, &mut self.blocks)
    }

    /// Another holder of the first `blocks` blocks, which must be full: whoever shares a block does not write to it.
    ///
    /// # Panics
    /// When this table holds fewer blocks.
    pub fn share_prefix(&self, pool: &mut BlockPool, blocks: usize) -> Self {
        let shared = self.blocks[..blocks].to_vec();
        shared.iter().for_each(|block| pool.share(*block));
        Self { blocks: shared }
    }

    /// Gives all blocks back; those that others share stay theirs.
    pub fn clear(&mut self, pool: &mut BlockPool) {
        self.blocks.drain(..).rev().for_each(|block| pool.release(block));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn grows_by_whole_blocks_and_refuses_without_taking() {
        let mut pool = BlockPool::new(3);
        let mut table = BlockTable::default();
        table.grow(&mut pool, 65, 64).unwrap();
        assert_eq!(table.blocks(), [0, 1]);
        table.grow(&mut pool, 128, 64).unwrap();
        assert_eq!(pool.free(), 1);
        let refused = table.grow(&mut pool, 257, 64);
        assert_eq!(refused, Err(OutOfBlocks { needed: 3, free: 1, total: 3 }));
        assert_eq!((table.blocks().len(), pool.free()), (2, 1));
        table.clear(&mut pool);
        assert_eq!(pool.free(), 3);
    }

    #[test]
    fn shared_blocks_are_free_when_the_last_holder_lets_go() {
        let mut pool = BlockPool::new(4);
        let mut first = BlockTable::default();
        first.grow(&mut pool, 30, 10).unwrap();
        let mut second = first.share_prefix(&mut pool, 2);
        first.clear(&mut pool);
        assert_eq!(pool.free(), 2);
        second.grow(&mut pool, 40, 10).unwrap();
        assert_eq!(second.blocks()[..2], [0, 1]);
        second.clear(&mut pool);
        assert_eq!(pool.free(), 4);
    }

    proptest! {
        #[test]
        fn no_block_has_two_owners_and_none_is_lost(ops in prop::collection::vec((0usize..4, 0usize..200), 1..60)) {
            let mut pool = BlockPool::new(12);
            let mut tables: Vec<BlockTable> = (0..4).map(|_| BlockTable::default()).collect();
            for (who, positions) in ops {
                if positions > 150 {
                    tables[who].clear(&mut pool);
                } else {
                    let before = tables[who].blocks().len();
                    let grown = tables[who].grow(&mut pool, positions, 16);
                    prop_assert!(grown.is_ok() || tables[who].blocks().len() == before);
                }
                let held: Vec<u32> = tables.iter().flat_map(|table| table.blocks()).copied().collect();
                prop_assert_eq!(held.iter().collect::<HashSet<_>>().len(), held.len());
                prop_assert_eq!(held.len() + pool.free(), pool.total());
            }
        }
    }
}
