"""Weights from and to PyTorch. Our parameter names and layouts are PyTorch's own, so no table stands between them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from .runtime import UserError

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
NUMPY_TYPES = dict(F64="<f8", F32="<f4", F16="<f2", I64="<i8", I32="<i4", I16="<i2", I8="i1", U8="u1", BOOL="?")


def load_torch_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file, or of a PyTorch state dict (.pt, .pth, .ckpt, .bin: these need PyTorch).

    A state dict may lie under "state_dict" or "model". float16 and bfloat16 are read as float32.

    Raises:
        UserError: the file is missing, damaged, or of another kind, or PyTorch is.
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
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as e:
        raise UserError(f"{path}: not a whole .safetensors file: copy or download it again") from e
    return {name: decode(path, name, **entry) for name, entry in entries}


def decode(path: Path, name: str, dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    """One tensor of a .safetensors file; bfloat16, which NumPy lacks, is the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype not in NUMPY_TYPES:
        raise UserError(f"{path}: {name} is of type {dtype}, which is not read here: save it as float32")
    array = np.frombuffer(data, NUMPY_TYPES[dtype]).reshape(shape)
    return array.astype(np.float32) if dtype == "F16" else array


def read_pickled(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f"{path}: reading {path.suffix} needs PyTorch: pip install torch, or save the weights as .safetensors elsewhere"
        ) from e
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: a pickle could run any code
    except Exception as e:  # a damaged file raises a dozen kinds
        raise UserError(
            f"{path}: not a whole PyTorch state dict: copy it again, or save model.state_dict() alone, or as .safetensors"
        ) from e
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict: save model.state_dict()")
    return {
        name: (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).detach().numpy()
        for name, value in state.items()
    }


def load_into(
    target: nn.Cell | Iterable[Parameter],
    arrays: Mapping[str, np.ndarray],
    mend: str = "build it with the options they were saved with",
) -> None:
    """Set every parameter of ``target`` from the array of its name, also in graphs that are compiled already.

    Raises:
        UserError: names or shapes differ; then nothing is changed. It ends in `mend`, what to do then.
    """
    parameters = {p.name: p for p in (target.get_parameters() if isinstance(target, nn.Cell) else target)}
    complaints = {
        "missing": [name for name in parameters if name not in arrays],
        "unexpected": [name for name in arrays if name not in parameters],
        "other shape": [
            f"{name} {arrays[name].shape} instead of {p.shape}"
            for name, p in parameters.items()
            if name in arrays and arrays[name].shape != p.shape
        ],
    }
    if any(complaints.values()):
        found = "; ".join(f"{kind}: {some(names)}" for kind, names in complaints.items() if names)
        raise UserError(f"the weights are not this network's ({found}): {mend}")
    for name, p in parameters.items():
        # Only assign reaches a compiled graph: set_data and load_param_into_net leave the old values there.
        ops.assign(p, Tensor(arrays[name].astype(ms.dtype_to_nptype(p.dtype))))


def some(names: list[str], most: int = 4) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def save_torch_state_dict(net: nn.Cell, path: str | Path, dtype=np.float32) -> None:
    """Write the parameters as .safetensors, for ``torch_net.load_state_dict(safetensors.torch.load_file(path))``; in float16
    they take half the space.

    Raises:
        UserError: the path does not end in .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: weights are written as .safetensors: give a path with that ending")
    path.write_bytes(safetensors.numpy.save({p.name: p.asnumpy().astype(dtype) for p in net.get_parameters()}))
