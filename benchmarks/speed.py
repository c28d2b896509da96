"""Compare the speed with PyTorch's: ``python -m benchmarks.speed --peer torch``.

Each network and batch size is built in two processes of its own, by us and by PyTorch in eager mode. They are timed in
turns, A/B/A/B, and while one works the other sleeps.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from ms_diffusion.commands import benchmark
from ms_diffusion.commands.parse import parse
from ms_diffusion.commands.workers import Worker, Workers
from ms_diffusion.runtime import UserError, run_program


@dataclass
class Args(benchmark.Args):
    """Time the presets by ms_diffusion and by PyTorch in turns, and print the ratios."""

    peer: Literal["none", "torch"] = "none"
    """torch also runs PyTorch, which must be installed, and prints ratios."""


def start_both(work: type, config: Any, batch_size: int, device: str) -> Workers:
    """The worker of ours and PyTorch's; its oneDNN is not limited to AVX2, as `runtime` limits MindSpore's."""
    from . import torch_work

    workers = benchmark.start_workers(work, config, batch_size, device)
    peer, size = torch_work.ImageWork, "size"
    if work is benchmark.PointsWork:
        peer, size = torch_work.PointsWork, "num"
    args = (asdict(config.model), getattr(config.data, size), batch_size, device)
    return Workers(**workers, PyTorch=Worker(peer, *args, env={"ONEDNN_MAX_CPU_ISA": "DEFAULT"}))


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv)
    if args.peer == "none":
        return benchmark.run(args, benchmark.measure_runs if args.runs else benchmark.measure)
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError("--peer torch needs PyTorch: pip install torch==2.13.0, or omit --peer") from None
    return benchmark.run(args, partial(benchmark.measure, start=start_both))


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
