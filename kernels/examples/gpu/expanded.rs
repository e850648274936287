//! Attention over expanded keys and values, of one sequence.

use conclave_kernels::cuda::{
    Driver, Element,
    sm90::{LATENT, MlaExpanded, ROPE, maps},
};

use crate::{
    numbers::Picks,
    runner::{Distance, Found, Runner, Stop, Work},
    sizes::Queries,
};

const PAGE: usize = 64;
const NOPE: usize = 128;
const VALUE: usize = 128;
const WIDTH: usize = NOPE + ROPE;
const CACHED: usize = LATENT + ROPE;
/// Scores are products of 192 numbers in -1..1.
const SCALE: f32 = 0.2;
/// Queries that are compared with the definition.
const CHECKED: usize = 3;

/// Where queries, keys and values, and cache begin among the numbers.
struct Places {
    kv: usize,
    cache: usize,
    keys: usize,
}

impl Places {
    fn of(queries: Queries) -> Self {
        let keys = queries.context.next_multiple_of(PAGE);
        let kv = (queries.rows * queries.heads * WIDTH).next_multiple_of(128);
        Self { kv, cache: kv + keys * queries.heads * (NOPE + VALUE), keys }
    }
}

/// The rows of one sequence over all its keys at once, which follow one another in the cache.
pub(crate) fn time<D: Driver>(runner: &Runner<D>, queries: Queries) -> Result<Found, Stop> {
    let (Queries { heads, rows, context, .. }, places) = (queries, Places::of(queries));
    let width = heads * (NOPE + VALUE);
    let numbers = runner.bf16()?;
    let map = |at, total, inner| -> Result<_, Stop> {
        let address = numbers.window(at, total * inner)?;
        let map = maps::rows(runner.driver(), address, Element::Bf16, (total, inner), maps::TILE_ROWS)?;
        Ok(runner.upload(&[map])?)
    };
    let q = map(0, heads * rows, WIDTH)?;
    let (kv, cache) = (map(places.kv, places.keys, width)?, map(places.cache, places.keys, CACHED)?);
    let blocks = runner.upload(&(0..(places.keys / PAGE) as u32).collect::<Vec<_>>())?;
    let kernel = MlaExpanded {
        q: runner.at(&q),
        kv: runner.at(&kv),
        cache: runner.at(&cache),
        blocks: runner.at(&blocks),
        sums: runner.out(rows * heads * (2 + VALUE) * 4)?.address,
        position: (context - rows) as u32,
        first: 0,
        count: context as u32,
        rows: rows as u32,
        heads: heads as u32,
        fresh: 1,
        scale: SCALE,
    };
    let samples = runner.time(|| kernel.launch(runner.driver()))?;
    let pairs: usize = (0..rows).map(|row| queries.keys(row) * heads).sum();
    let bytes = (context * (width + ROPE) + rows * heads * WIDTH) * 2 + rows * heads * (2 + VALUE) * 4;
    let work = Work { bytes: bytes as f64, flops: 2.0 * (pairs * (WIDTH + VALUE)) as f64, fp8: false };
    let (mut picks, mut distance) = (Picks::new(4), Distance::default());
    for _ in 0..CHECKED {
        let (row, head) = (picks.below(rows), picks.below(heads));
        let found: Vec<f32> = runner.results((row * heads + head) * (2 + VALUE), 2 + VALUE)?;
        let expected = expected(runner, queries, (row, head))?;
        found[2..].iter().zip(expected).for_each(|(sum, mean)| distance.add(f64::from(sum / found[1]), mean));
    }
    Ok(Found { samples, work, error: distance.within(1e-2) })
}

/// The mean of the values that a row sees, by definition in f64.
fn expected<D: Driver>(runner: &Runner<D>, queries: Queries, (row, head): (usize, usize)) -> Result<Vec<f64>, Stop> {
    let (numbers, places) = (runner.bf16()?, Places::of(queries));
    let q = numbers.values((head * queries.rows + row) * WIDTH, WIDTH);
    let kv = |key: usize| numbers.values(places.kv + (key * queries.heads + head) * (NOPE + VALUE), NOPE + VALUE);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let score = |key: usize| {
        let roped = numbers.values(places.cache + key * CACHED + LATENT, ROPE);
        (dot(&q[..NOPE], &kv(key)[..NOPE]) + dot(&q[NOPE..], &roped)) * f64::from(SCALE)
    };
    let scores: Vec<f64> = (0..queries.keys(row)).map(score).collect();
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut sums, mut total) = (vec![0.0; VALUE], 0.0);
    for (key, score) in scores.iter().enumerate() {
        let weight = (score - most).exp();
        total += weight;
        sums.iter_mut().zip(&kv(key)[NOPE..]).for_each(|(sum, value)| *sum += weight * value);
    }
    Ok(sums.into_iter().map(|sum| sum / total).collect())
}
