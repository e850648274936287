//! The kernels of `cuda/` on the shim, each against a definition of its own in Rust.

mod attention;
mod choices;
mod elementwise;
mod grouped_linear;
mod heads;
mod linear;
mod rows;
mod sample;
mod shim;
mod support;
