"""Weights from and to PyTorch. Our parameter names and layouts are PyTorch's own, so no table of names is needed.

The networks of latent diffusion have CompVis's names. A LatentDiffusion contains several networks, and diffusers uses other
names: ``load_pretrained`` handles both.
"""

import itertools
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from .files import check_memory, open_file, read_bytes, shown, write
from .runtime import UserError

Arrays = Mapping[str, np.ndarray]
Keys = str | tuple[str, ...]
REBUILD = "build it with the options of the saved network"
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
NUMPY_TYPES = dict(F64="<f8", F32="<f4", F16="<f2", I64="<i8", I32="<i4", I16="<i2", I8="i1", U8="u1", BOOL="?")
TORCH_TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def load_torch_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file, or of a PyTorch state dict (.pt, .pth, .ckpt, .bin), which needs PyTorch.

    The state dict may be an entry "state_dict" or "model" of the file. float16 and bfloat16 are converted to float32. Sizes
    and types are checked before memory is taken, and no code in the file is run.

    Raises:
        UserError: the file is missing, damaged, too large or of an unknown kind, or PyTorch is missing.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file: check the path")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in PICKLED:
        return read_pickled(path)
    raise UserError(f"{path}: unknown kind of weights: give a file that ends in .safetensors, {', '.join(PICKLED)}")


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    content = read_bytes(path)
    check_memory(2 * len(content), path)  # a copy, and one in float32
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as e:
        raise UserError(f"{path}: not a complete .safetensors file: copy or download it again") from e
    return {name: decode(path, name, **entry) for name, entry in entries}


def decode(path: Path, name: str, dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    """One tensor of a .safetensors file. NumPy has no bfloat16: it is the upper half of a float32."""
    if dtype not in (*NUMPY_TYPES, "BF16"):
        raise UserError(f"{path}: {shown(name)} has the unsupported type {dtype}: save it as float32")
    try:
        if dtype == "BF16":
            return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        array = np.frombuffer(data, NUMPY_TYPES[dtype]).reshape(shape)
    except ValueError as e:
        raise UserError(f"{path}: {shown(name)} has more axes than NumPy takes: save it with fewer") from e
    return array.astype(np.float32) if dtype == "F16" else array


def read_pickled(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as e:
        advice = "pip install torch, or convert the file to .safetensors elsewhere"
        raise UserError(f"{path}: reading {path.suffix} needs PyTorch: {advice}") from e
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, of old kinds of files
            # weights_only: a pickle could run any code. mmap: a storage that is said to be larger than its data, which
            # would be read beyond its end, is refused, and nothing is unpacked
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_intact_archive(path))
    except Exception as e:  # a damaged file raises a dozen kinds of exceptions
        raise UserError(
            f"{path}: not a complete PyTorch state dict: copy it again, or save only model.state_dict(), or .safetensors "
            "(if you trust a file that contains other objects, torch.load(path, weights_only=False) reads it)"
        ) from e
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    items: Any = state.items() if isinstance(state, Mapping) else [(0, state)]
    if not all(isinstance(name, str) and isinstance(a, torch.Tensor) for name, a in items):
        raise UserError(f"{path}: contains no state dict: save model.state_dict()")
    plain = [getattr(torch, name) for name in TORCH_TYPES]
    for name, a in items:
        if a.layout is not torch.strided or a.device.type != "cpu" or a.dtype not in plain or a.is_nested:
            kind = f"{a.layout} of {a.dtype} on {a.device}".replace("torch.", "")
            raise UserError(f"{path}: {shown(name)} is no plain array but {kind}: save it as dense float32")
    check_memory(sum(a.numel() * max(a.element_size(), 4) for _, a in items), path)
    half = (torch.float16, torch.bfloat16)
    # not np.array(tensor): NumPy 2 warns that PyTorch's __array__ takes no copy
    return {name: (a.float() if a.dtype in half else a).detach().resolve_neg().numpy().copy() for name, a in items}


def is_intact_archive(path: Path) -> bool:
    """Whether a file of PyTorch is an archive, as since PyTorch 1.6. Raises BadZipFile, or another of zipfile's kinds, if it
    is damaged or holds more than its own size."""
    with open_file(path) as file:
        if file.read(4) != b"PK\3\4":
            return False
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > file.seek(0, 2) or archive.testzip() is not None:
                raise zipfile.BadZipFile("damaged")
            return True


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
    with np.errstate(over="ignore", invalid="ignore"):
        values = {name: arrays[name].astype(ms.dtype_to_nptype(p.dtype), copy=False) for name, p in parameters.items()}
    if bad := [name for name in values if not (np.isfinite(arrays[name]).all() and np.isfinite(values[name]).all())]:
        raise UserError(f"{begin}{bad[0]} holds numbers that are NaN, infinite or too large: use weights from before that")
    for name, p in parameters.items():
        # Compiled graphs see only assign: they keep the old values after set_data and load_param_into_net.
        ops.assign(p, Tensor(values[name]))


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


# Names in latent diffusion

# Prefixes of the names of an autoencoder
FIRST_STAGE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")

# Parts of CompVis's names -> diffusers' names for them
# fmt: off
UNET_PIECES = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in", "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1", "out.0": "conv_norm_out", "out.2": "conv_out",
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}
AUTOENCODER_PIECES = {
    "mid.block_1": "mid_block.resnets.0", "mid.attn_1": "mid_block.attentions.0", "mid.block_2": "mid_block.resnets.1",
    "down": "down_blocks", "block": "resnets", "attn": "attentions", "downsample": "downsamplers.0",
    "upsample": "upsamplers.0", "nin_shortcut": "conv_shortcut", "norm_out": "conv_norm_out", "norm": "group_norm",
    "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
}
# fmt: on
OLDER_PIECES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # in old files


def with_pieces(name: str, pieces: Mapping[str, str]) -> str:
    dotted = f".{name}"
    for piece, other in pieces.items():
        dotted = dotted.replace(f".{piece}.", f".{other}.")
    return dotted[1:]


def diffusers_name(name: str, per_level: int, levels: int) -> str:
    """diffusers' name of a parameter of a UNetModel with `per_level` blocks per level, or of an AutoencoderKL with `levels`
    levels."""
    match name.split("."):
        case ["input_blocks", block, "0", "op", end]:
            name = f"down_blocks.{(int(block) - 1) // per_level}.downsamplers.0.conv.{end}"
        case ["output_blocks", block, _, "conv", end]:
            name = f"up_blocks.{int(block) // per_level}.upsamplers.0.conv.{end}"
        case ["input_blocks", block, layer, *rest] if block != "0":
            level, i = divmod(int(block) - 1, per_level)
            name = ".".join((f"down_blocks.{level}.{'resnets' if layer == '0' else 'attentions'}.{i}", *rest))
        case ["output_blocks", block, layer, *rest]:
            level, i = divmod(int(block), per_level)
            name = ".".join((f"up_blocks.{level}.{'resnets' if layer == '0' else 'attentions'}.{i}", *rest))
        case ["decoder", "up", level, *rest]:  # from large to small images; diffusers has the reverse order
            name = ".".join((f"decoder.up_blocks.{levels - 1 - int(level)}", *rest))
    return with_pieces(name, AUTOENCODER_PIECES if name.startswith(FIRST_STAGE) else UNET_PIECES)


def home(name: str) -> tuple[str, str]:
    """Prefix and name of our parameter in CompVis's LatentDiffusion."""
    if name.startswith("cond_stage."):
        return "cond_stage_model.", name.removeprefix("cond_stage.")
    if name.startswith(FIRST_STAGE):
        return "first_stage_model.", name
    return "model.diffusion_model.", name.removeprefix("unet.")


def names_in_files(names: Iterable[str], start: str) -> dict[str, str]:
    """Our name of a parameter by each name that a file may have for it, with the prefix `start`."""
    homes = {name: home(name) for name in names}
    alone = {name for _, name in homes.values()}
    per_level = next(i for i in itertools.count(1) if f"input_blocks.{i}.0.in_layers.0.weight" not in alone)
    levels = len({name.split(".")[2] for name in alone if name.startswith("decoder.up.")})
    known = {}
    for ours, (place, name) in homes.items():
        theirs = diffusers_name(name, per_level, levels)
        spellings = (ours, name, place + name, theirs, with_pieces(theirs, OLDER_PIECES))
        known |= {start + spelling: ours for spelling in spellings}
    return known


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

    def __str__(self) -> str:
        scale = [] if self.scale_factor is None else [f"{self.scale_factor:g}"]
        kinds = {"reshaped": self.reshaped, "not in the file, unchanged": self.missing}
        kinds |= {"of another shape, unchanged": self.misfit, "only in the file": self.unexpected, "scale_factor": scale}
        return f"{len(self.loaded)} parameters loaded; {listed(kinds)}".removesuffix("; ")


def load_pretrained(
    net: nn.Cell, path: str | Path, part: str | None = None, ignore_keys: Keys = (), partial: bool = False, ema: bool = False
) -> LoadReport:
    """Load weights of CompVis latent-diffusion, of diffusers, or of ours into an AutoencoderKL, a UNetModel or a LatentUnet.

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
            shapes differ, or with `partial` all of them. Then no parameter changes.
    """
    parameters = {p.name: p for p in net.get_parameters()}
    start = "" if part is None else f"{part}."
    known = names_in_files(parameters, start)
    arrays = {name: a for name, a in load_torch_state_dict(path).items() if not name.startswith(ignore_keys)}
    scale_factor = None
    if "scale_factor" in arrays:
        found = arrays["scale_factor"].reshape(-1)
        if found.shape != (1,) or not 0 < found[0] < np.inf:
            raise UserError(f"{path}: scale_factor is not one number above 0: leave it out (--init-ignore scale_factor)")
        scale_factor = float(found[0])

    averages = {name: arrays.pop(name) for name in list(arrays) if name.startswith("model_ema.")}
    if ema:
        averages = with_dots(averages, [*known, *arrays])
        if known.keys().isdisjoint(averages):
            raise UserError(f"{path}: contains no moving averages of this network: load its weights without ema")
        arrays |= averages

    begin = (start,)
    if part is None and any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in arrays):
        begin = tuple({home(name)[0] for name in parameters})
    weights = {
        known.get(name, name): a
        for name, a in arrays.items()
        if name.startswith((*begin, "model_ema."))
        and not name.startswith(("loss.", "first_stage_model.loss."))
        and not name.endswith(".num_batches_tracked")
    }

    reshaped = [name for name, p in parameters.items() if name in weights and ones_differ(weights[name].shape, p.shape)]
    weights |= {name: weights[name].reshape(parameters[name].shape) for name in reshaped}
    found = differences(parameters, weights)
    if partial:
        weights = {name: a for name, a in weights.items() if name in parameters and a.shape == parameters[name].shape}
        parameters = {name: parameters[name] for name in weights}
        if not weights:
            raise UserError(f"{path}: no weight fits this network ({listed(found)}): give another file or part")
    advice = f"build it with the options of {path}, leave out names of the file by ignore_keys (--init-ignore), or load the "
    advice += "weights that fit by partial (--init-partial)"
    load_into(parameters.values(), weights, advice)
    return LoadReport(list(weights), reshaped, found["missing"], found["unexpected"], found["other shape"], scale_factor)


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
