"""Picture files of all kinds, made here byte by byte or by PIL, against the pixels that they stand for."""

import itertools
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from ms_diffusion.data import huge_pictures, picture_files
from ms_diffusion.data.picture_files import read_image, read_picture
from ms_diffusion.images import ORIENTATION, open_picture, picture_formats, picture_size

pytestmark = pytest.mark.filterwarnings("error")
RNG = np.random.default_rng(0)
DEPTHS = (10, 12, 14, 16)


def png(pixels, colour, depth=None, chunks=()):
    """A PNG file of (H, W, C) samples; those of fewer than 8 bits are given as bytes of a row."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    depth = depth or 8 * pixels.dtype.itemsize
    width = pixels.shape[1] * max(8 // depth, 1)
    header = struct.pack(">IIBBBBB", width, len(pixels), depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(pixels, photometric, order="<", deflate=False, tags=(), rows=None, tile=None, bits=None):
    """A TIFF file of (H, W, C) samples, in strips of so many rows, or in square tiles."""
    height, width, channels = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order))
    if tile:
        padded = np.pad(data, ((0, -height % tile), (0, -width % tile), (0, 0)))
        corners = itertools.product(range(0, height, tile), range(0, width, tile))
        parts = [padded[y : y + tile, x : x + tile].tobytes() for y, x in corners]
    else:
        rows = rows or height
        parts = [data[y : y + rows].tobytes() for y in range(0, height, rows)]
    parts = [zlib.compress(part) if deflate else part for part in parts]
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    found = {256: [width], 257: [height], 258: [bits or 8 * pixels.dtype.itemsize] * channels, 259: [8 if deflate else 1]}
    found |= {262: [photometric], 277: [channels], 339: [kind] * channels, **dict(tags)}
    starts = list(itertools.accumulate((len(part) for part in parts), initial=8))[:-1]
    lengths = [len(part) for part in parts]
    found |= {322: [tile], 323: [tile], 324: starts, 325: lengths} if tile else {273: starts, 278: [rows], 279: lengths}
    body, wide = b"".join(parts), (256, 257, 273, 278, 279, 324, 325)
    body += bytes(len(body) % 2)
    entries, extra, at = b"", b"", 8 + len(body) + 2 + 12 * len(found) + 4
    for tag, values in sorted(found.items()):
        code, letter = (4, "I") if tag in wide else (3, "H")
        packed = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(packed) > 4:
            packed, extra = struct.pack(order + "I", at + len(extra)), extra + packed + bytes(len(packed) % 2)
        entries += struct.pack(order + "HHI", tag, code, len(values)) + packed.ljust(4, b"\0")
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(body))
    return start + body + struct.pack(order + "H", len(found)) + entries + bytes(4) + extra


def saved(image, kind, **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(tmp_path, data, channels=3, size=4, **options):
    (tmp_path / "picture").write_bytes(data)
    return read_picture(tmp_path / "picture", size, channels, **options)


def pixels(tmp_path, *args, **options):
    return read(tmp_path, *args, **options).pixels


def ramp(depth, channels, size=4):
    """(H, W, C) uint16 that use all bits of a depth."""
    values = RNG.integers(0, 2**depth, (size, size, channels)).astype(np.uint16)
    values[0, 0] = 2**depth - 1
    return values


# Bit depths


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("channels", [1, 3])
def test_samples_of_16_bits_are_scaled_by_the_bits_in_use(tmp_path, depth, channels):
    """Of a gray or colour PNG, of a TIFF of both byte orders, compressed or not."""
    values = ramp(depth, channels)
    expected = values >> (depth - 8)
    files = [png(values, 0 if channels == 1 else 2)]
    for order, deflate in itertools.product("<>", (False, True)):
        files.append(tiff(values, 1 if channels == 1 else 2, order, deflate))
    for data in files:
        found = read(tmp_path, data, channels)
        np.testing.assert_array_equal(found.pixels, expected)
        assert found.depth == depth


@pytest.mark.parametrize("depth", DEPTHS)
def test_transparency_of_16_bits(tmp_path, depth):
    """Gray and colour with alpha of all bits or of those in use; half-transparent pixels lie on the matte."""
    for most in (2**depth - 1, 2**16 - 1):
        values = ramp(depth, 4)
        values[..., 3] = most
        values[1, :, 3] = 0
        expected = values[..., :3] >> (depth - 8)
        expected[1] = (0, 0, 255)
        np.testing.assert_array_equal(pixels(tmp_path, png(values, 6), matte="blue"), expected)
        for order in "<>":
            data = tiff(values, 2, order, tags={338: [2]})
            np.testing.assert_array_equal(pixels(tmp_path, data, matte="blue"), expected)
        gray = values[..., [0, 3]]
        found = pixels(tmp_path, png(gray, 4), 1, matte="black")[..., 0]
        np.testing.assert_array_equal(found, np.where(gray[..., 1] > 0, gray[..., 0] >> (depth - 8), 0))


def test_the_depth_can_be_given(tmp_path):
    """A dark picture among others of 16 bits stays dark."""
    values = ramp(12, 3)
    np.testing.assert_array_equal(pixels(tmp_path, png(values, 2), depth=16), values >> 8)
    np.testing.assert_array_equal(pixels(tmp_path, png(values[..., :1], 0), 1, depth=14), values[..., :1] >> 6)


def test_a_tiff_that_says_its_depth(tmp_path):
    values = np.array([[[1000], [4095 >> 2]]], np.uint16).repeat(2, 0)
    data = tiff(values, 1, tags={281: [4095]})
    assert read(tmp_path, data, 1, 2)[1] is None
    np.testing.assert_array_equal(pixels(tmp_path, data, 1, 2), values >> 4)
    packed = np.array([[[0x80], [0x0F], [0xFF]]], np.uint8).repeat(2, 0)  # two samples of 12 bits in a row: 0x800, 0xFFF
    data = bytearray(tiff(packed, 1, bits=12))
    at = data.index(struct.pack("<HHI", 256, 4, 1))
    data[at + 8 : at + 12] = struct.pack("<I", 2)
    np.testing.assert_array_equal(pixels(tmp_path, bytes(data), 1, 2)[..., 0], [[0x80, 0xFF]] * 2)


def test_gray_of_few_bits(tmp_path):
    for depth, row in ((1, 0b10000000), (2, 0b01110010), (4, 0x59)):
        count = 8 // depth
        values = np.array([row >> (8 - depth * (i + 1)) & (2**depth - 1) for i in range(count)])
        data = png(np.full((count, 1, 1), row, np.uint8), 0, depth)
        expected = (values * 255 // (2**depth - 1))[None, :, None].repeat(count, 0)
        np.testing.assert_array_equal(pixels(tmp_path, data, 1, count), expected)
        key = struct.pack(">H", values[0])  # and with a colour that is transparent
        data = png(np.full((count, 1, 1), row, np.uint8), 0, depth, [(b"tRNS", key)])
        clear = (values == values[0])[None, :, None]
        np.testing.assert_array_equal(pixels(tmp_path, data, 1, count, matte="#404040"), np.where(clear, 0x40, expected))


def test_a_colour_that_is_transparent(tmp_path):
    for dtype in (np.uint8, np.uint16):
        for channels, colour in ((1, 0), (3, 2)):
            values = RNG.integers(0, np.iinfo(dtype).max, (4, 4, channels)).astype(dtype)
            values[0, 0] = np.iinfo(dtype).max
            values[2, 3] = values[1, 1] + 1  # of 16 bits, the same upper bytes
            key = struct.pack(f">{channels}H", *values[1, 1])
            expected = values >> (8 * values.itemsize - 8)
            expected[(values == values[1, 1]).all(-1)] = 0
            found = pixels(tmp_path, png(values, colour, chunks=[(b"tRNS", key)]), channels, matte="black")
            np.testing.assert_array_equal(found, expected)


def test_floats(tmp_path):
    values = RNG.random((4, 4, 1)).astype(np.float32)
    np.testing.assert_array_equal(pixels(tmp_path, tiff(values, 1), 1), np.round(values * 255))
    np.testing.assert_array_equal(pixels(tmp_path, tiff(values * 255, 1, ">"), 1), np.round(values * 255))
    for bad in (values - 0.5, values * 1e4, np.where(values > 0.5, values, np.nan).astype(np.float32)):
        with pytest.raises(ValueError, match="floats from"):
            read(tmp_path, tiff(bad, 1), 1)


def test_whole_numbers_of_32_bits_and_below_0(tmp_path):
    values = RNG.integers(0, 2**31, (4, 4, 1)).astype(np.uint32)
    values[0, 0] = 2**31 - 1
    np.testing.assert_array_equal(pixels(tmp_path, tiff(values, 1), 1), values >> 24)
    np.testing.assert_array_equal(pixels(tmp_path, tiff(values % 256, 1), 1), values % 256)
    with pytest.raises(ValueError, match="from -"):
        read(tmp_path, tiff((values.astype(np.int64) - 2**30).astype(np.int16) - 1, 1), 1)


def test_white_is_zero(tmp_path):
    for values in (ramp(12, 1), ramp(16, 1), ramp(8, 1).astype(np.uint8)):
        depth = int(values.max()).bit_length()
        np.testing.assert_array_equal(pixels(tmp_path, tiff(values, 0), 1), 255 - (values >> (depth - 8)))


# Colour models


def test_cmyk(tmp_path):
    """JPEG files hold it inverted, as Adobe writes it, TIFF files do not."""
    image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    for data in (saved(image, "JPEG", quality=100), saved(image, "TIFF"), saved(image, "TIFF", compression="tiff_lzw")):
        red = pixels(tmp_path, data)[0, 0].astype(int)
        assert abs(red - [255, 0, 0]).max() <= 2
    deep = tiff(np.full((4, 4, 4), (0, 4095, 4095, 0), np.uint16), 5)
    assert pixels(tmp_path, deep)[0, 0].tolist() == [255, 0, 0]


def profile_of_inks(colours):
    """A colour profile (ICC.1:2001) whose table says which L, a, b bytes each combination of full inks has."""
    ramp = bytes(range(256))
    identity = b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * ramp + colours.tobytes() + 3 * ramp
    text = b"text" + bytes(4) + b"none\0\0\0\0"
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(79)
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)  # D50
    tags, body = b"", b""
    for kind, data in ((b"desc", name), (b"cprt", text), (b"wtpt", white), (b"A2B0", table)):
        tags += kind + struct.pack(">II", 128 + 4 + 4 * 12 + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = struct.pack(">I", 128 + 4 + len(tags) + len(body))
    header = size + bytes(4) + b"\2\x40\0\0prtrCMYKLab " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp"
    header += bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", 4) + tags + body


@pytest.mark.skipif(not features.check("littlecms2"), reason="Pillow without Little CMS")
def test_cmyk_with_a_colour_profile(tmp_path):
    """Inks whose mixtures are grays, lighter or darker: yellow alone is L = 60."""
    lightness = np.full((2, 2, 2, 2), 0.0)
    lightness[0, 0, 0, 0], lightness[0, 0, 1, 0] = 100, 60
    colours = np.stack([lightness * 2.55, *2 * [np.full(lightness.shape, 128)]], -1).astype(np.uint8)
    image = Image.new("CMYK", (4, 4), (0, 0, 255, 0))
    for kind in ("JPEG", "TIFF"):
        options = {"quality": 100} if kind == "JPEG" else {}
        gray = pixels(tmp_path, saved(image, kind, icc_profile=profile_of_inks(colours), **options))
        assert abs(gray.astype(int) - 145).max() <= 2  # sRGB of L = 60
        damaged = pixels(tmp_path, saved(image, kind, icc_profile=b"?" * 200, **options))
        assert abs(damaged[0, 0].astype(int) - [255, 255, 0]).max() <= 2


@pytest.mark.skipif(not features.check("littlecms2"), reason="Pillow without Little CMS")
def test_lab(tmp_path):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = Image.new("RGB", (4, 4), (200, 30, 60))
    lab = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    assert abs(pixels(tmp_path, saved(lab, "TIFF"))[0, 0].astype(int) - [200, 30, 60]).max() <= 3


def test_palettes(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert pixels(tmp_path, saved(image, kind))[0, 0].tolist() == [200, 100, 50]
    half = saved(image, "PNG", transparency=bytes([255, 128]))
    assert pixels(tmp_path, half, matte="black")[0, 0].tolist() == [100, 50, 25]
    assert pixels(tmp_path, saved(image, "GIF", transparency=1), matte="#0000ff")[0, 0].tolist() == [0, 0, 255]


def test_the_matte_is_seen_through_transparent_pixels_alone(tmp_path):
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 255))
    image.putpixel((3, 3), (10, 20, 30, 0))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        found = pixels(tmp_path, saved(image, kind, **options), matte="lime")
        assert found[0, 0].tolist() == [10, 20, 30] and found[3, 3].tolist() == [0, 255, 0]


# Rotation


def exif(orientation):
    found = Image.Exif()
    found[ORIENTATION] = orientation
    return found


TURNED = {  # what a viewer does to the pixels of each orientation, from the EXIF specification
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}
KINDS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "JPEG": {"quality": 100, "subsampling": 0}}
KINDS |= {"AVIF": {"quality": 100, "subsampling": "4:4:4"}} if "AVIF" in picture_formats() else {}


@pytest.mark.parametrize("kind", KINDS)
def test_all_rotations(tmp_path, kind):
    values = np.kron(RNG.integers(0, 255, (2, 2, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    for orientation, turned in TURNED.items():
        data = saved(Image.fromarray(values), kind, exif=exif(orientation), **KINDS[kind])
        assert abs(pixels(tmp_path, data, size=16).astype(int) - turned(values)).max() <= 6, orientation


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_turned_picture_is_that_which_is_seen(tmp_path, kind):
    for value in range(1, 9):
        (tmp_path / "picture").write_bytes(saved(Image.new("RGB", (24, 16)), kind, exif=exif(value)))
        assert picture_size(tmp_path / "picture") == ((16, 24) if value < 5 else (24, 16)), value


def test_rotation_of_16_bits(tmp_path):
    values = ramp(12, 3)
    for data in (tiff(values, 2, tags={274: [6]}), tiff(values, 2, deflate=True, tags={274: [6]})):
        np.testing.assert_array_equal(pixels(tmp_path, data), TURNED[6](values >> 4))
    for odd in ([0], [9], [65535]):
        np.testing.assert_array_equal(pixels(tmp_path, tiff(values, 2, tags={274: odd})), values >> 4)
    data = png(values, 2, chunks=[(b"eXIf", exif(8).tobytes()[6:])])
    np.testing.assert_array_equal(pixels(tmp_path, data), TURNED[8](values >> 4))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("TIFF", "AVIF")])
def test_odd_and_broken_exif_is_no_rotation(tmp_path, kind):
    image, whole = Image.new("RGB", (8, 8), (90, 120, 60)), exif(6).tobytes()
    bad = [whole[:n] for n in (0, 6, 8, 13, 20, len(whole) - 3)] + [b"Exif\0\0", b"Exif\0\0" + b"?" * 40, b"?" * 9]
    bad += [whole.replace(b"\0\6", bad) for bad in (b"\0\0", b"\0\x09", b"\xff\xff")]
    loop = b"Exif\0\0MM\0*" + struct.pack(">IHHHII", 8, 1, 0x8769, 4, 1, 8)  # an IFD that is in itself
    for content in [*bad, loop, b"Exif\0\0II*\0" + bytes([255] * 8)]:
        data = saved(image, kind, exif=content, **KINDS[kind])
        assert abs(pixels(tmp_path, data)[0, 0].astype(int) - [90, 120, 60]).max() <= 6, content


# Several frames or pages


def test_the_first_of_several(tmp_path):
    frames = [Image.new("RGB", (64, 64), (value,) * 3) for value in (50, 100, 150)]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("MPO", {})):
        found = read(tmp_path, saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        assert found.pages == (3 if kind == "TIFF" else 1) and (found.pixels == 50).all(), kind
    assert read(tmp_path, saved(frames[0], "TIFF")).pages == 1


# Other kinds


@pytest.mark.parametrize("kind", [kind for kind in ("AVIF", "JPEG2000", "PPM") if kind in picture_formats()])
def test_more_kinds(tmp_path, kind):
    image = Image.new("RGB", (8, 8), (90, 120, 60))
    assert abs(pixels(tmp_path, saved(image, kind))[0, 0].astype(int) - [90, 120, 60]).max() <= 4


def test_netpbm_of_12_bits(tmp_path):
    values = ramp(12, 3).astype(">u2")
    np.testing.assert_array_equal(pixels(tmp_path, b"P6 4 4 4095\n" + values.tobytes()), np.round(values / 4095 * 255))
    assert (
        abs(pixels(tmp_path, b"P5 4 4 4095\n" + values[..., 0].tobytes(), 1)[..., 0] - (values[..., 0] / 16.06)).max() <= 1
    )


def test_heif(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 64), (90, 120, 60))).save(tmp_path / "picture.heic", quality=100)
    assert abs(read_image(tmp_path / "picture.heic", 4, 3)[0, 0].astype(int) - [90, 120, 60]).max() <= 4


# What cannot be read is named, and why


@pytest.mark.parametrize("kind", [*KINDS, "GIF", "BMP", "PPM"])
def test_a_file_that_is_cut_off_is_no_picture(tmp_path, kind):
    values = RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    data = saved(Image.fromarray(values), kind)
    for share in (0.1, 0.5, 0.9, 0.97):
        with pytest.raises(ValueError, match="cut off|damaged"):
            read(tmp_path, data[: int(share * len(data))], size=64)


def test_reasons(tmp_path):
    halves = tiff(np.zeros((4, 4, 3), np.float16), 2)
    for data, words in (
        (b"", "empty"),
        (b"<!DOCTYPE html>", "DOCTYPE"),
        (b"\0\0\0\x18ftypheix\0\0\0\0", "pillow-heif|HEIF"),
        (halves, "TIFF.*pixel mode"),
        (png(np.zeros((4, 4, 1), np.uint8), 9), "PNG|damaged"),
    ):
        with pytest.raises(ValueError, match=words) as raised:
            read(tmp_path, data)
        assert "\n" not in str(raised.value)


def test_a_huge_jpeg_is_unpacked_in_part(tmp_path, monkeypatch):
    values = np.kron(RNG.integers(0, 255, (2, 4, 3)), np.ones((256, 256, 1))).astype(np.uint8)
    data = saved(Image.fromarray(values), "JPEG")
    whole = pixels(tmp_path, data, size=8)
    monkeypatch.setattr(picture_files, "MOST_PIXELS", 64 * 128)
    assert abs(pixels(tmp_path, data, size=8).astype(int) - whole).max() <= 12
    assert picture_size(tmp_path / "picture") == (512, 1024)
    with pytest.raises(ValueError, match="pixels"):
        read(tmp_path, data, size=400)


def png_filtered(values, colour, filters, depth=8, chunks=()):
    """A PNG file whose rows have these filters in turn, from the specification."""
    unit = max(depth * values.shape[-1] // 8, 1)
    rows = values.astype(values.dtype.newbyteorder(">")).reshape(len(values), -1).view(np.uint8).astype(int)
    left, above = np.pad(rows, ((0, 0), (unit, 0)))[:, :-unit], np.pad(rows, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(above, ((0, 0), (unit, 0)))[:, :-unit]
    estimate = left + above - corner
    distances = np.stack([abs(estimate - other) for other in (left, above, corner)])
    paeth = np.take_along_axis(np.stack([left, above, corner]), distances.argmin(0)[None], 0)[0]
    predicted = np.stack([0 * rows, left, above, (left + above) // 2, paeth])
    kinds = np.resize(filters, len(rows))
    filtered = (rows - predicted[kinds, np.arange(len(rows))]) % 256
    plain = png(values, colour, depth, chunks)
    content = np.concatenate([kinds[:, None], filtered], 1).astype(np.uint8).tobytes()
    packed, at = zlib.compress(content), plain.index(b"IDAT") - 4

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    half = len(packed) // 2  # in two chunks
    return plain[:at] + chunk(b"IDAT", packed[:half]) + chunk(b"IDAT", packed[half:]) + chunk(b"IEND", b"")


@pytest.fixture
def in_pieces(monkeypatch):
    """Read all pictures in pieces, of a few rows."""
    monkeypatch.setattr(picture_files, "MOST_PIXELS", 100)
    monkeypatch.setattr(huge_pictures, "PIECE_PIXELS", 150)
    monkeypatch.setattr(huge_pictures, "BLOCK", 77)


def averages(values, step):
    """Means over squares, rounded."""
    height, width, channels = values.shape
    height, width = height // step * step, width // step * step
    squares = values[:height, :width].reshape(height // step, step, width // step, step, channels)
    return np.floor(squares.astype(np.float64).mean((1, 3)) + 0.5)


@pytest.mark.parametrize(
    "channels, colour, dtype",
    [(1, 0, np.uint8), (3, 2, np.uint8), (2, 4, np.uint8), (4, 6, np.uint8)]
    + [(1, 0, np.uint16), (3, 2, np.uint16), (2, 4, np.uint16), (4, 6, np.uint16)],
)
def test_a_huge_png_is_read_in_bands(tmp_path, in_pieces, channels, colour, dtype):
    values = RNG.integers(0, np.iinfo(dtype).max, (32, 48, channels)).astype(dtype)
    if channels in (2, 4):
        values[..., -1] = np.iinfo(dtype).max
    shown = (values[..., : 3 if channels > 2 else 1] >> 8 * (values.itemsize - 1))[:, 8:40]
    data = png_filtered(values, colour, [0, 1, 2, 3, 4, 4, 3, 2], 8 * values.itemsize)
    np.testing.assert_array_equal(pixels(tmp_path, data, shown.shape[-1], 32), shown)
    with pytest.raises(ValueError, match="cut off|damaged"):
        read(tmp_path, data[: len(data) * 2 // 3], shown.shape[-1], 32)


def test_a_huge_png_of_12_bits_a_palette_or_one_bit(tmp_path, in_pieces):
    values = RNG.integers(0, 200, (32, 32, 3)).astype(np.uint16)
    values[30, 30] = 4095  # the depth is known from the last rows alone
    np.testing.assert_array_equal(pixels(tmp_path, png(values, 2), 3, 32), values >> 4)
    palette = RNG.integers(0, 256, (256, 3)).astype(np.uint8)
    indices = RNG.integers(0, 256, (32, 32, 1)).astype(np.uint8)
    data = png_filtered(indices, 3, [4], chunks=[(b"PLTE", palette.tobytes()), (b"tRNS", bytes([0]))])
    expected = palette[indices[..., 0]]
    expected[indices[..., 0] == 0] = 255
    np.testing.assert_array_equal(pixels(tmp_path, data, 3, 32), expected)
    bits = RNG.integers(0, 256, (32, 4, 1)).astype(np.uint8)
    np.testing.assert_array_equal(pixels(tmp_path, png(bits, 0, 1), 1, 32)[..., 0], np.unpackbits(bits[..., 0], 1) * 255)


@pytest.mark.parametrize("options", [{"rows": 5}, {"rows": 5, "deflate": True}, {"tile": 16}, {"tile": 16, "deflate": True}])
@pytest.mark.parametrize("order", "<>")
def test_a_huge_tiff_is_read_in_strips_or_tiles(tmp_path, in_pieces, options, order):
    for dtype, channels in ((np.uint8, 1), (np.uint8, 3), (np.uint16, 3)):
        values = RNG.integers(0, np.iinfo(dtype).max, (32, 50, channels)).astype(dtype)
        shown = values[:, 9:41] >> 8 * (values.itemsize - 1)
        data = tiff(values, 1 if channels == 1 else 2, order, tags={274: [3]}, **options)
        np.testing.assert_array_equal(pixels(tmp_path, data, channels, 32), shown[::-1, ::-1])


def test_a_huge_tiff_without_some_of_its_strips_is_damaged(tmp_path, in_pieces):
    data = tiff(RNG.integers(0, 255, (32, 32, 1)).astype(np.uint8), 1, rows=8)
    at = data.index(struct.pack("<HHI", 278, 4, 1)) + 8
    with pytest.raises(ValueError, match="strips"):
        read(tmp_path, data[:at] + struct.pack("<I", 4) + data[at + 4 :], 1, 8)


@pytest.mark.parametrize("options", [{}, {"tile": 16, "deflate": True}])
def test_a_huge_picture_is_averaged(tmp_path, in_pieces, options):
    values = RNG.integers(0, 256, (50, 70, 3)).astype(np.uint8)
    (tmp_path / "picture").write_bytes(tiff(values, 2, **options) if options else png(values, 2))

    def piece(data, depth):
        return picture_files._piece(data, 3, "white", depth)

    with open_picture(tmp_path / "picture") as file:
        np.testing.assert_array_equal(huge_pictures.read_in_pieces(file, 12, piece, None)[0], averages(values, 4))
