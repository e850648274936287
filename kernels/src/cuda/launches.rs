//! Launches as a list, to be compared and submitted later.

use super::{Arg, Launch};

/// Launches in order. Arguments lie one behind the other, each at a multiple of eight bytes.
#[derive(Debug, Clone, Default)]
pub struct Launches {
    nodes: Vec<Node>,
    /// Bytes of each argument of all nodes.
    sizes: Vec<usize>,
    /// The arguments of all nodes.
    words: Vec<u64>,
}

/// A launch without its arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Node {
    kernel: &'static str,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    /// Where its own begin among all.
    first_size: usize,
    first_word: usize,
}

impl Node {
    fn of(launch: &Launch<'_>, first_size: usize, first_word: usize) -> Self {
        let &Launch { kernel, grid, block, shared, .. } = launch;
        Self { kernel, grid, block, shared, first_size, first_word }
    }
}

/// Words that so many bytes take.
fn words(bytes: usize) -> usize {
    bytes.div_ceil(size_of::<u64>())
}

/// Writes arguments from the beginning of `memory` on.
fn write(mut memory: &mut [u64], arguments: &[Arg<'_>]) {
    for argument in arguments {
        let bytes = argument.bytes();
        let (place, behind) = memory.split_at_mut(words(bytes.len()));
        bytemuck::cast_slice_mut(place)[..bytes.len()].copy_from_slice(bytes);
        memory = behind;
    }
}

impl Launches {
    /// Appends a launch.
    pub fn push(&mut self, launch: &Launch<'_>) {
        let (first_size, first_word) = (self.sizes.len(), self.words.len());
        self.nodes.push(Node::of(launch, first_size, first_word));
        self.sizes.extend(launch.arguments.iter().map(|argument| argument.bytes().len()));
        let words: usize = self.sizes[first_size..].iter().map(|bytes| words(*bytes)).sum();
        self.words.resize(first_word + words, 0);
        write(&mut self.words[first_word..], launch.arguments);
    }

    /// Puts another launch of the same kernel in the place of one.
    pub fn replace(&mut self, index: usize, launch: &Launch<'_>) {
        let Node { kernel, first_size, first_word, .. } = self.nodes[index];
        assert_eq!(kernel, launch.kernel, "launch {index}");
        self.nodes[index] = Node::of(launch, first_size, first_word);
        write(&mut self.words[first_word..], launch.arguments);
    }

    /// Launches in the list.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Takes all launches out.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.sizes.clear();
        self.words.clear();
    }

    /// Does something with the launch at an index.
    pub fn with<T>(&self, index: usize, work: impl FnOnce(&Launch<'_>) -> T) -> T {
        let Node { kernel, grid, block, shared, first_size, first_word } = self.nodes[index];
        let end = self.nodes.get(index + 1).map_or(self.sizes.len(), |next| next.first_size);
        let mut rest = &self.words[first_word..];
        let arguments: Vec<Arg<'_>> = self.sizes[first_size..end]
            .iter()
            .map(|bytes| {
                let (argument, behind) = rest.split_at(words(*bytes));
                rest = behind;
                Arg::Bytes(&bytemuck::cast_slice(argument)[..*bytes])
            })
            .collect();
        work(&Launch { kernel, grid, block, shared, arguments: &arguments })
    }

    /// Whether both are of the same kernels with arguments of the same sizes, in the same order.
    pub fn is_alike(&self, other: &Self) -> bool {
        let (ours, others) = (&self.nodes, &other.nodes);
        self.sizes == other.sizes && ours.iter().map(|node| node.kernel).eq(others.iter().map(|node| node.kernel))
    }

    /// Indices at which lists that are alike have different launches.
    pub fn changes<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = usize> + 'a {
        (0..self.len())
            .filter(|index| self.nodes[*index] != other.nodes[*index] || self.words(*index) != other.words(*index))
    }

    fn words(&self, index: usize) -> &[u64] {
        let end = self.nodes.get(index + 1).map_or(self.words.len(), |next| next.first_word);
        &self.words[self.nodes[index].first_word..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(launches: &[(&'static str, u32, &[Arg<'_>])]) -> Launches {
        let mut list = Launches::default();
        for (kernel, blocks, arguments) in launches {
            list.push(&Launch { kernel, grid: [*blocks, 1, 1], block: [32, 1, 1], shared: 0, arguments });
        }
        list
    }

    #[test]
    fn launches_come_out_as_they_went_in() {
        let map = [7u8; 13];
        let list = list(&[
            ("a", 2, &[Arg::U32(5), Arg::Bytes(&map), Arg::U64(1 << 40)]),
            ("b", 3, &[]),
            ("c", 4, &[Arg::F32(0.5)]),
        ]);
        let found = |index: usize| {
            list.with(index, |launch| {
                let arguments: Vec<Vec<u8>> =
                    launch.arguments.iter().map(|argument| argument.bytes().to_vec()).collect();
                (launch.kernel, launch.grid[0], arguments)
            })
        };
        let expected = vec![5u32.to_le_bytes().to_vec(), map.to_vec(), (1u64 << 40).to_le_bytes().to_vec()];
        assert_eq!(found(0), ("a", 2, expected));
        assert_eq!(found(1), ("b", 3, vec![]));
        assert_eq!(found(2), ("c", 4, vec![0.5f32.to_le_bytes().to_vec()]));
    }

    #[test]
    fn what_changed_is_found() {
        let before = list(&[("a", 2, &[Arg::U32(5)]), ("b", 3, &[Arg::U64(1)]), ("b", 3, &[Arg::U64(2)])]);
        let after = list(&[("a", 2, &[Arg::U32(5)]), ("b", 4, &[Arg::U64(1)]), ("b", 3, &[Arg::U64(3)])]);
        assert!(before.is_alike(&after));
        assert_eq!(before.changes(&after).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(before.changes(&before).count(), 0);
        assert!(!before.is_alike(&list(&[("a", 2, &[Arg::U32(5)]), ("b", 3, &[Arg::U64(1)])])), "fewer");
        assert!(!list(&[("a", 2, &[Arg::U32(5)])]).is_alike(&list(&[("a", 2, &[Arg::U64(5)])])), "another size");
    }
}
