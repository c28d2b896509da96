"""Arrays in .npy and .npz files: what NumPy writes is read, and nothing else takes memory, runs code or gives numbers."""

import contextlib
import io
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_diffusion import files
from ms_diffusion.files import load_npy, load_npz
from ms_diffusion.runtime import UserError


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def npz(save=np.savez, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


TYPES = ["?", "i1", "u1", "<i2", ">u4", "<i8", "<f2", "<f4", ">f8", "<c8", "longdouble"]


@given(st.sampled_from(TYPES), st.lists(st.integers(0, 4), max_size=4), st.sampled_from("CF"), st.booleans())
def test_what_numpy_writes_is_read(dtype, shape, order, compressed):
    array = np.asarray(np.random.default_rng(0).integers(-9, 9, shape).astype(dtype), order=order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns of version 3
        contents = [npy(array, version=version) for version in (None, (1, 0), (2, 0), (3, 0))]
    archive = npz(np.savez_compressed if compressed else np.savez, a=array, other=np.zeros(3))
    for found in [*(load_npy(io.BytesIO(content)) for content in contents), load_npz(io.BytesIO(archive), ["a", "b"])["a"]]:
        assert found.dtype == array.dtype and found.flags.writeable
        np.testing.assert_array_equal(found, array)


def test_only_the_named_arrays_are_read(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.arange(3), objects=np.array([None], object))
    assert load_npz(tmp_path / "x.npz", ["a", "b"])["a"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="plain numbers"):
        load_npz(tmp_path / "x.npz", ["objects"])
    with pytest.raises(FileNotFoundError):
        load_npz(tmp_path / "none.npz", ["a"])
    with pytest.raises(IsADirectoryError):
        load_npy(tmp_path)


GOOD = npy(np.arange(20.0).reshape(10, 2))


def with_header(text, data=b"\0" * 8):
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode() + data


def header(shape, descr="<f8"):
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        GOOD[:-1],
        GOOD + b"\0",
        GOOD[:50],
        b"\x93NUMPY\4" + GOOD[7:],
        npz(a=np.zeros(3)),
        npy(np.array([None], object)),
        npy(np.array(["text"])),
        npy(np.zeros(3, "M8[s]")),
        npy(np.zeros(3, [("x", "f4")])),
        with_header(header("(1" + ",1" * 99 + ")")),  # axes
        with_header(header(f"(0, {10**18}, {10**18})"), b""),
        with_header(header("(" + "9" * 400 + ",)")),
        with_header(header("(-1,)")),
        with_header(header("(1.0,)")),
        with_header(header("(1,)", "<f3")),
        with_header(header("(1,)", "<f99")),
        with_header(header("(1,)", "V8")),
        with_header("(" * 9000),
        b"\x93NUMPY\2\0\xff\xff\xff\xff" + GOOD[10:],
    ],
)
def test_damaged_arrays_are_refused(content):
    for read in (lambda: load_npy(io.BytesIO(content)), lambda: load_npz(io.BytesIO(zipped(content)), ["a"])):
        with pytest.raises(ValueError) as e:
            read()
        assert "\n" not in str(e.value)


def zipped(content, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("a.npy", content)
    return file.getvalue()


def test_damaged_archives_are_refused():
    """One changed byte anywhere in the content or the directory is noticed, or changes nothing."""
    whole = npz(np.savez_compressed, a=np.arange(30))
    refused = 0
    for i in range(len(whole)):
        for bit in (1, 128):
            changed = bytearray(whole)
            changed[i] ^= bit
            try:
                np.testing.assert_array_equal(load_npz(io.BytesIO(changed), ["a"]).get("a", np.arange(30)), np.arange(30))
            except (OSError, ValueError) as e:
                assert "\n" not in str(e)
                refused += 1
    assert refused > len(whole)


def test_a_small_file_takes_no_large_memory(monkeypatch):
    """Where the sizes in a file promise more than it has, or than there is memory, nothing is unpacked."""
    bomb = zipped(with_header(header("(100000000,)"), b"\0" * 8 * 10**6))
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="its size"):
        load_npz(io.BytesIO(bomb), ["a"])

    whole = npz(np.savez_compressed, a=np.zeros(10**6))
    monkeypatch.setattr(files, "available_memory", lambda: 7_999_999)
    with pytest.raises(UserError, match="memory"):
        load_npz(io.BytesIO(whole), ["a"])
    monkeypatch.setattr(files, "available_memory", lambda: 8_000_000)
    assert not load_npz(io.BytesIO(whole), ["a"])["a"].any()


def test_no_more_is_unpacked_than_an_archive_declares():
    """An archive that says 208 bytes, and would unpack to 100 MB."""
    declared = npy(np.arange(10.0))
    lie = bytearray(zipped(declared + bytes(10**8)))
    directory = lie.rfind(b"PK\1\2")
    lie[directory + 16 : directory + 20] = zlib.crc32(declared).to_bytes(4, "little")
    lie[directory + 24 : directory + 28] = len(declared).to_bytes(4, "little")
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        assert load_npz(io.BytesIO(lie), ["a"])["a"].tolist() == list(range(10))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 3e6
    with pytest.raises(ValueError, match="compressed"):  # Python unpacks this kind at once
        load_npz(io.BytesIO(zipped(declared, zipfile.ZIP_BZIP2)), ["a"])
