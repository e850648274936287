//! Linear layer, and gate logits, which are the same where nothing is rounded.

use crate::panels::{Element, PAIRS, Panels, WIDTH};

/// A matrix in the type it is stored in.
pub enum Matrix {
    /// f32 as stored.
    F32(Panels<f32>),
    /// bf16 as stored.
    Bf16(Panels<u16>),
}

impl Matrix {
    /// Outputs, and inputs.
    pub(crate) fn shape(&self) -> (usize, usize) {
        match self {
            Self::F32(panels) => (panels.outputs(), panels.inputs()),
            Self::Bf16(panels) => (panels.outputs(), panels.inputs()),
        }
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        match self {
            Self::F32(panels) => panels.count(),
            Self::Bf16(panels) => panels.count(),
        }
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::F32(panels) => panels.bytes(),
            Self::Bf16(panels) => panels.bytes(),
        }
    }

    /// Outputs `16·index..` of `x · Wᵀ` for one row `x [in]`.
    pub(crate) fn panel(&self, x: &[f32], index: usize) -> [f32; WIDTH] {
        match self {
            Self::F32(panels) => panel(x, panels.panel(index)),
            Self::Bf16(panels) => panel(x, panels.panel(index)),
        }
    }

    /// `y [out] = x [in] · Wᵀ` for one row.
    pub(crate) fn row(&self, x: &[f32], y: &mut [f32]) {
        for (index, y) in y.chunks_mut(WIDTH).enumerate() {
            y.copy_from_slice(&self.panel(x, index)[..y.len()]);
        }
    }
}

/// Sixteen outputs at once, each the sum over `k` in ascending order of `x[k] · w[k]`.
fn panel<T: Element>(x: &[f32], weights: &[T]) -> [f32; WIDTH] {
    let (weights, _) = weights.as_chunks::<PAIRS>();
    let mut sums = [0.0; WIDTH];
    let (pairs, last) = x.as_chunks::<2>();
    for (x, weights) in pairs.iter().zip(weights) {
        for (sum, weights) in sums.iter_mut().zip(weights.as_chunks::<2>().0) {
            *sum += x[0] * weights[0].widen();
            *sum += x[1] * weights[1].widen();
        }
    }
    if let [x] = last {
        let weights = weights[pairs.len()].iter().step_by(2);
        sums.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += x * weight.widen());
    }
    sums
}
