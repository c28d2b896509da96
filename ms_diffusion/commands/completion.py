"""Print a script that completes commands, flags and their values in a shell: `completion bash`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import tyro

from ..fields import OneOf, unfold
from ..runtime import command
from ..training.config import Config
from . import COMMANDS
from .parse import parse

BASHCOMPINIT = "autoload -U +X bashcompinit && bashcompinit\n"  # lets zsh read what follows
SCRIPT = """{first}_ms_diffusion() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
        esac
        case "${{COMP_WORDS[1]}} $word" in
{flags}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _ms_diffusion ms-diffusion
"""


@dataclass
class Args:
    """Print a script that completes the commands of ms-diffusion, their flags and what these may be set to."""

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """The shell that reads it."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog=command("completion"))
    print(script(args.shell), end="")
    return 0


def script(shell: str) -> str:
    """The script. It holds all words, so that completing starts no program: files are completed where there are none."""
    known: dict[str, dict[str, list[str]]] = {name: {} for name in COMMANDS}
    for name, found in known.items():
        for flag, choices in flags_of(import_module(f".{name}", __package__).Args):
            found[flag] = list(dict.fromkeys([*found.get(flag, []), *choices]))  # kinds of runs share names of flags
    flags = [f'            "{name} -"*) words="{" ".join([*found, "--help"])}" ;;' for name, found in known.items()]
    values = [
        f'            "{name} {flag}") words="{" ".join(choices)}" ;;'
        for name, found in known.items()
        for flag, choices in found.items()
        if choices
    ]
    values += [f'            "completion completion") words="{" ".join(get_args(get_type_hints(Args)["shell"]))}" ;;']
    lines = {"commands": " ".join(COMMANDS), "values": "\n".join(values), "flags": "\n".join(flags)}
    return SCRIPT.format(first=BASHCOMPINIT if shell == "zsh" else "", **lines)


def flags_of(cls: type, prefix: str = "--") -> Iterator[tuple[str, list[str]]]:
    """Each flag of a command line's dataclass, with the names that it may be set to; [] where any value may be."""
    hints = get_type_hints(cls, include_extras=True)
    for each in fields(cls):
        parts = unfold(hints[each.name])
        if tyro.conf.Suppress in parts or tyro.conf.Positional in parts:
            continue
        name = next((p.name for p in parts if type(p).__name__ == "_ArgConfig"), each.name.replace("_", "-"))
        inner = [part for part in parts if isinstance(part, type) and is_dataclass(part)]
        for part in Config.kinds.values() if Config in inner else inner:  # of training: the flags of all kinds of runs
            yield from flags_of(part, f"{prefix}{name}." if name else prefix)
        if bool in parts:
            yield from [(f"{prefix}{name}", []), (f"{prefix}no-{name}", [])]
        elif not inner:
            literals = [str(value) for part in parts if get_origin(part) is Literal for value in get_args(part)]
            registries = [[*part.registry, *part.extra] for part in parts if isinstance(part, OneOf)]
            yield f"{prefix}{name}", [*literals, *(value for names in registries for value in names)]
