//! The fixed binary tree over which partial sums of expert groups are added.
//!
//! Its leaves are the groups `0..G` in order. A node `[first, last)` of more than one group splits after the largest
//! power of two below its length. The sum of a node is `round(left + right)`, and an absent child is the identity; so
//! the bits of a sum depend on which groups take part, never on who added them up.

use std::ops::Range;

use crate::{Dtype, activation};

/// A node of the tree: the groups `[first, last)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// First group.
    pub first: usize,
    /// One past the last group.
    pub last: usize,
}

impl Node {
    /// The root of the tree over `groups` groups.
    pub fn root(groups: usize) -> Self {
        Self { first: 0, last: groups }
    }

    /// Whether this is a node of the tree over `groups` groups.
    pub fn is_of(self, groups: usize) -> bool {
        if self.first >= self.last || self.last > groups {
            return false;
        }
        let mut node = Self::root(groups);
        while node != self {
            let (left, right) = match node.children() {
                Some(children) => children,
                None => return false,
            };
            node = if self.first < left.last { left } else { right };
        }
        true
    }

    fn len(self) -> usize {
        self.last - self.first
    }

    fn children(self) -> Option<(Self, Self)> {
        if self.len() < 2 {
            return None;
        }
        let middle = self.first + self.len().next_power_of_two() / 2;
        Some((Self { first: self.first, last: middle }, Self { first: middle, last: self.last }))
    }
}

/// The fewest nodes of the tree over `groups` groups that together cover exactly the groups in `held`, ascending.
/// `held` may be in any order; what is not below `groups` is left out.
pub fn maximal_nodes(groups: usize, held: &[usize]) -> Vec<Node> {
    let mut present = vec![false; groups];
    for &group in held {
        if let Some(present) = present.get_mut(group) {
            *present = true;
        }
    }
    let mut nodes = Vec::new();
    if groups > 0 {
        collect(Node::root(groups), &present, &mut nodes);
    }
    nodes
}

fn collect(node: Node, present: &[bool], nodes: &mut Vec<Node>) {
    if present[node.first..node.last].iter().all(|held| *held) {
        nodes.push(node);
    } else if let Some((left, right)) = node.children() {
        collect(left, present, nodes);
        collect(right, present, nodes);
    }
}

/// Sum of what lies under `node` of the tree over `groups` groups, rounded to `act` at each node.
///
/// `parts` are sums of disjoint tree nodes inside `node`, ascending, each as long as `out` and already rounded; groups
/// without a part are absent. False, with `out` as it was, where there is no part.
///
/// # Panics
/// When a part is no tree node inside `node`, or has another length than `out`.
pub fn sum_into(act: Dtype, groups: usize, node: Node, parts: &[(Node, &[f32])], out: &mut [f32]) -> bool {
    for (part, values) in parts {
        assert!(part.is_of(groups), "{part:?} in the tree over {groups} groups");
        assert_eq!(values.len(), out.len(), "elements of the sum of {part:?}");
    }
    if parts.is_empty() {
        return false;
    }
    let mut start = 0;
    for out in out.chunks_mut(STRIP) {
        let strip = start..start + out.len();
        add(act, node, parts, strip.clone(), out);
        start = strip.end;
    }
    true
}

/// Elements added up at a time, on the stack.
const STRIP: usize = 64;

fn add(act: Dtype, node: Node, parts: &[(Node, &[f32])], strip: Range<usize>, out: &mut [f32]) {
    if let [(part, values)] = parts {
        assert!(node.first <= part.first && part.last <= node.last, "{part:?} inside {node:?}");
        out.copy_from_slice(&values[strip]);
        return;
    }
    let (left, right) = node.children().expect("two disjoint parts do not fit into one group");
    let middle = parts.partition_point(|(part, _)| part.last <= left.last);
    match parts.split_at(middle) {
        (parts, []) => add(act, left, parts, strip, out),
        ([], parts) => add(act, right, parts, strip, out),
        (below, above) => {
            let mut other = [0.0; STRIP];
            let other = &mut other[..out.len()];
            add(act, left, below, strip.clone(), out);
            add(act, right, above, strip, other);
            out.iter_mut().zip(other).for_each(|(out, other)| *out += *other);
            activation::round(act, out);
        }
    }
}

/// Additions of slots on a device, level by level, each as `[into, from]`: `slot[into] = round(slot[into] + slot[from])`. Those of
/// a level name no slot twice; a level needs all levels before it.
pub type Levels = Vec<[Vec<u32>; 2]>;

/// Appends the additions by which [`sum_into`] adds up what lies under `node`, for sums of single groups that lie in slots:
/// `parts` are (group, slot), ascending, inside `node`. The slot that holds the sum in the end; `None` where there is no part.
///
/// # Panics
/// When a group is not inside `node`, or there twice.
pub fn slot_sum(node: Node, parts: &[(usize, u32)], levels: &mut Levels) -> Option<u32> {
    slot_and_level(node, parts, levels).map(|(slot, _)| slot)
}

/// The same, with the number of levels that the sum needs.
fn slot_and_level(node: Node, parts: &[(usize, u32)], levels: &mut Levels) -> Option<(u32, usize)> {
    if let [] | [_] = parts {
        return parts.first().map(|(group, slot)| {
            assert!((node.first..node.last).contains(group), "group {group} inside {node:?}");
            (*slot, 0)
        });
    }
    let (left, right) = node.children().expect("two groups do not fit into one");
    let (below, above) = parts.split_at(parts.partition_point(|(group, _)| *group < left.last));
    match (slot_and_level(left, below, levels), slot_and_level(right, above, levels)) {
        (Some((into, left)), Some((from, right))) => {
            let level = left.max(right);
            if levels.len() == level {
                levels.push(Default::default());
            }
            levels[level][0].push(into);
            levels[level][1].push(from);
            Some((into, level + 1))
        }
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, by recursion over leaves.
    fn definition(act: Dtype, node: Node, leaf: &dyn Fn(usize) -> Option<Vec<f32>>) -> Option<Vec<f32>> {
        let Some((left, right)) = node.children() else { return leaf(node.first) };
        match (definition(act, left, leaf), definition(act, right, leaf)) {
            (Some(left), Some(right)) => {
                let mut sum: Vec<f32> = left.iter().zip(right).map(|(left, right)| left + right).collect();
                activation::round(act, &mut sum);
                Some(sum)
            }
            (left, right) => left.or(right),
        }
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn splits_after_the_largest_power_of_two() {
        let node = |first, last| Node { first, last };
        assert_eq!(node(0, 8).children(), Some((node(0, 4), node(4, 8))));
        assert_eq!(node(0, 6).children(), Some((node(0, 4), node(4, 6))));
        assert_eq!(node(0, 5).children(), Some((node(0, 4), node(4, 5))));
        assert_eq!(node(3, 5).children(), Some((node(3, 4), node(4, 5))));
        assert_eq!(node(3, 4).children(), None);
    }

    #[test]
    fn knows_its_nodes() {
        assert!(Node { first: 4, last: 6 }.is_of(6));
        assert!(Node { first: 0, last: 6 }.is_of(6));
        assert!(!Node { first: 1, last: 3 }.is_of(6));
        assert!(!Node { first: 2, last: 6 }.is_of(8));
        assert!(!Node { first: 0, last: 8 }.is_of(6));
        assert!(!Node { first: 3, last: 3 }.is_of(6));
    }

    #[test]
    fn covers_with_the_fewest_nodes() {
        let nodes = |groups, held: &[usize]| -> Vec<(usize, usize)> {
            maximal_nodes(groups, held).iter().map(|node| (node.first, node.last)).collect()
        };
        assert_eq!(nodes(8, &[0, 1, 2, 3, 4, 5, 6, 7]), [(0, 8)]);
        assert_eq!(nodes(8, &[3, 1, 2]), [(1, 2), (2, 4)]);
        assert_eq!(nodes(6, &[4, 5, 9]), [(4, 6)]);
        assert_eq!(nodes(1, &[0]), [(0, 1)]);
        assert!(nodes(5, &[]).is_empty() && nodes(0, &[]).is_empty());
    }

    proptest! {
        #[test]
        fn any_placement_gives_the_same_bits(
            groups in prop::sample::select(vec![1usize, 2, 5, 6, 8, 13]),
            present in prop::collection::vec(any::<bool>(), 13),
            owner in prop::collection::vec(0usize..4, 13),
            values in prop::collection::vec(-100f32..100.0, 13 * 70),
            act in prop::sample::select(vec![Dtype::F32, Dtype::Bf16]),
        ) {
            let leaf = |group: usize| present[group].then(|| {
                let mut row = values[group * 70..][..70].to_vec();
                activation::round(act, &mut row);
                row
            });
            let expected = definition(act, Node::root(groups), &leaf);

            let mut sums: Vec<(Node, Vec<f32>)> = Vec::new();
            for shard in 0..4 {
                let held: Vec<usize> = (0..groups).filter(|group| owner[*group] == shard).collect();
                for node in maximal_nodes(groups, &held) {
                    prop_assert!(node.is_of(groups));
                    let rows: Vec<(Node, Vec<f32>)> = (node.first..node.last)
                        .filter_map(|group| Some((Node { first: group, last: group + 1 }, leaf(group)?)))
                        .collect();
                    let parts: Vec<(Node, &[f32])> = rows.iter().map(|(node, row)| (*node, &row[..])).collect();
                    let mut sum = vec![0.0; 70];
                    if sum_into(act, groups, node, &parts, &mut sum) {
                        sums.push((node, sum));
                    }
                }
            }
            sums.sort_by_key(|(node, _)| *node);
            let parts: Vec<(Node, &[f32])> = sums.iter().map(|(node, row)| (*node, &row[..])).collect();
            let mut found = vec![0.0; 70];
            let any = sum_into(act, groups, Node::root(groups), &parts, &mut found);
            prop_assert_eq!(any.then(|| bits(&found)), expected.map(|row| bits(&row)));
        }

        #[test]
        fn sums_of_slots_have_the_bits_of_sums(
            groups in prop::sample::select(vec![1usize, 2, 5, 6, 8, 13]),
            present in prop::collection::vec(any::<bool>(), 3 * 13),
            values in prop::collection::vec(-100f32..100.0, 3 * 13),
            act in prop::sample::select(vec![Dtype::F32, Dtype::Bf16]),
        ) {
            let mut slots = values;
            activation::round(act, &mut slots);
            let (mut levels, mut roots, mut expected) = (Levels::new(), Vec::new(), Vec::new());
            for row in 0..3 {
                let held = (0..groups).filter(|group| present[row * 13 + group]);
                let parts: Vec<(usize, u32)> = held.map(|group| (group, (row * 13 + group) as u32)).collect();
                roots.push(slot_sum(Node::root(groups), &parts, &mut levels));
                let leaf = |group: usize| present[row * 13 + group].then(|| vec![slots[row * 13 + group]]);
                expected.push(definition(act, Node::root(groups), &leaf).map(|sum| sum[0].to_bits()));
            }
            for [into, from] in &levels {
                let named: std::collections::BTreeSet<&u32> = into.iter().chain(from).collect();
                prop_assert_eq!(named.len(), into.len() + from.len(), "a slot is named twice");
                for (into, from) in into.iter().zip(from) {
                    let mut sum = [slots[*into as usize] + slots[*from as usize]];
                    activation::round(act, &mut sum);
                    slots[*into as usize] = sum[0];
                }
            }
            let found: Vec<Option<u32>> = roots.iter().map(|root| root.map(|slot| slots[slot as usize].to_bits())).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
