//! Grouped products in bf16 and FP8: what they are, their launch, and their definition.

use conclave_kernels::cuda::{
    CudaError, Driver, Element,
    sm90::{GroupedProduct, GroupedProductFp8, Tokens, maps},
};

use crate::{
    numbers::Picks,
    runner::{Distance, Error, Runner, Stop, Work},
};

/// Rows and outputs of each that are compared with the definition.
const CHECKED: usize = 16;
/// Relative norms of errors that are right.
const BF16_LIMIT: f64 = 1e-2;
const FP8_LIMIT: f64 = 3e-2;

/// `y [P, outputs] = x [P, inner] · Wᵀ`, each group of rows with weights of its own.
#[derive(Debug, Clone)]
pub(crate) struct Product {
    /// Gate and up: `round(silu(gate) ⊙ up)` in bf16. Otherwise sums in f32.
    pub(crate) gated: bool,
    pub(crate) fp8: bool,
    /// Rows of each group.
    pub(crate) rows: Vec<u32>,
    pub(crate) inner: usize,
    pub(crate) outputs: usize,
}

/// What a launch reads, beside the numbers.
pub(crate) struct Prepared<D: Driver> {
    /// Held for the addresses below.
    _memory: Vec<D::Memory>,
    /// Map of activations, and in FP8 of their scales.
    x: [u64; 2],
    /// Maps of weights, and in FP8 the scales of all groups, then those of their ups.
    weights: [u64; 2],
    offsets: u64,
}

/// Where operands come from: windows of numbers, or memory of one's own.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Own {
    /// Activations `[P, inner]`, instead of numbers.
    pub(crate) x: Option<u64>,
    /// Weights of all groups, instead of numbers.
    pub(crate) weights: Option<u64>,
}

impl Product {
    /// The kernels of this kind, by tokens of a tile.
    pub(crate) fn tiles(&self) -> &'static [Tokens] {
        if self.fp8 { &Tokens::ALL[..3] } else { &Tokens::ALL }
    }

    pub(crate) fn total(&self) -> usize {
        self.rows.iter().sum::<u32>() as usize
    }

    /// Bytes of one output.
    fn size(&self) -> usize {
        if self.gated { 2 } else { 4 }
    }

    pub(crate) fn out_bytes(&self) -> usize {
        self.total() * self.outputs * self.size()
    }

    fn copies(&self) -> usize {
        1 + usize::from(self.gated)
    }

    /// Weights of one group.
    fn weights(&self) -> usize {
        self.copies() * self.outputs * self.inner
    }

    /// Where activations begin among the numbers: behind the weights.
    fn x_at(&self) -> usize {
        (self.rows.len() * self.weights()).next_multiple_of(128)
    }

    fn blocks(&self) -> usize {
        self.inner.div_ceil(128)
    }

    fn pitch(&self) -> usize {
        self.total().next_multiple_of(4)
    }

    /// Scales of one group, and where its first one is: behind those of activations.
    fn scales(&self) -> usize {
        (self.copies() * self.outputs.div_ceil(128) * self.blocks()).next_multiple_of(4)
    }

    fn scales_at(&self, group: usize) -> usize {
        (self.blocks() * self.pitch()).next_multiple_of(4) + group * self.scales()
    }

    pub(crate) fn work(&self) -> Work {
        let (used, rows) = (self.rows.iter().filter(|rows| **rows > 0).count(), self.total());
        let element = if self.fp8 { 1 } else { 2 };
        Work {
            bytes: ((used * self.weights() + rows * self.inner) * element + self.out_bytes()) as f64,
            flops: 2.0 * rows as f64 * (self.weights() as f64),
            fp8: self.fp8,
        }
    }

    /// Offsets of the groups' rows `[groups + 1]`.
    pub(crate) fn offsets(&self) -> Vec<u32> {
        let sums = self.rows.iter().scan(0, |sum, rows| {
            *sum += rows;
            Some(*sum)
        });
        std::iter::once(0).chain(sums).collect()
    }

    /// Where activations and weights begin.
    pub(crate) fn operands<D: Driver>(&self, runner: &Runner<D>, own: Own) -> Result<(u64, u64), Stop> {
        let (x, weights) = (self.total() * self.inner, self.rows.len() * self.weights());
        let numbers = |first, length| match self.fp8 {
            true => runner.e4m3()?.window(first, length),
            false => runner.bf16()?.window(first, length),
        };
        Ok((own.x.map_or_else(|| numbers(self.x_at(), x), Ok)?, own.weights.map_or_else(|| numbers(0, weights), Ok)?))
    }

    /// Maps, offsets and scales in the device's memory.
    pub(crate) fn prepare<D: Driver>(&self, runner: &Runner<D>, own: Own) -> Result<Prepared<D>, Stop> {
        let (driver, element) = (runner.driver(), if self.fp8 { Element::E4m3 } else { Element::Bf16 });
        let (x, weights) = self.operands(runner, own)?;
        let shape = (self.outputs, self.inner);
        let map = |group: usize| {
            let at = weights + (group * self.weights() * element.size()) as u64;
            if self.gated {
                let up = at + (self.outputs * self.inner * element.size()) as u64;
                maps::pair(driver, [at, up], element, shape).map(|(map, _)| map)
            } else {
                maps::rows(driver, at, element, shape, maps::TILE_ROWS)
            }
        };
        let mut encoded = vec![maps::rows(driver, x, element, (self.total(), self.inner), maps::INPUT_ROWS)?];
        if self.fp8 {
            let at = runner.f32()?.window(0, self.blocks() * self.pitch())?;
            encoded.push(maps::scales(driver, at, (self.blocks(), self.total(), self.pitch()))?);
        }
        let first = encoded.len();
        for group in 0..self.rows.len() {
            encoded.push(map(group)?);
        }
        let maps = runner.upload(&encoded)?;
        let map_at = |index: usize| runner.at(&maps) + (index * size_of_val(&encoded[0])) as u64;
        let (x, weights) = ([map_at(0), map_at(1)], (first..encoded.len()).map(map_at).collect::<Vec<u64>>());
        let weights = runner.upload(&weights)?;
        let scales = |group| if self.fp8 { runner.f32()?.window(self.scales_at(group), self.scales()) } else { Ok(0) };
        let mut scales = (0..self.rows.len()).map(scales).collect::<Result<Vec<u64>, Stop>>()?;
        let to_up = (self.outputs.div_ceil(128) * self.blocks() * size_of::<f32>()) as u64;
        scales.extend_from_within(..);
        scales[self.rows.len()..].iter_mut().for_each(|at| *at += to_up);
        let scales = runner.upload(&scales)?;
        let offsets = runner.upload(&self.offsets())?;
        let (weights_at, offsets_at) = ([runner.at(&weights), runner.at(&scales)], runner.at(&offsets));
        Ok(Prepared { _memory: vec![maps, weights, scales, offsets], x, weights: weights_at, offsets: offsets_at })
    }

    pub(crate) fn name(&self, tokens: Tokens) -> String {
        let (kind, fp8) = (if self.gated { "gated" } else { "linear" }, if self.fp8 { "_fp8" } else { "" });
        format!("sm90_grouped_{kind}{fp8}_{}", tokens.count())
    }

    /// Queues a kernel that writes to `y`.
    pub(crate) fn launch<D: Driver>(
        &self,
        driver: &D,
        tokens: Tokens,
        prepared: &Prepared<D>,
        y: u64,
    ) -> Result<(), CudaError> {
        let &Prepared { x: [x, x_scales], weights: [weights, scales], offsets: begin, .. } = prepared;
        let (end, rows, groups) = (begin + size_of::<u32>() as u64, 0, self.rows.len() as u32);
        let (inner, outputs) = (self.inner as u32, self.outputs as u32);
        let blocks = (driver.multiprocessors() * tokens.blocks_each()) as u32;
        let gated = self.gated;
        if self.fp8 {
            return GroupedProductFp8 {
                x,
                x_scales,
                weights,
                scales,
                up_scales: scales + u64::from(groups) * size_of::<u64>() as u64,
                begin,
                end,
                y,
                rows,
                groups,
                inner,
                outputs,
                gated,
                tokens,
                blocks,
            }
            .launch(driver);
        }
        GroupedProduct { x, weights, begin, end, y, rows, groups, inner, outputs, gated, tokens, blocks }.launch(driver)
    }

    /// Compares some of the results with the definition in f64.
    pub(crate) fn check<D: Driver>(&self, runner: &Runner<D>) -> Result<Option<Error>, Stop> {
        let (mut picks, mut distance) = (Picks::new(self.total() as u64), Distance::default());
        for _ in 0..CHECKED {
            let row = picks.below(self.total());
            let x = self.row(runner, row)?;
            for _ in 0..CHECKED {
                let output = picks.below(self.outputs);
                let at = row * self.outputs + output;
                let found = match self.gated {
                    true => f64::from(runner.results::<half::bf16>(at, 1)?[0]),
                    false => f64::from(runner.results::<f32>(at, 1)?[0]),
                };
                distance.add(found, self.expected(runner, (row, &x), output)?);
            }
        }
        Ok(distance.within(if self.fp8 { FP8_LIMIT } else { BF16_LIMIT }))
    }

    /// The activations of a row, scaled.
    fn row<D: Driver>(&self, runner: &Runner<D>, row: usize) -> Result<Vec<f64>, Stop> {
        let first = self.x_at() + row * self.inner;
        if !self.fp8 {
            return Ok(runner.bf16()?.values(first, self.inner));
        }
        let scale = |block: usize| Ok::<_, Stop>(runner.f32()?.values(block * self.pitch() + row, 1)[0]);
        let scales = (0..self.blocks()).map(scale).collect::<Result<Vec<f64>, Stop>>()?;
        let x = runner.e4m3()?.values(first, self.inner);
        Ok(x.iter().enumerate().map(|(k, x)| x * scales[k / 128]).collect())
    }

    fn expected<D: Driver>(&self, runner: &Runner<D>, (row, x): (usize, &[f64]), output: usize) -> Result<f64, Stop> {
        let group = self.offsets().iter().rposition(|offset| *offset as usize <= row).unwrap_or(0);
        let first = self.dot(runner, (group, x), (0, output))?;
        Ok(if self.gated { first / (1.0 + (-first).exp()) * self.dot(runner, (group, x), (1, output))? } else { first })
    }

    /// Output `output` of gate (`copy` 0) or up (1) of a group.
    fn dot<D: Driver>(
        &self,
        runner: &Runner<D>,
        (group, x): (usize, &[f64]),
        (copy, output): (usize, usize),
    ) -> Result<f64, Stop> {
        let first = group * self.weights() + (copy * self.outputs + output) * self.inner;
        if !self.fp8 {
            let weights = runner.bf16()?.values(first, self.inner);
            return Ok(x.iter().zip(weights).map(|(x, weight)| x * weight).sum());
        }
        let weights = runner.e4m3()?.values(first, self.inner);
        let at = self.scales_at(group) + (copy * self.outputs.div_ceil(128) + output / 128) * self.blocks();
        let scales = runner.f32()?.values(at, self.blocks());
        Ok(x.iter().zip(weights).enumerate().map(|(k, (x, weight))| x * weight * scales[k / 128]).sum())
    }
}
