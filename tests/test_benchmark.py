"""The benchmark counts, judges and refuses as it says; its figures are for a quiet machine, not for tests."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from ms_diffusion import benchmark
from ms_diffusion.presets import PRESETS


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "ms_diffusion.benchmark", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**benchmark.os.environ, "PYTHONPATH": str(Path(benchmark.__file__).parents[1])},
    )


@pytest.mark.parametrize("name", benchmark.PRESET_NAMES)
def test_operations_are_those_that_pytorch_counts(name):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from ms_diffusion.torch_peer import Unet

    model = asdict(PRESETS[name].model)
    with FlopCounterMode(display=False) as counter:
        Unet(**model)(torch.zeros(1, 1, 28, 28), torch.zeros(1))
    assert benchmark.count_operations(model, 28) == counter.get_total_flops()


def test_verdict_is_the_median_ratio_or_none_when_the_rounds_disagree():
    assert benchmark.verdict(benchmark.ratio({"mindspore": [1.0]})) == ""
    steady = benchmark.ratio({"mindspore": [1.0, 2.0, 1.0], "torch": [1.5, 3.0, 1.6]})
    assert steady == pytest.approx((1.5, 0.05 / 1.5))  # the quartiles are 1.5 and 1.55
    assert "1.50x PyTorch's speed" in benchmark.verdict(steady)
    assert "no verdict" in benchmark.verdict(benchmark.ratio({"mindspore": [1.0, 1.0, 1.0], "torch": [1.0, 1.2, 1.5]}))


def test_cost_is_drawn(tmp_path):
    records = [
        {"varied": varied, varied: value, "step": 0.02 * value, "forward": 0.01 * value}
        for varied, values in benchmark.SWEEPS.items()
        for value in values
    ]
    benchmark.draw_cost(records, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("peer", ["none", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_short_run(peer, tmp_path):
    if peer == "torch":
        pytest.importorskip("torch")
    arguments = "--presets quick --batch-sizes 2 --rounds 2 --sampling-steps 3 --json out.json --device cpu --peer"
    result = run(*arguments.split(), peer, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "first step" in result.stdout and "DDIM-3, 64 images" in result.stdout
    (record,) = json.loads((tmp_path / "out.json").read_text())["records"]
    sides = {"mindspore"} if peer == "none" else {"mindspore", "torch"}
    for name in ("step", "forward", "ddim-3"):
        assert set(record[name]["seconds"]) == sides
        assert all(s > 0 for seconds in record[name]["seconds"].values() for s in seconds)
        assert (record[name]["ratio"] is None) == (peer == "none")
    assert set(record["memory"]) == sides and min(record["memory"].values()) > 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rounds 0", "--rounds"),
        ("--batch-sizes 0", "--batch-sizes"),
        ("--json nowhere/out.json", "no folder"),
        ("--presets tiny", "presets"),
        ("--device tpu", "device"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    result = run(*arguments.split(), cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_peer_samples_as_ours_do():
    torch = pytest.importorskip("torch")
    from ms_diffusion import torch_peer

    model = asdict(PRESETS["quick"].model)
    peer, ours = torch_peer.Work(model, 8, 2, "CPU"), benchmark.Work(model, 8, 2)
    assert peer.sample(3).shape == ours.sample(3).shape == (2, 1, 8, 8)
    assert peer.forward().shape == ours.forward().shape
    assert np.isfinite([peer.step(), ours.step()]).all() and torch.isfinite(peer.sample(3)).all()
    before = [p.detach().clone() for p in peer.net.parameters()]
    peer.step()
    assert all((p != q).any() for p, q in zip(peer.net.parameters(), before, strict=True))
