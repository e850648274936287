//! Times of products: the experts of a layer, and matrices of the trunk.

use conclave_kernels::cuda::{
    CudaError, Driver,
    plain::{GroupedLinear, Linear},
    sm90::Tokens,
};

use crate::{
    products::{Own, Product},
    runner::{Found, Runner, Stop},
    sizes::{Matrix, Model},
};

/// Rows up to which plain kernels are timed beside the others.
const PLAIN_ROWS: usize = 128;

/// The routed experts of a layer, each with as many rows.
pub(crate) fn experts<D: Driver>(runner: &mut Runner<D>, fp8: bool) {
    for model in runner.sizes.models.clone() {
        for tokens in runner.sizes.tokens.clone() {
            for gated in [true, false] {
                let product = expert_product(model, tokens, (gated, fp8));
                let what = if gated { "gate, up" } else { "down" };
                every_tile(runner, &product, &format!("{} {what}, {tokens} a group", model.name));
            }
        }
    }
}

fn expert_product(model: Model, tokens: usize, (gated, fp8): (bool, bool)) -> Product {
    let (inner, outputs) = if gated { (model.hidden, model.inner) } else { (model.inner, model.hidden) };
    Product { gated, fp8, rows: vec![tokens as u32; model.experts], inner, outputs }
}

/// The trunk's products: one group. Beside ours the plain kernel, and a library.
pub(crate) fn trunk<D: Driver>(runner: &mut Runner<D>) {
    for matrix in runner.sizes.trunk.clone() {
        for rows in runner.sizes.rows.clone() {
            let (outputs, inner) = (matrix.outputs, matrix.inner);
            let product = Product { gated: false, fp8: false, rows: vec![rows as u32], inner, outputs };
            let name = format!("{}, {rows} rows", matrix.name);
            every_tile(runner, &product, &name);
            if rows <= PLAIN_ROWS {
                runner.case(&format!("{name}, plain"), |runner| plain_linear(runner, &product));
            }
            library(runner, &product, matrix, &name);
        }
    }
}

fn every_tile<D: Driver>(runner: &mut Runner<D>, product: &Product, name: &str) {
    for tile in product.tiles() {
        runner.case(&format!("{name}, N = {}", tile.count()), |runner| one_tile(runner, product, *tile));
    }
}

fn one_tile<D: Driver>(runner: &Runner<D>, product: &Product, tile: Tokens) -> Result<Found, Stop> {
    let prepared = product.prepare(runner, Own::default())?;
    let y = runner.out(product.out_bytes())?.address;
    let samples = runner.time(|| product.launch(runner.driver(), tile, &prepared, y))?;
    Ok(Found { samples, work: product.work(), error: product.check(runner)? })
}

fn plain_linear<D: Driver>(runner: &Runner<D>, product: &Product) -> Result<Found, Stop> {
    let (x, w) = product.operands(runner, Own::default())?;
    let y = runner.out(product.out_bytes())?.address;
    let (rows, inner, outputs) = (product.total() as u32, product.inner as u32, product.outputs as u32);
    let samples = runner.time(|| Linear { x, w, y, rows, inner, outputs }.launch(runner.driver()))?;
    Ok(Found { samples, work: product.work(), error: product.check(runner)? })
}

/// The plain grouped kernel, at the largest group for which it is of use.
pub(crate) fn plain_experts<D: Driver>(runner: &mut Runner<D>) {
    let Some(model) = runner.sizes.models.first().copied() else { return };
    for tokens in runner.sizes.tokens.clone().into_iter().filter(|tokens| *tokens <= PLAIN_ROWS) {
        let product = expert_product(model, tokens, (false, false));
        let name = format!("{} down, {tokens} a group, plain", model.name);
        runner.case(&name, |runner| plain_grouped(runner, &product));
    }
}

fn plain_grouped<D: Driver>(runner: &Runner<D>, product: &Product) -> Result<Found, Stop> {
    let (x, w) = product.operands(runner, Own::default())?;
    let bytes = (product.inner * product.outputs * 2) as u64;
    let weights =
        runner.upload(&(0..product.rows.len() as u64).map(|group| w + group * bytes).collect::<Vec<u64>>())?;
    let offsets = runner.upload(&product.offsets())?;
    let kernel = GroupedLinear {
        x,
        weights: runner.at(&weights),
        offsets: runner.at(&offsets),
        y: runner.out(product.out_bytes())?.address,
        inner: product.inner as u32,
        outputs: product.outputs as u32,
        groups: product.rows.len() as u32,
        largest: product.rows.iter().copied().max().unwrap_or(0),
    };
    let launch = || -> Result<(), CudaError> { kernel.launch(runner.driver()) };
    Ok(Found { samples: runner.time(launch)?, work: product.work(), error: product.check(runner)? })
}

/// The same product by a library, where there is one.
fn library<D: Driver>(runner: &mut Runner<D>, product: &Product, matrix: Matrix, name: &str) {
    let Some(yardstick) = runner.yardstick.take_if(|yardstick| yardstick.multiplies()) else { return };
    runner.case(&format!("{name}, {}", yardstick.name()), |_| {
        let samples = yardstick.product(product.total(), matrix.outputs, matrix.inner)?;
        Ok(Found { samples, work: product.work(), error: None })
    });
    runner.yardstick = Some(yardstick);
}
