"""Latent diffusion as a user meets it: the autoencoder, its latents by class and by caption, and bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from test_cli import assert_refused, checkpoint, metrics, picture, tree
from test_cli_sample import call

from mindspore import Tensor

import sample
import train
from benchmarks import speed as benchmark
from ms_diffusion import likelihood
from ms_diffusion.commands import evaluate
from ms_diffusion.data.fashion_mnist import load_fashion_mnist_mini
from ms_diffusion.images import GAP, to_float
from ms_diffusion.latent import in_patches
from ms_diffusion.models.autoencoder import gaussian_sample
from ms_diffusion.models.lpips import LPIPS
from ms_diffusion.training.presets import PRESETS, first_stage_of, load_first_stage

STEPS = "--data.name fashion-mnist-mini --train.total-steps 4 --train.save-every 2 --train.log-every 1".split()
SHOWN = "--train.batch-size 8 --train.sample-num 4 --train.sample-steps 2".split()
AUTOENCODER = [
    *"--preset autoencoder --model.ch 8 --model.ch-mult 1 2 2 --model.groups 4 --train.disc-start 2".split(),
    *"--train.disc-channels 8 --train.disc-layers 1".split(),
    *STEPS,
    *SHOWN,
]
LATENT = [
    *"--model.model-channels 8 --model.groups 4 --model.num-head-channels 8 --model.num-res-blocks 1".split(),
    *"--model.attention-resolutions 2 --model.context-dim 8".split(),
    *"--train.lr 0.03 --train.warmup-steps 0 --train.ema-decay 0".split(),  # for classes to make a difference so soon
    *STEPS,
    *SHOWN,
]
IMAGES = np.pad(load_fashion_mnist_mini("train")[0], ((0, 0), (2, 2), (2, 2), (0, 0)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs; leave them as they are."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert call(train, "--run-dir", folder / "autoencoder", *AUTOENCODER)[0] == 0
        first = ["--first-stage", folder / "autoencoder"]
        for name in ("latent", "latent-text"):
            code, _, err = call(train, "--preset", name, "--run-dir", folder / name, *first, *LATENT)
            assert code == 0, err
        yield folder


def arrays(run, step, name):
    return safetensors.numpy.load_file(checkpoint(run, step) / f"{name}.safetensors")


def assert_same_run(a, b):
    for name in ("model", "ema", "optimizer"):
        ours, theirs = arrays(a, 4, name), arrays(b, 4, name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x | {"img_per_s": 0} == y | {"img_per_s": 0}


# The autoencoder


def test_an_autoencoders_run(runs):
    run = runs / "autoencoder"
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    assert ["disc_loss" in row for row in metrics(run)] == [False, False, True, True]
    assert picture(run / "samples/step-0000004.png")[1].std() > 10
    before, after = (arrays(run, step, "optimizer") for step in (2, 4))
    moved = [key for key in before if key.startswith("discriminator.") and not np.array_equal(before[key], after[key])]
    assert len(moved) > 5  # it trains from step 2
    assert all(np.isfinite(values).all() for values in after.values())


@pytest.mark.parametrize("name, args", [("autoencoder", AUTOENCODER), ("latent", ["--preset", "latent", *LATENT])])
def test_a_resumed_run_equals_an_uninterrupted_one(runs, tmp_path, name, args):
    run = shutil.copytree(runs / name, tmp_path / "run")
    shutil.rmtree(checkpoint(run, 4))
    code, out, err = call(train, "--run-dir", run, *args)
    assert code == 0 and "resuming at step 2 of 4" in out, err
    assert_same_run(run, runs / name)


def test_scores_of_reconstructions(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = "--num 150 --json x.json --out x.png".split()
    code, out, err = call(evaluate, runs / "autoencoder", *args)
    assert code == 0, err
    record = json.loads((tmp_path / "x.json").read_text())
    assert 3 < record["samples"]["psnr"] < 30 and 0 < record["samples"]["ssim"] < 1
    assert "PSNR" in out and "reconstructions of test images" in record["protocol"]


def test_a_run_begins_with_weights_from_elsewhere(runs, tmp_path):
    """Without a step they are a run already, and it is another's first stage; with steps it goes on from them."""
    weights, run = checkpoint(runs / "autoencoder", 4) / "ema.safetensors", tmp_path / "run"
    args = ["--run-dir", run, *AUTOENCODER, "--init-from", weights]
    code, out, err = call(train, *args, "--train.total-steps", 0)
    assert code == 0 and f"{weights}: 152 parameters loaded" in out, err
    ours, theirs = arrays(run, 0, "model"), safetensors.numpy.load_file(weights)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    code, out, err = call(train, *args)
    assert code == 0 and "parameters loaded" not in out, err
    assert any((arrays(run, 4, "model")[name] != theirs[name]).any() for name in theirs)
    other = [*args, "--run-dir", tmp_path / "other"]
    assert_refused(call(train, *other, "--init-ignore", "decoder."), "missing: decoder.")
    assert not (tmp_path / "other").exists()
    code, out, err = call(train, *other, "--init-ignore", "decoder.", "--init-partial", "--train.total-steps", 0)
    assert code == 0 and "left as they were: decoder." in out, err


@pytest.mark.slow
def test_the_references_sizes(tmp_path):
    """A step of autoencoder-kl-f8 with its discriminator and LPIPS, whose weights are random here: 83,653,863 parameters as
    Stable Diffusion's first stage has."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(tmp_path / f"images/{i}.png")
    lpips = LPIPS()
    vgg = {f"features.{p.name.split('.', 2)[2]}": p.asnumpy() for p in lpips.net.get_parameters()}
    safetensors.numpy.save_file(vgg, tmp_path / "vgg.safetensors")
    layers = {p.name: p.asnumpy() for p in lpips.get_parameters() if p.name.startswith("lin")}
    safetensors.numpy.save_file(layers, tmp_path / "lpips.safetensors")
    args = f"--preset autoencoder-kl-f8 --data.dir {tmp_path / 'images'} --run-dir {tmp_path / 'run'} --train.batch-size 1"
    args += f" --train.vgg {tmp_path / 'vgg.safetensors'} --train.lpips {tmp_path / 'lpips.safetensors'}"
    args += " --train.total-steps 1 --train.disc-start 0 --train.sample-num 1"
    code, _, err = call(train, *args.split())
    assert code == 0, err
    before, after = PRESETS["autoencoder-kl-f8"].model.build(0), arrays(tmp_path / "run", 1, "model")
    assert sum(values.size for values in after.values()) == 83_653_863
    still = {p.name for p in before.get_parameters() if (p.asnumpy() == after[p.name]).all()}
    assert still <= {f"{part}.mid.attn_1.k.bias" for part in ("encoder", "decoder")}  # which no softmax sees
    assert all(np.isfinite(values).all() for values in after.values())
    discriminator = [key for key in arrays(tmp_path / "run", 1, "optimizer") if key.startswith("discriminator.main.")]
    assert len(discriminator) > 10
    assert picture(tmp_path / "run/samples/step-0000001.png")[1].shape[:2] == (2 * (256 + 2 * GAP), 2 * (512 + 3 * GAP))


# The diffusion of latents


def test_a_run_of_latents_keeps_its_first_stage_and_scale(runs):
    run = runs / "latent"
    stage = first_stage_of(run)
    first = load_first_stage(runs / "autoencoder")
    for a, b in zip(stage.net.get_parameters(), first.net.get_parameters(), strict=True):
        np.testing.assert_array_equal(a.asnumpy(), b.asnumpy())
    moments = first.moments(IMAGES[:500])
    noise = np.random.default_rng(0).standard_normal((500, 2, 8, 8)).astype(np.float32)
    z = gaussian_sample(*map(Tensor, (moments, noise))).asnumpy()
    assert stage.scale * z.std() == pytest.approx(1, rel=0.1)
    assert picture(run / "samples/step-0000004.png")[1].std() > 0


def test_class_by_class(runs, tmp_path):
    out = ["--out", tmp_path / "x.png", "--npz", tmp_path / "x.npz", "--steps", 3]
    drawn = {}
    for label in (None, 3, 7):
        told = [] if label is None else ["--class", label]
        code, _, err = call(sample, runs / "latent", "--num", 10, *told, *out)
        assert code == 0, err
        with np.load(tmp_path / "x.npz") as file:
            drawn[label] = file["images"].astype(int)
    assert drawn[None].shape == (10, 32, 32, 1)
    for label in (3, 7):
        assert abs(drawn[label][label] - drawn[None][label]).max() <= 1
        assert abs(drawn[label] - drawn[None]).max() > 1


def test_prompts(runs, tmp_path):
    out = ["--num", 4, "--out", tmp_path / "x.png", "--npz", tmp_path / "x.npz", "--steps", 3, "--gif", tmp_path / "x.gif"]
    drawn = []
    for prompt in ("an ankle boot", "An ankle boot.", "a dress"):
        code, _, err = call(sample, runs / "latent-text", "--prompt", prompt, *out)
        assert code == 0, err
        drawn.append(np.load(tmp_path / "x.npz")["images"].astype(int))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    assert picture(tmp_path / "x.gif")[1].shape[0] > 60


def test_how_images_come_about(runs, tmp_path):
    """A row for each of the first 8 images; in the last column the image itself, since the last step goes to x_0."""
    row, out, npz = (tmp_path / name for name in ("row.png", "x.png", "x.npz"))
    args = ["--num", 10, "--steps", 6, "--denoise-row", row, "--out", out, "--npz", npz, "--guidance", 1]
    assert call(sample, runs / "latent", *args)[0] == 0
    grid, last = picture(row)[1][::2, ::2], np.load(npz)["images"][:8, ..., 0]
    side = 32 + GAP
    assert grid.shape == (GAP + 8 * side, GAP + 6 * side)
    for i in range(8):
        top, left = GAP + side * i, GAP + side * 5
        np.testing.assert_allclose(grid[top : top + 32, left : left + 32], last[i], atol=1)


def test_a_first_stage_in_patches(runs, tmp_path):
    """Latents and images by patches of 16, 8 apart, of which a run of latents may be made."""
    first = runs / "autoencoder"
    net, stage = load_first_stage(first).net, load_first_stage(first, 16)
    moments = in_patches(lambda x: net.encode(Tensor(x)).asnumpy(), to_float(IMAGES[:13]), 16, 8, 1 / 4)
    np.testing.assert_allclose(stage.moments(IMAGES[:13]), moments, atol=1e-4)
    decoded = in_patches(lambda z: net.decode(Tensor(z)).asnumpy(), moments[:, :2], 4, 2, 4)
    np.testing.assert_allclose(stage.reconstruct(IMAGES[:13]), decoded, atol=1e-4)
    args = ["--preset", "latent", "--run-dir", tmp_path / "run", "--first-stage", first, "--first-stage-patch", 16, *LATENT]
    assert call(train, *args, "--train.total-steps", 1)[0] == 0
    assert call(sample, tmp_path / "run", "--steps", 2, "--num", 1)[0] == 0
    assert_refused(call(train, *args, "--first-stage-patch", 18, "--run-dir", tmp_path / "b"), "not divisible by 4")
    assert_refused(call(train, *args, "--first-stage-patch", 64, "--run-dir", tmp_path / "b"), "--first-stage-patch is 64")


def test_scores_of_latent_samples(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("latent", "latent-text"):
        args = "--num 140 --steps 2 --json x.json --out x.png".split()
        code, _, err = call(evaluate, runs / name, *args)
        assert code == 0, err
        scores = json.loads((tmp_path / "x.json").read_text())["samples"]
        assert np.isfinite(scores["fid"]) and 0 <= scores["class_accuracy"] <= 1


def test_speed_of_runs(runs, tmp_path):
    args = ["--sampling-steps", 2, 3, "--rounds", 2, "--json", tmp_path / "x.json"]
    code, out, err = call(benchmark, "--runs", runs / "latent", runs / "latent-text", *args)
    assert not code, err
    records = json.loads((tmp_path / "x.json").read_text())["records"]
    assert [(Path(row["run"]).name, row["steps"]) for row in records] == [
        (name, steps) for name in ("latent", "latent-text") for steps in (2, 3)
    ]
    assert all(len(row["rounds"]) == 2 and row["ms_per_image"] > 0 for row in records)
    assert f"{runs / 'latent'}, dpmpp_2m, 2 steps" in out
    assert_refused(call(benchmark, "--runs", runs / "autoencoder"), "draws no images of its own")
    assert_refused(call(benchmark, "--runs", runs / "latent", "--samplers"), "choose one")


# Bad input


def test_training_refuses(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = f"--first-stage {runs / 'autoencoder'}"
    for args, words in (
        ("--preset latent", "--first-stage runs/autoencoder"),
        ("--preset latent --first-stage nowhere", "nowhere is not a folder"),
        (f"--preset latent --first-stage {runs / 'latent'}", "is not an autoencoder's run"),
        (f"--preset latent {first} --model.in-channels 3 --model.out-channels 3", "makes latents (2, 8, 8)"),
        (f"--preset latent {first} --model.latent-size 16", "the network takes (2, 16, 16)"),
        (f"--preset latent {first} --data.flip", "--data.no-flip"),
        (f"--preset latent {first} --data.condition gray", "pixel space"),
        (f"--preset latent {first} --model.condition text", "--model.vocab_size 39"),
        ("--preset autoencoder --precision fp16", "float32"),
        ("--preset autoencoder --train.score-every 2", "--train.score-every"),
        ("--preset autoencoder --data.size 30", "30"),
        (f"--preset latent {first} --data.size 33", "divisible by 4, not 33: set --data.size 32"),
        (f"--preset latent {first} --model.out-channels 1", "--model.out-channels as --model.in-channels"),
        (f"--preset latent {first} --latent-scale 0", "--latent-scale is 0"),
        ("--preset autoencoder --train.adam_betas 1.5 2", "--train.adam_betas are (1.5, 2.0)"),
        (f"--preset latent-text {first} --data.name image-folder", "captions of Fashion-MNIST alone"),
        (f"--preset latent-text {first} --model.vocab_size 5", "--model.vocab_size 39 --model.max_length"),
        (f"--preset latent {first} --train.batch-size 3000", "2000 images are fewer than a step's 3000"),
        (f"--preset quick {first}", "are for latents"),
        ("--preset autoencoder --train.disc-layers 0", "--train.disc-layers is 0"),
        ("--preset autoencoder --train.disc-layers 4", "leave nothing of 32 pixels"),
        ("--preset autoencoder --train.kl-weight -1", "--train.kl-weight is -1"),
        ("--preset autoencoder --train.vgg x.safetensors", "both of --train.vgg and --train.lpips"),
        ("--preset autoencoder --train.ema-lengths 0.1", "for diffusion"),
        ("--preset autoencoder --init-partial", "add --init-from"),
    ):
        assert_refused(call(train, *STEPS, *args.split()), words)
        assert not (tmp_path / "runs").exists(), args


def test_a_run_has_what_it_needs_of_its_first_stage(runs, tmp_path):
    """It goes on where the first stage is gone; a copy that a crash cut short is made anew; other patches are refused."""
    run = shutil.copytree(runs / "latent", tmp_path / "run")
    gone, args = ["--first-stage", tmp_path / "gone"], ["--preset", "latent", "--run-dir", run, *LATENT]
    assert call(train, *args, *gone, "--train.total-steps", 6)[0] == 0
    assert_refused(call(train, *args, *gone, "--first-stage-patch", 16), "another --first-stage-patch")
    assert_refused(call(train, *args, *gone, "--latent-scale", 0.5), "another --latent-scale")
    half = shutil.copytree(runs / "latent", tmp_path / "half", ignore=shutil.ignore_patterns("checkpoints", "config.json"))
    (half / "first_stage/state.json").unlink()
    args[3] = half
    assert_refused(call(train, *args, *gone), "gone is not a folder")
    code, _, err = call(train, *args, "--first-stage", runs / "autoencoder", "--latent-scale", 0.5, "--train.total-steps", 1)
    assert code == 0, err
    assert first_stage_of(half).scale == 0.5


def test_dropout_acts_in_training_alone(runs, tmp_path):
    """Steps of one seed differ by its masks; samples of one seed do not."""
    losses, drawn = [], []
    for dropout in (0, 0.5):
        run = tmp_path / f"{dropout}"
        args = ["--preset", "latent", "--first-stage", runs / "autoencoder", "--run-dir", run, *LATENT]
        assert call(train, *args, "--train.total-steps", 3, "--model.dropout", dropout)[0] == 0
        losses.append([row["loss"] for row in metrics(run)])
    for _ in range(2):
        assert call(sample, run, "--num", 2, "--steps", 2, "--npz", tmp_path / "x.npz")[0] == 0
        drawn.append(np.load(tmp_path / "x.npz")["images"])
    np.testing.assert_array_equal(*drawn)
    assert losses[0][0] == pytest.approx(losses[1][0]) and losses[0][2] != pytest.approx(losses[1][2])  # all 0 at first


def test_another_first_stage_is_refused(runs, tmp_path):
    run = shutil.copytree(runs / "latent", tmp_path / "run")
    other = tmp_path / "other"
    assert call(train, "--run-dir", other, *AUTOENCODER, "--train.seed", 1, "--train.total-steps", 2)[0] == 0
    before = tree(run)
    args = ["--preset", "latent", *LATENT, "--train.total-steps", 6]
    assert_refused(call(train, "--run-dir", run, "--first-stage", other, *args), "is not the first stage of the run")
    assert tree(run) == before


def test_sampling_refuses(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, args, words in (
        ("autoencoder", "", "is an autoencoder's"),
        ("latent", "--prompt boot", "was told no captions"),
        ("latent", "--init test:0", "works on pixels"),
        ("latent-text", "--class 3", "knows no classes"),
        ("latent-text", "--prompt zeppelin", "zeppelin"),
        ("latent-text", "--prompt ,", "has no words"),
    ):
        assert_refused(call(sample, runs / run, "--steps", 3, *args.split()), words)
    assert_refused(call(likelihood, runs / "latent"), "works through latents")
    for spoil, words in ((lambda run: shutil.rmtree(run / "first_stage"), "first_stage"), (forget_scale, "latent_scale")):
        run = shutil.copytree(runs / "latent", tmp_path / f"spoilt-{words}")
        spoil(run)
        assert_refused(call(sample, run, "--steps", 3), words)


def forget_scale(run):
    for path in run.glob("checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        del state["latent_scale"]
        path.write_text(json.dumps(state))


def test_the_presets_fit_each_other():
    stage, latent = PRESETS["autoencoder"], PRESETS["latent"]
    h = stage.data.size // stage.model.size_multiple
    assert latent.shape == (stage.model.embed_dim, h, h) and stage.model.channels == latent.model.channels
    assert PRESETS["latent-text"].shape == latent.shape
    numbers = np.prod(latent.shape)
    assert stage.data.size**2 >= 8 * numbers and stage.model.size_multiple == 4
