//! Launches of the plain kernels: those of `cuda/*.cu`, for any sizes. One struct a kernel, under its name; the fields are
//! its arguments in order. Where nothing is to be done, nothing is launched.

mod attention;
mod choices;
mod elementwise;
mod grouped_linear;
mod heads;
mod linear;
mod rows;
mod sample;

pub use attention::{MergeSplits, MlaSplits};
pub use choices::*;
pub use elementwise::{Add, AddTwo, DecodeBf16, RoundBf16, Swiglu};
pub use grouped_linear::{GroupedLinear, GroupedLinearFp8};
pub use heads::{MlaQueries, MlaValues};
pub use linear::{Linear, LinearF32};
pub use rows::{CombinePairs, EmbedBf16, EmbedF32, GatherBf16, RmsNorm, WriteLatents};
pub use sample::{AdjustLogits, Adjustment, Draw, Penalties, Sample};

use super::{Arg, CudaError, Driver, Launch};

/// Memory of the device: what [`Driver::address`] gives, plus an offset in bytes.
pub type Address = u64;

/// How many threads run a kernel.
struct Shape {
    grid: [u32; 3],
    block: u32,
    shared: u32,
}

impl Shape {
    fn new(grid: [u32; 3], block: u32) -> Self {
        Self { grid, block, shared: 0 }
    }

    /// With dynamic shared memory for so many f32 values.
    fn with_floats(self, floats: u32) -> Self {
        Self { shared: floats * 4, ..self }
    }
}

fn queue<D: Driver>(driver: &D, kernel: &str, shape: &Shape, arguments: &[Arg<'_>]) -> Result<(), CudaError> {
    if shape.grid.contains(&0) {
        return Ok(());
    }
    driver.launch(&Launch { kernel, grid: shape.grid, block: [shape.block, 1, 1], shared: shape.shared, arguments })
}

/// A kernel's arguments in order as a struct, then what else its launch depends on (`over`); `$shape` says on how many
/// threads it runs.
macro_rules! kernel {
    (
        $(#[$about:meta])* $name:ident($kernel:literal) { $($(#[$what:meta])* $field:ident: $type:ty,)* }
        $(over { $($(#[$over_what:meta])* $over:ident: $over_type:ty,)* })?
        => $shape:expr
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy)]
        pub struct $name {
            $($(#[$what])* pub $field: $type,)*
            $($($(#[$over_what])* pub $over: $over_type,)*)?
        }

        impl $name {
            /// Queues it.
            ///
            /// # Errors
            /// As [`Driver::launch`](crate::cuda::Driver::launch).
            pub fn launch<D: $crate::cuda::Driver>(&self, driver: &D) -> Result<(), $crate::cuda::CudaError> {
                let shape: fn(&Self) -> super::Shape = $shape;
                super::queue(driver, $kernel, &shape(self), &[$($crate::cuda::Arg::from(self.$field)),*])
            }
        }
    };
}
use kernel;
