"""Writes the tiny random checkpoints: config.json in either spelling, and the weights by their names on the hub."""

import json
import zlib

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import DeepseekV2Config

# Standard deviation of a product's output for inputs of size one; 1 where nothing is said.
GAINS = {"q_proj": 1.5, "q_b_proj": 1.5, "gate_proj": 1.5, "up_proj": 1.5, "mlp.gate": 1.5}

# What the cases have in common.
SMALL_PRINT = dict(hidden_act="silu", attention_bias=False, attention_dropout=0.0, tie_word_embeddings=False,
                   norm_topk_prob=False, bos_token_id=0, eos_token_id=1, use_cache=True)
HUB_ONLY = dict(scoring_func="softmax", moe_layer_freq=1, ep_size=1, pretraining_tp=1, seq_aux=True,
                aux_loss_alpha=0.001, initializer_range=0.02)


def write_checkpoint(case, folder):
    """Writes config.json and the weights of `case` into the empty `folder`."""
    write_config(case, folder)
    weights, scales = {}, {}
    for name, shape in shapes(case.dims).items():
        tensor = random_tensor(case.seed, name, shape)
        if case.block is not None and is_projection(name):
            weights[name], scales[name + "_scale_inv"] = quantised(tensor, case.block)
        else:
            weights[name] = tensor.to(torch.float32 if name.endswith("_bias") else getattr(torch, case.dtype))
    weights |= scales
    if case.shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        write_shards(weights, case.shards, folder)


def write_config(case, folder):
    """config.json as the hub's repositories have it (v4), or as transformers 5 saves it (v5)."""
    if case.style == "v5":
        assert not is_v3(case.dims)
        DeepseekV2Config(**case.dims, **SMALL_PRINT, dtype=case.dtype, rope_parameters=rope_parameters(case),
                         architectures=["DeepseekV2ForCausalLM"]).save_pretrained(folder)
        return
    scaling = None if case.rope is None else {"type": "yarn", **case.rope}
    version = 3 if is_v3(case.dims) else 2
    config = {"architectures": [f"DeepseekV{version}ForCausalLM"], "model_type": f"deepseek_v{version}", **case.dims,
              **SMALL_PRINT, **HUB_ONLY, "rope_theta": case.rope_theta, "rope_scaling": scaling, "torch_dtype": case.dtype}
    config |= case.dims
    if version == 3:
        config["num_nextn_predict_layers"] = 1
    if case.block is not None:
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                         "weight_block_size": list(case.block)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def rope_parameters(case):
    """The rope settings in the v5 spelling."""
    if case.rope is None:
        return {"rope_type": "default", "rope_theta": case.rope_theta}
    return {"rope_type": "yarn", "rope_theta": case.rope_theta, **case.rope}


def is_v3(d):
    return d["topk_method"] == "noaux_tc"


def is_projection(name):
    """Whether V3 stores a tensor in FP8: all matrices but embedding, output projection and gates."""
    return name.endswith("_proj.weight") or name.endswith("_proj_with_mqa.weight")


def quantised(tensor, block):
    """The tensor in FP8 with one scale a block: what is stored times the scale is the value."""
    rows, cols = block
    scales = torch.empty(-(-tensor.shape[0] // rows), -(-tensor.shape[1] // cols))
    stored = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = np.s_[i * rows:(i + 1) * rows, j * cols:(j + 1) * cols]
            scales[i, j] = tensor[at].abs().max() / 448
            stored[at] = (tensor[at] / scales[i, j]).to(torch.float8_e4m3fn)
    return stored, scales


def widened(weights, block):
    """The same tensors with those in FP8 in float32, without their scales."""
    def value(name, tensor):
        if name + "_scale_inv" not in weights:
            return tensor.float()
        scales = weights[name + "_scale_inv"].repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        return tensor.float() * scales[: tensor.shape[0], : tensor.shape[1]]

    return {name: value(name, tensor) for name, tensor in weights.items() if not name.endswith("_scale_inv")}


def shapes(d):
    """Every tensor's name and shape for the config fields `d`."""
    h = d["hidden_size"]
    out = {"model.embed_tokens.weight": (d["vocab_size"], h)}
    for layer in range(d["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        out |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
        out |= attention_shapes(d, p + "self_attn.")
        out |= ffn_shapes(d, layer, p + "mlp.")
    if is_v3(d):
        # Of the layer for speculation one tensor is enough to be skipped.
        out[f"model.layers.{d['num_hidden_layers']}.eh_proj.weight"] = (h, 2 * h)
    return out | {"model.norm.weight": (h,), "lm_head.weight": (d["vocab_size"], h)}


def attention_shapes(d, p):
    """The MLA tensors under the prefix `p`."""
    h, n, r, rq = d["hidden_size"], d["num_attention_heads"], d["kv_lora_rank"], d["q_lora_rank"]
    nope, rope, v = d["qk_nope_head_dim"], d["qk_rope_head_dim"], d["v_head_dim"]
    if rq is None:
        query = {p + "q_proj.weight": (n * (nope + rope), h)}
    else:
        query = {p + "q_a_proj.weight": (rq, h), p + "q_a_layernorm.weight": (rq,),
                 p + "q_b_proj.weight": (n * (nope + rope), rq)}
    return query | {
        p + "kv_a_proj_with_mqa.weight": (r + rope, h), p + "kv_a_layernorm.weight": (r,),
        p + "kv_b_proj.weight": (n * (nope + v), r), p + "o_proj.weight": (h, n * v),
    }


def ffn_shapes(d, layer, p):
    """The dense MLP, or the router, routed and shared experts, under the prefix `p`."""
    h = d["hidden_size"]

    def mlp(q, width):
        return {q + "gate_proj.weight": (width, h), q + "up_proj.weight": (width, h),
                q + "down_proj.weight": (h, width)}

    if layer < d["first_k_dense_replace"]:
        return mlp(p, d["intermediate_size"])
    out = {p + "gate.weight": (d["n_routed_experts"], h)}
    if is_v3(d):
        out[p + "gate.e_score_correction_bias"] = (d["n_routed_experts"],)
    for e in range(d["n_routed_experts"]):
        out |= mlp(f"{p}experts.{e}.", d["moe_intermediate_size"])
    return out | mlp(p + "shared_experts.", d["moe_intermediate_size"] * d["n_shared_experts"])


def random_tensor(seed, name, shape):
    """The tensor of this name in F32: its own stream of random numbers, so that the order of writing does not matter.

    Norm weights lie between 0.6 and 1.4, biases between -0.3 and 0.3; embeddings have size one; a product's rows are scaled so that its output
    has the size of its gain.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("_bias"):
        values = rng.uniform(-0.3, 0.3, shape)
    elif len(shape) == 1:
        values = rng.uniform(0.6, 1.4, shape)
    elif "embed_tokens" in name:
        values = rng.standard_normal(shape)
    else:
        gain = next((g for part, g in GAINS.items() if f"{part}.weight" in name), 1.0)
        values = rng.standard_normal(shape) * gain / np.sqrt(shape[1])
    return torch.from_numpy(values.astype(np.float32))


def write_shards(weights, count, folder):
    """Splits the weights over `count` files; like DeepSeek-V2's own, their names count to a six-digit total."""
    files = [f"model-{i + 1:05}-of-{count:06}.safetensors" for i in range(count)]
    names = list(weights)
    place = {name: files[i * count // len(names)] for i, name in enumerate(names)}
    for file in files:
        save_file({n: weights[n] for n in names if place[n] == file}, folder / file, metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
