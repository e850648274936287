//! Is what a shard answered what it was asked for? Pure.

use conclave_kernels::Dtype;
use conclave_proto::v1::ExpertResult;

use crate::input;
use crate::work::{ExpectedSum, Work};

/// Checks the shape of an answer without an error. The values are not looked at.
///
/// # Errors
/// A sentence that names the field, what was found and what was expected.
pub(crate) fn check(
    work: &Work,
    expected: &[ExpectedSum],
    hidden: usize,
    act: Dtype,
    result: &ExpertResult,
) -> Result<(), String> {
    if input::dtype(result.activation) != Some(act) {
        return Err(format!("answer: activation: found {}, expected {act}", result.activation));
    }
    if result.hidden as usize != hidden {
        return Err(format!("answer: hidden: found {}, expected {hidden}", result.hidden));
    }
    if result.sums.len() != expected.len() {
        return Err(format!("answer: sums: found {}, expected {}", result.sums.len(), expected.len()));
    }
    for (sum, want) in result.sums.iter().zip(expected) {
        let (first, last) = (want.node.first, want.node.last);
        if (sum.first as usize, sum.last as usize) != (first, last) {
            return Err(format!("answer: subtree: found [{}, {}), expected [{first}, {last})", sum.first, sum.last));
        }
        if sum.row_index != want.rows {
            let (found, rows) = (sum.row_index.len(), want.rows.len());
            return Err(format!(
                "answer: rows of [{first}, {last}): found {found}, expected {rows} of {}",
                work.rows.len()
            ));
        }
        let bytes = want.rows.len() * hidden * act.size();
        if sum.sum.len() != bytes {
            return Err(format!("answer: sum of [{first}, {last}): found {} bytes, expected {bytes}", sum.sum.len()));
        }
    }
    Ok(())
}
