"""Stable Diffusion in a folder of diffusers, as a run: against diffusers itself, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image
from pipelines import write_pipeline
from runs import assert_refused, call, picture, succeed

from mindspore import Tensor

import ms_diffusion as md
from ms_diffusion.data.conditions import masked
from ms_diffusion.runtime import UserError
from ms_diffusion.samplers import noise_levels
from ms_diffusion.sampling import Sampling
from ms_diffusion.training.pipeline import PipelineTask, read_scheduler, read_unet
from ms_diffusion.training.tasks.base import Request
from ms_diffusion.training.text_encoder import Settings, load_text_encoder

PROMPT, NEGATIVE = "a photo of a cat", "red heart"
# Stable Diffusion 2: heads of one width in all levels, linear projections, GELU, v
SECOND = {
    "unet": {"attention_head_dim": [4, 8], "use_linear_projection": True},
    "text": {"hidden_act": "gelu", "num_hidden_layers": 1},
    "scheduler": {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "set_alpha_to_one": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "sd")


@pytest.fixture(scope="module")
def run(folder):
    return md.load(folder, device="cpu")


# The settings of the parts


def scheduler(tmp_path, **settings):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(settings))
    return read_scheduler(Settings(tmp_path / "scheduler_config.json"))


def test_a_scheduler(tmp_path):
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    process = scheduler(tmp_path, _class_name="PNDMScheduler", skip_prk_steps=True, **settings)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(process.betas, betas, rtol=1e-12)
    assert process.objective == "eps" and not process.clip_denoised
    timesteps = Sampling(steps=4).timesteps(process)
    assert timesteps == [751, 501, 251, 1]
    assert Sampling(steps=4, spacing="trailing").timesteps(process) == [999, 749, 499, 249]
    assert Sampling(steps=4, sampler="dpmpp_2m").timesteps(process)[0] == 999  # which has a spacing of its own
    assert Sampling(steps=1000).timesteps(process)[0] == 999
    known = []
    x = np.ones((1, 1, 2, 2))
    md.sample_ddim(lambda x, t: x, x, process, [1], callback=lambda i, x, x_start: known.append(x))
    first, last = np.cumprod(1 - betas)[[1, 0]]  # x_0 = x here, and the last step does not lead to data
    kept = np.sqrt((1 - last) / (1 - first))
    np.testing.assert_allclose(known[0], np.sqrt(last) + kept * (1 - np.sqrt(first)), rtol=1e-12)
    assert noise_levels(process, [1]) == [(0, 1, (np.sqrt(first), np.sqrt(1 - first)), (1, 0))]


def test_the_defaults_of_schedulers(tmp_path):
    ddim = scheduler(tmp_path)
    assert (ddim.spacing, ddim.steps_offset, ddim.last_level, ddim.clip_denoised) == ("leading", 0, (1, 0), True)
    euler = scheduler(tmp_path, _class_name="EulerDiscreteScheduler", prediction_type="v_prediction")
    assert (euler.spacing, euler.objective, euler.clip_denoised) == ("linspace", "v", False)
    zero = scheduler(tmp_path, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert zero.alphas_cumprod[-1] == 0
    assert scheduler(tmp_path, trained_betas=[0.5] * 20).num_timesteps == 20
    cosine = scheduler(tmp_path, beta_schedule="squaredcos_cap_v2", num_train_timesteps=50)
    np.testing.assert_allclose(cosine.betas, md.cosine_beta_schedule(50))


def test_the_network_of_stable_diffusion(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"cross_attention_dim": 768, "sample_size": 64}))
    config = read_unet(Settings(tmp_path / "config.json"), 4, 64)
    assert (config.model_channels, config.channel_mult, config.num_res_blocks) == (320, (1, 2, 4, 4), 2)
    assert (config.attention_resolutions, config.num_heads, config.context_dim) == ((1, 2, 4), 8, 768)
    second = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]}
    (tmp_path / "config.json").write_text(json.dumps(second))
    config = read_unet(Settings(tmp_path / "config.json"), 4, 96)
    assert (config.num_heads, config.num_head_channels, config.latent_size) == (None, 64, 96)


REFUSED = [
    ("unet/config.json", {"addition_embed_type": "text"}),
    ("unet/config.json", {"attention_head_dim": [1, 1, 2]}),
    ("unet/config.json", {"block_out_channels": [8, 12]}),
    ("unet/config.json", {"block_out_channels": []}),
    ("unet/config.json", {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}),
    ("unet/config.json", {"layers_per_block": [1, 2]}),
    ("unet/config.json", {"in_channels": "4"}),
    ("unet/config.json", {"in_channels": 8}),
    ("vae/config.json", {"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]}),
    ("vae/config.json", {"scaling_factor": 0}),
    ("vae/config.json", {"in_channels": 1}),
    ("scheduler/scheduler_config.json", {"beta_schedule": "mine"}),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}),
    ("scheduler/scheduler_config.json", {"beta_start": 2}),
    ("scheduler/scheduler_config.json", {"thresholding": True}),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}),
    ("scheduler/scheduler_config.json", {"timestep_spacing": "odd"}),
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}),
    ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}),
    ("model_index.json", {"unet": None}),
]


def spoil(folder, file, change):
    """The settings of a part with others; returns what undoes it."""
    path = folder / file
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | change) if isinstance(change, dict) else change)
    return lambda: path.write_text(before)


@pytest.mark.parametrize(("file", "change"), REFUSED + [("unet/config.json", "[1"), ("unet/config.json", "[]")])
def test_settings_that_are_refused(file, change, folder):
    undo = spoil(folder, file, change)
    try:
        with pytest.raises(UserError) as caught:
            PipelineTask(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    finally:
        undo()


def test_a_part_that_is_missing(folder, tmp_path):
    assert_refused(call("sample", folder, "--size", "10"), "--size is 10", "8")
    assert_refused(call("sample", folder, "--size", "16", "16", "16"), "--size")
    config = folder / "vae" / "config.json"
    config.rename(tmp_path / "config.json")
    try:
        assert_refused(call("sample", folder), "vae/config.json")
    finally:
        (tmp_path / "config.json").rename(config)
    assert_refused(call("sample", folder, "--ema-length", 0.1), "--ema-length")
    assert_refused(call("sample", "fashion-mnist-large", "--size", 64), "--size")


TEXTS_REFUSED = [
    ({"hidden_size": 15}, "hidden_size is 15"),
    ({"hidden_act": "relu"}, "hidden_act"),
    ({"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    ({"vocab_size": 3}, "more tokens"),
    ({"num_attention_heads": 5}, "heads"),
    ({"num_hidden_layers": 3}, "weights"),
]


@pytest.mark.parametrize(("text", "words"), TEXTS_REFUSED)
def test_text_encoders_that_are_refused(text, words, folder):
    undo = spoil(folder, "text_encoder/config.json", text)
    try:
        with pytest.raises(UserError, match=words):
            load_text_encoder(folder, 12)
    finally:
        undo()


# Pictures


def test_the_command(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr("ms_diffusion.commands.sample.load", lambda path, *_: run)  # which has its graphs
    out, options = tmp_path / "out.png", ("--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--steps", 2, "--seed", 3)
    assert "images in" in succeed("sample", folder, *options, "--device", "cpu", "--out", out)
    drawn = run.sample(prompt=PROMPT, negative_prompt=NEGATIVE, steps=2, seed=3)
    np.testing.assert_array_equal(picture(out)[0], drawn[0])  # one picture has no border, and is not enlarged
    assert drawn.shape == (1, 16, 16, 3)
    assert "images in" in succeed("sample", folder, "--steps", 2, "--device", "cpu", "--out", out)  # of the empty text
    for other in ({"negative_prompt": None}, {"seed": 4}, {"guidance": 3.0}, {"prompt": "wide"}, {"prompt": None}):
        assert (drawn != run.sample(**{"prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": 2, "seed": 3} | other)).any()
    with pytest.raises(UserError, match="--class"):
        run.sample(labels=1)
    with pytest.raises(UserError, match="--guidance"):
        run.sample(prompt=PROMPT, negative_prompt=NEGATIVE, guidance=1.0)


def test_the_text_encoder_runs_once_for_each_text(run, capsys):
    texts, known = run.task.labelling, dict(run.task.labelling.known)
    texts.known.clear()
    calls, graph = [], texts.graph
    texts.graph = lambda tokens: calls.append(tokens) or graph(tokens)
    try:
        for _ in range(2):
            run.sample(prompt=PROMPT, negative_prompt=NEGATIVE, steps=2)
        assert len(calls) == 2
        run.task.conditions(3, None, "word " * 50)
    finally:
        texts.graph = graph
        texts.known.update(known)
    assert "102 tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_sizes_and_samples_of_a_seed(folder, run):
    wide = md.load(folder, device="cpu", size=(16, 32)).sample(2, prompt=PROMPT, steps=2, seed=5)
    assert wide.shape == (2, 16, 32, 3)
    three, two = [run.sample(n, prompt=PROMPT, steps=3, seed=5) for n in (3, 2)]
    np.testing.assert_array_equal(three[:2], two)
    assert (three[0] != three[1]).any()


@pytest.mark.slow
def test_edits(run, tmp_path):
    """What is written is the result alone, and what a mask keeps is as it was."""
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    first, second, out = *map(str, paths), tmp_path / "out.png"

    def drawn(**edit):
        request = Request(sampling=Sampling(steps=3), out=str(out), **edit)
        assert run.task.render(run, request, tmp_path) == [out]
        return picture(out)[0].astype(int)

    original = picture(paths[0])[0].astype(int)
    inpainted = drawn(inpaint=("left", first), prompt=PROMPT)
    assert inpainted.shape == (16, 16, 3)
    np.testing.assert_array_equal(inpainted[:, 8:], original[:, 8:])
    assert abs(inpainted - original)[:, :8].mean() > 10
    assert drawn(init=first, prompt=PROMPT).shape == (16, 16, 3)
    assert drawn(interpolate=(first, second), num=2).shape == (20, 4 * 18 + 2, 3)
    with pytest.raises(UserError, match="without images"):
        drawn(init="test:0")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "shards"), [(np.float16, 1), (np.float32, 3), (np.float16, 2)])
def test_variants_and_shards(dtype, shards, run, tmp_path):
    other = md.load(write_pipeline(tmp_path / "sd", dtype=dtype, shards=shards), device="cpu")
    for a, b in ((run.net, other.net), (run.task.first_stage.net, other.task.first_stage.net)):
        for p, q in zip(a.get_parameters(), b.get_parameters(), strict=True):
            np.testing.assert_array_equal(p.asnumpy().astype(dtype).astype(np.float32), q.asnumpy())
    np.testing.assert_allclose(other.task.labelling.null, run.task.labelling.null, atol=0 if dtype == np.float32 else 5e-3)


# Against diffusers

of_diffusers = pytest.mark.filterwarnings("default")  # it warns as it is imported


def peer_of(folder, kind="StableDiffusionPipeline"):
    """The pipeline of diffusers in a folder."""
    pytest.importorskip("torch"), pytest.importorskip("transformers")
    peer = getattr(pytest.importorskip("diffusers"), kind).from_pretrained(folder)
    peer.set_progress_bar_config(disable=True)
    return peer


def same_pictures(run, folder, steps=4, guidance=7.5, negative=NEGATIVE):
    import torch

    peer, rng = peer_of(folder), np.random.default_rng(0)
    latents = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": negative}
    options |= {"latents": torch.from_numpy(latents), "num_images_per_prompt": 2}
    theirs = [peer(PROMPT, output_type=kind, **options).images for kind in ("latent", "np")]
    sampling = Sampling(steps=steps, guidance=guidance).resolve(run.task)
    cond = run.task.in_order(run.task.conditions(2, None, PROMPT))
    null = None if guidance == 1 else run.task.negative(negative, sampling)
    ours = run.generator.draw(sampling, 2, cond, start=latents, null=null)
    assert abs(theirs[0].numpy()).max() > 1
    np.testing.assert_allclose(ours, theirs[0].numpy(), atol=1e-4 * abs(ours).max())
    made = run.task.to_output(run.task.decode(ours)).astype(int)
    assert abs(made - (theirs[1] * 255).round()).max() <= 1 and made.std() > 10


@of_diffusers
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"guidance": 1.0}, {"negative": None}, {"steps": 7}])
def test_pictures_of_stable_diffusion_1(options, run, folder):
    same_pictures(run, folder, **options)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Stable Diffusion 2, and its folder."""
    folder = write_pipeline(tmp_path_factory.mktemp("pipeline") / "sd", **SECOND)
    return md.load(folder, device="cpu"), folder


@of_diffusers
@pytest.mark.slow
def test_pictures_of_stable_diffusion_2(second):
    same_pictures(*second)


def pair():
    """A picture (1, 16, 16, 3) uint8, and the mask (1, 1, 16, 16) of what is painted of it."""
    picture, mask = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8), np.zeros((1, 1, 16, 16), np.float32)
    mask[..., 4:, :10] = 1
    return picture, mask


def edited(run, strength, mask=None):
    """A picture's latents with noise and without it again, but for what the mask keeps; the noise is PyTorch's of seed 0."""
    import torch

    generator = torch.Generator().manual_seed(0)
    _, noise = [torch.randn((1, 4, 8, 8), generator=generator).numpy() for _ in range(2)]  # the first is of the encoder
    mean = np.split(run.task.first_stage.moments(pair()[0]), 2, 1)[0] * run.task.first_stage.scale
    sampling = Sampling(steps=4).resolve(run.task)
    timesteps = [t for t in sampling.timesteps(run.diffusion) if t < strength * 1000]
    start = run.diffusion.q_sample(Tensor(mean), Tensor(np.int32(timesteps[:1])), Tensor(noise)).asnumpy()
    cond, denoise = run.task.class_conditions(1, None, PROMPT), run.generator.denoiser(sampling)
    if "cond_image" in run.task.cond_fields:
        cond["cond_image"] = run.task.encode_condition(masked(md.to_float(pair()[0]), 2 * mask - 1))
    elif mask is not None:
        denoise = md.inpaint(denoise, Tensor(mean), Tensor(1 - mask[..., ::2, ::2]))
    cond = run.task.in_order(cond)
    return run.generator.draw(sampling, 1, cond, start=start, timesteps=timesteps, denoise=denoise)


@of_diffusers
@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_image_to_image(version, run, folder, second):
    import torch

    run, folder = second if version == 2 else (run, folder)
    peer, generator = peer_of(folder, "StableDiffusionImg2ImgPipeline"), torch.Generator().manual_seed(0)
    picture = torch.from_numpy(pair()[0].transpose(0, 3, 1, 2) / np.float32(255))
    options = {"image": picture, "strength": 0.75, "num_inference_steps": 4, "generator": generator}
    theirs = peer(PROMPT, output_type="latent", **options).images.numpy()
    np.testing.assert_allclose(edited(run, 0.75), theirs, atol=1e-4 * abs(theirs).max())


@of_diffusers
@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(channels, second, tmp_path):
    """With any network, and with one that takes the mask and the masked picture."""
    import torch

    run, folder = second
    if channels == 9:
        folder = write_pipeline(tmp_path / "sd", unet={"in_channels": 9})
        run = md.load(folder, device="cpu")
    peer, generator = peer_of(folder, "StableDiffusionInpaintPipeline"), torch.Generator().manual_seed(0)
    picture, mask = pair()
    picture = torch.from_numpy(picture.transpose(0, 3, 1, 2) / np.float32(255))
    options = {"image": picture, "mask_image": torch.from_numpy(mask), "strength": 0.75, "height": 16, "width": 16}
    options |= {"num_inference_steps": 4, "generator": generator}
    theirs = peer(PROMPT, output_type="latent", **options).images.numpy()
    np.testing.assert_allclose(edited(run, 0.75, mask), theirs, atol=1e-4 * abs(theirs).max())


@of_diffusers
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"variant": "fp16"}, {"max_shard_size": "20KB"}, {"safe_serialization": False}])
def test_folders_that_diffusers_has_written(options, folder, tmp_path):
    import torch

    peer = peer_of(folder)
    peer.to(torch.float16 if "variant" in options else torch.float32).save_pretrained(tmp_path / "sd", **options)
    assert not (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    run = md.load(tmp_path / "sd", device="cpu")
    if "variant" in options:
        peer.to(torch.float32).save_pretrained(tmp_path / "half")
        same_pictures(run, tmp_path / "half")
    else:
        same_pictures(run, folder)
