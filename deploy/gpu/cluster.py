"""Conclave on this machine: in one process or in several, and requests to it."""

import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import time


# Seconds until processes are ready, and between two parts of an answer.
READY, ANSWER = 120, 60


class Failure(Exception):
    """Something did not go as it should."""


# Where ports are looked for: below those that systems give to connections. Processes side by side begin at different places.
PORTS = range(15_000, 30_000)
ports = itertools.islice(itertools.cycle(PORTS), os.getpid() * 97 % len(PORTS), None)


def free_port():
    """A port that nobody has, and nobody is given by chance before it is used."""
    for port in itertools.islice(ports, len(PORTS)):
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise Failure("no free port")


class Processes:
    """Some processes, which end when this does."""

    def __init__(self, folder):
        self.folder, self.running, self.admin = folder, {}, None
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self, name, command, env=None):
        with open(self.folder / f"{name}.log", "wb") as log:
            self.running[name] = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | (env or {}))

    def kill(self, name):
        """As a machine that loses power."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self):
        # Routers first, etcd last: nobody is left without the one it needs.
        for process in reversed(self.running.values()):
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()

    def pids(self, *without):
        return [process.pid for name, process in self.running.items() if name not in without]

    def wait(self, port, path):
        """Until `path` answers well, every process still running."""
        end = time.monotonic() + READY
        while time.monotonic() < end:
            for name, process in self.running.items():
                if process.poll() is not None:
                    raise Failure(f"{name} ended with status {process.returncode}: {self.last_words(name)}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise Failure(f"{path} of port {port}: not well after {READY} s")

    def lines(self, name, word=""):
        """Of its log, those with a word in them."""
        lines = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
        return [line for line in lines if word in line]

    def batches(self):
        """Of attention: how many went to experts by which way of their rows."""
        connection = http.client.HTTPConnection("127.0.0.1", self.admin, timeout=2)
        connection.request("GET", "/metrics")
        text, series = connection.getresponse().read().decode(), 'conclave_dispatch_batches_total{payload="'
        counts = (line.removeprefix(series).split('"} ') for line in text.splitlines() if line.startswith(series))
        return {way: int(float(count)) for way, count in counts}

    def last_words(self, name):
        return " | ".join(self.lines(name)[-3:])


def serve(conclave, model, device, folder):
    """All in one process; gives the processes and the port of its API."""
    processes, port = Processes(folder), free_port()
    processes.start("serve", [
        conclave, "serve", "--model", model, "--device", device, "--http", f"127.0.0.1:{port}",
        "--grpc", f"127.0.0.1:{free_port()}", "--log", "info"])
    return ready(processes, port), port


def cluster(conclave, etcd, model, device, shards, attention, folder, data, both=(), env=lambda name: {}):
    """etcd (its files in `data`), an expert process for each of `shards`, attention with its own flags, a router; `both` are
    flags of experts and attention, `env` is more of the environment of each by its name. Gives the processes and the ports of
    its APIs."""
    processes = Processes(folder)
    etcd_port, peer, port, grpc, processes.admin = (free_port() for _ in range(5))
    url, peers = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer}"
    processes.start("etcd", [
        etcd, "--name", "local", "--data-dir", data, "--listen-client-urls", url,
        "--advertise-client-urls", url, "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers,
        "--initial-cluster", f"local={peers}"])
    try:
        processes.wait(etcd_port, "/health")
        common = ["--model", model, "--etcd", url]
        own = ["--device", device, "--grpc", "127.0.0.1:0", *both]
        for number, shard in enumerate(shards):
            name, expert = f"expert-{number}", [*common, *own, "--admin", "127.0.0.1:0", "--shard", shard]
            processes.start(name, [conclave, "expert", *expert], env(name))
        attention = [*common, *own, "--admin", f"127.0.0.1:{processes.admin}", *attention]
        processes.start("attention", [conclave, "attention", *attention], env("attention"))
        processes.start("router", [conclave, "router", *common, "--http", f"127.0.0.1:{port}", "--grpc", f"127.0.0.1:{grpc}"])
    except BaseException:
        processes.stop()
        raise
    return ready(processes, port), port, grpc


def ready(processes, port):
    """The processes, once the API is ready; none where it does not get so."""
    try:
        processes.wait(port, "/readyz")
    except BaseException:
        processes.stop()
        raise
    return processes


def post(port, body):
    """The answer to a completion request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise Failure(f"HTTP {answer.status}: {answer.read(500).decode(errors='replace')}")
    return answer


def stream(port, prompt, tokens, at_token=lambda count: None):
    """Tokens and logprobs of a seeded request, as text so that no bit is lost; `at_token` is told how many are there."""
    body = {"prompt": prompt, "max_tokens": tokens, "seed": 7, "temperature": 0.8, "logprobs": 1, "ignore_eos": True,
            "return_token_ids": True, "stream": True}
    found = []
    for line in post(port, body):
        data = line.strip().removeprefix(b"data: ")
        if not data or data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise Failure(f"the stream ended with {event['error']}")
        for choice in event["choices"]:
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
            found += [f"{token} {logprob!r}" for token, logprob in zip(choice.get("token_ids") or [], logprobs)]
        at_token(len(found))
    if len(found) != tokens:
        raise Failure(f"found {len(found)} tokens, expected {tokens}")
    return found


def score(port, prompt):
    """Logprobs of the tokens of a prompt, but for the first."""
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = json.load(post(port, body))
    return answer["choices"][0]["logprobs"]["token_logprobs"][1:]
