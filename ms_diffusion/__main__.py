"""The programs: `ms-diffusion COMMAND`, `python -m ms_diffusion COMMAND`, and in a clone `python train.py`, `sample.py`."""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__, runtime, versions
from .runtime import UserError

COMMANDS = {
    "train": "train a run, or continue one",
    "sample": "draw samples from a run, or edit images with it",
    "evaluate": "score samples against real images",
    "app": "a page in the browser that draws and edits with a run",
    "likelihood": "bits per dimension of images under a run",
    "benchmark": "time training and sampling on this machine",
    "doctor": "say whether this machine can train, and what to mend",
    "audit": "list the primitives of a preset's graphs and how each device runs them",
    "export": "write a run's networks as ONNX or MindIR, or their weights, for other programs",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 after bad input, 130 after an interruption."""
    return runtime.run_program(run_command, sys.argv[1:] if argv is None else argv)


def run_command(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print("usage: ms-diffusion COMMAND ...; COMMAND --help lists its flags\n")
        print("\n".join(f"  {command:18}{text}" for command, text in COMMANDS.items()))
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
    if name != "doctor":
        versions.check()
        versions.check_limits()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its list of fonts
    runtime.catch_interrupts()  # must precede the import of MindSpore
    try:
        module = import_module(f".commands.{name.replace('-', '_')}", __package__)
    except ModuleNotFoundError as e:
        if not e.name or e.name.startswith(("ms_diffusion", "mindspore")):
            raise
        raise UserError(
            f"the package {e.name} is missing: install this package with pip, which brings all that it needs"
        ) from e
    return module.main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
