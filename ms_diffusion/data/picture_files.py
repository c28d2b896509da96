"""Picture files of any kind, read as 8-bit images of one size: bit depths, transparency, rotations, huge pictures."""

import sys
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile

from ..files import Source, check_memory
from ..images import PictureError, open_picture, orientation
from .huge_pictures import read_in_pieces

MODES = {1: "L", 3: "RGB"}
MOST_PIXELS = 150_000_000  # of a picture that is unpacked whole
DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # bits that samples use
TURNS = {  # what undoes the values of the orientation
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
    pages: int  # of a TIFF file, of which this is the first


def read_image(path: str | Path, size: int | tuple[int, int], channels: int, matte: str = "white") -> np.ndarray:
    """The (height, width, channels) uint8 of `read_picture`."""
    return read_picture(path, size, channels, matte).pixels


def read_picture(
    path: str | Path, size: int | tuple[int, int], channels: int, matte: str = "white", depth: int | None = None
) -> Picture:
    """One image file as (height, width, channels) uint8, gray or RGB; `size` is (height, width), or one number for both.

    The first frame of an animation and the first page of a TIFF file are read. The orientation in EXIF is applied, and
    transparent pixels show the colour `matte`. Samples of more than 8 bits keep the upper 8 of those that are in use:
    `depth` of them, or else as many as the file says or its largest value needs (8, 10, 12, 14, 16 or more). Floats are 0
    to 1 or 0 to 255. It is resized to fill that size (Lanczos), and what is too long is cropped about its center. A JPEG,
    PNG or TIFF picture of more than `MOST_PIXELS` is reduced while it is unpacked.

    Raises OSError if the file cannot be read or is none, UserError if there is too little memory, PictureError for all else.
    """
    height, width = (size, size) if isinstance(size, int) else size
    most = 2 * max(height, width)
    with open_picture(path) as file:
        pages = _pages(file)
        if file.width * file.height > MOST_PIXELS:
            file.draft(None, (most, most))  # pyright: ignore[reportArgumentType]  # lets JPEG be unpacked in part
        if file.width * file.height > MOST_PIXELS:
            image, depth = read_in_pieces(file, most, lambda data, depth: _piece(data, channels, matte, depth), depth)
        else:
            if file.width * file.height > 1_000_000:  # below that, the question costs more than the picture
                check_memory(16 * file.width * file.height, "its picture")  # four of 4 bytes a pixel
            image, depth = _flat(file, path, channels, matte, depth)
        turn = TURNS.get(orientation(file))
        image = image if turn is None else image.transpose(turn)
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return Picture(np.asarray(image).reshape(height, width, channels), depth, pages)


def _pages(file: ImageFile) -> int:
    try:
        return int(getattr(file, "n_frames", 1)) if file.format == "TIFF" else 1  # of a film it takes long to count
    except Exception:  # where the list of its pages is damaged
        return 1


def _piece(data: bytes, channels: int, matte: str, depth: int | None) -> tuple[Image.Image, int | None]:
    with open_picture(BytesIO(data)) as file:
        return _flat(file, BytesIO(data), channels, matte, depth)


def _flat(file: ImageFile, source: Source, channels: int, matte: str, depth: int | None) -> tuple[Image.Image, int | None]:
    """The picture of an open file as gray or RGB of 8 bits, on the matte, and the depth that is guessed."""
    image, depth = _to_8_bits(file, source, depth)
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or palette.endswith("A") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, matte), image)
    elif image.mode in ("CMYK", "LAB"):
        image = _to_rgb(image)
    return image.convert(MODES[channels]), depth


# Bit depths


def _to_8_bits(file: ImageFile, source: Source, depth: int | None) -> tuple[Image.Image, int | None]:
    """The picture of an open file with 8-bit samples, and the bits that these were taken from where that is a guess."""
    raw = _raw_mode(file)
    file.load()
    key = file.info.get("transparency") if file.mode != "P" else None  # the colour that is transparent
    if file.mode == "F":
        return Image.fromarray(_floats_to_8_bits(np.asarray(file))), None
    if file.mode.startswith("I"):
        samples, declared = np.asarray(file).astype(np.int32), _declared_depth(file)
    elif ";16" in raw and file.mode in ("RGB", "RGBA", "CMYK"):
        upper, declared = np.asarray(file), None  # the bytes that PIL keeps
        if key is None and upper[..., :3].max() >= 64 and depth in (None, 16):  # all bits are in use
            return file, 16
        samples = upper.astype(np.int32) << 8 | _lower_bytes(source, raw)
    elif isinstance(key, int | tuple):
        samples, declared = np.asarray(file.convert("RGB" if file.mode == "RGB" else "L")).astype(np.int32), 8
        if isinstance(key, int):
            key = 255 * (key > 0) if file.mode == "1" else key * {"L;2": 85, "L;4": 17}.get(raw, 1)
    else:
        return file, None

    if samples.min() < 0:
        raise PictureError(f"its pixels are whole numbers from {samples.min()} to {samples.max()}: they must be at least 0")
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


def _raw_mode(file: ImageFile) -> str:
    """How PIL unpacks the samples, such as "RGB;16B", if it says so before it does."""
    args = file.tile[0][3] if getattr(file, "tile", None) else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _depth(samples: np.ndarray) -> int:
    """The bits that the largest sample needs, of those that cameras and scanners use."""
    return next(depth for depth in DEPTHS if samples.max() < 2**depth)


def _upper_8_bits(samples: np.ndarray, depth: int) -> np.ndarray:
    return (samples >> (depth - 8)).clip(0, 255).astype(np.uint8)


def _tiff_tag(file: ImageFile, tag: int) -> int | None:
    """The number in a tag of a TIFF file, the largest of several."""
    value = getattr(file, "tag_v2", {}).get(tag)
    try:
        return None if value is None else int(np.max(value))
    except (TypeError, ValueError):  # it is damaged
        return None


def _declared_depth(file: ImageFile) -> int | None:
    """The bits that a TIFF file says that its samples use."""
    bits, largest = _tiff_tag(file, BITS_PER_SAMPLE) or 16, _tiff_tag(file, LARGEST_SAMPLE) or 0
    return bits if bits < 16 else max(largest.bit_length(), 8) if largest > 0 else None


def _lower_bytes(source: Source, raw: str) -> np.ndarray:
    """(H, W, C): the lower bytes of 16-bit samples, which PIL unpacks where it takes them for samples of the other order."""
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[raw[-1]]
    swapped = "RGBA" if raw == "LA;16B" else raw[:-1] + other
    with open_picture(source) as file:
        tiles: list[Any] = file.tile
        for i, tile in enumerate(tiles):
            new = (*tile[:3], swapped if isinstance(tile[3], str) else (swapped, *tile[3][1:]))
            tiles[i] = tile._make(new) if hasattr(tile, "_make") else new  # by the version of PIL
        file.load()
        lower = np.asarray(file)
    return lower[..., [1, 1, 1, 3]] if raw == "LA;16B" else lower


def _floats_to_8_bits(samples: np.ndarray) -> np.ndarray:
    low, high = samples.min(), samples.max()
    if not (0 <= low and high <= 255):  # nor NaN
        raise PictureError(f"its pixels are floats from {low:g} to {high:g}: make them 0 to 1, or 0 to 255")
    return np.round(samples * (255 if high <= 1 else 1)).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Colours of ink or CIELAB in RGB. Inks are those of the file's colour profile, if it has one that can be read."""
    from PIL import ImageCms

    own: Any = image.info.get("icc_profile")
    if image.mode == "CMYK" and not own:
        return image.convert("RGB")
    try:
        profile = ImageCms.createProfile("LAB") if image.mode == "LAB" else ImageCms.ImageCmsProfile(BytesIO(own))
        found = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert found  # it is None where the image itself is changed
        return found
    except (ImageCms.PyCMSError, OSError, TypeError):  # a damaged profile, or one of other colours
        return image.convert("RGB")
