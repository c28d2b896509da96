"""Weights from and to PyTorch. Our parameter names and layouts are PyTorch's own, so no table of names is needed.

The networks of latent diffusion have CompVis's names. A LatentDiffusion contains several networks, and diffusers uses other
names: ``load_pretrained`` handles both.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from .files import read_json, shown, write
from .names import home, is_average, joined_qkv, names_in_files, plain, prefix_of, unlike
from .runtime import UserError
from .weight_files import WRAPPERS, flat, read_weights
from .weight_files import load_torch_state_dict as load_torch_state_dict

Arrays = Mapping[str, np.ndarray]
Keys = str | tuple[str, ...]
REBUILD = "build it with the options of the saved network"


def load_into(
    target: nn.Cell | Iterable[Parameter], arrays: Arrays, advice: str = REBUILD, path: str | Path | None = None
) -> None:
    """Set every parameter of `target` from the array with its name, also in graphs that are already compiled.

    Raises:
        UserError: names or shapes differ, or a number is not finite in the parameter's type; then no parameter changes. The
            message begins with `path`; if the names or shapes differ, it ends with `advice`.
    """
    members: Any = target.get_parameters() if isinstance(target, nn.Cell) else target  # type: ignore[attr-defined]
    parameters = {p.name: p for p in members}
    found = differences(parameters, arrays)
    begin = "" if path is None else f"{path}: "
    if any(found.values()):
        raise UserError(f"{begin}the weights are not this network's ({listed(found)}): {advice}")

    def value(name: str) -> np.ndarray:  # one after the other: all of them could be a second copy of the network
        return np.require(arrays[name], ms.dtype_to_nptype(parameters[name].dtype), ["C", "A"])

    with np.errstate(over="ignore", invalid="ignore"):
        is_finite = {name: np.isfinite(arrays[name]).all() and np.isfinite(value(name)).all() for name in parameters}
    if bad := [name for name in parameters if not is_finite[name]]:
        raise UserError(f"{begin}{bad[0]} holds numbers that are NaN, infinite or too large: use weights from before that")
    for name, p in parameters.items():
        # Compiled graphs see only assign: they keep the old values after set_data and load_param_into_net.
        ops.assign(p, Tensor(value(name)))


def differences(parameters: Mapping[str, Parameter], arrays: Arrays) -> dict[str, list[str]]:
    pairs = [(name, arrays[name].shape, p.shape) for name, p in parameters.items() if name in arrays]
    return {
        "missing": [name for name in parameters if name not in arrays],
        "unexpected": [name for name in arrays if name not in parameters],
        "other shape": [f"{name} {shape} instead of {ours}" for name, shape, ours in pairs if shape != ours],
    }


def listed(names_of_kinds: Mapping[str, list[str]]) -> str:
    """The first four names of each kind that has some."""
    more = {kind: f" and {len(names) - 4} more" * (len(names) > 4) for kind, names in names_of_kinds.items()}
    return "; ".join(
        f"{kind}: {', '.join(map(shown, names[:4]))}{more[kind]}" for kind, names in names_of_kinds.items() if names
    )


def with_dots(averages: Arrays, names: Iterable[str]) -> dict[str, np.ndarray]:
    """CompVis's moving averages by the `names` of the weights; their own names lack "model." and the dots."""
    dotted = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": name for name in names}
    counters = ("model_ema.decay", "model_ema.num_updates")
    return {dotted.get(name, name): average for name, average in averages.items() if name not in counters}


@dataclass(frozen=True)
class LoadReport:
    """The result of `load_pretrained`; ``str()`` summarises it."""

    loaded: list[str]  # parameters that were set
    reshaped: list[str]  # those of them whose shape differed only by axes of length 1
    missing: list[str]  # parameters that are not in the file: unchanged
    unexpected: list[str]  # weights that the network lacks, by the file's names
    misfit: list[str]  # parameters whose shape differs in the file, with both shapes: unchanged
    scale_factor: float | None  # the latent scale, if the file contains it
    prefix: str = ""  # what precedes the network's names in the file, such as "ema.ema_model.", where it was found

    def __str__(self) -> str:
        scale = [] if self.scale_factor is None else [f"{self.scale_factor:g}"]
        kinds = {"reshaped": self.reshaped, "not in the file, unchanged": self.missing}
        kinds |= {"of another shape, unchanged": self.misfit, "only in the file": self.unexpected, "scale_factor": scale}
        whence = f" from {shown(self.prefix)}*" if self.prefix else ""
        whence += " (moving averages)" if is_average(self.prefix) else ""
        return f"{len(self.loaded)} parameters loaded{whence}; {listed(kinds)}".removesuffix("; ")


def load_pretrained(
    net: nn.Cell, path: str | Path, part: str | None = None, ignore_keys: Keys = (), partial: bool = False, ema: bool = False
) -> LoadReport:
    """Load weights of CompVis latent-diffusion, of diffusers, or of ours into an AutoencoderKL, a UNetModel or a LatentUnet,
    or those of facebookresearch/DiT into a DiT, which computes its positions: the same ones in the file are left out.

    The file, see ``load_torch_state_dict``, contains one network or a LatentDiffusion. From a LatentDiffusion each network
    takes its part: first_stage_model, model.diffusion_model, and cond_stage_model for a LatentUnet. A file of diffusers may
    be an AutoencoderKL or a UNet2DConditionModel as in Stable Diffusion 1. Losses, schedules and counters are left out. A
    weight whose shape differs only by axes of length 1, as a linear layer from a 1x1 convolution, is reshaped.

    Args:
        part: Take the weights with this prefix and a dot in the file, instead of the network's part.
        ignore_keys: Leave out the weights with one of these prefixes in the file.
        partial: Load the weights that fit, instead of all or none.
        ema: Take CompVis's moving average (model_ema) of each weight that has one.

    Raises:
        UserError: the file cannot be read, contains no moving averages of this network, or does not fit: some names or
            shapes differ, or with `partial` all of them; without `partial` also, if a config.json of diffusers lies beside
            the file, its number of heads and other settings that shapes do not tell. Then no parameter changes.
    """
    parameters = {p.name: p for p in net.get_parameters()}
    arrays = {name: a for name, a in flat(read_weights(path), WRAPPERS) if not name.startswith(ignore_keys)}
    files = {plain(name): name for name in arrays}  # the name in the file of each plain one
    if len(files) < len(arrays):
        files = {name: name for name in arrays}
    arrays = {name: arrays[theirs] for name, theirs in files.items()}

    known = names_in_files(parameters)
    start = prefix_of(arrays, known) if part is None else f"{plain(part)}."
    known = {start + name: ours for name, ours in known.items()}
    blocks = {cell.qkv.weight.name.removesuffix("weight"): cell for _, cell in net.cells_and_names() if hasattr(cell, "qkv")}
    qkv = {name: blocks[ours[: ours.rindex(".") + 1]] for name, ours in known.items() if ".qkv." in ours}
    arrays = joined_qkv(arrays, {name: (block.heads, block.new_order) for name, block in qkv.items()})

    scale_factor = None
    if (name := next((name for name in ("scale_factor", f"{start}scale_factor") if name in arrays), None)) is not None:
        found = arrays.pop(name).reshape(-1)
        if found.shape != (1,) or not 0 < found[0] < np.inf:
            raise UserError(f"{path}: scale_factor is not one number above 0: leave it out (--init-ignore {files[name]})")
        scale_factor = float(found[0])

    averages = {name: arrays.pop(name) for name in list(arrays) if name.startswith("model_ema.")}
    if ema and not is_average(start):
        averages = with_dots(averages, [*known, *arrays])
        if known.keys().isdisjoint(averages):
            raise UserError(f"{path}: contains no moving averages of this network: load its weights without ema")
        arrays |= averages

    begin = (start,)
    places = tuple(f"{start}{place}" for place in ("model.diffusion_model.", "first_stage_model."))
    if part is None and any(name.startswith(places) for name in arrays):
        begin = tuple({start + home(name)[0] for name in parameters})
    weights = {
        known.get(name, files.get(name, name)): a
        for name, a in arrays.items()
        if name.startswith((*begin, "model_ema."))
        and not name.startswith((f"{start}loss.", f"{start}first_stage_model.loss."))
        and not name.startswith(f"{start}cond_stage_model.transformer.to_logits.")  # x-transformers' unused head
        and not (a.dtype.kind in "biu" and a.ndim == 0)  # counters, such as num_batches_tracked
        and not name.endswith("quantize.used")  # a remap, which a configuration has
        and not (name == f"{start}pos_embed" and hasattr(net, "has_positions") and net.has_positions(a))
    }

    reshaped = [name for name, p in parameters.items() if name in weights and ones_differ(weights[name].shape, p.shape)]
    weights |= {name: weights[name].reshape(parameters[name].shape) for name in reshaped}
    found = differences(parameters, weights)
    if partial:
        weights = {name: a for name, a in weights.items() if name in parameters and a.shape == parameters[name].shape}
        parameters = {name: parameters[name] for name in weights}
        if not weights:
            raise UserError(f"{path}: no weight fits this network ({listed(found)}): give another file or part")
    elif not any(found.values()) and (wrong := settings_unlike(net, Path(path), start)):
        raise UserError(f"{path}: its config.json has {'; '.join(wrong)}: build the network with these settings")
    advice = f"build it with the options of {path}, leave out names of the file by ignore_keys (--init-ignore), or load the "
    advice += "weights that fit by partial (--init-partial)"
    load_into(parameters.values(), weights, advice)
    left = found["missing"], found["unexpected"], found["other shape"]
    return LoadReport(list(weights), reshaped, *left, scale_factor, start if part is None else "")


def settings_unlike(net: nn.Cell, path: Path, start: str) -> list[str]:
    """`unlike` for a UNetModel in `net`, if a config.json of diffusers lies in the folder or beside the file `path`, or in
    the folder that the prefix of the names is called after."""
    folder = path if path.is_dir() else path.parent
    places = [place / "config.json" for place in (folder / start.split(".")[0], folder)]
    try:
        record = read_json(next(place for place in places if place.is_file()))
    except (StopIteration, OSError, ValueError):
        return []
    if not isinstance(record, dict) or record.get("_class_name") not in ("UNet2DModel", "UNet2DConditionModel"):
        return []
    configs = [cell.config for _, cell in net.cells_and_names() if hasattr(cell, "time_embed")]
    return [each for config in configs for each in unlike(config, record)]


def ones_differ(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether the shapes, of at least two axes, differ only by axes of length 1 at the end."""
    return shape != other and shape[:2] == other[:2] and set(shape[2:] + other[2:]) == {1}


def save_torch_state_dict(net: nn.Cell, path: str | Path, dtype: npt.DTypeLike = np.float32) -> None:
    """Write the parameters as .safetensors, for ``torch_net.load_state_dict(safetensors.torch.load_file(path))``.

    Raises:
        UserError: the path does not end in .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: weights are saved as .safetensors: give a path with that ending")
    content = safetensors.numpy.save({p.name: p.asnumpy().astype(dtype) for p in net.get_parameters()})
    write(path, lambda file: file.write(content))
