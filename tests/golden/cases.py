"""The golden cases: one tiny random DeepSeek-V2 or V3 checkpoint each, with what is special about it.

Dimensions are small and mostly unequal, so that a swapped pair of them cannot go unseen. `style` is the spelling
of config.json: "v4" is the one found on the hub (`rope_scaling`, `torch_dtype`), "v5" the one that transformers 5
saves (`rope_parameters`, `dtype`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One checkpoint and its sequences."""

    name: str
    seed: int
    style: str  # "v4" | "v5"
    lengths: tuple[int, ...]  # tokens of each sequence
    dims: dict  # fields of config.json, without the rope's
    rope: dict | None = None  # YaRN settings, or None for plain RoPE
    rope_theta: float = 10000.0
    dtype: str = "bfloat16"  # of the stored weights
    shards: int = 1
    block: tuple[int, int] | None = None  # FP8 projections with one scale a block of [outputs, inputs]


def dims(*, vocab, hidden, layers, heads, q, kv, nope, rope, v, inter, moe_inter, shared, experts, k, groups=None,
         first_k=1, scale=1.0, eps=1e-6, max_position=2048, v3=False):
    """config.json fields from short names; `groups` is (n_group, topk_group), (1, 1) being greedy too, but for V3."""
    n_group, topk_group = groups or (None, None)
    grouped = groups is not None and n_group > 1
    fields = dict(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, q_lora_rank=q, kv_lora_rank=kv, qk_nope_head_dim=nope, qk_rope_head_dim=rope,
        v_head_dim=v, intermediate_size=inter, moe_intermediate_size=moe_inter, n_shared_experts=shared,
        n_routed_experts=experts, num_experts_per_tok=k, n_group=n_group, topk_group=topk_group,
        topk_method="noaux_tc" if v3 else "group_limited_greedy" if grouped else "greedy",
        first_k_dense_replace=first_k, routed_scaling_factor=scale, rms_norm_eps=eps,
        max_position_embeddings=max_position,
    )
    return fields | (dict(scoring_func="sigmoid", norm_topk_prob=True) if v3 else {})


def yarn(factor, original, *, beta_fast=32, beta_slow=1, **mscales):
    """YaRN settings; `mscales` are mscale and mscale_all_dim, or nothing."""
    return dict(factor=factor, original_max_position_embeddings=original, beta_fast=beta_fast, beta_slow=beta_slow,
                **mscales)


LITE = dict(mscale=0.707, mscale_all_dim=0.707)

CASES = [
    # V2-Lite's shape; longer than the original context.
    Case("greedy_yarn", 101, "v4", (1, 7, 150),
         dims(vocab=192, hidden=64, layers=3, heads=4, q=None, kv=32, nope=16, rope=8, v=16, inter=96, moe_inter=32,
              shared=2, experts=8, k=2, groups=(1, 1), max_position=256),
         rope=yarn(4, 64, **LITE)),
    # Three heads, a latent that is no multiple of 16, v narrower than nope, six experts; past 512 positions.
    Case("greedy_plain", 102, "v5", (1, 9, 600),
         dims(vocab=160, hidden=96, layers=3, heads=3, q=None, kv=40, nope=24, rope=16, v=12, inter=80, moe_inter=24,
              shared=1, experts=6, k=3)),
    # V2's shape and scale of 16; longer than the original context.
    Case("group_yarn_q", 103, "v4", (3, 40, 150),
         dims(vocab=192, hidden=96, layers=3, heads=4, q=40, kv=48, nope=16, rope=16, v=16, inter=128, moe_inter=32,
              shared=2, experts=16, k=4, groups=(4, 2), scale=16.0, max_position=256),
         rope=yarn(4, 64, mscale=1.0, mscale_all_dim=1.0)),
    # Six groups of two, two dense layers, another rope base.
    Case("group_plain_q", 104, "v4", (2, 30, 64),
         dims(vocab=160, hidden=64, layers=4, heads=2, q=24, kv=32, nope=32, rope=16, v=24, inter=96, moe_inter=32,
              shared=2, experts=12, k=4, groups=(6, 3), first_k=2),
         rope_theta=50000.0),
    # mscale and mscale_all_dim differ, so cos and sin are scaled too; three shards and an index.
    Case("greedy_yarn_q", 105, "v5", (5, 100),
         dims(vocab=176, hidden=64, layers=3, heads=4, q=32, kv=24, nope=16, rope=16, v=16, inter=112, moe_inter=24,
              shared=2, experts=8, k=3, max_position=1280),
         rope=yarn(40, 32, mscale=1.0, mscale_all_dim=0.5), shards=3),
    # One expert a token, scaled; another eps.
    Case("greedy_plain_q", 106, "v4", (4, 33, 80),
         dims(vocab=192, hidden=64, layers=3, heads=2, q=48, kv=32, nope=16, rope=8, v=32, inter=96, moe_inter=32,
              shared=2, experts=8, k=1, scale=2.5, eps=1e-5)),
    # Three 512-position splits, and far past the original context.
    Case("group_yarn_long", 107, "v5", (11, 1100),
         dims(vocab=160, hidden=64, layers=3, heads=2, q=None, kv=32, nope=16, rope=16, v=16, inter=96, moe_inter=24,
              shared=1, experts=8, k=3, groups=(4, 2)),
         rope=yarn(8, 256, **LITE)),
    # Weights stored as F32, no dense layer, three groups of three.
    Case("group_plain", 108, "v5", (6, 50),
         dims(vocab=160, hidden=64, layers=3, heads=4, q=None, kv=24, nope=8, rope=8, v=16, inter=64, moe_inter=16,
              shared=1, experts=9, k=2, groups=(3, 2), first_k=0),
         dtype="float32"),
    # YaRN without mscales, its ramp of no width; one group and one expert a token; an eps that the latent norms ignore.
    Case("group_yarn_bare", 109, "v4", (1, 20, 130),
         dims(vocab=256, hidden=64, layers=3, heads=4, q=16, kv=32, nope=16, rope=16, v=8, inter=96, moe_inter=32,
              shared=2, experts=8, k=1, groups=(4, 1), scale=1.5, eps=1e-3, max_position=256),
         rope=yarn(4, 64, beta_slow=11)),
    # V3's shape: biased choice, weights that sum to the scale; a layer for speculation that nobody reads.
    Case("v3_yarn_q", 110, "v4", (2, 40, 150),
         dims(vocab=192, hidden=96, layers=3, heads=4, q=40, kv=48, nope=16, rope=16, v=16, inter=128, moe_inter=32,
              shared=1, experts=16, k=4, groups=(4, 2), scale=2.5, max_position=256, v3=True),
         rope=yarn(4, 64, mscale=1.0, mscale_all_dim=1.0)),
    # As V3 is released: FP8 projections. Blocks that sizes are no multiples of; scales in other files than their weights.
    Case("v3_fp8", 111, "v4", (3, 70),
         dims(vocab=160, hidden=80, layers=3, heads=2, q=24, kv=40, nope=24, rope=16, v=24, inter=112, moe_inter=40,
              shared=1, experts=12, k=3, groups=(3, 2), scale=2.5, v3=True),
         block=(32, 16), shards=4),
]
