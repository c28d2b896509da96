"""Write the network of a run for other programs: `export runs/quick --format onnx`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .. import kernels, mindir
from ..files import check_output, write
from ..mindir import Input
from ..runtime import UserError, command, one_line, set_device
from ..training.runs import Run, default_run
from .parse import parse

MOST_EXAMPLES = 1000  # classes or captions in the JSON


@dataclass
class Args:
    """Write the network of a run as ONNX or MindIR for other programs, and all that a sampler needs beside it as JSON.

    A run of latents gives its decoder too, an autoencoder its encoder and its decoder."""

    run: Annotated[str | None, tyro.conf.Positional] = None
    """A run's folder, one of its checkpoints, or the name of a bundled model."""
    format: Literal["onnx", "mindir"] = "onnx"
    """onnx needs the onnx package: pip install "ms_diffusion[export]"."""
    out: str | None = None
    """Path of the network; by default denoiser.onnx or denoiser.mindir in the folder `export` of the run. The other files
    lie beside it, for example denoiser.json and denoiser-decoder.onnx."""
    weights: Literal["ema", "model"] = "ema"
    """Weights of the network: their moving average, or as trained."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog=command("export"))
    path = Path(args.run or default_run())
    set_device("cpu")
    with kernels.disabled():
        run = Run(path, args.weights)
    suffix, name = f".{args.format}", "denoiser" if run.diffusion else "autoencoder"
    out = Path(args.out or (path if path.is_dir() else Path()) / "export" / f"{name}{suffix}")
    if out.suffix != suffix:
        raise UserError(f"--out is {out}: its name must end in {suffix}, or choose another --format")
    description, networks = describe(run)
    files = {part: out if part == "denoiser" else out.with_name(f"{out.stem}-{part}{suffix}") for part in networks}
    record = out.with_suffix(".json")
    check_output(*files.values(), record)
    for part, (net, inputs, output) in networks.items():
        file = files[part]
        data = mindir.to_onnx(net, inputs, output) if args.format == "onnx" else mindir.export(net, inputs)
        write(file, lambda f, data=data: f.write(data))
        columns = [{"name": name, "shape": shape, "dtype": dtype} for name, shape, dtype in inputs]
        description[part] = {"file": file.name, "inputs": columns, "output": output}
        print(one_line(f"{file}: {len(data) / 1e6:.1f} MB"))
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in {"format": args.format, **description}.items()]
    write(record, lambda f: f.write("{{\n{}\n}}\n".format(",\n".join(lines)).encode()))
    print(one_line(f"{record}: schedule, scales and inputs"))
    return 0


def describe(run: Run) -> tuple[dict[str, Any], dict[str, tuple[Any, list[Input], str]]]:
    """What the JSON says of a run, and its networks by name: (network, inputs, name of the output)."""
    task, config, diffusion = run.task, run.config, run.diffusion
    description: dict[str, Any] = {"run": run.name, "step": run.step, "kind": config.kind}
    if diffusion is None:
        shape = (config.model.channels, config.data.size, config.data.size)
        encoder = mindir.Method(run.net, "encode"), [("image", shape, "float32")], "moments"
        return description, {"encoder": encoder, "decoder": decoder(run.net, task.latent_shape)}

    examples = task.class_conditions(min(task.num_classes, MOST_EXAMPLES)) if task.null_label is not None else {}
    inputs = [("x_t", task.shape, "float32"), ("t", (), "int32")]
    for name in task.cond_fields:
        image = (getattr(config.model, "cond_channels", 0), *task.shape[1:]), "float32"
        inputs.append((name, *((examples[name].shape[1:], str(examples[name].dtype)) if name in examples else image)))
    inputs += [("x_start", task.shape, "float32")] * task.self_condition
    networks = {"denoiser": (run.net, inputs, "prediction")}
    description |= {
        "shape": task.shape,
        "num_timesteps": diffusion.num_timesteps,
        "alphas_cumprod": diffusion.alphas_cumprod.tolist(),
        "objective": diffusion.objective,
        "clip": diffusion.clip_denoised,
        "v_posterior": diffusion.v_posterior,
    }
    description["examples"] = {name: x.tolist() for name, x in examples.items()}  # one of each class
    if examples:
        train: Any = config.train
        description["null"] = task.null_label
        description |= {"guidance": train.sample_guidance, "guidance_interval": train.sample_guidance_interval}
        ids = task.labelling.label_array(None, min(task.num_classes, MOST_EXAMPLES))
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
