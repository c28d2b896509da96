"""Changed files for everything that reads one: python -m tests.fuzz --cases 100000 [--seed 0] [--reader NAME]

Each case takes a good file (or a folder of them), changes it in one to four places, and reads it as the program does. It
passes if the result is valid, or if the reader raises UserError, or another error that its docstring names. The cases run in
a process that may take 2 GB more than at its start, each for 5 seconds at most. Case i of a seed is always the same. What
does not pass is printed, and its files are written to the folder --out; small ones are then kept in tests/fuzz_seeds."""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

Files = dict[str, bytes]  # relative name -> content
Random = random.Random
SEEDS = Path(__file__).with_name("fuzz_seeds")
SECONDS = 5
MEMORY = 2 << 30
PER_PROCESS = 4000  # cases, after which another process goes on


# Changes


INTEGERS = [0, 1, -1, 2, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1]
TEXTS = [b"0", b"-1", b"1e999", b"-1e-999", b"NaN", b"Infinity", b"", b"null", b'"', b"\n"]
TEXTS += [b"9" * count for count in (20, 500, 5000)]
VALUES: list[Any] = [None, True, 0, -1, 3, 0.5, 1e308, 2**31, 2**63, 10**400, math.nan, math.inf, "", "x", "\n", "\ud800"]
VALUES += ["x" * 5000, "../../x", "1", [], [1], [[]], {}, {"a": 1}, "DEEP"]


def change(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """The content of a file, changed in one place, perhaps inside of what packs it."""
    ways = [change_bytes]
    ways += [way for magic, way in PACKINGS.items() if data.startswith(magic)] * 2
    if len(data) > 8 and data[8:9] == b"{":
        ways += [change_safetensors] * 2
    if data[:1] in (b"{", b"["):
        ways += [change_json] * 3
    if data[257:262] == b"ustar":
        ways += [change_tar] * 2
    try:
        return rng.choice(ways)(rng, data, others)
    except Exception:  # it was changed before, and cannot be taken apart any more
        return change_bytes(rng, data, others)


def change_bytes(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    content, at = bytearray(data), rng.randrange(len(data) + 1)
    size = rng.choice([1, 1, 2, 4, 8, 16, 100, 1000])
    match rng.randrange(9):
        case 0 if data:
            content[at % len(data)] ^= 1 << rng.randrange(8)
        case 1:
            content[at : at + size] = rng.randbytes(size)
        case 2:
            del content[at:]
        case 3:
            del content[at : at + size]
        case 4:
            content[at:at] = rng.choice([bytes(size), rng.randbytes(size), data[:size], data[at : at + size] * 50])
        case 5:
            other = rng.choice(others)
            content[at:] = other[rng.randrange(len(other) + 1) :]
        case 6:
            width = rng.choice([1, 2, 4, 8])
            number = rng.choice(INTEGERS) % (1 << 8 * width)
            content[at : at + width] = number.to_bytes(width, rng.choice(["little", "big"]))
        case 7 if numbers := list(re.finditer(rb"-?\d[\d.]*(?:e-?\d+)?", data[: 1 << 16])):
            match = rng.choice(numbers)
            content[match.start() : match.end()] = rng.choice(TEXTS)
        case _:
            content[:at] = b""
    return bytes(content)


def change_json(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """The value, the place or the name of something in a JSON value."""
    value = json.loads(data)
    places = []  # containers and keys

    def visit(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    visit(value)
    if not places or rng.random() < 0.02:
        value = rng.choice(VALUES)
    else:
        node, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[rng.choice(["", "x", "kind", "step", "a.b", "x" * 300])] = node.pop(key)
            case 2:
                node[key] = [node[key]] if rng.random() < 0.5 else {"x": node[key]}
            case 3 if isinstance(node[key], int | float):
                node[key] = rng.choice([-node[key], node[key] * 10**6, 10 ** rng.randrange(20), float(node[key]) / 3])
            case _:
                node[key] = rng.choice(VALUES)
    deep = rng.choice(["[", '{"a":']) * rng.choice([100, 100_000])
    return json.dumps(value).replace('"DEEP"', deep).encode()


def change_safetensors(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = change_json(rng, data[8 : 8 + size], others)
    if rng.random() < 0.3:
        header = data[8 : 8 + size]
        data = data[: 8 + size] + change_floats(rng, data[8 + size :])
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def change_floats(rng: Random, data: bytes) -> bytes:
    numbers = np.frombuffer(data[: len(data) // 4 * 4], "<f4").copy()
    numbers[rng.randrange(len(numbers))] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45])
    return numbers.tobytes() + data[len(data) // 4 * 4 :]


def change_gzip(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    return gzip.compress(change(rng, gzip.decompress(data), others), mtime=0)


def change_zip(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """A member, or the name of one, with checksums that are right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(made, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two members of one name
        members = archive.infolist()
        chosen = rng.choice(members)
        for member in members:
            content, info = archive.read(member), zipfile.ZipInfo(member.filename)
            info.compress_type = member.compress_type
            if member is chosen and rng.random() < 0.1:
                info.filename = rng.choice(["", "x.npy", "../x", "/x", "a\nb", "x/", "x" * 300, members[0].filename])
            elif member is chosen:
                content = change(rng, content, others)
            new.writestr(info, content)
    return made.getvalue()


def change_png(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """A chunk, with checksums that are right."""
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    i = rng.randrange(len(chunks))
    kind, content = chunks[i]
    if kind == b"IDAT" and rng.random() < 0.5:
        content = zlib.compress(change_bytes(rng, zlib.decompress(content), others))
    else:
        content = change_bytes(rng, content, others)
    if rng.random() < 0.1:
        kind = rng.choice([b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"tEXt", b"zTXt", b"acTL", b"fcTL", b"xxxx"])
    chunks[i] = kind, content
    if rng.random() < 0.1:
        rng.shuffle(chunks)
    packed = [len(c).to_bytes(4, "big") + k + c + zlib.crc32(k + c).to_bytes(4, "big") for k, c in chunks]
    return b"".join([data[:8], *packed])


def change_tar(rng: Random, data: bytes, others: list[bytes]) -> bytes:
    """The first header, with a checksum that is right."""
    content = bytearray(data)
    start, size = rng.choice([(0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
    fields = [rng.randbytes(size), b"7" * size, b"\xff" * size, b"\x80" + rng.randbytes(size - 1), b"../x", b"x" * size]
    fields.append(rng.choice(b"0123456789LKSxgXDV").to_bytes(1, "big"))
    content[start : start + size] = rng.choice(fields)[:size].ljust(size, b"\0")
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content)


PACKINGS = {b"\x1f\x8b": change_gzip, b"PK\3\4": change_zip, b"\x89PNG": change_png}


# Readers


@dataclass
class Reader:
    """samples(): good files. read(folder) reads them and raises AssertionError if the result is not valid."""

    samples: Callable[[], list[Files]]
    read: Callable[[Path], object]
    share: float = 1  # of the cases
    allowed: tuple[type[Exception], ...] = ()  # errors besides UserError


READERS: dict[str, Reader] = {}


def reader(samples: Callable[[], list[Files]], share: float = 1, allowed: tuple = ()) -> Callable:
    def register(read: Callable[[Path], object]) -> Callable[[Path], object]:
        READERS[read.__name__.removeprefix("read_")] = Reader(cache(samples), read, share, allowed)
        return read

    return register


def saved(save: Callable[..., object], *args: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    save(file, *args, **options)
    return file.getvalue()


def folder_of(make: Callable[[Path], object]) -> Files:
    """The files that make(folder) writes."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


POINTS = np.random.default_rng(0).standard_normal((30, 2)).astype(np.float32)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)


def npz_samples() -> list[Files]:
    arrays = {"images": IMAGES, "labels": np.arange(4), "points": POINTS, "train": POINTS, "test": POINTS[:5]}
    return [{"x.npz": saved(save, **arrays)} for save in (np.savez, np.savez_compressed)]


@reader(npz_samples)
def read_npz(folder: Path) -> None:
    from ms_diffusion.data.points import read_saved_points
    from ms_diffusion.files import load_npz
    from ms_diffusion.metrics.scores import read_npz
    from ms_diffusion.runtime import UserError

    path, found = folder / "x.npz", []
    for read in (read_npz, read_saved_points):
        with contextlib.suppress(UserError):
            found.append(read(path))
    for each in found:
        if isinstance(each, tuple):
            assert all(a.dtype == np.float32 and a.shape[1:] == (2,) and np.isfinite(a).all() for a in each)
        else:
            assert each.images.dtype == np.uint8 and each.images.ndim == 4
            assert each.labels is None or len(each.labels) == len(each.images)
    with contextlib.suppress(ValueError, OSError):
        load_npz(path, ["points", "images"])


def points_samples() -> list[Files]:
    shifted = np.asfortranarray(POINTS.astype(">f8"))
    return [{"x.npy": saved(np.save, array)} for array in (POINTS, shifted, (9 * POINTS).astype(np.int16))]


@reader(points_samples)
def read_npy(folder: Path) -> None:
    from ms_diffusion.data.points import POINTS_FILE, load_points

    train, test = load_points(POINTS_FILE, str(folder / "x.npy"), 1, 0)
    assert train.dtype == np.float32 and train.shape[1:] == test.shape[1:] == (2,)
    assert np.isfinite(train).all() and np.isfinite(test).all()


def csv_samples() -> list[Files]:
    text = "".join(f"{x},{y}\n" for x, y in POINTS)
    kinds = [
        text,
        f"x,y\n{text}",
        text.replace(",", ";"),
        text.replace(",", " "),
        text.replace("\n", "\r\n"),
        "\ufeff" + text,
    ]
    return [{"x.csv": kind.encode()} for kind in kinds]


@reader(csv_samples)
def read_csv(folder: Path) -> None:
    from ms_diffusion.data.points import read_points

    points = read_points(folder / "x.csv")
    assert points.shape[1:] == (2,) and np.isfinite(points).all() and len(points) > 1


def idx_samples() -> list[Files]:
    def idx(array: np.ndarray) -> bytes:
        return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()

    names = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    raw = dict(zip(names, (idx(IMAGES[..., 0]), idx(np.arange(4, dtype=np.uint8))), strict=True))
    return [raw, {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in raw.items()}]


@reader(idx_samples)
def read_idx(folder: Path) -> None:
    from ms_diffusion.data import fashion_mnist

    with patch.object(fashion_mnist, "_debian_folders", lambda: []):  # which starts a program
        images, labels = fashion_mnist.load_fashion_mnist("train", str(folder))
    assert images.ndim == 4 and images.dtype == np.uint8 and labels.shape == images.shape[:1] and labels.min() >= 0


def picture_samples() -> list[Files]:
    from PIL import Image

    from ms_diffusion.images import picture_formats

    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    gray, colour, clear = (Image.fromarray(a) for a in (noise[..., 0], noise[..., :3], noise))
    palette, deep = colour.quantize(16), Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    files = [saved(image.save, "PNG") for image in (gray, colour, clear, palette, deep, gray.convert("1"))]
    files += [saved(colour.save, "PNG", pnginfo=None, exif=exif, icc_profile=b"x" * 200)]
    files += [saved(image.save, "JPEG", **options) for image in (gray, colour) for options in ({}, {"progressive": True})]
    files += [saved(colour.save, "JPEG", exif=exif), saved(colour.convert("CMYK").save, "JPEG")]
    files += [saved(gray.save, "GIF"), saved(palette.save, "GIF", save_all=True, append_images=[palette, palette])]
    files += [saved(image.save, "BMP") for image in (gray, colour, palette)]
    for compression in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits"):
        files.append(saved(colour.save, "TIFF", compression=compression))
    files += [saved(deep.save, "TIFF"), saved(gray.convert("F").save, "TIFF"), saved(colour.save, "TIFF", exif=exif)]
    files += [saved(colour.save, "WEBP"), saved(clear.save, "WEBP", lossless=True)]
    files += [saved(colour.save, "WEBP", save_all=True, append_images=[clear])]
    dark = Image.fromarray(noise[..., 0].astype(np.uint16) * 16)
    files += [saved(dark.save, "PNG"), saved(dark.save, "TIFF"), saved(gray.save, "PNG", transparency=3)]
    files += [saved(colour.save, kind) for kind in ("AVIF", "JPEG2000", "PPM") if kind in picture_formats()]
    return [{"a/x.png": file} for file in files]


@reader(picture_samples, share=3)
def read_picture(folder: Path) -> None:
    from ms_diffusion.data.image_folder import load_image_folder
    from ms_diffusion.images import picture_size

    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            found = load_image_folder(folder, 8, 3)
            assert found.images.shape == (1, 8, 8, 3) and found.labels.tolist() == [0] and "skipped" not in err.getvalue()
        finally:
            lines = err.getvalue().splitlines()
            assert sum(line.startswith("skipped ") for line in lines) < 2
            assert all(line.startswith(("skipped ", "note: ")) and len(line) < 500 for line in lines)
    with contextlib.suppress(ValueError, OSError):
        picture_size(folder / "a/x.png")


def huge_samples() -> list[Files]:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 4), np.uint8)
    pictures = [Image.fromarray(a) for a in (noise[..., 0], noise[..., :3], noise, noise[..., 0].astype(np.uint16) * 16)]
    pictures += [pictures[1].quantize(16), pictures[0].convert("1")]
    files = [saved(picture.save, "PNG") for picture in pictures]
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"):
        files.append(saved(pictures[1].save, "TIFF", compression=compression, tiffinfo={278: 8}))
    return [{"x.png": file} for file in files]


@reader(huge_samples)
def read_huge(folder: Path) -> None:
    """Pictures that are taken to be too large to be unpacked whole."""
    from ms_diffusion.data import huge_pictures, picture_files
    from ms_diffusion.images import PictureError

    few = patch.object(picture_files, "MOST_PIXELS", 500), patch.object(huge_pictures, "PIECE_PIXELS", 300)
    with few[0], few[1], contextlib.suppress(PictureError, OSError):
        assert picture_files.read_picture(folder / "x.png", 8, 3).pixels.shape == (8, 8, 3)


def folder_samples() -> list[Files]:
    from PIL import Image

    picture = saved(Image.new("L", (4, 4)).save, "PNG")
    pictures = {f"a/{i}.png": picture for i in range(3)}
    rows = [{"file_name": f"a/{i}.png", "text": ["a kite", "a \u7ea2"][: i + 1], "label": f"{i}"} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = "file_name,text,label\n" + "".join(f'a/{i}.png,"a kite,\nred",{i}\n' for i in range(3))
    captions = {f"a/{i}.txt": "a kite\n\u7ea2".encode() for i in range(3)}
    return [
        {**pictures, "metadata.jsonl": lines.encode()},
        {**pictures, "metadata.csv": table.encode()},
        {**pictures, **captions},
    ]


@reader(folder_samples)
def read_folder(folder: Path) -> None:
    from ms_diffusion.data.image_folder import load_image_folder

    with contextlib.redirect_stderr(io.StringIO()):
        found = load_image_folder(folder, 4, 1)
    count = len(found.images)
    assert count and found.labels.shape == (count,) and 0 <= found.labels.min()
    assert found.class_names is None or found.labels.max() < len(found.class_names)
    if found.captions is not None:
        assert found.caption_ids.shape == (count,) and found.caption_ids.max() < len(found.captions)
        assert all(row and all(isinstance(text, str) for text in row) for row in found.captions)


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"weight": rng.standard_normal((4, 3)).astype(np.float32), "bias": np.zeros(4, np.float32)}


def check_arrays(arrays: Any) -> None:
    assert isinstance(arrays, dict) and all(isinstance(name, str) for name in arrays)
    assert all(isinstance(a, np.ndarray) and a.dtype.kind in "fiub" for a in arrays.values())


def try_to_load(path: Path) -> None:
    """Into a network, as far as it fits."""
    from mindspore import nn

    from ms_diffusion.convert import load_into, load_pretrained, load_torch_state_dict
    from ms_diffusion.runtime import UserError

    arrays = load_torch_state_dict(path)
    check_arrays(arrays)
    net = shared("net", lambda: nn.Dense(3, 4))
    with contextlib.suppress(UserError):
        load_into(net, arrays)
        assert all(np.isfinite(p.asnumpy()).all() for p in net.get_parameters())
    load_pretrained(net, path, partial=True)


SHARED: dict[str, Any] = {}


def shared(name: str, make: Callable[[], Any]) -> Any:
    """What make() returns, made once in a process."""
    if name not in SHARED:
        SHARED[name] = make()
    return SHARED[name]


def safetensors_samples() -> list[Files]:
    import safetensors.numpy

    half = {name: array.astype(np.float16) for name, array in weights().items()}
    more = weights() | {"scale_factor": np.array(0.2, np.float32), "model_ema.decay": np.zeros(3), "steps": np.arange(3)}
    files = [safetensors.numpy.save(arrays) for arrays in (weights(), half, more)]
    bf16 = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}, "__metadata__": {"a": "b"}}).encode()
    return [{"x.safetensors": file} for file in [*files, len(bf16).to_bytes(8, "little") + bf16 + b"\0\1\2\3"]]


@reader(safetensors_samples, share=2)
def read_safetensors(folder: Path) -> None:
    try_to_load(folder / "x.safetensors")


def pickled_samples() -> list[Files]:
    try:
        import torch
    except ImportError:  # the reader then says that it is missing
        return [{"x.pt": b"PK\3\4"}]
    state = {name: torch.from_numpy(array) for name, array in weights().items()}
    state["turned"] = torch.arange(12.0).reshape(3, 4).T
    contents = (state, {"state_dict": state, "epoch": 3}, {"model": {**state, "half": state["weight"].bfloat16()}})
    beside = {"opt": {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 0.1}]}, "step": 3, "scaler": None}
    contents += ({"model": state, "ema": {f"ema_model.module.{name}": a for name, a in state.items()}, **beside},)
    files = [saved(lambda file, content=content: torch.save(content, file)) for content in contents]
    return [{"x.pt": f} for f in [*files, saved(lambda f: torch.save(state, f, _use_new_zipfile_serialization=False))]]


@reader(pickled_samples, share=2)
def read_pickled(folder: Path) -> None:
    try_to_load(folder / "x.pt")


def index_samples() -> list[Files]:
    import safetensors.numpy

    files = {f"model-0000{i}-of-00002.safetensors": {name: a} for i, (name, a) in enumerate(weights().items(), 1)}
    names = {name: file for file, arrays in files.items() for name in arrays}
    packed = {file: safetensors.numpy.save(arrays) for file, arrays in files.items()}
    index = json.dumps({"metadata": {"total_size": 64}, "weight_map": names}).encode()
    several = {f"{folder}/{file}": content for folder in ("unet", "vae") for file, content in packed.items()}
    several |= {f"{folder}/model.safetensors.index.json": index for folder in ("unet", "vae")}
    one = {"config.json": b"{}", "diffusion_pytorch_model.fp16.safetensors": safetensors.numpy.save(weights())}
    return [packed | {"model.safetensors.index.json": index}, several, one]


@reader(index_samples)
def read_index(folder: Path) -> None:
    try_to_load(folder)


def config_samples() -> list[Files]:
    from ms_diffusion.training.presets import PRESETS

    old = json.loads(Path(__file__).with_name("old_configs.json").read_text())
    records = [*(preset.to_record() for preset in PRESETS.values()), *old.values()]
    return [{"config.json": json.dumps(record).encode()} for record in records]


@reader(config_samples, share=3)
def read_config(folder: Path) -> None:
    from ms_diffusion.fields import check_fields
    from ms_diffusion.training.config import Config

    config = Config.from_json(folder / "config.json")
    check_fields(config)
    assert Config.from_json(folder / "config.json") == config
    config.task()


def metrics_samples() -> list[Files]:
    rows = [{"step": i, "loss": 1 / (i + 1), "lr": 1e-3, "img_per_s": 30.5} for i in range(20)]
    rows[10]["fid"] = 3.5
    return [{"metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}]


@reader(metrics_samples)
def read_metrics(folder: Path) -> None:
    from ms_diffusion.training.loop import Metrics

    metrics = Metrics(folder / "metrics.jsonl", 15)
    metrics.append(step=16, loss=1.0)
    assert metrics.rows[-1] == {"step": 16, "loss": 1.0} and all(row["step"] <= 16 for row in metrics.rows)
    assert np.array([list(row.values())[:1] for row in metrics.rows], float).shape == (len(metrics.rows), 1)
    assert all(not math.isinf(float(value)) or name == "loss" for row in metrics.rows for name, value in row.items())
    again = Metrics(folder / "metrics.jsonl", 16)
    assert json.dumps(again.rows) == json.dumps(metrics.rows)


SMALL_RUN = {"diffusion.num_timesteps": 10, "train.sample_steps": 5, "model.dim": 4, "model.num_embeddings": 10}


def run_samples() -> list[Files]:
    from ms_diffusion.training.config import override
    from ms_diffusion.training.presets import PRESETS
    from tests.runs import PIXELS, untrained

    config = override(PRESETS["scurve"], **SMALL_RUN)

    def make(folder: Path) -> None:
        untrained(folder, config, step=3)
        untrained(folder, config, step=5, fid=0.5)
        (folder / "points.npz").write_bytes(npz_samples()[0]["x.npz"])
        (folder / "metrics.jsonl").write_bytes(metrics_samples()[0]["metrics.jsonl"])

    return [folder_of(make), folder_of(lambda folder: untrained(folder, PIXELS, step=3))]


def mend_checksums(folder: Path) -> None:
    """Let half of the weights that were changed have the right checksum."""
    for state in folder.glob("checkpoints/*/state.json"):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
            record = json.loads(state.read_bytes())
            hashes = {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in state.parent.glob("*.safetensors")
            }
            if int(min(hashes.values()), 16) % 2 and record["sha256"].keys() == hashes.keys():
                state.write_text(json.dumps(record | {"sha256": hashes}))


@reader(run_samples, share=0.5)
def read_run(folder: Path) -> None:
    from ms_diffusion.training.runs import Run

    mend_checksums(folder)
    run = Run(folder)
    assert type(run.step) is int and all(np.isfinite(p.asnumpy()).all() for p in run.net.get_parameters())


@reader(lambda: run_samples()[:1], share=0.5)
def read_resumed(folder: Path) -> None:
    """A checkpoint that training goes on from is one that every reader takes, and its file is not changed."""
    from ms_diffusion.training.checkpoint import Checkpoint, read_weights
    from ms_diffusion.training.config import override
    from ms_diffusion.training.presets import PRESETS
    from ms_diffusion.training.step import EMA

    mend_checksums(folder)
    net = shared("resumed", lambda: override(PRESETS["scurve"], **SMALL_RUN).task().build()[0])
    state = Checkpoint(folder, net, ema=shared("average", lambda: EMA(net))).load_latest()
    assert state is not None and state["step"] in (3, 5)
    arrays = read_weights(folder / f"checkpoints/step-{state['step']:07d}", "model")
    assert all(np.array_equal(p.asnumpy(), arrays[p.name]) for p in net.get_parameters())


CACHED = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}


def compute(path: Path) -> dict[str, np.ndarray]:
    from ms_diffusion.files import load_or_compute

    shapes = {name: array.shape for name, array in CACHED.items()}
    return load_or_compute(path, hashlib.sha256(b"x").hexdigest(), shapes, lambda: CACHED)


@reader(lambda: [folder_of(lambda folder: compute(folder / "x.bin"))])
def read_cache(folder: Path) -> None:
    for _ in range(2):
        found = compute(folder / "x.bin")
        assert all(np.array_equal(found[name], array) for name, array in CACHED.items())


def archive_samples() -> list[Files]:
    samples = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "files")
        (folder / "below").mkdir(parents=True)
        (folder / "a.txt").write_text("text " * 50)
        (folder / "below/b.bin").write_bytes(bytes(1000))
        for kind, end in (
            ("zip", ".zip"),
            ("tar", ".tar"),
            ("gztar", ".tar.gz"),
            ("bztar", ".tar.bz2"),
            ("xztar", ".tar.xz"),
        ):
            made = shutil.make_archive(f"{place}/x", kind, folder)
            samples.append({f"x{end}": Path(made).read_bytes()})
        with tarfile.open(f"{place}/x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
            archive.add(folder, "x" * 150)
        samples.append({"x.tar": Path(place, "x.tar").read_bytes()})
    return samples


@reader(archive_samples)
def read_archive(folder: Path) -> None:
    from ms_diffusion.commands import transfer

    (folder / "cache").mkdir()
    transfer.CACHE = str(folder / "cache")
    unpacked = transfer.unpack([path for path in folder.iterdir() if path.is_file()])
    assert folder in unpacked.parents
    assert {path.name for path in folder.iterdir()} - {"cache"} == {
        p.name for p in folder.iterdir() if p.name.startswith("x.")
    }
    assert not any(path.is_symlink() for path in unpacked.rglob("*"))


def lock_samples() -> list[Files]:
    from ms_diffusion.locks import sole_writer

    def make(folder: Path) -> None:
        with sole_writer(folder):
            (folder / "copy").write_bytes((folder / ".lock").read_bytes())

    mine = folder_of(make)["copy"]
    return [{".lock": mine}, {".lock": re.sub(rb'"machine": "\w+"', b'"machine": "other"', mine)}]


@reader(lock_samples, share=0.3, allowed=(OSError,))
def read_lock(folder: Path) -> None:
    from ms_diffusion import locks

    locks.LOST = 0.01
    with locks.sole_writer(folder) as check:
        check()
    assert not (folder / ".lock").exists()


def record_samples() -> list[Files]:
    from ms_diffusion.commands.modelarts import Uploads

    def make(folder: Path) -> None:
        for name in (
            "config.json",
            "metrics.jsonl",
            "checkpoints/step-0000002/state.json",
            "checkpoints/step-0000002/a.bin",
        ):
            (folder / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "run" / name).write_text(name)
        Uploads(folder / "run", str(folder / "there"), 10).upload()

    return [folder_of(make)]


@reader(record_samples, share=0.5)
def read_record(folder: Path) -> None:
    """Whatever a record of uploads says, what is there is then what is here."""
    from ms_diffusion.commands.modelarts import Uploads

    Uploads(folder / "run", str(folder / "there"), 10).upload()
    here, there = (
        {path.relative_to(root): path.stat().st_size for path in root.rglob("*") if path.is_file() and path.name[0] != "."}
        for root in (folder / "run", folder / "there")
    )
    assert all(there.get(name) == size for name, size in here.items())


LIBRARY = b"\x7fELF" + bytes(200)
LIBRARY_NAME = f"key-{hashlib.sha256(LIBRARY).hexdigest()}.so"


@reader(lambda: [{LIBRARY_NAME: LIBRARY}], share=0.3)
def read_library(folder: Path) -> None:
    """A changed library is never tried."""
    from ms_diffusion import kernels

    content, tried = (folder / LIBRARY_NAME).read_bytes(), []
    with patch.object(kernels, "_works", lambda *args: not tried.append(args)):
        found = kernels._find(folder, "key")
    assert bool(found) == bool(tried) == (content == LIBRARY) and (folder / LIBRARY_NAME).exists() == bool(found)


@reader(lambda: [{"x": b"lines"}])
def read_faulty(folder: Path) -> None:
    """Not among the readers of a run of this program: each of the ways in which one can fail, for the program's own test."""
    match sum((folder / "x").read_bytes()) % 5:
        case 0:
            time.sleep(60)
        case 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        case 2:
            np.ones(MEMORY, np.uint8)
        case 3:
            raise ValueError("not in one line\n")


# Cases


def files_of(name: str, seed: int, case: int) -> Files:
    """The files of a case: of one of the reader's samples, or of the seeds that are kept, one of them changed."""
    rng, samples = Random(f"{name} {seed} {case}"), READERS[name].samples()
    kept = [load_seed(path) for path in sorted(SEEDS.glob(f"{name}/*"))]
    files = dict(rng.choice(samples * 3 + kept))
    changed = rng.choice(sorted(files))
    others = [content for sample in samples for content in sample.values()]
    for _ in range(rng.choice([1, 1, 2, 4])):
        files[changed] = change(rng, files[changed], others)
    return files


def load_seed(path: Path) -> Files:
    """A folder of files, or a file whose name is the one that its reader expects."""
    paths = [each for each in path.rglob("*") if each.is_file()]
    return {str(each.relative_to(path)): each.read_bytes() for each in paths}


def run_case(name: str, files: Files) -> str | None:
    """None if the case passes, else what is wrong."""
    from ms_diffusion.runtime import UserError

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for each, content in files.items():
            (folder / each).parent.mkdir(parents=True, exist_ok=True)
            (folder / each).write_bytes(content)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()) as err:
                warnings.simplefilter("ignore")
                READERS[name].read(folder)
        except UserError as e:
            if "\n" in str(e) or not 10 < len(str(e)) < 3000:
                return f"the message has {len(str(e))} characters in {len(str(e).splitlines())} lines: {str(e)[:300]!r}"
        except READERS[name].allowed:
            pass
        except BaseException as e:
            frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__)[-4:]]
            return f"{type(e).__name__}: {str(e)[:200]!r} at {' '.join(frames)}"
        if "Traceback" in err.getvalue() or len(err.getvalue()) > 3000:
            return f"it prints {err.getvalue()[:300]!r}"
    return None


def choose(names: list[str], seed: int, case: int) -> str:
    return Random(f"{seed} {case}").choices(names, [READERS[name].share for name in names])[0]


def work(connection: Any, names: list[str], seed: int, cases: range) -> None:
    """Run these cases in this process. Before and after each one, (case, its reader, its files, what is wrong) is sent."""
    from ms_diffusion import runtime

    runtime.set_device("cpu")
    for name in names:  # imports what is needed
        for sample in READERS[name].samples():
            if problem := run_case(name, sample):
                raise RuntimeError(f"{name}: a good file fails: {problem}")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    for case in cases:
        name = choose(names, seed, case)
        files = files_of(name, seed, case)
        connection.send((case, name, files, None))
        connection.send((case, name, files, run_case(name, files)))
    connection.send((cases.stop, "", {}, None))


def run_cases(names: list[str], seed: int, cases: range) -> Iterator[tuple[str, Files, str]]:
    """(reader and case, files, what is wrong) of each case that fails, which may end its process, or hang."""
    context, case, name, files = multiprocessing.get_context("spawn"), cases.start, "", {}
    while case < cases.stop:
        last, limit, problem = min(case + PER_PROCESS, cases.stop), 120.0, None
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(theirs, names, seed, range(case, last)), daemon=True)
        process.start()
        theirs.close()
        try:
            while case < last:
                if not ours.poll(limit):
                    raise TimeoutError
                case, name, files, problem = ours.recv()
                limit = SECONDS
                if problem:
                    yield f"{name}/{seed}-{case}", files, problem
        except (EOFError, TimeoutError) as e:
            process.kill() if isinstance(e, TimeoutError) else process.join()
            if not name:
                raise SystemExit("the first process has failed") from e
            code = f"its process ended with code {process.exitcode}"
            yield f"{name}/{seed}-{case}", files, code if process.exitcode else f"it takes more than {SECONDS} seconds"
            case += 1
        process.join()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", nargs="*", choices=sorted(READERS), default=sorted(READERS.keys() - {"faulty"}))
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"), help="folder for the files that fail")
    args = parser.parse_args(argv)
    started, failed = time.time(), 0
    for case, files, problem in run_cases(args.reader, args.seed, range(args.first, args.first + args.cases)):
        failed += 1
        for name, content in files.items():
            (args.out / case / name).parent.mkdir(parents=True, exist_ok=True)
            (args.out / case / name).write_bytes(content)
        print(f"{args.out / case}: {problem}", flush=True)
    print(f"{args.cases} cases of {len(args.reader)} readers in {time.time() - started:.0f} s: {failed} fail")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
