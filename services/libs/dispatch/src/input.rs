//! A layer's rows as they come in, checked once.

use bytes::Bytes;
use conclave_kernels::Dtype;
use conclave_proto::v1::{Activation, MoeInput};

use crate::error::MoeError;
use crate::shape::ModelShape;

/// A checked [`MoeInput`].
#[derive(Debug, Clone)]
pub(crate) struct LayerInput {
    /// Incarnation of the caller.
    pub(crate) caller: u64,
    /// Its step.
    pub(crate) step: u64,
    /// Absolute layer.
    pub(crate) layer: u32,
    /// Repetition of this layer.
    pub(crate) attempt: u32,
    /// Element type of `x`.
    pub(crate) activation: Dtype,
    /// Rows.
    pub(crate) rows: usize,
    /// `[rows, H]`
    pub(crate) x: Bytes,
    /// `[rows, E]`
    pub(crate) logits: Vec<f32>,
}

/// The element type that a message names.
pub(crate) fn dtype(activation: i32) -> Option<Dtype> {
    Activation::try_from(activation).ok().and_then(|activation| Dtype::try_from(activation).ok())
}

/// Checks every field. Gate logits are checked by [`crate::gate::select`].
///
/// # Errors
/// [`MoeError::Invalid`] naming the field, what was found and what was expected.
pub(crate) fn check(shape: &ModelShape, max_rows: usize, input: MoeInput) -> Result<LayerInput, MoeError> {
    let invalid = |message: String| Err(MoeError::Invalid(message));
    if !shape.is_moe(input.layer) {
        return invalid(format!("layer: found {}, expected one with routed experts", input.layer));
    }
    let Some(activation) = dtype(input.activation) else {
        return invalid(format!("activation: found {}, expected 1 (f32) or 2 (bf16)", input.activation));
    };
    let rows = input.rows as usize;
    if rows == 0 || rows > max_rows {
        return invalid(format!("rows: found {rows}, expected 1 to {max_rows}"));
    }
    if input.hidden as usize != shape.hidden {
        return invalid(format!("hidden: found {}, expected {}", input.hidden, shape.hidden));
    }
    if input.experts as usize != shape.gate.experts {
        return invalid(format!("experts: found {}, expected {}", input.experts, shape.gate.experts));
    }
    let expected = rows * shape.hidden * activation.size();
    if input.x.len() != expected {
        return invalid(format!("x: found {} bytes, expected {expected}", input.x.len()));
    }
    let expected = rows * shape.gate.experts * 4;
    if input.logits.len() != expected {
        return invalid(format!("logits: found {} bytes, expected {expected}", input.logits.len()));
    }
    Ok(LayerInput {
        caller: input.caller,
        step: input.step,
        layer: input.layer,
        attempt: input.attempt,
        activation,
        rows,
        x: input.x,
        logits: input.logits.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    })
}
