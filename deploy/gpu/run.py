"""Checks and measures what there is of Conclave on this machine's GPU, the most valuable first. See gpu.sh.

A step is a check or a measurement with a time of its own; what there is no time or no program for is skipped with its reason.
With --cpu all that can be done without a GPU is done in small on the processor: a trial of this script.
"""

import argparse
import contextlib
import glob
import gzip
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from engine import Engine, Sizes
from steps import Steps

# The parts of the kernels' measurement, in order of value, and the longest time of each in seconds.
# The card comes first: it takes seconds, and what it gives is what the others are measured against.
PARTS = {"card": 40, "bits": 45, "attention": 60, "experts": 90, "trunk": 60, "fp8": 60, "rows": 30}

# How NCCL connects two processes of this machine which it takes for two hosts.
ONE_HOST = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"}

# Of an H200, in TFLOP/s of bf16, where the card would not tell.
PEAK = 790


def main():
    args = arguments()
    gpu = "none: on the processor" if args.cpu else name_of_gpu()
    with tempfile.TemporaryDirectory(prefix="conclave-gpu-") as scratch:
        sys.exit(run(args, gpu, Tools(args.package, Path(scratch))))


def run(args, gpu, tools):
    """All steps; gives whether one failed."""
    steps = Steps(args.results, args.total, {"gpu": gpu, "libraries": tools.libraries()})
    print(gpu, flush=True)
    for name, found in steps.about["libraries"].items():
        print(f"  {name}: {found or 'not found'}", flush=True)
    tests(steps, tools, ["sm90"])
    kernels(steps, tools, args.cpu)
    tests(steps, tools, ["devices", "cuda"])
    engine = Engine(steps, tools, "cpu" if args.cpu else "cuda", Sizes.small() if args.cpu else Sizes.full())
    engine.run(os.environ.get("MODEL"))
    sanitizer(steps, tools)
    print(steps.results / "results.json")
    return steps.failed()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--package", type=Path, default=here, help="where the programs lie")
    parser.add_argument("--results", type=Path, default=here / "results")
    parser.add_argument("--total", type=float, default=float(os.environ.get("SECONDS_TOTAL", 480)), metavar="SECONDS")
    parser.add_argument("--cpu", action="store_true", help="in small, on the processor")
    args = parser.parse_args()
    args.package, args.results = args.package.resolve(), args.results.resolve()
    return args


def name_of_gpu():
    """Ends everything where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"no GPU here: nvidia-smi: {getattr(error, 'stdout', '') or error}")


class Tools:
    """Programs and libraries, where they are."""

    def __init__(self, package, scratch):
        self.package, self.scratch = package, scratch
        self.conclave = self.program("conclave")
        # As it is carried, and as cargo leaves it.
        self.kernels = self.program("kernels") or self.program("examples/gpu")
        self.etcd = self.unpacked("etcd") or shutil.which("etcd")
        sanitizers = sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"))
        self.sanitizer = shutil.which("compute-sanitizer") or (sanitizers[-1] if sanitizers else None)
        self.cublas = library("libcublasLt.so")
        self.nccl = self.linked("libnccl.so")

    def program(self, name):
        path = self.package / name
        return path if path.is_file() else None

    def linked(self, name):
        """The path of a library by exactly this name: packages have it as `name.2` alone."""
        found, link = library(name), self.scratch / "lib" / name
        if found is None or Path(found).name == name:
            return found
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(found)
        return str(link)

    def unpacked(self, name):
        """The path of a program that is carried as `name.gz`."""
        packed, path = self.package / f"{name}.gz", self.scratch / name
        if not packed.exists():
            return None
        with gzip.open(packed) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target)
        path.chmod(0o755)
        return path

    def environment(self):
        """With NVIDIA's libraries where programs look for them; without a GPU, tests fail."""
        folders = [str(Path(path).parent) for path in (self.cublas, self.nccl) if path]
        folders += [folder for folder in [os.environ.get("LD_LIBRARY_PATH")] if folder]
        return {"REQUIRE_GPU": "1", "LD_LIBRARY_PATH": ":".join(folders), **ONE_HOST}

    def libraries(self):
        """What there is, with versions, for the results."""
        return {
            "etcd": str(self.etcd or ""),
            "cublasLt": self.cublas,
            "nccl": self.nccl and f"{self.nccl}, version {nccl_version(self.nccl)}",
            "compute-sanitizer": self.sanitizer,
            "torch": version("torch"),
            "transformers": version("transformers"),
        }


def library(name):
    """The path of a library of NVIDIA's: of the system, or of a Python package."""
    folders = ["/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"]
    folders += [f"{folder}/nvidia/*/lib" for folder in sys.path if folder]
    found = [path for folder in folders for path in sorted(glob.glob(f"{folder}/{name}*"))]
    return found[0] if found else None


def nccl_version(path):
    """As the library says; in a process of its own, as loading it may fail in any way."""
    code = f"import ctypes; v = ctypes.c_int(); ctypes.CDLL({path!r}).ncclGetVersion(ctypes.byref(v)); print(v.value)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def version(package):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def tests(steps, tools, names):
    """The kernels' tests, on the GPU as well."""
    for name in names:
        program = tools.program(f"tests/{name}")
        if program is None:
            steps.skip(f"test {name}", f"{tools.package}: no tests/{name}")
            continue
        command = [program, "--nocapture", "--test-threads=4"]
        steps.command(f"test {name}", command, 120, env=tools.environment(), shown=4)


def kernels(steps, tools, cpu):
    """Each part in a process of its own: what goes wrong in one leaves the others alone."""
    peak = []
    for part, most in PARTS.items():
        name = f"kernels {part}"
        if tools.kernels is None:
            steps.skip(name, f"{tools.package}: no kernels")
            continue
        json_file = steps.results / f"kernels-{part}.json"
        seconds = max(1, int(min(most, steps.left()) - 5))
        command = [tools.kernels, "--only", part, "--seconds", seconds, "--json", json_file]
        command += [*peak, *(["--shim"] if cpu else [])]
        well = steps.command(name, command, most, env=tools.environment(), json_file=json_file, shown=400)
        if part == "card" and not well:
            peak = ["--peak", PEAK]


def sanitizer(steps, tools):
    for tool in ["memcheck", "synccheck", "racecheck"]:
        name, program = f"{tool} of test sm90", tools.program("tests/sm90")
        if tools.sanitizer is None or program is None:
            steps.skip(name, "no compute-sanitizer" if program else f"{tools.package}: no tests/sm90")
            continue
        command = [tools.sanitizer, "--tool", tool, "--error-exitcode", "1", program, "--test-threads=1"]
        steps.command(name, command, 100, env=tools.environment(), shown=4)


if __name__ == "__main__":
    main()
