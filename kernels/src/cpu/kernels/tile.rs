//! Tiles of a matrix product: a few rows times a few panels, with all sums in registers.
// Loops over indices below a const parameter are unrolled, and keep their sums in registers.
#![allow(unsafe_code, clippy::needless_range_loop)]

use super::{
    lanes::{LANES, Lanes},
    panels_at_once,
};
use crate::panels::WIDTH;

/// Vectors of one panel's sixteen outputs.
const VECTORS: usize = WIDTH / LANES;

/// `out[p · R + r] = rows[r] · panels[p]`: one chain of additions for each output, ascending, from zero.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn tile<L: Lanes>(rows: &[&[f32]], panels: &[&[u16]], out: &mut [[f32; WIDTH]]) {
    let length = rows.first().map_or(0, |row| row.len());
    assert!(rows.iter().all(|row| row.len() == length), "rows of one length");
    assert!(panels.iter().all(|panel| panel.len() == length * WIDTH), "panels as long as the rows");
    assert!(panels.len() <= panels_at_once(rows.len()) && out.len() >= rows.len() * panels.len(), "size of a tile");
    // SAFETY: the lengths have been checked.
    unsafe {
        match (rows.len(), panels.len()) {
            (1, 1) => sums::<L, 1, 1>(rows, panels, out),
            (1, 2) => sums::<L, 1, 2>(rows, panels, out),
            (1, 3) => sums::<L, 1, 3>(rows, panels, out),
            (1, 4) => sums::<L, 1, 4>(rows, panels, out),
            (2, 1) => sums::<L, 2, 1>(rows, panels, out),
            (2, 2) => sums::<L, 2, 2>(rows, panels, out),
            (3, 1) => sums::<L, 3, 1>(rows, panels, out),
            (3, 2) => sums::<L, 3, 2>(rows, panels, out),
            (4, 1) => sums::<L, 4, 1>(rows, panels, out),
            (5, 1) => sums::<L, 5, 1>(rows, panels, out),
            (6, 1) => sums::<L, 6, 1>(rows, panels, out),
            (rows, panels) => unreachable!("a tile of {rows} rows and {panels} panels"),
        }
    }
}

/// # Safety
/// As for [`Lanes`]; `R` rows of one length, `P` panels of sixteen times that, room for `R · P` outputs.
#[inline(always)]
unsafe fn sums<L: Lanes, const R: usize, const P: usize>(rows: &[&[f32]], panels: &[&[u16]], out: &mut [[f32; WIDTH]]) {
    let mut x = [std::ptr::null::<f32>(); R];
    x.iter_mut().zip(rows).for_each(|(x, row)| *x = row.as_ptr());
    let mut w = [std::ptr::null::<u16>(); P];
    w.iter_mut().zip(panels).for_each(|(w, panel)| *w = panel.as_ptr());
    // SAFETY: `k` stays below the length of the rows, and a panel holds sixteen elements for each `k`.
    unsafe {
        let mut sums = [[[L::splat(0.0); VECTORS]; P]; R];
        for k in 0..rows[0].len() {
            let mut weights = [[L::splat(0.0); VECTORS]; P];
            for p in 0..P {
                for v in 0..VECTORS {
                    weights[p][v] = L::load_bf16(w[p].add(k * WIDTH + v * LANES));
                }
            }
            for r in 0..R {
                let x = L::splat(*x[r].add(k));
                for p in 0..P {
                    for v in 0..VECTORS {
                        sums[r][p][v] = weights[p][v].mul_add(x, sums[r][p][v]);
                    }
                }
            }
        }
        for p in 0..P {
            for r in 0..R {
                for v in 0..VECTORS {
                    sums[r][p][v].store(out[p * R + r].as_mut_ptr().add(v * LANES));
                }
            }
        }
    }
}
