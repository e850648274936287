//! Rows that are steps, two at a time, into panels.
#![allow(unsafe_code)]

use super::{PAIRS, WIDTH};

/// Packs two steps of some outputs, `[outputs]` each, into panels that lie `length` elements apart: a pair for each output.
pub(crate) fn interleave(first: &[u16], second: &[u16], length: usize, to: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512bw") {
        // SAFETY: the processor has AVX-512 BW.
        return unsafe { avx512::interleave(first, second, length, to) };
    }
    for (panel, (a, b)) in first.as_chunks::<WIDTH>().0.iter().zip(second.as_chunks::<WIDTH>().0).enumerate() {
        interleave_panel(a, b, to[panel * length..].first_chunk_mut().expect("room for every pair"));
    }
}

/// The same of one panel.
fn interleave_panel(first: &[u16; WIDTH], second: &[u16; WIDTH], to: &mut [u16; PAIRS]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_loadu_si128, _mm_storeu_si128, _mm_unpackhi_epi16, _mm_unpacklo_epi16};
        for at in [0, 8] {
            // SAFETY: every such processor has SSE2; eight elements from `at` on are read of each step, and written twice as
            // far.
            unsafe {
                let first = _mm_loadu_si128(first.as_ptr().add(at).cast());
                let second = _mm_loadu_si128(second.as_ptr().add(at).cast());
                let to = to.as_mut_ptr().add(2 * at).cast();
                _mm_storeu_si128(to, _mm_unpacklo_epi16(first, second));
                _mm_storeu_si128(to.add(1), _mm_unpackhi_epi16(first, second));
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    for ((to, first), second) in to.as_chunks_mut().0.iter_mut().zip(first).zip(second) {
        *to = [*first, *second];
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx512 {
    use std::arch::x86_64::*;

    use super::{PAIRS, WIDTH, interleave_panel};

    /// How two steps of 32 outputs become pairs.
    pub(crate) struct Interleaving {
        low: __m512i,
        high: __m512i,
    }

    impl Interleaving {
        /// # Safety
        /// AVX-512 BW.
        #[inline(always)]
        pub(crate) unsafe fn new() -> Self {
            let order: [i16; 2 * PAIRS] = std::array::from_fn(|at| (at / 2 + at % 2 * PAIRS) as i16);
            // SAFETY: the caller's; as many elements.
            unsafe {
                Self { low: _mm512_loadu_epi16(order.as_ptr()), high: _mm512_loadu_epi16(order[PAIRS..].as_ptr()) }
            }
        }

        /// The pairs of the first sixteen outputs, and of the others.
        ///
        /// # Safety
        /// AVX-512 BW.
        #[inline(always)]
        pub(crate) unsafe fn pairs(&self, first: __m512i, second: __m512i) -> [__m512i; 2] {
            // SAFETY: the caller's.
            [self.low, self.high].map(|order| unsafe { _mm512_permutex2var_epi16(first, order, second) })
        }
    }

    /// Two panels at a time.
    #[target_feature(enable = "avx512bw")]
    pub(super) fn interleave(first: &[u16], second: &[u16], length: usize, to: &mut [u16]) {
        // SAFETY: compiled for what it needs.
        let interleaving = unsafe { Interleaving::new() };
        let ((a, a_rest), (b, b_rest)) = (first.as_chunks::<PAIRS>(), second.as_chunks::<PAIRS>());
        for (index, (a, b)) in a.iter().zip(b).enumerate() {
            let to = &mut to[2 * index * length..][..length + PAIRS];
            // SAFETY: as many elements as the chunks have, and room for them; compiled for what it needs.
            unsafe {
                let (a, b) = (_mm512_loadu_si512(a.as_ptr().cast()), _mm512_loadu_si512(b.as_ptr().cast()));
                let [low, high] = interleaving.pairs(a, b);
                _mm512_storeu_si512(to.as_mut_ptr().cast(), low);
                _mm512_storeu_si512(to[length..].as_mut_ptr().cast(), high);
            }
        }
        if let (Some(a), Some(b)) = (a_rest.first_chunk::<WIDTH>(), b_rest.first_chunk()) {
            let to = &mut to[first.len() / PAIRS * 2 * length..];
            interleave_panel(a, b, to.first_chunk_mut().expect("room for every pair"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_become_pairs() {
        for panels in [1, 2, 3, 8] {
            let outputs = panels * WIDTH;
            let step = |first: u16| -> Vec<u16> { (first..).take(outputs).collect() };
            // Room for two pairs of steps in each panel, of which these are the second.
            let (length, mut to) = (2 * PAIRS, vec![7; panels * 2 * PAIRS]);
            interleave(&step(0), &step(1000), length, &mut to[PAIRS..]);
            for (panel, to) in to.chunks_exact(length).enumerate() {
                assert_eq!(to[..PAIRS], [7; PAIRS], "panel {panel} of {panels}");
                for (at, pair) in to[PAIRS..].as_chunks::<2>().0.iter().enumerate() {
                    let output = (panel * WIDTH + at) as u16;
                    assert_eq!(*pair, [output, 1000 + output], "panel {panel} of {panels}");
                }
            }
        }
    }
}
