//! The operations by definition: plain Rust, f32 throughout, one row (or head, or panel) at a time.
//!
//! These are the specification that devices are tested against, and the body of the reference device.

pub(crate) mod attention;
pub(crate) mod embed;
pub(crate) mod grouped_ffn;
pub(crate) mod latents;
pub(crate) mod linear;
pub(crate) mod queries;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod swiglu;
pub(crate) mod values;
