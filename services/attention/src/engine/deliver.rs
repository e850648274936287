//! What happens with a computed step: scores and tokens go out, finished sequences leave.

use conclave_kernels::{FoundToken, KernelError, Pool};
use conclave_serve::{Error, ErrorKind};

use super::{Ending, Engine};
use crate::forward::StepReport;
use crate::sequence::Ask;
use crate::trunk::Trunk;

/// Rows that the output projection runs for at once, where logits are read.
const LOGIT_ROWS: usize = 32;
/// The same where the device finds tokens itself.
const FOUND_ROWS: usize = 256;

/// A row whose logits are asked for.
struct Asked {
    row: u32,
    sequence: usize,
    ask: Ask,
}

impl<T: Trunk> Engine<T> {
    /// Advances every sequence by its share of the step.
    pub(super) fn deliver(&mut self, shares: &[usize], report: &StepReport) -> Result<(), KernelError> {
        let mut endings: Vec<Option<Ending>> = self.running.iter().map(|_| None).collect();
        let asked = self.advance(shares, report, &mut endings);
        if self.parts.trunk.finds_tokens() {
            asked.chunks(FOUND_ROWS).try_for_each(|asked| self.find(asked, &mut endings))?;
        } else {
            asked.chunks(LOGIT_ROWS).try_for_each(|asked| self.answer(asked, &mut endings))?;
        }
        for (sequence, ending) in self.running.iter_mut().zip(&mut endings) {
            sequence.flush_scores();
            if ending.is_none() {
                *ending = sequence.end().map(Ok);
            }
        }
        self.leave(endings);
        Ok(())
    }

    /// Counts the rows as computed; those whose logits are needed.
    fn advance(&mut self, shares: &[usize], report: &StepReport, endings: &mut [Option<Ending>]) -> Vec<Asked> {
        let (mut asked, mut first_row) = (Vec::new(), 0);
        for (index, (sequence, rows)) in self.running.iter_mut().zip(shares).enumerate() {
            let positions = sequence.computed..sequence.computed + rows;
            if report.broken_rows.iter().any(|row| (first_row..first_row + rows).contains(row)) {
                endings[index] = Some(Err(broken(positions.start)));
            } else if *rows > 0 {
                asked.extend((first_row..).zip(positions).filter_map(|(row, position)| {
                    Some(Asked { row: row as u32, sequence: index, ask: sequence.ask(position)? })
                }));
                let before = sequence.computed;
                sequence.computed += rows;
                sequence.stalled_since = None;
                sequence.mixed_numerics |= report.mixed_numerics;
                sequence.publish(&mut self.pool, before, self.parts.limits.block);
            }
            first_row += rows;
        }
        asked
    }

    /// Has the device find what is asked of some rows and gives it to their sequences; where it finds nothing, the logits.
    fn find(&mut self, asked: &[Asked], endings: &mut [Option<Ending>]) -> Result<(), KernelError> {
        let rows: Vec<u32> = asked.iter().map(|asked| asked.row).collect();
        let asks: Vec<_> = asked.iter().map(|asked| self.running[asked.sequence].token_ask(asked.ask)).collect();
        let found = self.parts.trunk.find_tokens(&rows, self.parts.mask.words(), &asks)?;
        for (asked, found) in asked.iter().zip(found) {
            match found {
                Some(found) => self.give(asked, found, &mut endings[asked.sequence]),
                None => self.answer(std::slice::from_ref(asked), endings)?,
            }
        }
        Ok(())
    }

    /// Gives a sequence what was found for it.
    fn give(&mut self, asked: &Asked, found: FoundToken, ending: &mut Option<Ending>) {
        if ending.is_none() {
            *ending = self.running[asked.sequence].take(asked.ask, found).map(Ok);
            self.parts.metrics.generated_tokens.inc_by(u64::from(asked.ask == Ask::Sample));
        }
    }

    /// Runs the output projection for some rows, finds what is asked of their logits, on all threads that there are, and gives
    /// it to their sequences.
    fn answer(&mut self, asked: &[Asked], endings: &mut [Option<Ending>]) -> Result<(), KernelError> {
        let rows: Vec<u32> = asked.iter().map(|asked| asked.row).collect();
        let vocab = self.parts.trunk.shape().vocab;
        self.parts.trunk.logits(&rows, &mut self.logits)?;
        let (running, logits, mask) = (&self.running, &self.logits, &self.parts.mask);
        let find = |row: usize| {
            let Asked { sequence, ask, .. } = asked[row];
            running[sequence].find(ask, &logits[row * vocab..][..vocab], mask)
        };
        for (asked, found) in asked.iter().zip(on_threads(self.parts.trunk.pool(), asked.len(), find)) {
            match found {
                Ok(found) => self.give(asked, found, &mut endings[asked.sequence]),
                Err(error) => _ = endings[asked.sequence].get_or_insert(Err(error)),
            }
        }
        Ok(())
    }

    /// Lets sequences that end go; `endings` as long as the running ones.
    pub(super) fn leave(&mut self, endings: Vec<Option<Ending>>) {
        for (index, ending) in endings.into_iter().enumerate().rev() {
            match ending {
                None => {}
                Some(Ok(end)) => self.release(index).finish(end),
                Some(Err(error)) => self.release(index).fail(error),
            }
        }
    }
}

/// `find` of each number below `count`, in order.
fn on_threads<R: Send>(pool: Option<&Pool>, count: usize, find: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let Some(pool) = pool else { return (0..count).map(find).collect() };
    let mut found: Vec<Option<R>> = (0..count).map(|_| None).collect();
    pool.run_chunks(&mut found, 1, |index, found| found[0] = Some(find(index)));
    found.into_iter().flatten().collect()
}

fn broken(position: usize) -> Error {
    let message = format!("activations at or after position {position}: found numbers that are not finite");
    Error::new(ErrorKind::Internal, message)
}
