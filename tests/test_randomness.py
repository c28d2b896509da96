"""What a training step draws: known distributions, and importance sampling against improved diffusion's resampler."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import chisquare

from mindspore import nn

from ms_diffusion.randomness import (
    TIMESTEP_SAMPLING,
    ImportanceTimesteps,
    antithetic_timesteps,
    drop_labels,
    log_normal_timesteps,
    offset_noise,
    uniform_timesteps,
)
from ms_diffusion.runtime import UserError
from ms_diffusion.training.checkpoint import Checkpoint

examples = settings(deadline=None, max_examples=50)
either = pytest.mark.parametrize("draw", [uniform_timesteps, antithetic_timesteps])


# Uniform and antithetic


@examples
@given(seed=st.integers(0, 2**32), T=st.integers(1, 2000), n=st.integers(1, 300), antithetic=st.booleans())
def test_timesteps_lie_in_range_and_repeat(seed, T, n, antithetic):
    draw = antithetic_timesteps if antithetic else uniform_timesteps
    t = draw(np.random.default_rng(seed), T, n)
    assert t.shape == (n,) and t.dtype == np.int32 and t.min() >= 0 and t.max() < T
    np.testing.assert_array_equal(t, draw(np.random.default_rng(seed), T, n))


@examples
@given(seed=st.integers(0, 2**32), T=st.integers(1, 2000), n=st.integers(1, 300))
def test_antithetic_timesteps_come_in_pairs(seed, T, n):
    """t and T - 1 - t; of an odd number one is alone."""
    t = antithetic_timesteps(np.random.default_rng(seed), T, n)
    half = (n + 1) // 2
    np.testing.assert_array_equal(t[half:], T - 1 - t[: n - half])


@either
@pytest.mark.parametrize("n", [1, 7, 64])
def test_each_timestep_is_as_likely(draw, n):
    """Also in every place of a batch."""
    rng, T = np.random.default_rng(n), 11
    batches = np.array([draw(rng, T, n) for _ in range(2000)])
    for place in {0, n // 2, n - 1}:
        assert chisquare(np.bincount(batches[:, place], minlength=T)).pvalue > 1e-3
    if draw is uniform_timesteps:  # antithetic ones are not independent
        assert chisquare(np.bincount(batches.ravel(), minlength=T)).pvalue > 1e-3


def test_antithetic_timesteps_lower_the_variance():
    """Of a batch's mean loss: to nothing where it is linear in t, 8-fold for t^2 (the variance of t^2 is 4/45, that of
    (t^2 + (1 - t)^2) / 2 is 1/180, of half as many), and by much for any monotone loss."""
    rng, T, n, batches = np.random.default_rng(0), 1000, 32, 1500

    def variances(loss):
        draws = uniform_timesteps, antithetic_timesteps
        return [np.var([loss(draw(rng, T, n) / (T - 1)).mean() for _ in range(batches)]) for draw in draws]

    uniform, antithetic = variances(lambda t: 3 * t - 1)
    assert uniform > 0.02 and antithetic < 1e-20
    uniform, antithetic = variances(np.square)
    np.testing.assert_allclose([uniform, antithetic], [4 / 45 / n, 2 / 180 / n], rtol=0.12)
    for loss in (np.exp, np.sqrt, lambda t: 1 / (0.1 + t)):
        uniform, antithetic = variances(loss)
        assert antithetic < 0.6 * uniform


# Importance


class Resampler:
    """LossSecondMomentResampler of improved diffusion, by its rules: the last 10 losses of each."""

    def __init__(self, T, keep=10):
        self.T, self.keep, self.history = T, keep, [[] for _ in range(T)]

    def update(self, t, losses):
        for place, loss in zip(t, losses, strict=True):
            self.history[place] = [*self.history[place], loss][-self.keep :]

    def probabilities(self):
        if any(len(losses) < self.keep for losses in self.history):
            return np.full(self.T, 1 / self.T)
        weights = np.sqrt(np.mean(np.array(self.history, np.float64) ** 2, axis=-1))
        weights /= weights.sum()
        return weights * (1 - 0.001) + 0.001 / self.T


def warm(T, seed=0, keep=10):
    """All timesteps with `keep` losses, of different size."""
    importance, rng = ImportanceTimesteps(T, keep), np.random.default_rng(seed)
    scale = rng.uniform(0.1, 3, T)
    for _ in range(keep):
        importance.update(np.arange(T), (scale * rng.uniform(0.5, 1.5, T)).astype(np.float32))
    return importance


def test_uniform_until_every_timestep_has_its_losses():
    importance, everywhere = ImportanceTimesteps(5, keep=3), np.arange(5)
    for _ in range(2):
        np.testing.assert_array_equal(importance.probabilities(), np.full(5, 0.2))
        importance.update(everywhere, np.arange(5, dtype=np.float32))
    importance.update(everywhere[:4], np.arange(4, dtype=np.float32))
    for _ in range(10):  # more of one does not help the others
        importance.update(np.array([0, 0]), np.array([7, 7], np.float32))
    np.testing.assert_array_equal(importance.probabilities(), np.full(5, 0.2))
    t, weights = importance.draw(np.random.default_rng(0), 64)
    assert set(t) == {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(weights, np.ones(64, np.float32))
    importance.update(np.array([4]), np.array([4], np.float32))
    assert (importance.probabilities() != 0.2).all()


def test_probabilities_by_hand():
    """In proportion to sqrt(mean(loss^2)), a thousandth of it uniform; only the last `keep` losses count."""
    importance = ImportanceTimesteps(2, keep=2)
    importance.update(np.array([0, 0, 0, 1, 1]), np.array([100, 3, 4, -5, 5], np.float32))
    share = np.sqrt(12.5) / (np.sqrt(12.5) + 5)
    np.testing.assert_allclose(importance.probabilities(), [0.999 * p + 0.0005 for p in (share, 1 - share)], rtol=1e-9)
    importance = ImportanceTimesteps(4, keep=1, uniform_share=0.2)
    importance.update(np.arange(4), np.array([1, 3, 0, 4], np.float32))
    np.testing.assert_allclose(importance.probabilities(), [0.15, 0.35, 0.05, 0.45], rtol=1e-9)


@examples
@given(seed=st.integers(0, 2**32), T=st.integers(1, 6), steps=st.integers(0, 30), n=st.integers(1, 8))
def test_probabilities_are_improved_diffusions(seed, T, steps, n):
    rng, ours, theirs = np.random.default_rng(seed), ImportanceTimesteps(T), Resampler(T)
    for _ in range(steps):
        t, losses = rng.integers(0, T, n), np.exp(rng.normal(0, 2, n)).astype(np.float32)
        ours.update(t, losses)
        theirs.update(t, losses)
        p = ours.probabilities()
        assert p.shape == (T,) and p.dtype == np.float64
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
        np.testing.assert_allclose(p, theirs.probabilities(), rtol=1e-6)


@examples
@given(seed=st.integers(0, 2**32), T=st.integers(1, 30), warmed=st.booleans(), keep=st.integers(1, 12))
def test_weights_make_the_mean_unbiased(seed, T, warmed, keep):
    """E[w f(t)] under p is the plain mean of f, whatever f."""
    importance = warm(T, seed, keep) if warmed else ImportanceTimesteps(T, keep)
    rng = np.random.default_rng(seed)
    t, weights = importance.draw(rng, 4000)
    assert t.dtype == np.int32 and weights.dtype == np.float32 and t.shape == weights.shape == (4000,)
    p, f, w = importance.probabilities(), rng.normal(size=T), np.full(T, np.nan)
    w[t] = weights
    drawn = ~np.isnan(w)
    assert p[~drawn].sum() < 0.01
    expected = np.mean(f) - np.sum(f[~drawn]) / T
    np.testing.assert_allclose(np.sum((p * w * f)[drawn]), expected, rtol=1e-5, atol=1e-6)


def test_draws_follow_the_probabilities():
    importance, n = warm(12), 200_000
    t, weights = importance.draw(np.random.default_rng(1), n)
    p = importance.probabilities()
    assert p.max() > 3 * p.min()
    assert chisquare(np.bincount(t, minlength=12), n * p).pvalue > 1e-3
    f = np.linspace(-1, 2, 12)
    spread = np.sqrt(np.sum(f**2 / (144 * p)) - np.mean(f) ** 2)  # of w f(t)
    assert abs(np.mean(weights * f[t]) - np.mean(f)) < 5 * spread / np.sqrt(n)


def test_importance_lowers_the_variance():
    """Of losses that a timestep repeats: w f(t) is then almost the same for all t, by the uniform share's measure."""
    importance, losses = ImportanceTimesteps(50), np.geomspace(0.1, 10, 50).astype(np.float32)
    for _ in range(10):
        importance.update(np.arange(50), losses)
    t, weights = importance.draw(np.random.default_rng(0), 5000)
    np.testing.assert_allclose(weights * losses[t], losses.mean(), rtol=0.03)
    assert np.std(losses) > losses.mean()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_losses_that_are_not_finite_are_passed_over(bad):
    importance, other = warm(3), warm(3)
    t, losses = np.array([0, 1, 1, 2]), np.array([1, bad, 2, bad], np.float32)
    importance.update(t, losses)
    other.update(t[[0, 2]], losses[[0, 2]])
    for ours, expected in zip(importance.parameters, other.parameters, strict=True):
        np.testing.assert_array_equal(ours.asnumpy(), expected.asnumpy())
    assert np.isfinite(importance.probabilities()).all()


def test_timesteps_without_loss_are_not_forgotten():
    importance = ImportanceTimesteps(4, keep=1)
    importance.update(np.arange(4), np.zeros(4, np.float32))
    np.testing.assert_allclose(importance.probabilities(), 0.25)
    importance.update(np.array([1]), np.array([1], np.float32))
    np.testing.assert_allclose(importance.probabilities()[[0, 2, 3]], 0.00025, rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 40])
def test_a_checkpoint_brings_the_state_back(tmp_path, steps):
    """Bit for bit, so that the same draws follow, and the same state after more losses."""

    def update(importance, seed):
        rng = np.random.default_rng(seed)
        importance.update(rng.integers(0, 4, 8), rng.random(8, np.float32))

    net, importance, restored = nn.Dense(2, 2), ImportanceTimesteps(4), ImportanceTimesteps(4)
    optimizer = nn.Adam(net.trainable_params())
    for seed in range(steps):
        update(importance, seed)
    Checkpoint(tmp_path, net, optimizer, extra_parameters=importance.parameters).save(steps)
    assert Checkpoint(tmp_path, net, optimizer, extra_parameters=restored.parameters).load_latest()["step"] == steps

    for _ in range(3):
        for a, b in zip(importance.parameters, restored.parameters, strict=True):
            assert a.asnumpy().dtype == b.asnumpy().dtype
            np.testing.assert_array_equal(a.asnumpy(), b.asnumpy())
        draws = [each.draw(np.random.default_rng(5), 100) for each in (importance, restored)]
        for a, b in zip(*draws, strict=True):
            np.testing.assert_array_equal(a, b)
        update(importance, 1000)
        update(restored, 1000)
    assert (importance.counts.asnumpy() > 0).any()
    with pytest.raises(UserError, match="timesteps.counts"):  # and does not go unnoticed where it is missing
        Checkpoint(tmp_path, net, optimizer).load_latest()


def test_the_ways_to_draw_have_their_names():
    assert TIMESTEP_SAMPLING == ("uniform", "antithetic", "importance", "log-normal")


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.2, 1.2), (0.7, 0.3)])
def test_log_normal_timesteps(mean, std):
    """On the times s of a flow log(s / (1 - s)) is normal, and the times are logit-normal; half of a batch mirrors the
    other."""
    T = 10_000
    s = np.arange(1, T + 1) / T
    with np.errstate(divide="ignore"):
        ratios = s / (1 - s)
    t = log_normal_timesteps(np.random.default_rng(0), ratios, 20_000, mean, std)
    assert t.dtype == np.int32 and t.min() >= 0 and t.max() < T - 1
    found = np.log(ratios[t])
    assert found.mean() == pytest.approx(mean, abs=1e-3) and found.std() == pytest.approx(std, rel=0.02)
    np.testing.assert_allclose(found[:10_000] + found[10_000:], 2 * mean, atol=0.2)
    assert stats.kstest(found[:10_000], "norm", (mean, std)).pvalue > 1e-3


# Noise with an offset


@pytest.mark.parametrize("strength", [0.1, 0.5, 2.0])
def test_moments_of_offset_noise(strength):
    """A pixel is N(0, 1 + s^2); pixels of one channel share s^2 of it, those of other channels and images nothing."""
    n = 40_000
    x = offset_noise(np.random.default_rng(0), (n, 2, 2, 3), strength)
    assert x.shape == (n, 2, 2, 3) and x.dtype == np.float32
    covariance = x.reshape(n, 12).T.astype(np.float64) @ x.reshape(n, 12) / n
    expected = np.eye(12) + strength**2 * np.kron(np.eye(2), np.ones((6, 6)))
    error = 5 * (1 + strength**2) * np.sqrt(2 / n)
    np.testing.assert_allclose(covariance, expected, atol=error)
    assert abs(np.corrcoef(x[:, 0, 0, 0], x[:, 0, 1, 2])[0, 1] - strength**2 / (1 + strength**2)) < 5 / np.sqrt(n)
    assert abs(np.mean(x[1:] * x[:-1])) < error  # from image to image
    assert abs(x.mean()) < 5 * np.sqrt((1 + strength**2) / n)
    offsets = x.mean((2, 3))
    assert abs(np.mean(((x - offsets[:, :, None, None]) ** 2).sum((2, 3))) - 5) < 0.1  # what is left is plain noise


@examples
@given(seed=st.integers(0, 2**32), shape=st.sampled_from([(3, 1, 4, 4), (1, 3, 2, 5), (2, 4), (2, 3, 4)]))
def test_no_offset_is_plain_noise(seed, shape):
    plain = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    np.testing.assert_array_equal(offset_noise(np.random.default_rng(seed), shape, 0.0), plain)
    with_offset = offset_noise(np.random.default_rng(seed), shape, 1.0)
    assert with_offset.shape == shape and (with_offset != plain).any()
    np.testing.assert_array_equal(offset_noise(np.random.default_rng(seed), shape, 1.0), with_offset)


# Labels


@examples
@given(seed=st.integers(0, 2**32), labels=st.lists(st.integers(0, 9), min_size=1, max_size=50), share=st.floats(0, 1))
def test_a_label_stays_or_becomes_null(seed, labels, share):
    labels = np.array(labels, np.int32)
    dropped = drop_labels(np.random.default_rng(seed), labels, share, 10)
    assert dropped.shape == labels.shape and dropped.dtype == np.int32
    assert ((dropped == labels) | (dropped == 10)).all()
    np.testing.assert_array_equal(drop_labels(np.random.default_rng(seed), labels, 0.0, 10), labels)
    np.testing.assert_array_equal(drop_labels(np.random.default_rng(seed), labels, 1.0, 10), np.full(len(labels), 10))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_labels_that_are_dropped(share):
    n, labels = 50_000, np.arange(50_000) % 10
    dropped = drop_labels(np.random.default_rng(0), labels, share, 10) == 10
    assert abs(dropped.mean() - share) < 5 * np.sqrt(share * (1 - share) / n)
    by_class = np.bincount(labels[dropped], minlength=10)
    assert chisquare(by_class).pvalue > 1e-3  # whatever the label
    assert abs(np.corrcoef(dropped[1:], dropped[:-1])[0, 1]) < 5 / np.sqrt(n)
