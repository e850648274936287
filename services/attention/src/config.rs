//! What an attention service is started with.

use std::fmt;
use std::time::Duration;

use conclave_kernels::Device;
use conclave_model::{Checkpoint, ModelConfig, Progress};
use conclave_proto::InstanceId;

use crate::AttentionError;
use crate::sampler::TokenMask;
use crate::scheduler::{Limits, MicroBatches};
use crate::trunk::{TrunkSize, block_bytes};

/// Size of the latent cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheSize {
    /// Blocks of 64 positions.
    Blocks(u32),
    /// Bytes over all layers; what fits into it.
    Bytes(u64),
}

impl fmt::Display for CacheSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocks(blocks) => write!(f, "{blocks} blocks"),
            Self::Bytes(bytes) => write!(f, "{bytes} bytes"),
        }
    }
}

/// Settings of an attention service.
#[derive(Debug, Clone)]
pub struct AttentionConfig {
    /// This process among the members.
    pub instance: InstanceId,
    /// Latent cache.
    pub cache: CacheSize,
    /// Sequences that hold cache blocks at the same time.
    pub max_running: usize,
    /// Requests that may wait beside them; more are refused.
    pub max_waiting: usize,
    /// Rows of one step at most.
    pub step_tokens: usize,
    /// Rows of one prompt in one step at most.
    pub prefill_chunk: usize,
    /// While sequences decode, a step takes along as many rows of prompts as are expected to keep it within this time,
    /// but never fewer than [`FLOOR`](crate::scheduler::FLOOR).
    pub step_target: Duration,
    /// How many micro-batches of a step are under way together.
    pub micro_batches: MicroBatches,
    /// Longest sequence; `None`: what the model states, or as many as the cache holds if that is less.
    pub context_limit: Option<usize>,
    /// Most likely tokens that may be asked for beside a token.
    pub max_logprobs: usize,
    /// Whether sequences begin with what the cache has of their prefix.
    pub prefix_cache: bool,
    /// Whether bits must not depend on how rows come together. If they may, long spans of a prompt attend over expanded keys
    /// and values, and every event says that it is inexact.
    pub exact: bool,
    /// Ids that may be sampled; `None`: all of the vocabulary.
    pub allowed_tokens: Option<TokenMask>,
    /// How long a request without a deadline is repeated when its experts cannot be reached.
    pub moe_retry_limit: Duration,
    /// Told about loading.
    pub progress: Progress,
}

impl AttentionConfig {
    /// The defaults for a named member.
    pub fn new(instance: InstanceId) -> Self {
        Self {
            instance,
            cache: CacheSize::Bytes(1 << 30),
            max_running: 64,
            max_waiting: 256,
            step_tokens: 512,
            prefill_chunk: 512,
            step_target: Duration::from_millis(250),
            micro_batches: MicroBatches::Auto,
            context_limit: None,
            max_logprobs: 256,
            prefix_cache: true,
            exact: true,
            allowed_tokens: None,
            moe_retry_limit: Duration::from_secs(30),
            progress: Progress::default(),
        }
    }

    /// How much a trunk is to be made for: all that can be known before minutes are spent on loading it.
    ///
    /// # Errors
    /// When a setting contradicts another one, the model or the device, or memory does not suffice.
    pub fn size<D: Device>(&self, device: &D, checkpoint: &Checkpoint) -> Result<TrunkSize, AttentionError> {
        self.limits(D::BLOCK)?;
        self.mask(checkpoint.config().vocab)?;
        let blocks = self.blocks(block_bytes(device, checkpoint.config()))?;
        let context_limit = self.context(checkpoint.config(), blocks as usize * D::BLOCK)?;
        let size = TrunkSize { blocks, context_limit, exact: self.exact };
        size.check(device, checkpoint)?;
        Ok(size)
    }

    /// Bounds of a step.
    ///
    /// # Errors
    /// When a bound is zero or two contradict each other.
    pub(crate) fn limits(&self, block: usize) -> Result<Limits, AttentionError> {
        for (field, value) in [("max_running", self.max_running), ("prefill_chunk", self.prefill_chunk)] {
            if value == 0 {
                return Err(AttentionError::config(field, "0", "at least 1"));
            }
        }
        if self.step_tokens < self.max_running {
            let expected = format!("at least max_running, {}", self.max_running);
            return Err(AttentionError::config("step_tokens", self.step_tokens, expected));
        }
        Ok(Limits {
            step_tokens: self.step_tokens,
            prefill_chunk: self.prefill_chunk,
            max_running: self.max_running,
            block,
        })
    }

    /// Blocks of the cache, when one takes `block_bytes`.
    ///
    /// # Errors
    /// When not one block fits.
    pub(crate) fn blocks(&self, block_bytes: u64) -> Result<u32, AttentionError> {
        let blocks = match self.cache {
            CacheSize::Blocks(blocks) => blocks,
            // Slot numbers have 32 bits.
            CacheSize::Bytes(bytes) => (bytes / block_bytes.max(1)).min(1 << 24) as u32,
        };
        if blocks == 0 {
            let expected = format!("at least one block of {block_bytes} bytes");
            return Err(AttentionError::config("cache", self.cache, expected));
        }
        Ok(blocks)
    }

    /// Longest sequence, when the cache holds `positions`.
    ///
    /// # Errors
    /// When a longer one is asked for than the model or the cache allows.
    pub(crate) fn context(&self, model: &ModelConfig, positions: usize) -> Result<usize, AttentionError> {
        let Some(asked) = self.context_limit else {
            return Ok(model.max_position.min(positions));
        };
        if asked == 0 || asked > model.max_position {
            let expected = format!("1 to the model's {}", model.max_position);
            return Err(AttentionError::config("context_limit", asked, expected));
        }
        if asked > positions {
            let expected = format!("at most the {positions} positions that the cache holds");
            return Err(AttentionError::config("context_limit", asked, expected));
        }
        Ok(asked)
    }

    /// Ids that may be sampled.
    ///
    /// # Errors
    /// When the mask was made for another vocabulary or allows nothing.
    pub(crate) fn mask(&self, vocab: usize) -> Result<TokenMask, AttentionError> {
        let Some(mask) = &self.allowed_tokens else {
            return Ok(TokenMask::new(vocab, |_| true));
        };
        if mask.vocab() != vocab || mask.count() == 0 {
            let found = format!("{} of {} ids", mask.count(), mask.vocab());
            return Err(AttentionError::config("allowed_tokens", found, format!("some of {vocab} ids")));
        }
        Ok(mask.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AttentionConfig {
        AttentionConfig::new(InstanceId("a".into()))
    }

    #[test]
    fn bounds_are_cross_checked() {
        assert!(config().limits(64).is_ok());
        let narrow = AttentionConfig { step_tokens: 8, max_running: 9, ..config() };
        assert_eq!(
            narrow.limits(64).unwrap_err().to_string(),
            "step_tokens: found 8, expected at least max_running, 9"
        );
        let none = AttentionConfig { prefill_chunk: 0, ..config() };
        assert!(none.limits(64).unwrap_err().to_string().starts_with("prefill_chunk"));
    }

    #[test]
    fn cache_bytes_become_blocks() {
        let of = |cache| AttentionConfig { cache, ..config() }.blocks(1000);
        assert_eq!(of(CacheSize::Bytes(3999)).unwrap(), 3);
        assert_eq!(of(CacheSize::Blocks(7)).unwrap(), 7);
        let error = of(CacheSize::Bytes(999)).unwrap_err().to_string();
        assert_eq!(error, "cache: found 999 bytes, expected at least one block of 1000 bytes");
    }

    #[test]
    fn a_mask_must_fit_the_vocabulary() {
        let of = |mask| AttentionConfig { allowed_tokens: Some(mask), ..config() }.mask(100);
        assert_eq!(of(TokenMask::new(100, |id| id < 90)).unwrap().count(), 90);
        assert!(of(TokenMask::new(101, |_| true)).is_err());
        assert!(of(TokenMask::new(100, |_| false)).is_err());
        assert_eq!(config().mask(5).unwrap().count(), 5);
    }
}
