"""The engine: in one process and in several, the same bits whatever the processes, and transformers beside it."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cluster import Failure, cluster, score, serve, stream
from steps import Skip


@dataclass(frozen=True)
class Sizes:
    """What is measured with."""

    synth: tuple  # of the checkpoint that is measured with
    bits: tuple  # of the one that bits are compared with
    fp8: tuple  # of the one in FP8 that is measured with
    fp8_bits: tuple  # of the one in FP8 that bits are compared with
    prefill: int
    batches: str
    cluster_batches: str
    context: int
    tokens: int
    repeat: int
    step_tokens: int
    stream: int  # tokens of the request whose bits are compared

    @classmethod
    def full(cls):
        lite = ("--preset", "v2-lite", "--vocab", "32000", "--layers")
        # V3's three dense layers and one of 256 experts: 13 GB.
        v3 = ("--preset", "v3", "--vocab", "32000", "--layers", "4", "--dtype", "fp8")
        return cls((*lite, "6"), (*lite, "3"), v3, (*lite, "3", "--dtype", "fp8"), 4096, "1,32,256", "1,32", 128, 16, 2, 2048, 96)

    @classmethod
    def small(cls):
        tiny = ("--preset", "tiny")
        fp8 = (*tiny, "--dtype", "fp8")
        return cls(tiny, tiny, fp8, fp8, 64, "1,2", "1,2", 16, 4, 1, 512, 96)


@dataclass(frozen=True)
class Way:
    """Of rows and sums."""

    payload: str
    near: bool = True  # messages go over sockets of the host

    def name(self):
        return self.payload if self.near else f"{self.payload} over TCP"

    def file(self):
        return self.payload if self.near else f"{self.payload}-tcp"

    def flags(self):
        return ["--payload", self.payload, *([] if self.near else ["--same-host", "off"])]


def has_checkpoint(folder):
    return (folder / "config.json").exists()


def prompt_of(model, length):
    """Token ids that look random, the same in every run."""
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    return [1 + (at * 6007) % (vocab - 1) for at in range(length)]


def killed(processes, port, prompt, tokens):
    """The answer to a request while which the first expert is killed."""
    done = threading.Event()

    def kill(count):
        if count >= tokens // 3 and not done.is_set():
            done.set()
            processes.kill("expert-0")

    answer = stream(port, prompt, tokens, kill)
    if not done.is_set():
        raise Failure("no expert was killed")
    return answer


def compared(expected, answers):
    """Which answers have the bits that are expected; none may have others."""
    same = {name: answer == expected for name, answer in answers.items()}
    for name, yes in same.items():
        print(f"    same bits, {name}: {'yes' if yes else 'no'}", flush=True)
    if not all(same.values()):
        raise Failure(f"other bits: {', '.join(name for name, yes in same.items() if not yes)}")
    return same


class Engine:
    def __init__(self, steps, tools, device, sizes):
        self.steps, self.tools, self.device, self.sizes = steps, tools, device, sizes
        self.model, self.bits_model = tools.scratch / "model", tools.scratch / "bits-model"
        self.fp8_model, self.fp8_bits_model = tools.scratch / "fp8-model", tools.scratch / "fp8-bits-model"

    def run(self, model):
        """All steps; `model` takes the place of the checkpoint that is made."""
        if self.tools.conclave is None:
            self.steps.skip("the engine", f"{self.tools.package}: no conclave")
            return
        self.make("make a small checkpoint", self.bits_model, self.sizes.bits)
        self.steps.call("same bits", lambda: self.same_bits(self.bits_model, ""), 100)
        self.steps.call("ways of rows and sums", self.payloads, 150)
        if model:
            self.model = Path(model)
        elif not self.make("make a checkpoint", self.model, self.sizes.synth):
            self.model = self.bits_model
        one_process = ["--device", self.device, *self.step(), "--profile"]
        self.bench("bench, one process", "bench", one_process, 120)
        for name, flag in (("not exact", "--no-exact"), ("no graphs", "--no-graphs")):
            file = f"bench-{name.replace(' ', '-')}"
            self.bench(f"bench, one process, {name}", file, [*one_process, flag, *self.baseline()], 60)
        self.steps.call("bench, several processes", self.bench_cluster, 90)
        self.in_fp8(one_process)
        self.steps.call("transformers", self.beside, 100)

    def in_fp8(self, flags):
        """V3's shapes with weights in FP8, which stay so on a GPU."""
        self.make("make a small checkpoint in FP8", self.fp8_bits_model, self.sizes.fp8_bits)
        self.steps.call("same bits, FP8", lambda: self.same_bits(self.fp8_bits_model, "-fp8"), 100)
        self.make("make a checkpoint in FP8", self.fp8_model, self.sizes.fp8)
        self.bench("bench, one process, FP8", "bench-fp8", flags, 120, self.fp8_model)

    def make(self, name, folder, flags):
        return self.steps.command(name, [self.tools.conclave, "synth", *flags, "--out", folder], 60)

    def step(self):
        """Flags of attention."""
        tokens = str(self.sizes.step_tokens)
        return ["--step-tokens", tokens, "--prefill-chunk", tokens, "--max-running", "256"]

    def bench_command(self, flags, batches, json_file, model=None):
        sizes = self.sizes
        return [
            self.tools.conclave, "bench", "--model", model or self.model, *flags, "--prefill", sizes.prefill, "--batch", batches,
            "--context", sizes.context, "--long-context", "0", "--tokens", sizes.tokens, "--repeat", sizes.repeat,
            "--limit", "20", "--json", json_file]

    def bench(self, name, file, flags, most, model=None):
        if not has_checkpoint(model or self.model):
            self.steps.skip(name, "no checkpoint")
            return
        json_file = self.steps.results / f"{file}.json"
        command = self.bench_command(flags, self.sizes.batches, json_file, model)
        self.steps.command(name, command, most, env=self.tools.environment(), json_file=json_file, shown=120)

    def baseline(self):
        """What the others are set beside."""
        baseline = self.steps.results / "bench.json"
        return ["--baseline", baseline] if baseline.exists() else []

    def bench_cluster(self):
        """Four expert processes, attention and a router, all on the one GPU."""
        self.needs(self.model)
        self.needs_etcd()
        shards = [f"{number}/4" for number in range(1, 5)]
        json_file = self.steps.results / "bench-cluster.json"
        processes, _, grpc = self.cluster(self.model, shards, "cluster")
        with processes:
            pids = ",".join(map(str, processes.pids("etcd")))
            flags = ["--url", f"http://127.0.0.1:{grpc}", "--device", self.device, "--pids", pids, *self.baseline()]
            command = [str(word) for word in self.bench_command(flags, self.sizes.cluster_batches, json_file)]
            done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout, done.stderr, sep="", end="", flush=True)
        if done.returncode != 0:
            raise Failure(f"status {done.returncode}")
        return json.loads(json_file.read_text())

    def needs(self, model):
        if not has_checkpoint(model):
            raise Skip("no checkpoint")

    def needs_etcd(self):
        if not self.tools.etcd:
            raise Skip("no etcd was carried")

    def cluster(self, model, shards, name, way=None):
        """`way`: layers are dispatched by attention itself, rows and sums go that way."""
        data = self.tools.scratch / f"etcd-{name}"
        programs, folder = (self.tools.conclave, self.tools.etcd), self.steps.results / name
        attention = self.step() + (["--dispatch", "embedded"] if way else [])
        more = (way.flags(), self.environment(way)) if way else ()
        return cluster(*programs, model, self.device, shards, attention, folder, data, *more)

    def environment(self, way):
        """Of each process. NCCL refuses two processes with one GPU, unless it takes them for those of two hosts; then they talk
        over sockets."""
        if way.payload != "nccl":
            return lambda name: {}
        return lambda name: self.tools.environment() | {"NCCL_HOSTID": name}

    def serve(self, model, name):
        return serve(self.tools.conclave, model, self.device, self.steps.results / name)

    def same_bits(self, model, of):
        """Tokens and logprobs of one request: in one process, over 1, 2 and 4 expert processes, and when one is killed."""
        tokens = self.sizes.stream
        self.needs(model)
        prompt = prompt_of(model, 600)
        processes, port = self.serve(model, f"one-process{of}")
        with processes:
            expected = stream(port, prompt, tokens)
            answers = {"again": stream(port, prompt, tokens)}
        self.needs_etcd()
        for count in (1, 2, 4):
            shards = [f"{number}/{count}" for number in range(1, count + 1)]
            processes, port, _ = self.cluster(model, shards, f"experts-{count}{of}")
            with processes:
                answers[f"{count} expert processes"] = stream(port, prompt, tokens)
        processes, port, _ = self.cluster(model, ["1/2", "2/2", "1/2", "2/2"], f"expert-killed{of}")
        with processes:
            answers["an expert killed"] = killed(processes, port, prompt, tokens)
        return compared(expected, answers)

    def payloads(self):
        """Tokens and logprobs of one request over four shards, two of each cell, by each way of rows and sums, one shard of
        which is killed; and how long the tokens take."""
        model, tokens = self.bits_model, self.sizes.stream
        self.needs(model)
        self.needs_etcd()
        prompt, answers, found = prompt_of(model, 300), {}, {}
        for way in self.ways():
            try:
                processes, port, _ = self.cluster(model, ["1/2", "2/2", "1/2", "2/2"], f"payload-{way.file()}", way)
            except Failure as why:
                if way.payload != "nccl":
                    raise
                print(f"    {way.name()}: {why}", flush=True)
                found["nccl, refused"] = str(why)
                continue
            with processes:
                answers[way.name()] = stream(port, prompt, tokens)
                before, began = processes.batches(), time.monotonic()
                answers[f"{way.name()}, again"] = stream(port, prompt, tokens)
                found[f"{way.name()}, seconds"] = time.monotonic() - began
                after, ended = processes.batches(), processes.lines("attention", "a link has ended")
                answers[f"{way.name()}, an expert killed"] = killed(processes, port, prompt, tokens)
                links = processes.lines("attention", "payload=")
            took = {by: count - before.get(by, 0) for by, count in after.items()}
            print(f"    {way.name()}: {tokens} tokens in {found[f'{way.name()}, seconds']:.2f} s, batches by {took}",
                  *links[:4], *ended[:2], sep="\n      ", flush=True)
            found[f"{way.name()}, batches"] = took
            used, past = sum(took.get(by, 0) for by in ("ipc", "nccl")), self.device == "cuda" and way.payload != "messages"
            if way.payload == "nccl" and ended:
                # NCCL does not take every pair of processes; messages are what remains.
                found["nccl, refused"] = ended[0]
            elif (used > 0) != past:
                raise Failure(f"{way.name()}: {used} of {sum(took.values())} batches past the messages: {links[:1]}")
        return compared(answers["messages"], answers) | found

    def ways(self):
        """Of rows and sums, that there are here."""
        ways = [Way("messages"), Way("auto")]
        if self.device == "cuda":
            ways.append(Way("ipc"))
            if self.tools.nccl:
                ways += [Way("messages", near=False), Way("nccl", near=False)]
            else:
                print("    nccl: no libnccl.so was found", flush=True)
        return ways

    def beside(self):
        """transformers' logprobs of a prompt beside ours, and its speed."""
        for package in ("torch", "transformers"):
            if self.steps.about["libraries"][package] is None:
                raise Skip(f"python3 here has no {package}")
        self.needs(self.model)
        prompt = prompt_of(self.model, 64)
        processes, port = self.serve(self.model, "score")
        with processes:
            ours = score(port, prompt)
        sizes, script = self.sizes, Path(__file__).with_name("beside.py")
        words = [
            sys.executable, script, self.model, self.device, sizes.prefill, sizes.cluster_batches, sizes.tokens,
            sizes.context, ",".join(map(str, prompt))]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        (self.steps.results / "beside.log").write_text(done.stderr)
        if done.returncode != 0:
            raise Failure(f"status {done.returncode}: {' | '.join(done.stderr.splitlines()[-3:])}")
        found = json.loads(done.stdout.splitlines()[-1])
        differences = [abs(a - b) for a, b in zip(ours, found.pop("logprobs"), strict=True)]
        found |= {"logprobs, mean difference": sum(differences) / len(differences), "largest": max(differences)}
        for name, value in found.items():
            print(f"    transformers, {name}: {value:.4g}", flush=True)
        return found
