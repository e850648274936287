"""Hugging Face transformers as the oracle: float32, eager attention, eager experts, no cache."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from checkpoint import widened

logging.disable_progress_bar()


def load(folder):
    """The checkpoint in `folder`, its weights widened to float32; refuses a missing or an unexpected tensor."""
    config = json.loads((folder / "config.json").read_text())
    speculation = f"model.layers.{config['num_hidden_layers']}."
    if "quantization_config" not in config:
        return loaded(folder, speculation)
    block = config.pop("quantization_config")["weight_block_size"]
    with tempfile.TemporaryDirectory() as plain:
        (Path(plain) / "config.json").write_text(json.dumps(config))
        weights = {}
        for file in sorted(folder.glob("model*.safetensors")):
            weights |= load_file(file)
        save_file(widened(weights, block), Path(plain) / "model.safetensors", metadata={"format": "pt"})
        return loaded(Path(plain), speculation)


def loaded(folder, speculation):
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True)
    unexpected = [name for name in report["unexpected_keys"] if not name.startswith(speculation)]
    if report["missing_keys"] or unexpected or report["mismatched_keys"]:
        raise ValueError(f"{folder}: {report}")
    return model.eval()


@torch.no_grad()
def forward(model, ids):
    """Full forward of one sequence.

    Returns logits [T, vocab] and, by MoE layer, the router logits [T, E] and the chosen experts [T, K], ascending.
    """
    routes, hooks = {}, []
    for number, layer in enumerate(model.model.layers):
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None:
            hooks.append(gate.register_forward_hook(record_route(routes, number)))
    try:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return logits, routes


def record_route(routes, layer):
    """A forward hook that keeps a router's (logits, weights, choices)."""

    def hook(_module, _inputs, output):
        logits, _weights, experts = output
        routes[layer] = (logits, experts.sort(-1).values)

    return hook
