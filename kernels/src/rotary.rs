//! The table of the rotary embedding.

/// Cosines and sines of the rotary embedding, YaRN's factor included.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryTable {
    /// `[positions, rope / 2]`
    pub cos: Vec<f32>,
    /// `[positions, rope / 2]`
    pub sin: Vec<f32>,
}

impl RotaryTable {
    /// The table of positions `0..positions` for the angular frequencies `omega [rope / 2]` (radians a position), all
    /// multiplied by `factor`. Computed in double precision by portable code and rounded once.
    pub fn new(positions: usize, omega: &[f64], factor: f64) -> Self {
        let angles = || (0..positions).flat_map(|position| omega.iter().map(move |omega| position as f64 * omega));
        Self {
            cos: angles().map(|angle| (libm::cos(angle) * factor) as f32).collect(),
            sin: angles().map(|angle| (libm::sin(angle) * factor) as f32).collect(),
        }
    }

    /// Cosines and sines of one position, `half = rope / 2` each.
    ///
    /// # Panics
    /// When the table does not reach `position`.
    pub(crate) fn at(&self, position: u32, half: usize) -> (&[f32], &[f32]) {
        let start = position as usize * half;
        (&self.cos[start..start + half], &self.sin[start..start + half])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_angles_of_each_position() {
        let table = RotaryTable::new(1000, &[1.0, 0.25], 2.0);
        let (cos, sin) = table.at(999, 2);
        assert_eq!(cos[1], (2.0 * (999.0f64 * 0.25).cos()) as f32);
        assert_eq!(sin[0], (2.0 * 999.0f64.sin()) as f32);
        assert_eq!(table.at(0, 2), (&[2.0, 2.0][..], &[0.0, 0.0][..]));
    }
}
