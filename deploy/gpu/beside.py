"""Hugging Face transformers on the same checkpoint: logprobs of a prompt, and tokens a second, as JSON on standard output.

usage: beside.py MODEL DEVICE PROMPT-TOKENS BATCHES NEW-TOKENS CONTEXT IDS
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

model_dir, device, prefill, batches, new_tokens, context, ids = sys.argv[1:]
prefill, new_tokens, context = int(prefill), int(new_tokens), int(context)


def wait():
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work):
    """The shorter of two times, after one that does not count; seconds."""
    times = []
    for _ in range(3):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def generate(prompts, tokens):
    return model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
        pad_token_id=0)


def prompts(batch, length):
    return torch.randint(1, model.config.vocab_size, (batch, length), device=device)


torch.manual_seed(1)
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).to(device).eval()
with torch.no_grad():
    prompt = torch.tensor([[int(word) for word in ids.split(",")]], device=device)
    logits = model(prompt, use_cache=False).logits[0].float()
    logprobs = torch.log_softmax(logits, -1)[:-1].gather(1, prompt[0, 1:, None])[:, 0]
    found = {"logprobs": logprobs.tolist()}
    text = prompts(1, prefill)
    found[f"prefill {prefill}"] = prefill / timed(lambda: model(text, logits_to_keep=1))
    for batch in map(int, batches.split(",")):
        text = prompts(batch, context)
        # What comes after the first token is decoding.
        seconds = timed(lambda: generate(text, new_tokens + 1)) - timed(lambda: generate(text, 1))
        found[f"decode {batch}, context {context}"] = batch * new_tokens / seconds
print(json.dumps(found))
