"""The evaluate command: what it scores, writes and refuses. The scores themselves are in test_scores.py."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs import PIXELS, UNET, assert_refused, call, draw, picture, succeed, tree, untrained

from ms_diffusion.convert import save_torch_state_dict
from ms_diffusion.data.fashion_mnist import load_fashion_mnist_mini
from ms_diffusion.metrics.features import Features
from ms_diffusion.metrics.scores import format_report
from ms_diffusion.models.classifier import BUNDLED
from ms_diffusion.models.inception import InceptionV3
from ms_diffusion.runtime import UserError
from ms_diffusion.training.runs import Run

IMAGES, LABELS = load_fashion_mnist_mini("train")  # (2000, 28, 28, 1) uint8, (2000,)
MINI = ["--data", "fashion-mnist-mini"]
SCORES = {"fid", "kid", "kid_spread", "precision", "recall", "density", "coverage", "class_accuracy", "class_balance"}
SCORES |= {"nearest_train"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The features of real images are cached in a folder of these tests; the classifier is compiled once."""
    features, call_it = Features(), Features.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("ms_diffusion.metrics.features.BATCH", 80)  # which bounds the memory of the graph
        patch.setattr(
            Features, "__call__", lambda self, *args: call_it(self if self.num != features.num else features, *args)
        )
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def report_of(*args):
    """What the command prints, and the record that it writes."""
    printed = succeed("evaluate", *args, "--json", "x.json", "--out", "x.png")
    assert printed.splitlines()[-1] == "x.json, x.png" and np.ptp(picture("x.png")[0]) > 100
    record = json.loads(Path("x.json").read_text())
    assert set(record) == {"protocol", "samples", "floor", "seconds"} and format_report(record) in printed
    for scores in (record["samples"], record["floor"]):
        assert np.isfinite(list(scores.values())).all()
    return printed, record


def save(images, labels=None, name="x.npz"):
    np.savez(name, images=images, **({} if labels is None else {"labels": labels}))


# What is scored


def test_a_run(class_run, folder):
    """Its own data, guidance and seed are in the protocol; the files lie beside it; what sample draws scores the same."""
    run = shutil.copytree(class_run.home, folder / "run")
    flags = ["--num", 160, "--steps", 2, "--batch-size", 80, "--seed", 5, "--guidance", 2, "--guidance-interval", 1, 9]
    printed = succeed("evaluate", run, *flags)
    assert {path.name for path in tree(folder).keys() - {Path("run") / name for name in tree(class_run.home)}} == {
        "run",
        "evaluation.json",
        "evaluation.png",
    }
    record = json.loads((run / "evaluation.json").read_text())
    assert set(record["samples"]) == set(record["floor"]) == SCORES
    for words in (
        "classifier, 128 features",
        f"{run} at step 6, ema weights; dpmpp_2m, 2 steps, guidance 2 from t = 1 to 9, seed 5",
        "N = 160 against 160 test images of fashion-mnist-mini",
        "floor: 160 real train images",
    ):
        assert words in record["protocol"] and words in printed
    assert record["samples"]["fid"] > 3 * record["floor"]["fid"]  # it has learned nothing
    assert record["floor"]["class_accuracy"] > 0.85 and record["floor"]["nearest_train"] > 5

    options = {"sampler": "dpmpp_2m", "steps": 2, "seed": 5, "guidance": 2.0, "guidance_interval": (1, 9)}
    save(class_run.sample(160, batch_size=4, **options), np.arange(160) % 10)
    before = Path("x.npz").read_bytes()
    assert succeed("evaluate", "x.npz", *MINI).splitlines()[-1] == "x-evaluation.json, x-evaluation.png"
    assert Path("x.npz").read_bytes() == before
    read = json.loads(Path("x-evaluation.json").read_text())
    assert read["samples"] == pytest.approx(record["samples"], rel=1e-2) and read["floor"] == record["floor"]


@pytest.mark.slow
def test_a_run_in_python(class_run):
    options = {"steps": 2, "batch_size": 4}
    record = class_run.evaluate(140, seed=5, against_num=400, **options)
    assert f"{class_run.name} at step 6" in record["protocol"] and "guidance 2 from t = 10 to 19" in record["protocol"]
    assert "N = 140 against 400 test images" in record["protocol"] and "floor: 140 real train" in record["protocol"]
    assert class_run.evaluate(140, seed=6, against_num=400, **options)["samples"]["fid"] != record["samples"]["fid"]
    assert class_run.evaluate(140, against="train", **options)["protocol"].count("140 train images")


def test_a_file_of_real_images_and_one_of_noise(folder):
    save(IMAGES[:300], LABELS[:300])
    _, record = report_of("x.npz", *MINI)
    assert "x.npz; N = 300 against 300 test images of fashion-mnist-mini" in record["protocol"]
    good, floor = record["samples"], record["floor"]
    assert good["class_accuracy"] > 0.9 and good["class_balance"] > 0.85 and good["fid"] < 2 * floor["fid"]
    assert min(good[key] for key in ("precision", "recall", "coverage")) > 0.85
    assert good["nearest_train"] < 0.05 < 5 < floor["nearest_train"]  # they are training images

    save(np.random.default_rng(0).integers(0, 256, (300, 28, 28, 1), np.uint8))
    _, record = report_of("x.npz", *MINI, "--num", 200, "--against-num", 300)
    bad = record["samples"]
    assert set(bad) == SCORES - {"class_accuracy"} and "N = 200 against 300 test" in record["protocol"]
    assert bad["fid"] > 20 * good["fid"] and bad["kid"] > good["kid"]
    assert max(bad[key] for key in ("precision", "recall", "coverage")) < 0.3


def test_real_images_are_their_own_floor(folder):
    _, record = report_of("train", *MINI)
    assert "real train images; N = 2000 against 500 test images" in record["protocol"]  # as many as there are
    assert record["samples"]["nearest_train"] < 0.05
    for scores in (record["samples"], record["floor"]):
        del scores["nearest_train"]
    assert record["samples"] == record["floor"]
    for source, against in (("test", "test"), ("train", "train")):
        assert_refused(call("evaluate", source, "--against", against, *MINI), "--against")


def test_what_a_report_of_a_bundled_model_is_for(class_run, tmp_path, monkeypatch):
    """Its evaluation.json is what sample --list reads; no source means the default one."""
    from ms_diffusion.commands import sample as sample_command
    from ms_diffusion.training import runs as trained_runs

    weights, name = tmp_path / "weights", trained_runs.DEFAULT
    newest = class_run.home / "checkpoints/step-0000006"
    shutil.copytree(newest, weights / name, ignore=shutil.ignore_patterns("model.*"))
    shutil.copy(class_run.home / "config.json", weights / name)
    for module in (trained_runs, sample_command):
        monkeypatch.setattr(module, "WEIGHTS", weights)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = tree(weights)
    out = succeed("evaluate", "--num", 160, "--steps", 1, "--batch-size", 80, "--guidance", 1)
    assert out.splitlines()[-1] == "evaluation.json, evaluation.png" and f"{name} at step 6" in out
    assert tree(weights) == before
    shutil.copy("evaluation.json", weights / name)
    fid = json.loads(Path("evaluation.json").read_text())["samples"]["fid"]
    assert f"FID {fid:.2f}" in succeed("sample", "--list")


# What is refused, before anything is drawn


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--num 0", "--num is 0"),
        ("--num -5", "--num is -5"),
        ("--num 128", "--num: 128 images are too few"),
        ("--num 160 --against-num 0", "--against-num is 0"),
        ("--num 160 --against-num 128", "--against-num: 128 images"),
        ("--num 160 --steps 21", "--steps is 21"),
        ("--num 160 --guidance -1", "--guidance is -1"),
        ("--num 160 --batch-size 0", "--batch-size is 0"),
        ("--num 160 --seed -1", "--seed is -1"),
        ("--num 160 --eta 0.5", "--eta"),
        ("--num 160 --ema-length 0.1", "--train.ema-lengths"),
        ("--num 160 --against nonsense", "nonsense"),
        ("--num 160 --data nonsense", "nonsense"),
        ("--nmu 160", "--num"),
        ("--num 160 --device tpu", "tpu"),
    ],
)
def test_flags_that_are_refused(class_run, folder, flags, words):
    before = tree(class_run.home)
    assert_refused(call("evaluate", class_run.home, *flags.split()), words)
    assert tree(class_run.home) == before and tree(folder) == {}


def test_runs_that_cannot_be_scored(folder):
    data = replace(PIXELS.data, condition="lowres")
    untrained(folder / "upscale", replace(PIXELS, data=data, model=replace(UNET, cond_channels=1)))
    untrained(folder / "large", replace(PIXELS, data=replace(data, name="image-folder", size=32, condition="none")))
    before = tree(folder)
    for source, words in (("nowhere", "nowhere"), ("upscale", ".npz"), ("large", "--inception")):
        assert_refused(call("evaluate", source, "--num", 160), words)
    assert tree(folder) == before


def test_samples_that_are_not_finite(class_run, folder):
    """As of a training that has diverged."""
    run, broken = Run(class_run.home), np.zeros((140, 1, 28, 28), np.float32)
    broken[3, 0, 5, 5] = np.nan
    run.generator = SimpleNamespace(draw=lambda *_: broken)
    with pytest.raises(UserError, match="1 of 140 samples are not finite"):
        run.evaluate(140, steps=1)


def test_bad_files(folder):
    save(IMAGES[:128])
    assert_refused(call("evaluate", "x.npz", *MINI), "x.npz", "128 images are too few")
    assert_refused(call("evaluate", "nowhere.npz", *MINI), "nowhere.npz")
    np.savez("x.npz", pictures=IMAGES[:150])
    assert_refused(call("evaluate", "x.npz", *MINI), "x.npz", "images")
    assert {path.name for path in tree(folder)} == {"x.npz"}


@pytest.mark.slow
def test_inception(class_run, folder):
    """It needs more images than it has features; another network's file is refused."""
    save_torch_state_dict(InceptionV3(), "inception.safetensors")
    save(IMAGES[:150])
    for args in (["x.npz", *MINI], [class_run.home, "--num", 2048], ["test", "--num", 2048, "--against", "train", *MINI]):
        assert_refused(call("evaluate", *args, "--inception", "inception.safetensors"), "too few for 2048 features", 2049)
    Path("inception.safetensors").write_bytes(b"garbage")
    shutil.copy(BUNDLED, "classifier.safetensors")
    for name in ("inception", "classifier", "nowhere"):
        assert_refused(call("evaluate", "x.npz", *MINI, "--inception", f"{name}.safetensors"), f"{name}.safetensors")


def test_the_npz_of_the_sample_command_can_be_scored(class_run, folder):
    images, labels = draw(class_run, folder, "--num", 132, "--steps", 1)
    assert len(images) == len(labels) == 132
    _, record = report_of("x.npz", *MINI)
    assert set(record["samples"]) == SCORES and "N = 132" in record["protocol"]
