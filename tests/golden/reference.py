"""DeepSeek-V2's and V3's forward pass in float64 NumPy, written from the model's definition and not from any implementation.

It takes the absorbed form of attention, where transformers takes the expanded one, and pairs of rotary components by
hand, where transformers uses complex numbers, so that the two share nothing but the mathematics. `Rules` names the
places where implementations are known to go wrong; each can be turned wrong on purpose, to see that the goldens tell.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file


@dataclass(frozen=True)
class Rules:
    """The right rules by default."""

    latent_eps: float | None = 1e-6  # of the two latent norms; None takes rms_norm_eps
    softmax_correction: bool = True  # the softmax scale times g(mscale_all_dim)²
    cos_sin_factor: bool = True  # cos and sin times g(mscale) / g(mscale_all_dim)
    yarn_frequencies: bool = True
    interleaved: bool = True  # rotary pairs are (2i, 2i+1), not (i, i + d/2)
    group_score: str = "own"  # V2: a group's best, V3: the sum of its two best; or "other"
    renormalise: bool = False  # the chosen weights to sum 1, where they are not; V3: not, where they are
    scaled: bool = True  # routed_scaling_factor
    shared_scaled: bool = False  # routed_scaling_factor on the shared experts too
    routed: bool = True  # the routed experts at all
    biased: bool = True  # V3: the bias, in the choice
    bias_in_weights: bool = False  # V3: and in the weights, where it does not belong
    scales: bool = True  # of FP8 weights


class Reference:
    """A checkpoint folder, ready to run."""

    def __init__(self, folder, rules=Rules()):
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.rules = rules
        stored = {}
        for file in sorted(folder.glob("model*.safetensors")):
            stored |= load_file(file)
        self.weights = {name: t.double().numpy() for name, t in stored.items()}
        if rules.scales and "quantization_config" in self.config:
            self.scale(*self.config["quantization_config"]["weight_block_size"])

    def scale(self, rows, cols):
        """Multiplies each element of FP8 weights by the scale of its block."""
        for name in [name for name in self.weights if name.endswith("_scale_inv")]:
            weight = self.weights[name.removesuffix("_scale_inv")]
            i, j = np.indices(weight.shape)
            weight *= self.weights[name][i // rows, j // cols]

    def forward(self, ids):
        """Logits [T, vocab]; by MoE layer, router logits [T, E] and the chosen experts [T, K], ascending."""
        eps = self.config["rms_norm_eps"]
        x = self.weights["model.embed_tokens.weight"][ids]
        angles = Rope(self.config, self.rules)
        routes = {}
        for layer in range(self.config["num_hidden_layers"]):
            p = f"model.layers.{layer}."
            x = x + self.attention(p + "self_attn.", rms(x, self.weights[p + "input_layernorm.weight"], eps), angles)
            y = rms(x, self.weights[p + "post_attention_layernorm.weight"], eps)
            if layer < self.config["first_k_dense_replace"]:
                x = x + self.mlp(p + "mlp.", y)
            else:
                out, routes[layer] = self.moe(p + "mlp.", y)
                x = x + out
        return rms(x, self.weights["model.norm.weight"], eps) @ self.weights["lm_head.weight"].T, routes

    def linear(self, name, x):
        return x @ self.weights[name + ".weight"].T

    def attention(self, p, x, rope):
        """Absorbed MLA: one key of latent and rotary part a position, shared by all heads."""
        c, tokens = self.config, len(x)
        n, r, nope, v = c["num_attention_heads"], c["kv_lora_rank"], c["qk_nope_head_dim"], c["v_head_dim"]
        eps = c["rms_norm_eps"] if self.rules.latent_eps is None else self.rules.latent_eps
        if c["q_lora_rank"] is None:
            q = self.linear(p + "q_proj", x)
        else:
            q = rms(self.linear(p + "q_a_proj", x), self.weights[p + "q_a_layernorm.weight"], eps)
            q = self.linear(p + "q_b_proj", q)
        q = q.reshape(tokens, n, -1).transpose(1, 0, 2)  # [n, T, nope + rope]
        down = self.linear(p + "kv_a_proj_with_mqa", x)
        latent = rms(down[:, :r], self.weights[p + "kv_a_layernorm.weight"], eps)  # [T, r]
        key_rope = rope.rotate(down[:, r:])  # [T, rope]
        up = self.weights[p + "kv_b_proj.weight"].reshape(n, nope + v, r)
        q_latent = q[..., :nope] @ up[:, :nope]  # [n, T, r]
        scores = q_latent @ latent.T + rope.rotate(q[..., nope:]) @ key_rope.T  # [n, T, T]
        probability = causal_softmax(scores * rope.softmax_scale)
        out = (probability @ latent) @ up[:, nope:].transpose(0, 2, 1)  # [n, T, v]
        return self.linear(p + "o_proj", out.transpose(1, 0, 2).reshape(tokens, n * v))

    def mlp(self, p, x):
        gate = self.linear(p + "gate_proj", x)
        return self.linear(p + "down_proj", gate / (1 + np.exp(-gate)) * self.linear(p + "up_proj", x))

    def moe(self, p, x):
        """Shared plus routed experts; also (router logits, chosen experts)."""
        logits = self.linear(p + "gate", x)
        experts, weights = self.select(logits, self.weights.get(p + "gate.e_score_correction_bias"))
        out = self.mlp(p + "shared_experts.", x)
        if self.rules.shared_scaled:
            out = out * self.config["routed_scaling_factor"]
        for e in range(self.config["n_routed_experts"] if self.rules.routed else 0):
            rows, slots = np.nonzero(experts == e)
            if len(rows):
                out[rows] += weights[rows, slots, None] * self.mlp(f"{p}experts.{e}.", x[rows])
        return out, (logits, experts)

    def select(self, logits, bias):
        """The chosen experts [T, K], ascending, and their weights."""
        c, tokens = self.config, len(logits)
        v3 = c["topk_method"] == "noaux_tc"
        p = 1 / (1 + np.exp(-logits)) if v3 else softmax(logits)
        choice = p + bias if v3 and self.rules.biased else p.copy()
        if c["topk_method"] in ("group_limited_greedy", "noaux_tc"):
            grouped = np.sort(choice.reshape(tokens, c["n_group"], -1), -1)
            by_two = v3 != (self.rules.group_score == "other")
            best = grouped[..., -2:].sum(-1) if by_two else grouped[..., -1]
            kept = np.argsort(-best, -1)[:, : c["topk_group"]]
            group_of = np.arange(p.shape[1]) // grouped.shape[-1]
            choice[~(group_of[None, :, None] == kept[:, None, :]).any(-1)] = -np.inf
        experts = np.sort(np.argsort(-choice, -1)[:, : c["num_experts_per_tok"]], -1)
        weights = np.take_along_axis(p + bias if v3 and self.rules.bias_in_weights else p, experts, -1)
        if v3 != self.rules.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return experts, weights * (c["routed_scaling_factor"] if self.rules.scaled else 1.0)


class Rope:
    """Rotary frequencies, the factor of cos and sin, and the softmax scale of one config."""

    def __init__(self, config, rules):
        theta, scaling = rope_settings(config)
        self.interleaved = rules.interleaved
        d = config["qk_rope_head_dim"]
        self.frequencies = theta ** (-2.0 * np.arange(d // 2) / d)
        self.factor = 1.0
        self.softmax_scale = (config["qk_nope_head_dim"] + d) ** -0.5
        if scaling is None:
            return
        s = scaling["factor"]
        all_dim = magnitude(s, scaling.get("mscale_all_dim", 0))
        if rules.yarn_frequencies:
            ramp = yarn_ramp(d, theta, scaling)
            self.frequencies = self.frequencies * (1 - ramp) + self.frequencies / s * ramp
        if rules.cos_sin_factor:
            self.factor = magnitude(s, scaling.get("mscale", 1)) / all_dim
        if rules.softmax_correction:
            self.softmax_scale *= all_dim**2

    def rotate(self, x):
        """Turns x [..., T, d] by each token's position."""
        angle = np.arange(x.shape[-2])[:, None] * self.frequencies
        cos, sin = np.cos(angle) * self.factor, np.sin(angle) * self.factor
        half = x.shape[-1] // 2
        first, second = (np.s_[..., 0::2], np.s_[..., 1::2]) if self.interleaved else (np.s_[..., :half], np.s_[..., half:])
        out = np.empty_like(x)
        out[first] = x[first] * cos - x[second] * sin
        out[second] = x[first] * sin + x[second] * cos
        return out


def rope_settings(config):
    """(theta, YaRN settings or None) from either spelling."""
    settings = config.get("rope_parameters")
    if settings is not None:
        return settings["rope_theta"], settings if settings["rope_type"] == "yarn" else None
    return config["rope_theta"], config["rope_scaling"]


def magnitude(factor, mscale):
    """YaRN's g."""
    return 0.1 * mscale * np.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_ramp(d, theta, scaling):
    """0 where a frequency stays, 1 where it is divided by the factor: [d / 2]."""
    original = scaling["original_max_position_embeddings"]

    def pair_turning(times):
        return d * np.log(original / (times * 2 * np.pi)) / (2 * np.log(theta))

    low = max(np.floor(pair_turning(scaling["beta_fast"])), 0)
    high = min(np.ceil(pair_turning(scaling["beta_slow"])), d - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)


def rms(x, weight, eps):
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def causal_softmax(scores):
    """Softmax over the positions up to each query's own: [..., T, T]."""
    future = np.triu(np.ones(scores.shape[-2:], dtype=bool), 1)
    return softmax(np.where(future, -np.inf, scores))
