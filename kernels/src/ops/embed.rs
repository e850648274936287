//! Embedding: a row of the table for each token.

use crate::panels::{Element, Rows};

/// `out [H] = table[token]`
pub(crate) fn embed<T: Element>(table: &Rows<T>, token: u32, out: &mut [f32]) {
    out.iter_mut().zip(table.row(token as usize)).for_each(|(out, value)| *out = value.widen());
}
