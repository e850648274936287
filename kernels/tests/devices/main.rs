//! All devices of this machine against each other and against themselves.

mod agreement;
mod exactness;
mod expanded;
mod support;
