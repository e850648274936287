"""vLLM's CPU build: bf16, the engine within this process."""

import os
import random
import time

import figures


def main():
    parser = figures.arguments(__doc__)
    parser.add_argument("--eager", action="store_true", help="do not compile the model first")
    args = figures.parsed(parser)
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    longest = max([*args.prefill, args.long_context, args.context]) + args.tokens + 2
    model = LLM(
        str(args.model),
        dtype="bfloat16",
        max_model_len=longest,
        max_num_seqs=max([*args.batch, 1]),
        max_num_batched_tokens=max(longest, 512),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        enforce_eager=args.eager,
        disable_log_stats=True,
    )
    draw = random.Random(1)
    vocabulary = model.llm_engine.model_config.get_vocab_size()
    found = figures.Figures()

    def seconds(streams, context, tokens):
        """From the prompts to the last of `tokens` tokens of each stream."""
        prompts = [{"prompt_token_ids": [draw.randrange(100, vocabulary - 100) for _ in range(context)]} for _ in range(streams)]
        asked = SamplingParams(max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        model.generate(prompts, asked, use_tqdm=False)
        return time.perf_counter() - begun

    seconds(1, 16, 2)
    for tokens in args.prefill:
        found.prefill(tokens, tokens / seconds(1, tokens, 1))
    for streams, context in figures.decodes(args):
        prefill = seconds(streams, context, 1)
        both = seconds(streams, context, 1 + args.tokens)
        found.decode(streams, context, streams * args.tokens / max(both - prefill, 1e-9))
    found.write(args)


if __name__ == "__main__":
    main()
