//! The kernels of `cuda/` on the shim, each against a definition of its own in Rust.

mod elementwise;
mod linear;
mod shim;
mod support;
