"""The benchmark counts, judges and refuses as documented; its figures need a quiet machine and are not tested."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from benchmarks import cost, speed, workers
from benchmarks.speed import count_operations
from ms_diffusion import __main__ as program
from ms_diffusion.commands import benchmark
from ms_diffusion.commands.benchmark import ImageWork, PointsWork
from ms_diffusion.models.mlp import MLPConfig, ResidualMLPConfig
from ms_diffusion.process import DiffusionConfig
from ms_diffusion.runtime import run_program
from ms_diffusion.training.presets import PRESETS

MODELS = pytest.mark.parametrize("model", [MLPConfig(8, 60), ResidualMLPConfig(8, 1, 1, 60)], ids=["MLP", "residual"])


@pytest.mark.parametrize("name", ["quick", "fashion-mnist", "fashion-mnist-resnet", "fashion-mnist-dit"])
def test_operations_are_those_that_pytorch_counts(name):
    pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import torch_work

    work = torch_work.ImageWork(asdict(PRESETS[name].model), 28, 1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted on the CPU
        work.forward()
    assert count_operations(PRESETS[name]) == counter.get_total_flops()


def test_verdict_is_the_median_ratio_or_none_when_the_rounds_disagree():
    assert workers.ratio({"mindspore": [1.0]}) is None and workers.verdict({"mindspore": [1.0]}) == ""
    steady = {"mindspore": [1.0, 2.0, 1.0], "PyTorch": [1.5, 3.0, 1.6]}
    assert workers.ratio(steady) == pytest.approx((1.5, 0.05 / 1.5))  # the quartiles are 1.5 and 1.55
    assert "1.50x the speed of PyTorch" in workers.verdict(steady)
    assert "no verdict" in workers.verdict({"mindspore": [1.0, 1.0, 1.0], "PyTorch": [1.0, 1.2, 1.5]})


def test_workers_are_timed_in_turns(monkeypatch):
    calls = []

    class Timer:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def time(self, *call):
            calls.append((self.name, *call))
            return self.seconds

    times = workers.alternate({"fast": Timer("fast", 0.5), "slow": Timer("slow", 2.0)}, 2, "sample", 3)
    assert times == {"fast": [0.5, 0.5], "slow": [2.0, 2.0]}
    one_round = ["fast"] * 3 + ["slow"]  # a long call needs no warm-up
    assert calls == [(name, "sample", 3) for name in ["fast", "slow", *one_round, *one_round]]


def test_cost_is_drawn(tmp_path):
    records = [
        {"varied": varied, varied: value, "step": 0.02 * value, "forward": 0.01 * value}
        for varied, values in cost.SWEEPS.items()
        for value in values
    ]
    cost.draw(records, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["none", "torch"])
def test_a_short_run(peer, tmp_path, capsys):
    """Of images and points."""
    if peer == "torch":
        pytest.importorskip("torch")
    arguments = "--presets quick scurve-seed --batch-sizes 2 --rounds 1 --sampling-steps 3 --device cpu --json"
    arguments = [*arguments.split(), str(tmp_path / "out.json"), "--peer", peer]
    assert run_program(speed.main, arguments) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "first step" in printed and "DDIM-3, 64 images" in printed and ("PyTorch" in printed) == (peer == "torch")
    images, points = json.loads((tmp_path / "out.json").read_text())["records"]
    names = {"mindspore", "PyTorch"} if peer == "torch" else {"mindspore"}
    for timed in (images["step"], images["forward"], images["ddim-3"], points["epoch"]):
        assert set(timed["seconds"]) == names
        assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in timed["seconds"].values())
        assert (timed["ratio"] is None) == (peer == "none")
    assert set(images["memory"]) == names and min(images["memory"].values()) > 50
    ms = points["epoch"]["seconds"]["mindspore"][0] * 1e3
    line = f"scurve-seed: an epoch of 10000 points, batch 128: {ms:.1f} ms, {ms / 79 * 1e3:.0f} us a step\n"
    assert line in printed


@pytest.mark.slow
def test_the_command_times_a_preset(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["quick"], model=replace(PRESETS["quick"].model, dim=8, init_dim=8)))
    arguments = "benchmark --presets tiny --batch-sizes 2 --rounds 1 --sampling-steps --device cpu".split()
    assert program.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tiny, batch 2: training step" in printed and "forward pass" in printed and "DDIM" not in printed


@pytest.mark.slow
def test_runs_are_timed_beside_each_other(tmp_path, capsys):
    runs = ["fashion-mnist-large", "fashion-mnist-large"]
    arguments = ["--runs", *runs[:1], "--sampling-steps", "2", "3", "--rounds", "1", "--json", str(tmp_path / "out.json")]
    assert run_program(benchmark.main, arguments) == 0, capsys.readouterr().err
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert [(r["run"], r["steps"], len(r["rounds"])) for r in records] == [(runs[0], 2, 1), (runs[0], 3, 1)]
    assert "1.00x the first's speed" in capsys.readouterr().out


def test_an_epoch_of_points():
    """Each epoch has other batches; all are full, so the last has points of its own."""
    config = replace(PRESETS["scurve"], data=replace(PRESETS["scurve"].data, num=300), model=ResidualMLPConfig(8, 1, 1))
    work, batches = PointsWork(config, 128), []
    advance = work.task.advance

    def watch(batch, step):
        batches.append(batch)
        return advance(batch, step)

    work.task.advance = watch
    losses = [work.epoch() for _ in range(3)]
    assert np.isfinite(losses).all() and len(set(losses)) == 3
    points = [batch["x_start"].reshape(-1, 2) for batch in batches]
    assert [len(np.unique(x, axis=0)) for x in points] == [384] * 3 and (points[0] != points[1]).any()


@MODELS
def test_peer_learns_points(model):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_work

    work = torch_work.PointsWork(asdict(model), 300, 128)
    before, rows = [p.detach().clone() for p in work.net.parameters()], []
    work.net.register_forward_hook(lambda net, inputs, output: rows.append(len(output)))
    assert np.isfinite([work.epoch(), work.epoch()]).all() and rows == [128, 128, 44] * 2
    changed = zip(work.net.parameters(), work.ema.parameters(), before, strict=True)
    assert all((p != q).any() and (e != q).any() and (e != p).any() for p, e, q in changed)
    process = DiffusionConfig(60, "sigmoid").build()
    np.testing.assert_allclose(work.alphas_cumprod[:, 0].numpy(), process.alphas_cumprod, atol=0.03)
    assert torch.equal(work.points.clamp(-1, 1), work.points)


def test_peer_samples_as_ours_do():
    torch = pytest.importorskip("torch")
    from benchmarks import torch_work

    config = replace(PRESETS["quick"], data=replace(PRESETS["quick"].data, size=8))
    peer, ours = torch_work.ImageWork(asdict(config.model), 8, 2), ImageWork(config, 2)
    assert peer.sample(3).shape == ours.sample(3).shape == (2, 1, 8, 8)
    assert peer.forward().shape == ours.forward().shape
    assert np.isfinite([peer.step(), ours.step()]).all() and torch.isfinite(peer.sample(3)).all()
    before = [p.detach().clone() for p in peer.net.parameters()]
    peer.step()
    assert all((p != q).any() for p, q in zip(peer.net.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rounds 0", "--rounds"),
        ("--batch-sizes 0", "--batch-sizes"),
        ("--json .", "directory"),
        ("--presets tiny", "--presets"),
        ("--presets latent --device cpu", "--presets latent"),
        ("--device tpu", "device"),
        ("--runs nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert program.main(["benchmark", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_failed_worker_is_reported(capfd):
    with (
        workers.Workers(broken=workers.Worker("builtins:int", "x")) as broken,
        pytest.raises(workers.UserError, match="step failed"),
    ):
        broken["broken"].time("step")
    assert "ValueError" in capfd.readouterr().err
