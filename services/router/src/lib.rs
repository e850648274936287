//! The router service: public API, front and dispatch host.
