"""How near a token's routing is to a tie."""

import torch


def margins(gate, config, bias=None):
    """The smallest gap that decides each token's experts: [T] from router logits [T, E], and for V3 its bias [E].

    It is the gap in probability between the last expert kept and the first one left out, and, with group-limited
    routing, also that between the last group kept and the first one left out. Infinite where nothing is left out. V3 has
    biased scores in place of probabilities, and groups by the sum of their two best.
    """
    v3 = config["topk_method"] == "noaux_tc"
    p = gate.double().sigmoid() + bias.double() if v3 else gate.double().softmax(-1)
    gap = torch.full((len(p),), torch.inf, dtype=torch.float64)
    if config["topk_method"] in ("group_limited_greedy", "noaux_tc"):
        groups, keep = config["n_group"], config["topk_group"]
        best = p.view(len(p), groups, -1).topk(2 if v3 else 1, -1).values.sum(-1)
        gap = step_after(best, keep)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(keep, -1).indices, True)
        p = p.masked_fill(~kept.repeat_interleave(p.shape[1] // groups, 1), -torch.inf)
    return torch.minimum(gap, step_after(p, config["num_experts_per_tok"]))


def step_after(scores, count):
    """The gap between the `count`-th and the next largest of each row; infinite where there is no next."""
    if count == scores.shape[1]:
        return torch.full((len(scores),), torch.inf, dtype=torch.float64)
    ordered = scores.sort(-1, descending=True).values
    return ordered[:, count - 1] - ordered[:, count]
