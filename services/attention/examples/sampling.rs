//! How long the way from logits to a token takes, on one thread:
//! `cargo run --release -p conclave-attention --example sampling [vocabulary]`.

use std::time::Instant;

use conclave_attention::sampler::{History, LogSoftmax, Params, Position, TokenMask, check_finite, found, sample};
use conclave_proto::v1::Sampling;

/// Draws of one measurement.
const DRAWS: u32 = 50;
/// Measurements.
const ROUNDS: usize = 9;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let vocab = std::env::args().nth(1).map_or(Ok(102_400), |vocab| vocab.parse())?;
    let logits: Vec<f32> = (0..vocab).map(logit).collect();
    let mask = TokenMask::new(vocab, |id| (id as usize) < vocab - vocab / 100);
    let history = History::new(&(0..500).collect::<Vec<_>>(), 400);
    println!("{vocab} logits; microseconds, min / median / max of {ROUNDS}");

    show("finite", || check_finite(&logits, 0).expect("numbers"));
    let plain = Sampling { temperature: 1.0, top_p: 1.0, repetition_penalty: 1.0, ..Sampling::default() };
    let penalty = Sampling { repetition_penalty: 1.1, ..plain.clone() };
    for (name, sampling) in [
        ("greedy", Sampling { temperature: 0.0, ..plain.clone() }),
        ("greedy, penalty", Sampling { temperature: 0.0, ..penalty }),
        ("temperature 1", plain.clone()),
        ("top-k 50", Sampling { top_k: 50, ..plain.clone() }),
        ("top-p 0.95", Sampling { top_p: 0.95, ..plain.clone() }),
        ("top-k 50, top-p 0.95", Sampling { top_k: 50, top_p: 0.95, ..plain.clone() }),
        ("min-p 0.05", Sampling { min_p: 0.05, ..plain.clone() }),
    ] {
        let params = Params::new(&sampling, vocab)?;
        let mut position = 0;
        show(name, || {
            position += 1;
            let at = Position { position, choice: 0, history: &history, banned: &[] };
            sample(&params, &mask, &logits, at).expect("a token");
        });
    }
    show("logprob", || _ = LogSoftmax::new(&logits).logprob(7));
    show("logprob and 20 best", || _ = found(&logits, 7, Some(20)));
    Ok(())
}

/// A few stand out of a bell, as a trained model's do.
fn logit(id: usize) -> f32 {
    let uniform = |step: usize| ((id * step) % 10_007) as f32 / 10_007.0 - 0.5;
    let bell = 4.0 * (uniform(7919) + uniform(104_729) + uniform(611_953) + uniform(1_299_709));
    if id % 2003 == 7 { 14.0 + bell } else { bell }
}

fn show(name: &str, mut call: impl FnMut()) {
    let mut times: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            (0..DRAWS).for_each(|_| call());
            start.elapsed().as_secs_f64() * 1e6 / f64::from(DRAWS)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("{name:24} {:8.0} {:8.0} {:8.0}", times[0], times[ROUNDS / 2], times[ROUNDS - 1]);
}
