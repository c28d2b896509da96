"""Pictures that are too large to be unpacked whole: PNG and TIFF files, cut into small files of bands, strips or tiles."""

import itertools
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ..files import check_memory
from ..images import PictureError, open_picture

MOST_PIXELS = 4_000_000_000  # of a picture: some minutes
PIECE_PIXELS = 4_000_000  # of a band of a PNG file
SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEPT, KEPT_BYTES = (b"PLTE", b"tRNS"), 768  # chunks that say what pixels look like, and what one holds at most
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of each colour type
WIDTH, HEIGHT, ROWS_PER_STRIP, PLANAR = 256, 257, 278, 284  # tags of TIFF
STRIPS, STRIP_BYTES, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES = 273, 279, 322, 323, 324, 325
COPIED = (258, 259, 262, 266, 277, 281, 317, 320, 338, 339, 347, 529, 530, 531, 532)  # say how pixels are packed
BLOCK = 1 << 20  # bytes
Pieces = tuple[int, int, Iterator[tuple[int, int, bytes]]]  # width, height, and (left, top, content of a file) of each piece
Read = Callable[[bytes, int | None], tuple[Image.Image, int | None]]


def read_in_pieces(file: ImageFile, side: int, read: Read, depth: int | None) -> tuple[Image.Image, int | None]:
    """An open PNG or TIFF file, reduced by averages over squares of a whole number of pixels, such that its shorter side is
    `side` or more.

    read(data, depth) -> (image, guess) unpacks a file's content, as gray or RGB of 8 bits that are taken from `depth` bits;
    a guess of None means that the depth is known. The pieces are read twice if the depth must be guessed from all of them.
    Returns the picture and the guess. Raises PictureError if the file is of another kind, or its pieces are too large.
    """
    cut = {"PNG": _png_bands, "TIFF": _tiff_pieces}
    if file.format not in cut or file.width * file.height > MOST_PIXELS:
        millions = f"{file.width * file.height / 1e6:.0f} million pixels"
        raise PictureError(f"it has {millions}, which are too many for a file of the kind {file.format}")
    width, height, pieces = cut[file.format](file)
    step = max(min(width, height) // side, 1)
    shape = height // step, width // step
    check_memory(16 * shape[0] * shape[1], "its reduced picture")
    guesses, total = [], None
    for left, top, data in pieces:
        image, guess = read(data, depth)
        guesses.append(guess)
        total = _add(total, np.asarray(image), left, top, step, shape)
    guess = max((guess for guess in guesses if guess), default=None)
    if depth is None and len({*guesses}) > 1:
        return read_in_pieces(file, side, read, guess)[0], guess
    if total is None:
        raise PictureError("it holds no pixels")
    return Image.fromarray((total / step**2 + 0.5).astype(np.uint8)), guess


def _add(total: np.ndarray | None, piece: np.ndarray, left: int, top: int, step: int, shape: tuple[int, int]) -> np.ndarray:
    """`total` with the sums of a piece (h, w) or (h, w, 3), which lies there, over squares of step x step pixels."""
    if total is None:
        total = np.zeros((*shape, *piece.shape[2:]), np.uint32)
    places = []
    for axis, start in enumerate((top, left)):
        piece = piece.take(range(min(piece.shape[axis], shape[axis] * step - start)), axis)  # tiles reach beyond the edge
        cells = (start + np.arange(piece.shape[axis])) // step
        if not len(cells):
            return total
        piece = np.add.reduceat(piece, np.flatnonzero(np.diff(cells, prepend=-1)), axis, np.uint32)
        places.append(slice(cells[0], cells[-1] + 1))
    total[tuple(places)] += piece
    return total


# PNG


def _png_bands(file: ImageFile) -> Pieces:
    """Bands of rows of a PNG file."""
    chunks = _png_chunks(file.fp)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", next(chunks)[1])
    if interlaced:
        raise PictureError("it is interlaced, and too large to be unpacked whole")
    kept = b""
    for kind, data in chunks:
        if kind == b"IDAT":
            break
        kept += _chunk(kind, data) if kind in KEPT else b""
    bits = depth * PNG_CHANNELS[colour]
    row, unit, rows = (width * bits + 7) // 8, max(bits // 8, 1), max(PIECE_PIXELS // width, 1)

    def bands() -> Iterator[tuple[int, int, bytes]]:
        above, band, top = np.zeros(row, np.uint8), bytearray(), 0
        for block in _inflate(itertools.chain([(kind, data)], chunks)):
            band += block
            while len(band) >= (count := min(rows, height - top)) * (row + 1) > 0:
                pixels = _unfilter(bytes(band[: count * (row + 1)]), above, unit)
                yield 0, top, _png(width, count, depth, colour, np.pad(pixels, ((0, 0), (1, 0))), kept)
                del band[: count * (row + 1)]
                above, top = pixels[-1], top + count
        if top < height:
            raise PictureError("it is cut off")

    return width, height, bands()


def _png_chunks(file: Any) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of the chunks of a PNG file; a long one comes in parts."""
    file.seek(len(SIGNATURE))
    while len(begin := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", begin)
        block = KEPT_BYTES if kind in KEPT else BLOCK
        for first in range(0, max(length, 1), block):
            yield kind, file.read(min(block, length - first))
        file.read(4)  # its checksum; zlib has one of the pixels


def _inflate(chunks: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """What is packed in the chunks of pixels, in blocks."""
    stream = zlib.decompressobj()
    for kind, data in chunks:
        while kind == b"IDAT" and data and not stream.eof:
            yield stream.decompress(data, BLOCK)
            data = stream.unconsumed_tail


def _unfilter(band: bytes, above: np.ndarray, unit: int) -> np.ndarray:
    """(rows, bytes) uint8 of filtered rows below the row `above`, for pixels of `unit` bytes. PIL does it: a filter mixes a
    byte with those of the same place in other pixels, so that any bytes of a pixel may be taken for its gray or colours."""
    rows = np.frombuffer(band, np.uint8).reshape(-1, 1 + len(above))
    rows = np.concatenate([np.pad(above, (1, 0))[None], rows])  # filter 0 leaves a row as it is
    filters, pixels = rows[:, :1], rows[:, 1:].reshape(len(rows), -1, unit)
    group = unit if unit in (1, 3, 4) else unit // 2
    parts = []
    for first in range(0, unit, group):
        part = np.concatenate([filters, pixels[..., first : first + group].reshape(len(rows), -1)], 1)
        content = _png(pixels.shape[1], len(rows), 8, {1: 0, 3: 2, 4: 6}[group], part)
        with open_picture(BytesIO(content)) as file:
            parts.append(np.asarray(file).reshape(len(rows), -1, group))
    return np.concatenate(parts, -1).reshape(len(rows), -1)[1:]


def _png(width: int, height: int, depth: int, colour: int, rows: np.ndarray, chunks: bytes = b"") -> bytes:
    """A PNG file of rows that each begin with their filter."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return SIGNATURE + header + chunks + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 0)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# TIFF


def _tiff_pieces(file: ImageFile) -> Pieces:
    """The strips or tiles of a TIFF file, each as a file of its own."""
    tags: Any = file.tag_v2  # type: ignore[attr-defined]
    width, height = tags[WIDTH], tags[HEIGHT]
    strips = TILES not in tags
    wide, high = (width, min(tags.get(ROWS_PER_STRIP, height), height)) if strips else (tags[TILE_WIDTH], tags[TILE_HEIGHT])
    places = [*zip(tags[STRIPS if strips else TILES], tags[STRIP_BYTES if strips else TILE_BYTES], strict=True)]
    if tags.get(PLANAR, 1) != 1 or wide * high > PIECE_PIXELS * 16:
        raise PictureError("it is too large to be unpacked whole, and its strips or tiles are, or hold one colour each")
    across = -(-width // wide)
    if len(places) != across * -(-height // high):
        raise PictureError("it is damaged: it has another number of strips or tiles than its size needs")

    def pieces() -> Iterator[tuple[int, int, bytes]]:
        size = file.fp.seek(0, os.SEEK_END)  # type: ignore[union-attr]
        for i, (start, length) in enumerate(places):
            left, top = i % across * wide, i // across * high
            file.fp.seek(start)
            rows = min(high, height - top) if strips else high
            yield left, top, _tiff(tags, wide, rows, file.fp.read(min(length, size)))

    return width, height, pieces()


def _tiff(tags: Any, width: int, height: int, data: bytes) -> bytes:
    """A TIFF file of one strip that is packed as `tags` say."""
    own = ImageFileDirectory_v2(b"II*\0\0\0\0\0" if tags.prefix == b"II" else b"MM\0*\0\0\0\0")
    for tag in (tag for tag in COPIED if tag in tags):
        own.tagtype[tag] = tags.tagtype[tag]
        own[tag] = tags[tag]
    own[WIDTH], own[HEIGHT], own[ROWS_PER_STRIP] = width, height, height
    own[STRIPS], own[STRIP_BYTES] = 0, len(data)  # PIL adds the length of all that is before the strip
    content = BytesIO()
    own.save(content)
    return content.getvalue() + data
