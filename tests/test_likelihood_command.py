"""The command that measures the likelihood of images under a run."""

import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ms_diffusion import likelihood, runtime
from ms_diffusion.data.batches import load_images
from ms_diffusion.likelihood import bits_per_dim
from ms_diffusion.models.unet import UnetConfig
from ms_diffusion.process import GaussianDiffusion
from ms_diffusion.schedules import cosine_beta_schedule


@pytest.fixture
def call(monkeypatch, capsys):
    """The command over a small untrained run of T = 9: (exit code, stdout, stderr)."""

    def call(*args, model=None, betas=None):
        model = model or UnetConfig(dim=8, init_dim=8, dim_mults=(1,), use_convnext=False, resnet_block_groups=4)
        data = SimpleNamespace(name="fashion-mnist-mini", dir=None, size=28)
        config = SimpleNamespace(data=data, model=model, is_points=False, is_latent=False, is_autoencoder=False)
        diffusion = GaussianDiffusion(cosine_beta_schedule(9) if betas is None else betas, "x0")
        monkeypatch.setattr(likelihood, "load_run", lambda run, weights: (model.build(), diffusion, config, 6))
        monkeypatch.setattr(sys, "argv", ["likelihood.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runtime.run_program(likelihood.main)
        return end.value.code, *capsys.readouterr()

    return call


def numbers(line):
    return [float(n) for n in re.findall(r"-?\d+\.\d+", line)]


def test_command_bound(call):
    code, out, err = call("some/run", "--num", 2, "--device", "cpu")
    assert code == 0 and "Traceback" not in err
    bits, parts, protocol = out.splitlines()
    total, error = numbers(bits)
    assert error > 0 and "2 images" in bits
    assert sum(numbers(parts)) == pytest.approx(total, abs=2e-4)
    assert protocol.startswith(
        "some/run at step 6, ema weights; fashion-mnist-mini, test split, seed 0; bound, 9 timesteps; "
    )
    assert call("some/run", "--num", 2, "--device", "cpu")[1].splitlines()[:2] == [bits, parts]
    assert call("some/run", "--num", 1, "--device", "cpu")[1].splitlines()[0].split()[2] == "nan"


def test_command_ode(call):
    code, out, err = call("some/run", "--num", 2, "--method", "ode", "--steps", 3, "--device", "cpu")
    assert code == 0, err
    bits, protocol = out.splitlines()
    assert 0 < numbers(bits)[0] < 100 and "ode, 3 timesteps" in protocol


@pytest.mark.parametrize("method", ["bound", "ode"])
def test_command_on_a_known_denoiser(call, monkeypatch, method):
    """Which images it takes, with which labels and noise, and the mean and standard error that it prints."""
    pictures, labels = load_images("fashion-mnist-mini", None, "train", 28, 1)
    rng, seen, kept = np.random.default_rng(7), [], {}
    chosen = rng.permutation(len(pictures))[:5]

    def denoise(x_t, t, label):
        seen.append((x_t.asnumpy(), label.asnumpy()))
        return x_t

    def divergence(x_t, t, probes, label):
        assert (abs(probes) == 1).all() and 0.4 < (probes > 0).mean() < 0.6
        assert (kept.setdefault(len(seen) // 2, probes) == probes).all()  # the same at both calls of a batch
        seen.append((x_t, label.asnumpy()))
        return x_t, 0 * x_t.sum((1, 2, 3))

    monkeypatch.setattr(likelihood, "make_denoiser", lambda diffusion, net: denoise)
    monkeypatch.setattr(likelihood, "make_divergence", lambda diffusion, net: divergence)
    model = UnetConfig(dim=8, dim_mults=(1,), num_classes=10)
    flags = ["--split", "train", "--num", 5, "--seed", 7, "--batch-size", 2, "--method", method, "--steps", 2]
    code, out, _ = call("run", *flags, "--device", "cpu", model=model, betas=np.full(9, 1e-3))
    assert code == 0
    calls = 9 if method == "bound" else 2
    assert [len(x) for x, _ in seen] == [2] * calls * 2 + [1] * calls
    for i, (x, label) in enumerate(seen):
        batch = chosen[i // calls * 2 :][:2]
        np.testing.assert_array_equal(label, labels[batch])
        expected = pictures[batch].transpose(0, 3, 1, 2) / 127.5 - 1  # hardly noised
        assert abs(x - expected).mean() < 0.1
        if method == "ode" and i % calls == 0:  # dequantised by less than half a level
            u = (x - expected) * 127.5
            assert abs(u).max() < 0.5 + 1e-9 and abs(u.mean()) < 0.1 and u.std() == pytest.approx(12**-0.5, rel=0.1)
    if method == "bound":
        diffusion, images = GaussianDiffusion(np.full(9, 1e-3)), pictures[chosen].transpose(0, 3, 1, 2) / 127.5 - 1
        bits = [bits_per_dim(lambda x, t: x, diffusion, images[i : i + 2], rng).total for i in (0, 2, 4)]
        bits = np.concatenate(bits)
        assert numbers(out)[:2] == pytest.approx([bits.mean(), bits.std(ddof=1) / math.sqrt(5)], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num 0", "must be at least 1"),
        ("--batch-size 0", "must be at least 1"),
        ("--seed -1", "--seed at least 0"),
        ("--num 501", "has only 500 images in its test split"),
        ("--method ode --steps 1", "choose from 2 to 9"),
        ("--method ode --steps 10", "choose from 2 to 9"),
        ("--split valid", "valid"),
        ("--nun 3", "did you mean --num"),
    ],
)
def test_bad_input_is_one_line(call, flags, message):
    code, out, err = call("run", *flags.split(), "--device", "cpu")
    assert code == 2 and not out
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1


def test_runs_that_have_no_likelihood(call):
    code, _, err = call("run", "--method", "ode", "--device", "cpu", "--steps", 2, betas=[0.3, 0.9, 1.0])
    assert code == 2 and "zero terminal SNR" in err
    for field in ({"cond_channels": 3}, {"self_condition": True}):
        code, _, err = call("run", "--device", "cpu", model=UnetConfig(dim=8, dim_mults=(1,), **field))
        assert code == 2 and "conditioned on images" in err
