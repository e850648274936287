//! One step through all layers: the trunk's segments with the routed experts in between.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use conclave_dispatch::MoeLink;
use conclave_kernels::{Dtype, KernelError, activation};
use conclave_proto::v1::{Activation, DispatchErrorKind, MoeInput, MoeOutput};
use conclave_serve::{Error, ErrorKind, Lane};
use tokio::task::{JoinError, JoinHandle};

use crate::trunk::{MoeRows, Segment, StepRows, Trunk, TrunkShape};

/// How much longer than its budget the link is waited for: it should say itself that the budget is spent.
const GRACE: Duration = Duration::from_millis(200);

/// Rows of more bytes are not sent at one go: somebody has to go on sending while this thread computes.
const LARGE: usize = 192 << 10;

/// Calls the routed experts from a thread that computes. The connections to them run on a lane: this thread sends, and
/// reads the answer, itself.
pub struct MoeCaller {
    link: Arc<dyn MoeLink>,
    lane: Arc<Lane>,
    caller: u64,
    step: u64,
}

/// What came out of a step beside its logits.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct StepReport {
    /// Members with another numerics id took part.
    pub mixed_numerics: bool,
    /// Rows whose activations were not finite somewhere, ascending; their logits mean nothing.
    pub broken_rows: Vec<usize>,
    /// Waited for routed experts in each layer after the shared ones were done.
    pub waits: Vec<Duration>,
}

/// Why a step was not finished.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The device of the trunk, for good.
    #[error(transparent)]
    Device(#[from] KernelError),
    /// The routed experts of a layer; the trunk may begin another step.
    #[error(transparent)]
    Routed(#[from] Error),
}

impl From<StepError> for Error {
    fn from(error: StepError) -> Self {
        match error {
            StepError::Device(error) => Self::new(ErrorKind::Internal, error.to_string()),
            StepError::Routed(error) => error,
        }
    }
}

impl MoeCaller {
    /// `caller` names this incarnation of the process.
    ///
    /// # Errors
    /// When there is no thread or no runtime for the lane.
    pub fn new(link: Arc<dyn MoeLink>, caller: u64) -> io::Result<Self> {
        Ok(Self { link, lane: Lane::start("attention-lane")?, caller, step: 0 })
    }

    /// Runs a step up to the residual of its last layer. `until`: when to give up on routed experts.
    ///
    /// # Errors
    /// When the trunk's device or the routed experts of a layer fail.
    pub fn run<T: Trunk>(
        &mut self,
        trunk: &mut T,
        rows: StepRows,
        until: Option<Instant>,
    ) -> Result<StepReport, StepError> {
        self.step += 1;
        let traceparent = conclave_serve::telemetry::traceparent();
        let mut report = StepReport::default();
        let mut segment = trunk.begin(rows)?;
        while let Segment::Moe(mut rows) = segment {
            silence_broken(&mut rows, trunk.shape(), &mut report.broken_rows);
            let call = Call { layer: rows.layer, step: self.step, bytes: rows.x.len() };
            let answer = self.send(rows, trunk.shape(), until, &traceparent);
            trunk.shared_experts();
            let waiting = Instant::now();
            let output = self.receive(answer)?;
            report.waits.push(waiting.elapsed());
            report.mixed_numerics |= output.mixed_numerics;
            segment = trunk.resume(&call.check(output, trunk.shape().activation)?)?;
        }
        report.broken_rows.sort_unstable();
        report.broken_rows.dedup();
        Ok(report)
    }

    /// Begins a layer's call; short messages are out when this returns.
    fn send(
        &self,
        mut rows: MoeRows,
        shape: &TrunkShape,
        until: Option<Instant>,
        traceparent: &str,
    ) -> JoinHandle<Result<MoeOutput, Error>> {
        let budget = until.map(|until| until.saturating_duration_since(Instant::now()));
        let (layer, large) = (rows.layer, rows.x.len() > LARGE);
        let published = rows.published.take();
        let input = self.input(rows, shape, budget, traceparent);
        let link = Arc::clone(&self.link);
        let call = self.lane.spawn_and_turn(async move {
            let moe = match published {
                None => link.moe(input),
                Some(published) => link.moe_published(input, published),
            };
            match budget {
                None => moe.await,
                Some(budget) => match tokio::time::timeout(budget + GRACE, moe).await {
                    Ok(output) => output,
                    Err(_) => Err(silent(layer, budget)),
                },
            }
        });
        if large && !call.is_finished() {
            self.lane.hand_over();
        }
        call
    }

    /// Waits for the answer.
    fn receive(&self, call: JoinHandle<Result<MoeOutput, Error>>) -> Result<MoeOutput, Error> {
        self.lane.stirrer().stir();
        self.lane.block_on(call).unwrap_or_else(|error| Err(broken(&error)))
    }

    fn input(&self, rows: MoeRows, shape: &TrunkShape, budget: Option<Duration>, traceparent: &str) -> MoeInput {
        let row_bytes = shape.hidden * shape.activation.size();
        MoeInput {
            caller: self.caller,
            step: self.step,
            layer: rows.layer,
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
}

/// What an answer is checked against.
struct Call {
    layer: u32,
    step: u64,
    bytes: usize,
}

impl Call {
    /// The routed experts' output `[T, H]`.
    fn check(&self, output: MoeOutput, act: Dtype) -> Result<Bytes, Error> {
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

/// The logits `[T, vocab]` of all positions of one sequence, computed alone in chunks of `chunk` positions. Blocks the
/// thread, which must not be one that runs async tasks. For tests and tools; the service has its own loop.
///
/// # Errors
/// When the ids do not fit the vocabulary, the context or the cache, or the device or the routed experts fail.
pub fn logits<T: Trunk>(trunk: &mut T, moe: &mut MoeCaller, ids: &[u32], chunk: usize) -> Result<Vec<f32>, Error> {
    let TrunkShape { vocab, block, blocks, context_limit, .. } = *trunk.shape();
    let limit = context_limit.min(block * blocks as usize);
    if ids.len() > limit {
        return Err(Error::invalid(format!("ids: found {}, expected at most {limit}", ids.len())));
    }
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
        return Err(Error::invalid(format!("ids: found {id}, expected ids below {vocab}")));
    }
    let table: Vec<u32> = (0..blocks).collect();
    let (mut all, mut some) = (Vec::with_capacity(ids.len() * vocab), Vec::new());
    for (index, ids) in ids.chunks(chunk.max(1)).enumerate() {
        let mut rows = StepRows::default();
        rows.push(ids, index * chunk.max(1), &table, block);
        moe.run(trunk, rows, None)?;
        let asked: Vec<u32> = (0..ids.len() as u32).collect();
        trunk.logits(&asked, &mut some).map_err(StepError::from)?;
        all.extend_from_slice(&some);
    }
    Ok(all)
}

fn wire(act: Dtype) -> Activation {
    match act {
        Dtype::F32 => Activation::F32,
        Dtype::Bf16 => Activation::Bf16,
    }
}

/// Zeroes rows with gate logits that are no numbers, so that one broken sequence does not fail the others' layer.
fn silence_broken(rows: &mut MoeRows, shape: &TrunkShape, broken: &mut Vec<usize>) {
    let row_bytes = shape.hidden * shape.activation.size();
    let MoeRows { x, logits, published, .. } = rows;
    let rows = logits.chunks_exact_mut(shape.experts).zip(x.chunks_exact_mut(row_bytes));
    for (row, (logits, x)) in rows.enumerate() {
        if !logits.iter().all(|logit| logit.is_finite()) {
            logits.fill(0.0);
            x.fill(0);
            broken.push(row);
            // Those on the board are what they were.
            *published = None;
        }
    }
}

fn silent(layer: u32, budget: Duration) -> Error {
    let message = format!("routed experts of layer {layer}: no answer within {} ms", budget.as_millis());
    Error::new(ErrorKind::DeadlineExceeded, message)
}

fn broken(error: &JoinError) -> Error {
    Error::new(ErrorKind::Internal, format!("routed experts: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> TrunkShape {
        TrunkShape {
            vocab: 10,
            hidden: 2,
            experts: 3,
            activation: Dtype::Bf16,
            block: 64,
            blocks: 1,
            context_limit: 64,
            numerics: "test".into(),
        }
    }

    #[test]
    fn broken_rows_are_silenced_alone() {
        let logits = vec![1.0, 2.0, 3.0, 1.0, f32::NAN, 3.0, f32::INFINITY, 0.0, 0.0];
        let mut rows = MoeRows { layer: 0, x: vec![7; 12], logits, published: None };
        let mut broken = Vec::new();
        silence_broken(&mut rows, &shape(), &mut broken);
        assert_eq!(broken, [1, 2]);
        assert_eq!(rows.logits, [1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(rows.x, [7, 7, 7, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

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
