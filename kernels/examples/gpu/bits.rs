//! Questions of yes or no: what gives the same bits, and so may be chosen by size.

use conclave_kernels::cuda::{Driver, sm90::Tokens};
use half::bf16;

use crate::{
    attention::Attention,
    numbers::Picks,
    products::{Own, Product},
    runner::{Runner, Stop},
    sizes::Queries,
};

/// Rows, and outputs, of the products whose operands are all the same.
const ALIKE: usize = 256;

/// Asks all of them.
pub(crate) fn ask<D: Driver>(runner: &mut Runner<D>) {
    for fp8 in [false, true] {
        for gated in [false, true] {
            let bits = runner.sizes.bits;
            let rows = runner.sizes.ragged.clone();
            let product = Product { gated, fp8, rows, inner: bits.inner, outputs: bits.outputs };
            tiles(runner, &product);
            // In FP8 the scales of tokens, and of outputs, differ.
            if !fp8 {
                places(runner, &product);
            }
        }
    }
    attention(runner);
}

/// One output, whatever the tile of tokens is.
fn tiles<D: Driver>(runner: &mut Runner<D>, product: &Product) {
    let [first, rest @ ..] = product.tiles() else { return };
    let name = product.name(*first);
    runner.question(&format!("{name}: same bits in another run"), |runner| {
        Ok(output(runner, product, *first, Own::default())? == output(runner, product, *first, Own::default())?)
    });
    for tile in rest {
        let question = format!("{name} and N = {}: same bits", tile.count());
        runner.question(&question, |runner| {
            Ok(output(runner, product, *first, Own::default())? == output(runner, product, *tile, Own::default())?)
        });
    }
}

/// A token at every column of a tile, an output at every row.
fn places<D: Driver>(runner: &mut Runner<D>, product: &Product) {
    let outputs = if product.gated { ALIKE / 2 } else { ALIKE };
    let alike = Product { rows: vec![ALIKE as u32], outputs, ..product.clone() };
    for tile in product.tiles() {
        let name = product.name(*tile);
        runner.question(&format!("{name}: same bits of a token at every column"), |runner| {
            let x = repeated(runner, &alike, ALIKE)?;
            let own = Own { x: Some(runner.at(&x)), ..Own::default() };
            let found = output(runner, &alike, *tile, own)?;
            let width = found.len() / ALIKE;
            Ok(found.chunks_exact(width).all(|row| row == &found[..width]))
        });
        runner.question(&format!("{name}: same bits of an output at every row"), |runner| {
            let copies = if alike.gated { 2 * outputs } else { outputs };
            let weights = repeated(runner, &alike, copies)?;
            let own = Own { weights: Some(runner.at(&weights)), ..Own::default() };
            let found = output(runner, &alike, *tile, own)?;
            let (row, size) = (found.len() / ALIKE, found.len() / ALIKE / outputs);
            Ok(found.chunks_exact(row).all(|row| row.chunks_exact(size).all(|value| value == &row[..size])))
        });
    }
}

/// `copies` times the same row of the inner dimension.
fn repeated<D: Driver>(runner: &Runner<D>, product: &Product, copies: usize) -> Result<D::Memory, Stop> {
    let mut picks = Picks::new(77);
    let value = |_| bf16::from_f32(picks.below(1 << 16) as f32 / 32768.0 - 1.0);
    let row: Vec<bf16> = (0..product.inner).map(value).collect();
    Ok(runner.upload(&row.repeat(copies))?)
}

/// All bytes that a kernel writes.
fn output<D: Driver>(runner: &Runner<D>, product: &Product, tile: Tokens, own: Own) -> Result<Vec<u8>, Stop> {
    let prepared = product.prepare(runner, own)?;
    let y = runner.out(product.out_bytes())?.address;
    product.launch(runner.driver(), tile, &prepared, y)?;
    runner.results(0, product.out_bytes())
}

/// A sequence, whatever is beside it and however its rows are put together.
fn attention<D: Driver>(runner: &mut Runner<D>) {
    let mut alone: Vec<Queries> = runner.sizes.queries.iter().copied().filter(|it| it.sequences == 1).collect();
    alone.sort_by_key(|queries| queries.context);
    alone.dedup_by_key(|queries| (queries.heads, queries.rows));
    for queries in alone {
        let Queries { heads, rows, context, .. } = queries;
        let name = format!("attention, {heads} heads, {rows} rows of {context}");
        let of = Attention::of(queries);
        runner.question(&format!("{name}: same bits with another sequence"), |runner| {
            let beside = Attention { queries: Queries { sequences: 2, ..queries }, ..of };
            Ok(of.first_sequence(runner)? == beside.first_sequence(runner)?)
        });
        if of.rows_an_item > 1 {
            runner.question(&format!("{name}: same bits with one row an item"), |runner| {
                let single = Attention { rows_an_item: 1, ..of };
                Ok(of.first_sequence(runner)? == single.first_sequence(runner)?)
            });
        }
    }
}
