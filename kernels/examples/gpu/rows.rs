//! What is done row by row, or head by head, by the plain kernels; and rounding to FP8.

use conclave_kernels::cuda::{
    Driver,
    plain::{
        Draw, GateSelect, Likely, METHOD_GROUP_LIMITED_GREEDY, MlaQueries, MlaValues, RULE_SCALED, RmsNorm, RowScore,
        SCORING_SOFTMAX, Sample, Score, Scored, WriteLatents,
    },
    sm90::Quantize,
};
use half::bf16;

use crate::{
    numbers::{E4m3, Number, Picks},
    runner::{Distance, Found, Runner, Stop, Work},
};

/// V2's attention: parts of a query without and with position, latent, value.
const NOPE: usize = 128;
const ROPE: usize = 64;
const LATENT: usize = 512;
const VALUE: usize = 128;
const EPS: f32 = 1e-6;
/// Most rows of products a head: rows times heads.
const QUERIES: usize = 65_536;
/// Most rows that draw a token.
const DRAWS: usize = 256;
/// Likely tokens that are asked for of a row.
const LIKELY: u32 = 20;
const CHECKED: usize = 64;

/// Times of all of them.
pub(crate) fn measure<D: Driver>(runner: &mut Runner<D>) {
    let (models, all) = (runner.sizes.models.clone(), runner.sizes.rows.clone());
    for rows in all {
        for model in &models {
            let width = model.hidden;
            runner.case(&format!("rms_norm, {rows} x {width}"), |runner| norm(runner, rows, width));
            runner.case(&format!("sm90_quantize, {rows} x {width}"), |runner| quantize(runner, rows, width));
            let name = format!("gate_select, {rows} rows, {} experts", model.experts);
            runner.case(&name, |runner| select(runner, rows, model.experts));
        }
        runner.case(&format!("write_latents, {rows} rows"), |runner| latents(runner, rows));
        for heads in runner.sizes.heads.clone().into_iter().filter(|heads| rows * heads <= QUERIES) {
            runner.case(&format!("mla_queries, {rows} rows, {heads} heads"), |runner| queries(runner, rows, heads));
            runner.case(&format!("mla_values, {rows} rows, {heads} heads"), |runner| values(runner, rows, heads));
        }
        tokens(runner, rows.min(DRAWS));
    }
}

/// Draws by each kind of settings, and scores.
fn tokens<D: Driver>(runner: &mut Runner<D>, rows: usize) {
    let greedy = Draw { u: 0.37, row: 0, mask: 0, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    let all = Draw { temperature: 0.7, ..greedy };
    let nucleus = Draw { top_p: 0.9, ..all };
    let both = Draw { top_k: 50, ..nucleus };
    for (what, draw) in [("greedy", greedy), ("of all", all), ("top-p", nucleus), ("top-k, top-p", both)] {
        runner.case(&format!("sample {what}, {rows} rows"), |runner| sample(runner, rows, draw));
    }
    runner.case(&format!("score, {rows} rows"), |runner| score(runner, rows));
}

fn found(samples: Vec<f64>, bytes: usize, distance: &Distance, limit: f64) -> Found {
    Found { samples, work: Work { bytes: bytes as f64, ..Work::default() }, error: distance.within(limit) }
}

/// The norm of a row in f64, and what its elements are multiplied with.
fn factor(x: &[f64]) -> f64 {
    let squares: f64 = x.iter().map(|x| x * x).sum();
    1.0 / (squares / x.len() as f64 + f64::from(EPS)).sqrt()
}

fn norm<D: Driver>(runner: &Runner<D>, rows: usize, width: usize) -> Result<Found, Stop> {
    let numbers = runner.f32()?;
    let (x, gain) = (numbers.window(0, rows * width)?, numbers.window(rows * width, width)?);
    let out = runner.out(rows * width * (4 + 2))?.address;
    let rounded = out + (rows * width * 4) as u64;
    let kernel = RmsNorm { x, gain, out, rounded, hidden: width as u32, eps: EPS, rows: rows as u32 };
    let samples = runner.time(|| kernel.launch(runner.driver()))?;
    let (mut distance, gain) = (Distance::default(), numbers.values(rows * width, width));
    let row = Picks::new(1).below(rows);
    let (x, found_row) = (numbers.values(row * width, width), runner.results::<f32>(row * width, width)?);
    for ((found, x_value), gain) in found_row.iter().zip(&x).zip(gain) {
        distance.add(f64::from(*found), gain * x_value * factor(&x));
    }
    Ok(found(samples, rows * width * (4 + 4 + 2), &distance, 1e-5))
}

fn quantize<D: Driver>(runner: &Runner<D>, rows: usize, width: usize) -> Result<Found, Stop> {
    let numbers = runner.bf16()?;
    let x = numbers.window(0, rows * width)?;
    let (blocks, pitch) = (width.div_ceil(128), rows.next_multiple_of(4));
    let scales_at = (rows * width).next_multiple_of(256);
    let out = runner.out(scales_at + blocks * pitch * 4)?.address;
    let (scales, rows_count) = (out + scales_at as u64, rows as u32);
    let kernel = Quantize { x, out, scales, rows: rows_count, inner: width as u32, pitch: pitch as u32 };
    let samples = runner.time(|| kernel.launch(runner.driver()))?;
    let (mut distance, row) = (Distance::default(), Picks::new(2).below(rows));
    let back: Vec<E4m3> = runner.results(row * width, width)?;
    for (at, (back, x)) in back.iter().zip(numbers.values(row * width, width)).enumerate() {
        let scale = runner.results::<f32>(scales_at / 4 + at / 128 * pitch + row, 1)?[0];
        distance.add(back.value() * f64::from(scale), x);
    }
    Ok(found(samples, rows * width * 3, &distance, 3e-2))
}

fn select<D: Driver>(runner: &Runner<D>, rows: usize, experts: usize) -> Result<Found, Stop> {
    let top_k = experts.min(6);
    let logits = runner.f32()?.window(0, rows * experts)?;
    let ids = runner.out(rows * top_k * 8)?.address;
    let kernel = GateSelect {
        logits,
        bias: 0,
        ids,
        weights: ids + (rows * top_k * 4) as u64,
        experts: experts as u32,
        groups: 1,
        top_groups: 1,
        top_k: top_k as u32,
        scoring: SCORING_SOFTMAX,
        method: METHOD_GROUP_LIMITED_GREEDY,
        rule: RULE_SCALED,
        scale: 1.0,
        rows: rows as u32,
    };
    let samples = runner.time(|| kernel.launch(runner.driver()))?;
    let (mut distance, row) = (Distance::default(), Picks::new(3).below(rows));
    let scores = runner.f32()?.values(row * experts, experts);
    let mut best: Vec<usize> = (0..experts).collect();
    best.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    best.truncate(top_k);
    best.sort_unstable();
    let chosen: Vec<u32> = runner.results(row * top_k, top_k)?;
    chosen.iter().zip(best).for_each(|(found, expected)| distance.add(f64::from(*found), expected as f64));
    Ok(found(samples, rows * (experts + 2 * top_k) * 4, &distance, 0.0))
}

fn latents<D: Driver>(runner: &Runner<D>, rows: usize) -> Result<Found, Stop> {
    let (numbers, width) = (runner.f32()?, LATENT + ROPE);
    let gain_at = rows * width;
    let (cos_at, pairs) = (gain_at + LATENT, ROPE / 2);
    let sin_at = cos_at + rows * pairs;
    let each: Vec<u32> = (0..rows as u32).collect();
    let each = runner.upload(&each)?;
    let kernel = WriteLatents {
        kv: numbers.window(0, rows * width)?,
        gain: numbers.window(gain_at, LATENT)?,
        cos: numbers.window(cos_at, rows * pairs)?,
        sin: numbers.window(sin_at, rows * pairs)?,
        positions: runner.at(&each),
        slots: runner.at(&each),
        cache: runner.out(rows * width * 2)?.address,
        latent: LATENT as u32,
        rope: ROPE as u32,
        rows: rows as u32,
    };
    let samples = runner.time(|| kernel.launch(runner.driver()))?;
    let (mut distance, row) = (Distance::default(), Picks::new(4).below(rows));
    let (kv, gain) = (numbers.values(row * width, width), numbers.values(gain_at, LATENT));
    let angle = |at: usize| numbers.values(at + row * pairs, pairs);
    let (cos, sin, factor) = (angle(cos_at), angle(sin_at), factor(&kv[..LATENT]));
    for (at, found) in runner.results::<bf16>(row * width, width)?.into_iter().enumerate() {
        let expected = match at.checked_sub(LATENT) {
            None => gain[at] * kv[at] * factor,
            Some(at) => {
                let (even, odd) = (kv[LATENT + at / 2 * 2], kv[LATENT + at / 2 * 2 + 1]);
                let (cos, sin) = (cos[at / 2], sin[at / 2]);
                if at % 2 == 0 { even * cos - odd * sin } else { odd * cos + even * sin }
            }
        };
        distance.add(found.value(), expected);
    }
    Ok(found(samples, rows * (width * 6 + ROPE * 4), &distance, 1e-2))
}

fn queries<D: Driver>(runner: &Runner<D>, rows: usize, heads: usize) -> Result<Found, Stop> {
    let (numbers, width) = (runner.f32()?, NOPE + ROPE);
    let cos = numbers.window(0, rows * ROPE / 2)?;
    let positions = runner.upload(&(0..rows as u32).collect::<Vec<u32>>())?;
    let kernel = MlaQueries {
        q: numbers.window(0, rows * heads * width)?,
        uk: runner.bf16()?.window(0, heads * LATENT * NOPE)?,
        cos,
        sin: cos,
        positions: runner.at(&positions),
        out: runner.out(rows * heads * (LATENT + ROPE) * 4)?.address,
        rows: rows as u32,
        nope: NOPE as u32,
        rope: ROPE as u32,
        latent: LATENT as u32,
        heads: heads as u32,
    };
    let samples = runner.time(|| kernel.launch(runner.driver()))?;
    let shape = Heads { rows, heads, x: width, inner: NOPE, y: LATENT + ROPE, outputs: LATENT };
    shape.found(runner, samples)
}

fn values<D: Driver>(runner: &Runner<D>, rows: usize, heads: usize) -> Result<Found, Stop> {
    let kernel = MlaValues {
        o_lat: runner.f32()?.window(0, rows * heads * LATENT)?,
        uv: runner.bf16()?.window(0, heads * VALUE * LATENT)?,
        out: runner.out(rows * heads * VALUE * 4)?.address,
        rows: rows as u32,
        latent: LATENT as u32,
        value: VALUE as u32,
        heads: heads as u32,
    };
    let samples = runner.time(|| kernel.launch(runner.driver()))?;
    Heads { rows, heads, x: LATENT, inner: LATENT, y: VALUE, outputs: VALUE }.found(runner, samples)
}

/// A product with a matrix `[outputs, inner]` a head: of rows `[rows, heads, x]` to `[rows, heads, y]`.
struct Heads {
    rows: usize,
    heads: usize,
    x: usize,
    inner: usize,
    y: usize,
    outputs: usize,
}

impl Heads {
    fn found<D: Driver>(&self, runner: &Runner<D>, samples: Vec<f64>) -> Result<Found, Stop> {
        let (mut picks, mut distance) = (Picks::new(6), Distance::default());
        for _ in 0..CHECKED {
            let (query, output) = (picks.below(self.rows * self.heads), picks.below(self.outputs));
            let x = runner.f32()?.values(query * self.x, self.inner);
            let at = (query % self.heads * self.outputs + output) * self.inner;
            let weights = runner.bf16()?.values(at, self.inner);
            let expected = x.iter().zip(weights).map(|(x, weight)| x * weight).sum();
            distance.add(f64::from(runner.results::<f32>(query * self.y + output, 1)?[0]), expected);
        }
        let (queries, weights) = (self.rows * self.heads, self.heads * self.outputs * self.inner);
        let bytes = (queries * (self.x + self.y) * 4 + weights * 2) as f64;
        let flops = 2.0 * (self.rows * weights) as f64;
        Ok(Found { samples, work: Work { bytes, flops, fp8: false }, error: distance.within(1e-2) })
    }
}

fn sample<D: Driver>(runner: &Runner<D>, rows: usize, draw: Draw) -> Result<Found, Stop> {
    let vocab = runner.sizes.vocab;
    let logits = runner.f32()?.window(0, rows * vocab)?;
    let draws: Vec<Draw> = (0..rows as u32).map(|row| Draw { row, ..draw }).collect();
    let words = vocab.div_ceil(32);
    let (draws, masks) = (runner.upload(&draws)?, runner.upload(&vec![u32::MAX; words])?);
    let kernel = Sample {
        logits,
        draws: runner.at(&draws),
        masks: runner.at(&masks),
        tokens: runner.out(rows * 4)?.address,
        vocab: vocab as u32,
        words: words as u32,
        draw_count: rows as u32,
    };
    let samples = runner.time(|| kernel.launch(runner.driver()))?;
    drawn(runner, samples, rows, |logits| expected_draw(logits, &draw))
}

/// The sum of each row's softmax and its best tokens.
fn score<D: Driver>(runner: &Runner<D>, rows: usize) -> Result<Found, Stop> {
    let (vocab, bytes) = (runner.sizes.vocab, size_of::<RowScore>());
    let logits = runner.f32()?.window(0, rows * vocab)?;
    let asked: Vec<Scored> = (0..rows as u32).map(|row| Scored { row, top: LIKELY }).collect();
    let (asked, tokens) = (runner.upload(&asked)?, runner.upload(&vec![0u32; rows])?);
    let out = runner.out(rows * (bytes + LIKELY as usize * size_of::<Likely>()))?.address;
    let kernel = Score {
        logits,
        asked: runner.at(&asked),
        tokens: runner.at(&tokens),
        out,
        likely: out + (rows * bytes) as u64,
        vocab: vocab as u32,
        pitch: LIKELY,
        rows: rows as u32,
    };
    let samples = runner.time(|| kernel.launch(runner.driver()))?;
    let row = Picks::new(8).below(rows);
    let logits = runner.f32()?.values(row * vocab, vocab);
    let best = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let found = runner.results::<f64>(row * bytes / size_of::<f64>(), 1)?[0];
    let mut distance = Distance::default();
    distance.add(found, logits.iter().map(|logit| (logit - best).exp()).sum());
    Ok(self::found(samples, rows * vocab * 4, &distance, 1e-9))
}

/// By definition: the share of each candidate, of the best `top_k`, of the fewest of these that add up to `top_p`.
fn expected_draw(logits: &[f64], draw: &Draw) -> usize {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    let best = logits[order[0]];
    if draw.temperature == 0.0 {
        return order[0];
    }
    let weight = |id: &usize| ((logits[*id] - best) / f64::from(draw.temperature)).exp();
    if draw.top_k > 0 {
        order.truncate(draw.top_k as usize);
    }
    let wanted = f64::from(draw.top_p) * order.iter().map(weight).sum::<f64>();
    let mut sum = 0.0;
    let kept = order.iter().take_while(|id| {
        let before = sum;
        sum += weight(id);
        before < wanted
    });
    let mut kept: Vec<usize> = kept.copied().collect();
    kept.sort_unstable();
    let total: f64 = kept.iter().map(weight).sum();
    let mut running = 0.0;
    let passed = kept.iter().find(|id| {
        running += weight(id);
        running > draw.u * total
    });
    passed.or(kept.last()).copied().unwrap_or(0)
}

/// Compares one row's token with the expected one.
fn drawn<D: Driver>(
    runner: &Runner<D>,
    samples: Vec<f64>,
    rows: usize,
    expected: impl Fn(&[f64]) -> usize,
) -> Result<Found, Stop> {
    let (vocab, row) = (runner.sizes.vocab, Picks::new(7).below(rows));
    let logits = runner.f32()?.values(row * vocab, vocab);
    let token = runner.results::<u32>(row, 1)?[0];
    let mut distance = Distance::default();
    distance.add(f64::from(token), expected(&logits) as f64);
    Ok(found(samples, rows * vocab * 4, &distance, 0.0))
}
