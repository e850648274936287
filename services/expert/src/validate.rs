//! Is a batch what it has to be? Pure; nothing that comes in here makes it panic.

use conclave_dispatch::ModelShape;
use conclave_kernels::Dtype;
use conclave_proto::v1::{Activation, ExpertBatch, WorkError, WorkErrorKind};

/// What a batch has to fit.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// Of the model.
    pub shape: &'a ModelShape,
    /// Activation type of the device.
    pub activation: Dtype,
    /// Rows of a batch at most.
    pub max_rows: usize,
    /// Rows of the caller's board; `None`: there is no pair with it.
    pub board_rows: Option<usize>,
}

/// An error of one kind.
pub fn work_error(kind: WorkErrorKind, message: impl Into<String>) -> WorkError {
    WorkError { kind: kind.into(), message: message.into() }
}

/// Checks every field of a batch.
///
/// # Errors
/// `INVALID`, naming the field, what was found and what was expected.
pub fn check(expected: &Expected<'_>, batch: &ExpertBatch) -> Result<(), WorkError> {
    check_rows(expected, batch)
        .and_then(|()| check_groups(expected.shape, batch))
        .and_then(|()| check_experts(expected.shape, batch))
        .and_then(|()| check_pairs(expected.shape, batch))
        .map_err(|message| work_error(WorkErrorKind::Invalid, message))
}

fn check_rows(expected: &Expected<'_>, batch: &ExpertBatch) -> Result<(), String> {
    let shape = expected.shape;
    let Some(id) = batch.id else { return Err("id: missing".to_owned()) };
    if !shape.is_moe(id.layer) {
        return Err(format!("id.layer: found {}, expected one with routed experts", id.layer));
    }
    let found = Activation::try_from(batch.activation).ok().and_then(|activation| Dtype::try_from(activation).ok());
    if found != Some(expected.activation) {
        let wanted = Activation::from(expected.activation).as_str_name();
        return Err(format!("activation: found {}, expected {} ({wanted})", batch.activation, expected.activation));
    }
    let rows = batch.rows as usize;
    if rows == 0 || rows > expected.max_rows {
        return Err(format!("rows: found {rows}, expected 1 to {}", expected.max_rows));
    }
    if batch.hidden as usize != shape.hidden {
        return Err(format!("hidden: found {}, expected {}", batch.hidden, shape.hidden));
    }
    if !batch.board_rows.is_empty() {
        return check_board_rows(expected.board_rows, batch);
    }
    let bytes = rows * shape.hidden * expected.activation.size();
    if batch.x.len() != bytes {
        return Err(format!("x: found {} bytes, expected {bytes}", batch.x.len()));
    }
    Ok(())
}

fn check_board_rows(on_board: Option<usize>, batch: &ExpertBatch) -> Result<(), String> {
    let (found, rows) = (batch.board_rows.len(), batch.rows);
    let Some(on_board) = on_board else {
        return Err(format!("board_rows: found {found}, expected none, since there is no pair with this caller"));
    };
    if found != rows as usize {
        return Err(format!("board_rows: found {found} values, expected {rows}"));
    }
    if !batch.x.is_empty() {
        return Err(format!("x: found {} bytes beside board_rows, expected none", batch.x.len()));
    }
    below("board_rows", &batch.board_rows, on_board)
}

fn check_groups(shape: &ModelShape, batch: &ExpertBatch) -> Result<(), String> {
    ascending("groups", &batch.groups)?;
    below("groups", &batch.groups, shape.groups)?;
    if batch.groups.is_empty() {
        return Err("groups: found none, expected at least one".to_owned());
    }
    Ok(())
}

fn check_experts(shape: &ModelShape, batch: &ExpertBatch) -> Result<(), String> {
    ascending("experts", &batch.experts)?;
    below("experts", &batch.experts, shape.gate.experts)?;
    if batch.experts.is_empty() {
        return Err("experts: found none, expected at least one".to_owned());
    }
    let outside = batch.experts.iter().find(|e| batch.groups.binary_search(&shape.group_of(**e)).is_err());
    match outside {
        Some(expert) => {
            let group = shape.group_of(*expert);
            Err(format!("experts: found {expert} of group {group}, expected experts of the groups {:?}", batch.groups))
        }
        None => Ok(()),
    }
}

fn check_pairs(shape: &ModelShape, batch: &ExpertBatch) -> Result<(), String> {
    if batch.counts.len() != batch.experts.len() {
        return Err(format!("counts: found {} values, expected {}", batch.counts.len(), batch.experts.len()));
    }
    let pairs: u64 = batch.counts.iter().map(|count| u64::from(*count)).sum();
    if batch.row_index.len() as u64 != pairs {
        return Err(format!("row_index: found {} values, expected {pairs}, the sum of counts", batch.row_index.len()));
    }
    if batch.weights.len() as u64 != pairs {
        return Err(format!("weights: found {} values, expected {pairs}, the sum of counts", batch.weights.len()));
    }
    let most = u64::from(batch.rows) * shape.gate.top_k as u64;
    if pairs > most {
        return Err(format!("counts: found {pairs} in all, expected at most {most}"));
    }
    if let Some(at) = batch.weights.iter().position(|weight| !weight.is_finite()) {
        return Err(format!("weights: found {} at {at}, expected a finite number", batch.weights[at]));
    }
    below("row_index", &batch.row_index, batch.rows as usize)?;
    let mut rest = &batch.row_index[..];
    for (&expert, &count) in batch.experts.iter().zip(&batch.counts) {
        if count == 0 {
            return Err(format!("counts: found 0 for expert {expert}, expected at least 1"));
        }
        let (rows, after) = rest.split_at(count as usize);
        ascending("row_index", rows)?;
        rest = after;
    }
    Ok(())
}

fn ascending(field: &str, values: &[u32]) -> Result<(), String> {
    match values.windows(2).find(|pair| pair[0] >= pair[1]) {
        Some(pair) => Err(format!("{field}: found {} after {}, expected ascending values", pair[1], pair[0])),
        None => Ok(()),
    }
}

fn below(field: &str, values: &[u32], limit: usize) -> Result<(), String> {
    match values.iter().find(|value| **value as usize >= limit) {
        Some(value) => Err(format!("{field}: found {value}, expected values below {limit}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{batch, shape};

    fn message(spoil: impl FnOnce(&mut ExpertBatch)) -> String {
        let mut batch = batch(1, 4, &[0, 2]);
        spoil(&mut batch);
        let expected = Expected { shape: &shape(), activation: Dtype::F32, max_rows: 16, board_rows: None };
        let error = check(&expected, &batch).unwrap_err();
        assert_eq!(error.kind(), WorkErrorKind::Invalid);
        error.message
    }

    #[test]
    fn a_right_batch_passes() {
        let expected = Expected { shape: &shape(), activation: Dtype::F32, max_rows: 16, board_rows: None };
        assert_eq!(check(&expected, &batch(1, 4, &[0, 2])), Ok(()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(message(|b| b.id = None), "id: missing");
        assert_eq!(
            message(|b| b.id.as_mut().unwrap().layer = 0),
            "id.layer: found 0, expected one with routed experts"
        );
        assert_eq!(message(|b| b.activation = 2), "activation: found 2, expected f32 (ACTIVATION_F32)");
        assert_eq!(message(|b| b.rows = 0), "rows: found 0, expected 1 to 16");
        assert_eq!(message(|b| b.rows = 17), "rows: found 17, expected 1 to 16");
        assert_eq!(message(|b| b.hidden = 9), "hidden: found 9, expected 8");
        assert_eq!(message(|b| b.x = b.x.slice(1..)), "x: found 127 bytes, expected 128");
        assert_eq!(message(|b| b.groups.clear()), "groups: found none, expected at least one");
        assert_eq!(message(|b| b.groups = vec![2, 0]), "groups: found 0 after 2, expected ascending values");
        assert_eq!(message(|b| b.groups = vec![0, 4]), "groups: found 4, expected values below 4");
        assert_eq!(message(|b| b.groups = vec![0]), "experts: found 4 of group 2, expected experts of the groups [0]");
        assert_eq!(message(|b| b.experts[0] = 9), "experts: found 1 after 9, expected ascending values");
        assert!(message(|b| b.counts.push(1)).starts_with("counts: found "));
        assert!(message(|b| b.counts[0] = u32::MAX).starts_with("row_index: found "));
        assert!(message(|b| b.weights.truncate(1)).starts_with("weights: found 1 values, expected "));
        assert_eq!(message(|b| b.weights[1] = f32::NAN), "weights: found NaN at 1, expected a finite number");
        assert_eq!(message(|b| b.row_index[0] = 4), "row_index: found 4, expected values below 4");
    }

    #[test]
    fn rows_of_a_board_are_checked_where_there_is_a_pair() {
        let message = |board_rows: Option<usize>, spoil: fn(&mut ExpertBatch)| {
            let mut batch =
                ExpertBatch { x: bytes::Bytes::new(), board_rows: vec![9, 2, 3, 4], ..batch(1, 4, &[0, 2]) };
            spoil(&mut batch);
            let expected = Expected { shape: &shape(), activation: Dtype::F32, max_rows: 16, board_rows };
            check(&expected, &batch).err().map(|error| error.message)
        };
        assert_eq!(message(Some(10), |_| {}), None);
        let without = "board_rows: found 4, expected none, since there is no pair with this caller";
        assert_eq!(message(None, |_| {}).as_deref(), Some(without));
        assert_eq!(message(Some(9), |_| {}).as_deref(), Some("board_rows: found 9, expected values below 9"));
        let few = |b: &mut ExpertBatch| b.board_rows.truncate(3);
        assert_eq!(message(Some(10), few).as_deref(), Some("board_rows: found 3 values, expected 4"));
        let both = |b: &mut ExpertBatch| b.x = vec![0; 4].into();
        assert_eq!(message(Some(10), both).as_deref(), Some("x: found 4 bytes beside board_rows, expected none"));
    }
}
