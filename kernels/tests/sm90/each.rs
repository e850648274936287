//! Cases on the shim, and on a GPU where there is one.

use bytemuck::{Pod, cast_slice};
use conclave_kernels::cuda::CudaError;

use crate::support::{Rig, SEEDS};

/// What a case gives, by what it ran on: the shim, under all schedules with the same bits; and a GPU with code for sm_90a,
/// twice with the same bits. The two need not agree in bits: tensor cores add in their own way.
pub(crate) fn on_each<T: Pod>(case: impl Fn(&Rig) -> Result<Vec<T>, CudaError>) -> Vec<(&'static str, Vec<T>)> {
    let shim = ("shim", same(SEEDS.map(Rig::shim), &case).unwrap());
    std::iter::once(shim).chain(on_gpu(&case).map(|found| ("GPU", found))).collect()
}

#[cfg(not(feature = "cuda"))]
fn on_gpu<T: Pod>(_case: impl Fn(&Rig) -> Result<Vec<T>, CudaError>) -> Option<Vec<T>> {
    None
}

/// None where there is no GPU, or one that has no code: both fail under `REQUIRE_GPU=1`.
#[cfg(feature = "cuda")]
fn on_gpu<T: Pod>(case: impl Fn(&Rig) -> Result<Vec<T>, CudaError>) -> Option<Vec<T>> {
    use std::io::{self, Write};

    use crate::driver::{Any, gpu};

    let gpu = gpu()?;
    match same([(); 2].map(|()| Rig { driver: Any::Gpu(gpu) }), case) {
        Err(error @ CudaError::NoKernel { .. }) => {
            assert!(std::env::var("REQUIRE_GPU").as_deref() != Ok("1"), "REQUIRE_GPU=1: {error}");
            // Not by `println`, which the test harness shows of failing tests only.
            let _ = writeln!(io::stderr(), "SKIP kernels for sm_90a on a GPU: {error}");
            None
        }
        found => Some(found.unwrap()),
    }
}

fn same<T: Pod, const N: usize>(
    rigs: [Rig; N],
    case: impl Fn(&Rig) -> Result<Vec<T>, CudaError>,
) -> Result<Vec<T>, CudaError> {
    let first = case(&rigs[0])?;
    for rig in &rigs[1..] {
        assert!(same_bits(&case(rig)?, &first), "other bits in another run");
    }
    Ok(first)
}

/// Whether two results are the same, NaN included.
pub(crate) fn same_bits<T: Pod>(a: &[T], b: &[T]) -> bool {
    cast_slice::<T, u8>(a) == cast_slice::<T, u8>(b)
}
