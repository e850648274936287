//! One step through all layers: the trunk's segments with the routed experts in between.

mod call;
mod step;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use conclave_dispatch::MoeLink;
use conclave_kernels::KernelError;
use conclave_serve::{Error, ErrorKind, Lane};

use self::step::Step;
use crate::trunk::{LANES, StepRows, Trunk, TrunkShape};

/// How much longer than its budget the link is waited for: it should say itself that the budget is spent.
const GRACE: Duration = Duration::from_millis(200);

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

    /// Runs a step up to the residual of its last layer: its rows in one part, or in as many as the trunk has lanes, in order.
    /// `until`: when to give up on routed experts.
    ///
    /// # Errors
    /// When the trunk's device or the routed experts of a layer fail.
    pub fn run<T: Trunk>(
        &mut self,
        trunk: &mut T,
        parts: Vec<StepRows>,
        until: Option<Instant>,
    ) -> Result<StepReport, StepError> {
        assert!((1..=LANES).contains(&parts.len()), "a step in {} parts", parts.len());
        let first_step = self.step + 1;
        self.step += parts.len() as u64;
        Step::new(self, trunk, until).run(parts, first_step)
    }
}

/// How a sequence is cut into steps.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    /// Positions of a step.
    pub chunk: usize,
    /// Whether steps run as two micro-batches.
    pub halves: bool,
}

impl From<usize> for Cut {
    /// Chunks of so many positions, each whole.
    fn from(chunk: usize) -> Self {
        Self { chunk, halves: false }
    }
}

/// The logits `[T, vocab]` of all positions of one sequence, computed alone, cut in some way. Blocks the
/// thread, which must not be one that runs async tasks. For tests and tools; the service has its own loop.
///
/// # Errors
/// When the ids do not fit the vocabulary, the context or the cache, or the device or the routed experts fail.
pub fn logits<T: Trunk>(
    trunk: &mut T,
    moe: &mut MoeCaller,
    ids: &[u32],
    cut: impl Into<Cut>,
) -> Result<Vec<f32>, Error> {
    let Cut { chunk, halves } = cut.into();
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
        let parts = if halves && rows.len() > 1 { rows.halves().into() } else { vec![rows] };
        moe.run(trunk, parts, None)?;
        let asked: Vec<u32> = (0..ids.len() as u32).collect();
        trunk.logits(&asked, &mut some).map_err(StepError::from)?;
        all.extend_from_slice(&some);
    }
    Ok(all)
}
