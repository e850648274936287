//! Pairs: rows and sums go from device to device, past the messages; with the same bits, whatever happens to one side.

mod gated;
mod ipc;
mod nccl;
mod process;
mod rig;
#[path = "../support/mod.rs"]
mod support;
