//! The attention service: engine, scheduler, latent cache, sampler.
