"""Write docs/flags.md, a table for each dataclass of the command lines: python -m docs.make_flags."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from ms_diffusion import process, sampling
from ms_diffusion.commands import train_classifier
from ms_diffusion.fields import Bounds, OneOf
from ms_diffusion.models import autoencoder, context, mlp, unet
from ms_diffusion.training import presets

HEADER = """# Flags

Written by `python -m docs.make_flags` from the configuration classes. A preset changes the defaults of `train`;
`python train.py --preset NAME --help` prints them.
"""
TABLES = [  # title, dataclass, prefix of its flags, base class with a table of its own
    ("train", presets.Config, "--"),
    ("train: images", presets.DataConfig, "--data."),
    ("train: points", presets.PointsConfig, "--data."),
    ("train: diffusion", process.DiffusionConfig, "--diffusion."),
    ("train: training", presets.TrainConfig, "--train."),
    ("train: training of an autoencoder", presets.AutoencoderTrainConfig, "--train.", presets.TrainConfig),
    ("train: U-Net (images)", unet.UnetConfig, "--model."),
    ("train: U-Net (latents)", context.LatentUnetConfig, "--model."),
    ("train: autoencoder", autoencoder.AutoencoderConfig, "--model."),
    ("train: residual MLP (points)", mlp.ResidualMLPConfig, "--model."),
    ("train: MLP (points, preset scurve-seed)", mlp.MLPConfig, "--model."),
    ("sample, evaluate: sampling", sampling.Sampling, "--"),
    ("train-classifier", train_classifier.Args, "--"),
]


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass and of its bases."""
    body = [node for base in reversed(cls.__mro__[:-1]) for node in ast.parse(inspect.getsource(base)).body[0].body]
    pairs = [(a, b) for a, b in zip(body, body[1:], strict=False) if type(a) is ast.AnnAssign and type(b) is ast.Expr]
    return {field.target.id: " ".join(ast.literal_eval(text.value).split()) for field, text in pairs}


def unfold(hint: Any) -> list:
    """A type, and all types, values and marks inside it."""
    return [hint, *(part for inner in get_args(hint) for part in unfold(inner))]


def rows(cls: type, prefix: str, base: type | None = None, defaults: Any = None) -> Iterator[str]:
    """A table row for each field; a dataclass in it is expanded where its flags have no prefix, and skipped otherwise."""
    docs, hints = field_docs(cls), get_type_hints(cls, include_extras=True)
    for f in fields(cls):
        parts = list(dict.fromkeys(unfold(hints[f.name])))
        inner = [part for part in parts if isinstance(part, type) and is_dataclass(part)]
        name = next((p.name for p in parts if type(p).__name__ == "_ArgConfig"), f.name.replace("_", "-"))
        default = getattr(defaults, f.name, f.default if f.default_factory is MISSING else f.default_factory())
        if inner and name == "":
            yield from rows(inner[0], prefix, defaults=default)
        elif not inner and not (base and f.name in field_docs(base)):
            flag = f"`{name.upper()}`" if tyro.conf.Positional in parts else f"`{prefix}{name}`"
            flag += f", `{prefix}no-{name}`" if bool in parts else ""
            default = " ".join(map(str, default)) if isinstance(default, tuple) else default
            choices = [str(value) for part in parts if get_origin(part) is Literal for value in get_args(part)]
            choices += [each for part in parts if isinstance(part, OneOf) for each in part.names]
            text = " ".join([docs[f.name], *[f"One of {', '.join(choices)}."] * bool(choices)]).replace("|", "\\|")
            for p in (part for part in parts if isinstance(part, Bounds)):
                text += f" Range: {'[('[p.low_open]}{p.low:g}, {p.high:g}{'])'[p.high_open or p.high == float('inf')]}."
            yield f"| {flag} | {'required' if default is MISSING else f'`{default}`'} | {text} |".replace("``", "")


def render() -> str:
    head = "| flag | default | description |\n|---|---|---|\n"
    return HEADER + "".join(f"\n## {title}\n\n{head}" + "\n".join(rows(*rest)) + "\n" for title, *rest in TABLES)


if __name__ == "__main__":
    Path(__file__).with_name("flags.md").write_text(render())
