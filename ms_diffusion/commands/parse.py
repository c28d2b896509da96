"""Command lines from dataclasses, by tyro, with errors of one line."""

import contextlib
import difflib
import io
import re
import sys

import tyro

from ..runtime import UserError
from . import modelarts


def parse(cls, default=None, argv=None):
    """An instance of the dataclass `cls` from the command line; on ModelArts, flags it does not know are passed over.

    Raises:
        UserError: an unknown flag or a value that does not fit.
    """
    argv = sys.argv[1:] if argv is None else argv
    cls = tyro.conf.AvoidSubcommands[cls]  # a union is of the kind that the default is
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            args, unknown = tyro.cli(cls, default=default, args=argv, return_unknown_args=True)
    except SystemExit as e:
        if not e.code:
            raise
        text = re.split(r"─{20,}(?![╮╯])", messages.getvalue().split("╮", 1)[-1])[0]
        raise UserError(f"{' '.join(re.sub('[│╭╮╰╯─]', ' ', text).split())} (see --help)") from e
    flags = [flag for flag in unknown if flag.startswith("-")] or unknown
    dotted = [flag for flag in flags if "." in flag]
    if dotted or (
        flags and not (modelarts.on_modelarts() or getattr(args, "data_url", None) or getattr(args, "train_url", None))
    ):
        flag = (dotted or flags)[0].split("=")[0]
        known = re.findall(r"--[\w.-]+", _help(cls, default))
        close = difflib.get_close_matches(flag.replace("_", "-"), known, 1, 0.5)
        raise UserError(f"unknown argument {flag}: " + (f"did you mean {close[0]}?" if close else "see --help"))
    if flags:
        print(f"passing over arguments of the platform: {' '.join(unknown)}", file=sys.stderr)
    return args


def _help(cls, default) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(cls, default=default, args=["--help"])
    return text.getvalue()
