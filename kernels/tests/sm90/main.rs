//! The kernels for sm_90a on the shim: their tiles, pipelines, masks and edges, with the plain version of the chip's primitives.
//!
//! Tile loads land late and products end late, as the seed decides, and every case runs under several seeds with the same
//! bits. With the feature `cuda` too, they run on a GPU as well, where there is one. What only the chip can show (that the primitives' PTX means what their plain version does) is not tested here.

#[path = "../cuda/driver.rs"]
mod driver;
mod each;
mod expanded;
#[path = "../cuda/expanded_case.rs"]
mod expanded_case;
mod fp8;
mod grouped;
mod latent_attention;
mod maps;
#[path = "../cuda/numbers.rs"]
#[allow(dead_code, reason = "shared with the tests of the plain kernels")]
mod numbers;
mod rates;
#[path = "../cuda/support.rs"]
#[allow(dead_code, reason = "shared with the tests of the plain kernels")]
mod support;
