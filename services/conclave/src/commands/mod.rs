//! The commands that are not services.

pub mod bench;
