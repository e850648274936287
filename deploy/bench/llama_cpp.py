"""llama.cpp: `llama-bench` and `llama-batched-bench` of a build, on a GGUF file."""

import json
import pathlib
import resource
import subprocess

import figures


def samples(*command):
    """The lines of JSON that a program prints."""
    ran = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if ran.returncode != 0:
        raise SystemExit(f"{command[0]}: exit code {ran.returncode}\n{ran.stderr[-2000:]}")
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def main():
    parser = figures.arguments(__doc__)
    parser.add_argument("--programs", type=pathlib.Path, required=True, help="folder of the programs")
    args = figures.parsed(parser)
    found = figures.Figures()
    # Prompts are computed at one go.
    most = max([*args.prefill, args.long_context, 512])
    common = ["-m", args.model, "-t", args.threads, "-b", most, "-ub", most]
    bench = [args.programs / "llama-bench", *common, "-r", 1, "-o", "jsonl"]
    for line in samples(*bench, "-n", 0, "-p", ",".join(map(str, args.prefill))) if args.prefill else []:
        found.prefill(line["n_prompt"], line["samples_ts"][0])
    one = ",".join(str(context) for streams, context in figures.decodes(args) if streams == 1)
    for line in samples(*bench, "-p", 0, "-n", args.tokens, "-d", one) if one else []:
        found.decode(1, line["n_depth"], line["samples_ts"][0])
    for streams, context in figures.decodes(args):
        if streams == 1:
            continue
        batched = [args.programs / "llama-batched-bench", *common, "-tb", args.threads, "--output-format", "jsonl"]
        cells = streams * (context + args.tokens)
        for line in samples(*batched, "-c", cells, "-npp", context, "-ntg", args.tokens, "-npl", streams):
            found.decode(streams, context, line["speed_tg"])
    found.write(args, resource.RUSAGE_CHILDREN)


main()
