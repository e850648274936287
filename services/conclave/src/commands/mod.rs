//! The commands that are not services.

pub mod bench;
pub mod chat;
pub mod generate;
pub mod inspect;
mod print;
mod retry;
mod sampling;
mod speed;
pub mod synth;

pub use retry::{Pauses, RetryArgs};
pub use sampling::SamplingArgs;
pub use speed::Speed;

use std::{
    error::Error,
    fmt::Display,
    io::{self, Write},
};

use anyhow::Result;

/// What may help whoever asked something else than a router's gRPC API.
const EXPECTED_GRPC: &str = "expected the gRPC address of a router (its --grpc, 127.0.0.1:50051 by default)";

/// Says something on standard error, a line; whoever read it may have gone, as `head` does.
pub fn say(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// The innermost reason of an error, which says most.
fn cause(error: &dyn Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// Whoever read the output has gone, as `head` does: that is an end, not an error.
fn unless_reader_gone(ended: Result<()>) -> Result<()> {
    let gone = |error: &anyhow::Error| {
        error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    ended.or_else(|error| if gone(&error) { Ok(()) } else { Err(error) })
}
