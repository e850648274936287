"""The steps of a run: each within its time, and on disk with what it found as soon as it is over."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path


class Skip(Exception):
    """A step cannot be done here; says why."""


class Steps:
    """Runs steps until `total` seconds are over; what is left then is skipped."""

    def __init__(self, results, total, about):
        self.results, self.about, self.steps = Path(results), about, []
        self.began, self.total = time.monotonic(), total
        self.results.mkdir(parents=True, exist_ok=True)
        self._write()

    def left(self):
        """Seconds."""
        return self.total - (time.monotonic() - self.began)

    def failed(self):
        return any(step["state"] == "failed" for step in self.steps)

    def command(self, name, command, most, *, env=None, json_file=None, shown=0):
        """Runs a program for at most `most` seconds; `shown` lines of its end are printed, more where it fails. What it writes
        to `json_file` is kept, however it ends. Gives whether it ended well."""

        def run(limit):
            log = self.results / f"{file_name(name)}.log"
            status = run_within(command, limit, log, env)
            lines = log.read_text(errors="replace").splitlines()
            found = read_json(json_file)
            if status != 0:
                why = f"no end after {limit:.0f} s" if status is None else f"status {status}"
                return "failed", why, found, lines[-20:]
            return "passed", None, found, lines[-shown:] if shown else []

        if json_file is not None:
            Path(json_file).unlink(missing_ok=True)
        return self._step(name, most, run)

    def call(self, name, function, most):
        """Calls a function, which gives what it found and raises where that is wrong. Gives whether it went well."""

        def run(limit):
            try:
                with alarm(limit):
                    found = function()
            except Skip as why:
                return "skipped", str(why), None, []
            except Exception as error:  # whatever it is, the next step runs
                return "failed", f"{type(error).__name__}: {error}", None, []
            return "passed", None, found, []

        return self._step(name, most, run)

    def skip(self, name, why):
        self._end(name, "skipped", why, None, 0.0)
        return False

    def _step(self, name, most, run):
        limit, began = min(most, self.left()), time.monotonic()
        # A fraction of the time shows nothing: better the next step, which may be shorter.
        if limit < most / 4:
            return self.skip(name, f"{max(self.left(), 0):.0f} of {self.total:.0f} s left, up to {most} wanted")
        state, why, found, lines = run(limit)
        self._end(name, state, why, found, time.monotonic() - began)
        for line in lines:
            print(f"    {line}", flush=True)
        return state == "passed"

    def _end(self, name, state, why, found, seconds):
        step = {"name": name, "state": state, "seconds": round(seconds, 1)}
        step |= {"why": why} if why else {}
        step |= {"found": found} if found is not None else {}
        self.steps.append(step)
        self._write()
        reason = f": {why}" if why else ""
        print(f"SKIP {name}{reason}" if state == "skipped" else f"{name:<32} {state} in {seconds:.0f} s{reason}", flush=True)

    def _write(self):
        whole = {**self.about, "seconds_total": self.total, "steps": self.steps}
        path = self.results / "results.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(whole, indent=1) + "\n")
        new.replace(path)


@contextlib.contextmanager
def alarm(seconds):
    """Raises what stands within it once the time is over."""

    def ring(*_):
        raise TimeoutError(f"no end after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def file_name(name):
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def read_json(path):
    """What lies there, if anything whole does."""
    try:
        return json.loads(Path(path).read_text()) if path else None
    except (OSError, ValueError):
        return None


def run_within(command, limit, log, env=None):
    """The exit status of a program, its output in `log`; None if it had to be ended, with all that it started."""
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})}, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
