//! The commands that are not services.

pub mod inspect;
mod print;
pub mod synth;
