"""Exported weights, loaded again: by this library, by diffusers, and under the names of CompVis latent-diffusion."""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from runs import PIXELS, assert_refused, call, succeed, untrained
from test_latent_runs import AUTOENCODER, LATENT, TEXT

from mindspore import Tensor

from ms_diffusion.convert import load_pretrained, load_torch_state_dict
from ms_diffusion.models.autoencoder import VQConfig
from ms_diffusion.runtime import UserError
from ms_diffusion.training.config import override
from ms_diffusion.training.loop import train
from ms_diffusion.training.runs import Run
from ms_diffusion.training.tasks.latents import resolve_first_stage

of_diffusers = pytest.mark.filterwarnings("default")  # it warns as it is imported
BARE = {"model.condition": "none", "model.num_classes": None, "model.context_dim": None}
BARE |= {"train.sample_guidance": 1.0, "train.sample_guidance_interval": None}
CONFIGS = {
    "class": LATENT,
    "text": TEXT,
    "none": override(LATENT, **BARE, **{"model.num_res_blocks": 2, "model.sines_first": True, "model.pad_right": True,
        "model.norm_eps": 0.01}),
    "adm": override(LATENT, **{"model.condition": "adm", "model.context_dim": None, "model.use_scale_shift_norm": True,
        "model.resblock_updown": True, "model.use_new_attention_order": True, "model.attention_resolutions": (1, 2),
        "model.num_head_channels": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained runs by name."""
    folder = tmp_path_factory.mktemp("runs")
    stage = untrained(folder / "autoencoder", AUTOENCODER, noise=0.05)

    def make(name):
        if name in ("autoencoder", "pixels"):
            return Run(stage if name == "autoencoder" else untrained(folder / name, PIXELS))
        home = folder / name
        if not home.exists():
            resolve_first_stage(replace(CONFIGS[name], first_stage=str(stage)), home)
            untrained(home, CONFIGS[name], step=70, noise=0.1, latent_scale=0.7)
        return Run(home)

    return make


def values(net):
    return {p.name: p.asnumpy() for p in net.get_parameters()}


def halved(net):
    for p in net.get_parameters():
        p.set_data(Tensor(np.full(p.shape, 0.5, np.float32)))
    return net


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


@pytest.mark.parametrize("file_format", [pytest.param("safetensors", marks=pytest.mark.slow), "compvis"])
@pytest.mark.parametrize("name", ["class", pytest.param("adm", marks=pytest.mark.slow)])
def test_we_load_what_we_write(name, file_format, runs, tmp_path):
    run, out = runs(name), tmp_path / "net.safetensors"
    succeed("export", run.home, "--format", file_format, "--out", out)
    expected, stage = values(run.net), run.task.first_stage.net
    for ema in (False, True) if file_format == "compvis" else (False,):
        report = load_pretrained(halved(run.task.build()[0]), out, ema=ema)
        assert len(report.loaded) == len(expected)
    again = halved(run.net)
    load_pretrained(again, out)
    assert_same(values(again), expected)
    expected = values(stage)
    of_stage = out if file_format == "compvis" else tmp_path / "net-autoencoder.safetensors"
    load_pretrained(halved(stage), of_stage)
    assert_same(values(stage), expected)


def test_the_state_dict_of_a_latent_diffusion(runs, tmp_path):
    run, out = runs("class"), tmp_path / "a.safetensors"
    assert "MB" in succeed("export", run.home, "--format", "compvis", "--out", out)
    state = safetensors.numpy.load_file(out)
    weights = {name: a for name, a in state.items() if name.startswith("model.")}
    ours = {name.removeprefix("unet.") for name in values(run.net) if name.startswith("unet.")}
    assert set(weights) == {f"model.diffusion_model.{name}" for name in ours}
    for name, a in weights.items():  # CompVis samples from its averages
        np.testing.assert_array_equal(state["model_ema." + name.removeprefix("model.").replace(".", "")], a)
    assert state["model_ema.num_updates"] == 70 and state["scale_factor"] == np.float32(0.7)
    np.testing.assert_allclose(state["alphas_cumprod"], run.diffusion.alphas_cumprod, rtol=1e-6)
    assert {"cond_stage_model.embedding.weight", "first_stage_model.quant_conv.weight", "betas"} < state.keys()
    succeed("export", run.home, "--format", "compvis", "--half", "--out", tmp_path / "half.safetensors")
    half = safetensors.numpy.load_file(tmp_path / "half.safetensors")
    assert {a.dtype for name, a in half.items() if name.startswith(("model.", "model_ema.d"))} >= {np.dtype(np.float16)}
    assert half["betas"].dtype == half["scale_factor"].dtype == half["model_ema.decay"].dtype == np.float32


def test_a_checkpoint_of_compvis(runs, tmp_path):
    torch = pytest.importorskip("torch")
    run = runs("autoencoder")
    succeed("export", run.home, "--format", "compvis", "--out", tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert_same({name: a.numpy() for name, a in state.items()}, values(run.net))
    assert_same(load_torch_state_dict(tmp_path / "a.ckpt"), values(run.net))


def assert_close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape and abs(ours.asnumpy() - theirs).max() < 1e-4 * abs(theirs).max()


@of_diffusers
def test_an_autoencoder_with_a_codebook_in_diffusers(tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    model = VQConfig(8, (1, 2), 1, (16,), channels=1, resolution=32, z_channels=3, embed_dim=2, groups=4, n_embed=40)
    run = Run(untrained(tmp_path / "run", replace(AUTOENCODER, model=model), noise=0.05))
    succeed("export", run.home, "--format", "diffusers", "--out", tmp_path / "vq")
    peer, info = diffusers.VQModel.from_pretrained(tmp_path / "vq", output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info.values())
    x, z = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((3, 1, 32, 32), (1, 2, 16, 16)))
    assert_close(run.net.encode(Tensor(x)), peer.encode(torch.from_numpy(x)).latents)
    assert_close(run.net.decode(Tensor(z)), peer.decode(torch.from_numpy(z)).sample)
    expected = values(run.net)
    load_pretrained(halved(run.net), tmp_path / "vq")
    assert_same(values(run.net), expected)


@of_diffusers
def test_the_autoencoder_in_diffusers(runs, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    run = runs("autoencoder")
    assert "AutoencoderKL" in succeed("export", run.home, "--format", "diffusers")
    folder = run.home / "export/diffusers"
    peer, info = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info.values())
    x, z = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((13, 1, 32, 32), (1, 2, 8, 8)))
    assert_close(run.net.encode(Tensor(x)), peer.encode(torch.from_numpy(x)).latent_dist.parameters)
    assert_close(run.net.decode(Tensor(z)), peer.decode(torch.from_numpy(z)).sample)
    expected = values(run.net)
    load_pretrained(halved(run.net), folder)
    assert_same(values(run.net), expected)


@of_diffusers
@pytest.mark.parametrize("name", CONFIGS)
def test_the_unet_in_diffusers(name, runs, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    run, folder = runs(name), tmp_path / "diffusers"
    succeed("export", run.home, "--format", "diffusers", "--out", folder)
    kind = json.loads((folder / "unet/config.json").read_text())["_class_name"]
    assert kind == ("UNet2DConditionModel" if name in ("class", "text") else "UNet2DModel")
    peer, info = getattr(diffusers, kind).from_pretrained(folder / "unet", output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info.values())
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((3, 2, 8, 8), np.float32), np.array([0, 500, 999], np.int32)
    y = {"class": [0, 5, 10], "adm": [0, 5, 10], "text": rng.integers(0, 5, (3, run.config.model.max_length))}.get(name)
    cond = [] if y is None else [Tensor(np.array(y, np.int32))]
    options = {}
    if run.net.cond_stage is not None:
        options["encoder_hidden_states"] = torch.from_numpy(run.net.cond_stage(*cond).asnumpy())
        assert len(load_torch_state_dict(folder / "cond_stage")) == len(run.net.cond_stage.trainable_params())
    if name == "adm":
        options["class_labels"] = torch.tensor(y)
    expected = peer(torch.from_numpy(x), torch.from_numpy(t), **options).sample
    assert_close(run.net(Tensor(x), Tensor(t), *cond), expected)
    weights = values(run.net)
    load_pretrained(halved(run.net), folder, partial=True)  # the condition's encoder has another name there
    changed = {name for name, a in values(run.net).items() if not np.array_equal(a, weights[name])}
    assert all(name.startswith("cond_stage.") for name in changed)


@pytest.mark.slow
@of_diffusers
def test_a_pipeline_of_diffusers_draws_the_same(runs, tmp_path):
    """LDMPipeline, from the same noise, in 10 steps of DDIM."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    run, folder = runs("none"), tmp_path / "diffusers"
    succeed("export", run.home, "--format", "diffusers", "--out", folder)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert type(pipeline).__name__ == "LDMPipeline"
    noise = np.stack([np.random.default_rng((3, i)).standard_normal((2, 8, 8), np.float32) for i in range(4)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{type(pipeline).__module__}.randn_tensor", lambda *args, **options: torch.from_numpy(noise))
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(4, num_inference_steps=10, output_type="np").images
    ours = run.sample(4, sampler="ddim", steps=10, seed=3, spacing="trailing", raw=True)
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), theirs.transpose(0, 3, 1, 2), atol=1e-4)


@pytest.mark.slow
def test_a_run_starts_from_a_folder_of_diffusers(runs, tmp_path):
    run, folder = runs("autoencoder"), tmp_path / "diffusers"
    succeed("export", run.home, "--format", "diffusers", "--half", "--out", folder)
    new = train(AUTOENCODER, tmp_path / "run", init_from=str(folder), total_steps=0)
    expected = {name: a.astype(np.float16).astype(np.float32) for name, a in values(run.net).items()}
    assert_same(values(new.net), expected)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="contains no weights"):
        train(AUTOENCODER, tmp_path / "other", init_from=str(folder), total_steps=0)
    assert not (tmp_path / "other/checkpoints").exists()


def test_what_cannot_be_written_so(runs, tmp_path):
    for file_format in ("compvis", "diffusers"):
        end = call("export", runs("pixels").home, "--format", file_format)
        assert_refused(end, "run of pixels", "safetensors")
    home = runs("class").home
    assert_refused(call("export", home, "--format", "compvis", "--out", tmp_path / "a.pt"), ".safetensors or .ckpt")
    assert_refused(call("export", home, "--half"), "--half")
    succeed("export", runs("pixels").home, "--format", "safetensors", "--half", "--out", tmp_path / "a.safetensors")
    assert {a.dtype for a in safetensors.numpy.load_file(tmp_path / "a.safetensors").values()} == {np.dtype(np.float16)}
    odd = untrained(tmp_path / "odd", override(AUTOENCODER, **{"model.tanh_out": True}))
    assert_refused(call("export", odd, "--format", "diffusers"), "tanh-out", "compvis")
