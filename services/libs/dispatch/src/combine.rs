//! Adds the partial sums of the shards over the cell tree. Pure; the same bits whatever the order and the placement.

use conclave_kernels::cell_tree::{self, Node};
use conclave_kernels::{Dtype, activation};

/// One subtree's sum for some rows of the layer, as a shard sent it.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Groups `[first, last)`.
    pub node: Node,
    /// Rows of the layer, ascending.
    pub rows: Vec<u32>,
    /// `[rows, H]` in the activation type.
    pub sum: bytes::Bytes,
}

/// The routed output `[rows, H]` in the activation type. For each row the parts are disjoint subtrees.
pub fn combine(act: Dtype, groups: usize, hidden: usize, rows: usize, mut parts: Vec<Part>) -> Vec<u8> {
    parts.sort_by_key(|part| part.node.first);
    let decoded: Vec<Vec<f32>> = parts
        .iter()
        .map(|part| {
            let mut values = vec![0.0; part.rows.len() * hidden];
            activation::decode_into(act, &part.sum, &mut values);
            values
        })
        .collect();
    let mut cursors = vec![0usize; parts.len()];
    let mut out = vec![0f32; rows * hidden];
    let mut row_parts: Vec<(Node, &[f32])> = Vec::with_capacity(parts.len());
    let root = Node { first: 0, last: groups };
    for (row, out) in out.chunks_exact_mut(hidden).enumerate() {
        row_parts.clear();
        for ((part, values), cursor) in parts.iter().zip(&decoded).zip(&mut cursors) {
            if part.rows.get(*cursor) == Some(&(row as u32)) {
                row_parts.push((part.node, &values[*cursor * hidden..(*cursor + 1) * hidden]));
                *cursor += 1;
            }
        }
        cell_tree::sum_into(act, groups, root, &row_parts, out);
    }
    activation::encode(act, &out)
}
