//! What one step computes. Pure: the sequences and the free blocks in, the decision out.
//!
//! Rules: sequences that decode go first, one row each; then prompts in order of arrival, a chunk each; then waiting
//! sequences are admitted in order of arrival, only when the blocks of all their known tokens are there beside those that
//! running prompts still need; a prefix that is in the cache is neither computed nor stored again. When blocks run out, the sequence that arrived last is preempted: its blocks are freed and
//! it waits, at the head of the queue, to be computed again. So the oldest sequence advances in every step.

/// Bounds of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rows of one step at most. At least `max_running`.
    pub step_tokens: usize,
    /// Rows of one prompt in one step at most.
    pub prefill_chunk: usize,
    /// Sequences that hold blocks at the same time.
    pub max_running: usize,
    /// Positions of a cache block.
    pub block: usize,
}

/// A sequence as far as the scheduler is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Positions that have to be in the cache before its next token is known; more than `computed`.
    pub target: usize,
    /// Positions in the cache.
    pub computed: usize,
    /// Cache blocks held, or, while it waits, to be shared when it begins.
    pub blocks: usize,
    /// Those of them that count as free as long as it waits.
    pub idle: usize,
}

/// A step. First the last `preempt` of the running sequences go back to the head of the queue, then the first `admit` of
/// the waiting ones become the last of the running; `rows[i]` is then the share of the i-th running sequence.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Running sequences that lose their blocks, from the last.
    pub preempt: usize,
    /// Waiting sequences that begin, from the first.
    pub admit: usize,
    /// Positions that each running sequence computes.
    pub rows: Vec<usize>,
}

/// Plans one step. `running` and `waiting` are each in order of arrival; everybody running came before everybody waiting.
/// Every sequence must fit into the cache alone.
pub fn plan(limits: &Limits, running: &[Demand], waiting: &[Demand], free: usize) -> Plan {
    let mut kept = running.len();
    loop {
        let freed: usize = running[kept..].iter().map(|sequence| sequence.blocks).sum();
        if let Some(shares) = share_out(limits, &running[..kept], free + freed) {
            let mut plan = Plan { preempt: running.len() - kept, admit: 0, rows: shares.rows };
            if plan.preempt == 0 {
                admit(limits, running, waiting, shares.left, &mut plan);
            }
            return plan;
        }
        kept -= 1;
    }
}

/// What is left of a step.
#[derive(Debug, Clone, Copy)]
struct Left {
    rows: usize,
    blocks: usize,
}

struct Shares {
    rows: Vec<usize>,
    left: Left,
}

/// Gives every running sequence its rows; `None` when the blocks do not suffice.
fn share_out(limits: &Limits, running: &[Demand], free: usize) -> Option<Shares> {
    let mut left = Left { rows: limits.step_tokens, blocks: free };
    let mut rows = vec![0; running.len()];
    for decoding in [true, false] {
        for (sequence, rows) in running.iter().zip(&mut rows) {
            if sequence.decodes() == decoding {
                *rows = sequence.missing().min(limits.prefill_chunk).min(left.rows);
                left.rows -= *rows;
                left.blocks = left.blocks.checked_sub(sequence.blocks_for(*rows, limits.block))?;
            }
        }
    }
    Some(Shares { rows, left })
}

fn admit(limits: &Limits, running: &[Demand], waiting: &[Demand], left: Left, plan: &mut Plan) {
    let Left { mut rows, blocks } = left;
    let reserved: usize = running
        .iter()
        .zip(&plan.rows)
        .map(|(sequence, rows)| {
            sequence.blocks_for(sequence.missing(), limits.block) - sequence.blocks_for(*rows, limits.block)
        })
        .sum();
    let mut blocks = blocks.saturating_sub(reserved);
    for sequence in waiting {
        let needed = sequence.blocks_for(sequence.missing(), limits.block) + sequence.idle;
        if rows == 0 || needed > blocks || running.len() + plan.admit == limits.max_running {
            return;
        }
        let share = sequence.missing().min(limits.prefill_chunk).min(rows);
        rows -= share;
        blocks -= needed;
        plan.admit += 1;
        plan.rows.push(share);
    }
}

impl Demand {
    fn missing(&self) -> usize {
        self.target - self.computed
    }

    fn decodes(&self) -> bool {
        self.missing() == 1
    }

    /// Blocks to be taken before `rows` more positions are computed.
    fn blocks_for(&self, rows: usize, block: usize) -> usize {
        (self.computed + rows).div_ceil(block).saturating_sub(self.blocks)
    }
}

#[cfg(test)]
mod tests;
