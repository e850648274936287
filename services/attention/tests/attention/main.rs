//! The service on a tiny model, with routed experts that are a fixed function of each row.

mod bits;
mod common;
mod device;
mod grpc;
mod inexact;
mod service;
