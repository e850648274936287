//! What the card gives at most, beside the rates that everything is measured against.

use std::time::Instant;

use conclave_kernels::{
    RateProbe,
    cuda::{Driver, plain::Add},
};

use crate::runner::{Found, Runner, Stop, Work};

/// Bytes that go to the card and back at once, and launches in a row.
const COPIED: usize = 256 << 20;
const LAUNCHES: usize = 1000;

/// Somebody else's code, which ours is compared with.
pub(crate) trait Yardstick {
    /// As it is called.
    fn name(&self) -> &'static str;
    /// Whether it has products.
    fn multiplies(&self) -> bool;
    /// Seconds of runs of `[rows, inner] · [outputs, inner]ᵀ` in bf16.
    ///
    /// # Errors
    /// When the library refuses it or the device fails.
    fn product(&self, rows: usize, outputs: usize, inner: usize) -> Result<Vec<f64>, Stop>;
    /// What the driver's calls take.
    fn copies(&self) -> Vec<(&'static str, Result<Found, Stop>)>;
}

/// Measures the card.
pub(crate) fn measure<D: Driver>(runner: &mut Runner<D>) {
    let (read, runs) = (runner.sizes.read as f64, runner.sizes.runs);
    let bytes = |bytes: f64| Work { bytes, ..Work::default() };
    runner.case("reads of memory", |runner| {
        let rates = (0..runs).map(|_| runner.rates().read_rate()).collect::<Result<Vec<f64>, _>>()?;
        Ok(Found { samples: rates.iter().map(|rate| read / rate).collect(), work: bytes(read), error: None })
    });
    runner.case("multiply-adds, 10^12 of them", |runner| {
        if runner.peak_given {
            return Err(Stop::Skip("the peak was given".to_owned()));
        }
        let rates = (0..runs).map(|_| runner.rates().multiply_add_rate()).collect::<Result<Vec<f64>, _>>()?;
        let samples = rates.iter().map(|rate| 1e12 / rate).collect();
        Ok(Found { samples, work: Work { flops: 2e12, ..Work::default() }, error: None })
    });
    runner.case("a launch", |runner| {
        let one = one(runner)?;
        Ok(Found { samples: runner.time(|| one.launch(runner.driver()))?, work: Work::default(), error: None })
    });
    runner.case("a launch, of many in a row", launches);
    let copied = COPIED.min(runner.sizes.out);
    runner.case("from pageable memory", |runner| copies(runner, copied, false));
    runner.case("to pageable memory", |runner| copies(runner, copied, true));
    let side = runner.sizes.square;
    if let Some(yardstick) = runner.yardstick.take() {
        for (name, found) in yardstick.copies() {
            runner.case(name, |_| found);
        }
        runner.case(&format!("{}, {side} x {side} x {side}", yardstick.name()), |_| {
            let flops = 2.0 * (side as f64).powi(3);
            Ok(Found {
                samples: yardstick.product(side, side, side)?,
                work: Work { flops, ..Work::default() },
                error: None,
            })
        });
        runner.yardstick = Some(yardstick);
    }
}

/// The smallest kernel.
fn one<D: Driver>(runner: &Runner<D>) -> Result<Add, Stop> {
    let (x, delta) = (runner.out(4)?.address, runner.f32()?.window(0, 1)?);
    Ok(Add { x, delta, n: 1 })
}

/// The device's time of one of many.
fn launches<D: Driver>(runner: &Runner<D>) -> Result<Found, Stop> {
    let one = one(runner)?;
    let many = || (0..LAUNCHES).try_for_each(|_| one.launch(runner.driver()));
    let samples = runner.time(many)?.into_iter().map(|seconds| seconds / LAUNCHES as f64).collect();
    Ok(Found { samples, work: Work::default(), error: None })
}

/// By the host's clock: an upload, or a download, which waits for its end.
fn copies<D: Driver>(runner: &Runner<D>, bytes: usize, back: bool) -> Result<Found, Stop> {
    let mut host = vec![1u8; bytes];
    let memory = runner.driver().allocate(bytes)?;
    let run = |host: &mut [u8]| {
        let started = Instant::now();
        match back {
            true => runner.driver().download(&memory, 0, host)?,
            false => {
                runner.driver().upload(&memory, 0, host)?;
                runner.driver().download(&memory, 0, &mut [0])?;
            }
        }
        Ok::<_, Stop>(started.elapsed().as_secs_f64())
    };
    run(&mut host)?;
    let samples = (0..runner.sizes.runs).map(|_| run(&mut host)).collect::<Result<Vec<f64>, Stop>>()?;
    Ok(Found { samples, work: Work { bytes: bytes as f64, ..Work::default() }, error: None })
}
