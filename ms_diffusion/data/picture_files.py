"""Picture files of any kind, read as 8-bit images of one size: bit depths, transparency, rotations, huge pictures."""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ..files import check_memory
from ..images import open_picture

MODES = {1: "L", 3: "RGB"}
MOST_PIXELS = 150_000_000  # of a picture that is unpacked whole
DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # bits that the samples of a file may use
ORIENTATION = 0x0112  # the tag of EXIF and TIFF, and what undoes each of its values
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, PHOTOMETRIC, LARGEST_SAMPLE = 258, 262, 281  # tags of TIFF
WHITE_IS_ZERO = 0  # a value of the second


class Picture(NamedTuple):
    """What is read from a file."""

    pixels: np.ndarray  # (size, size, channels) uint8
    depth: int | None  # bits that samples of more than 8 bits seem to use, where the file does not say it
    pages: int  # or frames, of which this is the first


def read_image(path: str | Path, size: int, channels: int, matte: str = "white") -> np.ndarray:
    """The (size, size, channels) uint8 of `read_picture`."""
    return read_picture(path, size, channels, matte).pixels


def read_picture(path: str | Path, size: int, channels: int, matte: str = "white", depth: int | None = None) -> Picture:
    """One image file as (size, size, channels) uint8, gray or RGB.

    The first frame of an animation and the first page of a TIFF file are read. The orientation in EXIF is applied, and
    transparent pixels show the colour `matte`. Samples of more than 8 bits keep the upper 8 of those that are in use:
    `depth` of them, or else as many as the file says or its largest value needs (8, 10, 12, 14 or 16 bits, or more). Floats
    are 0 to 1 or 0 to 255. The shorter side is resized to `size` (Lanczos), the longer one is cropped about its center.

    Raises OSError if the file cannot be read or is none, UserError if there is too little memory, ValueError for all else.
    """
    with open_picture(path) as file:
        _check_size(file, size)
        pages = _pages(file)
        image, depth = _to_8_bits(file, path, depth)
        turn = TURNS.get(_orientation(file))
    image = image if turn is None else image.transpose(turn)
    if _has_alpha(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, matte), image)
    elif image.mode == "LAB":
        image = _lab_to_rgb(image)
    image = ImageOps.fit(image.convert(MODES[channels]), (size, size), Image.Resampling.LANCZOS)
    return Picture(np.asarray(image).reshape(size, size, channels), depth, pages)


def _check_size(file: Image.Image, size: int) -> None:
    """Let a huge JPEG file be unpacked at a part of its size. Raises ValueError if a picture has too many pixels."""
    if (whole := file.width * file.height) > MOST_PIXELS:
        file.draft(None, (2 * size, 2 * size))  # pyright: ignore[reportArgumentType]
    pixels = file.width * file.height
    if pixels > MOST_PIXELS:
        raise ValueError(f"it has {whole / 1e6:.0f} million pixels, and {MOST_PIXELS / 1e6:.0f} are read at most")
    if pixels > 1_000_000:  # below that, the question costs more than the picture
        check_memory(16 * pixels, "its picture")  # four of 4 bytes a pixel


def _pages(file: Image.Image) -> int:
    try:
        return int(getattr(file, "n_frames", 1))
    except Exception:  # where the list of its pages is damaged
        return 1


def _orientation(file: Image.Image) -> int:
    """The EXIF orientation, 1 where it is unknown or EXIF is damaged. A TIFF file is turned by PIL when it is unpacked."""
    try:
        return int(file.getexif().get(ORIENTATION, 1))
    except Exception:  # of many kinds
        return 1


def _has_alpha(image: Image.Image) -> bool:
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or palette.endswith("A") or "transparency" in image.info


def _load(file: Image.Image) -> None:
    try:
        file.load()
    except OSError as e:
        if e.errno:  # of the disk
            raise
        raise ValueError(f"it is damaged or cut off ({e})") from e
    except Exception as e:  # PIL's decoders raise many kinds of exceptions
        raise ValueError(f"it is damaged ({str(e) or type(e).__name__})") from e


def _raw_mode(file: Image.Image) -> str:
    """How PIL unpacks the samples, such as "RGB;16B", if it says so before it does."""
    args = file.tile[0][3] if getattr(file, "tile", None) else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _to_8_bits(file: Image.Image, path: str | Path, depth: int | None) -> tuple[Image.Image, int | None]:
    """The picture of an open file with 8-bit samples, and the bits that these were taken from where that is a guess."""
    raw = _raw_mode(file)
    _load(file)
    key = file.info.get("transparency") if file.mode != "P" else None  # the colour that is transparent
    if file.mode == "F":
        return Image.fromarray(_floats_to_8_bits(np.asarray(file))), None
    if file.mode.startswith("I"):
        samples, declared = np.asarray(file).astype(np.int32), _declared_depth(file)
    elif ";16" in raw and file.mode in ("RGB", "RGBA", "CMYK"):
        upper, declared = np.asarray(file), None  # the bytes that PIL keeps
        if key is None and upper[..., :3].max() >= 64 and depth in (None, 16):  # all bits are in use
            return file, 16
        samples = upper.astype(np.int32) << 8 | _lower_bytes(path, raw)
    elif isinstance(key, int | tuple):
        samples, declared = np.asarray(file.convert("RGB" if file.mode == "RGB" else "L")).astype(np.int32), 8
        key = key * {"L;2": 85, "L;4": 17}.get(raw, 1) if isinstance(key, int) else key
    else:
        return file, None

    if samples.min() < 0:
        raise ValueError(f"its pixels are whole numbers from {samples.min()} to {samples.max()}: below 0 they say no brightness")
    alpha = samples[..., 3] if file.mode == "RGBA" else None
    colours = samples[..., :3] if file.mode == "RGBA" else samples
    guess = _depth(colours)
    colours = _upper_8_bits(colours, declared or depth or guess)
    if file.mode.startswith("I") and _tiff_tag(file, PHOTOMETRIC) == WHITE_IS_ZERO:
        colours = 255 - colours
    mode = "L" if colours.ndim == 2 else "CMYK" if file.mode == "CMYK" else "RGB"
    image = Image.frombytes(mode, file.size, colours.tobytes())
    if key is not None:
        alpha = np.where((samples.reshape(*samples.shape[:2], -1) == key).all(-1), 0, 255)
    if alpha is not None:
        image.putalpha(Image.fromarray(_upper_8_bits(alpha, _depth(alpha))))
    return image, None if declared else guess


def _depth(samples: np.ndarray) -> int:
    """The bits that the largest sample needs, of those that cameras and scanners use."""
    return next(depth for depth in DEPTHS if samples.max() < 2**depth)


def _upper_8_bits(samples: np.ndarray, depth: int) -> np.ndarray:
    return (samples >> (depth - 8)).clip(0, 255).astype(np.uint8)


def _tiff_tag(file: Image.Image, tag: int) -> int | None:
    """The number in a tag of a TIFF file, the largest of several."""
    value = getattr(file, "tag_v2", {}).get(tag)
    try:
        return None if value is None else int(np.max(value))
    except (TypeError, ValueError):  # it is damaged
        return None


def _declared_depth(file: Image.Image) -> int | None:
    """The bits that a TIFF file says that its samples use."""
    bits, largest = _tiff_tag(file, BITS_PER_SAMPLE) or 16, _tiff_tag(file, LARGEST_SAMPLE) or 0
    return bits if bits < 16 else max(largest.bit_length(), 8) if largest > 0 else None


def _lower_bytes(path: str | Path, raw: str) -> np.ndarray:
    """(H, W, C): the lower bytes of 16-bit samples, which PIL unpacks where it takes them for samples of the other order."""
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[raw[-1]]
    as_other = "RGBA" if raw == "LA;16B" else raw[:-1] + other
    with open_picture(path) as file:
        tiles = []
        for codec, box, offset, args in file.tile:
            args = as_other if isinstance(args, str) else (as_other, *args[1:])
            tiles.append((codec, box, offset, args))
        file.tile = [type(old)(*new) for old, new in zip(file.tile, tiles, strict=True)] 
        _load(file)
        lower = np.asarray(file)
    return lower[..., [1, 1, 1, 3]] if raw == "LA;16B" else lower


def _floats_to_8_bits(samples: np.ndarray) -> np.ndarray:
    low, high = samples.min(), samples.max()
    if not (0 <= low and high <= 255):  # nor NaN
        raise ValueError(f"its pixels are floats from {low:g} to {high:g}: make them 0 to 1, or 0 to 255")
    return np.round(samples * (255 if high <= 1 else 1)).astype(np.uint8)


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
