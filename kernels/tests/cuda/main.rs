//! The kernels of `cuda/` on the shim, each against a definition of its own in Rust; under the feature `cuda` on a GPU too.

mod attention;
mod choices;
mod driver;
mod elementwise;
mod expanded;
mod expanded_case;
mod fp8;
mod grouped_linear;
mod heads;
mod linear;
mod numbers;
mod rates;
mod rows;
mod sample;
mod shim;
mod support;
