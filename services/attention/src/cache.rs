//! Blocks of the latent cache: which are free, who holds which. The latents themselves live in the device.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use crate::prefix::PrefixKey;

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

/// Hands out blocks, counts their holders, and keeps full blocks that nobody holds for whoever needs the same prefix,
/// until their room is needed.
pub struct BlockPool {
    /// Blocks without content.
    empty: Vec<u32>,
    blocks: Vec<Block>, // [blocks]
    /// Published blocks, held or not.
    by_key: HashMap<PrefixKey, u32>,
    /// Published blocks that nobody holds, by when they were let go.
    idle: BTreeMap<u64, u32>,
    /// Counts the times that a published block was let go.
    clock: u64,
    evicted: u64,
    keeps_prefixes: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    holders: u32,
    key: Option<PrefixKey>,
    /// Its place among the idle ones.
    idle_since: u64,
}

/// How much of a prefix is in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Match {
    /// Blocks, from the first on.
    pub blocks: usize,
    /// How many of them nobody holds: they count as free until they are shared.
    pub idle: usize,
}

impl BlockPool {
    /// A pool of `blocks` free blocks, the lowest handed out first.
    pub fn new(blocks: u32) -> Self {
        Self {
            empty: (0..blocks).rev().collect(),
            blocks: vec![Block::default(); blocks as usize],
            by_key: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
            evicted: 0,
            keeps_prefixes: true,
        }
    }

    /// A pool that keeps nothing for others.
    pub fn without_prefixes(blocks: u32) -> Self {
        Self { keeps_prefixes: false, ..Self::new(blocks) }
    }

    /// Blocks nobody holds.
    pub fn free(&self) -> usize {
        self.empty.len() + self.idle.len()
    }

    /// Those of them that are kept for their prefix.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Kept blocks that were given up for others since the start.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// How many blocks of a prefix are there.
    pub fn matching(&self, keys: &[PrefixKey]) -> Match {
        let mut found = Match::default();
        for block in keys.iter().map_while(|key| self.by_key.get(key)) {
            found.blocks += 1;
            found.idle += usize::from(self.blocks[*block as usize].holders == 0);
        }
        found
    }

    /// Makes a held, full block known by its key, unless another one has it.
    pub fn publish(&mut self, block: u32, key: PrefixKey) {
        let own = &mut self.blocks[block as usize].key;
        if self.keeps_prefixes && own.is_none() && !self.by_key.contains_key(&key) {
            *own = Some(key);
            self.by_key.insert(key, block);
        }
    }

    fn take(&mut self, count: usize, blocks: &mut Vec<u32>) -> Result<(), OutOfBlocks> {
        if count > self.free() {
            return Err(OutOfBlocks { needed: count, free: self.free(), total: self.total() });
        }
        for _ in 0..count {
            let Some(block) = self.empty.pop().or_else(|| self.evict()) else { break };
            self.blocks[block as usize].holders = 1;
            blocks.push(block);
        }
        Ok(())
    }

    /// The idle block that was let go first, without its content.
    fn evict(&mut self) -> Option<u32> {
        let (_, block) = self.idle.pop_first()?;
        if let Some(key) = self.blocks[block as usize].key.take() {
            self.by_key.remove(&key);
        }
        self.evicted += 1;
        Some(block)
    }

    fn share(&mut self, block: u32) {
        let shared = &mut self.blocks[block as usize];
        if shared.holders == 0 {
            self.idle.remove(&shared.idle_since);
        }
        shared.holders += 1;
    }

    fn release(&mut self, block: u32) {
        let released = &mut self.blocks[block as usize];
        released.holders -= 1;
        if released.holders > 0 {
            return;
        }
        if released.key.is_none() {
            self.empty.push(block);
        } else {
            self.clock += 1;
            released.idle_since = self.clock;
            self.idle.insert(self.clock, block);
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

    /// Becomes a holder of the blocks of a prefix, as many as are in the cache; nobody writes to them. How many.
    ///
    /// # Panics
    /// When it holds blocks already.
    pub fn share(&mut self, pool: &mut BlockPool, keys: &[PrefixKey]) -> usize {
        assert!(self.blocks.is_empty(), "a prefix comes first");
        self.blocks.extend(keys.iter().map_while(|key| pool.by_key.get(key)));
        self.blocks.iter().for_each(|block| pool.share(*block));
        self.blocks.len()
    }

    /// Gives all blocks back; those that others share stay theirs. The last goes first, so that of a prefix that is kept
    /// the end is given up before the beginning.
    pub fn clear(&mut self, pool: &mut BlockPool) {
        self.blocks.drain(..).rev().for_each(|block| pool.release(block));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::prefix::PrefixChain;

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

    fn keys(tokens: &[u32], block: usize) -> Vec<PrefixKey> {
        let mut chain = PrefixChain::new(b"");
        chain.extend(tokens, block);
        chain.keys().to_vec()
    }

    fn publish(table: &BlockTable, pool: &mut BlockPool, keys: &[PrefixKey]) {
        table.blocks().iter().zip(keys).for_each(|(block, key)| pool.publish(*block, *key));
    }

    #[test]
    fn a_prefix_is_kept_until_its_room_is_needed() {
        let mut pool = BlockPool::new(4);
        let keys = keys(&[7; 30], 10);
        let mut first = BlockTable::default();
        first.grow(&mut pool, 30, 10).unwrap();
        publish(&first, &mut pool, &keys[..2]);
        assert_eq!(pool.matching(&keys), Match { blocks: 2, idle: 0 });
        first.clear(&mut pool);
        assert_eq!((pool.free(), pool.idle()), (4, 2));
        assert_eq!(pool.matching(&keys), Match { blocks: 2, idle: 2 });

        let mut second = BlockTable::default();
        assert_eq!(second.share(&mut pool, &keys), 2);
        assert_eq!(second.blocks(), [0, 1]);
        assert_eq!((pool.free(), pool.idle()), (2, 0));
        let mut third = BlockTable::default();
        assert_eq!(third.share(&mut pool, &keys), 2);
        second.clear(&mut pool);
        assert_eq!(pool.matching(&keys), Match { blocks: 2, idle: 0 }, "still held");
        third.clear(&mut pool);

        // Three blocks: the two that were never published, then the end of the prefix.
        let mut other = BlockTable::default();
        other.grow(&mut pool, 30, 10).unwrap();
        assert_eq!(pool.evicted(), 1);
        assert_eq!(pool.matching(&keys), Match { blocks: 1, idle: 1 });
    }

    #[test]
    fn a_pool_may_keep_nothing() {
        let mut pool = BlockPool::without_prefixes(2);
        let keys = keys(&[7; 20], 10);
        let mut table = BlockTable::default();
        table.grow(&mut pool, 20, 10).unwrap();
        publish(&table, &mut pool, &keys);
        assert_eq!(pool.matching(&keys), Match::default());
        table.clear(&mut pool);
        assert_eq!((pool.free(), pool.idle()), (2, 0));
    }

    #[test]
    fn one_block_stands_for_a_prefix() {
        let mut pool = BlockPool::new(4);
        let keys = keys(&[7; 10], 10);
        let mut tables = [BlockTable::default(), BlockTable::default()];
        for table in &mut tables {
            table.grow(&mut pool, 10, 10).unwrap();
            publish(table, &mut pool, &keys);
        }
        tables.iter_mut().for_each(|table| table.clear(&mut pool));
        assert_eq!((pool.free(), pool.idle()), (4, 1));
    }

    proptest! {
        #[test]
        fn no_block_has_two_owners_and_none_is_lost(ops in prop::collection::vec((0usize..4, 0usize..200, 0u32..3), 1..80)) {
            let mut pool = BlockPool::new(12);
            let mut tables: Vec<(BlockTable, Vec<PrefixKey>)> = (0..4).map(|_| Default::default()).collect();
            for (who, positions, prompt) in ops {
                let (table, own) = &mut tables[who];
                if positions > 120 {
                    table.clear(&mut pool);
                    *own = keys(&[prompt; 120], 16);
                    table.share(&mut pool, own);
                } else {
                    let before = table.blocks().len();
                    let grown = table.grow(&mut pool, positions, 16);
                    prop_assert!(grown.is_ok() || table.blocks().len() == before);
                    publish(table, &mut pool, own);
                }
                let held: HashSet<u32> = tables.iter().flat_map(|(table, _)| table.blocks()).copied().collect();
                prop_assert_eq!(held.len() + pool.free(), pool.total());
                let holders: u32 = pool.blocks.iter().map(|block| block.holders).sum();
                prop_assert_eq!(holders as usize, tables.iter().map(|(table, _)| table.blocks().len()).sum::<usize>());
                prop_assert!(pool.idle.values().chain(&pool.empty).all(|block| !held.contains(block)));
                prop_assert!(pool.by_key.iter().all(|(key, block)| pool.blocks[*block as usize].key == Some(*key)));
            }
        }
    }
}
