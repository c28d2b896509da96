"""Exported runs, sampled from by docs/sample_onnx.py, against the library's own samples of the same noise."""

import importlib
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from runs import PIXELS, UNET, assert_refused, call, succeed, untrained
from test_latent_runs import AUTOENCODER, LATENT, TEXT

import mindspore as ms
from mindspore import Tensor, nn, ops

from ms_diffusion import kernels, mindir
from ms_diffusion.models.autoencoder import AutoencoderConfig, VQConfig
from ms_diffusion.models.dit import DiTConfig
from ms_diffusion.models.mlp import MLPConfig, ResidualMLPConfig
from ms_diffusion.models.unet_ldm import UNetModelConfig
from ms_diffusion.process import DiffusionConfig
from ms_diffusion.runtime import UserError
from ms_diffusion.training.config import override
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.runs import Run
from ms_diffusion.training.tasks.latents import resolve_first_stage


class MindIRSession:
    """onnxruntime's InferenceSession, for a MindIR: the inputs by their order."""

    def __init__(self, file):
        self.graph = nn.GraphCell(ms.load(str(file)))

    def run(self, _, feed):
        return [self.graph(*map(Tensor, feed.values())).asnumpy()]


def exported(run, folder, monkeypatch, file_format, **options):
    """What docs/sample_onnx.py draws from the exported run, and the JSON."""
    if file_format == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    else:
        monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=MindIRSession))
    out = folder / f"net.{file_format}"
    succeed("export", run.home, "--format", file_format, "--out", out)
    monkeypatch.delitem(sys.modules, "docs.sample_onnx", raising=False)
    script = importlib.import_module("docs.sample_onnx")
    record = json.loads(out.with_suffix(".json").read_text())
    return script.sample(out.with_suffix(".json"), **options), record


def assert_same_samples(run, folder, monkeypatch, file_format, num=5, image=None, **options):
    ours, record = exported(run, folder, monkeypatch, file_format, num=num, steps=3, seed=4, image=image)
    theirs = run.sample(num, sampler="ddim", steps=3, seed=4, raw=True, **options)
    assert ours.shape == theirs.shape and np.ptp(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert record["format"] == file_format and record["kind"] == run.config.kind and record["step"] == run.step
    return record


@pytest.mark.parametrize(
    "file_format, preset, changes",
    [
        ("onnx", "scurve", {}),
        ("mindir", "scurve", {"model": MLPConfig(8, 1000)}),
        ("onnx", "scurve-flow", {}),
        ("mindir", "scurve-flow", {"diffusion": DiffusionConfig(schedule="edm", objective="v", sigma_data=0.7)}),
    ],
    ids=["eps", "mindir", "flow", "edm"],
)
def test_points(tmp_path, monkeypatch, file_format, preset, changes):
    points = 3 + 2 * np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    run = untrained(tmp_path / "run", replace(PRESETS[preset], **{"model": ResidualMLPConfig(8, 1)} | changes), noise=0.3)
    np.savez(run / "points.npz", train=points, test=points)
    record = assert_same_samples(Run(run), tmp_path, monkeypatch, file_format)
    assert record["shape"] == [2] and record["examples"] == {} and len(record["alphas"]) == 1000


FORMATS = pytest.mark.parametrize("file_format", ["onnx", "mindir"])


@pytest.mark.slow
@FORMATS
@pytest.mark.parametrize("objective", ["eps", "v"])
def test_images_with_an_image_condition(tmp_path, monkeypatch, file_format, objective):
    data, diffusion = replace(PIXELS.data, condition="lowres"), replace(PIXELS.diffusion, objective=objective)
    config = replace(PIXELS, data=data, diffusion=diffusion, model=replace(UNET, cond_channels=1, dim_mults=(1, 2)))
    run = Run(untrained(tmp_path / "run", config, noise=0.05))
    image = run.task.conditions(5, seed=4)["cond_image"]
    record = assert_same_samples(run, tmp_path, monkeypatch, file_format, image=image)
    assert record["condition"] == "lowres" and record["denoiser"]["inputs"][2]["shape"] == [1, 28, 28]


@pytest.mark.slow
@FORMATS
def test_images_with_classes_guidance_and_self_conditioning(tmp_path, monkeypatch, file_format):
    train = replace(PIXELS.train, sample_guidance=2.0, sample_guidance_interval=(10, 600))
    config = replace(PIXELS, model=replace(UNET, num_classes=10, self_condition=True), train=train)
    run = Run(untrained(tmp_path / "run", config, noise=0.05))
    record = assert_same_samples(run, tmp_path, monkeypatch, file_format, num=11)
    assert record["examples"] == {"labels": list(range(10))} and record["null"] == 10 and record["guidance"] == 2
    assert record["class_names"][9] == "ankle boot" and record["denoiser"]["inputs"][-1]["name"] == "x_start"


@pytest.mark.slow
@FORMATS
def test_a_transformer(tmp_path, monkeypatch, file_format):
    model = DiTConfig(hidden_size=16, depth=2, num_heads=2, patch_size=7, num_classes=10)
    run = Run(untrained(tmp_path / "run", replace(PIXELS, model=model), noise=0.05))
    assert_same_samples(run, tmp_path, monkeypatch, file_format)


@pytest.mark.slow
@pytest.mark.parametrize("config", [LATENT, TEXT], ids=["class", "text"])
@FORMATS
def test_latents_and_their_autoencoder(tmp_path, monkeypatch, file_format, config):
    stage, folder = untrained(tmp_path / "autoencoder", AUTOENCODER, noise=0.05), tmp_path / "run"
    resolve_first_stage(replace(config, first_stage=str(stage)), folder)
    run = Run(untrained(folder, config, noise=0.1, latent_scale=0.7))
    record = assert_same_samples(run, tmp_path, monkeypatch, file_format)
    assert record["latent_scale"] == 0.7 and record["decoder"]["file"] == f"net-decoder.{file_format}"
    assert ("tokenizer" in record) == (config is TEXT)
    patches = untrained(folder, replace(config, first_stage_patch=16), noise=0.1, latent_scale=0.7)
    assert_refused(call("export", patches, "--format", file_format, "--out", tmp_path / f"p.{file_format}"), "patch")

    if file_format == "onnx":
        import onnxruntime

        succeed("export", stage, "--out", tmp_path / "stage.onnx")
        part, x = json.loads((tmp_path / "stage.json").read_text())["encoder"], np.float32(np.random.rand(3, 1, 32, 32))
        (ours,) = onnxruntime.InferenceSession(tmp_path / part["file"]).run(None, {part["inputs"][0]["name"]: x})
        np.testing.assert_allclose(ours, Run(stage).net.encode(Tensor(x)).asnumpy(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        UNetModelConfig(2, 8, 2, 1, (2,), channel_mult=(1, 2), num_heads=2, groups=4, conv_resample=False),
        UNetModelConfig(2, 8, 2, 1, (1,), channel_mult=(1, 2), num_head_channels=4, groups=4, use_scale_shift_norm=True,
            resblock_updown=True, use_new_attention_order=True),
        AutoencoderConfig(8, (1, 2), 1, (8,), channels=2, resolution=8, groups=4, attention="linear", tanh_out=True),
        VQConfig(8, (1, 2), 1, channels=2, resolution=8, groups=4, n_embed=11),
    ],
)  # fmt: skip
def test_every_option_of_the_networks_as_onnx(config):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    with kernels.disabled():
        net = config.build(0).set_train(False)
    rng = np.random.default_rng(0)
    for p in net.get_parameters():
        p.set_data(Tensor(rng.normal(0, 0.2, p.shape).astype(np.float32)))
    inputs = [("x", (2, 8, 8), "float32"), *[("t", (), "int32")] * isinstance(config, UNetModelConfig)]
    arrays = {"x": rng.standard_normal((3, 2, 8, 8), np.float32), "t": np.array([1, 500, 999], np.int32)}
    feed = {name: arrays[name] for name, *_ in inputs}
    net = net if len(inputs) == 2 else Reconstruction(net)
    (ours,) = runtime.InferenceSession(mindir.to_onnx(net, inputs, "y")).run(None, feed)
    np.testing.assert_allclose(ours, net(*map(Tensor, feed.values())).asnumpy(), atol=1e-4)


class Reconstruction(nn.Cell):
    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, x):
        return self.net(x)[0]


class Cumulated(nn.Cell):
    def construct(self, x):
        return ops.cumsum(x, 1)


def test_an_operator_without_a_rule():
    pytest.importorskip("onnx")
    with pytest.raises(UserError, match="CumSum.*mindir"):
        mindir.to_onnx(Cumulated(), [("x", (2,), "float32")], "y")


def test_layers_use_the_kernels_again_after_the_block():
    before = kernels.available()
    with kernels.disabled():
        assert not kernels.available()
    assert kernels.available() == before


def test_bad_input(tmp_path, monkeypatch):
    config = override(PRESETS["scurve"], **{"model.dim": 8, "model.depth": 1})
    run = untrained(tmp_path / "run", config)
    points = np.eye(2, dtype=np.float32)
    np.savez(run / "points.npz", train=points, test=points)
    assert_refused(call("export", run, "--out", tmp_path / "net.mindir"), "--out", ".onnx")
    assert_refused(call("export", tmp_path / "nothing"), "nothing")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert_refused(call("export", run), "ms_diffusion[export]", "mindir")
