"""sample.py's classes, guidance, conditions and edits, and train.py's more unusual runs, as a user meets them."""

import io
import json
import shutil
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from test_cli import TINY, assert_refused, checkpoint, metrics, picture, tree

from mindspore import Tensor

import sample
import train
from ms_diffusion import runtime
from ms_diffusion.data.fashion_mnist import load_fashion_mnist_mini
from ms_diffusion.images import CAPTION, save_loss_curve, to_float, to_uint8
from ms_diffusion.samplers import SAMPLERS, SPACINGS
from ms_diffusion.training import presets
from ms_diffusion.training.checkpoint import Checkpoint
from ms_diffusion.training.presets import PRESETS
from ms_diffusion.training.step import EMA
from ms_diffusion.training.tasks import everything as tasks

pytestmark = pytest.mark.usefixtures("compiled_once")

T = 20
CLASSES = [
    *"--preset quick-class --diffusion.objective eps --model.self-condition".split(),
    *"--train.timestep_sampling importance --train.learn-logvar".split(),
    *TINY,
    *f"--diffusion.num_timesteps {T} --train.batch-size 200 --train.total-steps 6 --train.save-every 3".split(),
]
UPSCALE = ["--preset", "quick-upscale", *TINY, "--train.total-steps", "2"]
TEST_IMAGES = load_fashion_mnist_mini("test")[0]  # (N, H, W, C) uint8


def call(module, *args):
    """The program in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        patch.setattr(train, "STOP", threading.Event())
        runtime.run_program(module.main)
    return end.value.code, out.getvalue(), err.getvalue()


def untrained(run, config):
    """A run's folder with its first weights."""
    net, _ = config.build()
    Checkpoint(run, net, ema=EMA(net)).save(0)
    (run / "config.json").write_text(config.to_json())
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs; leave them as they are."""
    folder = tmp_path_factory.mktemp("runs")
    assert call(train, "--run-dir", folder / "class", *CLASSES)[0] == 0
    assert call(train, "--run-dir", folder / "upscale", *UPSCALE)[0] == 0
    plain = train.parse_args(TINY).config
    untrained(folder / "plain", plain)
    zero_snr = replace(plain, diffusion=replace(plain.diffusion, zero_terminal_snr=True))
    untrained(folder / "zero-snr", zero_snr)
    no_dropout = train.parse_args([*CLASSES, "--train.label-dropout", "0"]).config
    untrained(folder / "no-dropout", no_dropout)

    photos = folder / "photos"
    photos.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 30, 3), np.uint8)).save(photos / f"{i}.png")
    data = f"--data.name image-folder --data.dir {photos} --data.size 8 --model.channels 3".split()
    untrained(folder / "folder-classes", train.parse_args([*TINY, *data, "--model.num-classes", "3"]).config)
    for kind, channels in (("gray", 1), ("mask", 4)):
        condition = ["--data.condition", kind, "--model.cond-channels", channels]
        untrained(folder / kind, train.parse_args([*TINY, *data, *map(str, condition)]).config)
    return folder


@pytest.fixture
def draw(runs, tmp_path):
    """draw(run, *args): the uint8 images (N, H, W, C) that sample.py draws, 4 in 3 steps if nothing else is said, in
    batches of one size, which compile once; the picture is out.png, what was printed `draw.out`, and the npz file's
    labels, or None, are `draw.labels`."""

    def draw(run, *args):
        where = ["--out", tmp_path / "out.png", "--npz", tmp_path / "x.npz"]
        code, draw.out, err = call(sample, runs / run, "--num", 4, "--batch-size", 4, "--steps", 3, *where, *args)
        assert code == 0 and "Traceback" not in err, err
        with np.load(tmp_path / "x.npz") as file:
            draw.labels = file["labels"] if "labels" in file else None
            return file["images"]

    return draw


def cells(path, columns, size=28, scale=4, below=0):
    """The images (N, H, W, ...) of a sheet, row by row, which has `below` pixels more under each."""
    sheet, height, width = picture(path)[1][::scale, ::scale], size + below + 2, size + 2
    rows = (len(sheet) - 2) // height
    assert sheet.shape[:2] == (rows * height + 2, columns * width + 2)
    tops, lefts = range(2, 2 + rows * height, height), range(2, 2 + columns * width, width)
    return np.stack([sheet[top : top + size, left : left + size] for top in tops for left in lefts])


def captions(path, rows, columns, scale=3):
    """What is written under each image (N, H, W) of a sheet, in its own pixels, row by row."""
    sheet, height, width = picture(path)[1], 28 + CAPTION + 2, 30
    found = []
    for i in range(rows * columns):
        top, left = 2 + i // columns * height + 28, 1 + i % columns * width
        found.append(sheet[scale * top : scale * (top + CAPTION + 1), scale * left : scale * (left + width)])
    return np.stack(found)


def rms(a, b):
    return np.sqrt(np.mean((a.astype(float) - b) ** 2))


# Training


def test_a_resumed_run_with_everything_equals_an_uninterrupted_one(runs, tmp_path):
    """Importance-drawn timesteps, a learned log-variance, self-conditioning, labels: bit for bit."""
    whole, run = runs / "class", shutil.copytree(runs / "class", tmp_path / "run")
    state = safetensors.numpy.load_file(checkpoint(whole, 3) / "optimizer.safetensors")
    assert (state["timesteps.counts"] >= 10).all() and state["timesteps.counts"].sum() == 3 * 200  # no longer uniform
    assert np.ptp(state["logvar"]) > 0
    shutil.rmtree(checkpoint(run, 6))
    code, out, err = call(train, "--run-dir", run, *CLASSES)
    assert code == 0 and f"resuming at step 3 of 6 in {run}" in out

    for name in ("model", "ema", "optimizer"):
        a, b = (safetensors.numpy.load_file(checkpoint(r, 6) / f"{name}.safetensors") for r in (whole, run))
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    assert not np.array_equal(a["logvar"], state["logvar"]) and a["timesteps.counts"].sum() == 6 * 200
    for a, b in zip(metrics(whole), metrics(run), strict=True):
        assert a | {"img_per_s": 0} == b | {"img_per_s": 0}
    assert (run / "samples/step-0000006.png").read_bytes() == (whole / "samples/step-0000006.png").read_bytes()


@pytest.fixture
def first_step(tmp_path, monkeypatch):
    """first_step(*args): the loss function of train.py, and the batch that its first step is given; it stops there."""

    def first_step(*args):
        found = []

        def make_train_step(loss_fn, *_, **options):
            def step(*batch):
                train.STOP.set()
                found.extend([loss_fn, batch])
                return Tensor(np.float32(1)), Tensor(np.float32(1)), Tensor(np.ones(len(batch[0]), np.float32))

            return step

        monkeypatch.setattr(tasks, "make_train_step", make_train_step)
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        assert call(train, "--run-dir", run, *TINY, "--train.batch-size", 64, *" ".join(args).split())[0] == 130
        return found

    return first_step


def arrays(found):
    return [value.asnumpy() for value in found[1]]


def test_what_a_step_draws(first_step):
    """x_0, timesteps, noise, and where there is use for them weights, who is shown a guess, labels, the image shown."""
    drawn = arrays(first_step("--train.timestep_sampling antithetic"))
    x_start, t, noise = drawn
    assert x_start.shape == noise.shape == (64, 1, 28, 28) and abs(x_start).max() == 1
    np.testing.assert_array_equal(t[:32] + t[32:], np.full(32, 999))
    assert noise.mean((1, 2, 3)).std() < 0.1
    for a, b in zip(drawn, arrays(first_step("--train.timestep_sampling antithetic")), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (arrays(first_step("--train.seed 1"))[2] != noise).any()
    assert abs(arrays(first_step("--train.offset-noise 3"))[2].mean((1, 2, 3)).std() - 3) < 5 * 3 / np.sqrt(2 * 64)

    for share, expected in ((1, {10}), (0, set(range(10)))):
        labels = arrays(first_step("--preset quick-class --train.label-dropout", str(share)))[3]
        assert labels.dtype == np.int32 and set(labels) == expected
    everything = "--train.timestep_sampling importance --model.self-condition --model.num-classes 10"
    drawn = arrays(first_step(everything, "--data.condition mask --model.cond-channels 2"))
    x_start, _, _, weights, self_cond_mask, labels, shown = drawn
    np.testing.assert_array_equal(weights, np.ones(64, np.float32))  # uniform at first
    assert set(self_cond_mask) == {0, 1} and labels.shape == (64,) and shown.shape == (64, 2, 28, 28)
    np.testing.assert_array_equal(shown[:, 0], np.where(shown[:, 1] == 1, 0, x_start[:, 0]))


def test_the_loss_of_a_step(first_step):
    """The mean of weight times loss, and the losses; a guess of x_0 is shown to those that are to remember one."""
    loss_fn, (*batch, weights, self_cond_mask) = first_step("--model.self-condition --train.timestep_sampling importance")
    weights = Tensor(np.linspace(0, 3, 64, dtype=np.float32))
    loss, losses = loss_fn(*batch, weights, self_cond_mask)
    assert losses.shape == (64,) and losses.asnumpy().std() > 0
    np.testing.assert_allclose(loss.asnumpy(), np.mean(weights.asnumpy() * losses.asnumpy()), rtol=1e-5)
    with_guess, without = (loss_fn(*batch, weights, Tensor(np.full(64, n, np.float32)))[1].asnumpy() for n in (1, 0))
    np.testing.assert_allclose(losses.asnumpy(), np.where(self_cond_mask.asnumpy() == 1, with_guess, without), rtol=1e-4)
    assert (abs(with_guess - without) > 1e-4 * without).mean() > 0.9

    loss_fn, batch = first_step("--train.seed 0")
    weighted, _ = first_step("--train.seed 0 --train.timestep_sampling importance")
    _, losses = weighted(*batch, Tensor(np.ones(64, np.float32)))
    np.testing.assert_allclose(loss_fn(*batch).asnumpy(), losses.asnumpy().mean(), rtol=1e-5)


@pytest.mark.parametrize(
    "args, words",
    [
        ("--preset quick-class --model.num-classes 9", "labels up to 9: set --model.num-classes 10"),
        ("--data.condition gray", "set --model.cond-channels 1"),
        ("--data.condition mask", "set --model.cond-channels 2"),
        ("--model.cond-channels 1", "set --model.cond-channels 0"),
        ("--preset quick-upscale --data.lowres-size 8", "--data.lowres-size 8 does not divide"),
        ("--preset quick-upscale --data.lowres-size 0", "--data.lowres-size is 0"),
        ("--data.condition blur", "blur"),
        ("--preset quick-class --train.label-dropout 1.5", "--train.label-dropout"),
        ("--train.offset-noise -1", "--train.offset-noise"),
        ("--train.timestep_sampling nonsense", "nonsense"),
        ("--train.sample-guidance 3", "knows no classes"),
        ("--preset quick-class --train.sample-guidance nan", "--guidance"),
        ("--preset quick-class --train.sample-guidance 3 --train.label-dropout 0", "--train.label-dropout 0"),
        ("--preset quick-class --train.sample-guidance-interval 0 9", "without --guidance"),
        ("--preset quick-class --train.sample-guidance 3 --train.sample-guidance-interval 0 1000", "0 to 999"),
        ("--preset quick-class --model.no-with-time-emb", "num_classes is 10"),
        ("--preset quick-class --model.num-classes 0", "num_classes is 0"),
    ],
)
def test_training_refuses_what_does_not_fit(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(train, *TINY, *args.split()), words)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_below_zero_is_drawn(tmp_path):
    """As a learned log-variance makes it: the curve goes on to the right, where a logarithm would have no place for it."""
    save_loss_curve(tmp_path / "loss.png", range(40), np.linspace(1, -3, 40))
    sheet = picture(tmp_path / "loss.png")[1][..., :3].astype(int)
    orange = (sheet[..., 0] > 200) & (sheet[..., 1] < 180) & (sheet[..., 2] < 100)  # the smoothed curve
    rows = [np.flatnonzero(orange[:, left : left + 60].any(1)).mean() for left in (350, 450, 550)]
    assert rows[0] < rows[1] < rows[2]


# What sample.py refuses


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder to work in, with pictures of several sizes and with files that are none."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("small.png", 14), ("photo.png", 28), ("large.png", 56)):
        Image.fromarray(np.full((size, size), 200, np.uint8)).save(name)
    (tmp_path / "text.png").write_text("no picture")
    whole = (tmp_path / "large.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "spoilt.png").write_bytes(whole[:33] + b"\0\0\0\1\1\1\1\1" + whole[41:])
    Image.new("L", (28, 28)).save("bomb.bmp")
    header = bytearray((tmp_path / "bomb.bmp").read_bytes())
    header[18:26] = (200_000).to_bytes(4, "little") * 2  # it says that it is 200,000 pixels wide and high
    (tmp_path / "bomb.bmp").write_bytes(header)
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "run, args, words",
    [
        ("class", "--class 10", "--class 10: choose from 0 to 9"),
        ("class", "--class -1", "--class -1"),
        ("plain", "--class 0", "knows no classes"),
        ("plain", "--guidance 2", "knows no classes"),
        ("upscale", "--guidance 2", "knows no classes"),
        ("class", "--guidance -1", "--guidance"),
        ("class", "--guidance nan", "--guidance"),
        ("class", "--guidance inf", "--guidance"),
        ("class", "--guidance 2 --guidance-rescale 2", "--guidance-rescale"),
        ("class", "--guidance 2 --guidance-rescale -0.1", "--guidance-rescale"),
        ("class", "--guidance-rescale 0.5", "without --guidance"),
        ("class", "--guidance-interval 0 9", "without --guidance"),
        ("class", "--guidance 2 --guidance-interval 9 0", "the lower one first"),
        ("class", "--guidance 2 --guidance-interval 0 20", "0 to 19"),
        ("class", "--guidance 2 --guidance-interval 9", "guidance-interval"),
        ("no-dropout", "--guidance 2", "--train.label-dropout 0"),
        ("no-dropout", "--guidance 2 --class 1", "--train.label-dropout 0"),
        ("no-dropout", "--init test:0", "--train.label-dropout 0"),
        ("class", "--steps 21", "--steps 21: choose from 1 to 20"),
        ("class", "--steps 0", "--steps 0"),
        ("class", "--spacing nonsense", "nonsense"),
        ("class", "--eta -0.1", "--eta -0.1"),
        ("class", "--eta 1.1", "--eta 1.1"),
        ("class", "--eta nan", "--eta nan"),
        ("class", "--eta 0.5 --sampler ddpm", "--sampler ddim"),
        ("class", "--eta 0.5 --sampler heun", "--sampler ddim"),
        ("class", "--eta 0.5 --interpolate test:0 test:1", "--interpolate"),
        ("class", "--v-posterior 2", "--v-posterior 2"),
        ("class", "--inpaint left test:1 --init test:0", "one of --inpaint and --init"),
        ("class", "--interpolate test:0 test:1 --init test:0", "one of --interpolate and --init"),
        ("class", "--inpaint left test:1 --interpolate test:0 test:1 --init test:0", "one of"),
        ("class", "--image test:0", "shown no image"),
        ("upscale", "--init test:0", "lowres"),
        ("upscale", "--inpaint left test:0", "--image, not --inpaint"),
        ("upscale", "--interpolate test:0 test:1", "--image, not --interpolate"),
        ("class", "--init test:0 --strength 0", "--strength 0"),
        ("class", "--init test:0 --strength 1.5", "--strength 1.5"),
        ("class", "--init test:0 --strength -1", "--strength -1"),
        ("class", "--init test:0 --strength nan", "--strength nan"),
        ("class", "--strength 0.5", "with --init or --interpolate"),
        ("class", "--inpaint left test:0 --strength 0.5", "with --init or --interpolate"),
        ("class", "--init test:0 --strength 0.5 --steps 1", "leaves none of the 1 steps"),
        ("class", "--init test:0 --strength 0.05 --steps 5 --spacing trailing", "leaves none of the 5 steps"),
        ("class", "--interpolate test:0 test:1 --sampler ddpm", "deterministic"),
        ("zero-snr", "--interpolate test:0 test:1 --steps 1", "--steps of at least 2"),
        ("class", "--interpolate test:0", "interpolate"),
        ("class", "--inpaint left", "inpaint"),
        ("class", "--inpaint left test:0 --resample 0", "--resample 0"),
        ("class", "--resample 2", "with --inpaint"),
        ("class", "--inpaint left test:0 --resample 2", "add --sampler ddpm"),
        ("class", "--v-posterior 1", "add --sampler ddpm"),
        ("class", "--inpaint small.png photo.png", "small.png is 14 x 14 pixels, the image photo.png 28 x 28"),
        ("class", "--inpaint large.png test:0", "large.png is 56 x 56 pixels, the image test:0 28 x 28"),
        ("class", "--inpaint nowhere.png photo.png", "nowhere.png"),
        ("class", "--inpaint left nowhere.png", "nowhere.png"),
        ("class", "--inpaint text.png photo.png", "text.png"),
        ("class", "--init nowhere.png", "nowhere.png cannot be read as an image"),
        ("class", "--init folder", "folder"),
        ("class", "--init text.png", "text.png"),
        ("class", "--init cut.png", "cut.png"),
        ("class", "--init spoilt.png", "spoilt.png"),
        ("class", "--init bomb.bmp", "bomb.bmp"),
        ("class", "--init test:500", "test:500: the test set has images test:0 to test:499"),
        ("class", "--init test:-1", "test:-1"),
        ("class", "--init test:x", "test:x"),
        ("class", "--init test:", "test:"),
        ("class", "--interpolate test:0 test:500", "test:500"),
        ("class", "--inpaint left test:500", "test:500"),
        ("upscale", "--image nowhere.png", "nowhere.png"),
        ("upscale", "--image test:0 test:500", "test:500"),
    ],
)
def test_sample_refuses_what_does_not_fit(runs, files, run, args, words):
    before = tree(files), tree(runs / run)
    assert_refused(call(sample, runs / run, "--steps", 3, *args.split()), words)
    assert (tree(files), tree(runs / run)) == before


# Models that come with the package


@pytest.fixture
def package(runs, tmp_path, monkeypatch):
    """Its folder of weights, with two models to stand in for those that it has; one works in another folder."""
    weights = tmp_path / "weights"
    for name, run in (("a-first", "class"), ("b-second", "plain")):
        (weights / name).mkdir(parents=True)
        newest = max((runs / run / "checkpoints").iterdir())
        for file in (runs / run / "config.json", newest / "state.json", newest / "ema.safetensors"):
            shutil.copy(file, weights / name)
        scores = {"samples": {"fid": 12.345, "class_accuracy": 0.914}, "floor": {"fid": 0.678, "class_accuracy": 0.95}}
        (weights / name / "evaluation.json").write_text(json.dumps(scores))
    monkeypatch.setattr(presets, "WEIGHTS", weights)
    monkeypatch.setattr(sample, "WEIGHTS", weights)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return weights


def test_the_list_of_models(package, tmp_path):
    before = tree(tmp_path)
    code, out, err = call(sample, "--list")
    size = (package / "a-first/ema.safetensors").stat().st_size / 2**20
    line = f"{size:.1f} MB, FID 12.35 (of real images 0.68), class accuracy 91.4%"
    assert code == 0 and [row.split(maxsplit=1) for row in out.splitlines()][0] == ["a-first", line], err
    assert [row.split()[0] for row in out.splitlines()] == ["a-first", "b-second"]
    assert tree(tmp_path) == before


def test_no_run_is_the_first_model_of_the_package(package, runs, draw, tmp_path):
    """As its run draws; the picture goes to where one works, and the package stays as it is."""
    before = tree(package), tree(Path(presets.__file__).parent)
    args = ["--num", 4, "--batch-size", 4, "--steps", 3]
    code, out, err = call(sample, *args, "--npz", "x.npz")
    assert code == 0 and "Traceback" not in err and out.endswith("sample.png, x.npz\n"), err
    assert sorted(path.name for path in Path().iterdir()) == ["sample.png", "x.npz"]
    images = np.load("x.npz")["images"]
    assert abs(images.astype(int) - draw("class")).max() <= 1
    code, out, err = call(sample, "b-second", *args, "--npz", "y.npz")
    assert code == 0, err
    assert abs(np.load("y.npz")["images"].astype(int) - draw("plain")).max() <= 1
    assert (tree(package), tree(Path(presets.__file__).parent)) == before


def test_a_folder_goes_before_a_model_of_its_name(package, runs):
    shutil.copytree(runs / "class", "b-second")
    assert presets.run_folders("b-second") == (Path("b-second/checkpoints/step-0000006"), Path("b-second"))
    folder = package / "a-first"
    assert presets.run_folders("a-first") == (folder, folder)
    assert presets.run_folders(folder / "ema.safetensors") == (folder, folder)


def test_what_a_model_of_the_package_has_not(package):
    before = tree(package)
    for args, words in (("--weights model", "model.safetensors"), ("--ema-length 0.1", "--train.ema-lengths")):
        assert_refused(call(sample, *args.split()), words)
    assert tree(package) == before and list(Path().iterdir()) == []


@pytest.mark.skipif(not presets.bundled_models(), reason="none is there")
@pytest.mark.parametrize("name", presets.bundled_models())
def test_the_models_that_are_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(sample, "--list")
    assert code == 0 and any(line.startswith(f"{name} ") and "FID" in line for line in out.splitlines()), err
    before = tree(presets.WEIGHTS)
    code, out, err = call(sample, name, "--num", 10, "--steps", 2, "--npz", "x.npz")
    assert code == 0 and np.load("x.npz")["images"].std() > 20, err
    assert tree(presets.WEIGHTS) == before and sorted(path.name for path in tmp_path.iterdir()) == ["sample.png", "x.npz"]


def test_no_run_where_no_model_came_with_the_package(package, monkeypatch, tmp_path):
    monkeypatch.setattr(presets, "WEIGHTS", tmp_path / "nothing")
    code, out, _ = call(sample, "--list")
    assert code == 0 and out.strip() == ""
    assert_refused(call(sample), "which run?")


# Classes and guidance


def test_labels_in_turn_by_columns(draw, tmp_path):
    """Image i is of class i mod 10, the same as of that class alone; in column i mod 10, where they fill the rows."""
    in_turn = draw("class", "--num", 20)
    assert in_turn.shape == (20, 28, 28, 1)
    np.testing.assert_array_equal(draw.labels, np.arange(20) % 10)
    assert draw.labels.dtype == np.int32
    np.testing.assert_array_equal(cells(tmp_path / "out.png", 10, scale=3, below=CAPTION), in_turn[..., 0])
    for label in (0, 1, 9):
        alone = draw("class", "--num", 12, "--class", label).astype(int)
        np.testing.assert_array_equal(draw.labels, [label] * 12)
        assert abs(alone[label] - in_turn[label]).max() <= 1
        others = [i for i in range(12) if i % 10 != label]
        assert all(abs(alone[i] - in_turn[i]).max() > 1 for i in others)
    assert len(cells(tmp_path / "out.png", 4, scale=2)) == 12  # of one class: as square as may be

    twelve = draw("class", "--num", 12)
    assert abs(twelve.astype(int) - in_turn[:12]).max() <= 1
    np.testing.assert_array_equal(draw.labels, np.arange(12) % 10)
    np.testing.assert_array_equal(cells(tmp_path / "out.png", 4, scale=3, below=CAPTION), twelve[..., 0])


def test_the_name_of_each_class_is_below_its_image(draw, tmp_path):
    draw("class", "--num", 20)
    first, second = captions(tmp_path / "out.png", 2, 10).reshape(2, 10, -1)
    np.testing.assert_array_equal(first, second)
    assert (first.max(1) > 200).all() and len({name.tobytes() for name in first}) == 10
    draw("class", "--num", 13)  # 4 columns: the names go with the images
    rest = captions(tmp_path / "out.png", 4, 4)
    np.testing.assert_array_equal(rest[:13].reshape(13, -1), first[np.arange(13) % 10])
    assert (rest[13:] == 0).all()
    edges = rest[..., [0, -1]]  # no name runs into the next
    assert (edges == 0).all()


def test_where_no_name_is_known(draw, tmp_path):
    """Of one class, of none, of a folder's classes, of another number of them."""
    draw("class", "--class", 3)
    assert len(cells(tmp_path / "out.png", 2, scale=2)) == 4
    draw("plain")
    assert draw.labels is None and len(cells(tmp_path / "out.png", 2, scale=2)) == 4
    draw("folder-classes", "--num", 6)
    assert len(cells(tmp_path / "out.png", 3, 8, scale=2)) == 6
    np.testing.assert_array_equal(draw.labels, [0, 1, 2] * 2)


def test_an_edit_without_a_class_has_no_labels(draw):
    draw("class", "--init", "test:0")
    assert draw.labels is None
    draw("class", "--init", "test:0", "--class", 7)
    np.testing.assert_array_equal(draw.labels, [7] * 4)


def test_guidance_of_one_is_the_plain_network_and_of_none_knows_no_class(draw):
    plain = draw("class", "--class", 3)
    np.testing.assert_array_equal(draw("class", "--class", 3, "--guidance", 1), plain)
    without = draw("class", "--class", 3, "--guidance", 0)
    assert (without != plain).any()
    np.testing.assert_array_equal(draw("class", "--class", 7, "--guidance", 0), without)
    np.testing.assert_array_equal(draw("class", "--guidance", 0), without)
    assert (draw("class", "--class", 7) != plain).any()
    # An edit without --class is told of none either
    edit = ["--init", "test:0", "--strength", 1]
    without = draw("class", *edit)
    np.testing.assert_array_equal(draw("class", *edit, "--class", 3, "--guidance", 0), without)
    assert (draw("class", *edit, "--class", 3) != without).any()


def test_guidance_and_what_tempers_it(draw):
    plain, guided = draw("class"), draw("class", "--guidance", 8)
    near, far = rms(draw("class", "--guidance", 2), plain), rms(guided, plain)
    assert 0 < near < far
    assert (draw("class", "--guidance", 8, "--guidance-rescale", 0.7) != guided).any()
    np.testing.assert_array_equal(draw("class", "--guidance", 8, "--guidance-interval", 0, T - 1), guided)
    nowhere = draw("class", "--guidance", 8, "--guidance-interval", 1, 9)  # the 3 steps are at 19, 10 and 0
    assert abs(nowhere.astype(int) - plain).max() <= 1
    first = draw("class", "--guidance", 8, "--guidance-interval", 10, 10)
    assert (first != guided).any() and (first != plain).any()


def test_guidance_by_hand(draw, runs):
    """One step from the image's own noise: x_0 = uncond + 9 (cond - uncond), clipped at the end and nowhere before."""
    images = draw("class", "--init", "test:0", "--strength", 1 / T, "--steps", T, "--class", 3, "--guidance", 9)
    net, diffusion, _, _ = sample.load_run(runs / "class", "ema", None)
    a = diffusion.alphas_cumprod[0]
    noise = np.stack([np.random.default_rng((0, i)).standard_normal((1, 28, 28), dtype=np.float32) for i in range(4)])
    x = (np.sqrt(a) * to_float(TEST_IMAGES[:1]) + np.sqrt(1 - a) * noise).astype(np.float32)
    t, no_guess = Tensor(np.zeros(4, np.int32)), Tensor(np.zeros_like(x))
    cond, uncond = (
        (x - np.sqrt(1 - a) * net(Tensor(x), t, Tensor(np.full(4, label, np.int32)), no_guess).asnumpy()) / np.sqrt(a)
        for label in (3, 10)
    )
    assert abs(images.astype(int) - to_uint8(uncond + 9 * (cond - uncond))).max() <= 1
    clipped = cond.clip(-1, 1), uncond.clip(-1, 1)
    assert abs(images.astype(int) - to_uint8(clipped[1] + 9 * (clipped[0] - clipped[1]))).max() > 1


def test_a_runs_own_guidance(draw, runs, tmp_path):
    """Its grids have it, and what sample.py draws if not told; an edit without a class has nothing to be guided to."""
    own = ["--train.sample-guidance", 5, "--train.sample-guidance-interval", 10, 19]
    run = shutil.copytree(runs / "class", tmp_path / "run")
    code, _, err = call(train, "--run-dir", run, *CLASSES, "--train.total-steps", 7, "--train.sample-num", 10, *own)
    assert code == 0, err
    args = "--sampler ddpm --steps 2 --num 10 --batch-size 10".split()
    images, told = draw(run, *args), draw(run, *args, "--guidance", 5, "--guidance-interval", 10, 19)
    np.testing.assert_array_equal(images, told)
    assert abs(cells(run / "samples/step-0000007.png", 10, scale=2).astype(int) - images[..., 0]).max() <= 1
    everywhere = draw(run, *args, "--guidance", 5)
    for other in (everywhere, draw(run, *args, "--guidance-interval", 0, 5), draw(run, *args, "--guidance", 1)):
        assert abs(other.astype(int) - images).max() > 1
    edit = ["--init", "test:0", "--strength", 1]
    np.testing.assert_array_equal(draw(run, *edit), draw(run, *edit, "--guidance", 1))
    assert (draw(run, *edit, "--class", 3) != draw(run, *edit, "--class", 3, "--guidance", 1)).any()
    between = ["--interpolate", "test:0", "test:1", "--class", 3]
    np.testing.assert_array_equal(draw(run, *between), draw(run, *between, "--guidance", 1))


def test_classes_without_dropout_can_be_drawn(draw):
    assert (draw("no-dropout", "--class", 3) != draw("no-dropout", "--class", 4)).any()
    assert draw("no-dropout", "--class", 3, "--init", "test:0").shape == (4, 28, 28, 1)


# Samplers


def test_every_sampler_and_spacing_runs(draw, tmp_path):
    args = ["--steps", 6]
    by_sampler = {name: draw("class", *args, "--sampler", name) for name in SAMPLERS}
    by_spacing = {name: draw("class", *args, "--spacing", name) for name in SPACINGS}
    for found in (by_sampler, by_spacing):
        assert all(images.shape == (4, 28, 28, 1) and images.std() > 10 for images in found.values())
        assert len({images.tobytes() for images in found.values()}) == len(found)
    np.testing.assert_array_equal(by_sampler["ddim"], by_spacing["linspace"])
    heun = {name: draw("class", *args, "--sampler", "heun", "--spacing", name) for name in ("linspace", "logsnr")}
    np.testing.assert_array_equal(by_sampler["heun"], heun["logsnr"])  # what suits the sampler, if nothing is said
    assert (heun["linspace"] != heun["logsnr"]).any()


def test_noise_of_ddim_and_ddpm(draw):
    ddim = draw("class")
    np.testing.assert_array_equal(draw("class", "--eta", 0), ddim)
    full = draw("class", "--eta", 1)
    assert (full != ddim).any() and (draw("class", "--eta", 0.5) != full).any()
    ddpm = draw("class", "--sampler", "ddpm")
    assert abs(full.astype(int) - ddpm).max() <= 1  # eta 1 is DDPM
    assert (draw("class", "--sampler", "ddpm", "--v-posterior", 1) != ddpm).any()
    np.testing.assert_array_equal(draw("class", "--sampler", "ddpm", "--v-posterior", 0), ddpm)


# Conditions


def test_upscaling_shows_what_was_given_what_came_of_it_and_the_original(draw, tmp_path):
    upscaled = draw("upscale")
    shown, out, original = cells(tmp_path / "out.png", 12, scale=2).reshape(4, 3, 28, 28).swapaxes(0, 1)
    np.testing.assert_array_equal(out, upscaled[..., 0])
    np.testing.assert_array_equal(original, TEST_IMAGES[:4, ..., 0])
    means = TEST_IMAGES[:4].astype(float).reshape(4, 7, 4, 7, 4).mean((2, 4)).repeat(4, 1).repeat(4, 2)
    assert abs(shown - means).max() <= 0.5 + 1e-3

    one = draw("upscale", "--image", "test:1").astype(int)
    assert abs(one[1] - upscaled[1]).max() <= 1  # the same image and noise
    assert len({image.tobytes() for image in one}) == 4
    np.testing.assert_array_equal(cells(tmp_path / "out.png", 12, scale=2)[2::3], TEST_IMAGES[[1] * 4, ..., 0])
    draw("upscale", "--image", "test:5", "test:3", "test:8")
    np.testing.assert_array_equal(cells(tmp_path / "out.png", 12, scale=2)[2::3], TEST_IMAGES[[5, 3, 8, 5], ..., 0])


def test_more_images_than_the_test_set_has(draw, tmp_path):
    assert draw("gray", "--num", 4).shape == (4, 8, 8, 3)
    original = cells(tmp_path / "out.png", 12, 8, 2)[2::3]
    np.testing.assert_array_equal(original[3], original[0])
    assert (original[1] != original[0]).any()


def test_conditions_of_colour_images(draw, runs, tmp_path):
    """Gray is shown in gray beside RGB; of a masked image what is hidden is mid-gray."""
    draw("gray", "--image", runs / "photos/0.png")
    shown, _, original = cells(tmp_path / "out.png", 12, 8, 2)[:3]
    assert abs(shown - original.mean(-1, keepdims=True)).max() <= 0.5 + 1e-3
    draw("mask")
    shown, _, original = cells(tmp_path / "out.png", 12, 8, 2)[:3]
    hidden = (shown == 128).all(-1)
    assert 4 <= hidden.sum() <= 36
    np.testing.assert_array_equal(shown[~hidden], original[~hidden])


# Inpainting


@pytest.mark.parametrize(
    "mask, painted",
    [
        ("left", np.s_[:, :14]),
        ("right", np.s_[:, 14:]),
        ("top", np.s_[:14]),
        ("bottom", np.s_[14:]),
        ("center", np.s_[7:21, 7:21]),
        ("mask.png", np.s_[3:9, 20:]),
    ],
)
def test_inpainting_keeps_the_known_pixels(draw, tmp_path, monkeypatch, mask, painted):
    monkeypatch.chdir(tmp_path)
    hidden = np.zeros((28, 28), bool)
    hidden[painted] = True
    Image.fromarray(hidden.astype(np.uint8) * 255).save("mask.png")
    images = draw("class", "--inpaint", mask, "test:2")
    original = TEST_IMAGES[2]
    np.testing.assert_array_equal(images[:, ~hidden], np.broadcast_to(original[~hidden], (4, (~hidden).sum(), 1)))
    assert all((image[hidden] != original[hidden]).mean() > 0.5 for image in images)
    assert len({image.tobytes() for image in images}) == 4
    sheet = cells(tmp_path / "out.png", 6)
    np.testing.assert_array_equal(sheet[0], original[..., 0])
    np.testing.assert_array_equal(sheet[1], np.where(hidden, 128, original[..., 0]))
    np.testing.assert_array_equal(sheet[2:], images[..., 0])


EXTRAS = (["--sampler", "ddpm", "--resample", 3], ["--eta", 1])


@pytest.mark.parametrize("args", [*[["--sampler", name] for name in SAMPLERS], *EXTRAS], ids=str)
def test_every_way_of_inpainting_keeps_the_known_pixels(draw, args):
    images = draw("class", "--inpaint", "left", "test:2", "--class", 1, "--guidance", 2, *args)
    np.testing.assert_array_equal(images[:, :, 14:], TEST_IMAGES[[2] * 4, :, 14:])
    assert (images[:, :, :14] != TEST_IMAGES[2, :, :14]).any()


def test_a_mask_of_another_size_than_the_networks(draw, files):
    """Mask and image of one size are shrunk together."""
    mask, photo = np.zeros((56, 56), np.uint8), np.random.default_rng(0).integers(0, 256, (56, 56), np.uint8)
    mask[:, 28:] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(photo).save("photo.png")
    images = draw("plain", "--inpaint", "mask.png", "photo.png")
    given = cells(files / "out.png", 6)[0]
    np.testing.assert_array_equal(images[:, :, :13, 0], np.broadcast_to(given[:, :13], (4, 28, 13)))
    assert (images[:, :, 15:, 0] != given[:, 15:]).mean() > 0.5


def test_resampling_calls_the_network_more_often(draw, tmp_path):
    plain = draw("class", "--inpaint", "left", "test:2", "--gif", tmp_path / "x.gif", "--sampler", "ddpm")
    assert picture(tmp_path / "x.gif")[2] == 3
    resampled = draw(
        "class", "--inpaint", "left", "test:2", "--gif", tmp_path / "x.gif", "--sampler", "ddpm", "--resample", 4
    )
    assert picture(tmp_path / "x.gif")[2] == 12
    assert (resampled != plain).any()


# Image to image


def test_the_strength_of_image_to_image(draw, tmp_path):
    """At the last timestep alone there is next to no noise to take away; the further back, the less is left of the image."""
    image = TEST_IMAGES[3]
    near, middle, far = (draw("class", "--init", "test:3", "--strength", s, "--steps", 10) for s in (0.05, 0.3, 1))
    distances = [rms(images, image) for images in (near, middle, far)]
    assert 0 < distances[0] < 25 and 1.5 * distances[0] < distances[1] < distances[2]
    assert len({i.tobytes() for i in near}) == len({i.tobytes() for i in far}) == 4
    sheet = cells(tmp_path / "out.png", 5)
    np.testing.assert_array_equal(sheet[0], image[..., 0])
    np.testing.assert_array_equal(sheet[1:5], far[..., 0])
    np.testing.assert_array_equal(
        draw("class", "--init", "test:3", "--steps", 10), draw("class", "--init", "test:3", "--steps", 10, "--strength", 0.6)
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_with_every_sampler(draw, files, sampler):
    images = draw("plain", "--init", "photo.png", "--sampler", sampler, "--strength", 0.5, "--steps", 6)
    assert images.shape == (4, 28, 28, 1) and len({image.tobytes() for image in images}) == 4
    np.testing.assert_array_equal(cells(files / "out.png", 5)[0], np.full((28, 28), 200))


# Interpolation


def test_interpolation_leads_from_one_image_to_the_other(draw, tmp_path):
    """From little noise even an untrained network comes back to the ends, which are printed."""
    args = ["--interpolate", "test:0", "test:1", "--strength", 0.2, "--steps", T]
    images = draw("class", "--num", 5, *args)
    assert images.shape == (5, 28, 28, 1) and len({image.tobytes() for image in images}) == 5
    ends = TEST_IMAGES[0], TEST_IMAGES[1]
    errors = rms(images[0], ends[0]), rms(images[-1], ends[1])
    assert max(errors) < 0.2 * rms(*ends)
    said = [float(word) for word in draw.out.splitlines()[0].split(": ")[1].split(", ")]
    np.testing.assert_allclose(said, [error / 127.5 for error in errors], atol=0.01)
    towards = [rms(image, ends[1]) for image in images]
    assert all(later < earlier for earlier, later in zip(towards[:-1], towards[1:], strict=True))
    sheet = cells(tmp_path / "out.png", 7)
    np.testing.assert_array_equal(sheet, np.stack([ends[0], *images, ends[1]])[..., 0])
    np.testing.assert_array_equal(draw("class", "--num", 5, *args, "--seed", 7), images)  # no noise is drawn


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddpm"])
def test_interpolation_with_every_ode_sampler(draw, sampler):
    images = draw("class", "--interpolate", "test:0", "test:1", "--sampler", sampler, "--steps", 4, "--class", 2)
    assert len({image.tobytes() for image in images}) == 4


def test_interpolation_of_one_and_at_zero_snr(draw, tmp_path):
    assert draw("class", "--num", 1, "--interpolate", "test:0", "test:1").shape == (1, 28, 28, 1)
    assert len(cells(tmp_path / "out.png", 3)) == 3
    assert len({i.tobytes() for i in draw("zero-snr", "--interpolate", "test:0", "test:1")}) > 1


# All of them


EDITS = {
    "class": [["--class", 3], ["--init", "test:0"], ["--inpaint", "top", "test:0"], ["--interpolate", "test:0", "test:1"]],
    "upscale": [[], ["--image", "test:7"]],
}


@pytest.mark.parametrize("run, args", [(run, args) for run in EDITS for args in EDITS[run]], ids=str)
def test_a_picture_an_animation_and_raw_images(draw, tmp_path, run, args):
    """One frame a step, whose last is the images in a grid; the same twice, and in batches of another size."""
    images = draw(run, "--gif", tmp_path / "x.gif", *args)
    size, _, frames = picture(tmp_path / "x.gif")
    assert frames == (2 if "--init" in args else 3) and size == (2 * (2 * 30 + 2),) * 2
    with Image.open(tmp_path / "x.gif") as gif:
        gif.seek(frames - 1)
        last = np.asarray(gif.convert("L"))[::2, ::2]
    expected = np.zeros((62, 62), np.uint8)
    for i, image in enumerate(images):
        top, left = 2 + i // 2 * 30, 2 + i % 2 * 30
        expected[top : top + 28, left : left + 28] = image[..., 0]
    np.testing.assert_array_equal(last, expected)
    np.testing.assert_array_equal(draw(run, *args), images)
    assert abs(draw(run, *args, "--batch-size", 3).astype(int) - images).max() <= 1


def test_a_few_images_are_the_first_of_many(draw):
    for run, args in (("class", ["--init", "test:0"]), ("class", ["--inpaint", "top", "test:0"]), ("mask", [])):
        assert abs(draw(run, *args, "--num", 7)[:4].astype(int) - draw(run, *args)).max() <= 1


def test_how_many_images_if_nothing_is_said(runs, tmp_path):
    for args, num in ((["--init", "test:0"], 8), ([], 64)):
        code, out, _ = call(sample, runs / "class", "--steps", 2, "--batch-size", 4, "--out", tmp_path / "x.png", *args)
        assert code == 0 and f"{num} images of step 6 in" in out


def test_the_record_of_the_class_run(runs):
    config = json.loads((runs / "class/config.json").read_text())
    assert config["model"]["num_classes"] == PRESETS["quick-class"].model.num_classes == 10
    assert config["train"]["timesteps"] == "importance" and config["train"]["learn_logvar"]
