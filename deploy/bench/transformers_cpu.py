"""Hugging Face transformers with torch: bf16, scaled dot product attention."""

import time

import figures
import torch
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main():
    args = figures.parsed(figures.arguments(__doc__))
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    found = figures.Figures()

    def step(streams, tokens, cache=None):
        """Some new tokens of each stream: seconds, and the cache behind them."""
        ids = torch.randint(100, model.config.vocab_size - 100, (streams, tokens))
        begun = time.perf_counter()
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begun, out.past_key_values

    step(1, 8)
    for tokens in args.prefill:
        found.prefill(tokens, tokens / step(1, tokens)[0])
    for streams, context in figures.decodes(args):
        _, cache = step(streams, context)
        # The first step is another shape's first.
        step(streams, 1, cache)
        found.decode(streams, context, streams * args.tokens / sum(step(streams, 1, cache)[0] for _ in range(args.tokens)))
    found.write(args)


main()
