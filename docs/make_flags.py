"""Write docs/flags.md, a table for each dataclass of the command lines: python -m docs.make_flags."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import tyro

import ms_diffusion as md
from ms_diffusion.commands import (
    app,
    audit,
    benchmark,
    completion,
    doctor,
    evaluate,
    export,
    likelihood,
    report,
    runs,
    sample,
    train,
)
from ms_diffusion.fields import Bounds, OneOf, find_problem, unfold
from ms_diffusion.training import config

HEADER = """# Flags

Written by `python -m docs.make_flags`. `python train.py --preset NAME --help` prints the defaults of a preset.
"""
TABLES = [  # title, dataclass, prefix of its flags, base class with a table of its own
    ("train", train.Args, "--"),
    ("train: latents", md.LatentConfig, "--", md.Config),
    ("train: images", md.DataConfig, "--data."),
    ("train: points", md.PointsDataConfig, "--data."),
    ("train: diffusion", md.DiffusionConfig, "--diffusion."),
    ("train: U-Net (images)", md.UnetConfig, "--model."),
    ("train: DiT (images, preset fashion-mnist-dit)", md.DiTConfig, "--model."),
    ("train: U-Net (latents)", md.LatentUnetConfig, "--model."),
    ("train: autoencoder", md.AutoencoderConfig, "--model."),
    ("train: VQ autoencoder, in addition", md.VQConfig, "--model.", md.AutoencoderConfig),
    ("train: residual MLP (points)", md.ResidualMLPConfig, "--model."),
    ("train: MLP (points, preset scurve-seed)", md.MLPConfig, "--model."),
    ("train: training, all kinds of runs", config.TrainConfig, "--train."),
    ("train: training of diffusion models", config.DiffusionTrainConfig, "--train.", config.TrainConfig),
    ("train: training on images and latents", config.ImageTrainConfig, "--train.", config.DiffusionTrainConfig),
    ("train: training of autoencoders", md.AutoencoderTrainConfig, "--train.", config.TrainConfig),
    ("runs", runs.Args, "--"),
    ("report", report.Args, "--"),
    ("sample", sample.Args, "--"),
    ("app", app.Args, "--"),
    ("evaluate", evaluate.Args, "--"),
    ("likelihood", likelihood.Args, "--"),
    ("benchmark", benchmark.Args, "--"),
    ("audit", audit.Args, "--"),
    ("doctor", doctor.Args, "--"),
    ("export", export.Args, "--"),
    ("completion", completion.Args, "--"),
]


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass and of its bases."""
    body = [n for c in reversed(cls.__mro__) if is_dataclass(c) for n in ast.parse(inspect.getsource(c)).body[0].body]
    pairs = [(a, b) for a, b in zip(body, body[1:], strict=False) if type(a) is ast.AnnAssign and type(b) is ast.Expr]
    return {field.target.id: " ".join(ast.literal_eval(text.value).replace("|", "\\|").split()) for field, text in pairs}


def rows(cls: type, prefix: str, base: type | None = None, defaults: Any = None) -> Iterator[str]:
    """A table row for each field; a dataclass in it is expanded where its flags have no prefix, and skipped otherwise."""
    docs, hints = field_docs(cls), get_type_hints(cls, include_extras=True)
    for f in fields(cls):
        default = getattr(defaults, f.name, f.default if f.default_factory is MISSING else f.default_factory())
        parts = list(dict.fromkeys([*unfold(hints[f.name]), type(default)]))
        inner = [part for part in parts if isinstance(part, type) and is_dataclass(part)]
        name = next((p.name for p in parts if type(p).__name__ == "_ArgConfig"), f.name.replace("_", "-"))
        if inner and name == "":
            yield from rows(inner[0], prefix, defaults=default)
        elif not inner and hints[f.name] is not Any and not (base and f.name in field_docs(base)):
            flag = f"`{prefix}{name}`" + f", `{prefix}no-{name}`" * (hints[f.name] is bool)
            flag = f"`{name.upper()}`" if tyro.conf.Positional in parts else flag
            default = " ".join(map(str, default)) if isinstance(default, tuple) else default
            notes = [find_problem(float("nan"), part) for part in parts if get_origin(part) is Literal]
            notes += [part.problem(float("nan")) for part in parts if isinstance(part, Bounds | OneOf)]
            text = " ".join([docs[f.name], *(f"{note[0].upper()}{note[1:]}." for note in notes)])
            default = "required" if default is MISSING else f"`{default}`".replace("``", "")
            yield f"| {flag} | {default} | {text} |"


def render() -> str:
    head = "| flag | default | description |\n|---|---|---|\n"
    return HEADER + "".join(f"\n## {title}\n\n{head}" + "\n".join(rows(*rest)) + "\n" for title, *rest in TABLES)


if __name__ == "__main__":
    Path(__file__).with_name("flags.md").write_text(render())
