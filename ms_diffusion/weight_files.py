"""Files of weights: .safetensors, PyTorch's pickles, several files with an index, and folders of diffusers or transformers.

``read_weights`` maps files into memory and takes nothing of them before it is used, so that a network is loaded without a
second copy of all its weights. Whatever else such files contain, such as states of an optimizer, is left out.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors

from .fields import Matches, find_problem
from .files import check_memory, open_file, read_json, shown
from .runtime import UserError

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
WRAPPERS = ("state_dict", "model_state_dict", "model")  # entries of a pickle that hold a network's weights
NUMPY_TYPES = dict(F64="<f8", F32="<f4", F16="<f2", I64="<i8", I32="<i4", I16="<i2", I8="i1", U8="u1", BOOL="?")
TORCH_TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
SHARD = r"[\w. -]{1,200}\.(safetensors|bin)"  # a file beside the index
INDEX = re.compile(r".*\.(safetensors|bin)\.index(\.\w+)?\.json")
# The weights in a folder of diffusers or transformers, with a variant such as fp16, or the index of several files of them
NAMED = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)(\.\w+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?")


def load_torch_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file, or of a PyTorch state dict (.pt, .pth, .ckpt, .bin), which needs PyTorch; of the
    index of several such files (.safetensors.index.json, .bin.index.json), or of a folder of diffusers or transformers.

    The state dict may be an entry "state_dict", "model_state_dict" or "model" of the file. float16 and bfloat16 become
    float32. Sizes and types are checked before memory is taken, and no code in the file is run.

    Raises:
        UserError: the file is missing, damaged, too large or of an unknown kind, or PyTorch is missing.
        OSError: it cannot be read.
    """
    content: Mapping[str, Any] = read_weights(path)
    while key := next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content = content[key]
    arrays = dict(flat(content))
    check_memory(sum(a.size * max(a.itemsize, 4) for a in arrays.values()), path)
    return {name: np.array(a, np.float32 if a.dtype == np.float16 else a.dtype) for name, a in arrays.items()}


def flat(content: Mapping[str, Any], dissolved: tuple[str, ...] = (), prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """(dotted name, array) of what `read_weights` returns; the names of entries that are `dissolved` are left out."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, dissolved, prefix if name in dissolved else f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read_weights(path: str | Path) -> dict[str, Any]:
    """The content of a file or a folder of weights: arrays by name, or nested where the file is. The arrays may lie in the
    file, for reading only, and float16 remains float16. Raised are the errors of `load_torch_state_dict`."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file: check the path")
    if INDEX.fullmatch(path.name):
        return read_index(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in PICKLED:
        return read_pickled(path)
    raise UserError(f"{path}: unknown kind of weights: give a file that ends in .safetensors, {', '.join(PICKLED)}")


def read_folder(folder: Path) -> dict[str, Any]:
    """The weights of a model of diffusers or transformers, or of each model in a folder of several, by its name."""
    if file := weights_in(folder):
        return read_weights(file)
    models = {each.name: file for each in sorted(folder.iterdir()) if each.is_dir() and (file := weights_in(each))}
    if not models:
        example = "diffusion_pytorch_model.safetensors or model.safetensors.index.json"
        raise UserError(f"{folder} contains no weights: give a folder with a file such as {example}, or the file itself")
    return {name: read_weights(file) for name, file in models.items()}


def weights_in(folder: Path) -> Path | None:
    """The file of weights of a model's folder, or the index of several: .safetensors before pickles, no variant
    before one such as fp16, one file before several. None if there is none."""
    found = {path: match for path in sorted(folder.iterdir()) if (match := NAMED.fullmatch(path.name)) and path.is_file()}
    # stem, variant, kind, index, variant of the index
    order = {path: (m[3] == "bin", m[2] or m[5] or "", bool(m[4]), path.name) for path, m in found.items()}
    return min(found, key=order.__getitem__, default=None)


def read_index(path: Path) -> dict[str, Any]:
    """The arrays of an index, {"weight_map": {name: file}}, from the files beside it."""
    damaged = f"{path}: not the index of a model's files: copy or download it again"
    try:
        names = read_json(path)["weight_map"]
    except (ValueError, TypeError, KeyError, IndexError) as e:
        raise UserError(damaged) from e
    if find_problem(names, dict[str, Annotated[str, Matches(SHARD)]]) or not names:
        raise UserError(damaged)
    files = {file: dict(flat(read_weights(path.parent / file))) for file in sorted(set(names.values()))}
    if missing := [name for name, file in names.items() if name not in files[file]]:
        where = path.parent / names[missing[0]]
        raise UserError(f"{where} lacks {shown(missing[0])}, which {path.name} says it has: copy or download both again")
    return {name: files[file][name] for name, file in names.items()}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, "np"):  # checks that the header is right, and that the arrays fill the file
            pass
    except safetensors.SafetensorError as e:
        raise UserError(f"{path}: not a complete .safetensors file: copy or download it again") from e
    content = np.asarray(np.memmap(path, np.uint8, "r"))
    first = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:first].tobytes())
    header.pop("__metadata__", None)
    return {name: decode(path, name, content[first:], entry) for name, entry in header.items()}


def decode(path: Path, name: str, content: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    """One tensor of a .safetensors file. NumPy has no bfloat16: it is the upper half of a float32."""
    dtype, shape, data = entry["dtype"], entry["shape"], content[slice(*entry["data_offsets"])]
    if dtype not in (*NUMPY_TYPES, "BF16"):
        raise UserError(f"{path}: {shown(name)} has the unsupported type {dtype}: save it as float32")
    try:
        if dtype == "BF16":
            check_memory(2 * data.size, path)
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        return data.view(NUMPY_TYPES[dtype]).reshape(shape)
    except ValueError as e:
        raise UserError(f"{path}: {shown(name)} has more axes than NumPy takes: save it with fewer") from e


def read_pickled(path: Path) -> dict[str, Any]:
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
    plain = [getattr(torch, name) for name in TORCH_TYPES]

    def array(name: str, a: Any) -> np.ndarray:
        if a.layout is not torch.strided or a.device.type != "cpu" or a.dtype not in plain or a.is_nested:
            kind = f"{a.layout} of {a.dtype} on {a.device}".replace("torch.", "")
            raise UserError(f"{path}: {shown(name)} is no plain array but {kind}: save it as dense float32")
        if a.numel() * a.element_size() > a.untyped_storage().nbytes():  # one number that stands for many
            check_memory(4 * a.numel(), path)
        return (a.float() if a.dtype == torch.bfloat16 else a).detach().resolve_neg().numpy()

    def arrays(content: Any, depth: int = 0) -> dict[str, Any]:
        """What is an array, or a mapping with arrays by name, of at most 4 in each other: a pickle may contain itself."""
        found: dict[str, Any] = {}
        for name, value in content.items() if isinstance(content, Mapping) and depth < 4 else ():
            if name == "shadow_params" and isinstance(value, list):
                advice = "store them in the model by ema_model.copy_to(model.parameters()), and save that"
                raise UserError(f"{path}: contains moving averages without names (shadow_params): {advice}")
            if isinstance(name, str) and isinstance(value, torch.Tensor):
                found[name] = array(name, value)
            elif isinstance(name, str) and (inner := arrays(value, depth + 1)):
                found[name] = inner
        return found

    if not (found := arrays(state)):
        raise UserError(f"{path}: contains no state dict: save model.state_dict()")
    return found


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
