//! Products of tiles in shared memory alone, which the tensor cores are timed by.

use bytemuck::cast_slice;
use conclave_kernels::cuda::{Arg, Driver, Launch};
use half::bf16;

use crate::each::on_each;

const ROUNDS: u32 = 2;
const THREADS: u32 = 256;
/// Elements of a row of an operand, and rows of the left operand of each warpgroup.
const ROW: usize = 64;
const LEFT: usize = 64;

/// Element `k` of row `row` of the operands, the left ones first, as they lie in swizzled memory.
fn element(memory: &[bf16], row: usize, k: usize) -> f64 {
    f64::from(memory[row * ROW + (k ^ (row % 8 * 8))])
}

#[test]
fn every_round_is_multiplied() {
    let words: Vec<u32> = (0..49_152u32 / 4)
        .map(|at| {
            let bits = (at + 1).wrapping_mul(0x9e37_79b9);
            0x3f80_3f80 | ((bits ^ bits >> 15) & 0x807f_807f)
        })
        .collect();
    let memory: &[bf16] = cast_slice(&words);
    let dot = |row: usize, column: usize| -> f64 {
        (0..ROW).map(|k| element(memory, row, k) * element(memory, 2 * LEFT + column, k)).sum()
    };
    let found = on_each(|rig| {
        let out = rig.poisoned::<f32>(THREADS as usize);
        let arguments = [Arg::Address(rig.at(&out)), Arg::U32(ROUNDS)];
        let (kernel, block) = ("sm90_rate_products", [THREADS, 1, 1]);
        rig.driver.launch(&Launch { kernel, grid: [1, 1, 1], block, shared: 49_152, arguments: &arguments })?;
        Ok(rig.download::<f32>(&out, THREADS as usize))
    });
    for (on, found) in found {
        for (thread, found) in found.iter().enumerate() {
            let row = thread / 32 * 16 + thread % 32 / 4;
            let columns = (0..32).flat_map(|group| [0, 1].map(|odd| group * 8 + thread % 4 * 2 + odd));
            let sums: Vec<f64> = columns.flat_map(|column| [dot(row, column), dot(row + 8, column)]).collect();
            let expected = f64::from(ROUNDS) * sums.iter().sum::<f64>();
            let limit = 1e-4 * f64::from(ROUNDS) * sums.iter().map(|sum| sum.abs()).sum::<f64>();
            assert!((f64::from(*found) - expected).abs() < limit, "{on}: thread {thread}: {found}, {expected}");
        }
    }
}
