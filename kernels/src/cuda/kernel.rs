//! What the launches of all kernels have in common.

use super::{Arg, CudaError, Launch};

/// Memory of the device: what [`Driver::address`](super::Driver::address) gives, plus an offset in bytes.
pub type Address = u64;

/// How many threads run a kernel.
pub(super) struct Shape {
    pub(super) grid: [u32; 3],
    pub(super) block: u32,
    pub(super) shared: u32,
}

impl Shape {
    pub(super) fn new(grid: [u32; 3], block: u32) -> Self {
        Self { grid, block, shared: 0 }
    }

    /// With dynamic shared memory of so many bytes.
    pub(super) fn with_bytes(self, shared: u32) -> Self {
        Self { shared, ..self }
    }

    /// With dynamic shared memory for so many f32 values.
    pub(super) fn with_floats(self, floats: u32) -> Self {
        self.with_bytes(floats * 4)
    }
}

/// Hands a kernel to a queue; nothing where it has nothing to do.
pub(super) fn queue(
    queue: impl FnOnce(&Launch<'_>) -> Result<(), CudaError>,
    kernel: &'static str,
    shape: &Shape,
    arguments: &[Arg<'_>],
) -> Result<(), CudaError> {
    if shape.grid.contains(&0) {
        return Ok(());
    }
    queue(&Launch { kernel, grid: shape.grid, block: [shape.block, 1, 1], shared: shape.shared, arguments })
}

/// A kernel's arguments in order as a struct, then what else its launch depends on (`over`); `$shape` says on how many
/// threads it runs. A kernel that there are several of has a closure in place of its name.
macro_rules! kernel {
    ($(#[$about:meta])* $name:ident($kernel:literal) $($rest:tt)*) => {
        $crate::cuda::kernel::kernel! { $(#[$about])* $name(|_it| $kernel) $($rest)* }
    };
    (
        $(#[$about:meta])* $name:ident(|$it:ident| $kernel:expr) { $($(#[$what:meta])* $field:ident: $type:ty,)* }
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
                self.with(|launch| driver.launch(launch))
            }

            /// Hands it to a queue.
            ///
            /// # Errors
            /// What that meets.
            pub fn with(
                &self,
                queue: impl FnOnce(&$crate::cuda::Launch<'_>) -> Result<(), $crate::cuda::CudaError>,
            ) -> Result<(), $crate::cuda::CudaError> {
                let kernel: fn(&Self) -> &'static str = |$it| $kernel;
                let shape: fn(&Self) -> $crate::cuda::kernel::Shape = $shape;
                let arguments = [$($crate::cuda::Arg::from(self.$field)),*];
                $crate::cuda::kernel::queue(queue, kernel(self), &shape(self), &arguments)
            }
        }
    };
}
pub(super) use kernel;
