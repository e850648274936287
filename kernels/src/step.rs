//! The rows of a step.

/// The rows of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowSpan {
    /// First row.
    pub first_row: usize,
    /// Rows.
    pub rows: usize,
    /// Absolute position of the first row.
    pub first_position: usize,
    /// Cache blocks of the sequence, in order of position; enough for these rows.
    pub blocks: Vec<u32>,
    /// Whether keys and values are expanded from the latents for these rows, instead of queries absorbed.
    pub expanded: bool,
}

/// From so many rows of a sequence on, expanding all its latents takes fewer operations than absorbing the rows, however long
/// the sequence is, and whatever the number of heads: `2 · 256 · 512 / (2 · (1088 − 320))` (MODEL §9).
const WORTH_EXPANDING: usize = 171;

/// The rows of a step: consecutive positions of one or more sequences. `T` rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepRows {
    /// `[T]`
    pub tokens: Vec<u32>,
    /// Absolute positions `[T]`
    pub positions: Vec<u32>,
    /// Where in the cache each row is written `[T]`
    pub slots: Vec<u32>,
    /// One for each sequence.
    pub spans: Vec<RowSpan>,
}

impl StepRows {
    /// Appends positions `first_position..` of a sequence with these cache blocks of `block` positions.
    ///
    /// # Panics
    /// When the blocks do not reach the last position.
    pub fn push(&mut self, tokens: &[u32], first_position: usize, blocks: &[u32], block: usize) {
        let first_row = self.len();
        for position in first_position..first_position + tokens.len() {
            self.positions.push(position as u32);
            self.slots.push(blocks[position / block] * block as u32 + (position % block) as u32);
        }
        self.tokens.extend_from_slice(tokens);
        self.spans.push(RowSpan {
            first_row,
            rows: tokens.len(),
            first_position,
            blocks: blocks.to_vec(),
            expanded: false,
        });
    }

    /// Has keys and values expanded for the spans for which it is worth it.
    pub fn expand(&mut self) {
        self.spans.iter_mut().for_each(|span| span.expanded = span.rows >= WORTH_EXPANDING);
    }

    /// The rows whose queries are absorbed; `None`: all of them.
    pub(crate) fn absorbed(&self) -> Option<Vec<u32>> {
        let absorbed = self.spans.iter().filter(|span| !span.expanded);
        let rows = absorbed.flat_map(|span| span.first_row as u32..(span.first_row + span.rows) as u32);
        self.spans.iter().any(|span| span.expanded).then(|| rows.collect())
    }

    /// The first half of the rows, rounded up, and the others. A sequence may have rows in both.
    pub fn halves(mut self) -> [Self; 2] {
        let first = self.len().div_ceil(2);
        let mut behind = Self {
            tokens: self.tokens.split_off(first),
            positions: self.positions.split_off(first),
            slots: self.slots.split_off(first),
            spans: Vec::new(),
        };
        for span in std::mem::take(&mut self.spans) {
            let here = first.saturating_sub(span.first_row).min(span.rows);
            if here < span.rows {
                let (rows, first_position) = (span.rows - here, span.first_position + here);
                let first_row = (span.first_row + here) - first;
                behind.spans.push(RowSpan { first_row, rows, first_position, ..span.clone() });
            }
            if here > 0 {
                self.spans.push(RowSpan { rows: here, ..span });
            }
        }
        [self, behind]
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_know_their_slots() {
        let mut rows = StepRows::default();
        rows.push(&[7, 8, 9], 6, &[5, 2], 8);
        rows.push(&[1], 0, &[0], 8);
        assert_eq!(rows.positions, [6, 7, 8, 0]);
        assert_eq!(rows.slots, [46, 47, 16, 0]);
        assert_eq!(
            rows.spans[1],
            RowSpan { first_row: 3, rows: 1, first_position: 0, blocks: vec![0], expanded: false }
        );
    }

    #[test]
    fn halves_hold_all_rows_where_they_were() {
        let sequences: [(usize, usize, [u32; 2]); 3] = [(2, 6, [5, 2]), (5, 3, [0, 1]), (1, 9, [3, 4])];
        let mut whole = StepRows::default();
        sequences.iter().for_each(|(rows, first, blocks)| whole.push(&vec![*rows as u32; *rows], *first, blocks, 8));
        let [mut first, mut second] = [StepRows::default(), StepRows::default()];
        first.push(&[2; 2], 6, &[5, 2], 8);
        first.push(&[5; 2], 3, &[0, 1], 8);
        second.push(&[5; 3], 5, &[0, 1], 8);
        second.push(&[1; 1], 9, &[3, 4], 8);
        assert_eq!(whole.halves(), [first, second]);
        let mut one = StepRows::default();
        one.push(&[7], 0, &[0], 8);
        assert_eq!(one.clone().halves(), [one, StepRows::default()]);
    }

    #[test]
    fn long_spans_are_expanded_where_asked_for() {
        let mut rows = StepRows::default();
        for (count, block) in [(1, 0), (171, 1), (170, 4)] {
            rows.push(&vec![0; count], 0, &[block, block + 1, block + 2], 64);
        }
        assert_eq!(rows.absorbed(), None);
        rows.expand();
        let absorbed = rows.absorbed().unwrap();
        assert_eq!((absorbed.len(), absorbed[0], absorbed[1]), (171, 0, 172));
    }
}
