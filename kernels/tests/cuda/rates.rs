//! What measures a chip: it must do all the work that it is timed for.

use conclave_kernels::{
    RateProbe,
    cuda::{Arg, CudaRates, Driver, Launch, Shim},
};

use crate::support::{Numbers, Rig, run};

const THREADS: u32 = 256;

fn launch(rig: &Rig, kernel: &'static str, arguments: &[Arg<'_>]) -> Result<(), conclave_kernels::cuda::CudaError> {
    rig.driver.launch(&Launch { kernel, grid: [2, 1, 1], block: [THREADS, 1, 1], shared: 0, arguments })
}

#[test]
fn everything_is_read() {
    // Less than a turn of the grid, several, and some that fill none.
    for count in [3, 4 * 512, 9 * 512 + 77] {
        let mut numbers = Numbers::new(count as u64);
        let words: Vec<u32> = (0..4 * count).map(|_| numbers.below(1 << 20)).collect();
        let sums = run(|rig| {
            let (x, out) = (rig.upload(&words), rig.poisoned::<u32>(512));
            launch(
                rig,
                "rate_reads",
                &[&x, &out]
                    .map(|memory| Arg::Address(rig.at(memory)))
                    .into_iter()
                    .chain([Arg::U64(count as u64)])
                    .collect::<Vec<_>>(),
            )?;
            Ok(rig.download::<u32>(&out, 512))
        });
        let expected = words.as_chunks::<4>().0.iter().map(|[x, y, z, w]| x ^ y ^ z ^ w).fold(0, u32::wrapping_add);
        assert_eq!(sums.into_iter().fold(0, u32::wrapping_add), expected, "{count} words");
    }
}

#[test]
fn every_round_is_multiplied() {
    let found = run(|rig| {
        let out = rig.poisoned::<f32>(512);
        launch(rig, "rate_multiply_adds", &[Arg::Address(rig.at(&out)), Arg::U32(9)])?;
        Ok(rig.download::<f32>(&out, 512))
    });
    let chain = |thread: usize, chain: u32| {
        let factor = 1.0 - 1e-7 * thread as f32;
        (0..9).fold(1e-3 * chain as f32, |sum: f32, _| sum.mul_add(factor, 1e-3))
    };
    for (at, found) in found.iter().enumerate() {
        let expected = (1..16).fold(chain(at % 256, 0), |sum, at_chain| sum + chain(at % 256, at_chain));
        assert_eq!(*found, expected, "thread {at}");
    }
}

#[test]
fn rates_have_a_name_and_are_measured() {
    for (chip, about) in [(Shim::sm90(1), "shim, bf16 on tensor cores"), (Shim::new(1), "shim, f32")] {
        let rates = CudaRates::new(chip, 1 << 16, 1).unwrap();
        assert_eq!((rates.about(), rates.host_bytes()), (about.to_owned(), 0));
        assert!(rates.read_rate().unwrap() > 0.0 && rates.multiply_add_rate().unwrap() > 0.0);
    }
}
