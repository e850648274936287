//! Products with AMX: tiles of 16 rows by 16 outputs that grow by 32 steps at a time. All else is that of AVX-512.
#![allow(unsafe_code)]

use std::arch::asm;

use super::{
    Kernels, Strip, Tiles,
    avx512::{self, MultiplyAdds, Zmm},
    dots::Dots,
    on_lanes::OnLanes,
    steps,
    tile_registers::{self, ROW_BYTES, ROWS},
};
use crate::{
    Dtype,
    panels::{STEPS, WIDTH},
    scratch::Scratch,
};

/// Steps of a strip: two panels of so many stay in the nearest cache while rows pass by.
const STRIP: usize = 512;
/// Bytes of packed rows that are taken together. Every processor with AMX has a second cache of 2 MiB, and multiplies so
/// fast that reading the panels again for fewer rows would take longer than the products.
const BLOCK: usize = 1 << 20;
/// Panels of a tile at most.
const PANELS: usize = 4;

/// Whether this machine has what the products and all other loops are compiled for.
pub(super) fn is_available() -> bool {
    avx512::is_available() && tile_registers::are_granted()
}

/// The loops for AMX.
///
/// # Panics
/// When the machine lacks it, or the operating system does not let this process use it.
pub(super) fn kernels() -> &'static dyn Kernels {
    // SAFETY: handed out below, where AVX-512 and AMX have been found.
    static KERNELS: OnLanes<Zmm> = unsafe { OnLanes::new(tiles, multiply_adds, Dtype::Bf16) };
    assert!(is_available(), "AMX");
    &KERNELS
}

fn tiles(inputs: Dtype) -> &'static dyn Tiles {
    match inputs {
        Dtype::Bf16 => &Amx,
        Dtype::F32 => &MultiplyAdds,
    }
}

/// Products of inputs rounded to bf16. Of each 32 steps, the even ones are one chain of fused multiply-adds from zero and
/// the odd ones another; these two are added up, and then added to the sum. Denormal numbers are taken as zero.
struct Amx;

impl Tiles for Amx {
    fn rows(&self) -> usize {
        2 * ROWS
    }

    fn panels(&self, rows: usize) -> usize {
        if rows > ROWS { 2 } else { PANELS }
    }

    fn strip(&self) -> usize {
        STRIP
    }

    fn block(&self) -> usize {
        BLOCK
    }

    fn density(&self) -> usize {
        2
    }

    fn pack(&self, rows: &[&[f32]], strip: usize, to: &mut [f32]) {
        Dots.pack(rows, strip, to);
    }

    fn tile(&self, x: &[f32], strip: Strip<'_, u16>, sums: &mut [[f32; WIDTH]]) {
        let (panels, rows) = (strip.panels, steps::check(self.density() * x.len(), strip, sums));
        assert!(rows <= self.rows() && panels.len() <= self.panels(rows), "a tile of {rows} rows");
        if x.is_empty() || sums.is_empty() {
            return;
        }
        let mut from = [std::ptr::null(); PANELS];
        from.iter_mut().zip(panels).for_each(|(from, panel)| *from = panel.as_ptr());
        // SAFETY: `kernels` has found AMX, and the lengths have been checked.
        scaled(strip.scales, sums, |sums| unsafe {
            tile_registers::set_up(rows);
            match (rows.div_ceil(ROWS), panels.len()) {
                (1, 1) => multiply::<1, 1>(x, from, sums),
                (1, 2) => multiply::<1, 2>(x, from, sums),
                (1, 3) => multiply::<1, 3>(x, from, sums),
                (1, 4) => multiply::<1, 4>(x, from, sums),
                (2, 1) => multiply::<2, 1>(x, from, sums),
                (2, 2) => multiply::<2, 2>(x, from, sums),
                (height, panels) => unreachable!("{height} tiles by {panels}"),
            }
        });
    }
}

/// Runs `add`, which adds products to sums, on parts from zero; these, times the scales of their panels, are then added to
/// `sums [panels][rows]`. Without scales, on the sums themselves.
fn scaled(scales: Option<&[f32]>, sums: &mut [[f32; WIDTH]], add: impl FnOnce(&mut [[f32; WIDTH]])) {
    let Some(scales) = scales else { return add(sums) };
    let mut parts = Scratch::take(sums.as_flattened().len());
    parts.fill(0.0);
    add(parts.as_chunks_mut().0);
    let sums = sums.as_flattened_mut();
    let of_panel = sums.len() / scales.len().max(1);
    for ((sums, parts), scale) in sums.chunks_exact_mut(of_panel).zip(parts.chunks_exact(of_panel)).zip(scales) {
        sums.iter_mut().zip(parts).for_each(|(sum, part)| *sum += scale * part);
    }
}

/// Of the first sixteen rows, and then, where there are more, of the others.
macro_rules! by_height {
    ($first:literal, $others:literal) => {
        concat!($first, "\n.if {height} > 1\n", $others, "\n.endif")
    };
}

/// Adds 32 steps of a panel to the sums, goes on to its next 32, and asks for these to be fetched: tiles are too large for
/// the processor to look far ahead by itself.
macro_rules! panel {
    ($weights:literal, $from:literal, $first:literal, $others:literal) => {
        concat!(
            "tileloadd ",
            $weights,
            ", [{",
            $from,
            "} + {line}]\n",
            "tdpbf16ps ",
            $first,
            ", tmm4, ",
            $weights,
            "\n.if {height} > 1\ntdpbf16ps ",
            $others,
            ", tmm5, ",
            $weights,
            "\n.endif\nadd {",
            $from,
            "}, 1024\n",
            ".irp at, 0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960\n",
            "prefetcht0 [{",
            $from,
            "} + \\at]\n",
            ".endr",
        )
    };
}

/// `sums[p · R + r] += x[r] · panels[p]`: `x [depth / 32][R][32]`, from each pointer `[depth / 2][16][2]`.
///
/// # Safety
/// The registers are set up for `R` rows, of `HEIGHT` tiles. The first `PANELS` pointers lead to panels as deep as `x`, which
/// is not empty; there are `R · PANELS` sums.
unsafe fn multiply<const HEIGHT: usize, const PANELS: usize>(
    x: &[f32],
    [w0, w1, w2, w3]: [*const u16; self::PANELS],
    sums: &mut [[f32; WIDTH]],
) {
    let rows = sums.len() / PANELS;
    let strips = 2 * x.len() / (rows * STEPS);
    // SAFETY: the contract of this function; a prefetch may name any address.
    unsafe {
        asm!(
            by_height!("tileloadd tmm0, [{sums} + {line}]", "tileloadd tmm2, [{sums} + {line} + 1024]"),
            ".if {panels} > 1",
            "add {sums}, {of_rows}",
            by_height!("tileloadd tmm1, [{sums} + {line}]", "tileloadd tmm3, [{sums} + {line} + 1024]"),
            ".endif",
            ".if {panels} > 2",
            "add {sums}, {of_rows}",
            "tileloadd tmm2, [{sums} + {line}]",
            ".endif",
            ".if {panels} > 3",
            "add {sums}, {of_rows}",
            "tileloadd tmm3, [{sums} + {line}]",
            ".endif",
            "2:",
            by_height!("tileloadd tmm4, [{x} + {line}]", "tileloadd tmm5, [{x} + {line} + 1024]"),
            "add {x}, {of_rows}",
            panel!("tmm6", "w0", "tmm0", "tmm2"),
            ".if {panels} > 1",
            panel!("tmm7", "w1", "tmm1", "tmm3"),
            ".endif",
            ".if {panels} > 2",
            panel!("tmm6", "w2", "tmm2", "tmm2"),
            ".endif",
            ".if {panels} > 3",
            panel!("tmm7", "w3", "tmm3", "tmm3"),
            ".endif",
            "dec {strips}",
            "jnz 2b",
            ".if {panels} > 3",
            "tilestored [{sums} + {line}], tmm3",
            "sub {sums}, {of_rows}",
            ".endif",
            ".if {panels} > 2",
            "tilestored [{sums} + {line}], tmm2",
            "sub {sums}, {of_rows}",
            ".endif",
            ".if {panels} > 1",
            by_height!("tilestored [{sums} + {line}], tmm1", "tilestored [{sums} + {line} + 1024], tmm3"),
            "sub {sums}, {of_rows}",
            ".endif",
            by_height!("tilestored [{sums} + {line}], tmm0", "tilestored [{sums} + {line} + 1024], tmm2"),
            height = const HEIGHT,
            panels = const PANELS,
            line = in(reg) ROW_BYTES,
            of_rows = in(reg) rows * ROW_BYTES,
            strips = inout(reg) strips => _,
            x = inout(reg) x.as_ptr() => _,
            sums = inout(reg) sums.as_mut_ptr() => _,
            w0 = inout(reg) w0 => _,
            w1 = inout(reg) w1 => _,
            w2 = inout(reg) w2 => _,
            w3 = inout(reg) w3 => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Products of full tiles from registers: see [`Kernels::multiply_adds`].
fn multiply_adds(rounds: usize) -> usize {
    if rounds > 0 {
        // SAFETY: `kernels` has found AMX; all eight registers are in use with the greatest number of rows.
        unsafe {
            tile_registers::set_up(2 * ROWS);
            asm!(
                ".irp register, 0, 1, 2, 3, 4, 5, 6, 7",
                "tilezero tmm\\register",
                ".endr",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {rounds}",
                "jnz 2b",
                rounds = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem),
            );
        }
    }
    rounds * 4 * ROWS * WIDTH * STEPS
}
