//! The shim itself: what it must find, and what it must do as a GPU does.

use conclave_kernels::cuda::{Arg, CudaError, Driver, Launch, Shim};

use crate::support::Rig;

fn launch<D: Driver>(driver: &D, kernel: &'static str, threads: u32, arguments: &[Arg<'_>]) -> Result<(), CudaError> {
    let (grid, block) = ([1, 1, 1], [threads, 1, 1]);
    driver.launch(&Launch { kernel, grid, block, shared: 128, arguments })
}

/// How many of 20 schedules give the right result of a kernel that reverses `n` numbers.
fn right(kernel: &'static str, n: u32, barrier: u32) -> usize {
    let x: Vec<f32> = (0..n).map(|at| at as f32).collect();
    let reversed: Vec<f32> = x.iter().rev().copied().collect();
    let runs = |seed| {
        let rig = Rig::shim(seed);
        let (x, out) = (rig.upload(&x), rig.poisoned::<f32>(n as usize));
        let arguments = [Arg::Address(rig.at(&x)), Arg::Address(rig.at(&out)), Arg::U32(barrier)];
        launch(&rig.driver, kernel, n, &arguments).unwrap();
        rig.download::<f32>(&out, n as usize) == reversed
    };
    (0..20).filter(|seed| runs(*seed)).count()
}

#[test]
fn a_missing_barrier_shows() {
    for (kernel, threads) in [("planted_missing_barrier", 256), ("planted_missing_warp_barrier", 32)] {
        assert_eq!(right(kernel, threads, 1), 20, "{kernel} with its barrier");
        assert!(right(kernel, threads, 0) < 20, "{kernel} without its barrier: right under all schedules");
    }
}

#[test]
fn a_barrier_that_not_all_come_to_is_named() {
    for (named, part) in [(0, "32 of 64 at barrier 0"), (1, "")] {
        let result = launch(&Shim::new(3), "planted_divergent_barrier", 96, &[Arg::U32(named)]);
        if named == 1 {
            result.unwrap();
            continue;
        }
        let error = result.unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("planted_divergent_barrier"), "{error}");
    }
}

#[test]
fn unwritten_shared_memory_is_no_number() {
    let rig = Rig::shim(0);
    let out = rig.upload(&[0f32; 32]);
    launch(&rig.driver, "planted_unwritten_shared", 32, &[Arg::Address(rig.at(&out))]).unwrap();
    assert!(rig.download::<f32>(&out, 32).iter().all(|value| value.is_nan()));
}

#[test]
#[should_panic(expected = "wrote outside a buffer of 128 bytes")]
fn a_write_past_a_buffer_is_found_when_it_is_freed() {
    let rig = Rig::shim(0);
    let out = rig.poisoned::<f32>(32);
    launch(&rig.driver, "planted_overrun", 64, &[Arg::Address(rig.at(&out)), Arg::U32(32)]).unwrap();
}

/// Reads one element too many of a buffer.
#[test]
#[ignore = "AddressSanitizer ends the process: for asan.sh"]
fn overrun_of_a_buffer() {
    let rig = Rig::shim(0);
    let (x, out) = (rig.upload(&[1f32; 255]), rig.poisoned::<f32>(256));
    let arguments = [Arg::Address(rig.at(&x)), Arg::Address(rig.at(&out)), Arg::U32(1)];
    let _ = launch(&rig.driver, "planted_missing_barrier", 256, &arguments);
}

/// Writes one element too many of a shared array.
#[test]
#[ignore = "AddressSanitizer ends the process: for asan.sh"]
fn overrun_of_a_shared_array() {
    let rig = Rig::shim(0);
    let out = rig.poisoned::<f32>(32);
    let _ = launch(&rig.driver, "planted_shared_overrun", 33, &[Arg::Address(rig.at(&out)), Arg::U32(32)]);
}

#[test]
fn loops_that_wait_let_others_run() {
    for seed in 0..5 {
        let rig = Rig::shim(seed);
        let word = rig.upload(&[0u32]);
        launch(&rig.driver, "planted_spin", 2, &[Arg::Address(rig.at(&word)), Arg::U32(1)]).unwrap();
    }
    let rig = Rig::shim(0);
    let word = rig.upload(&[0u32]);
    let error = launch(&rig.driver, "planted_spin", 2, &[Arg::Address(rig.at(&word)), Arg::U32(0)]).unwrap_err();
    assert!(error.to_string().contains("what never comes"), "{error}");
}

#[test]
fn lanes_exchange_values() {
    let rig = Rig::shim(4);
    let out = rig.poisoned::<u32>(128);
    launch(&rig.driver, "exchanges", 32, &[Arg::Address(rig.at(&out))]).unwrap();
    let found = rig.download::<u32>(&out, 128);
    let votes: u32 = (0..32).filter(|lane| lane % 3 == 0).map(|lane| 1u32 << lane).sum();
    for lane in 0..32u32 {
        let at = lane as usize;
        assert_eq!(found[at], lane ^ 5);
        assert_eq!(found[32 + at], if lane + 3 < 32 { lane + 3 } else { lane });
        assert_eq!(found[64 + at], votes);
        assert_eq!(found[96 + at], if lane < 16 { 7 } else { lane / 8 * 8 + 2 });
    }
}

#[test]
fn launches_that_do_not_fit_are_refused() {
    let shim = Shim::new(0);
    let error =
        |kernel, threads, arguments: &[Arg<'_>]| launch(&shim, kernel, threads, arguments).unwrap_err().to_string();
    let missing = error("no_such", 32, &[]);
    assert_eq!(missing, "kernel no_such: not among the kernels that the shim was built from");
    let count = error("exchanges", 32, &[]);
    assert_eq!(count, "kernel exchanges: found 0 arguments, expected 1");
    let size = error("exchanges", 32, &[Arg::U32(1)]);
    assert_eq!(size, "kernel exchanges: argument 0: found 4 bytes, expected 8");
    let threads = error("exchanges", 1025, &[Arg::U64(0)]);
    assert_eq!(threads, "kernel exchanges: found a block of 1025 threads, expected 1 to 1024");
}

#[test]
fn marks_tell_how_long_what_lies_between_them_took() {
    let rig = Rig::shim(3);
    let (x, out) = (rig.upload(&[1.0f32; 256]), rig.poisoned::<f32>(256));
    let reverse = [Arg::Address(rig.at(&x)), Arg::Address(rig.at(&out)), Arg::U32(1)];
    let [first, second] = [(); 2].map(|()| rig.driver.mark().unwrap());
    for _ in 0..20 {
        launch(&rig.driver, "planted_missing_barrier", 256, &reverse).unwrap();
    }
    let third = rig.driver.mark().unwrap();
    let (nothing, work) = (rig.driver.seconds(&first, &second).unwrap(), rig.driver.seconds(&second, &third).unwrap());
    assert!(nothing >= 0.0 && work > nothing, "{work} s for 20 launches, {nothing} s for none");
}
