"""Writes the tiny golden checkpoints and what transformers computes with them.

    python generate.py [CASE ...]

For every case of cases.py, `tests/fixtures/golden/<case>/` gets config.json, the weights, and golden.safetensors:
`ids.{i}` I64 [T], `logits.{i}` F32 [T, vocab], and by MoE layer `experts.{i}.{layer}` I64 [T, K] (ascending) and
`gate.{i}.{layer}` F32 [T, E] (router logits).
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import oracle
from cases import CASES
from checkpoint import write_checkpoint
from routing import margins

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
# A token whose routing is decided by less than this is replaced; check.py asks for half of it.
MARGIN = 2e-5


def main():
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [case.name for case in CASES]
    for case in CASES:
        if case.name in wanted:
            make_case(case, FIXTURES / "golden" / case.name)


def make_case(case, folder):
    """Writes the checkpoint and the golden file of one case, anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_checkpoint(case, folder)
    config = json.loads((folder / "config.json").read_text())
    model = oracle.load(folder)
    golden, replaced = {}, 0
    for i, length in enumerate(case.lengths):
        rng = np.random.default_rng([case.seed, i])
        ids, tries = untied_sequence(model, config, length, rng)
        golden |= record(model, i, ids)
        replaced += tries
    save_file(golden, folder / "golden.safetensors", metadata={"oracle": "transformers"})
    for file in folder.iterdir():
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in folder.iterdir())
    spread = max(golden[f"logits.{i}"].std().item() for i in range(len(case.lengths)))
    print(f"{case.name:16} {size / 1e6:5.2f} MB  lengths {case.lengths}  logit std {spread:.2f}  "
          f"near ties replaced {replaced}", flush=True)


def untied_sequence(model, config, length, rng):
    """Random token ids none of which is routed by less than MARGIN, and how many were replaced.

    A token changes nothing before it, so the first near tie is replaced by another token until none is left.
    """
    ids = rng.integers(0, config["vocab_size"], length).tolist()
    for tries in range(500):
        _, routes = oracle.forward(model, ids)
        worst = torch.stack([margins(gate, config, bias(model, layer)) for layer, (gate, _) in routes.items()]).amin(0)
        tied = (worst < MARGIN).nonzero()
        if len(tied) == 0:
            return ids, tries
        ids[int(tied[0])] = int(rng.integers(0, config["vocab_size"]))
    raise RuntimeError(f"still a near tie after {tries} replacements")


def bias(model, layer):
    """The bias [E] of a layer's choice, where it has one."""
    return getattr(model.model.layers[layer].mlp.gate, "e_score_correction_bias", None)


def record(model, i, ids):
    """The golden tensors of sequence `i`."""
    logits, routes = oracle.forward(model, ids)
    tensors = {f"ids.{i}": torch.tensor(ids), f"logits.{i}": logits.contiguous()}
    for layer, (gate, experts) in routes.items():
        tensors[f"gate.{i}.{layer}"] = gate.contiguous()
        tensors[f"experts.{i}.{layer}"] = experts.contiguous()
    return tensors


if __name__ == "__main__":
    main()
