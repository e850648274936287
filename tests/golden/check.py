"""Checks the golden files against the float64 model of reference.py. Ends with status 1 if any check fails.

    python check.py

Per tiny case: logits and router logits within 1e-4, the same experts, no near ties, routed experts that matter, and
files no larger than they may be. Then each known mistake is made on purpose: at least one case must show it. Last,
the demo checkpoint's goldens.
"""

import sys
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import load_file

from cases import CASES
from generate import FIXTURES, MARGIN
from reference import Reference, Rules
from routing import margins

TOLERANCE = 1e-4
# transformers multiplies positions by frequencies in float32; past its training window the demo model feels that.
DEMO_TOLERANCE = 5e-4
MISTAKES = {
    "latent norms take rms_norm_eps": dict(latent_eps=None),
    "no softmax correction": dict(softmax_correction=False),
    "no factor on cos and sin": dict(cos_sin_factor=False),
    "plain frequencies under YaRN": dict(yarn_frequencies=False),
    "half-split rotary pairs": dict(interleaved=False),
    "V2's groups scored as V3's, and the reverse": dict(group_score="other"),
    "V3's bias left out": dict(biased=False),
    "V3's bias in the weights": dict(bias_in_weights=True),
    "FP8 without its scales": dict(scales=False),
    "chosen weights renormalised": dict(renormalise=True),
    "routed scaling factor left out": dict(scaled=False),
    "shared experts scaled": dict(shared_scaled=True),
    "routed experts left out": dict(routed=False),
}


def main():
    torch.set_num_threads(1)
    failures = []
    for case in CASES:
        failures += check_case(case)
    failures += check_mistakes() + check_demo()
    for failure in failures:
        print("FAIL", failure)
    print(f"{len(failures)} failures")
    sys.exit(bool(failures))


def check_case(case):
    """What is wrong with one tiny case."""
    folder = FIXTURES / "golden" / case.name
    golden = load_file(folder / "golden.safetensors")
    model = Reference(folder)
    worst = dict(logits=0.0, gate=0.0)
    margin, same_experts = np.inf, True
    for i in range(len(case.lengths)):
        logits, routes = model.forward(golden[f"ids.{i}"].numpy())
        worst["logits"] = max(worst["logits"], gap(logits, golden[f"logits.{i}"]))
        for layer, (gate, experts) in routes.items():
            stored = golden[f"gate.{i}.{layer}"]
            worst["gate"] = max(worst["gate"], gap(gate, stored))
            same_experts &= bool((experts == golden[f"experts.{i}.{layer}"].numpy()).all())
            bias = model.weights.get(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")
            bias = None if bias is None else torch.from_numpy(bias)
            margin = min(margin, margins(stored, model.config, bias).min().item())
    matter = routed_share(folder, golden, len(case.lengths))
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{case.name:16} logits {worst['logits']:.1e}  gate {worst['gate']:.1e}  margin {margin:.1e}  "
          f"without routed experts {matter:.2f}  {size / 1e6:.2f} MB", flush=True)
    verdicts = {
        "logits differ": worst["logits"] <= TOLERANCE, "router logits differ": worst["gate"] <= TOLERANCE,
        "other experts": same_experts, "near tie": margin > MARGIN / 2, "experts do not matter": matter > 0.1,
        "too large": size < 1.5e6,
    }
    return [f"{case.name}: {text}" for text, fine in verdicts.items() if not fine]


def routed_share(folder, golden, sequences):
    """Mean absolute change of the logits when the routed experts are left out."""
    model = Reference(folder, Rules(routed=False))
    changes = [np.abs(model.forward(golden[f"ids.{i}"].numpy())[0] - golden[f"logits.{i}"].numpy()).mean()
               for i in range(sequences)]
    return float(np.mean(changes))


def check_mistakes():
    """The mistakes that no case shows by a hundred times the tolerance."""
    unseen = []
    for mistake, change in MISTAKES.items():
        seen = {case.name: mistake_size(case, replace(Rules(), **change)) for case in CASES}
        shown = [name for name, size in seen.items() if size > 100 * TOLERANCE]
        print(f"{mistake:32} up to {max(seen.values()):.2g}, seen by {len(shown)}: {', '.join(shown)}", flush=True)
        if not shown:
            unseen.append(f"no case shows the mistake: {mistake}")
    return unseen


def mistake_size(case, rules):
    """The largest difference in logits that wrong rules make on a case's last-but-one sequence."""
    folder = FIXTURES / "golden" / case.name
    golden = load_file(folder / "golden.safetensors")
    i = len(case.lengths) - 2 if case.lengths[-1] > 200 else len(case.lengths) - 1
    return gap(Reference(folder, rules).forward(golden[f"ids.{i}"].numpy())[0], golden[f"logits.{i}"])


def check_demo():
    """What is wrong with the demo checkpoint's goldens, which keep no margin from ties."""
    golden = load_file(FIXTURES / "golden-demo" / "golden.safetensors")
    model = Reference(FIXTURES / "demo-model")
    failures = []
    for i in range(sum(name.startswith("ids.") for name in golden)):
        ids = golden[f"ids.{i}"].numpy()
        logits, _ = model.forward(ids)
        start = int(golden[f"start.{i}"][0])
        differences = dict(
            logits=gap(logits[start:], golden[f"logits.{i}"]),
            logprob=gap(log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]], golden[f"logprob.{i}"]))
        same = bool((logits.argmax(-1) == golden[f"argmax.{i}"].numpy()).all())
        print(f"demo {i}: {len(ids)} tokens  " + "  ".join(f"{k} {v:.1e}" for k, v in differences.items()), flush=True)
        failures += [f"demo {i}: {k} differ" for k, v in differences.items() if v > DEMO_TOLERANCE]
        failures += [] if same else [f"demo {i}: other arg max"]
    return failures


def log_softmax(x):
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def gap(ours, stored):
    return float(np.abs(ours - stored.numpy()).max())


if __name__ == "__main__":
    main()
