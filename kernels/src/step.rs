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
}

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
        self.spans.push(RowSpan { first_row, rows: tokens.len(), first_position, blocks: blocks.to_vec() });
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
        assert_eq!(rows.spans[1], RowSpan { first_row: 3, rows: 1, first_position: 0, blocks: vec![0] });
    }
}
