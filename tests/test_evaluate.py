"""python -m ms_diffusion.evaluate as a user meets it: what it reports of a run, of files, of real images, and bad input."""

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import ROOT, TINY, assert_refused, checkpoint, picture, tree
from test_cli_sample import call, untrained

import sample
import train
from ms_diffusion import sampling as generation
from ms_diffusion.commands import evaluate
from ms_diffusion.commands.evaluate import choose, nearest, real_images
from ms_diffusion.convert import save_torch_state_dict
from ms_diffusion.data.fashion_mnist import load_fashion_mnist_mini
from ms_diffusion.metrics.distances import frechet_distance, mean_and_covariance
from ms_diffusion.metrics.features import Features
from ms_diffusion.models.classifier import BUNDLED
from ms_diffusion.models.inception import InceptionV3
from ms_diffusion.training import presets

IMAGES, LABELS = load_fashion_mnist_mini("train")  # (2000, 28, 28, 1) uint8, (2000,)
TEST_IMAGES, TEST_LABELS = load_fashion_mnist_mini("test")
MINI = ["--data", "fashion-mnist-mini"]
FEW = "--num 160 --steps 3 --batch-size 80".split()
OF_RECONSTRUCTIONS = ("psnr", "ssim")
TITLES = {key: title.strip() for key, (title, _) in evaluate.ROWS.items() if key not in OF_RECONSTRUCTIONS}
SCORES = set(TITLES)
# In a report all scores but these are between 0 and 1
UNBOUNDED = {"fid", "kid", "kid_spread", "density", "nearest_train"}


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """The real images' features are kept in a folder of these tests; networks are loaded and compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(evaluate, "Features", functools.cache(lambda *args, **options: Features(*args, **options)))
        patch.setattr(evaluate, "load_run", functools.cache(evaluate.load_run))
        denoisers, make = {}, sampling.make_denoiser

        def make_denoiser(diffusion, net, clip=True):
            if (net, clip) not in denoisers:
                denoisers[net, clip] = make(diffusion, net, clip=clip)
            return denoisers[net, clip]

        patch.setattr(generation, "make_denoiser", make_denoiser)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 3 steps that knows classes; leave it as it is."""
    run = tmp_path_factory.mktemp("trained") / "run"
    args = ["--preset", "quick-class", *TINY, *"--diffusion.num_timesteps 20 --train.total-steps 3".split()]
    assert call(train, "--run-dir", run, *args)[0] == 0
    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing is an error: it takes long, so what can be refused is refused before."""

    def draw_samples(*_):
        raise AssertionError("drawn")

    monkeypatch.setattr(evaluate, "draw_samples", draw_samples)


def report_of(*args):
    """What evaluate printed, a row of words by its title, and {"samples", "floor", ...} as x.json has it."""
    code, out, err = call(evaluate, *args, "--json", "x.json", "--out", "x.png")
    assert code == 0 and "Traceback" not in err, err
    assert out.splitlines()[-1] == "x.json, x.png"
    assert np.ptp(picture("x.png")[1]) > 100
    return out, json.loads(Path("x.json").read_text())


def assert_report(out, record, without=()):
    """Every score beside its floor, finite, as printed."""
    assert set(record) == {"protocol", "samples", "floor", "seconds"}
    assert set(record["samples"]) == SCORES - set(without) and set(record["floor"]) == SCORES
    for scores in (record["samples"], record["floor"]):
        assert np.isfinite(list(scores.values())).all()
        assert all(0 <= value <= 1 for key, value in scores.items() if key not in UNBOUNDED)
    head, *rows, protocol, _ = out.splitlines()
    assert head.split() == ["samples", "floor"]
    assert [row[:40].strip() for row in rows] == list(TITLES.values())
    for key, row in zip(TITLES, rows, strict=True):
        for printed, scores in zip(row[40:].split(), (record["samples"], record["floor"]), strict=True):
            if key not in scores:
                assert printed == "-"
            elif printed.endswith("%"):
                assert float(printed[:-1]) == pytest.approx(100 * scores[key], abs=0.006)
            else:
                assert float(printed) == pytest.approx(scores[key], abs=0.06 if key == "nearest_train" else 0.0006)
    assert protocol.startswith(record["protocol"])


# Runs


def test_a_run(run, folder):
    told = [*FEW, "--guidance", 2, "--guidance-interval", 1, 9]
    out, record = report_of(run, *told, "--seed", 5)
    assert_report(out, record)
    for words in (
        "classifier, 128 features",
        f"{run} at step 3, ema weights; dpmpp_2m, 3 steps, guidance 2 from t = 1 to 9, seed 5",
        "N = 160 against 160 test images of fashion-mnist-mini",
        "floor: 160 real train images",
    ):
        assert words in record["protocol"]
    assert record["samples"]["fid"] > 3 * record["floor"]["fid"]  # it has learnt next to nothing
    assert record["floor"]["class_accuracy"] > 0.85 and record["floor"]["nearest_train"] > 5

    again = report_of(run, *told, "--seed", 5)[1]
    assert (again["samples"], again["floor"], again["protocol"]) == tuple(
        record[key] for key in ("samples", "floor", "protocol")
    )
    assert report_of(run, *told, "--seed", 6)[1]["samples"]["fid"] != record["samples"]["fid"]


def test_the_scores_of_a_run_are_those_of_what_sample_draws(run, folder):
    """With its npz, labels and all; beside the run, or the file, if nothing else is said."""
    own = shutil.copytree(run, folder / "run")
    code, _, err = call(evaluate, own, *FEW)
    assert code == 0, err
    assert tree(folder).keys() - {Path("run") / name for name in tree(run)} == {
        Path("run"),
        Path("run/evaluation.json"),
        Path("run/evaluation.png"),
    }
    code, _, err = call(sample, own, *FEW, "--sampler", "dpmpp_2m", "--npz", "x.npz", "--out", "x.png")
    assert code == 0, err
    before = Path("x.npz").read_bytes()
    code, out, err = call(evaluate, "x.npz", *MINI)
    assert code == 0 and out.splitlines()[-1] == "x-evaluation.json, x-evaluation.png", err
    assert Path("x.npz").read_bytes() == before
    drawn, read = (json.loads(Path(name).read_text()) for name in ("run/evaluation.json", "x-evaluation.json"))
    assert read["samples"] == pytest.approx(drawn["samples"], rel=1e-3) and read["floor"] == drawn["floor"]


def test_against_how_many(folder):
    """Samples and floor stay as they are; of the real images that they are compared with there are more."""
    record = report_of("train", *MINI, "--num", 150, "--against-num", 400)[1]
    assert "N = 150 against 400 test images" in record["protocol"] and "floor: 150 real train" in record["protocol"]
    seen, real = (
        Features()(choose(x, y, n)[0])["features"] for x, y, n in ((IMAGES, LABELS, 150), (TEST_IMAGES, TEST_LABELS, 400))
    )
    fid = frechet_distance(*mean_and_covariance(seen), *mean_and_covariance(real))
    assert record["samples"]["fid"] == record["floor"]["fid"] == pytest.approx(fid, rel=1e-4)


def test_a_model_that_comes_with_the_package(run, folder, tmp_path, monkeypatch):
    """By its name, or by none; the files go to where one works, and the package stays as it is."""
    weights = tmp_path / "weights"
    shutil.copytree(checkpoint(run, 3), weights / "stand-in", ignore=shutil.ignore_patterns("model.*", "optimizer.*"))
    shutil.copy(run / "config.json", weights / "stand-in")
    monkeypatch.setattr(presets, "WEIGHTS", weights)
    monkeypatch.setattr(sample, "WEIGHTS", weights)
    before = tree(weights)
    named = report_of("stand-in", *FEW)[1]
    code, out, err = call(evaluate, *FEW)
    assert code == 0 and out.splitlines()[-1] == "evaluation.json, evaluation.png", err
    record = json.loads(Path("evaluation.json").read_text())
    assert record["samples"] == named["samples"] and "stand-in at step 3" in record["protocol"]
    assert tree(weights) == before
    # Its evaluation.json is what sample.py --list reads
    shutil.copy("evaluation.json", weights / "stand-in")
    code, out, _ = call(sample, "--list")
    assert code == 0 and "stand-in" in out and f"FID {record['samples']['fid']:.2f}" in out


def test_too_few_are_refused_before_anything_is_drawn(run, folder, undrawn):
    before = tree(run), tree(folder)
    for num in (0, -5):
        assert_refused(call(evaluate, run, "--num", num), "choose at least 1")
    assert_refused(call(evaluate, run, *FEW, "--against-num", 0), "--against-num 0: choose at least 1")
    assert_refused(call(evaluate, run, *FEW, "--against-num", 128), "--against-num: 128 images are too few")
    for num in (128, 1):
        end = call(evaluate, run, "--num", num)
        assert_refused(end, f"--num: {num} images are too few for 128 features")
        assert "so the covariance is singular; take at least 129" in end[2]
    assert (tree(run), tree(folder)) == before


def test_samples_that_are_not_finite(run, folder, monkeypatch):
    broken = np.zeros((160, 1, 28, 28), np.float32)
    broken[3, 0, 5, 5] = np.nan
    monkeypatch.setattr(generation, "generate", lambda *_: broken)
    code, _, err = call(evaluate, run, *FEW)
    assert code == 2 and "error: 1 of 160 samples are not finite" in err.splitlines()[-1]
    assert tree(folder) == {}


@pytest.mark.parametrize(
    "args, words",
    [
        ("--steps 21", "--steps 21: choose from 1 to 20"),
        ("--guidance -1", "--guidance"),
        ("--batch-size 0", "--batch-size"),
        ("--seed -1", "--seed"),
        ("--eta 0.5", "--eta 0.5"),
        ("--ema-length 0.1", "--train.ema-lengths"),
        ("--against nonsense", "nonsense"),
        ("--data nonsense", "nonsense"),
        ("--nmu 160", "--num"),
        ("--device tpu", "tpu"),
    ],
)
def test_flags_that_are_refused(run, folder, args, words):
    before = tree(run)
    assert_refused(call(evaluate, run, "--num", 160, *args.split()), words)
    assert tree(run) == before and tree(folder) == {}


def test_runs_that_cannot_be_scored(folder, undrawn):
    """Points have scores of their own; of a run with a condition one draws, and scores the file."""
    points = folder / "points"
    untrained(points, presets.PRESETS["scurve"])
    assert_refused(call(evaluate, points), f"python sample.py {points} scores them")
    assert_refused(call(evaluate, "nowhere"), "nowhere is not a folder")


def test_a_run_with_a_condition_is_drawn_by_sample(folder):
    untrained(folder / "run", train.parse_args(["--preset", "quick-upscale", *TINY]).config)
    before = tree(folder)
    assert_refused(call(evaluate, "run"), "score what sample.py --npz draws from it")
    assert tree(folder) == before


def test_a_run_of_other_images_is_refused_before_anything_is_drawn(folder, undrawn):
    model = "--model.dim 8 --model.init-dim 8 --model.dim-mults 1 --model.resnet-block-groups 4".split()
    untrained(folder / "large", train.parse_args(["--data.name", "image-folder", "--data.size", "32", *model]).config)
    assert_refused(call(evaluate, "large", "--num", 160), "give --inception")


# Files


def save(images, labels=None, name="x.npz", **others):
    np.savez(name, images=images, **({} if labels is None else {"labels": labels}), **others)


def test_a_file_of_real_images_scores_well_and_one_of_noise_does_not(folder):
    save(IMAGES[:300], LABELS[:300])
    out, record = report_of("x.npz", *MINI)
    assert_report(out, record)
    assert "x.npz; N = 300 against 300 test images of fashion-mnist-mini" in record["protocol"]
    good = record["samples"]
    assert good["class_accuracy"] > 0.9 and good["class_balance"] > 0.85
    assert min(good[key] for key in ("precision", "recall", "coverage")) > 0.85
    assert good["fid"] < 2 * record["floor"]["fid"]
    assert good["nearest_train"] < 0.05 < 5 < record["floor"]["nearest_train"]  # they are training images

    save(np.random.default_rng(0).integers(0, 256, (300, 28, 28, 1), np.uint8), LABELS[:300])
    bad = report_of("x.npz", *MINI)[1]
    assert bad["floor"] == record["floor"]
    assert bad["samples"]["fid"] > 20 * good["fid"] and bad["samples"]["kid"] > good["kid"]
    assert bad["samples"]["class_accuracy"] < 0.3
    assert max(bad["samples"][key] for key in ("precision", "recall", "coverage")) < 0.3


def test_a_file_without_labels_and_with_too_many_images(folder):
    save(IMAGES[:200], other=np.zeros(3))
    out, record = report_of("x.npz", *MINI, "--num", 150)
    assert_report(out, record, without={"class_accuracy"})
    assert "N = 150 against 150 test images" in record["protocol"]
    save(IMAGES[:150], LABELS[:150].astype(np.uint8))
    labelled = report_of("x.npz", *MINI)[1]["samples"]
    assert labelled.pop("class_accuracy") > 0.85 and labelled == record["samples"]
    save(IMAGES[:150], (LABELS[:150] + 1) % 10)
    assert report_of("x.npz", *MINI)[1]["samples"]["class_accuracy"] < 0.1


def test_as_a_command(folder):
    save(IMAGES[:200], LABELS[:200])
    command = [sys.executable, "-m", "ms_diffusion.evaluate", "x.npz", *MINI]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "arning" not in done.stderr, done.stderr
    assert_report(done.stdout, json.loads(Path("x-evaluation.json").read_text()))
    assert sorted(tree(folder)) == [Path(name) for name in ("x-evaluation.json", "x-evaluation.png", "x.npz")]


ODD = np.random.default_rng(0).random((150, 28, 28, 1))


def truncate(name):
    save(IMAGES[:150])
    whole = Path(name).read_bytes()
    Path(name).write_bytes(whole[: len(whole) // 2])


def spoil(name, first=5000):
    """A few bytes amid what sample.py --npz writes."""
    np.savez_compressed(name, images=IMAGES[:150])
    whole = bytearray(Path(name).read_bytes())
    whole[first : first + 20] = b"\xff" * 20
    Path(name).write_bytes(whole)


def spoil_code(name):
    """Where it says how it is compressed."""
    spoil(name, 60)


def save_npy(name):
    with open(name, "wb") as f:
        np.save(f, IMAGES[:150])


BAD = {
    "no such file": (lambda name: None, "No such file"),
    "not an npz": (lambda name: Path(name).write_text("text"), "cannot be read as an .npz file"),
    "empty": (lambda name: Path(name).touch(), "cannot be read as an .npz file"),
    "a folder": (lambda name: Path(name).mkdir(), "cannot be read as an .npz file"),
    "spoilt": (spoil, "cannot be read as an .npz file"),
    "no images": (lambda name: np.savez(name, points=ODD, x=ODD), "does not hold the array `images`"),
    "no arrays": (np.savez, "does not hold the array `images`"),
    "floats": (lambda name: save(ODD), "these are float64: save them as sample.py --npz does"),
    "floats with NaN": (lambda name: save(np.where(ODD < 0.5, np.nan, ODD)), "these are float64 with NaN"),
    "int64": (lambda name: save(IMAGES[:150].astype(np.int64)), "these are int64"),
    "no channels": (lambda name: save(IMAGES[:150, ..., 0]), "(150, 28, 28)"),
    "4 channels": (lambda name: save(IMAGES[:150].repeat(4, 3)), "(150, 28, 28, 4)"),
    "RGB": (lambda name: save(IMAGES[:150].repeat(3, 3)), "28 x 28 x 3"),
    "no images in it": (lambda name: save(IMAGES[:0]), "(0, 28, 28, 1)"),
    "14 x 14": (lambda name: save(IMAGES[:150, ::2, ::2]), "14 x 14"),
    "not square": (lambda name: save(IMAGES[:150, :14]), "images are square, these are 14 x 28"),
    "labels of another length": (lambda name: save(IMAGES[:150], LABELS[:149]), "150 integers, these are (149,)"),
    "labels that are floats": (lambda name: save(IMAGES[:150], ODD[:, 0, 0, 0]), "150 integers"),
    "one hot labels": (lambda name: save(IMAGES[:150], np.eye(10, dtype=int)[LABELS[:150]]), "these are (150, 10)"),
    "pickled images": (lambda name: save(np.array([None, "x"], object)), "cannot be read as an .npz file"),
    "pickled labels": (lambda name: save(IMAGES[:150], np.array(["x"] * 150, object)), "cannot be read as an .npz file"),
    "too few": (lambda name: save(IMAGES[:128]), "128 images are too few for 128 features"),
    "truncated": (truncate, "cannot be read as an .npz file"),
    "spoilt code": (spoil_code, "cannot be read as an .npz file"),
    "npy": (save_npy, "cannot be read as an .npz file"),
}


@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing")
@pytest.mark.parametrize("make, words", BAD.values(), ids=BAD)
def test_bad_files(folder, make, words):
    """One line says what is wrong; the file stays, and nothing comes beside it. None is left open, which would be a
    warning."""
    make("x.npz")
    before = tree(folder)
    code, out, err = call(evaluate, "x.npz", *MINI)
    assert_refused((code, out, "".join(line for line in err.splitlines(True) if "batch/s" not in line)), words)
    assert "x.npz" in err or "--num" in err or "28 x 28" in err
    assert tree(folder) == before
    gc.collect()


def test_a_number_below_zero_of_a_file(folder):
    save(IMAGES[:200])
    assert_refused(call(evaluate, "x.npz", *MINI, "--num", -5), "--num")


# Real images


@pytest.mark.parametrize("source, against", [("train", "test"), ("test", "train")])
def test_real_images_are_their_own_floor(folder, source, against):
    """All 500 test images, and as many training images."""
    out, record = report_of(source, "--against", against, *MINI, "--num", 500)
    assert_report(out, record)
    assert f"real {source} images; N = 500 against 500 {against} images of fashion-mnist-mini" in record["protocol"]
    far, floor_far = (record[kind].pop("nearest_train") for kind in ("samples", "floor"))
    assert record["samples"] == record["floor"]
    assert floor_far > 5 and (far < 0.05 if source == "train" else far == floor_far)
    assert record["samples"]["fid"] < 1 and record["samples"]["class_accuracy"] > 0.9


def test_more_than_there_are(folder):
    record = report_of("test", "--against", "train", *MINI)[1]
    assert "N = 500 against 2000 train images of fashion-mnist-mini; floor: 500 real test images" in record["protocol"]


def test_images_against_themselves(folder):
    assert_refused(call(evaluate, "test", *MINI), "test against test are the same images: add --against train")
    assert_refused(call(evaluate, "train", "--against", "train", *MINI), "add --against test")
    assert tree(folder) == {}


def save_pictures(folder, num, size=28):
    """`num` gray images, each of one value of its own; in two classes."""
    for i in range(num):
        path = folder / "pictures" / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size, size), i, np.uint8)).save(path)
    return folder / "pictures"


def test_a_folder_of_images_is_halved(folder):
    found = real_images("image-folder", str(save_pictures(folder, 41, 8)), 8, 1)
    assert list(found) == ["train", "test"]
    halves = [set(images[:, 0, 0, 0].tolist()) for images, _ in found.values()]
    assert [len(half) for half in halves] == [21, 20]
    assert not halves[0] & halves[1] and halves[0] | halves[1] == set(range(41))
    for images, labels in found.values():
        assert images.shape[1:] == (8, 8, 1)
        np.testing.assert_array_equal(labels, images[:, 0, 0, 0] % 2)  # each keeps its own
        assert 0 < labels.mean() < 1
    again = real_images("image-folder", "pictures", 8, 1)
    for split in found:
        np.testing.assert_array_equal(again[split][0], found[split][0])


def test_the_classifier_knows_no_other_classes(folder):
    """Of images that are not Fashion-MNIST there is no word on classes."""
    for i, image in enumerate(IMAGES[:300]):
        path = folder / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    save(IMAGES[300:450], LABELS[300:450])
    _, record = report_of("x.npz", "--data", "image-folder", "--data-dir", folder / "pictures")
    for scores in (record["samples"], record["floor"]):
        assert set(scores) == SCORES - {"class_accuracy", "class_balance"}


def test_splits_that_are_there_stay_as_they_are():
    found = real_images("fashion-mnist-mini", None, 28, 1)
    np.testing.assert_array_equal(found["train"][0], IMAGES)
    np.testing.assert_array_equal(found["test"][0], TEST_IMAGES)


def test_too_few_real_images(folder):
    """Of a folder of 200 images each half has 100, whose covariance is singular too."""
    save(IMAGES[:150])
    pictures = save_pictures(folder, 200)
    assert_refused(call(evaluate, "x.npz", "--data", "image-folder", "--data-dir", pictures), "100 images are too few")


# The nearest training image


def test_nearest_finds_the_nearest_of_all():
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (300, 6, 5, 3), np.uint8)
    pictures = rng.integers(0, 256, (230, 6, 5, 3), np.uint8)  # in more than one block
    distances = np.sqrt(((pictures[:, None].astype(float) - data) ** 2).mean((2, 3, 4)))
    index, far = nearest(pictures, data)
    np.testing.assert_array_equal(index, distances.argmin(1))
    np.testing.assert_allclose(far, distances.min(1), rtol=1e-5)


def test_nearest_finds_planted_copies():
    pictures = TEST_IMAGES[:12].copy()
    pictures[[3, 7]] = IMAGES[[1234, 56]]
    index, far = nearest(pictures, IMAGES)
    assert (index[3], index[7]) == (1234, 56) and max(far[3], far[7]) < 0.2
    assert np.delete(far, [3, 7]).min() > 1
    pictures[0] = np.minimum(IMAGES[99].astype(int) + 2, 255)  # lighter by 2: that is its distance
    index, far = nearest(pictures, IMAGES)
    assert index[0] == 99 and far[0] == pytest.approx(2, abs=0.1)


def test_the_distance_of_a_copy_is_nothing():
    index, far = nearest(IMAGES[:500], IMAGES)
    np.testing.assert_array_equal(index, np.arange(500))
    assert far.max() == 0


# InceptionV3


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of weights drawn at random, as a PyTorch project would write it."""
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_torch_state_dict(InceptionV3(), path)
    yield path
    path.unlink()  # 95 MB


def test_inception_needs_more_images(run, folder, inception, undrawn):
    save(IMAGES[:150])
    for args in (["x.npz", *MINI], [run, "--num", 2048], ["test", "--num", 2048, "--against", "train", *MINI]):
        end = call(evaluate, *args, "--inception", inception)
        assert_refused(end, "images are too few for 2048 features")
        assert "take at least 2049" in end[2]


def torchvision_like(path):
    """Another head, as a network of 1000 classes has it."""
    import safetensors.numpy

    safetensors.numpy.save_file({"fc.weight": np.zeros((1000, 2048), np.float32)}, path)


OTHERS = {
    "torchvision": torchvision_like,
    "classifier": lambda path: shutil.copy(BUNDLED, path),
    "garbage": lambda path: Path(path).write_bytes(b"garbage"),
    "none": lambda path: None,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_a_wrong_file_of_inception(folder, make):
    save(IMAGES[:150])
    make("other.safetensors")
    before = tree(folder)
    assert_refused(call(evaluate, "x.npz", *MINI, "--inception", "other.safetensors"), "other.safetensors")
    assert tree(folder) == before
