"""Timing in worker processes: each has its own peak memory, and all but one sleep while that one works.

This module does not import MindSpore, so that a worker can run another framework.
"""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from typing import Any

import numpy as np

from ms_diffusion.runtime import UserError

Times = dict[str, list[float]]  # seconds of each round, by the worker's name
MAX_SPREAD = 0.2  # largest interquartile range of the rounds' ratios, relative to their median, that allows a verdict


class Worker:
    """A process that builds an object and times its methods.

    Args:
        factory: "module:function", which makes the object.
        args: Its arguments, JSON values.
        env: Environment variables that only this process gets.
    """

    def __init__(self, factory: str, *args: Any, env: dict[str, str] | None = None):
        # os.environ lacks the OMP_NUM_THREADS=1 that MindSpore's C++ sets in this process; PyTorch would obey it.
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, factory, json.dumps(args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
        )
        self.memory = 0.0  # MiB, peak, after the last call

    def time(self, method: str, *args: int) -> float:
        """Seconds that one call of the object's method takes.

        Raises:
            UserError: the call or the construction of the object failed.
        """
        try:
            print(json.dumps((method, *args)), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass
        for line in self.process.stdout or ():
            if line.startswith('{"seconds"'):
                answer = json.loads(line)
                self.memory = answer["memory"]
                return answer["seconds"]
        raise UserError(f"{method} failed, see the messages above: try a smaller batch if the memory does not suffice")


class Workers(dict[str, Worker]):
    """Workers by name; their processes end with the `with` block."""

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self.values():
            worker.process.communicate()


def serve(work: Any) -> None:
    """Answer each line `[method, argument, ...]` on stdin with the seconds and the peak memory (MiB) on stdout."""
    for line in sys.stdin:
        method, *args = json.loads(line)
        start = time.perf_counter()
        getattr(work, method)(*args)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "memory": peak_memory()}), flush=True)


def peak_memory() -> float:
    """MiB: of the accelerator if it is used, otherwise of this process."""
    ms, torch = sys.modules.get("mindspore"), sys.modules.get("torch")
    if ms and ms.get_context("device_target") != "CPU":
        return ms.runtime.max_memory_allocated() / 2**20
    if torch and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status") as status:  # ru_maxrss begins with the parent's
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def alternate(workers: Workers, rounds: int, method: str, *args: int) -> Times:
    """Time a method on all workers in turns, A/B/A/B, after one call each that does not count.

    A round is the best of three calls, because the first wakes sleeping threads and fills caches. A call of 2 s or more
    needs no warm-up and is made once.
    """
    tries = {name: 3 if worker.time(method, *args) < 2 else 1 for name, worker in workers.items()}
    times: Times = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(min(worker.time(method, *args) for _ in range(tries[name])))
    return times


def ratio(times: Times) -> tuple[float, float] | None:
    """(median of the second worker's time / the first's, interquartile range / median), or None for a single worker."""
    if len(times) < 2:
        return None
    first, second = times.values()
    low, median, high = np.percentile(np.divide(second, first), (25, 50, 75))
    return float(median), float((high - low) / median)


def verdict(times: Times) -> str:
    """The ratio in words; no verdict where the rounds disagree; empty for a single worker."""
    if (pair := ratio(times)) is None:
        return ""
    value, spread = pair
    if spread > MAX_SPREAD:
        return f"no verdict: the rounds' ratios spread by {spread:.0%}; run it on a quiet machine"
    return f"{value:.2f}x the speed of {list(times)[1]} (spread {spread:.0%})"


if __name__ == "__main__":
    module, function = sys.argv[1].split(":")
    serve(getattr(import_module(module), function)(*json.loads(sys.argv[2])))
