//! The lanes of one step, in turns: while the rows of one are with the routed experts, another has its segment.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use conclave_proto::v1::MoeOutput;
use conclave_serve::{Error, ErrorKind, turn};
use tokio::task::JoinHandle;

use super::call::Call;
use super::{GRACE, MoeCaller, StepError, StepReport};
use crate::trunk::{MoeRows, Segment, StepRows, Trunk, TrunkShape};

/// Rows of more bytes are not sent at one go: somebody has to go on sending while this thread computes.
const LARGE: usize = 192 << 10;

/// A step under way.
pub(super) struct Step<'a, T> {
    moe: &'a MoeCaller,
    trunk: &'a mut T,
    /// When to give up on routed experts.
    until: Option<Instant>,
    traceparent: String,
    lanes: Vec<Lane>,
    report: StepReport,
}

struct Lane {
    /// Names its calls.
    step: u64,
    /// Among the rows of the whole step.
    first_row: usize,
    at: At,
}

/// Where the rows of a lane are.
enum At {
    Segment,
    Routed(Away),
    End,
}

/// A call of routed experts under way; dropped, it is given up.
struct Away {
    call: Call,
    answer: JoinHandle<Result<MoeOutput, Error>>,
}

impl Drop for Away {
    fn drop(&mut self) {
        self.answer.abort();
    }
}

impl<'a, T: Trunk> Step<'a, T> {
    pub(super) fn new(moe: &'a MoeCaller, trunk: &'a mut T, until: Option<Instant>) -> Self {
        let traceparent = conclave_serve::telemetry::traceparent();
        Self { moe, trunk, until, traceparent, lanes: Vec::new(), report: StepReport::default() }
    }

    /// Runs the parts of a step, whose calls are named from `first_step` on. Segments of one layer are started in the order
    /// of the lanes: what is computed by itself (on a GPU) before this thread waits, else one after the other, each once the
    /// rows of the one before are out.
    pub(super) fn run(mut self, parts: Vec<StepRows>, first_step: u64) -> Result<StepReport, StepError> {
        let (count, mut first_row) = (parts.len(), 0);
        for (index, rows) in parts.into_iter().enumerate() {
            if index > 0 && !self.trunk.queues() {
                self.depart(index - 1)?;
            }
            self.lanes.push(Lane { step: first_step + index as u64, first_row, at: At::Segment });
            first_row += rows.len();
            self.trunk.begin(index, rows);
        }
        let mut index = if self.trunk.queues() { 0 } else { count - 1 };
        while self.lanes.iter().any(|lane| !matches!(lane.at, At::End)) {
            if self.trunk.queues() {
                self.go_on_behind(index)?;
            }
            if matches!(self.lanes[index].at, At::Routed(_)) {
                self.arrive(index)?;
            }
            if matches!(self.lanes[index].at, At::Segment) {
                self.depart(index)?;
            }
            index = (index + 1) % count;
        }
        self.report.broken_rows.sort_unstable();
        self.report.broken_rows.dedup();
        Ok(self.report)
    }

    /// Waits for a lane's segment and sends its rows to the routed experts; short messages are out when this returns.
    fn depart(&mut self, index: usize) -> Result<(), StepError> {
        let Segment::Moe(mut rows) = self.trunk.finish(index)? else {
            self.lanes[index].at = At::End;
            return Ok(());
        };
        let Lane { step, first_row, .. } = self.lanes[index];
        let shape = self.trunk.shape();
        let broken = silence_broken(&mut rows, shape);
        self.report.broken_rows.extend(broken.into_iter().map(|row| first_row + row));
        let call = Call { layer: rows.layer, step, bytes: rows.x.len() };
        let answer = self.send(&call, rows);
        self.lanes[index].at = At::Routed(Away { call, answer });
        self.trunk.shared_experts(index);
        Ok(())
    }

    fn send(&self, call: &Call, mut rows: MoeRows) -> JoinHandle<Result<MoeOutput, Error>> {
        let budget = self.until.map(|until| until.saturating_duration_since(Instant::now()));
        let (layer, large) = (call.layer, call.bytes > LARGE);
        let published = rows.published.take();
        let input = call.input(rows, self.trunk.shape(), (self.moe.caller, budget, &self.traceparent));
        let link = Arc::clone(&self.moe.link);
        let answer = self.moe.lane.spawn_and_turn(async move {
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
        if large && !answer.is_finished() {
            self.moe.lane.hand_over();
        }
        answer
    }

    /// Waits for the answer of a lane's routed experts, and starts its next segment.
    fn arrive(&mut self, index: usize) -> Result<(), StepError> {
        let At::Routed(mut away) = std::mem::replace(&mut self.lanes[index].at, At::Segment) else { return Ok(()) };
        let waiting = Instant::now();
        self.moe.lane.stirrer().stir();
        let broken = |error| Error::new(ErrorKind::Internal, format!("routed experts: {error}"));
        let output = self.moe.lane.block_on(&mut away.answer).unwrap_or_else(|error| Err(broken(error)))?;
        self.report.waits.push(waiting.elapsed());
        self.report.mixed_numerics |= output.mixed_numerics;
        let routed: Bytes = away.call.check(output, self.trunk.shape().activation)?;
        self.trunk.resume(index, &routed);
        Ok(())
    }

    /// Starts the segments of other lanes whose answer has come, behind that of this one: so there is always one to go on with.
    fn go_on_behind(&mut self, index: usize) -> Result<(), StepError> {
        if self.lanes.len() < 2 || !matches!(self.lanes[index].at, At::Segment) {
            return Ok(());
        }
        self.moe.lane.block_on(turn());
        for other in (0..self.lanes.len()).filter(|other| *other != index) {
            if matches!(&self.lanes[other].at, At::Routed(away) if away.answer.is_finished()) {
                self.arrive(other)?;
            }
        }
        Ok(())
    }
}

/// Zeroes rows with gate logits that are no numbers, so that one broken sequence does not fail the others' layer; which these
/// are.
fn silence_broken(rows: &mut MoeRows, shape: &TrunkShape) -> Vec<usize> {
    let row_bytes = shape.hidden * shape.activation.size();
    let MoeRows { x, logits, published, .. } = rows;
    let rows = logits.chunks_exact_mut(shape.experts).zip(x.chunks_exact_mut(row_bytes));
    let broken = rows.enumerate().filter_map(|(row, (logits, x))| {
        if logits.iter().all(|logit| logit.is_finite()) {
            return None;
        }
        logits.fill(0.0);
        x.fill(0);
        // Those on the board are what they were.
        *published = None;
        Some(row)
    });
    broken.collect()
}

fn silent(layer: u32, budget: Duration) -> Error {
    let message = format!("routed experts of layer {layer}: no answer within {} ms", budget.as_millis());
    Error::new(ErrorKind::DeadlineExceeded, message)
}

#[cfg(test)]
mod tests {
    use conclave_kernels::Dtype;

    use super::*;

    #[test]
    fn broken_rows_are_silenced_alone() {
        let shape = TrunkShape {
            vocab: 10,
            hidden: 2,
            experts: 3,
            activation: Dtype::Bf16,
            block: 64,
            blocks: 1,
            context_limit: 64,
            numerics: "test".into(),
        };
        let logits = vec![1.0, 2.0, 3.0, 1.0, f32::NAN, 3.0, f32::INFINITY, 0.0, 0.0];
        let mut rows = MoeRows { layer: 0, x: vec![7; 12], logits, published: None };
        assert_eq!(silence_broken(&mut rows, &shape), [1, 2]);
        assert_eq!(rows.logits, [1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(rows.x, [7, 7, 7, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
}
