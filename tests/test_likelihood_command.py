"""The command that measures the likelihood of images under a run."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from runs import PIXELS, UNET, assert_refused, call, succeed, untrained

from ms_diffusion.commands import likelihood
from ms_diffusion.data.batches import load_images
from ms_diffusion.likelihood import bits_per_dim
from ms_diffusion.process import DiffusionConfig

T = 9


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of untrained runs of 9 timesteps; that of `classes` differs from `plain` as it is called."""
    folder, plain = tmp_path_factory.mktemp("runs"), replace(PIXELS, diffusion=DiffusionConfig(T, "cosine", "x0"))
    configs = {
        "plain": plain,
        "classes": replace(plain, model=replace(UNET, num_classes=10)),
        "upscale": replace(plain, data=replace(PIXELS.data, condition="lowres"), model=replace(UNET, cond_channels=1)),
        "self-condition": replace(plain, model=replace(UNET, self_condition=True)),
    }
    for name, config in configs.items():
        untrained(folder / name, config, step=6)
    return folder


def numbers(line):
    return [float(n) for n in re.findall(r"-?\d+\.\d+", line)]


def test_the_bound(runs, tmp_path):
    path = tmp_path / "new" / "result.json"
    bits, parts, protocol = succeed("likelihood", runs / "plain", "--num", 2, "--json", path).splitlines()
    total, error = numbers(bits)
    written = json.loads(path.read_text())
    assert written["num"] == 2 and protocol.startswith(written["protocol"])
    assert (written["bits_per_dim"], sum(written["parts"])) == pytest.approx((total, total), abs=1e-4)
    assert error > 0 and "2 images" in bits
    assert sum(numbers(parts)) == pytest.approx(total, abs=2e-4)
    for words in (
        f"{runs / 'plain'} at step 6, ema weights",
        "fashion-mnist-mini, test split, seed 0",
        "bound, 9 timesteps",
    ):
        assert words in protocol


def test_random_timesteps_of_the_bound(runs, monkeypatch):
    """Every batch has timesteps of its own, and the error is that of the means of batches."""
    seen = []

    def denoise(x_t, t):
        seen.append((x_t.shape[0], t))
        return x_t

    monkeypatch.setattr(likelihood, "make_denoiser", lambda diffusion, net: denoise)
    out = succeed("likelihood", runs / "plain", "--num", 40, "--batch-size", 2, "--steps", 3)
    calls = [[t for _, t in seen[i : i + 3]] for i in range(0, 60, 3)]
    assert len(seen) == 60 and all(high > low > last == 0 for high, low, last in calls)
    assert {t for call in calls for t in call} == set(range(T))
    assert numbers(out)[1] > 0 and "bound, 3 random timesteps" in out


def test_the_ode(runs):
    bits, protocol = succeed("likelihood", runs / "plain", "--num", 2, "--method", "ode", "--steps", 3).splitlines()
    assert 0 < numbers(bits)[0] < 100 and "ode, 3 timesteps" in protocol


@pytest.mark.parametrize("method", ["bound", "ode"])
def test_with_a_known_denoiser(runs, monkeypatch, method):
    """Which images it takes, with which labels and noise, and the mean and standard error that it prints."""
    pictures, labels = load_images("fashion-mnist-mini", None, "train", 28, 1)
    rng, seen, kept = np.random.default_rng(7), [], {}
    chosen = rng.permutation(len(pictures))[:5]

    def denoise(x_t, t, label):
        seen.append((x_t.asnumpy(), label.asnumpy(), t))
        return x_t

    def divergence(x_t, t, probes, label):
        assert (abs(probes) == 1).all() and 0.4 < (probes > 0).mean() < 0.6
        assert (kept.setdefault(len(seen) // 2, probes) == probes).all()  # the same at both calls of a batch
        seen.append((x_t, label.asnumpy(), t))
        return x_t, 0 * x_t.sum((1, 2, 3))

    monkeypatch.setattr(likelihood, "make_denoiser", lambda diffusion, net: denoise)
    monkeypatch.setattr(likelihood, "make_divergence", lambda diffusion, net: divergence)
    flags = ["--split", "train", "--num", 5, "--seed", 7, "--batch-size", 2, "--method", method]
    flags += ["--steps", 2] if method == "ode" else []
    out = succeed("likelihood", runs / "classes", *flags)
    calls = T if method == "bound" else 2
    assert [len(x) for x, _, _ in seen] == [2] * calls * 2 + [1] * calls
    diffusion = DiffusionConfig(T, "cosine", "x0").build()
    images = pictures[chosen].transpose(0, 3, 1, 2) / 127.5 - 1
    for i, (x, label, t) in enumerate(seen):
        first = i // calls * 2
        np.testing.assert_array_equal(label, labels[chosen[first : first + 2]])
        expected = images[first : first + 2]
        if method == "bound":
            a = diffusion.alphas_cumprod[t]
            assert abs((x - math.sqrt(a) * expected) / math.sqrt(1 - a)).mean() == pytest.approx(0.8, abs=0.05)
        elif i % calls == 0:  # dequantised by less than half a level
            u = (x - expected) * 127.5
            assert abs(u).max() < 0.5 + 1e-9 and abs(u.mean()) < 0.1 and u.std() == pytest.approx(12**-0.5, rel=0.1)
    if method == "bound":
        bits = [bits_per_dim(lambda x, t: x, diffusion, images[i : i + 2], rng).total for i in (0, 2, 4)]
        bits = np.concatenate(bits)
        assert numbers(out)[:2] == pytest.approx([bits.mean(), bits.std(ddof=1) / math.sqrt(5)], rel=1e-3)


@pytest.mark.parametrize(
    ("run", "flags", "words"),
    [
        ("plain", "--num 0", "--num is 0"),
        ("plain", "--batch-size 0", "--batch-size is 0"),
        ("plain", "--seed -1", "--seed is -1"),
        ("plain", "--num 501", "500 images"),
        ("plain", "--method ode --steps 1", "--steps is 1"),
        ("plain", "--method ode --steps 10", "--steps is 10"),
        ("plain", "--steps 10", "--steps is 10"),
        ("plain", "--split valid", "valid"),
        ("plain", "--nun 3", "--num"),
        ("upscale", "", "image condition"),
        ("self-condition", "", "self-conditioning"),
        ("nowhere", "", "nowhere"),
    ],
)
def test_what_is_refused(runs, run, flags, words):
    assert_refused(call("likelihood", runs / run, *flags.split()), words)
