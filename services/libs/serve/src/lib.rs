//! What every service shares: errors, flags, telemetry, shutdown.

mod error;

pub use error::{Error, ErrorKind};
