//! What every service shares: errors, flags, telemetry, shutdown, metrics, listeners, lanes and the admin endpoints.

pub mod admin;
pub mod args;
mod error;
pub mod flow;
pub mod id;
pub mod lane;
pub mod listen;
mod maker;
pub mod metrics;
mod process;
mod readiness;
pub mod same_host;
pub mod shutdown;
mod startup;
pub mod telemetry;
mod trace_context;

pub use error::{Error, ErrorKind};
pub use lane::{Lane, Stirrer, turn};
pub use readiness::{Readiness, State};
