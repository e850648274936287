"""Writes what transformers and tokenizers compute with the demo checkpoint, into `tests/fixtures/golden-demo/`.

    python demo.py

golden.safetensors: the prompts of demo_texts.py through the chat template, each continued greedily, then one long
text. tokenizer.json: encoded strings and rendered conversations. README.md beside this file describes the fields.
"""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import oracle
from demo_texts import BOS, CONVERSATIONS, EOS, PROMPTS, STORY, STRINGS
from generate import FIXTURES

MODEL = FIXTURES / "demo-model"
OUT = FIXTURES / "golden-demo"
NEW_TOKENS = 48
KEPT_LOGITS = 24  # positions at the end of each sequence


def main():
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    template = AutoTokenizer.from_pretrained(MODEL)
    write_goldens(template)
    write_tokenizer_vectors(template)


def write_goldens(template):
    """golden.safetensors."""
    model = oracle.load(MODEL)
    golden = {}
    for i, conversation in enumerate(PROMPTS):
        prompt = template.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
        ids = continue_greedily(model, prompt)
        golden |= record(model, i, ids, len(prompt))
        print(f"{i}: {template.decode(ids[len(prompt):])!r}", flush=True)
    story = [0, *template.encode(STORY, add_special_tokens=False)]
    golden |= record(model, len(PROMPTS), story, len(story))
    print(f"{len(PROMPTS)}: {len(story)} tokens of text, "
          f"mean logprob {golden[f'logprob.{len(PROMPTS)}'].mean().item():.2f}")
    save(golden, OUT / "golden.safetensors")


def continue_greedily(model, prompt):
    """The prompt and up to NEW_TOKENS more, the end of sequence included: each by a full forward."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS and ids[-1] != model.config.eos_token_id:
        logits, _ = oracle.forward(model, ids)
        ids.append(int(logits[-1].argmax()))
    return ids


def record(model, i, ids, prompt_len):
    """The golden tensors of sequence `i`."""
    logits, _ = oracle.forward(model, ids)
    start = max(0, len(ids) - KEPT_LOGITS)
    following = torch.tensor(ids[1:])
    logprob = logits[:-1].log_softmax(-1).gather(1, following[:, None])[:, 0]
    return {
        f"ids.{i}": torch.tensor(ids), f"prompt_len.{i}": torch.tensor([prompt_len]),
        f"argmax.{i}": logits.argmax(-1), f"logprob.{i}": logprob.contiguous(),
        f"start.{i}": torch.tensor([start]), f"logits.{i}": logits[start:].clone(),
    }


def save(tensors, path):
    save_file(tensors, path, metadata={"oracle": "transformers"})
    path.chmod(0o644)
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def write_tokenizer_vectors(template):
    """tokenizer.json."""
    parsing, plain = (Tokenizer.from_file(str(MODEL / "tokenizer.json")) for _ in range(2))
    plain.encode_special_tokens = True
    vectors = {
        "strings": [string_vector(text, parsing, plain) for text in STRINGS],
        "conversations": [chat_vector(messages, ask, template, parsing, plain)
                          for messages in CONVERSATIONS for ask in (False, True)],
    }
    (OUT / "tokenizer.json").write_text(json.dumps(vectors, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"tokenizer.json: {len(vectors['strings'])} strings, {len(vectors['conversations'])} rendered conversations")


def string_vector(text, parsing, plain):
    """One string's ids, with special tokens recognised and as plain text, and the decoded former."""
    ids = parsing.encode(text, add_special_tokens=False).ids
    return {
        "text": text, "ids": ids, "plain_ids": plain.encode(text, add_special_tokens=False).ids,
        "decoded": parsing.decode(ids, skip_special_tokens=False),
        "decoded_without_special": parsing.decode(ids, skip_special_tokens=True),
    }


def chat_vector(messages, ask, template, parsing, plain):
    """One conversation as the template renders it, and its ids."""
    text = template.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    return {
        "messages": messages, "add_generation_prompt": ask, "text": text,
        "ids": parsing.encode(text, add_special_tokens=False).ids,
        "safe_ids": safe_ids(messages, ask, template, plain),
    }


def safe_ids(messages, ask, template, plain):
    """The conversation's ids when only the template may write special tokens, and contents are plain text.

    Special tokens in contents are hidden behind private characters while the template renders; what it writes between
    its own special tokens is then encoded as plain text.
    """
    hidden = {BOS: "\ue000", EOS: "\ue001"}

    def swap(text, pairs):
        for old, new in pairs:
            text = text.replace(old, new)
        return text

    masked = [{**m, "content": swap(m["content"], hidden.items())} for m in messages]
    text = template.apply_chat_template(masked, tokenize=False, add_generation_prompt=ask)
    ids = []
    for piece in swap(text, [(BOS, "\ue002\ue003\ue002"), (EOS, "\ue002\ue004\ue002")]).split("\ue002"):
        if piece in ("\ue003", "\ue004"):
            ids.append(0 if piece == "\ue003" else 1)
        else:
            shown = swap(piece, [(new, old) for old, new in hidden.items()])
            ids += plain.encode(shown, add_special_tokens=False).ids
    return ids


if __name__ == "__main__":
    main()
