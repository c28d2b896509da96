"""A process that is killed, or whose disk is full or fails, at any change of a file leaves the old state or the new one, and
the next process goes on from there. `faults/driver.py` has the cases."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("faults")
COMPILER = shutil.which(os.environ.get("CC", "cc"))
pytestmark = pytest.mark.skipif(not COMPILER or sys.platform != "linux", reason="needs a C compiler and Linux")


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    path = tmp_path_factory.mktemp("shim") / "shim.so"
    options = ["-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *options, "-o", path, FAULTS / "shim.c", "-ldl"], check=True)
    return path


def run(shim, tmp_path, *flags):
    """The record of all cases."""
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "tests.faults.driver", record, *flags]
    end = subprocess.run(
        command, cwd=FAULTS.parents[1], env=os.environ | {"LD_PRELOAD": str(shim)}, capture_output=True, text=True
    )
    assert end.returncode == 0, end.stdout + end.stderr
    return json.loads(record.read_text())


def check(record):
    problems = [problem for case in record.values() for problem in case["problems"]]
    assert not problems, "\n".join([f"{len(problems)} problems", *problems[:3]])
    assert all(case["points"] for case in record.values())


def test_every_change_of_a_file_can_be_the_last(shim, tmp_path):
    check(run(shim, tmp_path))


@pytest.mark.slow
def test_every_fault_at_every_change(shim, tmp_path):
    record = run(shim, tmp_path, "--all")
    check(record)
    points, faults = (sum(case[what] for case in record.values()) for what in ("points", "faults"))
    print(f"{points} changes of {len(record)} cases, {faults} faults")
    assert points > 300
