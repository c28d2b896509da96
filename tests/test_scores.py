"""Scores of samples beside their floor: by definition, on files, on real images; with features that need no network."""

import json

import numpy as np
import pytest
from PIL import Image

from ms_diffusion.data.fashion_mnist import center_crop, load_fashion_mnist_mini
from ms_diffusion.metrics.distances import frechet_distance, mean_and_covariance, precision_recall, psnr, ssim
from ms_diffusion.metrics.scores import (
    ROWS,
    Reference,
    Samples,
    choose,
    format_report,
    halve,
    nearest,
    read_npz,
    real_images,
    score,
)
from ms_diffusion.runtime import UserError

IMAGES, LABELS = load_fashion_mnist_mini("train")  # (2000, 28, 28, 1) uint8, (2000,) int32
TEST_IMAGES, TEST_LABELS = load_fashion_mnist_mini("test")
RECONSTRUCTION_SCORES = {"psnr", "ssim"}


class Means:
    """Instead of `Features`: means over 4 x 7 blocks of pixels, and as logits the first ten of them."""

    name, num = "means", 28

    def check(self, shape):
        if shape != (28, 28, 1):
            raise UserError(f"not {shape}")

    def __call__(self, images):
        self.check(images.shape[1:])
        means = images.reshape(len(images), 4, 7, 7, 4).mean((2, 4)).reshape(-1, 28).astype(np.float32)
        return {"features": means, "logits": means[:, :10]}

    def cached(self, images, folder=None):
        return self(images)


def reference(num=300, name="fashion-mnist-mini", size=28, **options):
    return Reference(Means(), name, None, size, 1, num, **options)


# Scores by definition


def test_score():
    found, real = Means()(IMAGES[:300]), Means()(TEST_IMAGES)
    scores = score(found, real, LABELS[:300])
    features = found["features"], real["features"]
    fid = frechet_distance(*mean_and_covariance(features[0]), *mean_and_covariance(features[1]))
    assert scores["fid"] == fid and precision_recall(*features).items() <= scores.items()
    classes, real_classes = (each["logits"].argmax(1) for each in (found, real))
    assert scores["class_accuracy"] == np.mean(classes == LABELS[:300])
    shares = [[np.mean(each == i) for i in range(10)] for each in (classes, real_classes)]
    assert scores["class_balance"] == pytest.approx(1 - np.abs(np.subtract(*shares)).sum() / 2)
    assert "class_accuracy" not in score(found, real, None)
    assert set(scores) == set(ROWS) - RECONSTRUCTION_SCORES - {"nearest_train"}


def test_nearest_finds_the_nearest_of_all():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (300, 6, 5, 3), np.uint8)
    images = rng.integers(0, 256, (230, 6, 5, 3), np.uint8)  # in more than one block
    distances = np.sqrt(((images[:, None].astype(float) - train) ** 2).mean((2, 3, 4)))
    index, distance = nearest(images, train)
    np.testing.assert_array_equal(index, distances.argmin(1))
    np.testing.assert_allclose(distance, distances.min(1), rtol=1e-5)


def test_nearest_finds_copies():
    images = TEST_IMAGES[:12].copy()
    images[[3, 7]] = IMAGES[[1234, 56]]
    images[0] = np.minimum(IMAGES[99].astype(int) + 2, 255)  # lighter by 2, which is the distance
    index, distance = nearest(images, IMAGES)
    assert index[[0, 3, 7]].tolist() == [99, 1234, 56]
    assert distance[0] == pytest.approx(2, abs=0.1) and distance[3] == distance[7] == 0
    assert np.delete(distance, [3, 7]).min() > 1


# Real images


def test_splits_of_a_data_set():
    splits = real_images("fashion-mnist-mini", None, 28, 1)
    np.testing.assert_array_equal(splits["train"][0], IMAGES)
    np.testing.assert_array_equal(splits["test"][1], TEST_LABELS)


def test_a_folder_of_images_is_halved(tmp_path):
    for i in range(41):
        path = tmp_path / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(path)
    splits = real_images("image-folder", str(tmp_path), 8, 1)
    values = {split: images[:, 0, 0, 0].tolist() for split, (images, _) in splits.items()}
    assert {split: len(each) for split, each in values.items()} == {"train": 21, "test": 20}
    assert sorted(values["train"] + values["test"]) == list(range(41))
    for images, labels in splits.values():
        np.testing.assert_array_equal(labels, images[:, 0, 0, 0] % 2)  # each image keeps its label


def test_choices_are_random_repeatable_and_ordered():
    images, labels = choose(np.arange(1000), -np.arange(1000), 100)
    np.testing.assert_array_equal(images, -labels)
    assert len(set(images)) == 100 and (np.diff(images) > 0).all() and 400 < images.mean() < 600
    np.testing.assert_array_equal(images, choose(np.arange(1000), -np.arange(1000), 100)[0])
    assert len(choose(images, labels, 200)[0]) == 100


# Reports


@pytest.mark.parametrize("against", ["train", "test"])
def test_real_images_are_their_own_floor(against):
    """500 test images, or as many training images, against the other split."""
    split = {"train": "test", "test": "train"}[against]
    ref = reference(500, against=against, against_num=400)
    record = ref.score(ref.real_samples(split))
    assert record["protocol"] == (
        f"means, 28 features; real {split} images; N = 500 against 400 {against} images of fashion-mnist-mini; "
        f"floor: 500 real {split} images"
    )
    distance, floor_distance = (record[kind].pop("nearest_train") for kind in ("samples", "floor"))
    assert record["samples"] == record["floor"] and floor_distance > 5
    assert distance == (0 if split == "train" else floor_distance)


def test_report_of_samples():
    """All scores of noise are worse than the floor, and the table has them beside each other."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 28, 28, 1), np.uint8)
    record = json.loads(json.dumps(reference().score(Samples(noise, None, "noise"))))
    samples, floor = record["samples"], record["floor"]
    assert set(floor) == set(ROWS) - RECONSTRUCTION_SCORES == {*samples, "class_accuracy"}
    assert samples["fid"] > 20 * floor["fid"] and samples["recall"] < 0.1 < 0.8 < floor["recall"]
    head, *rows, protocol = format_report(record).splitlines()
    assert head.split() == ["samples", "floor"] and protocol == record["protocol"]
    assert [row[:40].strip() for row in rows] == [ROWS[name][0].strip() for name in ROWS if name in floor]
    columns = dict(zip([name for name in ROWS if name in floor], (row[40:].split() for row in rows), strict=True))
    assert columns["class_accuracy"] == ["-", f"{100 * floor['class_accuracy']:.2f}%"]
    assert columns["fid"] == [f"{samples['fid']:.4f}", f"{floor['fid']:.4f}"]


def test_reconstructions_and_borders():
    """The border of larger images is cropped before all but the nearest training image is computed."""
    ref = reference(100, size=32)
    originals = ref.splits["test"][0][:100]
    samples = np.clip(originals.astype(int) + 3, 0, 255).astype(np.uint8)
    scores = ref.score(Samples(samples, None, "reconstructions"), originals)["samples"]
    pair = center_crop(samples), center_crop(originals)
    assert (scores["psnr"], scores["ssim"]) == (psnr(*pair).mean(), ssim(*pair).mean())


def test_arrays_and_unknown_classes():
    """The classifier does not know the classes of images that are not Fashion-MNIST."""
    splits = halve(IMAGES[:300], LABELS[:300])
    ref = reference(100, name="mine", splits=splits)
    record = ref.score(Samples(TEST_IMAGES[:100], TEST_LABELS[:100], "samples"))
    assert "against 100 test images of mine" in record["protocol"]
    for scores in (record["samples"], record["floor"]):
        assert not {"class_accuracy", "class_balance"} & set(scores)


def test_what_cannot_be_scored_is_refused_at_once():
    with pytest.raises(UserError, match="^x.npz: 28 images are too few for 28 features"):
        reference(28, num_name="x.npz")
    with pytest.raises(UserError, match="^--against-num: 5 images are too few"):
        reference(against_num=5)
    with pytest.raises(UserError, match="^mine, train: 20 images are too few"):
        reference(name="mine", splits=halve(IMAGES[:40], LABELS[:40]))
    with pytest.raises(UserError, match=r"not \(14, 14, 1\)"):
        reference(size=14)


def test_picture(tmp_path):
    ref = reference(100)
    for images in (IMAGES[:100], IMAGES[:3].repeat(3, -1)):
        if images.shape[-1] == 3:
            ref = Reference(
                Means(), "mine", None, 28, 1, 100, splits={s: (x.repeat(3, -1), y) for s, (x, y) in ref.splits.items()}
            )
        ref.save_picture(tmp_path / "a.png", Samples(images, None, ""))
        with Image.open(tmp_path / "a.png") as picture:
            assert np.ptp(np.asarray(picture.convert("L"))) > 100


# Files


def test_npz_files(tmp_path):
    np.savez(tmp_path / "x.npz", images=IMAGES[:9], labels=LABELS[:9].astype(np.uint8), other=np.zeros(3))
    samples = read_npz(tmp_path / "x.npz", 5)
    np.testing.assert_array_equal(samples.images, IMAGES[:5])
    np.testing.assert_array_equal(samples.labels, LABELS[:5])
    assert samples.description == str(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", images=IMAGES[:9])
    assert len(read_npz(tmp_path / "x.npz").images) == 9 and read_npz(tmp_path / "x.npz").labels is None


def arrays(**values):
    return lambda path: np.savez_compressed(path, **values)


def truncated(path):
    arrays(images=IMAGES[:150])(path)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be read as an .npz file.*No such file"),
        (lambda path: path.write_text("text"), "cannot be read as an .npz file"),
        (truncated, "cannot be read as an .npz file"),
        (arrays(images=np.array([None, "x"], object)), "cannot be read as an .npz file"),
        (arrays(points=IMAGES[:3]), "has no array `images`"),
        (arrays(images=IMAGES[:3] / 255), "uint8, .* not float64"),
        (arrays(images=IMAGES[:3, :14]), "square, not 14 x 28"),
        (arrays(images=IMAGES[:3], labels=LABELS[:2]), r"3 integers, not \(2,\)"),
        (arrays(images=IMAGES[:3], labels=np.zeros(3)), "3 integers, not .* of float64"),
    ],
)
def test_bad_npz_files(tmp_path, make, message):
    make(tmp_path / "x.npz")
    with pytest.raises(UserError, match=f"x.npz.*{message}"):
        read_npz(tmp_path / "x.npz")
