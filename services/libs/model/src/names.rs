//! Names of tensors in a checkpoint (MODEL §2).

/// Embedding table `[vocab, H]`.
pub fn embed() -> String {
    "model.embed_tokens.weight".into()
}

/// Gain of the final norm `[H]`.
pub fn final_norm() -> String {
    "model.norm.weight".into()
}

/// Output projection `[vocab, H]`.
pub fn lm_head() -> String {
    "lm_head.weight".into()
}

/// How the names of scales end.
pub(crate) const SCALES: &str = "_scale_inv";

/// The scales of an FP8 weight, one a block of 128 × 128: they multiply, despite their name.
pub fn scales(weight: &str) -> String {
    format!("{weight}{SCALES}")
}

/// Whether a tensor is, or scales, what expands keys and values, which devices get as one matrix a head.
pub fn is_of_heads(name: &str) -> bool {
    name.contains(".kv_b_proj.")
}

/// Tensors of decoder layer `layer`.
pub fn layer(layer: usize) -> LayerNames {
    LayerNames { prefix: format!("model.layers.{layer}.") }
}

/// Names within one decoder layer.
#[derive(Debug, Clone)]
pub struct LayerNames {
    prefix: String,
}

impl LayerNames {
    fn name(&self, rest: &str) -> String {
        format!("{}{rest}", self.prefix)
    }

    fn ffn(&self, rest: &str) -> FfnNames {
        FfnNames { prefix: format!("{}mlp.{rest}", self.prefix) }
    }

    /// What every name of the layer starts with, up to and including the dot.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Gain of the norm before attention `[H]`.
    pub fn input_norm(&self) -> String {
        self.name("input_layernorm.weight")
    }

    /// Gain of the norm before the FFN `[H]`.
    pub fn post_attention_norm(&self) -> String {
        self.name("post_attention_layernorm.weight")
    }

    /// Query projection without a latent `[n·dq, H]`.
    pub fn q_proj(&self) -> String {
        self.name("self_attn.q_proj.weight")
    }

    /// Down projection of queries `[rq, H]`.
    pub fn q_a_proj(&self) -> String {
        self.name("self_attn.q_a_proj.weight")
    }

    /// Gain of the query latent's norm `[rq]`.
    pub fn q_a_norm(&self) -> String {
        self.name("self_attn.q_a_layernorm.weight")
    }

    /// Up projection of queries `[n·dq, rq]`.
    pub fn q_b_proj(&self) -> String {
        self.name("self_attn.q_b_proj.weight")
    }

    /// Latent and shared rotary key `[r + dr, H]`.
    pub fn kv_a_proj(&self) -> String {
        self.name("self_attn.kv_a_proj_with_mqa.weight")
    }

    /// Gain of the latent's norm `[r]`.
    pub fn kv_a_norm(&self) -> String {
        self.name("self_attn.kv_a_layernorm.weight")
    }

    /// Per head `UK [dn, r]`, then `UV [dv, r]`: `[n·(dn + dv), r]`.
    pub fn kv_b_proj(&self) -> String {
        self.name("self_attn.kv_b_proj.weight")
    }

    /// Output projection of attention `[H, n·dv]`.
    pub fn o_proj(&self) -> String {
        self.name("self_attn.o_proj.weight")
    }

    /// Gate `[E, H]`.
    pub fn gate(&self) -> String {
        self.name("mlp.gate.weight")
    }

    /// V3: bias of the choice `[E]`.
    pub fn gate_bias(&self) -> String {
        self.name("mlp.gate.e_score_correction_bias")
    }

    /// FFN of a dense layer.
    pub fn dense(&self) -> FfnNames {
        self.ffn("")
    }

    /// The shared experts, one FFN.
    pub fn shared(&self) -> FfnNames {
        self.ffn("shared_experts.")
    }

    /// Routed expert `expert`.
    pub fn expert(&self, expert: usize) -> FfnNames {
        self.ffn(&format!("experts.{expert}."))
    }
}

/// Names of the three matrices of one FFN of width `I`.
#[derive(Debug, Clone)]
pub struct FfnNames {
    prefix: String,
}

impl FfnNames {
    /// `[I, H]`
    pub fn gate_proj(&self) -> String {
        format!("{}gate_proj.weight", self.prefix)
    }

    /// `[I, H]`
    pub fn up_proj(&self) -> String {
        format!("{}up_proj.weight", self.prefix)
    }

    /// `[H, I]`
    pub fn down_proj(&self) -> String {
        format!("{}down_proj.weight", self.prefix)
    }
}
