"""Changed files end in a valid result or in one line. `python -m tests.fuzz --cases 100000` makes more of them."""

import contextlib
import io

import pytest

from tests import fuzz

NAMES = sorted(fuzz.READERS.keys() - {"faulty"})


@pytest.mark.parametrize("name", NAMES)
def test_good_files_are_read(name):
    for files in fuzz.READERS[name].samples():
        assert fuzz.run_case(name, files) is None


@pytest.mark.parametrize("path", sorted(fuzz.SEEDS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_files_that_once_broke_something(path):
    assert fuzz.run_case(path.parent.name, fuzz.load_seed(path)) is None


@pytest.mark.parametrize("name", NAMES)
def test_changed_files(name):
    """Some of the cases, in this process."""
    for case in range(8 if name in ("run", "lock") else 30):
        assert fuzz.run_case(name, fuzz.files_of(name, 0, case)) is None, f"{name}, case {case}"


@pytest.mark.slow
def test_a_reader_that_hangs_dies_or_takes_memory_is_noticed(tmp_path, monkeypatch):
    """And the cases after it still run."""
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = fuzz.main(["--cases", "6", "--seed", "38", "--reader", "faulty", "--out", str(tmp_path)])
    assert code == 1
    lines = out.getvalue().splitlines()
    for word in ("takes more than", "ended with code -11", "MemoryError", "ValueError"):
        assert any(word in line for line in lines)
    assert len(list((tmp_path / "faulty").iterdir())) == len(lines) - 1 and f": {len(lines) - 1} fail" in lines[-1]
