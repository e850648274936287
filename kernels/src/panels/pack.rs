//! Filling panels.
#![allow(unsafe_code)]

use bytemuck::Pod;

use super::{Element, PAIRS, WIDTH, read_bf16, read_f32};
use crate::{Dtype, Weight};

/// Steps along the inner dimension that are packed at a time, so that what is written stays in the nearest cache.
const STRIP: usize = 128;

/// Packs the outputs from `first` on into a zeroed panel.
pub(super) fn panel<T: Element>(weight: Weight<'_>, first: usize, to: &mut [T]) {
    let used = WIDTH.min(weight.shape().0 - first);
    match (weight.dtype, weight.transposed) {
        (Dtype::F32, true) => across(weight, first..first + used, to, read_f32),
        (Dtype::Bf16, true) => across(weight, first..first + used, to, read_bf16),
        (Dtype::F32, false) => along(rows(weight, first, used), weight.cols, 0, to, read_f32),
        (Dtype::Bf16, false) => {
            let rows = rows(weight, first, used);
            let done = if used == WIDTH { T::transpose(rows, to) } else { 0 };
            along(rows, weight.cols, done, to, read_bf16);
        }
    }
}

/// The same of bytes.
pub(super) fn panel_of_bytes(weight: Weight<'_>, first: usize, to: &mut [u8]) {
    let used = WIDTH.min(weight.rows - first);
    let rows = rows(weight, first, used);
    let done = if used == WIDTH { transpose_into::<u8, true>(rows.as_flattened(), to) } else { 0 };
    along(rows, weight.cols, done, to, |[byte]| *byte);
}

/// `[used][cols]` as stored.
fn rows<const SIZE: usize>(weight: Weight<'_>, first: usize, used: usize) -> &[[u8; SIZE]] {
    &weight.data.as_chunks().0[first * weight.cols..][..used * weight.cols]
}

/// From rows that are steps.
fn across<T: Element, const SIZE: usize>(
    weight: Weight<'_>,
    outputs: std::ops::Range<usize>,
    to: &mut [T],
    read: impl Fn(&[u8; SIZE]) -> T,
) {
    for (step, row) in weight.data.as_chunks().0.chunks_exact(weight.cols).enumerate() {
        let to = to[step / 2 * PAIRS + step % 2..].iter_mut().step_by(2);
        to.zip(&row[outputs.clone()]).for_each(|(to, from)| *to = read(from));
    }
}

/// From rows that are outputs, of `cols` steps, the first `done` of which (an even number) are packed already.
fn along<T, const SIZE: usize>(
    rows: &[[u8; SIZE]],
    cols: usize,
    done: usize,
    to: &mut [T],
    read: impl Fn(&[u8; SIZE]) -> T,
) {
    for (strip, to) in to[WIDTH * done..].chunks_mut(WIDTH * STRIP).enumerate() {
        for (output, row) in rows.chunks_exact(cols.max(1)).enumerate() {
            let row = row.get(done + strip * STRIP..).unwrap_or_default();
            for (to, pair) in to.chunks_exact_mut(PAIRS).zip(row.chunks(2)) {
                to[2 * output..].iter_mut().zip(pair).for_each(|(to, from)| *to = read(from));
            }
        }
    }
}

/// Packs sixteen rows of bf16 into a panel that is read at once. `rows [16][_]`, of which the first elements fill the panel:
/// `to [depth / 2][16][2]`, the depth a multiple of [`super::STEPS`] and at most a row.
pub(crate) fn pack_rows(rows: &[u16], to: &mut [u16]) {
    let done = transpose_into::<u16, false>(bytemuck::cast_slice(rows), to);
    let rows: &[[u8; 2]] = bytemuck::cast_slice(rows);
    let cols = rows.len() / WIDTH;
    for (output, row) in rows.chunks_exact(cols).enumerate() {
        let pairs = to[WIDTH * done..].chunks_exact_mut(PAIRS).zip(row[done..].as_chunks::<2>().0);
        pairs.for_each(|(to, pair)| to[2 * output..2 * output + 2].copy_from_slice(&pair.map(u16::from_ne_bytes)));
    }
}

/// Asks for the cache lines of some elements.
pub(crate) fn fetch(elements: &[u16]) {
    #[cfg(target_arch = "x86_64")]
    for line in elements.chunks(32) {
        // SAFETY: every such processor has SSE, and a prefetch reads nothing.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = elements;
}

/// Packs the first steps of `rows [16][cols]`, an even number, where the processor has AVX2; how many.
pub(super) fn transpose(rows: &[[u8; 2]], to: &mut [u16]) -> usize {
    transpose_into::<u16, true>(rows.as_flattened(), to)
}

/// As many as `to` has room for, of elements of one or two bytes. `PAST`: lines are written past the caches.
fn transpose_into<T: Pod, const PAST: bool>(rows: &[u8], to: &mut [T]) -> usize {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        let stride = rows.len() / WIDTH;
        let bytes = stride.min(size_of_val(to) / WIDTH);
        let bytes = bytes - bytes % avx2::BYTES;
        assert!(to.as_ptr().cast::<avx2::Line>().is_aligned(), "an aligned panel");
        // SAFETY: the processor has AVX2; `rows` has sixteen rows of `stride` bytes, of which `bytes` are read; `to` has
        // room for them and is aligned as its lines are.
        unsafe {
            let (rows, to) = (rows.as_ptr(), to.as_mut_ptr().cast());
            match size_of::<T>() {
                1 => avx2::transpose::<PAST, true>(rows, stride, bytes, to),
                _ => avx2::transpose::<PAST, false>(rows, stride, bytes, to),
            }
        }
        return bytes / size_of::<T>();
    }
    let _ = (rows, to);
    0
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _MM_HINT_T0, _mm_prefetch, _mm_sfence, _mm256_loadu_si256, _mm256_permute2x128_si256,
        _mm256_permute4x64_epi64, _mm256_set_epi64x, _mm256_shuffle_epi8, _mm256_store_si256, _mm256_stream_si256,
        _mm256_unpackhi_epi32, _mm256_unpackhi_epi64, _mm256_unpacklo_epi32, _mm256_unpacklo_epi64,
    };

    use super::WIDTH;

    /// Bytes of each row that are transposed together.
    pub(super) const BYTES: usize = 64;

    /// 32 bits of each of sixteen outputs: a pair of steps, or two pairs of bytes.
    #[repr(align(64))]
    pub(super) struct Line(#[expect(dead_code, reason = "written through its halves")] [u8; 64]);

    /// Sixteen rows of `bytes` bytes (a multiple of [`BYTES`]), `stride` apart, become `to [bytes / 4]`. `SPLIT`: in each line
    /// the first halves of 32 bits come before the second ones, since they are pairs by themselves.
    ///
    /// `PAST`: whole lines are written past the caches. Those of weights are next read when the model is, and reading them
    /// first would take bandwidth.
    ///
    /// # Safety
    /// AVX2; sixteen readable rows; room for the lines.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn transpose<const PAST: bool, const SPLIT: bool>(
        rows: *const u8,
        stride: usize,
        bytes: usize,
        to: *mut Line,
    ) {
        for first in (0..bytes).step_by(BYTES) {
            for row in 0..WIDTH {
                // A prefetch reads nothing, wherever it points.
                let next = rows.wrapping_add(row * stride + first + BYTES);
                _mm_prefetch::<_MM_HINT_T0>(next.cast());
            }
            for first in [first, first + BYTES / 2] {
                // SAFETY: bytes that are there, in each of the rows.
                let (low, high) = unsafe {
                    let from = rows.add(first);
                    (transpose_eight(from, stride), transpose_eight(from.add(8 * stride), stride))
                };
                for (column, (low, high)) in low.into_iter().zip(high).enumerate() {
                    let (low, high) = if SPLIT { split(low, high) } else { (low, high) };
                    // SAFETY: there is room for the line, and lines are aligned.
                    unsafe {
                        let line = to.add(first / 4 + column).cast::<__m256i>();
                        write::<PAST>(line, low);
                        write::<PAST>(line.add(1), high);
                    }
                }
            }
        }
        if PAST {
            // So that whoever learns that this is done sees the lines.
            _mm_sfence();
        }
    }

    /// # Safety
    /// AVX2; room for half a line, aligned.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn write<const PAST: bool>(to: *mut __m256i, half: __m256i) {
        // SAFETY: the caller's promise.
        unsafe { if PAST { _mm256_stream_si256(to, half) } else { _mm256_store_si256(to, half) } }
    }

    /// The first halves of sixteen 32-bit units, and the second ones.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn split(low: __m256i, high: __m256i) -> (__m256i, __m256i) {
        const FIRST: i64 = 0x0d0c_0908_0504_0100;
        const SECOND: i64 = 0x0f0e_0b0a_0706_0302;
        let halves = |units| {
            let in_lanes = _mm256_shuffle_epi8(units, _mm256_set_epi64x(SECOND, FIRST, SECOND, FIRST));
            _mm256_permute4x64_epi64::<0b11_01_10_00>(in_lanes)
        };
        let (low, high) = (halves(low), halves(high));
        (_mm256_permute2x128_si256::<0x20>(low, high), _mm256_permute2x128_si256::<0x31>(low, high))
    }

    /// Eight rows of eight 32-bit units become eight columns.
    ///
    /// # Safety
    /// AVX2; 32 readable bytes in each row.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn transpose_eight(from: *const u8, stride: usize) -> [__m256i; 8] {
        // SAFETY: the caller's promise.
        let row = |index: usize| unsafe { _mm256_loadu_si256(from.add(index * stride).cast()) };
        let twos = [0, 2, 4, 6].map(|index| {
            let (a, b) = (row(index), row(index + 1));
            [_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)]
        });
        let fours = [0, 2].map(|index| {
            let ([a, b], [c, d]) = (twos[index], twos[index + 1]);
            [
                _mm256_unpacklo_epi64(a, c),
                _mm256_unpackhi_epi64(a, c),
                _mm256_unpacklo_epi64(b, d),
                _mm256_unpackhi_epi64(b, d),
            ]
        });
        std::array::from_fn(|column| {
            let (a, b) = (fours[0][column % 4], fours[1][column % 4]);
            if column < 4 { _mm256_permute2x128_si256::<0x20>(a, b) } else { _mm256_permute2x128_si256::<0x31>(a, b) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panels::STEPS;

    /// Panels of all sizes, aligned as those of weights are.
    #[repr(align(64))]
    struct Aligned([u16; WIDTH * 160]);

    #[test]
    fn bytes_become_pairs_of_bytes() {
        for cols in [1, 63, 64, 65, 127, 128, 200] {
            let bytes: Vec<u8> = (0..WIDTH * cols).map(|index| ((index * 2_654_435_761) >> 11) as u8).collect();
            let mut panel = Aligned([0; _]);
            let panel: &mut [u8] = bytemuck::cast_slice_mut(&mut panel.0);
            let panel = &mut panel[..WIDTH * cols.next_multiple_of(STEPS)];
            let weight =
                Weight { dtype: Dtype::Bf16, data: &bytes, rows: WIDTH, cols, transposed: false, scales: None };
            panel_of_bytes(weight, 0, panel);
            for (at, found) in panel.iter().enumerate() {
                let (output, step) = (at % PAIRS / 2, at / PAIRS * 2 + at % 2);
                let expected = if step < cols { bytes[output * cols + step] } else { 0 };
                assert_eq!(*found, expected, "output {output}, step {step} of {cols}");
            }
        }
    }

    #[test]
    fn the_fast_way_gives_the_bits_of_the_plain_one() {
        for cols in [1, 31, 32, 33, 64, 100, 127, 160] {
            for skew in 0..3 {
                let bytes: Vec<u8> =
                    (0..WIDTH * cols * 2 + skew).map(|index| ((index * 2_654_435_761) >> 11) as u8).collect();
                let stored: &[[u8; 2]] = bytes[skew..].as_chunks().0;
                let (mut fast, mut plain) = (Aligned([0; _]), Aligned([0; _]));
                let room = WIDTH * cols.next_multiple_of(STEPS);
                let done = transpose(stored, &mut fast.0[..room]);
                assert!(done <= cols && done.is_multiple_of(2));
                along(stored, cols, done, &mut fast.0[..room], read_bf16);
                along(stored, cols, 0, &mut plain.0[..room], read_bf16);
                assert!(fast.0 == plain.0, "{cols} steps, {skew} bytes off");
            }
        }
    }
}
