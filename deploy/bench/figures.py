"""What the scripts that measure other engines share: the flags of `conclave bench`, and figures as it writes them."""

import argparse
import json
import pathlib
import resource


def numbers(text):
    """`1,8` as [1, 8]; nothing as []."""
    return [int(number) for number in text.split(",") if number]


def arguments(description):
    """A parser of the flags by which every engine is asked for the same measurements."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="the checkpoint, as the engine reads it")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prefill", type=numbers, default=[512, 2048], help="prompt lengths")
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32], help="streams that decode at the same time")
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of each stream that decodes")
    parser.add_argument("--long-context", type=int, default=2048, help="of one more measurement of one stream; 0: none")
    parser.add_argument("--tokens", type=int, default=16, help="decode steps of each measurement")
    parser.add_argument("--json", type=pathlib.Path, required=True, help="where the figures go")
    return parser


def parsed(parser):
    """The arguments; flags of `conclave bench` that no other engine has are passed over."""
    args, others = parser.parse_known_args()
    if others:
        print(f"not for this engine: {' '.join(others)}")
    return args


def decodes(args):
    """(streams, context) of each measurement of decoding."""
    long = [(1, args.long_context)] if args.long_context else []
    return [(batch, args.context) for batch in args.batch] + long


class Figures:
    """One sample a figure, named as `conclave bench` names it."""

    def __init__(self):
        self.figures = []

    def prefill(self, tokens, rate):
        self.add(f"prefill {tokens}", "tok/s", rate)

    def decode(self, streams, context, rate):
        self.add(f"decode {streams} stream{'s' * (streams > 1)}, context {context}", "tok/s", rate)

    def add(self, name, unit, sample):
        print(f"{name:42} {unit:6} {sample:8.2f}", flush=True)
        self.figures.append({"name": name, "unit": unit, "samples": [sample]})

    def write(self, args, whose=resource.RUSAGE_SELF):
        """With the peak memory of this process or of the largest of its children."""
        self.add("peak memory", "GiB", resource.getrusage(whose).ru_maxrss / 2**20)
        args.json.write_text(json.dumps({"figures": self.figures}, indent=1) + "\n")
