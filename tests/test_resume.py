"""A run that was killed and started again ends with the files of one that was not, byte for byte, for each kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from resume_job import KINDS, LAST
from runs import metrics, tree

JOB = Path(__file__).with_name("resume_job.py")


def differences(killed, straight):
    """Files of two runs that differ; metrics.jsonl by all but the speed."""
    a, b = (
        {path: content for path, content in tree(run).items() if path.name != "metrics.jsonl"} for run in (killed, straight)
    )
    found = [str(path) for path in a.keys() | b.keys() if a.get(path, "") != b.get(path, "")]
    return found + ["metrics.jsonl"] * (metrics(killed) != metrics(straight))


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    kinds = list(KINDS)
    shares = kinds[: kinds.index("autoencoder")], kinds[kinds.index("autoencoder") :]  # latents need the autoencoder
    jobs = [
        subprocess.Popen([sys.executable, JOB, tmp_path, *share], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for share in shares
    ]
    for job in jobs:
        _, err = job.communicate(timeout=1200)
        assert job.returncode == 0, err[-3000:].decode()
    for kind in kinds:
        killed, straight = tmp_path / "killed" / kind, tmp_path / "straight" / kind
        assert not differences(killed, straight), kind
        states = [json.loads(path.read_bytes()) for path in straight.glob("checkpoints/*/state.json")]
        assert max(state["step"] for state in states) == LAST and not any(state["unfinished"] for state in states)
        steps = [row["step"] for row in metrics(straight) if "loss" in row]
        assert steps == sorted(set(steps)) and len(steps) >= LAST // 3
        assert len(list(straight.glob("samples/step-*.png"))) == 3
    assert all("fid" in state for state in states) and not os.listdir(tmp_path / "killed" / "pixels" / "checkpoints")[2:]
