//! Cases on the shim, and on a GPU where there is one.

use bytemuck::{Pod, cast_slice};
use conclave_kernels::cuda::CudaError;

use crate::support::{Rig, SEEDS};

/// What a case gives, by what it ran on: the shim, under all schedules with the same bits; and a GPU with code for sm_90a,
/// twice with the same bits. The two need not agree in bits: tensor cores add in their own way.
pub(crate) fn on_each<T: Pod>(case: impl Fn(&Rig) -> Result<Vec<T>, CudaError>) -> Vec<(&'static str, Vec<T>)> {
    let mut all = vec![("shim", same(SEEDS.map(Rig::shim), &case).unwrap())];
    #[cfg(feature = "cuda")]
    if let Some(gpu) = crate::driver::gpu() {
        let rigs = [(); 2].map(|()| Rig { driver: crate::driver::Any::Gpu(gpu) });
        match same(rigs, &case) {
            Err(error @ CudaError::NoKernel { .. }) => eprintln!("SKIP kernels for sm_90a on a GPU: {error}"),
            found => all.push(("GPU", found.unwrap())),
        }
    }
    all.shrink_to_fit();
    all
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
