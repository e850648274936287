//! The kernels for sm_90a on the shim: their tiles, pipelines, masks and edges, with the plain version of the chip's primitives.
//!
//! Tile loads land late and products end late, as the seed decides, and every case runs under several seeds with the same
//! bits. What only the chip can show (that the primitives' PTX means what their plain version does) is not tested here.

mod fp8;
mod grouped;
mod latent_attention;
mod maps;
#[path = "../cuda/support.rs"]
#[allow(dead_code, reason = "shared with the tests of the plain kernels")]
mod support;
