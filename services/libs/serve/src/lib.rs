//! What every service shares: errors, flags, telemetry, shutdown, metrics, listeners and the admin endpoints.

pub mod admin;
pub mod args;
mod error;
pub mod id;
pub mod listen;
pub mod metrics;
mod process;
mod readiness;
pub mod shutdown;
mod startup;
pub mod telemetry;
mod trace_context;

pub use error::{Error, ErrorKind};
pub use readiness::{Readiness, State};
