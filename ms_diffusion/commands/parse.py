"""Command lines from dataclasses, through tyro, with errors of one line."""

import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Container, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from ..runtime import UserError

T = TypeVar("T")
FLAG = re.compile("-+[a-zA-Z]")  # -1 is a value


def parse(cls: type[T], argv: Sequence[str], default: T | None = None, prog: str | None = None) -> T:
    """An instance of the dataclass `cls` from the command line. On ModelArts unknown flags are ignored.
    Raises UserError for an unknown flag, or a value of the wrong type."""
    plain: Any = tyro.conf.AvoidSubcommands[cls]  # type: ignore[valid-type]  # of a union, the default's class is used
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            args, unknown = tyro.cli(plain, prog=prog, default=default, args=argv, return_unknown_args=True)
    except SystemExit as e:
        if not e.code:
            raise
        text = re.split(r"─{20,}(?![╮╯])", messages.getvalue().split("╮", 1)[-1])[0]
        raise UserError(f"{' '.join(re.sub('[│╭╮╰╯─]', ' ', text).split())} (see --help)") from e
    if not unknown:
        return args
    flags = [argument.split("=")[0] for argument in unknown if FLAG.match(argument)] or unknown
    dotted = [flag for flag in flags if "." in flag]
    on_platform = on_modelarts() or getattr(args, "data_url", None) or getattr(args, "train_url", None)
    if dotted or not on_platform:
        flag = (dotted or flags)[0]
        usage, width = io.StringIO(), os.environ.pop("COLUMNS", None)
        os.environ["COLUMNS"] = "1000"  # narrower, a flag could be cut
        with contextlib.redirect_stdout(usage), contextlib.suppress(SystemExit):
            tyro.cli(plain, default=default, args=["--help"])
        os.environ.pop("COLUMNS")
        os.environ |= {} if width is None else {"COLUMNS": width}
        known = re.findall(r"--[\w.-]+", usage.getvalue())
        close = difflib.get_close_matches(flag.replace("_", "-"), known, 1, 0.5)
        raise UserError(f"unknown argument {repr(flag)[1:-1]}: " + (f"did you mean {close[0]}?" if close else "see --help"))
    own, ignored = split_flags(argv, set(flags))
    print(f"ignoring arguments of the platform: {' '.join(ignored)}", file=sys.stderr)
    return tyro.cli(plain, prog=prog, default=default, args=own, return_unknown_args=True)[0]


def on_modelarts() -> bool:
    return any(name in os.environ for name in ("MA_JOB_DIR", "MA_NUM_HOSTS", "MA_NUM_GPUS"))


def split_flags(argv: Sequence[str], flags: Container[str]) -> tuple[list[str], list[str]]:
    """(the other arguments, these flags with their values): tyro would take such values for arguments without a flag."""
    parts: tuple[list[str], list[str]] = ([], [])
    takes_value = False
    for argument in argv:
        is_flag, (flag, equals, _) = FLAG.match(argument), argument.partition("=")
        found = flag in flags if is_flag else takes_value
        parts[found].append(argument)
        takes_value = bool(is_flag and found and not equals)
    return parts


def rename_flags(argv: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """The command line with today's names of flags; a line on stderr names each that was replaced. `renamed` maps the old
    dotted name of a field to its new name."""
    flags = {f"--{old.replace('_', '-')}": f"--{new.replace('_', '-')}" for old, new in renamed.items()}
    result = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if new := flags.get(flag.replace("_", "-")):
            print(f"note: {flag} is now called {new}", file=sys.stderr)
            argument = new + equals + value
        result.append(argument)
    return result
