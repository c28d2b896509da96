"""Write the networks of a run for other programs: `export runs/quick --format onnx`."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.numpy
import tyro

from .. import kernels, mindir
from ..files import check_output, write
from ..mindir import Input
from ..runtime import UserError, command, one_line, set_device
from ..training import exchange
from ..training.runs import Run, default_run
from .parse import parse

Output = tuple[Path, Callable[[], bytes], str]  # a file, what makes its content, and what to say of it beside its size
MOST_EXAMPLES, MOST_NUMBERS = 1000, 10**5  # classes or captions in the JSON, and numbers that stand for them


@dataclass
class Args:
    """Write the networks of a run for other programs: as ONNX or MindIR, with all that a sampler needs beside it as JSON, or
    their weights, under the names of this library, of CompVis latent-diffusion or of diffusers.

    A run of latents gives its decoder too, an autoencoder its encoder and its decoder."""

    run: Annotated[str | None, tyro.conf.Positional] = None
    """A run's folder, one of its checkpoints, or the name of a bundled model."""
    format: Literal["onnx", "mindir", "safetensors", "compvis", "diffusers", "lora"] = "onnx"
    """onnx needs the onnx package: pip install "ms_diffusion[export]". compvis and diffusers are for runs of latents and of
    autoencoders: one state dict, or a folder of models, each with its config.json. lora: the low-rank updates alone."""
    out: str | None = None
    """Path of the network; by default denoiser.onnx, or with the format's ending, in the folder `export` of the run. Other
    files lie beside it, for example denoiser.json and denoiser-decoder.onnx. For compvis it may end in .ckpt, which needs
    PyTorch; for diffusers it is a folder, by default export/diffusers."""
    weights: Literal["ema", "model"] = "ema"
    """Weights of the network: their moving average, or as trained."""
    half: bool = False
    """Write weights (safetensors, compvis, diffusers, lora) as float16."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog=command("export"))
    path = Path(args.run or default_run())
    make, endings = FORMATS[args.format]
    if args.half and make is graphs:
        raise UserError(f"--half is for weights, and --format {args.format} is a network in float32: leave it out")
    set_device("cpu")
    with kernels.disabled():
        run = Run(path, args.weights)
    part = "lora" if make is updates else "denoiser" if run.diffusion else "autoencoder"
    name = f"{part}{endings[0]}" if endings else args.format
    out = Path(args.out or (path if path.is_dir() else Path()) / "export" / name)
    if endings and out.suffix not in endings:
        raise UserError(f"--out is {out}: its name must end in {' or '.join(endings)}, or choose another --format")
    files = make(run, out, args)
    check_output(*(file for file, _, _ in files))
    for file, content, note in files:
        data = content()
        write(file, lambda f, data=data: f.write(data))
        print(one_line(f"{file}: {note or f'{len(data) / 1e6:.1f} MB'}"))
    return 0


def graphs(run: Run, out: Path, args: Args) -> list[Output]:
    description, networks = describe(run)

    def content(net: Any, inputs: list[Input], output: str) -> bytes:
        return mindir.to_onnx(net, inputs, output) if args.format == "onnx" else mindir.export(net, inputs)

    files = []
    for part, (net, inputs, output) in networks.items():
        file = out if part == "denoiser" else out.with_name(f"{out.stem}-{part}{out.suffix}")
        columns = [{"name": name, "shape": shape, "dtype": dtype} for name, shape, dtype in inputs]
        description[part] = {"file": file.name, "inputs": columns, "output": output}
        files.append((file, partial(content, net, inputs, output), ""))
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in {"format": args.format, **description}.items()]
    record = "{{\n{}\n}}\n".format(",\n".join(lines)).encode()
    return [*files, (out.with_suffix(".json"), lambda: record, "schedule, scales and inputs")]


def named_as_ours(run: Run, out: Path, args: Args) -> list[Output]:
    def file_of(part: str) -> Path:
        return out.with_name(f"{out.stem}-{part}{out.suffix}") if part == "autoencoder" and run.diffusion else out

    nets = exchange.networks(run).items()
    return [(file_of(part), lambda net=net: packed(exchange.arrays_of(net), args.half), "") for part, net in nets]


def named_as_compvis(run: Run, out: Path, args: Args) -> list[Output]:
    arrays = exchange.compvis_state_dict(run)
    if out.suffix == ".safetensors":
        return [(out, lambda: packed(arrays, args.half), "")]
    try:
        import torch
    except ImportError as e:
        raise UserError(f"{out}: writing .ckpt needs PyTorch: pip install torch, or choose --out NAME.safetensors") from e

    def content() -> bytes:
        file = io.BytesIO()
        state = {name: torch.from_numpy(np.array(a)) for name, a in in_type(arrays, args.half).items()}
        torch.save({"state_dict": state, "global_step": run.step}, file)
        return file.getvalue()

    return [(out, content, "")]


def named_as_diffusers(run: Run, out: Path, args: Args) -> list[Output]:
    files: list[Output] = []
    for folder, (record, arrays) in exchange.diffusers_models(run).items():
        kind = record.get("_class_name", "")
        name = {"DDIMScheduler": "scheduler_config.json", "LDMPipeline": "model_index.json"}.get(kind, "config.json")
        if record:
            text = json.dumps(record, indent=2).encode()
            files.append((out / folder / name, lambda text=text: text, kind))
        if arrays:
            file = out / folder / ("diffusion_pytorch_model.safetensors" if record else "model.safetensors")
            files.append((file, lambda arrays=arrays: packed(arrays, args.half), ""))
    return files


def updates(run: Run, out: Path, args: Args) -> list[Output]:
    return [(out, lambda: packed(exchange.updates(run), args.half), "")]


def in_type(arrays: Mapping[str, np.ndarray], half: bool) -> dict[str, np.ndarray]:
    """The arrays; where `half` is set, weights as float16, but not the tables of a schedule, whose names have no dot. Raises
    UserError if a weight is too large for that."""
    if not half:
        return dict(arrays)
    with np.errstate(over="ignore"):
        halves = {name: a.astype(np.float16) for name, a in arrays.items() if "." in name and a.ndim > 0}
    if wrong := [name for name, a in halves.items() if not np.isfinite(a).all()]:
        raise UserError(f"{wrong[0]} holds numbers that are too large for float16: leave out --half")
    return {**arrays, **halves}


def packed(arrays: Mapping[str, np.ndarray], half: bool) -> bytes:
    """A .safetensors file; transformers and diffusers read only those that are marked as PyTorch's."""
    return safetensors.numpy.save(in_type(arrays, half), {"format": "pt"})


# What makes the files of a format, and the endings of --out, of which the first is the default; none: a folder
FORMATS = {
    "onnx": (graphs, (".onnx",)),
    "mindir": (graphs, (".mindir",)),
    "safetensors": (named_as_ours, (".safetensors",)),
    "compvis": (named_as_compvis, (".safetensors", ".ckpt")),
    "diffusers": (named_as_diffusers, ()),
    "lora": (updates, (".safetensors",)),
}


def describe(run: Run) -> tuple[dict[str, Any], dict[str, tuple[Any, list[Input], str]]]:
    """What the JSON says of a run, and its networks by name: (network, inputs, name of the output)."""
    task, config, diffusion = run.task, run.config, run.diffusion
    description: dict[str, Any] = {"run": run.name, "step": run.step, "kind": config.kind}
    if diffusion is None:
        shape = (config.model.channels, config.data.size, config.data.size)
        encoder = mindir.Method(run.net, "encode"), [("image", shape, "float32")], "moments"
        return description, {"encoder": encoder, "decoder": decoder(run.net, task.latent_shape)}

    num, examples = 0, {}
    if task.null_label is not None:
        num = min(task.num_classes, MOST_EXAMPLES, max(MOST_NUMBERS // np.size(task.null_label), 1))
        examples = task.class_conditions(num)
    inputs = [("x_t", task.shape, "float32"), ("t", (), "int32")]
    for name in task.cond_fields:
        image = (getattr(config.model, "cond_channels", 0), *task.shape[1:]), "float32"
        inputs.append((name, *((examples[name].shape[1:], str(examples[name].dtype)) if name in examples else image)))
    inputs += [("x_start", task.shape, "float32")] * task.self_condition
    networks = {"denoiser": (run.net, inputs, "prediction")}
    description |= {
        "shape": task.shape,
        "num_timesteps": diffusion.num_timesteps,
        "alphas": diffusion.alphas.tolist(),
        "sigmas": diffusion.sigmas.tolist(),
        "slopes": [slope.tolist() for slope in diffusion.slopes],
        "objective": diffusion.objective,
        "clip": diffusion.clip_denoised,
        "v_posterior": diffusion.v_posterior,
    }
    description["examples"] = {name: x.tolist() for name, x in examples.items()}  # one of each class
    if examples:
        train: Any = config.train
        description["null"] = np.asarray(task.null_label).tolist()
        description |= {"guidance": train.sample_guidance, "guidance_interval": train.sample_guidance_interval}
        ids = task.labelling.label_array(None, num)
        description["class_names"] = task.labelling.titles(ids)
        description |= {key: value for key, value in task.labelling.record().items() if key == "tokenizer"}
    if "cond_image" in task.cond_fields:
        description["condition"] = config.data.condition
    if first_stage := getattr(task, "first_stage", None):
        if first_stage.patch:
            raise UserError("this run decodes in patches (--first-stage-patch), which no file can hold: decode in Python")
        networks["decoder"] = decoder(first_stage.net, task.shape)
        description["latent_scale"] = first_stage.scale
    if normalizer := getattr(task, "normalizer", None):
        description |= {"center": normalizer.center.tolist(), "scale": normalizer.scale}
    return description, networks


def decoder(autoencoder: Any, shape: Sequence[int]) -> tuple[Any, list[Input], str]:
    return mindir.Method(autoencoder, "decode"), [("latent", tuple(shape), "float32")], "image"
