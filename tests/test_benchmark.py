"""The benchmark counts, judges and refuses as it says; its figures are for a quiet machine, not for tests."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import mindspore

from benchmarks import speed as benchmark
from ms_diffusion.models.mlp import MLPConfig, ResidualMLPConfig
from ms_diffusion.process import DiffusionConfig
from ms_diffusion.training.presets import PRESETS


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "ms_diffusion.benchmark", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**benchmark.os.environ, "PYTHONPATH": str(Path(benchmark.__file__).parents[1])},
    )


@pytest.mark.parametrize("name", [name for name in benchmark.PRESET_NAMES if not PRESETS[name].is_points])
def test_operations_are_those_that_pytorch_counts(name):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.torch_peer import Unet

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


@pytest.mark.parametrize("peer", ["none", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_short_run_of_points(peer, tmp_path):
    if peer == "torch":
        pytest.importorskip("torch")
    presets = ["scurve-seed"] if peer == "none" else ["scurve", "scurve-seed"]
    arguments = ["--presets", *presets, *"--rounds 1 --json out.json --device cpu --peer".split(), peer]
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert [record["preset"] for record in records] == presets
    for record in records:
        batch_size, seconds = PRESETS[record["preset"]].train.batch_size, record["epoch"]["seconds"]
        assert record["batch_size"] == batch_size
        assert set(seconds) == ({"mindspore"} if peer == "none" else {"mindspore", "torch"})
        assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in seconds.values())
        ours = seconds["mindspore"][0]
        line = f"{record['preset']}: an epoch of 10000 points, batch {batch_size}: {ours * 1e3:.1f} ms, "
        assert line + f"{ours / math.ceil(10000 / batch_size) * 1e6:.0f} us a step\n" in result.stdout
        if peer == "none":
            assert record["epoch"]["ratio"] is None and "PyTorch" not in result.stdout
        else:
            assert record["epoch"]["ratio"] == [pytest.approx(seconds["torch"][0] / ours), 0]
            assert f"{seconds['torch'][0] / ours:.2f}x PyTorch's speed" in result.stdout


@pytest.mark.parametrize("model", [MLPConfig(8, 60), ResidualMLPConfig(8, 1, 1, 60)], ids=["MLP", "residual"])
def test_an_epoch_of_points(model):
    """Of 300 in batches of 128, the last of them filled up: each point once, and then anew."""
    work = benchmark.PointsWork(asdict(model), 300, 128)
    seen = []

    def train_steps(x, t, noise, run=work.train_steps):
        seen.append(x.asnumpy())
        assert x.shape == noise.shape == (3, 128, 2) and t.shape == (3, 128) and t.dtype == mindspore.int32
        assert 0 <= t.asnumpy().min() and t.asnumpy().max() < 60 and abs(x.asnumpy()).max() <= 1
        return run(x, t, noise)

    work.train_steps = train_steps
    losses = [work.epoch() for _ in range(4)]
    assert np.isfinite(losses).all() and len(set(losses)) == 4
    assert [len(np.unique(x.reshape(-1, 2), axis=0)) for x in seen] == [300] * 4
    assert (seen[0] != seen[1]).any()


@pytest.mark.parametrize("model", [MLPConfig(8, 60), ResidualMLPConfig(8, 1, 1, 60)], ids=["MLP", "residual"])
def test_peer_learns_points(model):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_peer

    work = torch_peer.PointsWork(asdict(model), 300, 128)
    before, rows = [p.detach().clone() for p in work.net.parameters()], []
    work.net.register_forward_hook(lambda net, inputs, output: rows.append(len(output)))
    assert np.isfinite([work.epoch(), work.epoch()]).all() and rows == [128, 128, 44] * 2
    changed = zip(work.net.parameters(), work.ema.parameters(), before, strict=True)
    assert all((p != q).any() and (e != q).any() and (e != p).any() for p, e, q in changed)
    process = DiffusionConfig(60, "sigmoid").build()
    np.testing.assert_allclose(work.alphas_cumprod[:, 0].numpy(), process.alphas_cumprod, atol=0.03)
    assert torch.equal(work.points.clamp(-1, 1), work.points)


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
    from benchmarks import torch_peer

    model = asdict(PRESETS["quick"].model)
    peer, ours = torch_peer.Work(model, 8, 2, "CPU"), benchmark.Work(model, 8, 2)
    assert peer.sample(3).shape == ours.sample(3).shape == (2, 1, 8, 8)
    assert peer.forward().shape == ours.forward().shape
    assert np.isfinite([peer.step(), ours.step()]).all() and torch.isfinite(peer.sample(3)).all()
    before = [p.detach().clone() for p in peer.net.parameters()]
    peer.step()
    assert all((p != q).any() for p, q in zip(peer.net.parameters(), before, strict=True))
