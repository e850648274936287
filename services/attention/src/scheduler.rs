//! What one step computes. Pure: the sequences, the free blocks and what steps took so far in, the decision out.
//!
//! Rules: sequences that decode go first, one row each. Then the prompts: where somebody decodes, as many of their rows
//! as keep the step within its target time ([`plan_within`]), otherwise as many as a step may have; they share them as
//! `prompts::share` says. Waiting sequences are admitted in order of arrival, only when the blocks of all their known
//! tokens are there beside those that running prompts still need; a prefix that is in the cache is neither computed nor
//! stored again. When blocks run out, the sequence that arrived last is preempted: its blocks are freed and it waits, at
//! the head of the queue, to be computed again. So the oldest sequence and the oldest prompt advance in every step.

mod halves;
mod prompts;
mod times;
mod within;

pub use halves::{Halves, MicroBatches, Took};
pub use times::StepTimes;
pub use within::{FLOOR, plan_within};

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

/// All sequences and what they may take.
#[derive(Debug, Clone, Copy)]
pub struct Queue<'a> {
    /// In order of arrival.
    pub running: &'a [Demand],
    /// In order of arrival, all after those running.
    pub waiting: &'a [Demand],
    /// Cache blocks that nobody holds.
    pub free: usize,
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

/// What a step has to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Rows of sequences that decode.
    pub decode: usize,
    /// Rows of prompts.
    pub prefill: usize,
    /// Positions that the rows attend to, all together.
    pub pairs: usize,
}

/// Plans one step with at most `prefill` rows of prompts, at least one. Every sequence must fit into the cache alone.
pub fn plan(limits: &Limits, prefill: usize, queue: Queue<'_>) -> Plan {
    let Queue { running, free, .. } = queue;
    let mut kept = running.len();
    loop {
        let freed: usize = running[kept..].iter().map(|sequence| sequence.blocks).sum();
        let rows = shares(limits, prefill, &running[..kept]);
        let needed: usize =
            running.iter().zip(&rows).map(|(sequence, rows)| sequence.blocks_for(*rows, limits.block)).sum();
        if needed > free + freed {
            kept -= 1;
        } else if kept < running.len() {
            return Plan { preempt: running.len() - kept, admit: 0, rows };
        } else {
            return admit(limits, prefill, queue);
        }
    }
}

/// The rows of each sequence.
fn shares(limits: &Limits, prefill: usize, sequences: &[Demand]) -> Vec<usize> {
    let decoding = sequences.iter().filter(|sequence| sequence.decodes()).count();
    let prompts = sequences.iter().filter(|sequence| !sequence.decodes());
    let wanted: Vec<usize> = prompts.map(|sequence| sequence.missing().min(limits.prefill_chunk)).collect();
    let mut given = prompts::share(prefill.min(limits.step_tokens - decoding), &wanted).into_iter();
    let share = |sequence: &Demand| if sequence.decodes() { Some(1) } else { given.next() };
    sequences.iter().filter_map(share).collect()
}

/// Lets in who fits, as far as there are rows for them.
fn admit(limits: &Limits, prefill: usize, Queue { running, waiting, free }: Queue<'_>) -> Plan {
    let reserved: usize = running.iter().map(|sequence| sequence.blocks_for(sequence.missing(), limits.block)).sum();
    let mut blocks = free.saturating_sub(reserved);
    let fits = |sequence: &&Demand| {
        let needed = sequence.blocks_for(sequence.missing(), limits.block) + sequence.idle;
        let left = blocks.checked_sub(needed);
        blocks = left.unwrap_or(blocks);
        left.is_some()
    };
    let mut all = running.to_vec();
    all.extend(waiting.iter().take(limits.max_running - running.len()).take_while(fits));
    let mut rows = shares(limits, prefill, &all);
    while rows.len() > running.len() && rows.last() == Some(&0) {
        rows.pop();
    }
    Plan { preempt: 0, admit: rows.len() - running.len(), rows }
}

impl Plan {
    /// What it has to compute, for the queue that it was made for.
    pub fn load(&self, queue: Queue<'_>) -> Load {
        let kept = &queue.running[..queue.running.len() - self.preempt];
        let mut load = Load::default();
        for (sequence, rows) in kept.iter().chain(queue.waiting).zip(&self.rows) {
            *if sequence.decodes() { &mut load.decode } else { &mut load.prefill } += rows;
            load.pairs += rows * sequence.computed + rows * (rows + 1) / 2;
        }
        load
    }
}

impl Load {
    /// All of them.
    pub fn rows(&self) -> usize {
        self.decode + self.prefill
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
