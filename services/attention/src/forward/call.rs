//! A layer's call of the routed experts.

use std::time::Duration;

use bytes::Bytes;
use conclave_kernels::{Dtype, activation};
use conclave_proto::v1::{Activation, DispatchErrorKind, MoeInput, MoeOutput};
use conclave_serve::{Error, ErrorKind};

use crate::trunk::{MoeRows, TrunkShape};

/// A layer's call: what names it, and what its answer is checked against.
pub(super) struct Call {
    pub(super) layer: u32,
    pub(super) step: u64,
    /// Of the rows, and of what comes back.
    pub(super) bytes: usize,
}

impl Call {
    /// The message; `caller` names this incarnation of the process, `budget` is the time there is.
    pub(super) fn input(
        &self,
        rows: MoeRows,
        shape: &TrunkShape,
        (caller, budget, traceparent): (u64, Option<Duration>, &str),
    ) -> MoeInput {
        let row_bytes = shape.hidden * shape.activation.size();
        MoeInput {
            caller,
            step: self.step,
            layer: self.layer,
            attempt: 0,
            activation: wire(shape.activation).into(),
            rows: (rows.x.len() / row_bytes) as u32,
            hidden: shape.hidden as u32,
            experts: shape.experts as u32,
            x: rows.x.into(),
            logits: activation::encode(Dtype::F32, &rows.logits).into(),
            budget_us: budget.map_or(0, |budget| u64::try_from(budget.as_micros()).unwrap_or(u64::MAX).max(1)),
            traceparent: traceparent.to_owned(),
        }
    }

    /// The routed experts' output `[T, H]`.
    pub(super) fn check(&self, output: MoeOutput, act: Dtype) -> Result<Bytes, Error> {
        if let Some(error) = output.error {
            let kind = match error.kind() {
                DispatchErrorKind::NoReplica => ErrorKind::Unavailable,
                DispatchErrorKind::Expired => ErrorKind::DeadlineExceeded,
                _ => ErrorKind::Internal,
            };
            return Err(Error::new(kind, error.message));
        }
        let wrong = |what: &str, found: String, expected: String| {
            let message = format!("routed experts of layer {}: {what}: found {found}, expected {expected}", self.layer);
            Err(Error::new(ErrorKind::Internal, message))
        };
        if (output.step, output.layer) != (self.step, self.layer) {
            let found = format!("layer {} of step {}", output.layer, output.step);
            return wrong("answer", found, format!("layer {} of step {}", self.layer, self.step));
        }
        if output.activation != i32::from(wire(act)) {
            return wrong("activation", output.activation.to_string(), act.to_string());
        }
        if output.routed.len() != self.bytes {
            return wrong("routed", format!("{} bytes", output.routed.len()), format!("{} bytes", self.bytes));
        }
        Ok(output.routed)
    }
}

fn wire(act: Dtype) -> Activation {
    match act {
        Dtype::F32 => Activation::F32,
        Dtype::Bf16 => Activation::Bf16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_checked() {
        let call = Call { layer: 3, step: 9, bytes: 4 };
        let right = MoeOutput {
            step: 9,
            layer: 3,
            activation: Activation::Bf16.into(),
            routed: Bytes::from_static(&[0; 4]),
            ..MoeOutput::default()
        };
        assert_eq!(call.check(right.clone(), Dtype::Bf16).unwrap().len(), 4);
        let refused = |output: MoeOutput| call.check(output, Dtype::Bf16).unwrap_err().message;
        assert!(refused(MoeOutput { step: 8, ..right.clone() }).contains("found layer 3 of step 8"));
        assert!(refused(MoeOutput { activation: 1, ..right.clone() }).contains("expected bf16"));
        assert!(refused(MoeOutput { routed: Bytes::new(), ..right }).contains("found 0 bytes, expected 4 bytes"));
    }
}
